"""The card of a predictor: every sentence and number is read off its laws and runs."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ...version import __version__
from .fitted import FittedLaws

TEMPLATE = Path(__file__).with_name("law_card_template.md")
TAGS = ["hf_warmstart", "scaling-laws", "hyper-parameters"]


def render_law_card(laws: FittedLaws, *, license: str | None = None, repo_id: str | None = None) -> ModelCard:
    """The card of a predictor.

    Args:
        laws (`FittedLaws`). license (`str`, *optional*): the Hub's identifier; never guessed. repo_id (`str`, *optional*): for
            the code that loads it.
    """
    from .predictor import summary

    data = ModelCardData(library_name="hf_warmstart", tags=TAGS, license=license)
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=laws.name,
        version=__version__,
        repo_id=repo_id,
        summary="\n".join(f"    {line}" for line in summary(laws).splitlines()),
        data=_data(laws),
        preset=laws.is_preset,
        optima=laws.optima,
        limits=_limits(laws),
    )


def _data(laws: FittedLaws) -> str:
    if laws.is_preset:
        return f"A published law: {laws.source}."
    reach = "; ".join(f"{name} from {low:.3g} to {high:.3g}" for name, (low, high) in laws.range.items())
    where = "The text that losses were measured on is not recorded."
    if laws.fingerprint is not None:
        print_ = laws.fingerprint
        where = f"Losses are of {print_.tokens:,} tokens with sha256 `{print_.tokens_digest}`" + (
            f", text sha256 `{print_.text}`." if print_.text else "."
        )
    return f"{laws.runs}; {len(laws.optima)} budgets; {reach}. Compute is counted as `{laws.accounting}`. {where}"


def _limits(laws: FittedLaws) -> list[str]:
    """What the laws do not know."""
    recipe = laws.recipe
    found = [
        "Learning rate and batch only. They hold for the optimizer and schedule of the runs "
        f"({recipe.schedule}, weight decay {recipe.weight_decay:g}, betas {recipe.betas[0]:g} and {recipe.betas[1]:g}).",
        "Beyond the range of the data they are extrapolated; a recommendation says by how much.",
        "Retention of what a model knew is not in the objective.",
        "Two checkpoints of the same loss count the same, whether their learning rate had been decayed or not.",
    ]
    if not laws.is_preset:
        found.insert(
            1, "The inverse of the loss law holds on its own evaluation text, tokenizer and family of models."
        )
    if laws.is_preset:
        found.insert(1, "It says nothing of loss, so that a checkpoint counts by the compute that was spent on it.")
    return [*found, *laws.warnings]
