"""`save_grown`: a folder with the model, the facts of its growth and its card.

Everything is written beside the folder first and moved in file by file when it is complete, so that a fault on the way
leaves what was there before. Weights that the folder held under other names are removed: `from_pretrained` prefers
`model.safetensors` over shards, and would load the old ones.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import WarmstartError
from ..growth.certify import Certificate
from ..version import __version__
from .card import render_card
from .facts import certify_record, checked_metrics, config_of, records_of, to_json
from .history import CURVES_NAME, draw_curves, story

if TYPE_CHECKING:
    from ..scaling.hparams.recommendation import HparamRecommendation
    from ..selection.report import SelectionReport

GROWTH_NAME = "growth.json"
CARD_NAME = "README.md"
# Weights of a whole model as transformers names them: one file, shards, or their index.
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
# Keywords of `save_pretrained` that would send or change something else than what the card describes.
_REFUSED = {"push_to_hub", "state_dict", "variant", "distributed_checkpoint", "is_main_process"}


def save_grown(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    certificate: Certificate | None = None,
    metrics: Mapping[str, float] | None = None,
    parent_metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    license: str | None = None,
    model_name: str | None = None,
    selection: SelectionReport | None = None,
    history: Iterable[Mapping[str, Any]] | None = None,
    recommendation: HparamRecommendation | None = None,
    **save_kwargs: Any,
) -> Path:
    """Save a grown model with `growth.json` (records, certificate, metrics) and a `README.md` card.

    Args:
        model (`PreTrainedModel`): a model made by `grow`, trained since or not; its config carries the records.
        folder (`str` or `PathLike`): where to save; made if missing. Files of the same names are replaced.
        certificate (`Certificate`, *optional*): of the last growth; measured when it is not given (seconds).
        metrics (`dict[str, float]`, *optional*): evaluation results under the names of `Trainer.evaluate()`, such as
            `{"eval_loss": 3.2, "eval_tokens": 65536}`.
        parent_metrics (`dict[str, float]`, *optional*): the same of the parent, on the same data.
        dataset (`str`, *optional*): Hub id or name of the data of `metrics`.
        license (`str`, *optional*): the Hub's identifier of the licence; `"parent"` takes what the parent's own card on the Hub
            says. Never guessed.
        model_name (`str`, *optional*): the card's title; by default it names class and parent.
        selection (`SelectionReport`, *optional*): by which this start was chosen; its files and its table go along.
        history (*optional*): `trainer.state.log_history` of the run since the growth; its curves go along as `curves.png`.
        recommendation (`HparamRecommendation`, *optional*): settings for going on, from `HparamPredictor.recommend`.
        **save_kwargs: passed to `save_pretrained`, such as `max_shard_size="5GB"`.

    Returns:
        The folder, which plain `from_pretrained` loads.

    Raises:
        WarmstartError: the model carries no record, a metric is not a finite number, a keyword does not fit, or
            `folder` is a file; nothing is written.

    Example:

        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_warmstart import grow
        >>> parent = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4,
        ...                                       vocab_size=99, num_hidden_layers=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_grown(grow(parent, depth=2), folder, license="mit")
        ...     sorted(path.suffix for path in saved.iterdir())
        ['.json', '.json', '.json', '.md', '.safetensors']
    """
    if refused := sorted(_REFUSED & set(save_kwargs)):
        raise WarmstartError(f"{refused} do not fit here: the card describes this model, whole. Leave them out.")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise WarmstartError(f"{folder} is a file. Pass the folder to save into.")
    history = list(history or ())
    told = story(history)
    texts = description(
        model,
        certificate=certificate,
        metrics=metrics,
        parent_metrics=parent_metrics,
        dataset=dataset,
        license=license,
        model_name=model_name,
        selection=selection,
        history=history,
        recommendation=recommendation,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as made:
        model.save_pretrained(made, **save_kwargs)
        for name, text in texts.items():
            Path(made, name).write_text(text, encoding="utf-8")
        if selection is not None:
            selection.save(made)
        if told is not None and told.has_curves:
            draw_curves(told, Path(made, CURVES_NAME))
        written = files_below(made)
        for name in written:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(made, name), target)
    for name in stale_weights((path.name for path in folder.iterdir()), written):
        (folder / name).unlink()
    return folder


def description(
    model: PreTrainedModel | PreTrainedConfig,
    *,
    certificate: Certificate | None = None,
    metrics: Mapping[str, float] | None = None,
    parent_metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    license: str | None = None,
    model_name: str | None = None,
    files: Mapping[str, Mapping[str, str | int]] | None = None,
    selection: SelectionReport | None = None,
    recipe: str | None = None,
    history: Iterable[Mapping[str, Any]] | None = None,
    recommendation: HparamRecommendation | None = None,
) -> dict[str, str]:
    """What lies beside the weights of a grown model: the texts of `growth.json` and of the card, by file name.

    Args:
        model: a grown model, or its config. files: size and sha256 of each file of weights, where they are known.
        certificate, metrics, parent_metrics, dataset, license, model_name, selection, history, recommendation: as for
            `save_grown`.
        recipe: as for `render_card`.

    Raises:
        WarmstartError: there is no record, or a metric is not a finite number.
    """
    config = config_of(model)
    records = records_of(config)
    results = checked_metrics(metrics)
    certificate = certificate or certify_record(config)
    card = render_card(
        model,
        certificate=certificate,
        metrics=results,
        parent_metrics=parent_metrics,
        dataset=dataset,
        license=license,
        model_name=model_name,
        selection=selection,
        recipe=recipe,
        history=history,
        recommendation=recommendation,
    )
    facts = {
        "library_version": __version__,
        "records": [record.to_dict() for record in records],
        "certificate": certificate.to_dict(),
        "metrics": results,
        **({"parent_metrics": checked_metrics(parent_metrics)} if parent_metrics else {}),
        "dataset": dataset,
        **({} if files is None else {"files": files}),
    }
    return {GROWTH_NAME: to_json(facts) + "\n", CARD_NAME: str(card)}


def files_below(folder: str | os.PathLike) -> list[str]:
    """Paths of a folder's files, relative to it, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def stale_weights(present: Iterable[str], written: Iterable[str]) -> list[str]:
    """Weights of an earlier save under names that the new one does not use."""
    return sorted(name for name in set(present) - set(written) if WEIGHTS.fullmatch(name))
