"""Optima of all budgets in one fit, where the runs of each are too noisy to tell its own.

At sizes that can be swept cheaply the losses of single runs scatter by as much as a factor of two in the rate costs, and a
dozen runs do not tell the six numbers of a quadratic of their own: laws through such optima have any exponent. What budgets
share is the shape of the bowl and the law of its place. So they are fitted together, to all runs near the best of their budget,

    L = e_b + (u - u(N_b, D_b)) . H . (u - u(N_b, D_b)) / 2      u = (ln learning rate, ln batch)
    u(N, D) = (a + p ln N + q ln D, c + r ln D),  or over ln C alone where budgets do not tell N and D apart

with a robust loss (soft L1; its scale is the noise itself, from the median residual), and with published exponents as a weak
prior: it gives way to a few clear budgets. Draws are of the normal approximation at the fit.

| exponent | prior | published |
|---|---|---|
| rate over N | -0.4 +- 0.3 | -0.713 (arXiv 2503.04715), -0.333 (arXiv 2406.19146) |
| rate over D | 0.15 +- 0.25 | 0.307 (arXiv 2503.04715), 0 (arXiv 2406.19146) |
| batch over D | 0.5 +- 0.2 | 0.571 (arXiv 2503.04715), 0.38 to 0.47 (arXiv 2505.13738, 2410.21676) |
| rate over C | -0.15 +- 0.15 | -0.125 (arXiv 2401.02954) |
| batch over C | 0.33 +- 0.15 | 0.327 (arXiv 2401.02954) |

The method is ours. What it is worth: `docs/hyper-parameters.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from .robust_fit import Array
from .settings_law import determined

WINDOW = 0.1  # of the best loss of a budget: runs within it are fitted
FEWEST = 6  # of a budget, that are fitted in any case
ROUNDS = 4  # of the noise, and the fit with it
PRIORS = {
    "params_tokens": ((-0.4, 0.3), (0.15, 0.25), (0.5, 0.2)),
    "compute": ((-0.15, 0.15), (0.33, 0.15)),
}
TO_DEVIATION = 1.4826  # from the median of absolute residuals


@dataclass(frozen=True)
class Runs:
    """The runs of one budget.

    Args:
        params, tokens, compute: the budget. u (`np.ndarray`, (runs, 2)): ln learning rate and ln batch.
        losses (`np.ndarray`, (runs,)): nats per token.
    """

    params: float
    tokens: float
    compute: float
    u: Array
    losses: Array

    @property
    def near(self) -> Array:
        """Which runs are fitted."""
        count = min(len(self.losses), FEWEST)
        return self.losses <= max(self.losses.min() * (1 + WINDOW), np.sort(self.losses)[count - 1])


@dataclass(frozen=True)
class JointFit:
    """What one fit to all budgets says.

    Args:
        optima (`np.ndarray`, (budgets, 3)): ln rate, ln batch and loss of each. draws (`np.ndarray`, (budgets, draws, 3)).
        curvature (`np.ndarray`, (2, 2)): H, in nats. noise (`float`): of single losses, in nats. form (`str`): of the law.
    """

    optima: Array
    draws: Array
    curvature: Array
    noise: float
    form: str


def fit_jointly(budgets: Sequence[Runs], draws: int, seed: int = 0) -> JointFit:
    """Fit all budgets together; each of them needs both settings varied."""
    logs = {name: np.log([getattr(b, name) for b in budgets]) for name in ("params", "tokens", "compute")}
    logs = {name: values - values.mean() for name, values in logs.items()}
    ones = np.ones(len(budgets))
    form = "params_tokens" if determined(np.column_stack([ones, logs["params"], logs["tokens"]])) else "compute"
    if form == "params_tokens":
        of_rate, of_batch = (
            np.column_stack([ones, logs["params"], logs["tokens"]]),
            np.column_stack([ones, logs["tokens"]]),
        )
    else:
        of_rate = of_batch = np.column_stack([ones, logs["compute"]])
    prior = np.array(PRIORS[form])
    near = [b.near for b in budgets]
    which = np.concatenate([np.full(int(n.sum()), k) for k, n in enumerate(near)])
    u = np.concatenate([b.u[n] for b, n in zip(budgets, near, strict=True)])
    losses = np.concatenate([b.losses[n] for b, n in zip(budgets, near, strict=True)])
    rates, batches = of_rate.shape[1], of_batch.shape[1]
    shape = slice(rates + batches, rates + batches + 3)

    def parts(theta: Array) -> tuple[Array, Array, Array]:
        """Places (budgets, 2), the root of H (2, 2), and the floors (budgets,)."""
        places = np.column_stack([of_rate @ theta[:rates], of_batch @ theta[rates : rates + batches]])
        first, across, second = theta[shape]
        return places, np.array([[first, across], [0.0, second]]), theta[shape.stop :]

    def bowl(theta: Array) -> Array:
        places, root, floors = parts(theta)
        away = (u - places[which]) @ root.T
        return floors[which] + 0.5 * (away**2).sum(1)

    def residuals(theta: Array, noise: float) -> Array:
        exponents = np.concatenate([theta[1:rates], theta[rates + 1 : rates + batches]])
        return np.concatenate([(bowl(theta) - losses) / noise, (exponents - prior[:, 0]) / prior[:, 1]])

    best = np.array([b.u[int(np.argmin(b.losses))] for b in budgets])
    theta = np.concatenate([
        [np.median(best[:, 0])], prior[: rates - 1, 0], [np.median(best[:, 1])], prior[rates - 1 :, 0],
        [0.5, -0.1, 0.4], [b.losses.min() for b in budgets],
    ])  # fmt: skip
    noise = 0.01 * float(np.median(losses))
    for _ in range(ROUNDS):
        found = least_squares(residuals, theta, loss="soft_l1", args=(noise,))
        theta = found.x
        spare = len(losses) / max(1, len(losses) - len(theta))
        noise = max(TO_DEVIATION * float(np.median(np.abs(bowl(theta) - losses))) * spare**0.5, 1e-6)
    found = least_squares(residuals, theta, loss="soft_l1", args=(noise,))
    # The Jacobian is that of the robust cost, so that its square is the cost's Hessian.
    _, singular, directions = np.linalg.svd(found.jac, full_matrices=False)
    told = singular > 1e-9 * singular.max()
    spread = directions[told].T / singular[told]
    drawn = found.x + np.random.default_rng(seed).standard_normal((draws, int(told.sum()))) @ spread.T
    places, root, floors = parts(found.x)
    samples = [parts(one) for one in drawn]
    table = (
        np.stack([np.column_stack([p, f]) for p, _, f in samples], axis=1)
        if samples
        else np.zeros((len(budgets), 0, 3))
    )
    return JointFit(np.column_stack([places, floors]), table, root.T @ root, noise, form)
