"""The training state in a parent's checkpoint, whoever wrote it: by name, every shape checked, nothing executed.

| written by | optimizer | names |
|---|---|---|
| `Trainer`, `WarmstartTrainer`, DDP | `optimizer.pt` | in the file (ours), else rebuilt from the parent |
| `WarmstartTrainer` under `asymmetric_reset` | `grown_optimizer.pt` | in the file; all entries are old ones from now on |
| `Accelerator.save_state` | `optimizer.bin` | rebuilt from the parent |
| FSDP, full state | `optimizer.bin` | in the file |
| FSDP2, sharded (DCP) | `optimizer_0/` | in the file, each entry read when it is asked for |
| FSDP, one file per rank; DeepSpeed ZeRO | | refused, with the conversion to use |

An optimizer without names numbers its parameters; their order is that of its groups. Known are `Trainer`'s groups (decayed
parameters, then all others), one group of all, and the `no_decay` groups of transformers' own accelerate examples, each in
the order of `named_parameters`; of the parameters that the child trains, else of all. The one whose counts and shapes fit is
taken.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...errors import StateError
from ...growth.adapted_plan import is_adapters
from ...growth.layout import collect
from ...growth.source import ADAPTER_CONFIG_NAME, read_config
from ...growth.state import BORN, NEW, check_entry
from ..torch_files.sharded import ShardedFolder, is_sharded
from ..torch_files.source import read_state_file, readable
from .trainer_files import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, TRAINER_STATE_NAME

SHARDED_OPTIMIZER = "optimizer_0"
GROWN_NAME = "grown_optimizer.pt"  # the state of `GrownAdamW`, which no other optimizer can go on from
OWN_STATE = "warmstart_state.json"  # where a run of `WarmstartTrainer` says how it started
SCHEDULER_NAMES = (SCHEDULER_NAME, "scheduler.bin")
NO_DECAY = ("bias", "LayerNorm.weight", "layer_norm.weight")


@dataclass(frozen=True)
class ParentState:
    """The training state in a parent's checkpoint.

    Args:
        config: the parent's config; None where the folder has none (`Accelerator.save_state`, FSDP2's sharded checkpoints, and
            those of adapters).
        step: how many optimizer steps it took.
        optimizer: `{"state": {name: ...}, "param_groups": [...]}` keyed by the parent's parameter names; None if not read.
            The inner mapping may read each entry from disk when it is asked for.
        scheduler_step: the position of its learning rate schedule; None if there is no scheduler file.
        trainer: what `trainer_state.json` holds; empty without one.
        own: what `warmstart_state.json` holds, where the parent was trained by a `WarmstartTrainer`.
    """

    config: PreTrainedConfig | None
    step: int
    optimizer: dict[str, Any] | None
    scheduler_step: int | None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def eval_loss(self) -> float | None:
        """The last evaluation loss that a trainer logged."""
        rows = [row["eval_loss"] for row in self.trainer.get("log_history", []) if "eval_loss" in row]
        return float(rows[-1]) if rows else None


def read_parent_state(
    folder: str | os.PathLike,
    build_parent: Callable[[PreTrainedConfig | None], nn.Module],
    decay_names: Callable[[nn.Module], list[str]],
    *,
    optimizer: bool = True,
    scheduler: bool = True,
) -> ParentState:
    """Read the training state of a checkpoint; the module says of which.

    Args:
        folder: `.../checkpoint-500`, or what `Accelerator.save_state` wrote.
        build_parent: makes the parent on the meta device from the config in the folder, or from None where it has none.
        decay_names: the trainer's rule for the parameters that are decayed.
        optimizer, scheduler: which parts are needed.

    Raises:
        StateError: files are missing, of a kind that cannot be carried, or do not belong to the parent's class and config.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StateError(
            f"warmstart_from={str(folder)!r} is no folder. Pass the parent's checkpoint, such as runs/base/checkpoint-500."
        )
    if optimizer:
        _refuse_what_cannot_be_read(folder)
    by_trainer = (folder / TRAINER_STATE_NAME).is_file()
    by_accelerate = not by_trainer and any(folder.glob("random_states_*.pkl"))
    file = optimizer_file(folder)
    sharded = is_sharded(folder / SHARDED_OPTIMIZER)
    scheduler_file = _first_file(folder, SCHEDULER_NAMES)
    missing = [] if by_trainer or by_accelerate else [TRAINER_STATE_NAME]
    # Of a sharded model, and of adapters, Trainer writes no config; the child's record of its growth knows the parent's.
    in_shards = sharded or any(folder.glob("optimizer_*rank*.bin"))
    described = any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG_NAME))
    if not by_accelerate and not in_shards and not described:
        missing.append("config.json")
    if optimizer and file is None and not sharded:
        missing.append(f"{OPTIMIZER_NAME} (or pass state_policy='reset')")
    if scheduler and scheduler_file is None:
        missing.append(f"{SCHEDULER_NAME} (or pass schedule_policy='rewarm' or 'rewind')")
    if missing:
        raise StateError(f"The checkpoint {folder.name} lacks files:\n{collect(missing)}")
    config = read_config(folder) if (folder / "config.json").is_file() else None
    trainer = _read_json(folder / TRAINER_STATE_NAME) if by_trainer else {}
    named = None
    if optimizer:
        parent = build_parent(config)
        if sharded or file is None:
            saved = ShardedFolder(folder / SHARDED_OPTIMIZER).optimizer()
        else:
            saved = _of_one_age(read_state_file(file))
        named = name_optimizer_state(saved, parent, decay_names(parent))
    position = None
    if scheduler and scheduler_file is not None:
        position = _count(load_file(scheduler_file), "last_epoch", scheduler_file)
    step = _steps_taken(named, position)
    if by_trainer:
        step = _count(trainer, "global_step", folder / TRAINER_STATE_NAME)
    if by_accelerate and position is not None:
        # accelerate moves a schedule once for each process at every step.
        processes = len(list(folder.glob("random_states_*.pkl")))
        position = step if position == step * processes else position
    own = _read_json(folder / OWN_STATE) if (folder / OWN_STATE).is_file() else {}
    return ParentState(config, step, named, position, trainer, own)


def read_settings(
    folder: Path, parent: nn.Module, decay_names: Callable[[nn.Module], list[str]]
) -> list[dict[str, Any]] | None:
    """The groups of a checkpoint's optimizer by name, whatever its state is; None where they cannot be told."""
    file = optimizer_file(folder)
    if file is None:
        return None
    with contextlib.suppress(StateError, KeyError, TypeError):
        saved, names = load_file(file), decay_names(parent)
        if any(isinstance(name, str) for name in saved["state"]):
            return None  # of an FSDP model, whose loaders want a state
        try:
            return name_optimizer_state(saved, parent, names)["param_groups"]
        except StateError:  # its state, which is not asked for, may be of a kind that is not known
            return name_optimizer_state({**saved, "state": {}}, parent, names)["param_groups"]
    return None


def load_file(path: Path | None) -> dict[str, Any]:
    """A file of tensors and numbers; the tensors stay on disk until they are used.

    Raises:
        StateError: it is damaged, or holds more than tensors and numbers.
    """
    if path is None:
        raise StateError("There is no file to read.")
    with readable(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as fault:
        raise StateError(f"{path.name} in {path.parent} is damaged, or cannot be read: {fault}") from fault
    if not isinstance(data, dict):
        raise StateError(f"{path.name} in {path.parent} is damaged: it holds no JSON object.")
    return data


def _count(data: Any, key: str, path: Path) -> int:
    """A whole number that a file must hold."""
    value = data.get(key) if isinstance(data, dict) else None
    if not isinstance(value, int):
        raise StateError(
            f"{path.name} in {path.parent} is damaged: it has {key}={value!r}, which must be a whole number."
        )
    return value


def optimizer_file(folder: Path) -> Path | None:
    """The file with a checkpoint's optimizer, where one file holds it whole."""
    # Where ours lies, `optimizer.pt` is a mark that stops others.
    return _first_file(folder, (GROWN_NAME, OPTIMIZER_NAME, OPTIMIZER_NAME_BIN))


def _of_one_age(saved: dict[str, Any]) -> dict[str, Any]:
    """A state without the marks of what an earlier growth added: after another growth all of it is old."""
    return {**saved, "state": {key: entry.without(NEW, BORN) for key, entry in saved["state"].items()}}


def _first_file(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _refuse_what_cannot_be_read(folder: Path) -> None:
    if (folder / "latest").is_file() or any(folder.glob("global_step*")):
        raise StateError(
            f"{folder.name} is a DeepSpeed checkpoint, whose state is cut into flat partitions. Convert it to a whole "
            "state first (zero_to_fp32.py in the folder gives the weights), and pass state_policy='reset'."
        )
    if any(folder.glob("optimizer_*rank*.bin")):
        raise StateError(
            f"{folder.name} holds one optimizer file per rank, which only the same number of ranks can read. Save the parent "
            "once more with accelerate's use_dcp=True, or pass state_policy='reset'."
        )


def _steps_taken(named: Mapping[str, Any] | None, position: int | None) -> int:
    """The steps of a run that kept no count of its own: its optimizer's, else its schedule's."""
    for entry in (named or {"state": {}})["state"].values():
        if "step" in entry:
            return int(entry["step"])
    return position or 0


def name_optimizer_state(saved: Mapping[str, Any], model: nn.Module, decay_names: list[str]) -> dict[str, Any]:
    """Key an optimizer's state by parameter name instead of number.

    Raises:
        StateError: counts or shapes are not the model's.
    """
    groups = saved["param_groups"]
    parameters = dict(model.named_parameters())
    if any(isinstance(name, str) for name in saved["state"]):
        named = dict(saved)
        _check_named(named, parameters, model)
        return named
    numbers = [number for group in groups for number in group.get("params", [])]
    if unknown := sorted(set(saved["state"]) - set(numbers)):
        raise StateError(
            f"The optimizer file has states for {unknown[:5]}, which are in none of its groups: it is damaged."
        )
    if all("param_names" in group for group in groups):
        candidates = [[list(group["param_names"]) for group in groups]]
    else:
        # What the child trains, the parent is most likely to have trained; else it trained everything.
        trainable = [name for name, p in parameters.items() if p.requires_grad]
        pools = [trainable] if len(trainable) == len(parameters) else [trainable, list(parameters)]
        candidates = [names for pool in pools for names in _orders(pool, decay_names)]
    counts = [len(group.get("params", [])) for group in groups]
    faults: list[str] = []
    for names in candidates:
        if [len(part) for part in names] == counts:
            named = _named(saved, names)
            try:
                _check_named(named, parameters, model)
            except StateError as fault:
                faults.append(str(fault))
            else:
                _warn_of_guess(named, parameters, groups)
                return named
    if faults:
        raise StateError(faults[0])
    raise StateError(
        f"The optimizer file has groups of {counts} parameters, the parent {type(model).__name__} has "
        f"{[len(part) for part in candidates[0]]} (decayed, not decayed). It belongs to another model, to one with frozen "
        "parameters or to other groups; pass the right checkpoint, or state_policy='reset'."
    )


def _warn_of_guess(
    named: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], groups: Sequence[Mapping]
) -> None:
    """Say which parameters a file without names is taken to be of, where they are not all."""
    held = {name for group in named["param_groups"] for name in group["params"]}
    if any(is_adapters(name) for name in held):
        return  # what trains beside a frozen base is in the adapter's config
    if len(held) < len(parameters) and not all("param_names" in group for group in groups):
        warnings.warn(
            f"The optimizer file has no names and is of {len(held)} of {len(parameters)} parameters. They are taken to be "
            f"those that the child trains; if the parent froze others, its moments would go to the wrong ones. Left out: "
            f"{sorted(set(parameters) - held)[:5]} ...",
            stacklevel=2,
        )


def _orders(names: list[str], decay_names: list[str]) -> list[list[list[str]]]:
    """How an optimizer without names may have grouped its parameters."""
    decayed = set(decay_names)
    plain = [name for name in names if any(part in name for part in NO_DECAY)]
    return [
        [[n for n in names if n in decayed], [n for n in names if n not in decayed]],
        [names],
        [[n for n in names if n not in plain], plain],
    ]


def _named(saved: Mapping[str, Any], names: list[list[str]]) -> dict[str, Any]:
    by_number = {
        number: name
        for group, part in zip(saved["param_groups"], names, strict=True)
        for number, name in zip(group["params"], part, strict=True)
    }
    return {
        "state": {by_number[number]: entry for number, entry in saved["state"].items()},
        "param_groups": [
            {**{k: v for k, v in group.items() if k != "param_names"}, "params": part}
            for group, part in zip(saved["param_groups"], names, strict=True)
        ],
    }


def _check_named(named: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """Names are the model's; and shapes, where the entries lie in memory (others are checked when they are read)."""
    names = {name for group in named["param_groups"] for name in group.get("params") or []} | set(named["state"])
    wrong = [f"{name} is no parameter of the parent" for name in sorted(names - set(parameters))]
    if isinstance(named["state"], dict):
        for name in sorted(set(named["state"]) & set(parameters)):
            wrong += check_entry(name, named["state"][name], tuple(parameters[name].shape))
    if wrong:
        raise StateError(
            f"The optimizer file does not fit the parent {type(model).__name__}:\n{collect(wrong)}\n"
            "Pass the checkpoint of the model that was grown, or state_policy='reset'."
        )
