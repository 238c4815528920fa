"""`HparamPredictor`: laws of loss, learning rate and batch, fitted to runs or published, and settings read from them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import CommitInfo, ModelCard, ModelHubMixin

from ...errors import WarmstartError
from ..fits.fitting import fit_forms, fit_loss, ridge_of
from ..fits.laws import LossLaw
from ..fits.optima import Optimum, find_optima
from ..tables.evaluation import Fingerprint
from ..tables.runs import RunTable, read_runs
from .fitted import RIDGE_RULE, SQUARE_ROOT_RULE, FittedLaws
from .presets import law_from_dict, preset_data, preset_names, preset_recipe
from .recipe import Recipe
from .recommend import recommend
from .recommendation import HparamRecommendation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class HparamPredictor(
    ModelHubMixin,
    library_name="hf_warmstart",
    tags=["hf_warmstart", "scaling-laws", "hyper-parameters"],
    paper_url="https://huggingface.co/papers/2606.05610",
):
    """Learning rate and batch for continued pre-training, from laws and a checkpoint's held-out loss.

    Made by `fit` or `from_pretrained`.

    Args:
        laws (`FittedLaws`): the laws with what they were fitted to.

    Example:

        >>> runs = [{"params": n, "tokens": 20 * n, "learning_rate": 3e-3 * a * (n / 1e7) ** -0.5, "batch_tokens": 1e5 * b,
        ...          "loss": 2 + (n / 1e7) ** -0.2 + 0.03 * (a - 1) ** 2 + 0.02 * (b - 1) ** 2}
        ...         for n in (1e7, 2e7, 4e7, 8e7) for a in (0.5, 0.7, 1.0, 1.4, 2.0) for b in (0.5, 1.0, 2.0)]
        >>> predictor = HparamPredictor.fit(runs)
        >>> predictor.form
        'compute'
        >>> found = predictor.recommend(params=2e8, tokens=4e9, sequence_length=1024, eval_loss=2.9)
        >>> found.total_compute > found.planned_compute
        True

    Source: arXiv 2606.05610, whose constants are not public: the method is to fit one's own.
    """

    def __init__(self, laws: FittedLaws):
        self.laws = laws

    # -- fitting --------------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        runs: Any,
        form: str = "auto",
        *,
        columns: Mapping[str, str] | None = None,
        accounting: str = "6ND",
        sequence_length: int | None = None,
        method: str = "auto",
        draws: int = 1000,
        seed: int = 0,
        recipe: Mapping[str, Any] | None = None,
        fingerprint: Fingerprint | None = None,
        name: str = "fitted law",
    ) -> HparamPredictor:
        """Fit laws to runs at several budgets, each with several learning rates and batches.

        Args:
            runs: a `Sweep` or its folder, which bring recipe and fingerprint with them; or a path, `DataFrame`, `Dataset` or
                list of dicts with columns `params`, `tokens`, `learning_rate`,
                `batch_tokens`, `loss`; see `read_runs`. Every run trained from scratch and decayed at its own end.
            form (`str`, defaults to `"auto"`): `"compute"` (arXiv 2606.05610), `"params_tokens"`, or whichever the budgets
                support.
            columns (`dict[str, str]`, *optional*): our name of a column -> the table's.
            accounting (`str`, defaults to `"6ND"`): how compute is counted; `"config"` takes the table's column.
            sequence_length (`int`, *optional*): of the runs.
            method (`str`, defaults to `"auto"`): how a budget's optimum is found: `"quadratic"`, `"near_optimal"`,
                `"interpolation"`, or `"joint"`: all in one fit, with published exponents as a weak prior, which `"auto"` takes
                where noise leaves most of them unknown.
            draws (`int`, defaults to 1000): of the bootstrap that intervals come from. seed (`int`, defaults to 0): of it.
            recipe (`dict`, *optional*): what the runs were trained with besides: fields of `Recipe`, such as
                `{"weight_decay": 0.1, "schedule": "cosine"}`.
            fingerprint (`Fingerprint`, *optional*): of the evaluation set, from `evaluation.fingerprint`; without it a
                checkpoint's loss cannot be checked to be of the same text.
            name (`str`): for tables and cards.

        Returns:
            `HparamPredictor`. `runs` is untouched.

        Raises:
            WarmstartError: columns are missing, units cannot be, or there are fewer than three budgets with three runs each.
        """
        if not draws >= 2:
            raise WarmstartError(f"draws={draws!r} must be 2 or more: intervals come from them.")
        from ..sweeps.described import described

        if (sweep := described(runs)) is not None:
            runs, recipe = sweep.runs, {**sweep.recipe, **(recipe or {})}
            fingerprint = fingerprint or sweep.fingerprint
        table = read_runs(runs, columns=columns, accounting=accounting, sequence_length=sequence_length)
        optima, noise = find_optima(table.frame, set_aside=table.set_aside, method=method, draws=draws, seed=seed)
        chosen, forms, doubts = fit_forms(optima, form, seed)
        warnings = [*table.warnings, *doubts]
        if method == "auto" and optima[0].method == "joint":
            warnings.append(
                f"Losses scatter by {noise:.2g} nats, so that single budgets do not tell their best settings: all were fitted "
                "together, with published exponents as a weak prior."
            )
        losses: dict[str, LossLaw | None] = {}
        for own in ("compute", "params_tokens"):
            try:
                losses[own] = found = fit_loss(optima, own, seed) if own in forms else None
                if found is not None and found.form != own == chosen.form:
                    warnings.append(
                        "The losses are no lower for more parameters: the law of loss is one of tokens alone."
                    )
            except WarmstartError as error:
                losses[own] = None
                if own == chosen.form:
                    warnings.append(f"No law of loss, so that a checkpoint's loss says nothing of compute: {error}")
        ridge = ridge_of(optima)
        return cls(
            FittedLaws(
                name=name,
                form=chosen.form,
                learning_rate=chosen.learning_rate.law,
                batch_tokens=chosen.batch_tokens.law,
                recipe=Recipe().with_values(recipe or {}, "the runs"),
                loss=losses["compute"],
                loss_params_tokens=losses["params_tokens"],
                ridge=ridge[0] if ridge else SQUARE_ROOT_RULE,
                ridge_source=f"measured at {len(ridge[1])} budgets" if ridge else RIDGE_RULE,
                range={
                    n: (min(x), max(x))
                    for n in ("compute", "params", "tokens")
                    for x in [[getattr(o, n) for o in optima]]
                },
                lowest_loss=min(o.loss for o in optima),
                accounting=table.accounting,
                sequence_length=table.sequence_length,
                fingerprint=fingerprint,
                noise=noise,
                forms={own: made.to_dict() for own, made in forms.items()},
                optima=[_optimum(o) for o in optima],
                warnings=warnings,
                runs=table,
            )
        )

    # -- what it knows --------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The law's name."""
        return self.laws.name

    @property
    def form(self) -> str:
        """`"compute"`, `"params_tokens"`, or `"preset"` for published laws."""
        return self.laws.form

    @property
    def loss_law(self) -> LossLaw | None:
        """The law of loss in the form chosen; None of presets."""
        return self.laws.loss_params_tokens if self.form == "params_tokens" else self.laws.loss

    @property
    def runs(self) -> RunTable | None:
        """The runs, and those that were set aside."""
        return self.laws.runs

    @property
    def warnings(self) -> list[str]:
        """What about the runs, or the laws through them, should be looked at."""
        return list(self.laws.warnings)

    def __str__(self) -> str:
        return summary(self.laws)

    def __repr__(self) -> str:
        return f"HparamPredictor({self.name!r}, form={self.form!r}, {self.laws.describe()})"

    def plot(self, path: str | os.PathLike | None = None) -> Figure:
        """Laws, data and intervals; written to a file where a path is given."""
        from .plots import plot_laws

        figure = plot_laws(self.laws)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def recommend(
        self, *, tokens: float, sequence_length: int, params: float | None = None, **options: Any
    ) -> HparamRecommendation:
        """Settings for a run that starts from a checkpoint, or from scratch where none is given.

        Args:
            tokens (`float`): of the run. sequence_length (`int`): of its sequences, in tokens.
            params (`float`, *optional*): N, without lookup tables and head; read off the checkpoint where there is one.
            **options: the checkpoint, its loss, and what is fixed already, each optional:

                - `checkpoint`: a folder with `config.json`, and `trainer_state.json` where there is one; or a Hub id.
                - `model` (`PreTrainedModel`), `config` (`PreTrainedConfig`): in place of the checkpoint's.
                - `eval_dataset`, `tokenizer`: the law's own evaluation set, on which the loss is measured over tokens.
                - `eval_loss` (`float`): the loss instead, in nats per token. `eval_fingerprint` (`Fingerprint`): of what it was
                  measured on.
                - `probes`: short runs from the checkpoint on the new text, each decayed at its end: a table like `fit`'s, with
                  `learning_rate`, `batch_tokens`, `tokens` and `loss`. What the law says of the best, less its tokens,
                  counts where it is more than `eval_loss` says: a checkpoint of other text starts high and falls within a
                  few steps. Three or more at rates a factor of two apart, else alike, from a checkpoint that is worth no
                  more of the text than they saw, correct the law's learning rate: it is asked for the step from their
                  tokens to the run's alone, no longer for that from small models to this one.
                - `tokens_seen` (`float`): by the checkpoint. `annealed` (`bool`): whether its rate was decayed.
                - `world_size` (`int`, 1): devices. `per_device_train_batch_size` (`int`, 8): sequences that fit on one. The
                  batch is rounded to what these divide, and the learning rate moved along the ridge.
                - `batch_tokens` (`float`): a batch that is given, in place of the law's.
                - `replay_share` (`float`, 0): of the tokens, that are of the old text; they cost compute like any.
                - `cautious` (`bool`, `False`): the lower end of the learning rate's interval (of a preset, half of it), for
                  less forgetting.
                - `trust_loss` (`bool`, `False`): take a loss that cannot be checked to be the law's for one that is.

        Returns:
            `HparamRecommendation`. A loss at or below the law's floor is no compute: with the tokens seen known it counts by
            the compute spent, with a warning.

        Raises:
            WarmstartError: impossible or missing numbers; a loss of another text, tokenizer or family than the law's; a loss
                at or below the law's floor with nothing else to go by.
        """
        if unknown := sorted(set(options) - set(signature(recommend).parameters)):
            raise WarmstartError(
                f"recommend has no options {unknown}; it has {sorted(signature(recommend).parameters)[1:]}."
            )
        return recommend(self.laws, tokens=tokens, sequence_length=sequence_length, params=params, **options)

    # -- saving ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> HparamPredictor:
        """A published law by its name, or a predictor from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: one of `preset_names()`, a folder that `save_pretrained` wrote, or a Hub id.
            **kwargs: of `ModelHubMixin.from_pretrained`, such as `revision` and `token`.

        Raises:
            WarmstartError: there is no such law.

        Example:

            >>> HparamPredictor.from_pretrained("deepseek").form
            'preset'
        """
        from .storage import fetched

        source = str(pretrained_model_name_or_path)
        if source in preset_names() and not Path(source).is_dir():
            return cls(_preset(source))
        return fetched(super().from_pretrained, source, kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        from .storage import write

        write(self.laws, Path(save_directory))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> HparamPredictor:
        from .storage import read

        return cls(
            read(
                model_id,
                **{k: v for k, v in kwargs.items() if k in ("revision", "cache_dir", "token", "local_files_only")},
            )
        )

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        license: str | None = None,
        commit_message: str = "Upload laws of hyper-parameters",
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        config: Any = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
    ) -> CommitInfo:
        """Push the laws, their draws, the runs as Parquet, a plot and the card in one commit.

        Args:
            repo_id (`str`): made if missing.
            license (`str`, *optional*): the Hub's identifier of the licence. Never guessed.
            commit_message (`str`): as for `hf_warmstart.push_to_hub`; so are `private`, `token`, `revision` and `create_pr`.
            branch: what `ModelHubMixin.save_pretrained` hands over, with `config` and `model_card_kwargs`; a branch is a
                revision, the config is ours.

        Returns:
            The `huggingface_hub.CommitInfo` of the commit.

        Raises:
            HubError: the Hub refused, or the connection broke; what to do is said.
        """
        from ...hub.commit import commit_folder

        with tempfile.TemporaryDirectory() as folder:
            card = {"repo_id": repo_id, "license": license, **(model_card_kwargs or {})}
            self.save_pretrained(folder, model_card_kwargs=card)
            return commit_folder(
                folder,
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision or branch,
                create_pr=create_pr,
            )

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card: the data's summary, the fit, its limits."""
        from .law_card import render_law_card

        return render_law_card(self.laws, **kwargs)


def summary(laws: FittedLaws) -> str:
    """Laws, budgets and warnings as text."""
    lines = [f"{laws.name}: {laws.describe()}"]
    for name in ("learning_rate", "batch_tokens"):
        law = getattr(laws, name)
        fit = (laws.forms.get(laws.form) or {}).get(name, {})
        together = bool(laws.optima) and all(o["method"] == "joint" for o in laws.optima)  # they lie on the law
        quality = f"   R2 {fit['r_squared']:.3f}" if fit and not together else ""
        lines.append(f"  {name:<14} {formula(law)}{quality}")
    for law in (laws.loss, laws.loss_params_tokens):
        if law is not None:
            lines.append(f"  {'loss':<14} {law}")
    for form, made in laws.forms.items():
        if regret := made["regret"]:
            lines.append(
                f"  regret of {form} on budgets left out: mean {regret['mean']:.3%}, worst {regret['max']:.3%} of the loss"
            )
    if laws.noise is not None:
        lines.append(f"  noise between seeds {laws.noise:.2g} nats; ridge B^{laws.ridge:.2g} ({laws.ridge_source})")
    return "\n".join([*lines, *(f"! {words}" for words in laws.warnings)])


def formula(law: Any) -> str:
    """A law as text: `0.3118 C^-0.125`."""
    letters = {
        "compute": "C",
        "params": "N",
        "tokens": "D",
        "loss": "L",
        "batch_sequences": "B_seq",
        "hidden_size": "d",
    }
    if law is None:
        return "given by hand"
    if hasattr(law, "intercept"):
        return f"{law.intercept:.4g}" + "".join(f" {s:+.4g} ln {letters[n]}" for n, s in law.slopes.items())
    return " ".join([f"{law.coefficient:.4g}", *(f"{letters[n]}^{p:.4g}" for n, p in law.exponents.items())])


def _optimum(optimum: Optimum) -> dict[str, Any]:
    """One budget's optimum as plain data, with the standard deviations of its draws."""
    spread = np.std(optimum.draws, axis=0) if len(optimum.draws) else np.zeros(3)
    names = ("params", "tokens", "compute", "learning_rate", "batch_tokens", "loss", "best_run", "runs", "method")
    return {
        **{name: getattr(optimum, name) for name in names},
        "edges": list(optimum.edges),
        "ln_learning_rate_sd": float(spread[0]),
        "ln_batch_tokens_sd": float(spread[1]),
        "loss_sd": float(spread[2]),
    }


def _preset(name: str) -> FittedLaws:
    data = preset_data()[name]
    batch = data.get("batch_tokens")
    return FittedLaws(
        name=name,
        form="preset",
        learning_rate=law_from_dict(data["learning_rate"]),
        batch_tokens=law_from_dict(batch) if batch else None,
        recipe=preset_recipe(name),
        range={quantity: tuple(ends) for quantity, ends in data["range"].items()},
        source=f"{data['title']}, {data['source']}; {data['fitted_schedule']}; {data['params']}",
    )
