"""Maps as runs: pieces of an axis that lie side by side in parent and child, and are copied as such.

A tensor is grown in its *matrix form*: its last axis are the columns, all others together the rows. (A vector has one
column, a scalar one row as well.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .layout import Role
from .maps import SpaceMap

ReadRows = Callable[[int, int], Tensor]
SHORT = 16  # runs below this many coordinates, on average, are gathered one by one
NONE = -1


class Runs:
    """Intervals on which a list of indices counts up and a list of factors is constant; -1 is in no interval.

    Args:
        indices: int64 (m,). factors: float64 (m,), or None. constant: an index that repeats instead of counting up.
    """

    def __init__(self, indices: Tensor, factors: Tensor | None = None, constant: int | None = None) -> None:
        self.indices = indices.numpy()
        at = np.arange(len(self.indices))
        key = np.where(self.indices < 0, -len(at) - 1, self.indices - at)
        if constant is not None:
            key = np.where(self.indices == constant, constant + 1, key)
        new = np.diff(key) != 0
        if factors is not None:
            new |= np.diff(factors.numpy()) != 0
        self.starts = np.concatenate([at[:1], np.flatnonzero(new) + 1])

    @property
    def short(self) -> bool:
        """Whether so many runs are so short that it is faster to go by single indices."""
        return len(self.starts) > 4 and len(self.indices) < SHORT * len(self.starts)

    @cached_property
    def all(self) -> list[tuple[int, int, int]]:
        """All runs, as `between` gives them."""
        return self.between(0, len(self.indices))

    def between(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(position, length, first index) of all runs from `start` to `stop`, cut to them."""
        if start >= stop:
            return []
        first, last = int(self.starts.searchsorted(start, "right")) - 1, int(self.starts.searchsorted(stop, "left"))
        begins = [start, *self.starts[first + 1 : last].tolist()]
        lengths = [after - begin for begin, after in zip(begins, [*begins[1:], stop], strict=True)]
        return list(zip(begins, lengths, self.indices[begins].tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class Along:
    """One axis of a matrix form as it grows forward.

    Args:
        n: its old length.
        source: int64 (m,): the old coordinate that each new one copies, `n` for the mean of all, -1 for none.
        factor: float64 (m,), by which the copy is multiplied.
    """

    n: int
    source: Tensor
    factor: Tensor

    @classmethod
    def of(cls, axis_map: SpaceMap, role: Role) -> Along:
        """An axis that writes (`W`) or reads (`R`)."""
        if role == "read":
            return cls(axis_map.n, axis_map.source, axis_map.read)
        means = axis_map.mean != 0
        source = torch.where(means, axis_map.n, axis_map.source)
        return cls(axis_map.n, source, torch.where(means, axis_map.mean, axis_map.write))

    @classmethod
    def together(cls, parts: Sequence[Along]) -> Along:
        """Several axes as one, the first slowest; none of them makes means, unless it is alone."""
        whole, *rest = parts or [cls.of(SpaceMap.identity(1), "write")]
        for inner in rest:
            source = whole.source[:, None] * inner.n + inner.source[None, :]
            source[(whole.source < 0)[:, None] | (inner.source < 0)[None, :]] = NONE
            whole = cls(whole.n * inner.n, source.flatten(), torch.outer(whole.factor, inner.factor).flatten())
        return whole

    @property
    def m(self) -> int:
        return len(self.source)

    @cached_property
    def constant(self) -> float | None:
        """The factor, where all that is carried has the same."""
        factors = self.factor[self.source >= 0]
        if not len(factors):
            return 1.0
        return float(factors[0]) if bool((factors == factors[0]).all()) else None

    @cached_property
    def makes_means(self) -> bool:
        return bool((self.source == self.n).any())

    @cached_property
    def runs(self) -> Runs:
        return Runs(self.source, constant=self.n)

    @cached_property
    def squares(self) -> Tensor:
        """float64 (n,): the sum over each old coordinate's copies of the square of their factors."""
        copied = (self.source >= 0) & (self.source < self.n)
        return torch.zeros(self.n, dtype=torch.float64).index_add_(
            0, self.source[copied], self.factor[copied].square()
        )

    @cached_property
    def copies(self) -> Tensor:
        """int64 (n,): how many new coordinates copy each old one."""
        return torch.bincount(self.source[(self.source >= 0) & (self.source < self.n)], minlength=self.n)

    @cached_property
    def carried(self) -> int:
        """How many new coordinates copy an old one."""
        return int(self.copies.sum())

    def spread(self, tensor: Tensor, mean: Tensor | None, out: Tensor) -> None:
        """Copy columns of `tensor` (rows, n) to their places in `out` (rows, m), no factor applied.

        Args:
            mean: (rows, 1), the mean of the columns, where there are such.
        """
        if self.runs.short:
            whole = tensor if mean is None else torch.cat([tensor, mean], 1)
            out.copy_(whole.index_select(1, self.source.clamp(min=0).to(tensor.device)))
            if bool((self.source < 0).any()):
                out.masked_fill_((self.source < 0).to(tensor.device), 0)
            return
        for position, length, first in self.runs.all:
            piece = out[:, position : position + length]
            if first < 0:
                piece.zero_()
            elif first == self.n and mean is not None:
                piece.copy_(mean.expand_as(piece))
            else:
                piece.copy_(tensor[:, first : first + length])


class ParentRows:
    """The rows of a parent's matrix form that some rows of the child come from, read in as few pieces as they lie in."""

    def __init__(self, read: ReadRows, along: Along, start: int, stop: int) -> None:
        sources = along.source[start:stop]
        wanted = np.unique(sources[(sources >= 0) & (sources < along.n)].numpy())
        breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
        self.pieces = [(int(p[0]), read(int(p[0]), int(p[-1]) + 1)) for p in np.split(wanted, breaks) if len(p)]
        self.wanted = wanted

    def rows(self, low: int, high: int) -> Tensor:
        """Rows from one number to another, which lie in one piece."""
        first, piece = next((f, p) for f, p in reversed(self.pieces) if f <= low)
        return piece[low - first : high - first]

    def take(self, sources: Tensor) -> Tensor:
        """Single rows by their numbers; any row for -1."""
        known = torch.from_numpy(np.searchsorted(self.wanted, sources.numpy()).clip(max=len(self.wanted) - 1))
        whole = self.pieces[0][1] if len(self.pieces) == 1 else torch.cat([piece for _, piece in self.pieces])
        return whole.index_select(0, known.to(whole.device))


def without_means(axis_map: SpaceMap) -> SpaceMap:
    """The map behind a tensor that was taken along this axis already."""
    whole = SpaceMap.identity(axis_map.m)
    return replace(whole, source=torch.arange(axis_map.m), silent=axis_map.silent)
