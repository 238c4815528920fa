"""The ways to spend one budget, compared under the laws: grow, train from scratch, train the base on.

All are measured against the run from scratch of the target's size and tokens. What the base cost is `D0 N0 / N` tokens of
the target, in FLOPs of `6 N D`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..fits.robust_fit import Array
from .gain_law import Estimate, GainLaw
from .growth_laws import GrowthLaws

GROW, FROM_SCRATCH, CONTINUE_BASE = "grow", "scratch", "continue the base"
TOLD = 0.975  # share of the draws in which growing is the better one, for it to count as told


@dataclass(frozen=True)
class Comparison:
    """The ways to spend one budget, under the laws."""

    laws: GrowthLaws
    gain: GainLaw
    params: float
    tokens: float
    factor: float
    base_tokens: float | None

    @property
    def each(self) -> float:
        return self.tokens / self.params

    @property
    def base_cost(self) -> float | None:
        """The base's FLOPs in tokens of the target: `D0 N0 / N`."""
        return None if self.base_tokens is None else self.base_tokens / self.factor

    def log_ratio(self) -> tuple[float, Array]:
        """ln(grown / scratch), and by every draw."""
        return self.gain.log_ratio(self.factor, self.each), self.gain.log_ratio_draws(self.factor, self.each)

    def estimates(self) -> dict[str, Estimate]:
        value, draws = self.log_ratio()
        level = self.laws.scratch_loss(self.params, self.tokens)
        unknown = Estimate(None, reason="the runs give no law of scratch's loss")
        made = {
            "growth_factor": self.gain.optimum(self.each),
            "upper_bound": self.gain.upper_bound(self.each),
            "loss_change": Estimate.of(math.expm1(value), np.expm1(draws)),
            "loss_difference": unknown
            if level is None
            else Estimate.of(level * math.expm1(value), level * np.expm1(draws)),
            "budget_limit": self.gain.budget_limit(self.factor)
            if self.factor > 1
            else Estimate(None, reason="nothing grows"),
        }
        if level is None:
            return made | dict.fromkeys(("speedup", "speedup_with_base_cost", "tokens_saved"), unknown)
        needed = self._equal(level * math.exp(value))
        by_draw = np.array([self._equal(level * math.exp(d)) for d in draws])
        if not math.isfinite(needed):
            never = Estimate(None, reason="scratch's law never reaches the grown model's loss")
            return made | dict.fromkeys(("speedup", "speedup_with_base_cost", "tokens_saved"), never)
        made["speedup"] = Estimate.of(needed / self.tokens, by_draw / self.tokens)
        made["tokens_saved"] = Estimate.of(needed - self.tokens, by_draw - self.tokens)
        if self.base_cost is None:
            made["speedup_with_base_cost"] = Estimate(None, reason="the base's tokens are not known")
        else:
            spent = self.tokens + self.base_cost
            made["speedup_with_base_cost"] = Estimate.of(needed / spent, by_draw / spent)
        return made

    def _equal(self, loss: float) -> float:
        found = self.laws.equal_loss_tokens(self.params, loss)
        return math.inf if found is None else found

    def options(self, base_at_hand: bool, count_base_cost: bool) -> list[dict[str, Any]]:
        """The ways, best first: `option`, `loss_change` against scratch at the target's own tokens, `params`, `tokens`."""
        value, draws = self.log_ratio()
        scratch_tokens = self.tokens + ((self.base_cost or 0.0) if count_base_cost else 0.0)
        rows = [
            self._option(FROM_SCRATCH, self._against(self.params, scratch_tokens), self.params, scratch_tokens),
        ]
        if self.factor > 1:
            rows.append(self._option(GROW, Estimate.of(value, draws), self.params, self.tokens))
        if base_at_hand and self.base_tokens is not None:
            source, more = self.params / self.factor, self.tokens * self.factor
            told = self.laws.compares_sizes or self.factor == 1
            made = (
                self._against(source, self.base_tokens + more)
                if told
                else Estimate(None, reason="the runs give no law over sizes")
            )
            rows.append(self._option(CONTINUE_BASE, made, source, more))
        return sorted(rows, key=lambda row: math.inf if row["loss_change"] is None else row["loss_change"])

    def _against(self, params: float, tokens: float) -> Estimate:
        """ln of scratch's loss at a size and tokens over that at the target's."""
        level, other = self.laws.scratch_loss(self.params, self.tokens), self.laws.scratch_loss(params, tokens)
        if tokens == self.tokens and params == self.params:
            return Estimate(0.0)
        if level is None or other is None:
            return Estimate(None, reason="the runs give no law of scratch's loss")
        return Estimate(math.log(other / level))

    @staticmethod
    def _option(name: str, log_ratio: Estimate, params: float, tokens: float) -> dict[str, Any]:
        ends = [None if x is None else math.expm1(x) for x in (log_ratio.value, log_ratio.low, log_ratio.high)]
        row = {"option": name, "loss_change": ends[0], "interval": ends[1:], "params": params, "tokens": tokens}
        return row | ({"reason": log_ratio.reason} if log_ratio.reason else {})

    def choice(self, options: list[dict[str, Any]]) -> str:
        """The option with the least loss.

        Two are advised only where that is sure: the base trained on where it is better by more than the law's error, and
        growth outside the range of its runs where the draws agree.
        """
        known = {row["option"]: row["loss_change"] for row in options if row["loss_change"] is not None}
        others = {name: change for name, change in known.items() if name != CONTINUE_BASE}
        if GROW in others and self.beyond and self.share_for_growing(known) < TOLD:
            del others[GROW]
        best = min(others, key=lambda name: (others[name], name != FROM_SCRATCH))
        if CONTINUE_BASE in known and (
            GROW not in known or known[CONTINUE_BASE] + self.laws.scratch_error < others[best]
        ):
            return CONTINUE_BASE
        return best

    @property
    def beyond(self) -> list[str]:
        """Whether growth factor or budget lie outside the range of the runs."""
        return self.gain.outside(growth_factor=self.factor, tokens_per_parameter=self.each)

    def share_for_growing(self, known: Mapping[str, float]) -> float:
        """The share of the draws in which growing is better than scratch; not a number without draws."""
        _, draws = self.log_ratio()
        return float((draws < math.log1p(known[FROM_SCRATCH])).mean()) if len(draws) else math.nan

    def doubts(self, options: list[dict[str, Any]], advice: str, count_base_cost: bool) -> list[str]:
        """What the advice hangs on, in words."""
        found = []
        known = {row["option"]: row["loss_change"] for row in options if row["loss_change"] is not None}
        if GROW in known:
            share = self.share_for_growing(known)
            if math.isnan(share):
                found.append("There are too few runs for intervals: nothing says how sure this is.")
            elif 1 - TOLD < share < TOLD:
                then = ", and outside the range of the runs that is not enough to advise it" if self.beyond else ""
                found.append(
                    f"Growing and scratch are not told apart: growing is the better one in {share:.0%} of the draws{then}."
                )
        if CONTINUE_BASE in known and advice != CONTINUE_BASE:
            gap = known[CONTINUE_BASE] - known[advice]
            if gap < self.laws.scratch_error:
                found.append(
                    f"Training the base on for the same FLOPs ({self.factor:.3g} times the tokens) is expected within "
                    f"{abs(gap):.1%} of this; between sizes scratch's law errs by {self.laws.scratch_error:.1%}: run it too."
                )
        if advice == CONTINUE_BASE and self.factor > 1:
            found.append(
                f"Training the base on takes {self.factor:.3g} times the tokens for the same FLOPs. Where tokens are short, "
                "or the larger model is wanted for later, the next option counts."
            )
        if advice == GROW and not count_base_cost and self.base_cost is not None:
            with_cost = self.estimates()["speedup_with_base_cost"].value
            if with_cost is not None and with_cost < 1:
                found.append(
                    f"With the base's own cost counted the speed-up is {with_cost:.2f}: it pays where the base exists anyway."
                )
        if "x^2" not in self.gain.terms:
            found.append(f"Optimum and upper bound are not known: {self.gain.dropped['x^2']}.")
        return found
