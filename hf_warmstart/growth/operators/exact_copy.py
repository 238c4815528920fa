"""Exact copy: every unit is copied in turn and its copies are read in equal shares.

`W` repeats, `R = W / copies` (in the norm's gauge), `Z = 0`. Copies have equal gradients: without dropout or another
asymmetry they stay equal for ever, and the grown model is the parent at several times the price.

Source: Net2Net (arXiv 1511.05641), HyperCloning (arXiv 2409.12903); non-integer factors for LayerNorm as in LEMON
(arXiv 2310.07999), for RMSNorm by the isometric gauge `t = sqrt(m / (n c))`.
"""

from .base import WidthOperator, copy_map, even, register

register(
    WidthOperator(
        "exact_copy",
        lambda n, m, kind, options: copy_map(n, m, kind, even),
        exact=True,
        reason="copies are read in shares that sum to one",
        source="arXiv 2409.12903",
    )
)
