"""Uneven copy: copies as in exact copy, read in unequal shares that sum to one.

The shares of c copies are proportional to `1, ratio, ratio^2, ...`. The function is kept; the copies' gradients differ
by the shares, so that they part.

Source: LEMON's fan-out rule (arXiv 2310.07999), with fixed shares in place of random ones.
"""

import torch

from .base import OperatorOptions, WidthOperator, copy_map, register


def _shares(options: OperatorOptions):
    def shares(count: int) -> torch.Tensor:
        weights = torch.tensor(options.uneven_ratio, dtype=torch.float64) ** torch.arange(count)
        return weights / weights.sum()

    return shares


register(
    WidthOperator(
        "uneven_copy",
        lambda n, m, kind, options: copy_map(n, m, kind, _shares(options)),
        exact=True,
        reason="copies are read in unequal shares that sum to one",
        source="arXiv 2310.07999",
    )
)
