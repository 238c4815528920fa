"""Reading the training state of a parent from a `Trainer` checkpoint: by name, every shape checked, nothing executed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, TRAINER_STATE_NAME

from ..errors import StateError
from ..growth.layout import collect


@dataclass(frozen=True)
class ParentState:
    """The training state in a parent's checkpoint.

    Args:
        config: the parent's config. step: its global step.
        optimizer: `{"state": {name: ...}, "param_groups": [...]}` keyed by the parent's parameter names; None if not read.
        scheduler_step: the position of its learning rate schedule; None if there is no scheduler file.
    """

    config: PreTrainedConfig
    step: int
    optimizer: dict[str, Any] | None
    scheduler_step: int | None


def read_parent_state(
    folder: str | os.PathLike,
    build_parent: Callable[[PreTrainedConfig], nn.Module],
    decay_names: Callable[[nn.Module], list[str]],
    *,
    optimizer: bool = True,
    scheduler: bool = True,
) -> ParentState:
    """Read a checkpoint of the stock `Trainer` or of ours.

    Args:
        folder: `.../checkpoint-500`.
        build_parent: makes the parent from its config, on the meta device.
        decay_names: the trainer's rule for the parameters that are decayed; the order of a stock `optimizer.pt` is all
            decayed parameters, then all others, each in the order of `named_parameters`.
        optimizer, scheduler: which parts are needed.

    Raises:
        StateError: files are missing or do not belong to the parent's class and config.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StateError(
            f"warmstart_from={str(folder)!r} is no folder. Pass the parent's checkpoint, such as runs/base/checkpoint-500."
        )
    missing = [name for name in ("config.json", TRAINER_STATE_NAME) if not (folder / name).is_file()]
    if optimizer and ((folder / "latest").is_file() or any(folder.glob("global_step*"))):
        raise StateError(
            f"{folder.name} is a DeepSpeed checkpoint, whose state is cut into flat partitions. Convert it to a whole "
            "state first (zero_to_fp32.py in the folder gives the weights), and pass state_policy='reset'."
        )
    optimizer_file = next((folder / n for n in (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN) if (folder / n).is_file()), None)
    if optimizer and optimizer_file is None:
        missing.append(f"{OPTIMIZER_NAME} (or pass state_policy='reset')")
    if scheduler and not (folder / SCHEDULER_NAME).is_file():
        missing.append(f"{SCHEDULER_NAME} (or pass schedule_policy='rewarm' or 'rewind')")
    if missing:
        raise StateError(f"The checkpoint {folder.name} lacks files:\n{collect(missing)}")
    config = AutoConfig.from_pretrained(folder)
    step = int(json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"])
    named = None
    if optimizer and optimizer_file is not None:
        parent = build_parent(config)
        named = name_optimizer_state(_load(optimizer_file), parent, decay_names(parent))
    position = int(_load(folder / SCHEDULER_NAME)["last_epoch"]) if scheduler else None
    return ParentState(config, step, named, position)


def _load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def name_optimizer_state(saved: Mapping[str, Any], model: nn.Module, decay_names: list[str]) -> dict[str, Any]:
    """Key an optimizer's state by parameter name instead of number.

    Names come from the file where it has them; else the order is rebuilt from the model.

    Raises:
        StateError: counts or shapes are not the model's.
    """
    groups = saved["param_groups"]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if all("param_names" in group for group in groups):
        names = [list(group["param_names"]) for group in groups]
    else:
        decayed = set(decay_names)
        names = [[n for n in trainable if n in decayed], [n for n in trainable if n not in decayed]]
    counts, expected = [len(group["params"]) for group in groups], [len(part) for part in names]
    if counts != expected:
        raise StateError(
            f"The optimizer file has groups of {counts} parameters, the parent {type(model).__name__} has {expected} "
            "(decayed, not decayed). It belongs to another model, to one with frozen parameters or to other groups; "
            "pass the right checkpoint, or state_policy='reset'."
        )
    by_number = {
        number: name
        for group, part in zip(groups, names, strict=True)
        for number, name in zip(group["params"], part, strict=True)
    }
    wrong = []
    for number, entry in saved["state"].items():
        name = by_number[number]
        for key, value in entry.items():
            if (
                isinstance(value, torch.Tensor)
                and value.ndim
                and name in trainable
                and value.shape != trainable[name].shape
            ):
                wrong.append(
                    f"{name}: {key} has shape {tuple(value.shape)}, the parent's is {tuple(trainable[name].shape)}"
                )
    unknown = sorted(set(by_number.values()) - set(trainable))
    if wrong or unknown:
        raise StateError(
            f"The optimizer file does not belong to the parent {type(model).__name__}:\n"
            f"{collect(wrong + [f'{name} is no trainable parameter of the parent' for name in unknown])}\n"
            "Pass the checkpoint of the model that was grown, or state_policy='reset'."
        )
    return {
        "state": {by_number[number]: dict(entry) for number, entry in saved["state"].items()},
        "param_groups": [
            {**{k: v for k, v in group.items() if k != "param_names"}, "params": part}
            for group, part in zip(groups, names, strict=True)
        ],
    }
