"""The law of gain: what a grown run gains on scratch, by growth factor and budget.

At a fixed target and budget, and so at fixed FLOPs, the loss of a grown run against that of the best run from scratch is
taken as a quadratic in `x = ln g`, which is 0 where nothing grows:

    ln(L_grown / L_scratch) = a x + b x^2,     a = a0 + a1 u,     b = b0 + b1 u,     u = ln(r / 20)

with g the growth factor (parameters of the target over those of the base) and r the target's tokens per parameter. It has
its least value at `g* = exp(-a / (2 b))`, and beyond `exp(-a / b) = g*^2`, its *upper bound*, scratch is the better one. The
quadratic and the bound are those of arXiv 2605.13405, whose plots fit each budget by itself; here budgets share one law, so
that a few dozen runs give it intervals. A ratio of losses carries over between texts and tokenizers where a loss does not.

A quadratic holds near its optimum only, so that pairs beyond `MAX_GROWTH_FACTOR` are left out. Terms that the runs cannot
tell (one growth factor, one budget) are not fitted, and what would need them is *not known*.

Draws are a wild bootstrap: the residuals of each unit change sign together, at random, and the law is fitted anew. A unit is
what pairs share: the target and its seed, whose run from scratch stands beside all growth factors and whose budgets may
share a trunk; or, where that makes fewer than `FEW_UNITS`, target, seed and budget. Residuals are those that a fit without
the unit would have, since the fit follows its own data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import WarmstartError
from ..fits.laws import interval
from ..fits.robust_fit import Array, PowerSum, fit, refit
from .growth_runs import Pair

REFERENCE = 20.0  # tokens per parameter at which u = 0
MAX_GROWTH_FACTOR = 10.0
TERMS = ("x", "x u", "x^2", "x^2 u")
DRAWS = 400
FEW_UNITS = 8
FURTHEST = 2.0  # how far beyond the largest budget that was run a crossing is still told
SPREAD = 4.0  # an interval whose ends differ by more than this factor resolves nothing
ONLY_HERE = 0.05  # share of a direction that other units tell, below which it is the unit's alone
SAME_VALUE = 1.5  # where runs have one value only, others within this factor pass for it
LEVEL_WIDTH = 1.1  # values within a tenth are one
CONDITION = 100.0  # of the scaled design: beyond it terms stand for one another
DELTA = 3e-3  # of the Huber loss of ln(ratio): about the noise of one pair at one seed in arXiv 2605.13405


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, or the reason why it is not known.

    Args:
        value (`float`, *optional*): None where it is not known. low, high (`float`, *optional*): the ends of its 95 % interval.
        reason (`str`): why it, or its interval, is not known.

    Example:

        >>> print(Estimate(2.034, 1.81, 2.29), "|", Estimate(None, reason="one growth factor was run"))
        2.03 (1.81 to 2.29) | not known: one growth factor was run
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""

    @classmethod
    def of(cls, value: float, draws: Array) -> Estimate:
        """A value with the interval of its draws; without one where there are none."""
        if not len(draws):
            return cls(float(value))
        return cls(float(value), *interval(draws))

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends; None where they are not known."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(self.__dict__)

    def __str__(self) -> str:
        if self.value is None:
            return f"not known: {self.reason}"
        return number(self.value) + (f" ({number(self.low)} to {number(self.high)})" if self.interval else "")


def number(value: float | None) -> str:
    """Three digits; what is infinite in words."""
    if value is None:
        return "not known"
    return f"{value:.3g}" if math.isfinite(value) else "no bound"


@dataclass(frozen=True)
class GainLaw:
    """`ln(L_grown / L_scratch) = a x + b x^2`, with a and b linear in `ln(r / 20)`; see the module.

    Args:
        method: how the runs were grown.
        terms: which of `TERMS` were fitted. theta (`np.ndarray`, (terms,)): their coefficients. draws: (draws, terms).
        ranges: of the runs: `growth_factor`, `tokens_per_parameter`, `params` and, where known,
            `base_tokens_per_parameter`, each (least, largest).
        pairs: how many were fitted. units: how many of them are independent of one another.
        rms: root mean square of the residuals of ln(ratio).
        dropped: term -> why it was not fitted.
        source: where the runs are from.
    """

    method: str
    terms: tuple[str, ...]
    theta: Array
    draws: Array = field(repr=False)
    ranges: Mapping[str, tuple[float, float]]
    pairs: int
    units: int
    rms: float
    dropped: Mapping[str, str] = field(default_factory=dict)
    source: str = "own runs"

    def change(self, growth_factor: float, tokens_per_parameter: float) -> Estimate:
        """`L_grown / L_scratch - 1`: below 0 the growth helps."""
        draws = np.expm1(self.log_ratio_draws(growth_factor, tokens_per_parameter))
        return Estimate.of(math.expm1(self.log_ratio(growth_factor, tokens_per_parameter)), draws)

    def log_ratio(self, growth_factor: float, tokens_per_parameter: float) -> float:
        """`ln(L_grown / L_scratch)`."""
        return float(self._columns(growth_factor, tokens_per_parameter) @ self.theta)

    def log_ratio_draws(self, growth_factor: float, tokens_per_parameter: float) -> Array:
        """The same by every draw, (draws,)."""
        return self.draws @ self._columns(growth_factor, tokens_per_parameter)

    def optimum(self, tokens_per_parameter: float) -> Estimate:
        """The growth factor with the least loss at a budget; 1 where no growth helps."""
        return self._turning_point(tokens_per_parameter, 2.0, "optimum")

    def upper_bound(self, tokens_per_parameter: float) -> Estimate:
        """The growth factor beyond which scratch is better; 1 where no growth helps."""
        return self._turning_point(tokens_per_parameter, 1.0, "upper bound")

    def budget_limit(self, growth_factor: float) -> Estimate:
        """The tokens per parameter beyond which growing by a factor is no better than scratch."""
        x = math.log(growth_factor)
        all_ = np.concatenate([self.theta[None], self.draws])
        (a0, b0), (a1, b1) = self._parts(all_, "x", "x^2"), self._parts(all_, "x u", "x^2 u")
        here, slope = x * (a0 + b0 * x), x * (a1 + b1 * x)  # of ln(ratio) at u = 0, and by u
        top = self.ranges["tokens_per_parameter"][1]
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            crossing = np.where(slope > 0, REFERENCE * np.exp(np.minimum(-here / slope, 50.0)), math.inf)
        if here[0] + slope[0] * math.log(self.ranges["tokens_per_parameter"][0] / REFERENCE) >= 0:
            return Estimate(None, reason="no gain at any budget that was run")
        if not crossing[0] <= FURTHEST * top:
            return Estimate(None, reason=f"beyond the budgets that were run, up to {top:.3g} tokens per parameter")
        return Estimate.of(crossing[0], crossing[1:])

    def outside(self, **at: float) -> list[str]:
        """What lies outside the range of the runs, in words: `growth_factor=`, `tokens_per_parameter=`, `params=` and so on."""
        found = []
        for name, value in at.items():
            low, high = self.ranges.get(name, (value, value))
            slack = SAME_VALUE if low == high else 1.01
            if not low / slack <= value <= high * slack:
                words = f"{low:.3g} only" if low == high else f"{low:.3g} to {high:.3g}"
                found.append(
                    f"{name.replace('_', ' ')} {value:.3g} is outside the range of the fit ({words}, {self.source})"
                )
        return found

    def _columns(self, growth_factor: float, tokens_per_parameter: float) -> Array:
        return design(np.array([growth_factor]), np.array([self._budget(tokens_per_parameter)]), self.terms)[0]

    def _curve(self, theta: Array, tokens_per_parameter: float) -> tuple[Array, Array]:
        """a and b at a budget, for each row of parameters."""
        u = math.log(self._budget(tokens_per_parameter) / REFERENCE)
        (a0, b0), (a1, b1) = self._parts(theta, "x", "x^2"), self._parts(theta, "x u", "x^2 u")
        return a0 + u * a1, b0 + u * b1

    def _parts(self, theta: Array, *names: str) -> list[Array]:
        """The coefficients of terms, for each row of parameters; 0 for terms that were not fitted."""
        return [theta[:, self.terms.index(n)] if n in self.terms else np.zeros(len(theta)) for n in names]

    def _budget(self, tokens_per_parameter: float) -> float:
        """The budget at which the law is taken: gains fade, so that none is promised below the least one that was measured."""
        return max(tokens_per_parameter, self.ranges["tokens_per_parameter"][0])

    def _turning_point(self, tokens_per_parameter: float, share: float, name: str) -> Estimate:
        """`exp(-a / (share b))`, of the law and of its draws."""
        if "x^2" not in self.terms:
            return Estimate(None, reason=self.dropped["x^2"])
        point, draws = (
            np.where(
                a >= 0, 1.0, np.where(b > 0, np.exp(np.minimum(-a / (share * np.maximum(b, 1e-12)), 50.0)), math.inf)
            )
            for a, b in (self._curve(t, tokens_per_parameter) for t in (self.theta[None], self.draws))
        )
        top = self.ranges["growth_factor"][1]
        if not np.isfinite(point[0]) or point[0] > top**2:
            return Estimate(None, reason=f"no {name} within the growth factors that were run, up to {top:.3g}")
        found = Estimate.of(point[0], draws)
        widest = SPREAD ** (3 - share)  # the bound is the optimum's square, and so is its spread
        if found.low is None or found.high is None:
            return Estimate(found.value, reason="too few runs for an interval")
        if not found.high <= widest * found.low:
            ends = f"{number(found.low)} to {number(found.high)}"
            return Estimate(None, found.low, found.high, f"the runs do not resolve it ({ends})")
        return found


def design(growth_factor: Array, tokens_per_parameter: Array, terms: Sequence[str] = TERMS) -> Array:
    """The columns of the law's terms, (points, terms)."""
    x, u = np.log(growth_factor), np.log(tokens_per_parameter / REFERENCE)
    made = {"x": x, "x u": x * u, "x^2": x * x, "x^2 u": x * x * u}
    return np.column_stack([made[name] for name in terms])


def fit_gain(pairs: Sequence[Pair], *, draws: int = DRAWS, seed: int = 0, source: str = "own runs") -> GainLaw:
    """Fit the law of one method's gain on scratch.

    Args:
        pairs (`list[Pair]`): of one method. draws (`int`): of the wild bootstrap. seed: of its signs.
        source: where the runs are from, for warnings.

    Returns:
        `GainLaw`; `dropped` says which terms the pairs could not tell.

    Raises:
        WarmstartError: no pair has a growth factor above 1 and up to `MAX_GROWTH_FACTOR`, or pairs of several methods.

    Source: arXiv 2605.13405 for the quadratic; the joint form over budgets and the bootstrap are ours.
    """
    methods = sorted({pair.method for pair in pairs})
    if len(methods) > 1:
        raise WarmstartError(f"One law is of one method, got pairs of {methods}.")
    used = [pair for pair in pairs if 1.0 < pair.growth_factor <= MAX_GROWTH_FACTOR]
    used.sort(key=lambda pair: (pair.base_params, pair.params, str(pair.seed), pair.tokens, pair.loss))
    if not used:
        raise WarmstartError(
            f"No pair has a growth factor above 1 and up to {MAX_GROWTH_FACTOR:g}, so that no gain can be fitted."
        )
    g, r, ratio = (
        np.array([getattr(p, name) for p in used]) for name in ("growth_factor", "tokens_per_parameter", "ratio")
    )
    unit = _units(used)
    terms, dropped = _told(g, r)
    law = PowerSum(design(g, r, terms)[None])
    found = fit(law, ratio, np.zeros((1, len(terms))), delta=DELTA)
    fitted = law.log(found.theta)
    made = np.empty((0, len(terms)))  # what is fitted exactly has no spread, and a single unit has none either
    units = int(unit.max()) + 1
    if draws and units > 1 and len(used) > len(terms):
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, units))[:, unit]
        spread = _left_out_residuals(law.design[0], found.residuals, unit)
        made = refit(law, np.exp(fitted + signs * spread), found.theta, delta=DELTA)
    ranges = {
        "growth_factor": (float(g.min()), float(g.max())),
        "tokens_per_parameter": (float(r.min()), float(r.max())),
        "params": (min(p.params for p in used), max(p.params for p in used)),
    }
    seen = [p.base_tokens / p.base_params for p in used if p.base_tokens is not None]
    if seen:
        ranges["base_tokens_per_parameter"] = (min(seen), max(seen))
    rms = float(np.sqrt((found.residuals**2).mean()))
    return GainLaw(methods[0], terms, found.theta, made, ranges, len(used), units, rms, dropped, source)


def _units(pairs: Sequence[Pair]) -> np.ndarray:
    """The number of each pair's unit."""
    for parts in (2, 3):
        names = [(pair.params, pair.seed, pair.tokens)[:parts] for pair in pairs]
        order = {name: k for k, name in enumerate(dict.fromkeys(names))}
        if len(order) >= FEW_UNITS:
            break
    return np.array([order[name] for name in names])


def _left_out_residuals(columns: Array, residuals: Array, unit: np.ndarray) -> Array:
    """`(I - H_uu)^-1 e_u` for each unit u, with H the projection on the columns: residuals of a fit without the unit.

    Directions that only the unit itself tells have no such residual, and keep their own.
    """
    hat = columns @ np.linalg.pinv(columns)
    found = residuals.copy()
    for u in range(int(unit.max()) + 1):
        own = unit == u
        rest = np.eye(own.sum()) - hat[np.ix_(own, own)]
        values, vectors = np.linalg.eigh(rest)
        scale = np.where(values > ONLY_HERE, 1 / np.maximum(values, ONLY_HERE), 1.0)
        found[own] = vectors @ (scale * (vectors.T @ residuals[own]))
    return found


def _told(growth_factor: Array, tokens_per_parameter: Array) -> tuple[tuple[str, ...], dict[str, str]]:
    """The terms that runs at these points can tell, and why not the others."""
    dropped: dict[str, str] = {}
    if len(levels(growth_factor)) < 2:
        only = f"one growth factor was run ({levels(growth_factor)[0]:.3g})"
        dropped |= {"x^2": only, "x^2 u": only}
    if len(levels(tokens_per_parameter)) < 2:
        only = f"one budget was run ({levels(tokens_per_parameter)[0]:.3g} tokens per parameter)"
        dropped |= dict.fromkeys(("x u", "x^2 u"), only)
    for name in ("x^2 u", "x u", "x^2"):
        left = [term for term in TERMS if term not in dropped]
        columns = design(growth_factor, tokens_per_parameter, left)
        scaled = columns / np.linalg.norm(columns, axis=0)
        values = np.linalg.svd(scaled, compute_uv=False)
        if name in left and (len(columns) <= len(left) or values[0] > CONDITION * values[-1]):
            dropped[name] = f"{len(columns)} pairs do not tell it from the other terms"
    return tuple(term for term in TERMS if term not in dropped), dropped


def levels(values: Array) -> list[float]:
    """Distinct values, those within a tenth as one."""
    found: list[float] = []
    for value in np.sort(values):
        if not found or value > LEVEL_WIDTH * found[-1]:
            found.append(float(value))
    return found
