"""Tensors put together from parts of other tensors, so that any rows of them can be made alone.

An `Assembled` is an expression: a source tensor, or one that is joined, cut, permuted, reshaped or cast. Nothing is read
while it is built. Asked for a region, it asks its parts for the regions that they need, down to the sources: of Mixtral's
experts, stacked in memory and apart in files, rows of one expert read rows of one tensor.

A region is a box, one half-open range (start, stop) per axis. What `read(name, box)` gets leaves out trailing axes that
are wanted whole: `()` is all of a tensor, `((a, b),)` its rows, `((e, e + 1), (a, b))` rows of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

Range = tuple[int, int]
Box = tuple[Range, ...]
Reader = Callable[[str, Box], torch.Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Assembled:
    """A tensor of a shape and dtype, as an expression over source tensors; `parts` are what it is made of directly."""

    shape: Shape
    dtype: torch.dtype
    parts: tuple[Assembled, ...] = ()

    def region(self, box: Box, read: Reader) -> torch.Tensor:
        """The part of the tensor in a box, of any strides."""
        raise NotImplementedError

    @cached_property
    def sources(self) -> frozenset[str]:
        """Names of the source tensors that it is made of."""
        return frozenset().union(*(part.sources for part in self.parts))

    @property
    def source(self) -> str | None:
        """The name of the one source tensor that it is, in shape and dtype too; None where it is put together."""
        return None

    def rows(self, start: int, stop: int, read: Reader) -> torch.Tensor:
        """Rows [start, stop), contiguous, of shape (stop - start, *shape[1:]); a scalar is one row of shape ().

        Args:
            read: gives a box of a source tensor (see the module's text), of any strides.
        """
        box = tuple((0, size) for size in self.shape)
        return self.region(((start, stop), *box[1:]) if box else box, read).contiguous()

    def whole(self, read: Reader) -> torch.Tensor:
        """All of it."""
        return self.rows(0, self.shape[0] if self.shape else 1, read)


@dataclass(frozen=True, eq=False)
class Source(Assembled):
    """A tensor that can be read."""

    name: str = ""

    @property
    def sources(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self.name})

    @property
    def source(self) -> str | None:
        return self.name

    def region(self, box: Box, read: Reader) -> torch.Tensor:
        wanted = list(box)
        while wanted and wanted[-1] == (0, self.shape[len(wanted) - 1]):
            wanted.pop()
        return read(self.name, tuple(wanted))


@dataclass(frozen=True, eq=False)
class Joined(Assembled):
    """Parts one after another along an axis."""

    axis: int = 0

    def region(self, box: Box, read: Reader) -> torch.Tensor:
        start, stop = box[self.axis]
        found, offset = [], 0
        for part in self.parts:
            size = part.shape[self.axis]
            within = (max(start - offset, 0), min(stop - offset, size))
            if within[0] < within[1]:
                found.append(part.region(_replaced(box, self.axis, within), read))
            offset += size
        if not found:
            return torch.empty([b - a for a, b in box], dtype=self.dtype)
        return found[0] if len(found) == 1 else torch.cat(found, self.axis)


@dataclass(frozen=True, eq=False)
class Cut(Assembled):
    """Entries of a tensor along an axis, from one on."""

    axis: int = 0
    start: int = 0

    def region(self, box: Box, read: Reader) -> torch.Tensor:
        start, stop = box[self.axis]
        moved = (start + self.start, stop + self.start)
        return self.parts[0].region(_replaced(box, self.axis, moved), read)


@dataclass(frozen=True, eq=False)
class Permuted(Assembled):
    """A tensor with its axes in another order: axis k is axis `order[k]` of what it is made of."""

    order: tuple[int, ...] = ()

    def region(self, box: Box, read: Reader) -> torch.Tensor:
        inner = tuple(box[self.order.index(axis)] for axis in range(len(self.order)))
        return self.parts[0].region(inner, read).permute(self.order)


@dataclass(frozen=True, eq=False)
class Reshaped(Assembled):
    """The entries of a tensor, in row-major order, in another shape.

    A region that is no box of the other shape is cut from the smallest box around it: rows of rotary heads that were
    stored as (heads, 2, half) are cut from whole heads.
    """

    def region(self, box: Box, read: Reader) -> torch.Tensor:
        of = self.parts[0]
        sizes = [stop - start for start, stop in box]
        if math.prod(sizes) == 0:
            return torch.empty(sizes, dtype=self.dtype)
        inner: list[Range] = []  # the box of the other shape
        flat: list[int] = []  # its entries, by groups of axes
        cuts: list[slice] = []  # those of them that are entries of the cover
        cover: list[Range] = []  # a box without gaps in this shape, around the one that is wanted
        for outer_axes, inner_axes in axis_groups(self.shape, of.shape):
            around, start, stop = _around(box[outer_axes], self.shape[outer_axes])
            inner_sizes = of.shape[inner_axes]
            ends = zip(_unflat(start, inner_sizes), _unflat(stop - 1, inner_sizes), strict=True)
            found, inner_start, inner_stop = _around([(a, b + 1) for a, b in ends], inner_sizes)
            inner += found
            flat.append(inner_stop - inner_start)
            cuts.append(slice(start - inner_start, stop - inner_start))
            cover += around
        made = of.region(tuple(inner), read).reshape(flat)[tuple(cuts)].reshape([b - a for a, b in cover])
        return made[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, cover, strict=True))]


@dataclass(frozen=True, eq=False)
class Cast(Assembled):
    """A tensor in another dtype."""

    def region(self, box: Box, read: Reader) -> torch.Tensor:
        return self.parts[0].region(box, read).to(self.dtype)


def join(parts: Sequence[Assembled], axis: int) -> Assembled:
    """Tensors of one dtype, equal in all sizes but one, as one."""
    if len(parts) == 1:
        return parts[0]
    size = sum(part.shape[axis] for part in parts)
    return Joined(_replaced(parts[0].shape, axis, size), parts[0].dtype, tuple(parts), axis)


def cut(of: Assembled, axis: int, start: int, stop: int) -> Assembled:
    """Entries [start, stop) along an axis."""
    if (start, stop) == (0, of.shape[axis]):
        return of
    return Cut(_replaced(of.shape, axis, stop - start), of.dtype, (of,), axis, start)


def permute(of: Assembled, order: Sequence[int]) -> Assembled:
    """A tensor whose axis k is axis `order[k]` of another."""
    return Permuted(tuple(of.shape[axis] for axis in order), of.dtype, (of,), tuple(order))


def reshape(of: Assembled, shape: Sequence[int]) -> Assembled:
    """A tensor in a shape of as many entries."""
    return of if of.shape == tuple(shape) else Reshaped(tuple(shape), of.dtype, (of,))


def cast(of: Assembled, dtype: torch.dtype) -> Assembled:
    """A tensor in a dtype."""
    return of if of.dtype == dtype else Cast(of.shape, dtype, (of,))


def axis_groups(outer: Shape, inner: Shape) -> list[tuple[slice, slice]]:
    """The smallest runs of axes of two shapes that hold the same numbers of entries; neither shape has a zero.

    >>> axis_groups((6, 4), (2, 3, 4))
    [(slice(0, 1, None), slice(0, 2, None)), (slice(1, 2, None), slice(2, 3, None))]
    """
    groups = []
    o = i = 0
    while o < len(outer) or i < len(inner):
        o0, i0 = o, i
        have, want = 1, 1
        while o == o0 or i == i0 or have != want:
            if o < len(outer) and (have <= want or i == len(inner)):
                have *= outer[o]
                o += 1
            elif i < len(inner):
                want *= inner[i]
                i += 1
            else:
                break  # one shape has ended, the other goes on with axes of size one
        groups.append((slice(o0, o), slice(i0, i)))
    return groups


def _around(ranges: Sequence[Range], sizes: Shape) -> tuple[list[Range], int, int]:
    """The smallest box without gaps around a box, and the places [start, stop) of its entries in row-major order."""
    wide = next((k for k, (a, b) in enumerate(ranges) if b - a > 1), len(sizes))
    box = [*ranges[: wide + 1], *((0, size) for size in sizes[wide + 1 :])]
    start = _flat([a for a, _ in box], sizes)
    return box, start, start + math.prod(b - a for a, b in box)


def _flat(index: Sequence[int], sizes: Shape) -> int:
    place = 0
    for k, size in zip(index, sizes, strict=True):
        place = place * size + k
    return place


def _unflat(place: int, sizes: Shape) -> list[int]:
    index = []
    for size in reversed(sizes):
        place, k = divmod(place, size)
        index.append(k)
    return index[::-1]


def _replaced(values: tuple, axis: int, value) -> tuple:
    return (*values[:axis], value, *values[axis + 1 :])
