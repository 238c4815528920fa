"""Overlap: two copies of the stack, the first without its last layers, the second without its first.

With L layers and L' wanted, 2 L - L' layers are dropped in all, half from each copy (one more from the first where the
number is odd).

Source: SOLAR's depth up-scaling (arXiv 2312.15166): 32 layers, 8 dropped from each copy, 48.
"""

from ...errors import SizeError
from ..maps import LayerMap
from .base import DepthOperator, register


def _build(before: int, after: int) -> LayerMap:
    drop = 2 * before - after
    if drop < 0:
        raise SizeError(
            f"overlap joins two copies of {before} layers and cannot make {after}. Pass at most {2 * before} layers, "
            f"or depth_operator='stack'."
        )
    source = (*range(before - (drop + 1) // 2), *range(drop // 2, before))
    return LayerMap(before, source, (False,) * after)


register(
    DepthOperator(
        "overlap",
        _build,
        exact=False,
        reason="overlap runs some of the parent's layers more than once",
        source="arXiv 2312.15166",
    )
)
