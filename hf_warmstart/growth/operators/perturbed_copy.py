"""Perturbed copy: exact copy, and noise on what reads the copies, which cancels over each set of copies.

Of c copies c - 1 combinations may change without changing the function: for each set of copies, and each row, c - 1 uniform
numbers are drawn and mapped to them by an orthonormal basis (`growth/pairing.py`). That has the covariance of
`Z (I - W R^T)` for a `Z` of independent numbers with standard deviation `noise` times the root mean square of the carried
weights (over a million of them, where there are more). The function is kept at step 0 while the copies' gradients differ from
the first step, so that they part.

Source: HyperCloning's noisy variant (arXiv 2409.12903) does this in pairs; the basis extends it to any number of copies and
to copies that are written unequally.
"""

from .base import WidthOperator, copy_map, even, register

register(
    WidthOperator(
        "perturbed_copy",
        lambda n, m, kind, options: copy_map(n, m, kind, even),
        exact=True,
        reason="copies are read in shares that sum to one, and the noise cancels over them",
        source="arXiv 2409.12903",
        noise=lambda options: options.noise,
    )
)
