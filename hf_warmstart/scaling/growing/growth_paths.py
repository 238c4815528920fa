"""One jump or two: growing in stages, compared with growing at once under the laws.

A base of N0 parameters may grow to N by `g = N / N0` at once, or to the middle `N1 = sqrt(N0 N)` first and from there. The
laws of gain are of bases of one quality, so that the middle is trained until it is one: until its loss is that of a run
from scratch at its size over the tokens that bases are taken to have seen. The jump gets the middle's FLOPs as further
tokens of the target, `D' = D + D1 N1 / N`, and so does scratch, which both are compared with:

    staged    ln(L / L_scratch(N, D')) = gain(sqrt(g), D / N) + ln(L_scratch(N, D) / L_scratch(N, D'))
    at once   ln(L / L_scratch(N, D')) = gain(g, D' / N)

No source measured such paths: this is what its laws imply, no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq

from .gain_law import Estimate, GainLaw
from .growth_laws import GrowthLaws


@dataclass(frozen=True)
class PathComparison:
    """A staged growth beside a single one, at equal FLOPs after the base.

    Args:
        sizes: parameters of base, middle and target.
        middle_tokens: D1, which the middle takes. jump_tokens: D', which the single growth gets instead of D.
        staged, at_once (`Estimate`): loss over that of scratch at the target's size and D', less 1.
        difference (`Estimate`): staged over at once, less 1: below 0 stages are better.
    """

    sizes: tuple[float, float, float]
    middle_tokens: float
    jump_tokens: float
    staged: Estimate
    at_once: Estimate
    difference: Estimate

    @property
    def better(self) -> str:
        """`"staged"`, `"at once"`, or `"not told apart"` where the interval holds 0."""
        ends = self.difference.interval
        if ends is None or ends[0] <= 0 <= ends[1]:
            return "not told apart"
        return "staged" if ends[1] < 0 else "at once"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        found = {k: v.to_dict() if isinstance(v, Estimate) else v for k, v in self.__dict__.items()}
        return {**found, "better": self.better}


def compare_paths(
    laws: GrowthLaws, gain: GainLaw, params: float, tokens: float, base_params: float
) -> PathComparison | None:
    """Compare two growths through the middle size with one.

    Args:
        laws, gain: what is compared under; scratch's law must be over sizes and budgets.
        params (`float`): N. tokens (`float`): D of the target after the last of two growths. base_params (`float`): N0.

    Returns:
        None where the laws cannot tell: no law over sizes, or no budget at which the middle is as good as a base.
    """
    seen = laws.base_tokens_per_parameter
    if not laws.compares_sizes or seen is None or not params > base_params:
        return None
    middle, step = math.sqrt(params * base_params), math.sqrt(params / base_params)
    spent = _tokens_of_a_base(laws, gain, middle, step, seen)
    if spent is None:
        return None
    longer = tokens + spent * middle / params
    later = _log_loss(laws, params, tokens) - _log_loss(laws, params, longer)
    staged = later + gain.log_ratio(step, tokens / params), later + gain.log_ratio_draws(step, tokens / params)
    jump = gain.log_ratio(step**2, longer / params), gain.log_ratio_draws(step**2, longer / params)
    return PathComparison(
        sizes=(base_params, middle, params),
        middle_tokens=spent,
        jump_tokens=longer,
        staged=Estimate.of(math.expm1(staged[0]), np.expm1(staged[1])),
        at_once=Estimate.of(math.expm1(jump[0]), np.expm1(jump[1])),
        difference=Estimate.of(math.expm1(staged[0] - jump[0]), np.expm1(staged[1] - jump[1])),
    )


def _tokens_of_a_base(laws: GrowthLaws, gain: GainLaw, params: float, factor: float, seen: float) -> float | None:
    """The tokens after which a grown middle has the loss of scratch at `seen` tokens per parameter."""
    wanted = _log_loss(laws, params, seen * params)

    def above(log_tokens: float) -> float:
        each = math.exp(log_tokens)
        return _log_loss(laws, params, each * params) + gain.log_ratio(factor, each) - wanted

    low, high = math.log(seen / 10), math.log(seen * 10)
    if not above(low) > 0 > above(high):
        return None
    return math.exp(brentq(above, low, high)) * params


def _log_loss(laws: GrowthLaws, params: float, tokens: float) -> float:
    loss = laws.scratch_loss(params, tokens)
    assert loss is not None  # whoever calls has a law
    return math.log(loss)
