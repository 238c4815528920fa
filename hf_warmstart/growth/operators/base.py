"""What an operator is, where operators register, and the factors that norms ask for.

A width operator says how one space grows from n to m: it returns the `SpaceMap` with `W` and `R`. Two numbers say what
is added to the carried weights: `noise` (relative size of `Z` in `w' = W_out w R_in^T + Z (I - W_in R_in^T)`) and
`shrink` (None, or the factor on the carried weights over a complete fresh initialisation). A depth operator says which
layer each new layer copies, and which are gated off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import WarmstartError
from ..layout import Kind
from ..maps import LayerMap, SpaceMap

# (n, m, kind, options) -> map
BuildSpace = Callable[[int, int, Kind, "OperatorOptions"], SpaceMap]
BuildLayers = Callable[[int, int], LayerMap]


@dataclass(frozen=True)
class OperatorOptions:
    """Options of all operators; each reads its own.

    Args:
        noise: `perturbed_copy`: standard deviation of the paired noise over the root mean square of the carried weights.
        uneven_ratio: `uneven_copy`: weight of each copy over the copy before it, when they are read.
        shrink: `szp`: factor on the carried weights.
    """

    noise: float = 0.2
    uneven_ratio: float = 0.5
    shrink: float = 0.4


@dataclass(frozen=True)
class WidthOperator:
    """A way to widen: its map for one space, and whether the grown model computes the same function."""

    name: str
    build: BuildSpace
    exact: bool
    reason: str
    source: str
    noise: Callable[[OperatorOptions], float] = lambda options: 0.0
    shrink: Callable[[OperatorOptions], float | None] = lambda options: None


@dataclass(frozen=True)
class DepthOperator:
    """A way to deepen: its layer map, and whether the grown model computes the same function."""

    name: str
    build: BuildLayers
    exact: bool
    reason: str
    source: str


WIDTH_OPERATORS: dict[str, WidthOperator] = {}
DEPTH_OPERATORS: dict[str, DepthOperator] = {}


def register(operator: WidthOperator | DepthOperator) -> None:
    """Make an operator known by its name."""
    table = WIDTH_OPERATORS if isinstance(operator, WidthOperator) else DEPTH_OPERATORS
    if operator.name in table or not operator.name.islower():
        raise WarmstartError(f"An operator's name is lower case and new; {operator.name!r} is not.")
    table[operator.name] = operator  # type: ignore[assignment]


def copy_map(n: int, m: int, kind: Kind, shares: Callable[[int], Tensor]) -> SpaceMap:
    """Copy units in turn: coordinate j copies j mod n; its c copies share the reading as `shares(c)`, which sums to 1.

    Factors by kind, with c the number of copies of a coordinate:

    - root-mean-square norms: `t = sqrt(m / (n c))` keeps the mean square, so eps and gains never change;
    - LayerNorm: whole copies only, and channels that hold the mean for the rest, `t = sqrt(m / (k n))`, `k = m // n`
      (arXiv 2310.07999);
    - everything else: whole units, `t = 1`.
    """
    if kind == "layer_normed" and m % n:
        k = m // n
        t = math.sqrt(m / (k * n))
        new = torch.arange(m) >= k * n
        source = torch.where(new, -1, torch.arange(m) % n)
        read = shares(k)[torch.arange(m).clamp(max=k * n - 1) // n] / t
        return SpaceMap.build(n, source, t, read, mean=new.double() * t, silent="write")
    source = torch.arange(m) % n
    copies = torch.bincount(source, minlength=n)[source]
    turn = torch.arange(m) // n
    read = torch.ones(m, dtype=torch.float64)
    for count in copies.unique().tolist():
        mine = copies == count
        read[mine] = shares(count)[turn[mine]]
    if kind == "rms_normed":
        t = torch.sqrt(m / (n * copies.double()))
        return SpaceMap.build(n, source, t, read / t, silent="write")
    return SpaceMap.build(n, source, 1.0, read, silent=silent_side(kind))


def silent_side(kind: Kind):
    """Residual streams are silent where they are written, inner spaces where they are read."""
    return "write" if kind in ("rms_normed", "layer_normed", "linear") else "read"


def even(count: int) -> Tensor:
    """Equal shares."""
    return torch.full((count,), 1.0 / count, dtype=torch.float64)
