"""Small parents on disk, and what growing them in memory would write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_warmstart import grow
from hf_warmstart.growth.certify import Certificate
from hf_warmstart.hub import save_grown

from ..models import tiny_model

# Stands for a measured one where a card is not what is tested.
CERTIFICATE = Certificate(True, 0.0, 0.0, reason="not measured")
PARENT_SHARDS, CHILD_SHARDS = "40KB", "70KB"
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def save_parent(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random parent in several files, with settings for generation and a file that is no weight beside them."""
    model = tiny_model(family, **changes).to(dtype)
    model.generation_config.update(do_sample=True, temperature=0.7, max_new_tokens=9)
    model.save_pretrained(folder, max_shard_size=PARENT_SHARDS)
    assert len(list(folder.glob("*.safetensors"))) > 1
    (folder / "tokenizer.json").write_text("{}")
    return folder


def add_training_state(folder: Path, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Make a folder a checkpoint of `Trainer`'s with random AdamW moments; the state by name."""
    from transformers import Trainer

    generator = torch.Generator().manual_seed(3)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    decayed = Trainer.get_decay_parameter_names(None, model)
    groups = [[n for n in shapes if n in decayed], [n for n in shapes if n not in decayed]]
    entries = {
        name: {
            "step": torch.tensor(7.0),
            "exp_avg": torch.randn(shape, generator=generator).to(dtype),
            "exp_avg_sq": torch.rand(shape, generator=generator).to(dtype),
        }
        for name, shape in shapes.items()
    }
    numbers = {name: number for number, name in enumerate(n for group in groups for n in group)}
    settings = [{**SETTINGS, "weight_decay": decay} for decay in (0.1, 0.0)]
    saved = {
        "state": {numbers[name]: entry for name, entry in entries.items()},
        "param_groups": [{**one, "params": [numbers[n] for n in g]} for one, g in zip(settings, groups, strict=True)],
    }
    torch.save(saved, folder / "optimizer.pt")
    torch.save({"last_epoch": 7}, folder / "scheduler.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7, "log_history": []}))
    named = [{**one, "params": list(g)} for one, g in zip(settings, groups, strict=True)]
    return {"state": entries, "param_groups": named}


def grown_in_memory(parent: Path, folder: Path, certificate: Certificate | None = CERTIFICATE, **options: Any) -> Path:
    """What `from_pretrained`, `grow` and `save_grown` write."""
    child = grow(AutoModelForCausalLM.from_pretrained(parent), **options)
    return save_grown(child, folder, certificate=certificate, max_shard_size=CHILD_SHARDS)


def differing(made: Path, expected: Path) -> list[str]:
    """Names of files that one of two folders lacks, or that differ.

    Of `growth.json` the list of files with their checksums is left out, which only a growth from files to files knows.
    """
    names = {path.name for folder in (made, expected) for path in folder.iterdir()}
    return sorted(name for name in names if _content(made / name) != _content(expected / name))


def _content(path: Path) -> Any:
    if not path.is_file():
        return None
    if path.name != "growth.json":
        return path.read_bytes()
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "files"}
