"""Interleave: each layer is repeated in place; layer j copies layer `floor(j L / L')`.

Source: Gradual stacking's alternative in arXiv 2405.15319; interposition in arXiv 2510.08008.
"""

from ..maps import LayerMap
from .base import DepthOperator, register


def _build(before: int, after: int) -> LayerMap:
    return LayerMap(before, tuple(j * before // after for j in range(after)), (False,) * after)


register(
    DepthOperator(
        "interleave",
        _build,
        exact=False,
        reason="interleave runs the parent's layers more than once",
        source="arXiv 2510.08008",
    )
)
