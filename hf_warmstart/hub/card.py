"""The model card of a grown model: every sentence and number comes from its record, its certificate or the caller.

`render_card` gathers the facts and `card_template.md` words them. What is not known is left out: a licence and metrics
appear when they are passed, `base_model` when the record names a repository on the Hub.
"""

from __future__ import annotations

import math
import pprint
import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..growth.certify import LOGITS_TOLERANCE, PULLBACK_TOLERANCE, Certificate
from ..growth.configs import model_class_of
from ..growth.grow import TAG
from ..growth.plan import RECORD_KEY, GrowthRecord
from .citations import papers_of
from .facts import (
    PARENT,
    certify_record,
    checked_metrics,
    config_of,
    is_hub_id,
    origin,
    parent_license,
    records_of,
    scalar_changes,
    to_json,
)
from .history import CURVES_NAME, story

if TYPE_CHECKING:
    from ..scaling.hparams.recommendation import HparamRecommendation
    from ..selection.report import SelectionReport

TEMPLATE = Path(__file__).with_name("card_template.md")
TASK = "text-generation"
# What `Trainer.evaluate()` says of the measurement rather than of the model: shown, but no result in the metadata.
CIRCUMSTANCES = {
    "epoch",
    "eval_bytes",
    "eval_loss_error",
    "eval_runtime",
    "eval_samples",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "eval_tokens",
}


def render_card(
    model: PreTrainedModel | PreTrainedConfig,
    *,
    certificate: Certificate | None = None,
    metrics: Mapping[str, float] | None = None,
    parent_metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    license: str | None = None,
    model_name: str | None = None,
    selection: SelectionReport | None = None,
    recipe: str | None = None,
    history: Iterable[Mapping[str, Any]] | None = None,
    recommendation: HparamRecommendation | None = None,
) -> ModelCard:
    """The card of a grown model.

    Args:
        model (`PreTrainedModel` or `PreTrainedConfig`): a grown model, or its config; the records are read from it.
        certificate (`Certificate`, *optional*): of the last growth; measured when it is not given (seconds).
        metrics (`dict[str, float]`, *optional*): evaluation results under the names of `Trainer.evaluate()`, such as
            `{"eval_loss": 3.2, "eval_tokens": 65536}`.
        parent_metrics (`dict[str, float]`, *optional*): the same of the parent, on the same data.
        dataset (`str`, *optional*): Hub id or name of the data of `metrics`. Without it the metrics stand in the text
            only, since the metadata's `model-index` needs a dataset.
        license (`str`, *optional*): the Hub's identifier of the licence; `"parent"` takes what the parent's own card on the Hub
            says. Never guessed.
        model_name (`str`, *optional*): the title; by default it names class and parent.
        selection (`SelectionReport`, *optional*): by which this start was chosen; its picture is `selection.png` beside it.
        recipe (`str`, *optional*): the YAML of `hf-warmstart run` that made the model.
        history (*optional*): `trainer.state.log_history` of the run since the growth; its picture is `curves.png` beside the
            card, which `save_grown` and `push_to_hub` draw.
        recommendation (`HparamRecommendation`, *optional*): settings for going on, from `HparamPredictor.recommend`.

    Returns:
        A `huggingface_hub.ModelCard`: `.data` holds the metadata, `.save(path)` writes it. The model is untouched.

    Raises:
        WarmstartError: the model carries no record, or a metric is not a finite number.

    Example:

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_warmstart import grow
        >>> parent = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4,
        ...                                       vocab_size=99, num_hidden_layers=2))
        >>> render_card(grow(parent, depth=2), license="mit").data.tags
        ['hf_warmstart', 'identity_blocks']
    """
    config = config_of(model)
    records = records_of(config)
    results, parents_results = checked_metrics(metrics), checked_metrics(parent_metrics)
    told = story(history)
    certificate = certificate or certify_record(config)
    record, rebuilt = records[-1], origin(records)
    source = rebuilt[0]
    architecture = (config.architectures or [type(config).__name__])[0]
    dtype = model.dtype if isinstance(model, PreTrainedModel) else config.dtype or "float32"
    title = model_name or f"{architecture} grown from {source.parent or 'a model without a name'}"
    before, after = record.parameters
    licence = parent_license(source) if license == PARENT else {"license": license} if license else {}
    return ModelCard.from_template(
        _metadata(
            config,
            source,
            tags=[
                *chain.from_iterable(item.operators for item in records),
                *(getattr(model, "model_tags", None) or ()),
            ],
            licence=licence,
            eval_results=_eval_results(results, dataset) if _writes_text(config) else [],
            title=title,
        ),
        template_path=str(TEMPLATE),
        architecture=architecture,
        certificate=certificate,
        command=_command(rebuilt),
        chain=[_chain_row(item) for item in records] if len(records) > 1 else [],
        dataset=dataset,
        dtype=str(dtype).removeprefix("torch."),
        frozen_entries=_number(sum(certificate.frozen.values())),
        from_hub=is_hub_id(source),
        growth_factor=f"{after / before:.3f}",
        license=licence.get("license"),
        license_is_parents=license == PARENT,
        logits_error=_error(certificate.max_relative_error),
        logits_tolerance=f"{LOGITS_TOLERANCE:.0e}",
        metric_rows=_metric_rows(results, parents_results),
        parent_measured=bool(parents_results),
        papers=[paper.to_bibtex() for paper in papers_of(chain.from_iterable(item.operators for item in records))],
        parameters_after=after,
        recommended=recommendation.to_yaml(output_dir="runs/continued").strip()
        if recommendation is not None
        else None,
        recommendation=recommendation,
        story=told,
        tokens_seen=_number(told.tokens) if told and told.tokens else None,
        curves=CURVES_NAME if told and told.has_curves else None,
        operators=_operators(record.operators),
        parameters=[_number(before), _number(after)],
        parent=_parent(source),
        pullback_error=_error(certificate.max_pullback_error),
        pullback_tolerance=f"{PULLBACK_TOLERANCE:.0e}",
        rebuild=_rebuild(config, rebuilt),
        recipe=recipe.rstrip() if recipe is not None else None,
        selection=selection.to_markdown("## How this start was chosen") if selection is not None else None,
        record=record,
        record_key=RECORD_KEY,
        records_json=to_json([item.to_dict() for item in records]),
        size_rows=[(name, _cell(old), _cell(new)) for name, (old, new) in scalar_changes(record)],
        source=source,
        title=title,
    )


def _metadata(
    config: PreTrainedConfig,
    source: GrowthRecord,
    *,
    tags: list[str],
    licence: Mapping[str, str],
    eval_results: list[EvalResult],
    title: str,
) -> ModelCardData:
    """The YAML block at the head of the card."""
    optional: dict[str, Any] = dict(licence)
    if is_hub_id(source):
        optional |= {"base_model": source.parent, "base_model_relation": "finetune"}
    if eval_results:
        optional |= {"model_name": title, "eval_results": eval_results}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK if _writes_text(config) else None,
        tags=list(dict.fromkeys([TAG, *tags])),
        **optional,
    )


def _eval_results(metrics: Mapping[str, float], dataset: str | None) -> list[EvalResult]:
    """Entries of the `model-index`: one for each metric, where the dataset is known."""
    tokens = metrics.get("eval_tokens")
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=_dataset_id(dataset),
            dataset_name=dataset,
            metric_type=name.removeprefix("eval_"),
            metric_name=name if tokens is None else f"{name} over {_number(tokens)} tokens",
            metric_value=value,
        )
        for name, value in metrics.items()
        if dataset and name not in CIRCUMSTANCES
    ]


def _dataset_id(name: str) -> str:
    """A name as the Hub takes it for a data set's id: letters, digits, `_`, `-` and `.`, after at most one owner."""
    if re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", name, flags=re.ASCII):
        return name
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-") or "unnamed"


def _metric_rows(results: Mapping[str, float], parents: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Name, the parent's value and the grown model's, of every metric that either has."""
    names = [*results, *(name for name in parents if name not in results)]
    return [(name, *(_number(found[name]) if name in found else "" for found in (parents, results))) for name in names]


def _writes_text(config: PreTrainedConfig) -> bool:
    return not set(config.architectures or ()).isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def _parent(record: GrowthRecord) -> str:
    """The parent in words."""
    if is_hub_id(record):
        at = f", folder `{record.subfolder}`," if record.subfolder else ""
        at += f" at revision `{record.revision}`" if record.revision else ""
        return f"[{record.parent}](https://huggingface.co/{record.parent}){at}"
    return f"the local model `{record.parent}`" if record.parent else "a model without a name"


def _chain_row(record: GrowthRecord) -> dict[str, Any]:
    changes = (f"`{name}` {_cell(old)} to {_cell(new)}" for name, (old, new) in scalar_changes(record))
    return {
        "parent": _parent(record),
        "changes": ", ".join(changes),
        "parameters": " to ".join(_number(count) for count in record.parameters),
        "operators": _operators(record.operators),
        "exact": record.exact,
    }


def _rebuild(config: PreTrainedConfig, records: list[GrowthRecord]) -> str:
    """Python that makes the model again from the ancestor that was last saved."""
    model_class, source = model_class_of(config).__name__, records[0]
    where = repr(source.parent) if is_hub_id(source) else repr("path/to/parent")
    if is_hub_id(source) and source.revision:
        where += f", revision={source.revision!r}"
    if source.subfolder:
        where += f", subfolder={source.subfolder!r}"
    lines = [
        f"from transformers import {model_class}",
        "",
        "from hf_warmstart import GrowthConfig, grow",
        "",
        f"model = {model_class}.from_pretrained({where})",
    ]
    for record in records:
        asked = pprint.pformat(record.growth_config, width=100, sort_dicts=False)
        lines += ["growth_config = GrowthConfig.from_dict(", textwrap.indent(asked, "    "), ")"]
        lines.append("model = grow(model, growth_config)")
    return "\n".join(lines)


def _command(records: list[GrowthRecord]) -> str | None:
    """The shell's way, where the parent was saved: `THIS` is the repository that the card lies in."""
    if len(records) > 1:
        return None
    source = records[0]
    where = [source.parent] if is_hub_id(source) else ["path/to/parent"]
    revision = ["--revision", source.revision] if is_hub_id(source) and source.revision else []
    subfolder = ["--subfolder", source.subfolder] if source.subfolder else []
    return shlex.join(["hf-warmstart", "grow", *where, "grown", *revision, *subfolder, "--record", "THIS"])


def _operators(names: list[str]) -> str:
    return " + ".join(f"`{name}`" for name in names)


def _cell(value: object) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return _number(value) if is_number else f"`{value}`"  # type: ignore[arg-type]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _error(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "not finite"
