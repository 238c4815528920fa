"""Stack: the whole stack again on top of itself; layer j copies layer `j mod L`.

Source: G_stack (arXiv 2405.15319).
"""

from ..maps import LayerMap
from .base import DepthOperator, register


def _build(before: int, after: int) -> LayerMap:
    return LayerMap(before, tuple(j % before for j in range(after)), (False,) * after)


register(
    DepthOperator(
        "stack",
        _build,
        exact=False,
        reason="stack runs the parent's layers more than once",
        source="arXiv 2405.15319",
    )
)
