"""Shrink, zero-pad, perturb: `w' = shrink * pad(w) + fresh`, for every tensor.

The parent, shrunk, lies in the leading corner of each space over a complete fresh initialisation of the target. With
`shrink = 0` the result is a fresh model. The function is not kept, by design.

Source: arXiv 2605.13405. There the fresh part is a muP initialisation; here it is the class's own. Fused axes are
padded segment by segment, so that heads stay aligned.
"""

import torch

from ..layout import Kind
from ..maps import SpaceMap
from .base import OperatorOptions, WidthOperator, register, silent_side


def _build(n: int, m: int, kind: Kind, options: OperatorOptions) -> SpaceMap:
    source = torch.where(torch.arange(m) >= n, -1, torch.arange(m))
    return SpaceMap.build(n, source, silent=silent_side(kind))


register(
    WidthOperator(
        "szp",
        _build,
        exact=False,
        reason="szp shrinks the parent and adds a fresh initialisation everywhere",
        source="arXiv 2605.13405",
        shrink=lambda options: options.shrink,
    )
)
