"""Perturbed copy: exact copy, and paired noise on what reads the copies, which cancels over each set of copies.

`Z` is normal with standard deviation `noise` times the root mean square of the carried weights. The function is kept
at step 0 while the copies' gradients differ from the first step, so that they part.

Source: HyperCloning's noisy variant (arXiv 2409.12903) does this in pairs; projecting `Z` by `I - W R^T` extends it to
any number of copies and to uneven ones.
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
