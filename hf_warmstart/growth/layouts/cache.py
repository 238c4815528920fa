"""Layouts on file: one small file for each model type, written by the package's own derivation.

A layout depends on a class and on the switches of a config, not on its sizes. `switches` is a digest of what can matter
in a small config; a file holds the layouts of a class's default switches and of the usual variants, so that a growth of
a known model derives nothing. `python -m hf_warmstart.growth.layouts` writes the files anew, or checks them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version

from ..layout import Layout
from .probe import probe_config

FOLDER = Path(__file__).with_name("families")
# What a config says beside how its class computes: names, tokens, training, numbers that multiply or bound.
IGNORED = re.compile(
    r"_name_or_path|transformers_version|dtype|torch_dtype|architectures|warmstart|return_dict|use_cache|id2label|label2id|"
    r"output_.*|.*token_id.*|.*(dropout|pdrop|layerdrop|eps|epsilon|theta|initializer|std|window|coef|aux_loss|jitter).*|"
    r"problem_type|tokenizer_class|task_specific_params|_attn_implementation|is_decoder"
)
# Floats that decide sizes; all others only multiply.
SIZING = re.compile(r".*(rotary|expand|ratio|proj_factor|mult).*")


def switches(config: PreTrainedConfig) -> str:
    """A digest of what in a config decides the layout, whatever its sizes."""
    text = json.dumps(_reduced(probe_config(config).to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _reduced(data: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in data.items():
        name = str(name)
        if IGNORED.fullmatch(name) or isinstance(value, float) and not SIZING.fullmatch(name):
            continue
        if name in ("rope_parameters", "rope_scaling"):
            value = {k: v for k, v in (value or {}).items() if "rotary" in k}
        kept[name] = _reduced(value) if isinstance(value, dict) else value
    return kept


@cache
def _entries(model_type: str) -> list[dict]:
    """What is on file for a type; nothing where it was written for another transformers, whose class may differ."""
    path = FOLDER / f"{model_type}.json"
    data = json.loads(path.read_text()) if path.is_file() else {}
    return data["layouts"] if data.get("transformers") == transformers_version else []


def read(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Layout | None:
    """The layout on file for a class under the switches of a config, if there is one."""
    if not model_class.__module__.startswith("transformers."):
        return None  # a user's own class, whatever its name
    entries = [entry for entry in _entries(config.model_type) if entry["class"] == model_class.__name__]
    if not entries:
        return None
    wanted = switches(config)
    return next((Layout.from_data(entry["layout"]) for entry in entries if wanted in entry["switches"]), None)


def dumps(model_type: str, entries: list[dict], version: str) -> str:
    """The text of a family's file: one fact a line, so that a change can be reviewed."""
    parts = []
    for entry in entries:
        layout = entry["layout"]
        lines = [f"   {json.dumps(key)}: {_block(value)}" for key, value in layout.items()]
        head = f'  "class": {json.dumps(entry["class"])}, "switches": {json.dumps(entry["switches"])}'
        parts.append(" {" + "\n" + head + ',\n  "layout": {\n' + ",\n".join(lines) + "\n  }}")
    body = ",\n".join(parts)
    return (
        f'{{"model_type": {json.dumps(model_type)}, "transformers": {json.dumps(version)}, "layouts": [\n{body}\n]}}\n'
    )


def _block(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "{\n" + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n   }"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"    {json.dumps(v)}" for v in value) + "\n   ]"
    return json.dumps(value)
