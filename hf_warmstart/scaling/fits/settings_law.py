"""Power laws through the optima of budgets, each known up to its own noise.

`ln y = a + sum of b_i ln x_i` by weighted least squares, the model of a random-effects meta-regression: the optimum of a
budget differs from the law by the noise between seeds (variance v, from its draws) and by what the law itself leaves out
(variance t^2, the same for all budgets, by the method of moments of DerSimonian and Laird 1986). Each draw of the law takes a
draw of every optimum and adds scatter t. So a law whose budgets agree within noise is as sure as they are, and one whose
budgets do not is unsure even where every optimum is known well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...errors import WarmstartError
from .laws import PowerLaw
from .robust_fit import Array


@dataclass(frozen=True)
class SettingsFit:
    """A power law through optima.

    Args:
        law (`PowerLaw`): with its draws. r_squared (`float`): explained variance of `ln y`.
        scatter (`float`): t, of `ln y` round the law beyond noise.
        points (`int`): how many optima it goes through.
    """

    law: PowerLaw
    r_squared: float
    scatter: float
    points: int


def fit_power_law(values: Array, draws: Array, at: Mapping[str, Array], seed: int = 0) -> SettingsFit:
    """The power law through optima.

    Args:
        values (`np.ndarray`, (points,)): ln y of each optimum. draws (`np.ndarray`, (draws, points)): of each.
        at (`dict[str, np.ndarray]`): each quantity of the law, (points,), positive; empty for a constant.
        seed (`int`, defaults to 0): of the scatter.

    Returns:
        `SettingsFit`.

    Raises:
        WarmstartError: the optima do not determine the law: too few, or their quantities vary together.
    """
    logs = [np.log(x) for x in at.values()]
    centres = [float(x.mean()) for x in logs]
    design = np.column_stack([np.ones(len(values)), *(x - c for x, c in zip(logs, centres, strict=True))])
    if not determined(design):
        raise WarmstartError(
            f"{len(values)} optima do not tell the exponents of {sorted(at)}: too few, or these vary together. Add budgets."
        )
    variance = draws.var(axis=0).clip(1e-12) if len(draws) else np.full(len(values), 1e-12)
    scatter = _scatter(design, values, variance)
    weights = 1 / (variance + scatter**2)
    solve = np.linalg.solve(design.T @ (weights[:, None] * design), design.T * weights)
    fitted = solve @ values
    theta = fitted.copy()
    noisy = draws + scatter * np.random.default_rng(seed).standard_normal(draws.shape)
    drawn = noisy @ solve.T
    for row in (theta[None], drawn):
        row[:, 0] -= row[:, 1:] @ np.array(centres)
    total = float((weights * (values - np.average(values, weights=weights)) ** 2).sum())
    left = float((weights * (values - design @ fitted) ** 2).sum())
    law = PowerLaw(
        float(np.exp(theta[0])),
        {name: float(power) for name, power in zip(at, theta[1:], strict=True)},
        drawn if len(drawn) else None,
    )
    return SettingsFit(law, 1 - left / total if total > 0 else 1.0, scatter, len(values))


def determined(design: Array) -> bool:
    """Whether points tell every coefficient: as many as there are, and quantities that do not vary together.

    Columns after the first are centred logarithms. A path with a tenth of a factor e round it tells nothing of two exponents.
    """
    if len(design) < design.shape[1]:
        return False
    singular = np.linalg.svd(design[:, 1:], compute_uv=False) / np.sqrt(len(design))
    return bool(design.shape[1] == 1 or singular.min() > 0.1)


def _scatter(design: Array, values: Array, variance: Array) -> float:
    """t by the method of moments: what the weighted squares exceed their expectation by; 0 where they do not."""
    spare = len(values) - design.shape[1]
    if spare < 1:
        return 0.0
    weights = 1 / variance
    normal = design.T @ (weights[:, None] * design)
    solve = np.linalg.solve(normal, design.T * weights)
    squares = float((weights * (values - design @ (solve @ values)) ** 2).sum())
    scale = weights.sum() - np.trace(np.linalg.solve(normal, design.T @ ((weights**2)[:, None] * design)))
    return float(np.sqrt(max(0.0, (squares - spare) / scale)))
