"""What can be said of a grown model: read from its records, measured by the certificate, or given by the caller."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import WarmstartError
from ..growth.certify import Certificate, certify
from ..growth.config import GrowthConfig
from ..growth.plan import GrowthRecord

PARENT = "parent"  # as a licence: the parent's own


def config_of(model: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
    """The config of a model, or the config itself; anything else raises, adapters included."""
    if isinstance(model, PreTrainedConfig):
        return model
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        adapters = " with adapters" if isinstance(model, PreTrainedModel) else ""
        raise WarmstartError(
            f"A grown PreTrainedModel is needed, got {type(model).__name__}{adapters}. Pass the result of grow(...), "
            f"adapters merged (merge_and_unload)."
        )
    return model.config


def records_of(config: PreTrainedConfig) -> list[GrowthRecord]:
    """The records that a config carries, oldest first; a config without any raises."""
    records = GrowthRecord.all_of(config)
    if not records:
        raise WarmstartError(
            f"This {type(config).__name__} carries no growth record (config.warmstart), so there is nothing to tell of "
            f"its growth. Pass a model made by grow(...), or use the model's own save_pretrained and push_to_hub."
        )
    return records


def certify_record(config: PreTrainedConfig) -> Certificate:
    """The certificate of the last growth that a config records, measured anew on a twin of its parent."""
    record = records_of(config)[-1]
    return certify(record.parent_config(config), GrowthConfig.from_dict(record.growth_config))


def origin(records: list[GrowthRecord]) -> list[GrowthRecord]:
    """The last growths that were made one after another in memory: only the parent of the first of them has a name."""
    first = len(records) - 1
    while first and not records[first].parent:
        first -= 1
    return records[first:]


def is_hub_id(record: GrowthRecord) -> bool:
    """Whether the parent is a repository on the Hub: `org/name`, or a bare name with a commit. A folder has neither."""
    try:
        validate_repo_id(record.parent)
    except HFValidationError:
        return False
    return bool(record.parent) and ("/" in record.parent or record.revision is not None)


def parent_license(record: GrowthRecord) -> dict[str, str]:
    """What a parent's own card on the Hub says of its licence: `license`, with name and link where it is none of the Hub's.

    Empty where the parent is not on the Hub, cannot be reached, or says nothing.
    """
    if not is_hub_id(record):
        return {}
    try:
        path = hf_hub_download(record.parent, "README.md", revision=record.revision)
        said = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (HFValidationError, HTTPError, OSError, ValueError):
        return {}
    found = {name: said.get(name) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in found.items() if isinstance(value, str)} if found["license"] else {}


def scalar_changes(record: GrowthRecord) -> list[tuple[str, list]]:
    """Changed config attributes, name and [before, after], without lists and tables."""
    return [(n, pair) for n, pair in record.changes.items() if not any(isinstance(v, (list, dict)) for v in pair)]


def checked_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """Metrics as plain data; anything but finite numbers raises, all offenders named."""
    given = dict(metrics or {})
    bad = sorted(
        f"{name}={value!r}"
        for name, value in given.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
    )
    if bad:
        raise WarmstartError(f"Metrics must be finite numbers, got {', '.join(bad)}. Leave these out or pass numbers.")
    return given


def to_json(data: Any) -> str:
    """Readable, valid JSON: numbers that are not finite, which JSON lacks, become their names."""
    return json.dumps(_finite(data), indent=2, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data
