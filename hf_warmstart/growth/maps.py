"""Maps between a space and its grown self, and between a stack of layers and its grown self.

A `SpaceMap` is a pair of linear maps `W, R: R^n -> R^m` with `R^T W = I`. In the grown model an activation is
`x' = W x`; a matrix that reads it undoes the growth with `R`. Nearly every map has one entry in each row, so it is
kept as indices and factors:

    W[j] = write[j] * e(source[j]) + mean[j] * (1/n, ..., 1/n)          R[j] = read[j] * e(source[j])

`source[j] = -1` marks a coordinate without a source. `mean` is non-zero only for LEMON's channels, which hold the mean
of all others so that a LayerNorm's statistics survive (arXiv 2310.07999).

A coordinate without a source must be silent on one side, and on one side only: zero on both is a saddle that no
gradient leaves. `silent` says which: `"write"` (residual streams: the writers are zero, the readers free) or `"read"`
(inner spaces: the readers are zero, the writers take a fresh initialisation). `"none"`: rows that are appended to a table
(vocabulary, positions), which nothing old looks up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import WarmstartError

Silent = Literal["write", "read", "none"]


def _column(values: Tensor, axis: int, ndim: int) -> Tensor:
    """Shape `values` (m,) so that it multiplies a tensor of rank `ndim` along `axis`."""
    return values.reshape([-1 if k == axis else 1 for k in range(ndim)])


@dataclass(frozen=True, eq=False)
class SpaceMap:
    """One growth of one space, `R^n -> R^m`.

    Args:
        n: size before. m: size after (the length of `source`).
        source: int64 (m,), the old coordinate that each new one copies, -1 for none.
        write: float64 (m,), the factors of `W`. read: float64 (m,), the factors of `R`.
        mean: float64 (m,), the weight of the mean of all old coordinates in `W`.
        silent: the side on which coordinates without a source are zero.
    """

    n: int
    source: Tensor
    write: Tensor
    read: Tensor
    mean: Tensor
    silent: Silent = "read"

    @property
    def m(self) -> int:
        return len(self.source)

    @classmethod
    def build(
        cls,
        n: int,
        source: Sequence[int] | Tensor,
        write: Tensor | float = 1.0,
        read: Tensor | float = 1.0,
        mean: Tensor | float = 0.0,
        silent: Silent = "read",
    ) -> SpaceMap:
        """Build a map from its parts (numbers are broadcast to (m,)); entries without a source become zero."""
        source = torch.as_tensor(source, dtype=torch.int64)
        full = lambda v: torch.as_tensor(v, dtype=torch.float64).expand(len(source)).clone()  # noqa: E731
        write, read, mean = full(write), full(read), full(mean)
        write[source < 0] = 0.0
        read[source < 0] = 0.0
        return cls(n, source, write, read, mean, silent)

    @classmethod
    def identity(cls, n: int) -> SpaceMap:
        """The map that changes nothing."""
        return cls.build(n, torch.arange(n))

    @property
    def is_identity(self) -> bool:
        return (
            self.m == self.n
            and bool((self.source == torch.arange(self.n)).all())
            and bool((self.write == 1).all() and (self.read == 1).all() and (self.mean == 0).all())
        )

    @property
    def unsourced(self) -> Tensor:
        """bool (m,): coordinates that copy no old one."""
        return self.source < 0

    @property
    def copies(self) -> Tensor:
        """int64 (n,): how often each old coordinate is copied."""
        return torch.bincount(self.source[self.source >= 0], minlength=self.n)

    @property
    def first_copies(self) -> Tensor:
        """bool (m,): the first copy of each old coordinate."""
        seen = torch.full((self.n,), self.m, dtype=torch.int64)
        sourced = ~self.unsourced
        at = torch.arange(self.m)
        seen.scatter_reduce_(0, self.source[sourced], at[sourced], "amin")
        return sourced & (seen[self.source.clamp(min=0)] == at)

    def rows(self, start: int, stop: int) -> SpaceMap:
        """The map to some of the new coordinates alone; `R^T W` is no identity then."""
        part = slice(start, stop)
        return replace(
            self, source=self.source[part], write=self.write[part], read=self.read[part], mean=self.mean[part]
        )

    def check(self) -> None:
        """Raise unless `R^T W = I` to rounding (1e-12)."""
        error = (self.pull(self.dense_write(), 0, "read") - torch.eye(self.n, dtype=torch.float64)).abs().max()
        if error > 1e-12:
            raise WarmstartError(f"A space map of size {self.n} -> {self.m} has |R^T W - I| = {error:.1e}, not zero.")

    # -- the two matrices, for tests and small sizes ------------------------------------------------------------

    def dense_write(self) -> Tensor:
        """`W` as a float64 matrix (m, n)."""
        return self.push(torch.eye(self.n, dtype=torch.float64), 0, "write")

    def dense_read(self) -> Tensor:
        """`R` as a float64 matrix (m, n)."""
        return self.push(torch.eye(self.n, dtype=torch.float64), 0, "read")

    # -- action on one axis of a tensor --------------------------------------------------------------------------

    def push(self, tensor: Tensor, axis: int, side: Literal["write", "read"]) -> Tensor:
        """Take an axis of length n to length m by `W` (`side="write"`) or by `R` (`side="read"`)."""
        factors = self.write if side == "write" else self.read
        grown = tensor.index_select(axis, self.source.clamp(min=0).to(tensor.device))
        if not bool((factors == 1).all()):
            grown *= _column(
                factors.to(tensor), axis, tensor.ndim
            )  # in place: of large tensors no more than is needed
        if side == "write" and bool((self.mean != 0).any()):
            grown += tensor.mean(axis, keepdim=True) * _column(self.mean.to(tensor), axis, tensor.ndim)
        return grown

    def pull(self, tensor: Tensor, axis: int, side: Literal["write", "read"]) -> Tensor:
        """Take an axis of length m back to length n by `W^T` or `R^T`: the transpose of `push`."""
        factors = self.write if side == "write" else self.read
        weighted = tensor * _column(factors.to(tensor), axis, tensor.ndim)
        shape = list(tensor.shape)
        shape[axis] = self.n
        pulled = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        pulled.index_add_(axis, self.source.clamp(min=0).to(tensor.device), weighted)
        if side == "write" and bool((self.mean != 0).any()):
            means = (tensor * _column(self.mean.to(tensor), axis, tensor.ndim)).sum(axis, keepdim=True)
            pulled = pulled + means / self.n
        return pulled

    # -- the algebra ----------------------------------------------------------------------------------------------

    def dual(self) -> SpaceMap:
        """Swap `W` and `R`: how gradients grow, and what a tied head reads."""
        return replace(self, write=self.read, read=self.write, mean=torch.zeros_like(self.mean))

    def scaled(self, factor: float) -> SpaceMap:
        """`W` times `factor`, `R` divided by it."""
        return replace(self, write=self.write * factor, read=self.read / factor, mean=self.mean * factor)

    def square(self) -> SpaceMap:
        """Entries squared: how second moments grow. Not a pair with `R^T W = I`. Row-wise maps only."""
        if bool((self.mean != 0).any()):
            raise WarmstartError("A map with mean channels has no entrywise square; take the square of its dual.")
        return replace(self, write=self.write**2, read=self.read**2)

    def filled(self) -> SpaceMap:
        """Coordinates without a source copy old ones in turn, silently read: for what passes through a norm."""
        fallback = torch.arange(self.m) % self.n
        new = self.unsourced
        return replace(
            self,
            source=torch.where(new, fallback, self.source),
            write=torch.where(new, torch.ones_like(self.write), self.write),
            mean=torch.zeros_like(self.mean),
        )

    def compose(self, first: SpaceMap) -> SpaceMap:
        """`self` after `first`: `W = W_self W_first`, `R = R_self R_first`."""
        if first.m != self.n:
            raise WarmstartError(f"Maps {first.n} -> {first.m} and {self.n} -> {self.m} do not compose.")
        column_sums = first.dense_write().sum(0)
        if bool((self.mean != 0).any()) and not torch.allclose(column_sums, column_sums[:1].expand_as(column_sums)):
            raise WarmstartError("A map with mean channels composes only with a map that keeps the mean.")
        at = self.source.clamp(min=0)
        source = torch.where(self.unsourced, self.source, first.source[at])
        mean = self.write * first.mean[at] + self.mean * column_sums[0] * first.n / first.m
        return SpaceMap.build(
            first.n, source, self.write * first.write[at], self.read * first.read[at], mean, self.silent
        )

    @staticmethod
    def direct_sum(maps: Sequence[SpaceMap]) -> SpaceMap:
        """The map of a `Concat`: blocks side by side."""
        sources, offset = [], 0
        for part in maps:
            sources.append(torch.where(part.unsourced, part.source, part.source + offset))
            offset += part.n
        join = lambda name: torch.cat([getattr(part, name) for part in maps])  # noqa: E731
        _no_means(maps)
        return SpaceMap(offset, torch.cat(sources), join("write"), join("read"), join("mean"), _one_side(maps))

    @staticmethod
    def kronecker(maps: Sequence[SpaceMap]) -> SpaceMap:
        """The map of a `Product`: outer coordinates slowest."""
        _no_means(maps)
        result = maps[0]
        for inner in maps[1:]:
            source = result.source[:, None] * inner.n + inner.source[None, :]
            source[result.unsourced, :] = -1
            source[:, inner.unsourced] = -1
            result = SpaceMap.build(
                result.n * inner.n,
                source.flatten(),
                torch.outer(result.write, inner.write).flatten(),
                torch.outer(result.read, inner.read).flatten(),
                silent=_one_side([result, inner]),
            )
        return result


def _no_means(maps: Sequence[SpaceMap]) -> None:
    if any(bool((part.mean != 0).any()) for part in maps):
        raise WarmstartError("Mean channels exist only in a space of their own, not inside a Concat or Product.")


def _one_side(maps: Sequence[SpaceMap]) -> Silent:
    sides = {part.silent for part in maps if bool(part.unsourced.any())}
    if len(sides) > 1:
        raise WarmstartError("One axis joins spaces whose new coordinates are silent on different sides.")
    return sides.pop() if sides else maps[0].silent


@dataclass(frozen=True)
class LayerMap:
    """One growth of a stack of layers.

    Args:
        before: number of layers of the source.
        source: for each layer of the grown model, the layer that it copies.
        gated: for each layer of the grown model, whether the branches that write the residual stream are zero.
    """

    before: int
    source: tuple[int, ...]
    gated: tuple[bool, ...]

    @classmethod
    def identity(cls, layers: int) -> LayerMap:
        """The map that changes nothing."""
        return cls(layers, tuple(range(layers)), (False,) * layers)

    @classmethod
    def inserted(cls, layers: int, follows: Sequence[int]) -> LayerMap:
        """New, gated layers, each behind the old layer that it copies."""
        source, gated = [], []
        for layer in range(layers):
            new = follows.count(layer)
            source += [layer] * (1 + new)
            gated += [False] + [True] * new
        return cls(layers, tuple(source), tuple(gated))

    def copying(self, able: Sequence[int]) -> LayerMap:
        """The same number of new layers, each behind the nearest layer of `able` below, or the first of them."""
        new = [source for source, gated in zip(self.source, self.gated, strict=True) if gated]
        return LayerMap.inserted(self.before, [max((k for k in able if k <= old), default=able[0]) for old in new])

    @property
    def after(self) -> int:
        return len(self.source)

    @property
    def is_identity(self) -> bool:
        return self.source == tuple(range(self.before)) and not any(self.gated)

    @property
    def exact(self) -> bool:
        """Whether the ungated layers are the source's layers, each once and in order."""
        return tuple(s for s, g in zip(self.source, self.gated, strict=True) if not g) == tuple(range(self.before))

    def compose(self, first: LayerMap) -> LayerMap:
        """`self` after `first`."""
        if first.after != self.before:
            raise WarmstartError(f"Layer maps to {first.after} and from {self.before} layers do not compose.")
        return LayerMap(
            first.before,
            tuple(first.source[s] for s in self.source),
            tuple(g or first.gated[s] for s, g in zip(self.source, self.gated, strict=True)),
        )

    def carry(self, per_layer: Sequence) -> list:
        """A per-layer list of the config, for the grown model."""
        return [per_layer[s] for s in self.source]
