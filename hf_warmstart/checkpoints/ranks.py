"""One process or many: what only the main one does, and where all wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import WarmstartError

Result = TypeVar("Result")


def mesh_of_ranks() -> DeviceMesh | None:
    """All ranks in a row; None where there is one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return init_device_mesh("cpu", (dist.get_world_size(),))


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def on_main(work: Callable[[], Result]) -> Result:
    """What the main rank's work gives, on every rank; where it fails, all of them do."""
    if not dist.is_initialized():
        return work()
    outcome: list[Any] = [None, None]
    fault: Exception | None = None
    if is_main():
        try:
            outcome[0] = work()
        except Exception as raised:
            fault = raised
            outcome[1] = f"The main rank failed: {type(raised).__name__}: {raised}"
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise fault or WarmstartError(outcome[1])
    return outcome[0]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
