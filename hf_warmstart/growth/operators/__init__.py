"""Growth operators: one file each, one registration each."""

from . import (  # noqa: F401  (each registers itself)
    exact_copy,
    identity_blocks,
    interleave,
    overlap,
    perturbed_copy,
    reference_slice,
    stack,
    szp,
    uneven_copy,
)
from .base import DEPTH_OPERATORS, WIDTH_OPERATORS, DepthOperator, OperatorOptions, WidthOperator, register

__all__ = ["DEPTH_OPERATORS", "WIDTH_OPERATORS", "DepthOperator", "OperatorOptions", "WidthOperator", "register"]
