"""Which rows of a tensor this process keeps, where tensors are cut along their leading axis (FSDP2's `Shard(0)`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Rows = tuple[int, int]


def rows_of(shape: Sequence[int], mesh: DeviceMesh) -> Rows:
    """The first row that this process keeps of a tensor of a shape, and the one after its last."""
    local, offset = compute_local_shape_and_global_offset(tuple(shape), mesh, [Shard(0)])
    return offset[0], offset[0] + local[0]


def rows_of_parameter(parameter: Tensor) -> Rows | None:
    """The rows that this process keeps of a parameter; None where it is not cut, or in another way."""
    if isinstance(parameter, DTensor) and tuple(parameter.placements) == (Shard(0),):
        return rows_of(parameter.shape, parameter.device_mesh)
    return None


def from_rows(rows: Tensor, shape: Sequence[int], mesh: DeviceMesh) -> DTensor:
    """The whole tensor of which every process gives its rows; nothing is sent."""
    stride = [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * size)
    return DTensor.from_local(
        rows,
        mesh,
        [Shard(0)],
        run_check=False,
        shape=tuple(shape),
        stride=tuple(stride),  # type: ignore[arg-type]
    ).detach()
