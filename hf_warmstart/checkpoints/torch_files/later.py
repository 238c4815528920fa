"""Sharded checkpoints (DCP) of tensors that are made when they are written, one at a time.

torch plans the files from what stands for the tensors, which takes no memory. When the writer asks for one it is made,
and its memory is given back when the writer asks for the next: torch's own keeps all it wrote until the file is closed.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.device_mesh import DeviceMesh

from ...errors import CheckpointError, StateError, WarmstartError
from .placement import Rows, from_rows, rows_of


@dataclass(frozen=True)
class Later:
    """A tensor that is made when it is written.

    Args:
        shape, dtype: of the whole tensor.
        make: gives the rows from one number to another, or the whole tensor for None; in memory of their own.
    """

    shape: Sequence[int]
    dtype: torch.dtype
    make: Callable[[Rows | None], Tensor]


def save_sharded(state: dict[str, Any], folder: Path, mesh: DeviceMesh | None) -> None:
    """Write a state, with `Later` among its values, as a DCP folder; all ranks take part.

    Args:
        mesh: all ranks in a row, each of which makes and writes its rows of every tensor; None for one process.

    Raises:
        WarmstartError: a tensor could not be made. OSError: `folder` cannot be made.
        CheckpointError: anything else failed in writing.
    """
    makers: dict[tuple[Any, ...], Callable[[], Tensor]] = {}
    planned = _planned(state, (), mesh, makers)
    # No copying ahead, which would have several tensors made at once.
    writer = dcp.FileSystemWriter(folder, overwrite=False, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what no_dist asks for
        try:
            dcp.save(planned, storage_writer=writer, planner=_Planner(makers), no_dist=not dist.is_initialized())
        except CheckpointException as fault:
            causes = [cause for cause, _ in fault.failures.values()]
            if all(isinstance(cause, WarmstartError) for cause in causes):
                raise StateError("; ".join(sorted({str(cause) for cause in causes}))) from fault
            problems = sorted({f"{type(cause).__name__}: {cause}." for cause in causes})
            raise CheckpointError(
                f"{folder.name} could not be written. Make room or mend the disk, and run again:", problems
            ) from fault


def _planned(value: Any, keys: tuple[Any, ...], mesh: DeviceMesh | None, makers: dict) -> Any:
    """A state with what stands for its tensors, and how each is made."""
    if isinstance(value, dict):
        return {key: _planned(item, (*keys, key), mesh, makers) for key, item in value.items()}
    if not isinstance(value, Later):
        return value
    rows = rows_of(value.shape, mesh) if mesh is not None and len(value.shape) else None
    makers[keys] = lambda: value.make(rows)
    # One number, shown in the shape of many.
    blank = torch.empty((), dtype=value.dtype)
    if mesh is None or rows is None:
        return blank.expand(tuple(value.shape))
    return from_rows(blank.expand((rows[1] - rows[0], *value.shape[1:])), value.shape, mesh)


class _Planner(dcp.DefaultSavePlanner):
    """Makes tensors as they are asked for, and takes the last one's memory back."""

    def __init__(self, makers: dict[tuple[Any, ...], Callable[[], Tensor]]):
        super().__init__()
        self._makers = makers
        self._last: Tensor | None = None

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        make = self._makers.get(tuple(self.mappings[write_item.index.fqn]))
        if make is None:
            return super().resolve_data(write_item)
        if self._last is not None:
            self._last.untyped_storage().resize_(0)
        self._last = make().contiguous()
        return self._last
