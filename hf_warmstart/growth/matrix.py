"""Rows of a grown weight, made alone: bit for bit those of the whole, whatever is asked for together.

Every entry is made of parent's entries, of factors, of random numbers of its own place, and of two things about the whole
parent's tensor (`Totals`), which are added up in an order of their own. All sums are of single entries, so that no
order of a vector unit or a thread enters.

Numbers are multiplied, and noise and fresh values added, in float32 (float64 where the tensor is), and rounded once to
the tensor's dtype. So copies, and copies times a power of two, are exact in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from . import random
from .layout import Role
from .maps import SpaceMap
from .pairing import Pairing
from .runs import Along, ParentRows, ReadRows

CHUNK = 1 << 19  # entries made at once, so that they stay in the processor's cache; no part of the definition
TOTALS_CHUNK = 1 << 18  # entries added up at once: part of the definition of `Totals`
SAMPLE = 1 << 20  # entries of which the size of noise is taken, within a thousandth; so is this
SAMPLED_RUNS = 16  # runs of rows in which they lie; and this


@dataclass(frozen=True)
class Totals:
    """What rows of a grown weight take from the whole of the parent's.

    Args:
        noise: standard deviation of the noise, before it is made to cancel. In proportion to the root mean square of what is
            carried, which is taken over about a million of the parent's entries where there are more.
        mean: float64 (1, n), the mean of the parent's rows, where the child has rows that hold it.
    """

    noise: float = 0.0
    mean: Tensor | None = None


KINDS = (1, 2, 4)


@dataclass(frozen=True)
class Side:
    """Coordinates without a source along the rows, or along the columns: bool (m,) each.

    Args:
        written: they take fresh values. read: they do, but where they meet silent ones. silent: they hold zeros.
    """

    written: Tensor
    read: Tensor
    silent: Tensor

    @classmethod
    def of(cls, maps: Sequence[SpaceMap], roles: Sequence[Role]) -> Side:
        """One side, of axes of which the first is slowest."""
        chosen = [torch.zeros(1, dtype=torch.bool)] * 3
        for axis_map, role in zip(maps, roles, strict=True):
            new, silent = axis_map.unsourced, axis_map.silent
            written = (role == "write" and silent == "read") or silent == "none"
            kinds = (written, role == "read" and silent == "write", role == silent)
            chosen = [
                (old[:, None] | (new & kind)[None, :]).flatten() for old, kind in zip(chosen, kinds, strict=True)
            ]
        return cls(*chosen)

    @cached_property
    def any(self) -> bool:
        return bool(self.written.any() or self.read.any())

    @cached_property
    def kinds(self) -> Tensor:
        """int64 (m,): the three as bits."""
        return sum(mask * bit for mask, bit in zip((self.written, self.read, self.silent), KINDS, strict=True))


@dataclass(frozen=True, eq=False)
class Matrix:
    """How a weight grows in its matrix form: its last axis are the columns, all others together the rows.

    Args:
        rows, columns: how each grows. sides: what has no source along each.
        factor: on all that is carried. offset: is added before, and taken away behind.
        noise: relative size of the noise. paired: the axis on which it cancels (0: rows), None for no noise.
        pairing: how it cancels there.
        shrunk: whether fresh values are added everywhere. fresh: makes rows of them.
        key: (seed, name), from which the noise comes.
    """

    rows: Along
    columns: Along
    sides: tuple[Side, Side]
    factor: float
    offset: float
    noise: float
    paired: int | None
    pairing: Callable[[], Pairing]
    shrunk: bool
    fresh: Callable[[int, int], Tensor]
    key: tuple[int, str]
    _free: dict[int, tuple[Tensor, list[tuple[int, int]]]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.m, self.columns.m

    @cached_property
    def pairs(self) -> Pairing:
        return self.pairing()

    @cached_property
    def scalar(self) -> float:
        """The product of all factors that are the same everywhere."""
        return self.factor * (self.rows.constant or 1.0) * (self.columns.constant or 1.0)

    @cached_property
    def plain(self) -> bool:
        """Whether the child holds copies, all of them times one factor: rounded once in any dtype."""
        return not (
            self.offset
            or self.shrunk
            or self.paired is not None
            or any(side.any for side in self.sides)
            or any(along.makes_means or along.constant is None for along in (self.rows, self.columns))
        )

    @cached_property
    def twins(self) -> list[tuple[int, int, int, int, bool]] | None:
        """Where columns are copies in pairs, one with noise and one with it taken away, and nothing else happens: pieces of
        columns as (position, length, parent's first, first draw or -1 for no noise, whether it is added). Else None."""
        if (
            self.paired != 1
            or self.offset
            or self.shrunk
            or any(side.any for side in self.sides)
            or any(along.makes_means or along.constant is None for along in (self.rows, self.columns))
            or len(self.pairs.terms) != 1
            or self.pairs.one_size is None
        ):
            return None
        (_, factor), runs = self.pairs.terms[0], self.pairs.runs[0]
        carried = self.columns.runs
        if carried.short or not np.array_equal(carried.starts, runs.starts):
            return None
        return [
            (position, length, first, draw, bool(factor[position] > 0))
            for (position, length, first), (_, _, draw) in zip(carried.all, runs.all, strict=True)
        ]

    # -- of the whole ---------------------------------------------------------------------------------------------

    def totals(self, read: ReadRows) -> Totals:
        """What rows take from the parent's tensor beside their own rows, of which it reads what is needed, in pieces."""
        if self.paired is None and not self.rows.makes_means:
            return Totals()
        squares, carried = 0.0, 0.0
        if self.paired is not None:
            for low, high in self._sampled():
                squares += self._weighted_square(read(low, high), low)
                carried += float(self.rows.copies[low:high].sum()) * self.columns.carried
        deviation = self.noise * abs(self.factor) * (squares / max(1, carried)) ** 0.5
        return Totals(deviation, self._mean_row(read) if self.rows.makes_means else None)

    def _sampled(self) -> Iterator[tuple[int, int]]:
        """The parent's rows over which the root mean square is taken: all, or some runs of them, evenly spread."""
        wanted, whole = -(-SAMPLE // max(1, self.columns.n)), self.rows.n
        length = whole if whole <= wanted else -(-wanted // SAMPLED_RUNS)
        firsts = [0] if whole <= wanted else [k * (whole - length) // (SAMPLED_RUNS - 1) for k in range(SAMPLED_RUNS)]
        step = max(1, TOTALS_CHUNK // max(1, self.columns.n))
        for first in firsts:
            for low in range(first, first + length, step):
                yield low, min(low + step, first + length)

    def _mean_row(self, read: ReadRows) -> Tensor:
        """float64 (1, n): the mean of all the parent's rows."""
        step = max(1, TOTALS_CHUNK // max(1, self.columns.n))
        total = torch.zeros(1, self.columns.n, dtype=torch.float64)
        for low in range(0, self.rows.n, step):
            part = folded(read(low, min(low + step, self.rows.n)).double().clone(), 0)
            total = total.to(part.device) + part
        return total / self.rows.n

    def _weighted_square(self, block: Tensor, low: int) -> float:
        """The sum of the squares of all carried entries that come from some of the parent's rows."""
        squares, scale = block.to(work_dtype(block)).square(), 1.0
        for axis, weights in enumerate((self.rows.squares[low : low + len(block)], self.columns.squares)):
            whole = (self.rows, self.columns)[axis].squares
            if bool((whole == whole[:1]).all()):
                scale *= float(whole[0])
            else:
                squares *= weights.to(squares).unsqueeze(1 - axis)
        return scale * float(folded(squares.flatten(), 0))

    # -- rows -----------------------------------------------------------------------------------------------------

    def grow(self, read: ReadRows, start: int, stop: int, totals: Totals, out: Tensor) -> None:
        """Rows of the grown weight into `out` (stop - start, m)."""
        parent = ParentRows(read, self.rows, start, stop)
        if self.plain and not self.rows.runs.short and not self.columns.runs.short:
            self._copy(parent, start, stop, out)
            return
        if self.plain:
            self._carry(parent, start, stop, totals, out)
            return
        if self.twins is not None and totals.noise and out.dtype != torch.float64 and out.device.type == "cpu":
            self._grow_twins(parent, start, stop, totals.noise, out)
            return
        step = min(max(1, CHUNK // max(1, self.columns.m)), max(1, stop - start))
        work = torch.empty(step, self.columns.m, dtype=work_dtype(out), device=out.device)
        for low in range(start, stop, step):
            high = min(low + step, stop)
            part = work[: high - low]
            self._carry(parent, low, high, totals, part)
            if self.paired is not None and totals.noise:
                self._add_noise(part, low, high, totals.noise)
            if self.shrunk:
                part += self.fresh(low, high).to(part)
            elif any(side.any for side in self.sides):
                self._fill_free(part, low, high)
            out[low - start : high - start].copy_(part)

    def _copy(self, parent: ParentRows, start: int, stop: int, out: Tensor) -> None:
        """Rows that are copies times one factor, straight to their places."""
        for position, length, first in self.rows.runs.between(start, stop):
            rows = out[position - start : position - start + length]
            if first < 0:
                rows.zero_()
                continue
            sources = parent.rows(first, first + length)
            for column, width, source in self.columns.runs.all:
                piece = rows[:, column : column + width]
                if source < 0:
                    piece.zero_()
                elif self.scalar == 1:
                    piece.copy_(sources[:, source : source + width])
                else:
                    torch.mul(sources[:, source : source + width], self.scalar, out=piece)

    def _grow_twins(self, parent: ParentRows, start: int, stop: int, deviation: float, out: Tensor) -> None:
        """Rows that are copies in pairs, with noise: the same bits as by `_carry` and `_add_noise`, in a third of the time,
        for every number is touched once."""
        seed, name = self.key
        draws = self.pairs.draws
        step = min(max(1, CHUNK // max(1, self.columns.m)), max(1, stop - start))
        single = partial(torch.empty, dtype=torch.float32)
        carried, drawn = single(step, self.columns.n), single(step * draws)
        made = single(step * max(length for _, length, *_ in self.twins or ()))
        for low in range(start, stop, step):
            high = min(low + step, stop)
            rows = carried[: high - low]
            self._carried_rows(parent, low, high, rows)
            noise = random.noise(
                (self.rows.m, draws),
                seed,
                "noise",
                name,
                (low, high),
                scale=(self.pairs.one_size or 0.0) * deviation,
                out=drawn,
            )
            for position, length, first, draw, added in self.twins or ():
                piece = out[low - start : high - start, position : position + length]
                values = rows[:, first : first + length]
                if first < 0:
                    piece.zero_()
                    continue
                if draw >= 0:
                    into = made[: (high - low) * length].view(high - low, length)
                    combine = torch.add if added else torch.sub
                    values = combine(values, noise[:, draw : draw + length], out=into)
                piece.copy_(values)

    def _carried_rows(self, parent: ParentRows, start: int, stop: int, out: Tensor) -> None:
        """The parent's rows that the child's come from, times the one factor, columns as they are."""
        if self.rows.runs.short:
            sources = self.rows.source[start:stop]
            if len(parent.wanted):
                out.copy_(parent.take(sources))
            out.masked_fill_((sources < 0).unsqueeze(1), 0)
        else:
            for position, length, first in self.rows.runs.between(start, stop):
                rows = out[position - start : position - start + length]
                if first < 0:
                    rows.zero_()
                else:
                    rows.copy_(parent.rows(first, first + length))
        if self.scalar != 1:
            out.mul_(self.scalar)

    def _carry(self, parent: ParentRows, start: int, stop: int, totals: Totals, out: Tensor) -> None:
        """What comes from the parent."""
        if self.rows.runs.short and not self.rows.makes_means:
            sources = self.rows.source[start:stop]
            if len(parent.wanted):
                self._carry_run(parent.take(sources), start, out)
            out.masked_fill_((sources < 0).to(out.device).unsqueeze(1), 0)
        else:
            for position, length, first in self.rows.runs.between(start, stop):
                piece = out[position - start : position - start + length]
                if first < 0:
                    piece.zero_()
                elif first == self.rows.n and totals.mean is not None:
                    self._carry_run(totals.mean.to(out).expand(length, -1), position, piece)
                else:
                    self._carry_run(parent.rows(first, first + length), position, piece)
        if self.columns.constant is None:
            out *= self.columns.factor.to(out)
        if self.offset:
            out -= self.offset

    def _carry_run(self, rows: Tensor, position: int, out: Tensor) -> None:
        """Some of the parent's rows, to the child's rows from `position` on."""
        if self.offset:
            rows = rows.to(out.dtype) + self.offset
        if self.scalar != 1:
            rows = rows.to(out.dtype) * self.scalar
        if self.rows.constant is None:
            factors = self.rows.factor[position : position + len(rows)].to(out).unsqueeze(1)
            rows = rows.to(out.dtype) * factors
        mean = None
        if self.columns.makes_means:
            rows = rows.to(out.dtype)
            mean = folded(rows.clone(), 1) / self.columns.n
        self.columns.spread(rows, mean, out)

    def _add_noise(self, out: Tensor, start: int, stop: int, deviation: float) -> None:
        """Noise that cancels over the copies that the columns, or the rows, read."""
        seed, name = self.key
        if self.paired == 1:
            shape, size = (self.rows.m, self.pairs.draws), self.pairs.one_size
            scale = 1.0 if size is None else size * deviation
            drawn = random.noise(shape, seed, "noise", name, (start, stop), scale=scale)
            self._add_along_columns(out, drawn, deviation)
            return
        shape = (self.pairs.draws, self.columns.m)
        for (_, factor), runs in zip(self.pairs.terms, self.pairs.runs, strict=True):
            for position, length, first in runs.between(start, stop):
                if first >= 0:
                    drawn = random.noise(shape, seed, "noise", name, (first, first + length)).to(out)
                    out[position - start : position - start + length] += drawn.mul_(
                        float(factor[position]) * deviation
                    )

    def _add_along_columns(self, out: Tensor, drawn: Tensor, deviation: float) -> None:
        drawn, size = drawn.to(out), self.pairs.one_size
        for (index, factor), runs in zip(self.pairs.terms, self.pairs.runs, strict=True):
            if runs.short:
                scale = factor.sign() if size is not None else factor * deviation
                out += drawn.index_select(1, index.clamp(min=0).to(out.device)).mul_(scale.to(out))
                continue
            for position, length, first in runs.all:
                piece, values = out[:, position : position + length], drawn[:, first : first + length]
                if first < 0:
                    continue
                if size is None:
                    piece += values * (float(factor[position]) * deviation)
                elif factor[position] > 0:
                    piece += values
                else:
                    piece -= values

    def _fill_free(self, out: Tensor, start: int, stop: int) -> None:
        """Fresh values where they must be."""
        kinds, lengths = torch.unique_consecutive(self.sides[0].kinds[start:stop], return_counts=True)
        low = start
        for kind, length in zip(kinds.tolist(), lengths.tolist(), strict=True):
            part, high = out[low - start : low - start + length], low + length
            free, pieces = self._free_columns(kind)
            if pieces:
                fresh = self.fresh(low, high).to(out)
                if len(pieces) > 4:
                    torch.where(free.to(out.device), fresh, part, out=part)
                else:
                    for first, columns in pieces:
                        part[:, first : first + columns] = fresh[:, first : first + columns]
            low = high

    def _free_columns(self, kind: int) -> tuple[Tensor, list[tuple[int, int]]]:
        """Columns that take fresh values in rows of a kind: bool (m,), and as (first, number) of each piece."""
        if kind not in self._free:
            written, read, silent = (bool(kind & bit) for bit in KINDS)
            side = self.sides[1]
            free = side.written | written | (side.read | read) & ~(side.silent | silent)
            values, lengths = torch.unique_consecutive(free, return_counts=True)
            firsts = (lengths.cumsum(0) - lengths).tolist()
            pieces = [(f, k) for f, k, v in zip(firsts, lengths.tolist(), values.tolist(), strict=True) if v]
            self._free[kind] = free, pieces
        return self._free[kind]


def work_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays; everything else is grown in float32 and rounded once."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def folded(tensor: Tensor, axis: int) -> Tensor:
    """The sum along an axis, which is kept, by halves: the same bits on any machine. The tensor is used up."""
    while (length := tensor.shape[axis]) > 1:
        half = length // 2
        top = tensor.narrow(axis, 0, half).add_(tensor.narrow(axis, half, half))
        if length % 2:
            top.narrow(axis, 0, 1).add_(tensor.narrow(axis, length - 1, 1))
        tensor = top
    return tensor
