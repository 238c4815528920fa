"""Identity blocks: new layers copy a layer below them, with every branch that writes the residual stream zero.

Copies are spread evenly: with L layers and k new ones, new layer j follows source layer `ceil((j + 1) L / k) - 1`.

Source: LLaMA Pro (arXiv 2401.02415).
"""

from ..maps import LayerMap
from .base import DepthOperator, register


def _build(before: int, after: int) -> LayerMap:
    extra = after - before
    follows = [-(-(j + 1) * before // extra) - 1 for j in range(extra)]
    return LayerMap.inserted(before, follows)


register(
    DepthOperator(
        "identity_blocks",
        _build,
        exact=True,
        reason="new layers add nothing to the residual stream",
        source="arXiv 2401.02415",
    )
)
