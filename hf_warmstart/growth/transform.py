"""One tensor through its axes' maps: the only place where numbers are grown.

For a weight, with `W` on the axes that write and `R` on those that read:

    w' = W_out w R_in^T  +  Z (I - W_in R_in^T)  +  fresh

`fresh` fills coordinates without a source where they must not be silent: all rows that an inner space gained, and the
columns that read what a residual stream gained. Gradients, and with them first moments, follow the dual maps
(`G' = R_out G W_in^T`), second moments the squares of their factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ..errors import StateError
from .layout import Role, TensorLayout
from .maps import SpaceMap, _column
from .matrix import Matrix, Side, Totals, work_dtype
from .pairing import Pairing
from .runs import Along, ReadRows, without_means

Kind = Literal["weight", "first_moment", "second_moment", "update"]
# How many entries of a second moment are averaged at once. It decides bits (of sums), and so is no setting.
AVERAGED = 2**20


@dataclass(frozen=True)
class TensorGrowth:
    """Everything that decides one grown tensor.

    Args:
        layout: its axes. maps: the map of each axis.
        name: its name in the grown model, which seeds its randomness.
        seed: the growth's seed.
        noise: relative size of `Z`. shrink: None, or the factor on the carried part over a complete fresh tensor.
        fresh: makes rows of the class's own initialisation of the grown tensor's matrix form, when they are needed.
        factor: what the tensor takes back of a number in the forward that grows with the sizes.
        fill: the constant that it holds instead (ends of new branches, norms between new layers), or None.
        new_layer: whether the tensor lies in a layer that adds nothing at first.
        filling: what entries without a source take in a second moment; None for the mean of the others.
    """

    layout: TensorLayout
    maps: tuple[SpaceMap, ...]
    name: str
    seed: int
    noise: float
    shrink: float | None
    fresh: Callable[[int, int], Tensor]
    factor: float = 1.0
    fill: float | None = None
    new_layer: bool = False
    filling: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis_map.m for axis_map in self.maps)

    @property
    def is_copy(self) -> bool:
        """Whether the tensor comes through unchanged."""
        return all(m.is_identity for m in self.maps) and self.shrink is None and self.fill is None and self.factor == 1

    # -- weights --------------------------------------------------------------------------------------------------

    def weight(self, tensor: Tensor) -> Tensor:
        """The grown weight, in the tensor's dtype and on its device; the input is untouched."""
        rows = tensor.reshape(self.matrix_before)
        grown = self.weight_rows(lambda start, stop: rows[start:stop], 0, self.matrix_shape[0])
        return grown.reshape(self.shape)

    @property
    def matrix_before(self) -> tuple[int, int]:
        """Shape of the parent's tensor in its matrix form: the last axis are the columns, all others together the rows.

        A vector has one column, and a scalar one row as well.
        """
        return matrix_shape(tuple(axis_map.n for axis_map in self.maps))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the grown tensor in its matrix form."""
        return matrix_shape(self.shape)

    @property
    def by_rows(self) -> bool:
        """Whether rows can be made from a few of the parent's rows; else the whole parent's tensor is read for each call."""
        return self._averaged is None

    def totals(self, read: ReadRows) -> Totals:
        """What all rows take from the whole parent's tensor: computed once, and passed to each `weight_rows`.

        The parent is read once, in pieces, or not at all where the operator needs nothing of the kind. The numbers do not
        depend on the machine, on threads or on how rows are asked for later.
        """
        if self.fill is not None or self.is_copy or not self.by_rows:
            return Totals()
        return self._matrix.totals(read)

    def weight_rows(
        self, read: ReadRows, start: int, stop: int, totals: Totals | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Rows of the grown weight's matrix form (`matrix_shape`), bit for bit those of the whole.

        Args:
            read: gives the parent's rows from one number to another, as a tensor (rows, columns) of `matrix_before`, in
                the dtype of the weight; (0, 0) asks for an empty one. It is called for what is needed only.
            start, stop: the rows.
            totals: from `totals`; None computes them, which may read the whole parent.
            out: where to write them, of shape (stop - start, columns) and the weight's dtype; None makes a tensor.

        Returns:
            (stop - start, columns), in the parent's dtype and on its device.
        """
        if out is None:
            like = read(0, 0)
            out = torch.empty(stop - start, self.matrix_shape[1], dtype=like.dtype, device=like.device)
        if self.fill is not None:
            return out.fill_(self.fill)
        if self.is_copy:
            return out.copy_(read(start, stop))
        if self._averaged is not None:
            growth, read = self._after_averaging(read)
            growth._matrix.grow(read, start, stop, growth._matrix.totals(read), out)
        else:
            self._matrix.grow(read, start, stop, self.totals(read) if totals is None else totals, out)
        return out

    @cached_property
    def _matrix(self) -> Matrix:
        roles, maps = self.layout.roles, self.maps
        cut = len(maps) - 1 if len(maps) > 1 else len(maps)
        alongs = [Along.of(axis_map, role) for axis_map, role in zip(maps, roles, strict=True)]
        sides = Side.of(maps[:cut], roles[:cut]), Side.of(maps[cut:], roles[cut:])
        shrunk = self.shrink is not None
        axis = self._paired_axis if not shrunk else None
        along_columns = axis is not None and axis >= cut

        def pairing() -> Pairing:
            over = maps[axis or 0]
            return (
                Pairing(over.source, over.write, over.n) if along_columns else Pairing.of_rows(maps[:cut], axis or 0)
            )

        return Matrix(
            Along.together(alongs[:cut]),
            Along.together(alongs[cut:]),
            sides,
            self.factor if self.shrink is None else self.shrink,
            0.0 if shrunk else self.layout.offset,
            self.noise,
            None if axis is None else int(along_columns),
            pairing,
            shrunk,
            self.fresh,
            (self.seed, self.name),
        )

    @property
    def _paired_axis(self) -> int | None:
        """The axis that reads copies, over which noise cancels; None where there is no noise."""
        copied = [
            k for k, role in enumerate(self.layout.roles) if role == "read" and bool((self.maps[k].copies > 1).any())
        ]
        return copied[-1] if copied and self.noise else None

    @cached_property
    def _averaged(self) -> int | None:
        """An axis with mean channels that is one of several that are rows together; None as a rule."""
        for axis, (axis_map, role) in enumerate(zip(self.maps, self.layout.roles, strict=True)):
            if (
                role == "write"
                and axis < len(self.maps) - 1
                and len(self.maps) > 2
                and bool((axis_map.mean != 0).any())
            ):
                return axis
        return None

    def _after_averaging(self, read: ReadRows) -> tuple[TensorGrowth, ReadRows]:
        """The growth without that axis, of a tensor that was taken along it."""
        axis = self._averaged or 0
        tensor = read(0, self.matrix_before[0]).reshape(tuple(axis_map.n for axis_map in self.maps))
        pushed = self.maps[axis].push(tensor.to(work_dtype(tensor)), axis, self.layout.roles[axis])
        maps = tuple(without_means(axis_map) if k == axis else axis_map for k, axis_map in enumerate(self.maps))
        growth = replace(self, maps=maps)
        rows = pushed.reshape(growth.matrix_before)
        return growth, lambda start, stop: rows[start:stop]

    def first_moment(self, tensor: Tensor) -> Tensor:
        """`exp_avg` grown by the dual maps; zero in layers that add nothing at first."""
        work = tensor.to(work_dtype(tensor))
        grown = self._push(work, dual=True) / self.factor
        return (torch.zeros_like(grown) if self.new_layer else grown).to(tensor.dtype)

    def second_moment(self, tensor: Tensor) -> Tensor:
        """`exp_avg_sq` grown by the squares of the dual factors.

        Entries without a source take the mean of the carried ones: zero beside an old step count would give them a
        hidden learning rate several times too large (arXiv 2604.04281, facts 2.4).
        """
        work = tensor.to(work_dtype(tensor))
        grown = work / self.factor**2
        for axis, squares in enumerate(self._square_maps()):
            grown = squares.push(grown, axis, "write")
        unsourced = self._unsourced()
        if unsourced is not None:
            filling = self.with_filling(lambda start, stop: tensor[start:stop]).filling
            grown.masked_fill_(unsourced.to(tensor.device), filling)
        return grown.to(tensor.dtype)

    def _square_maps(self) -> list[SpaceMap]:
        """How a gradient's square grows along each axis."""
        duals = [m if role == "read" else m.dual() for m, role in zip(self.maps, self.layout.roles, strict=True)]
        return [SpaceMap(d.n, d.source, d.write**2, d.read**2, torch.zeros_like(d.mean), d.silent) for d in duals]

    def with_filling(self, read: ReadRows) -> TensorGrowth:
        """Itself with the number that entries without a source take in a second moment, which is of the whole tensor: taken
        once, it serves every block of rows. `read` gives the parent's rows from one number to another."""
        if self.filling is not None or not any(bool(m.unsourced.any()) for m in self.maps):
            return self
        return replace(self, filling=self._mean_square(read))

    def _mean_square(self, read: ReadRows) -> float:
        """The mean of the carried entries of a second moment, from the parent's alone; of few rows at a time, the same
        ones however the tensor is read, so that it has the same bits."""
        shares, carried = [], 1
        for squares in self._square_maps():
            share = torch.zeros(squares.n, dtype=torch.float64)
            sourced = ~squares.unsourced
            share.index_add_(0, squares.source[sourced], squares.write[sourced])
            shares.append(share)
            carried *= int(sourced.sum())
        rows = len(shares[0])
        step = max(1, AVERAGED // max(1, math.prod(len(share) for share in shares[1:])))
        total = 0.0
        for low in range(0, rows, step):
            part = read(low, min(low + step, rows)).to(torch.float64, copy=True)
            for share in reversed(shares[1:]):
                part = part @ share.to(part.device)
            total += float(part @ shares[0][low : low + step].to(part.device))
        return total / self.factor**2 / max(carried, 1)

    def moment_rows(self, read: ReadRows, kind: Kind, start: int, stop: int) -> Tensor:
        """Rows of a grown moment, made from the parent's rows that they come from.

        Args:
            read: gives the parent's rows from one number to another. kind: a moment, or an average of steps.
            start, stop: the rows, of the grown tensor's leading axis.
        """
        growth = self.with_filling(read) if kind == "second_moment" else self
        rows = self.maps[0].rows(start, stop)
        if self.takes_all_rows(kind):
            needed = torch.arange(rows.n)
        else:
            needed = torch.unique(rows.source[~rows.unsourced])
            needed = (
                needed if len(needed) else torch.zeros(1, dtype=torch.int64)
            )  # a row without a source has a width too
            places = torch.searchsorted(needed, rows.source)
            rows = replace(rows, n=len(needed), source=torch.where(rows.unsourced, rows.source, places))
        return replace(growth, maps=(rows, *self.maps[1:])).grow(_read_runs(read, needed), kind)

    def takes_all_rows(self, kind: Kind) -> bool:
        """Whether a row of a grown moment may hold the mean of all the parent's rows."""
        side = "read" if kind == "first_moment" else "write"
        return kind != "second_moment" and self.layout.roles[0] == side and bool((self.maps[0].mean != 0).any())

    def update(self, tensor: Tensor) -> Tensor:
        """An average of steps, grown as the weight that they moved; zero in layers that add nothing at first."""
        work = tensor.to(work_dtype(tensor))
        grown = self._push(work, dual=False) * self.factor
        return (torch.zeros_like(grown) if self.new_layer else grown).to(tensor.dtype)

    def new_entries(self, rows: tuple[int, int] | None = None) -> Tensor:
        """bool of the grown shape, or of its rows from one number to another: all but the first copy of each old entry."""
        mask = self._mask(lambda axis_map, role: ~axis_map.first_copies, rows)
        if mask is None:
            none = torch.zeros((), dtype=torch.bool).expand(self.shape)
            mask = none if rows is None else none[slice(*rows)]
        return mask.clone()

    def grow(self, tensor: Tensor, kind: Kind) -> Tensor:
        """The grown tensor of a kind. Raises `StateError` where the tensor does not have the layout's shape."""
        if tuple(tensor.shape) != tuple(m.n for m in self.maps):
            raise StateError(
                f"{self.name}: the {kind} has shape {tuple(tensor.shape)}, the parent's layout says "
                f"{tuple(m.n for m in self.maps)}. Pass the state of the model that was grown."
            )
        return getattr(self, kind)(tensor)

    def pull_gradient(self, gradient: Tensor) -> Tensor:
        """A gradient of the grown tensor in the parent's coordinates: `G = W_out^T G' R_in`."""
        pulled = gradient * self.factor
        for axis, (axis_map, role) in enumerate(zip(self.maps, self.layout.roles, strict=True)):
            pulled = axis_map.pull(pulled, axis, role)
        return pulled if self.fill is None else torch.zeros_like(pulled)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _push(self, tensor: Tensor, dual: bool) -> Tensor:
        for axis, (axis_map, role) in enumerate(zip(self.maps, self.layout.roles, strict=True)):
            side: Role = role if not dual else ("read" if role == "write" else "write")
            tensor = axis_map.push(tensor, axis, side)
        return tensor

    def _mask(self, choose: Callable[[SpaceMap, Role], Tensor], rows: tuple[int, int] | None = None) -> Tensor | None:
        """bool of the grown shape, or of some of its rows: entries that any axis chooses; None where none chooses any."""
        mask, shape = None, list(self.shape)
        for axis, (axis_map, role) in enumerate(zip(self.maps, self.layout.roles, strict=True)):
            chosen = choose(axis_map, role)
            if axis == 0 and rows is not None:
                chosen = chosen[slice(*rows)]
                shape[0] = len(chosen)
            if bool(chosen.any()):
                part = _column(chosen, axis, len(self.maps))
                mask = part if mask is None else mask | part
        return None if mask is None else mask.expand(shape)

    def _unsourced(self) -> Tensor | None:
        return self._mask(lambda axis_map, role: axis_map.unsourced)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a tensor's matrix form: the last axis are its columns, all others together its rows."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


def _read_runs(read: ReadRows, needed: Tensor) -> Tensor:
    """Rows at ascending places, each run of neighbours read at once and nothing between."""
    ends = (needed.diff() != 1).nonzero().flatten() + 1
    runs = needed.tensor_split(ends.tolist())
    parts = [read(int(run[0]), int(run[-1]) + 1) for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
