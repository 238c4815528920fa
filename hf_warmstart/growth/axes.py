"""Axes of parameters as expressions of spaces.

A space is a named vector space inside a network. An axis of a tensor is an expression of spaces, and its map follows
from the maps of the spaces, so that fused projections, grouped queries and tied heads need no code of their own:

| expression | what it is | its map |
|---|---|---|
| `Space(name)` | one space | chosen by the operator |
| `Fixed(size)` | an axis that does not grow | identity |
| `Concat(a, b, ...)` | coordinates side by side: fused `[q; k; v]`, `[gate; up]` | direct sum |
| `Product(a, b, ...)` | outer coordinates slowest: `(kv_heads, group, head_dim)` | Kronecker product |
| `Prenorm(a)` | what a norm over *all* of `a` reads, when no linear map follows (q/k norms) | copies that keep the RMS |
| `Postnorm(a)` | what a norm makes of `a` | as `a`, mean channels gone |
| `Dual(a)` | what is read by a matrix that was written into `a`: a tied head's input | `W` and `R` swapped |
| `Query(a)` | the side of a product whose new coordinates are zero (the other side's are fresh) | as `a` |
| `Gate(a)` | what multiplies `a` entry by entry: a gate on a normed stream | as `a`, factors of one |
| `Scaled(a)` | `a` as written by an embedding whose output the model multiplies by a function of the width | rescaled |
| `Gain(reads, makes)` | the gain of a norm from `reads` to `makes` | `u / t` forward, its dual backward |

Expressions are plain data: `to_data` gives nested lists and strings, `axis_from_data` reads them back.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ..errors import LayoutError
from .maps import SpaceMap


class Axis(ABC):
    """An expression of spaces: knows its size, its map, and how to write itself down."""

    @abstractmethod
    def size(self, sizes: Mapping[str, int]) -> int:
        """Length of the axis when each space has the size given by name."""

    @abstractmethod
    def map(self, maps: Mapping[str, SpaceMap]) -> SpaceMap:
        """Map of the axis when each space has the map given by name."""

    @abstractmethod
    def to_data(self) -> str | int | list:
        """Strings, integers and lists that `axis_from_data` reads back."""

    def parts(self) -> tuple[Axis, ...]:
        """The direct sub-expressions."""
        return ()

    def spaces(self) -> Iterator[str]:
        """Names of all spaces in the expression."""
        for part in self.parts():
            yield from part.spaces()

    def leaves(self) -> Iterator[Axis]:
        """The spaces and constant lengths of the expression, with repetitions."""
        for part in self.parts():
            yield from part.leaves()

    def replaced(self, old: Axis, new: Axis) -> Axis:
        """The expression with one leaf in another's place, wherever it occurs."""
        return type(self)(*(part.replaced(old, new) for part in self.parts()))

    def __str__(self) -> str:
        inner = ", ".join(map(str, self.parts()))
        return f"{type(self).__name__}({inner})"


@dataclass(frozen=True)
class Space(Axis):
    """One named space."""

    name: str

    def size(self, sizes):
        return sizes[self.name]

    def map(self, maps):
        if self.name not in maps:
            raise LayoutError(f"The map of {self.name} is not defined on its own in this growth.")
        return maps[self.name]

    def to_data(self):
        return self.name

    def spaces(self):
        yield self.name

    def leaves(self):
        yield self

    def replaced(self, old, new):
        return new if self == old else self

    def __str__(self):
        return self.name


@dataclass(frozen=True)
class Fixed(Axis):
    """An axis of constant length."""

    length: int

    def size(self, sizes):
        return self.length

    def map(self, maps):
        return SpaceMap.identity(self.length)

    def to_data(self):
        return self.length

    def leaves(self):
        yield self

    def replaced(self, old, new):
        return new if self == old else self

    def __str__(self):
        return str(self.length)


class _Nary(Axis):
    """An expression of any number of axes."""

    def __init__(self, *axes: Axis | str):
        if not axes:
            raise LayoutError(f"{type(self).__name__} needs at least one axis.")
        self.axes = tuple(Space(axis) if isinstance(axis, str) else axis for axis in axes)

    def parts(self):
        return self.axes

    def to_data(self):
        return [type(self).__name__.lower(), *(axis.to_data() for axis in self.axes)]

    def __eq__(self, other):
        return type(self) is type(other) and self.axes == other.axes

    def __hash__(self):
        return hash((type(self), self.axes))

    def __repr__(self):
        return str(self)


class Concat(_Nary):
    """Coordinates of several axes, one axis after the other."""

    def size(self, sizes):
        return sum(axis.size(sizes) for axis in self.axes)

    def map(self, maps):
        return SpaceMap.direct_sum([axis.map(maps) for axis in self.axes])


class Product(_Nary):
    """Coordinates indexed by several axes, the first slowest."""

    def size(self, sizes):
        return math.prod(axis.size(sizes) for axis in self.axes)

    def map(self, maps):
        parts: list[SpaceMap] = []
        axes = list(self.axes)
        while axes:
            pair = tuple(axis.name for axis in axes[:2] if isinstance(axis, Space))
            if len(pair) == 2 and pair in maps:
                parts.append(maps[pair])  # heads that were grouped anew: their number stays
                axes = axes[2:]
            else:
                parts.append(axes.pop(0).map(maps))
        return SpaceMap.kronecker(parts)


class _Unary(_Nary):
    """An expression of one axis."""

    def __init__(self, axis: Axis | str):
        super().__init__(axis)

    @property
    def axis(self) -> Axis:
        return self.axes[0]

    def size(self, sizes):
        return self.axis.size(sizes)


class Prenorm(_Unary):
    """Coordinates before a norm over all of them, after which no linear map can undo a factor.

    New coordinates copy old ones with `t = sqrt(m / (n * copies))`, so that the mean square is kept.
    """

    def map(self, maps):
        filled = self.axis.map(_Filled(maps))
        factor = torch.sqrt(filled.m / (filled.n * filled.copies[filled.source].double()))
        return replace(filled, write=factor, read=filled.read / factor)


class Postnorm(_Unary):
    """Coordinates after a norm: as before it, but channels that held the mean are zero."""

    def map(self, maps):
        before = self.axis.map(maps)
        return replace(before, mean=torch.zeros_like(before.mean))


class Dual(_Unary):
    """The dual of an axis: `W` and `R` swapped."""

    def map(self, maps):
        return self.axis.map(maps).dual()


class Query(_Unary):
    """The side of a contracted space whose new coordinates are silent: queries meet fresh keys with zeros."""

    def map(self, maps):
        return replace(self.axis.map(maps), silent="write")


class Gate(_Unary):
    """What multiplies an axis entry by entry: each copy of an entry meets the same gate, whatever factor it carries."""

    def map(self, maps):
        gated = self.axis.map(maps)
        return replace(gated, write=(~gated.unsourced).double(), read=gated.read * gated.write, silent="read")


class Scaled(_Unary):
    """An axis written by an embedding whose output the model multiplies by a function of the width.

    The factor (parent's multiplier over child's) is kept among the maps under `SCALE`, as a map of size one.
    """

    def map(self, maps):
        return self.axis.map(maps).scaled(float(maps[SCALE].write[0]))


SCALE = "embedding_scale"


class Gain(_Nary):
    """The gain of a norm that reads one axis (factors t) and makes another (factors u): `gain' = gain * u / t`."""

    def __init__(self, reads: Axis | str, makes: Axis | str):
        super().__init__(reads, makes)

    def size(self, sizes):
        return self.axes[0].size(sizes)

    def map(self, maps):
        reads, makes = (axis.map(maps) for axis in self.axes)
        made = torch.where(makes.unsourced, torch.ones_like(makes.write), makes.write)
        return SpaceMap.build(
            reads.n,
            reads.source,
            torch.where(reads.unsourced, torch.zeros_like(made), made / reads.write),
            torch.where(makes.unsourced, torch.zeros_like(made), makes.read * reads.write),
            silent="read",
        )


class _Filled(Mapping):
    """The same maps with every coordinate sourced."""

    def __init__(self, maps: Mapping[str, SpaceMap]):
        self._maps = maps

    def __getitem__(self, name):
        return self._maps[name].filled()

    def __iter__(self):
        return iter(self._maps)

    def __len__(self):
        return len(self._maps)


_FORMS: dict[str, Callable[..., Axis]] = {
    cls.__name__.lower(): cls for cls in (Concat, Product, Prenorm, Postnorm, Dual, Query, Gate, Scaled, Gain)
}


def axis_from_data(data: str | int | list | tuple) -> Axis:
    """Read an axis that `to_data` wrote: a space's name, a length, or `[form, part, ...]`."""
    if isinstance(data, str):
        return Space(data)
    if isinstance(data, int):
        return Fixed(data)
    form = {"cat": "concat", "prod": "product"}.get(data[0], data[0]) if data else ""
    if form not in _FORMS:
        raise LayoutError(
            f"{data!r} is no axis: expected a name, a length or [form, ...] with form in {sorted(_FORMS)}."
        )
    return _FORMS[form](*(axis_from_data(part) for part in data[1:]))
