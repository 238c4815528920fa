"""Reference slice: the parent stays in the leading corner, everything new is fresh and silent on one side.

Residual streams: nothing writes the new channels (for LayerNorm: they hold the mean, which it subtracts), readers are
free. Inner spaces: new units are written by a fresh initialisation and nothing reads them. No unit is copied, so no
symmetry has to break. For norms `t = sqrt(m / n)` keeps the mean square, so that eps and gains never change.

Source: arXiv 2308.06103 (theorems 3.1, 3.2 and 3.5, there with the gains scaled instead); "structured non-clone" in
arXiv 2604.04281.
"""

import math

import torch

from ..layout import Kind
from ..maps import SpaceMap
from .base import OperatorOptions, WidthOperator, register, silent_side


def _build(n: int, m: int, kind: Kind, options: OperatorOptions) -> SpaceMap:
    new = torch.arange(m) >= n
    source = torch.where(new, -1, torch.arange(m))
    t = math.sqrt(m / n) if kind in ("rms_normed", "layer_normed") else 1.0
    mean = new.double() * t if kind == "layer_normed" else 0.0
    return SpaceMap.build(n, source, t, 1.0 / t, mean, silent_side(kind))


register(
    WidthOperator(
        "reference_slice",
        _build,
        exact=True,
        reason="nothing writes or nothing reads what is new",
        source="arXiv 2308.06103",
    )
)
