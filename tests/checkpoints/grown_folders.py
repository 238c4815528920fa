"""A tiny parent in a folder and what `grow_checkpoint` makes of it, and ways to spoil either."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from hf_warmstart import Certificate, grow_checkpoint
from hf_warmstart.checkpoints.safetensors.source import SafetensorsSource
from hf_warmstart.checkpoints.weights import whole as whole_weights

from ..models import tiny_model

SHARD = "300KB"  # four files of a tiny Llama of width 2


_certificates: dict[str, Certificate] = {}


def certify_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let growths of one config be certified once: it takes most of their time here."""
    measure = whole_weights.certify_record

    def certificate(config):
        key = config.to_json_string()
        if key not in _certificates:
            _certificates[key] = measure(config)
        return _certificates[key]

    monkeypatch.setattr(whole_weights, "certify_record", certificate)


def save_parent(folder: Path, seed: int = 0, **changes) -> Path:
    """A tiny Llama in three files."""
    tiny_model("llama", seed, **changes).save_pretrained(folder, max_shard_size="100KB")
    return folder


def grow_folder(parent: Path, folder: Path, **growth) -> Path:
    """The parent, widened (or as asked), in files of `SHARD`."""
    grow_checkpoint(parent, folder, max_shard_size=SHARD, threads=1, **(growth or {"width": 2.0}))
    return folder


def flip(folder: Path, tensor: str, entry: int = 0) -> str:
    """Flip the lowest bit of an entry's first byte; the name of the file."""
    with SafetensorsSource(folder) as source:
        place = source.tensors[tensor]
    path = folder / place.file
    data = bytearray(path.read_bytes())
    data[place.offset + entry * place.dtype.itemsize] ^= 1
    path.write_bytes(data)
    return place.file


def facts(folder: Path) -> dict:
    """What `growth.json` holds."""
    return json.loads((folder / "growth.json").read_text())


def change_facts(folder: Path, **changes) -> None:
    (folder / "growth.json").write_text(json.dumps(facts(folder) | changes))


def change_config(folder: Path, **changes) -> None:
    """Change settings in `config.json`; those that become None go."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def correct_sum(folder: Path, file: str) -> None:
    """Let `growth.json` list a file as it is."""
    files = facts(folder)["files"]
    files[file]["sha256"] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    change_facts(folder, files=files)


def tensors_in(path: Path) -> dict:
    """All tensors of one file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
