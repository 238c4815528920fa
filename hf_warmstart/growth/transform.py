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
from typing import Literal

import torch
from torch import Tensor

from ..errors import StateError
from . import random
from .layout import Role, TensorLayout
from .maps import SpaceMap, _column

Kind = Literal["weight", "first_moment", "second_moment", "update"]
Side = Literal["write", "read"]
ReadRows = Callable[[int, int], Tensor]
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
        fresh: makes the class's own initialisation of the grown tensor, when it is needed.
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
    fresh: Callable[[], Tensor]
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

    def weight(self, tensor: Tensor) -> Tensor:
        """The grown weight, in the tensor's dtype and on its device; the input is untouched."""
        if self.fill is not None:
            return torch.full(self.shape, self.fill, dtype=tensor.dtype, device=tensor.device)
        if self.is_copy:
            return tensor.clone()
        work = tensor.to(_work_dtype(tensor))
        offset = 0.0 if self.shrink is not None else self.layout.offset
        carried = self._push(work + offset if offset else work, dual=False)
        if self.shrink is not None:
            return (carried * self.shrink + self.fresh().to(carried)).to(tensor.dtype)
        if self.factor != 1:
            carried = carried * self.factor
        if offset:
            carried = carried - offset
        if self.noise:
            carried = carried + self._paired_noise(carried)
        free = self._free()
        if free is not None:
            carried = torch.where(free.to(tensor.device), self.fresh().to(carried), carried)
        return carried.to(tensor.dtype)

    def first_moment(self, tensor: Tensor) -> Tensor:
        """`exp_avg` grown by the dual maps; zero in layers that add nothing at first."""
        work = tensor.to(_work_dtype(tensor))
        grown = self._push(work, dual=True) / self.factor
        return (torch.zeros_like(grown) if self.new_layer else grown).to(tensor.dtype)

    def second_moment(self, tensor: Tensor) -> Tensor:
        """`exp_avg_sq` grown by the squares of the dual factors.

        Entries without a source take the mean of the carried ones: zero beside an old step count would give them a
        hidden learning rate several times too large (arXiv 2604.04281, facts 2.4).
        """
        work = tensor.to(_work_dtype(tensor))
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
        work = tensor.to(_work_dtype(tensor))
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
            side: Side = role if not dual else ("read" if role == "write" else "write")
            tensor = axis_map.push(tensor, axis, side)
        return tensor

    def _paired_noise(self, carried: Tensor) -> Tensor:
        """`Z (I - W R^T)` over the axis that reads copies; zero where nothing is copied."""
        readers = [
            k for k, role in enumerate(self.layout.roles) if role == "read" and bool((self.maps[k].copies > 1).any())
        ]
        if not readers:
            return torch.zeros_like(carried)
        axis = readers[-1]
        axis_map = self.maps[axis]
        noise = random.normal(self.shape, self.seed, "noise", self.name).to(carried)
        noise *= self.noise * carried.square().mean().sqrt()
        # Coordinates without a source have a fresh initialisation of their own.
        noise *= _column((~axis_map.unsourced).to(carried), axis, carried.ndim)
        noise -= axis_map.push(axis_map.pull(noise, axis, "write"), axis, "read")
        return noise

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

    def _free(self) -> Tensor | None:
        """Entries that take a fresh initialisation."""
        none = lambda axis_map: torch.zeros_like(axis_map.unsourced)  # noqa: E731
        written = self._mask(
            lambda m, role: m.unsourced if role == "write" and m.silent == "read" or m.silent == "none" else none(m)
        )
        read = self._mask(lambda m, role: m.unsourced if role == "read" and m.silent == "write" else none(m))
        silent = self._mask(lambda m, role: m.unsourced if role == m.silent else none(m))
        if read is not None and silent is not None:
            read = read & ~silent
        if written is None or read is None:
            return read if written is None else written
        return written | read


def _read_runs(read: ReadRows, needed: Tensor) -> Tensor:
    """Rows at ascending places, each run of neighbours read at once and nothing between."""
    ends = (needed.diff() != 1).nonzero().flatten() + 1
    runs = needed.tensor_split(ends.tolist())
    parts = [read(int(run[0]), int(run[-1]) + 1) for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _work_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays; everything else is grown in float32 and rounded once."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
