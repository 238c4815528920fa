"""Which width operator `"auto"`, the default, stands for in one growth.

`reference_slice` where every space that grows can take fresh units, `perturbed_copy` where one of them can only be copied:
streams that a norm holds to whole copies (post-norm stacks), experts, the inside of heads that is written alike on both sides
(ALiBi models), and units that a class ties to others. A slice would copy those evenly, or be refused. Both operators are exact.

Near twice the parameters slices need the fewest tokens of all that is exact in width (`docs/growth-study.md`), and they were
the best constant choice over ten settings. At low learning rates, and with dropout, copies went on better in some of those
(`docs/selection.md`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .config import AUTO, GrowthConfig
from .layout import Layout
from .operators import OperatorOptions

SLICE, COPY = "reference_slice", "perturbed_copy"
CHOICES = (SLICE, COPY)
COPIED = ("whole", "contracted", "experts")  # kinds of spaces that a slice copies evenly, or that every operator does


def with_operator(
    asked: GrowthConfig, layout: Layout, before: Mapping[str, int], after: Mapping[str, int]
) -> GrowthConfig:
    """What was asked, with the name of the operator that `"auto"` stands for.

    Args:
        layout: of the class. before, after: the size of every space.
    """
    if asked.width_operator != AUTO:
        return asked
    grown = [info for name, info in layout.spaces.items() if info.kind != "layers" and before[name] != after[name]]
    copied = any(info.copied or info.kind in COPIED for info in grown)
    noisy = asked.noise != OperatorOptions.noise  # an option of copies' alone
    return dataclasses.replace(asked, width_operator=COPY if copied or noisy else SLICE)
