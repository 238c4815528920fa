"""Robust fits of scaling laws: sums of products of powers, Huber loss on log residuals, many starts, draws.

A law says `y = sum over its terms of exp(design . theta)`: each term is a constant or a product of powers, whose logarithm
is linear in the parameters. So one small model, `PowerSum`, gives predictions and derivatives of them all:

| law | theta | design of its terms |
|---|---|---|
| `E + A x^-a` | (ln E, ln A, a) | (1, 0, 0), (0, 1, -ln x) |
| `E + A x^-a + B z^-b` | (ln E, ln A, a, ln B, b) | (1, 0, 0, 0, 0), (0, 1, -ln x, 0, 0), (0, 0, 0, 1, -ln z) |
| `c x^p z^q` | (ln c, p, q) | (1, ln x, ln z) |

`fit` minimises the summed Huber loss of `ln y` from many starts: all are tried at once, the best are finished by scipy.
`refit` fits the same law to many data sets that differ in weights or in targets (a bootstrap), all at once from a known
optimum. scipy has no fit of a batch, and a thousand single ones would take minutes, so that `refit` is our own
Levenberg-Marquardt with Huber weights; the tests hold it against scipy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares

from ...errors import WarmstartError

Array = NDArray[np.float64]

HUBER_DELTA = 1e-3  # of log residuals: Hoffmann et al. 2022, arXiv 2203.15556, section 3.3
FINISHED = 8  # starts that scipy finishes, the best of all after a few steps
FIRST_STEPS, LAST_STEPS = 15, 100
BATCH_NUMBERS = 4_000_000  # of float64 in the largest array of one batch of `refit`


@dataclass(frozen=True)
class PowerSum:
    """`y = sum over terms of exp(design . theta)`.

    Args:
        design (`np.ndarray`, (terms, points, parameters)): what each parameter is multiplied with, in each term's logarithm.
    """

    design: Array

    @classmethod
    def of(cls, terms: Sequence[Sequence[ArrayLike | None]]) -> PowerSum:
        """From one list per term, with a number or one number per point for each parameter; None where it has no part.

        Example:

            >>> import numpy as np
            >>> x = np.array([1.0, 10.0])
            >>> law = PowerSum.of([[1.0, None, None], [None, 1.0, -np.log(x)]])  # E + A x^-a
            >>> np.exp(law.log([np.log(2.0), np.log(3.0), 1.0])).round(3).tolist()
            [5.0, 2.3]
        """
        points = max(np.size(column) for term in terms for column in term if column is not None)
        design = np.zeros((len(terms), points, len(terms[0])))
        for index, term in enumerate(terms):
            for parameter, column in enumerate(term):
                if column is not None:
                    design[index, :, parameter] = column
        return cls(design)

    @property
    def parameters(self) -> int:
        """How many parameters the law has."""
        return self.design.shape[2]

    @cached_property
    def _columns(self) -> list[list[tuple[int, Array | float]]]:
        """For each term the parameters that it has, with their columns; a constant column as one number."""
        found: list[list[tuple[int, Array | float]]] = []
        for term in self.design:
            columns = [(k, term[:, k]) for k in range(self.parameters) if term[:, k].any()]
            found.append([(k, float(c[0]) if np.ptp(c) == 0 else c) for k, c in columns])
        return found

    def log(self, theta: ArrayLike) -> Array:
        """`ln y` at every point, (..., points), for parameters (..., parameters)."""
        return self.log_and_slope(theta)[0]

    def log_and_slope(self, theta: ArrayLike) -> tuple[Array, Array]:
        """`ln y`, (..., points), and its derivatives by the parameters, (..., points, parameters)."""
        theta = np.asarray(theta, dtype=float)
        lead, points = theta.shape[:-1], self.design.shape[1]
        logs = []
        for columns in self._columns:
            exponent = np.zeros((*lead, points))
            for k, column in columns:
                exponent += theta[..., k, None] * column
            logs.append(exponent)
        top = np.maximum.reduce(logs)
        shares = [np.exp(exponent - top) for exponent in logs]
        total = np.add.reduce(shares)
        slope = np.zeros((*lead, points, self.parameters))
        for columns, share in zip(self._columns, shares, strict=True):
            share /= total
            for k, column in columns:
                slope[..., k] += share * column
        return top + np.log(total), slope


@dataclass(frozen=True)
class RobustFit:
    """A fit of `fit`.

    Args:
        theta (`np.ndarray`, (parameters,)): the parameters.
        cost (`float`): the weighted sum of Huber losses of log residuals at them.
        starts (`int`): how many starts were tried. agreeing (`int`): how many of those that were finished came within 1 % of
            the least cost: where it is 1 of many, the optimum is fragile.
        residuals (`np.ndarray`, (points,)): `ln y` of the data less the law's.
    """

    theta: Array
    cost: float
    starts: int
    agreeing: int
    residuals: Array


def huber(residuals: Array, delta: float = HUBER_DELTA) -> Array:
    """The Huber loss: `r^2 / 2` up to `delta`, `delta (|r| - delta / 2)` beyond. Shape as `residuals`."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size * size, delta * (size - 0.5 * delta))


def fit(
    law: PowerSum,
    targets: ArrayLike,
    starts: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    delta: float = HUBER_DELTA,
) -> RobustFit:
    """The parameters that minimise `sum of weight * huber(ln y - law.log(theta))`.

    Args:
        law (`PowerSum`): the law at the data's points.
        targets (`np.ndarray`, (points,)): y, positive.
        starts (`np.ndarray`, (starts, parameters)): where to begin; all are tried. A coarse grid over the plausible range.
        weights (`np.ndarray`, (points,), *optional*): of each point; 1 by default.
        delta (`float`, defaults to 1e-3): of the Huber loss, in ln y.

    Returns:
        `RobustFit`. The sum is not averaged: averages stop optimisers early (Besiroglu et al. 2024, arXiv 2404.10102).

    Raises:
        WarmstartError: targets that are not positive and finite, fewer points than parameters, or nothing finite to start
            from.

    Source: Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3) for the loss and the grid of starts.
    """
    wanted = np.asarray(targets, dtype=float)
    if not (np.isfinite(wanted).all() and (wanted > 0).all()):
        bad = np.flatnonzero(~(np.isfinite(wanted) & (wanted > 0)))[:5].tolist()
        raise WarmstartError(
            f"A law is fitted to positive finite numbers; those at positions {bad} are not. Leave them out."
        )
    if len(wanted) < law.parameters:
        raise WarmstartError(
            f"{law.parameters} parameters cannot be fitted to {len(wanted)} points. Add points, or fit a simpler law."
        )
    ln_y = np.log(wanted)
    scale = np.ones_like(ln_y) if weights is None else np.asarray(weights, dtype=float)
    first = np.atleast_2d(np.asarray(starts, dtype=float))
    tried, costs = _descend(law, ln_y[None], scale[None], first, delta, FIRST_STEPS)
    order = np.argsort(costs, kind="stable")[:FINISHED]
    order = order[np.isfinite(costs[order])]
    if not len(order):
        raise WarmstartError("No start gives finite predictions. Pass starts near the data's range.")
    root = np.sqrt(scale)

    def residuals(theta: Array) -> Array:
        return root * (law.log(theta) - ln_y)

    def slopes(theta: Array) -> Array:
        return root[:, None] * law.log_and_slope(theta)[1]

    # scipy's Huber threshold applies to weighted residuals; equal weights, the usual case, are exact, and others are
    # finished by our own descent, whose threshold is on ln y itself.
    finished = [
        least_squares(
            residuals, theta, jac=slopes, loss="huber", f_scale=delta * root.mean(), x_scale="jac", max_nfev=100
        ).x
        for theta in tried[order]
    ]
    ends, costs = _descend(law, ln_y[None], scale[None], np.array(finished), delta, LAST_STEPS)
    best = int(np.argmin(costs))
    return RobustFit(
        ends[best],
        float(costs[best]),
        len(first),
        int((costs <= costs[best] * 1.01 + 1e-15).sum()),
        ln_y - law.log(ends[best]),
    )


def refit(
    law: PowerSum,
    targets: ArrayLike,
    start: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    delta: float = HUBER_DELTA,
) -> Array:
    """The same fit for many data sets at the same points, from a known optimum: the draws of a bootstrap.

    Args:
        law (`PowerSum`): the law at the data's points.
        targets (`np.ndarray`, (draws, points) or (points,)): y of each data set, positive; or one for all.
        start (`np.ndarray`, (parameters,) or (draws, parameters)): the optimum of the data as they are.
        weights (`np.ndarray`, (draws, points) or (points,), *optional*): of each point in each data set. How often a
            bootstrap drew it, for one that draws points.
        delta (`float`, defaults to 1e-3): of the Huber loss, in ln y.

    Returns:
        Parameters, (draws, parameters).

    Example:

        >>> import numpy as np
        >>> x = np.geomspace(1, 100, 6)
        >>> law = PowerSum.of([[1.0, np.log(x)]])
        >>> counts = np.random.default_rng(0).multinomial(6, [1 / 6] * 6, size=50)
        >>> refit(law, 3 * x**0.5, [1.0, 0.5], weights=counts).shape
        (50, 2)
    """
    ln_y = np.atleast_2d(np.log(np.asarray(targets, dtype=float)))
    scale = np.ones((1, ln_y.shape[1])) if weights is None else np.atleast_2d(np.asarray(weights, dtype=float))
    starts = np.atleast_2d(np.asarray(start, dtype=float))
    draws = max(len(ln_y), len(scale), len(starts))
    starts = np.broadcast_to(starts, (draws, law.parameters))
    size = max(1, BATCH_NUMBERS // (law.design.shape[1] * law.parameters))
    parts = []
    for begin in range(0, draws, size):
        part = slice(begin, begin + size)
        y = ln_y if len(ln_y) == 1 else ln_y[part]
        w = scale if len(scale) == 1 else scale[part]
        parts.append(_descend(law, y, w, starts[part], delta, LAST_STEPS)[0])
    return np.concatenate(parts)


def _descend(
    law: PowerSum, ln_y: Array, weights: Array, starts: Array, delta: float, steps: int
) -> tuple[Array, Array]:
    """Levenberg-Marquardt with Huber weights, each row by itself: parameters (rows, k) and costs (rows,)."""
    theta, rows = np.array(starts, dtype=float), len(starts)
    y = np.broadcast_to(ln_y, (rows, ln_y.shape[1]))
    w = np.broadcast_to(weights, (rows, weights.shape[1]))

    def look(at: Array, where: NDArray[np.intp]) -> tuple[Array, Array, Array]:
        prediction, slope = law.log_and_slope(at)
        residual = y[where] - prediction
        return (w[where] * huber(residual, delta)).sum(1), residual, slope

    with np.errstate(all="ignore"):  # a step too far overflows, is not finite, and so is refused
        active: NDArray[np.intp] = np.arange(rows)
        cost, residual, slope = look(theta, active)
        damping, eye = np.full(rows, 1e-3), np.eye(law.parameters)
        best = cost.copy()
        for _ in range(steps):
            pull = w[active] * np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
            weighted = np.swapaxes(slope * pull[..., None], 1, 2)
            normal, right = weighted @ slope, (weighted @ residual[..., None])[..., 0]
            diagonal = np.einsum("rkk->rk", normal)
            ridge = damping[active, None] * diagonal + 1e-14 * diagonal.max(1, keepdims=True) + 1e-300
            system = normal + ridge[..., None] * eye
            usable = np.isfinite(system).all((1, 2)) & np.isfinite(right).all(1)
            step = np.zeros_like(right)
            step[usable] = np.linalg.solve(system[usable], right[usable, :, None])[..., 0]
            moved = theta[active] + step
            new_cost, new_residual, new_slope = look(moved, active)
            better = new_cost < best[active]
            gain = best[active] - new_cost
            done = ~usable | (better & (gain <= 1e-9 * best[active])) | (best[active] <= 1e-30)
            done |= ~better & ((damping[active] > 1e8) | (np.abs(step) <= 1e-11 * (1 + np.abs(theta[active]))).all(1))
            theta[active[better]], best[active[better]] = moved[better], new_cost[better]
            damping[active] = np.where(better, damping[active] / 5, damping[active] * 4).clip(1e-12, 1e12)
            residual = np.where(better[:, None], new_residual, residual)[~done]
            slope = np.where(better[:, None, None], new_slope, slope)[~done]
            active = active[~done]
            if not len(active):
                break
    return theta, np.where(np.isfinite(best), best, np.inf)
