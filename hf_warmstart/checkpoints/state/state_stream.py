"""An optimizer's grown state written to one file, a block of rows at a time.

The file is that of `torch.save(grow_optimizer_state(...))`, byte for byte; in memory there is one block, or one row where
a row is larger.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ...errors import StateError
from ...growth.plan import GrowthPlan
from ...growth.state import check_entry, check_state, check_state_policy, grow_groups
from ...growth.state_rows import EntryGrowth
from ..torch_files.later import Later, save_sharded
from ..torch_files.sink import TorchFileSink, torch_file_bytes

BLOCK_BYTES = 16 * 2**20
Progress = Callable[[int], None]


@dataclass(frozen=True)
class OptimizerBytes:
    """What writing a grown state takes.

    Args:
        file: the file's exact size. memory: about the most that is held at once while a block is grown.
    """

    file: int
    memory: int


def write_optimizer(
    state: Mapping[str, Any],
    plan: GrowthPlan,
    path: str | os.PathLike,
    state_policy: str,
    named: bool,
    *,
    max_block_bytes: int = BLOCK_BYTES,
    progress: Progress | None = None,
) -> None:
    """Grow an optimizer's state into a file.

    Args:
        state: `{"state": {name: entry}, "param_groups": [...]}` with the parent's names; an entry may read from disk, as
            those of `read_parent_state` do.
        plan: the growth. path: the file; what lies there is replaced.
        state_policy: as for `grow_optimizer_state`; the file of `"asymmetric_reset"` is `GrownAdamW`'s.
        named: whether the file is keyed by name, as that of an FSDP model is, or by number.
        max_block_bytes (`int`, defaults to 16 MiB): the most that a block of grown rows takes. Larger blocks cost memory
            and are no faster.
        progress: is told the bytes of each block that was written.

    Raises:
        StateError: the state is not the parent's, of no known optimizer, or changes on disk while it is read.
        OSError: the file cannot be written.
    """
    skeleton, names = _skeleton(state, plan, state_policy, named)
    growth: tuple[str, EntryGrowth] | None = None
    with TorchFileSink(path, skeleton) as sink:
        for keys, _ in sink.pieces:
            name, key = names[keys[1]], keys[2]
            if growth is None or growth[0] != name:
                growth = name, EntryGrowth(plan, name, state["state"][plan.source_name(name)], state_policy)
            start = 0
            for rows in growth[1].blocks(key, max_block_bytes):
                sink.write(keys, start, rows)
                start += len(rows) if rows.ndim else 1
                if progress is not None:
                    progress(rows.nbytes)
        sink.finish()


def write_sharded_optimizer(
    state: Mapping[str, Any],
    plan: GrowthPlan,
    folder: str | os.PathLike,
    state_policy: str,
    mesh: DeviceMesh | None,
    *,
    max_block_bytes: int = BLOCK_BYTES,
) -> None:
    """Grow an optimizer's state into a DCP folder; all ranks take part, and each holds its rows of one piece at a time.

    Args:
        state, plan, state_policy, max_block_bytes: as for `write_optimizer`, but for `"asymmetric_reset"`, which no
            sharded optimizer can go on from.
        folder: the new folder. mesh: all ranks in a row; None for one process.

    Raises:
        StateError: as for `write_optimizer`; or the state cannot be cut over ranks.
    """

    @lru_cache(maxsize=1)
    def growth_of(name: str) -> EntryGrowth:
        return EntryGrowth(plan, name, state["state"][plan.source_name(name)], state_policy)

    def later(name: str, key: str, piece: Tensor) -> Later:
        return Later(piece.shape, piece.dtype, lambda rows: growth_of(name).piece(key, max_block_bytes, rows))

    grown: dict[str, Any] = {}
    for name in plan.names:
        entry = state["state"].get(plan.source_name(name))
        if not entry:
            continue
        if problems := check_entry(name, entry, tuple(plan.shapes[plan.source_name(name)])):
            raise StateError("; ".join(problems))
        growth = growth_of(name)
        if mesh is not None:
            growth.refuse_if_cut()
        grown[name] = {
            key: later(name, key, value) if isinstance(value, Tensor) and value.is_meta else value
            for key, value in growth.described.items()
        }
    groups = grow_groups(state["param_groups"], plan)
    save_sharded({"optimizer": {"state": grown, "param_groups": groups}}, Path(folder), mesh)


def optimizer_bytes(
    state: Mapping[str, Any],
    plan: GrowthPlan,
    path: str | os.PathLike,
    state_policy: str,
    named: bool,
    *,
    max_block_bytes: int = BLOCK_BYTES,
) -> OptimizerBytes:
    """What `write_optimizer` will take; nothing is read but what describes the state.

    Args, Raises: as for `write_optimizer`. The path's name counts, since it lies in the file.
    """
    skeleton, names = _skeleton(state, plan, state_policy, named)
    memory = [0]
    for name in names.values():
        entry = state["state"].get(plan.source_name(name)) if skeleton["state"] else None
        if entry:
            memory.append(EntryGrowth(plan, name, entry, state_policy).memory(max_block_bytes))
    return OptimizerBytes(torch_file_bytes(path, skeleton), max(memory))


def _skeleton(
    state: Mapping[str, Any], plan: GrowthPlan, state_policy: str, named: bool
) -> tuple[dict[str, Any], dict[Any, str]]:
    """The grown state with its pieces on the meta device, as the file holds it, and the name of each parameter in it."""
    check_state_policy(state_policy)
    grown: dict[str, Any] = {"state": {}, "param_groups": grow_groups(list(state["param_groups"]), plan)}
    if state_policy != "reset":
        check_state(state["state"], state["param_groups"], plan, complete=False)
        for name in plan.names:
            if entry := state["state"].get(plan.source_name(name)):
                grown["state"][name] = EntryGrowth(plan, name, entry, state_policy).described
    if state_policy == "asymmetric_reset":
        # GrownAdamW takes its settings from the file, as every optimizer does: new entries at the rate of old ones.
        grown["param_groups"] = [{"new_lr_peak": 1.0, "new_lr_steps": 0, **group} for group in grown["param_groups"]]
    if named:
        return grown, {name: name for name in grown["state"]}
    return number_optimizer_state(grown), {number: name for name, number in _numbers(grown).items()}


def _numbers(named: Mapping[str, Any]) -> dict[str, int]:
    names = [name for group in named["param_groups"] for name in group["params"]]
    return {name: number for number, name in enumerate(names)}


def number_optimizer_state(named: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state keyed by number, as torch saves it, its groups with the names beside the numbers."""
    numbers = _numbers(named)
    groups = [
        {**group, "params": [numbers[name] for name in group["params"]], "param_names": list(group["params"])}
        for group in named["param_groups"]
    ]
    return {"state": {numbers[name]: entry for name, entry in named["state"].items()}, "param_groups": groups}
