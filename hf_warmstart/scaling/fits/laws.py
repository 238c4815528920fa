"""The two kinds of scaling law: the loss that a budget buys, and the settings that are best at it.

`LossLaw` is `L = E + sum of A_i x_i^-a_i`, over compute C, over parameters N and tokens D, or over tokens alone:

    L(C)    = E + A C^-gamma                    arXiv 2001.08361 (E = 0), 2404.06395 section 4
    L(N, D) = E + A N^-alpha + B D^-beta        arXiv 2203.15556, section 3.3
    L(D)    = E + B D^-beta                     its limit where tokens are few: a larger model is then no better

`PowerLaw` is `y = c * product of x_i^p_i`: a learning rate or a batch size over the same quantities. Both keep the draws of
their bootstrap, each a whole set of parameters: amplitude and exponent of a law are so correlated that intervals of the one
and of the other, taken apart, say nothing about what it predicts.

Losses are in nats per token, compute in FLOPs, batch sizes in tokens; natural logarithms throughout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ...errors import WarmstartError
from .robust_fit import Array, PowerSum, RobustFit, fit, refit

# What a law is over. The order is the one in which amplitudes and exponents stand.
FORMS = {"compute": ("compute",), "params_tokens": ("params", "tokens")}
LOSS_FORMS = {**FORMS, "tokens": ("tokens",)}
LEVEL = 0.95
STEEPEST = 5.0  # exponent of a law of loss; published ones lie below 1
# Starts of exponents and of the floor, as a share of the lowest loss; amplitudes follow from them and the data.
EXPONENT_STARTS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0)
FLOOR_STARTS = (0.05, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99)


def interval(draws: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """The central share `level` of draws: percentiles `50 (1 - level)` and `50 (1 + level)`. Infinite draws count as such."""
    values = np.sort(np.asarray(draws, dtype=float))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def form_of(variables: Sequence[str]) -> str:
    """The name of a law of loss by what it is over.

    Raises:
        WarmstartError: no law is over these.
    """
    for name, own in LOSS_FORMS.items():
        if own == tuple(variables):
            return name
    raise WarmstartError(
        f"No law is over {sorted(variables)}. Pass {' or '.join(' and '.join(own) for own in LOSS_FORMS.values())}."
    )


@dataclass(frozen=True)
class PowerLaw:
    """`y = coefficient * product of x^exponent`.

    Args:
        coefficient (`float`): y where every x is 1.
        exponents (`dict[str, float]`): of each quantity: `{"compute": -0.125}` or `{"params": -0.713, "tokens": 0.307}`.
        draws (`np.ndarray`, (draws, 1 + quantities), *optional*): of `ln coefficient` and the exponents, in their order.

    Example:

        >>> learning_rate = PowerLaw(0.3118, {"compute": -0.1250})  # DeepSeek LLM
        >>> round(learning_rate(compute=1e20), 6)
        0.000986
    """

    coefficient: float
    exponents: Mapping[str, float]
    draws: Array | None = field(default=None, repr=False, compare=False)

    def __call__(self, **at: ArrayLike) -> Any:
        """The law's value at one point, or at many of one shape."""
        given = quantities(self.exponents, at)
        value = self.coefficient * math.prod(given[name] ** power for name, power in self.exponents.items())
        return float(value) if np.ndim(value) == 0 else value

    def at_draws(self, **at: ArrayLike) -> Array:
        """The value of every draw, (draws,), at one point or at one point per draw; the law's own where it has none."""
        given = quantities(self.exponents, at)
        if self.draws is None:
            return np.atleast_1d(np.asarray(self(**at), dtype=float))
        logs = self.draws[:, 0].copy()
        for column, name in enumerate(self.exponents, start=1):
            logs += self.draws[:, column] * np.log(given[name])
        with np.errstate(over="ignore"):
            return np.exp(logs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the draws."""
        return {"coefficient": float(self.coefficient), "exponents": {k: float(v) for k, v in self.exponents.items()}}


@dataclass(frozen=True)
class LossLaw:
    """`L = E + sum over quantities of A x^-a`.

    Args:
        floor (`float`): E, the loss that no budget gets below, in nats per token; 0 or more.
        amplitudes (`dict[str, float]`): A of each quantity: `{"compute": A}`, `{"params": A, "tokens": B}` or `{"tokens": B}`;
            positive.
        exponents (`dict[str, float]`): the positive exponent of each: gamma, or alpha and beta.
        draws (`np.ndarray`, (draws, 1 + 2 quantities), *optional*): of `ln E, ln A, a, ...`, in the quantities' order.

    Raises:
        WarmstartError: quantities that no law is over, or numbers that cannot be.

    Example:

        >>> law = LossLaw(1.8172, {"params": 477.8, "tokens": 2143.9}, {"params": 0.3473, "tokens": 0.3672})
        >>> round(law(params=1e9, tokens=2e10), 3)  # Besiroglu et al. 2024
        2.529
        >>> round(law.compute_optimal()(compute=1e20), 2)
        2.55
    """

    floor: float
    amplitudes: Mapping[str, float]
    exponents: Mapping[str, float]
    draws: Array | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        form_of(tuple(self.amplitudes))
        if tuple(self.exponents) != tuple(self.amplitudes):
            raise WarmstartError(
                f"Amplitudes are of {list(self.amplitudes)}, exponents of {list(self.exponents)}. Pass both for the same."
            )
        wrong = [] if math.isfinite(self.floor) and self.floor >= 0 else [f"floor={self.floor!r} (0 or more)"]
        for kind, values in (("amplitudes", self.amplitudes), ("exponents", self.exponents)):
            wrong += [f"{kind}[{n!r}]={v!r} (positive)" for n, v in values.items() if not 0 < v < math.inf]
        if wrong:
            raise WarmstartError(f"No law of loss has {', '.join(wrong)}.")

    # -- what it is over ------------------------------------------------------------------------------------------

    @property
    def form(self) -> str:
        """`"compute"`, `"params_tokens"` or `"tokens"`."""
        return form_of(tuple(self.amplitudes))

    @property
    def variables(self) -> tuple[str, ...]:
        """The quantities that the law is over."""
        return LOSS_FORMS[self.form]

    # -- values ---------------------------------------------------------------------------------------------------

    def __call__(self, **at: ArrayLike) -> Any:
        """The loss, in nats per token, at `compute=` (FLOPs), or at `params=` and `tokens=`; numbers or arrays of one shape.

        What the law is not over may be passed too.
        """
        given = quantities(self.amplitudes, at)
        loss = self.floor + sum(a * given[n] ** -self.exponents[n] for n, a in self.amplitudes.items())
        return float(loss) if np.ndim(loss) == 0 else loss

    def gradient(self, **at: ArrayLike) -> dict[str, Any]:
        """`dL / dx = -a A x^(-a - 1)` by each quantity, in nats per token and unit of it."""
        given = quantities(self.amplitudes, at)
        return {n: -self.exponents[n] * a * given[n] ** (-self.exponents[n] - 1) for n, a in self.amplitudes.items()}

    def inverse(self, loss: float, **fixed: float) -> float:
        """The quantity at which the law has a loss: `x = (A / (L - E - the other terms))^(1 / a)`.

        Args:
            loss (`float`): L, in nats per token.
            **fixed (`float`): all quantities but the one asked for: nothing for a law of compute; `params` to get tokens, or
                `tokens` to get params.

        Returns:
            `float`: FLOPs, tokens or parameters.

        Raises:
            WarmstartError: the loss is at or below what the law ever reaches with the fixed quantities.
        """
        asked, floor = self._asked(fixed)
        if not math.isfinite(loss) or loss <= floor:
            held = "".join(f" with {name}={value:g}" for name, value in fixed.items())
            raise WarmstartError(
                f"A loss of {loss:.6g} is at or below {floor:.6g}, which the law never reaches{held}: no {asked} belongs to "
                "it. The loss may be from other text or another tokenizer than the law's, or the law's floor is not known well "
                "enough; fit it with larger budgets."
            )
        return float((self.amplitudes[asked] / (loss - floor)) ** (1 / self.exponents[asked]))

    def inverse_draws(self, loss: float, **fixed: float) -> Array:
        """`inverse` by every draw, (draws,): infinite for draws that never reach the loss; the law's own without draws."""
        asked, _ = self._asked(fixed)
        if self.draws is None:
            return np.array([self.inverse(loss, **fixed)])
        rest = loss - np.exp(self.draws[:, 0])
        for column, name in zip(range(1, self.draws.shape[1], 2), self.variables, strict=True):
            if name != asked:
                rest = rest - np.exp(self.draws[:, column] - self.draws[:, column + 1] * math.log(fixed[name]))
        column = 1 + 2 * self.variables.index(asked)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            logs = (self.draws[:, column] - np.log(rest)) / self.draws[:, column + 1]
            return np.where(rest > 0, np.exp(logs), math.inf)

    def at_draws(self, **at: ArrayLike) -> Array:
        """The loss by every draw, (draws,), at one point or at one point per draw; the law's own value without draws."""
        given = quantities(self.amplitudes, at)
        if self.draws is None:
            return np.atleast_1d(np.asarray(self(**at), dtype=float))
        total = np.exp(self.draws[:, 0])
        for column, name in zip(range(1, self.draws.shape[1], 2), self.variables, strict=True):
            total = total + np.exp(self.draws[:, column] - self.draws[:, column + 1] * np.log(given[name]))
        return total

    def compute_optimal(self) -> LossLaw:
        """The loss of compute spent in the best shares of parameters and tokens, `C = 6 N D`.

            L(C) = E + (A G^-alpha + B G^beta) (C / 6)^-gamma
            gamma = alpha beta / (alpha + beta),   G = (alpha A / (beta B))^(1 / (alpha + beta))

        A law of compute is returned as it is. Source: arXiv 2203.15556, equation 4.

        Raises:
            WarmstartError: of a law of tokens alone, by which the smallest model is best.
        """
        if self.form == "compute":
            return self
        self._tells_shares()
        (a, b), (alpha, beta) = self.amplitudes.values(), self.exponents.values()
        made = _frontier(np.array([math.log(a), alpha, math.log(b), beta])[None])
        draws = None if self.draws is None else np.column_stack([self.draws[:, :1], _frontier(self.draws[:, 1:])])
        return LossLaw(self.floor, {"compute": math.exp(made[0, 0])}, {"compute": float(made[0, 1])}, draws)

    def compute_optimal_params(self, compute: float) -> float:
        """The parameters that get the least loss out of compute: `N = G (C / 6)^(beta / (alpha + beta))`."""
        self._tells_shares()
        (a, b), (alpha, beta) = self.amplitudes.values(), self.exponents.values()
        g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
        return float(g * (compute / 6) ** (beta / (alpha + beta)))

    def _tells_shares(self) -> None:
        if self.form != "params_tokens":
            raise WarmstartError(
                f"A law of {self.form} alone does not say how to share compute. Fit form='params_tokens'."
            )

    def _asked(self, fixed: Mapping[str, float]) -> tuple[str, float]:
        """The quantity that is not fixed, and what the law tends to as it grows."""
        asked = [name for name in self.variables if name not in fixed]
        unknown = sorted(set(fixed) - set(self.variables))
        if len(asked) != 1 or unknown:
            raise WarmstartError(
                f"The inverse of a law over {list(self.variables)} needs all of them but one, got {sorted(fixed)}."
            )
        terms = (self.amplitudes[n] * fixed[n] ** -self.exponents[n] for n in self.variables if n != asked[0])
        return asked[0], self.floor + sum(terms)

    # -- fitting --------------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        loss: ArrayLike,
        *,
        loss_draws: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        draws: int = 1000,
        seed: int = 0,
        **at: ArrayLike,
    ) -> LossLaw:
        """Fit the law to losses of runs that were each decayed at their own end.

        Args:
            loss (`np.ndarray`, (points,)): in nats per token, positive.
            loss_draws (`np.ndarray`, (draws, points), *optional*): the same losses in a bootstrap of whatever they were
                taken from, at the same points; the law is fitted to each. Without them points are drawn with replacement.
            weights (`np.ndarray`, (points,), *optional*): of each point.
            draws (`int`, defaults to 1000): how many bootstraps to make where `loss_draws` is not given; 0 for none.
            seed (`int`, defaults to 0): of the points that are drawn.
            **at (`np.ndarray`, (points,)): `compute=` in FLOPs; or `params=` and `tokens=`; or `tokens=` alone.

        Returns:
            `LossLaw`, with draws.

        Raises:
            WarmstartError: fewer points than parameters, numbers that are not positive and finite, or losses that do not
                fall as the quantities grow.

        Source: Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3): Huber loss of 1e-3 on log residuals, a grid of starts.

        Example:

            >>> import numpy as np
            >>> compute = np.geomspace(1e17, 1e20, 6)
            >>> law = LossLaw.fit(1.5 + 2 * (compute / 1e17) ** -0.15, compute=compute, draws=20)
            >>> round(law.floor, 3), round(law.exponents["compute"], 4)
            (1.5, 0.15)
        """
        variables = LOSS_FORMS[form_of([n for own in FORMS.values() for n in own if n in at])]
        points = {name: np.asarray(at[name], dtype=float) for name in variables}
        y = np.asarray(loss, dtype=float)
        bad = sorted(n for n, x in points.items() if x.shape != y.shape or not ((x > 0) & np.isfinite(x)).all())
        if bad:
            raise WarmstartError(f"{bad} must be positive and finite, one for each of {len(y)} losses.")
        same = sorted(n for n, x in points.items() if np.ptp(np.log(x)) < 1e-6)
        if same:
            raise WarmstartError(
                f"{same} do not vary over the points, so that no exponent can be told. Add other sizes."
            )
        centre = {name: float(np.exp(np.log(x).mean())) for name, x in points.items()}
        model = cls._model({name: x / centre[name] for name, x in points.items()})
        found = fit(model, y, _starts(points, centre, y), weights=weights)
        cls._check_fit(found, variables)
        theta = found.theta[None]
        if loss_draws is not None:
            table = np.asarray(loss_draws, dtype=float)
            theta = np.concatenate([theta, refit(model, table, found.theta, weights=weights)])
        elif draws:
            counts = np.random.default_rng(seed).multinomial(len(y), np.full(len(y), 1 / len(y)), size=draws)
            each = counts if weights is None else counts * np.asarray(weights, dtype=float)
            # A draw of fewer distinct points than parameters has no optimum of its own.
            each = each[(counts > 0).sum(1) >= model.parameters]
            theta = np.concatenate([theta, refit(model, y, found.theta, weights=each)])
        theta = theta.copy()
        for column, name in zip(range(1, theta.shape[1], 2), variables, strict=True):
            theta[:, column] += theta[:, column + 1] * math.log(centre[name])
        kept = theta[1:][(theta[1:, 2::2] > 0).all(1)]
        amplitudes = {n: math.exp(theta[0, 1 + 2 * k]) for k, n in enumerate(variables)}
        exponents = {n: float(theta[0, 2 + 2 * k]) for k, n in enumerate(variables)}
        return cls(math.exp(theta[0, 0]), amplitudes, exponents, kept if len(kept) else None)

    @staticmethod
    def _model(points: Mapping[str, Array]) -> PowerSum:
        """The law as a sum of powers of its parameters `ln E, ln A, a, ...`."""
        width = 1 + 2 * len(points)
        terms: list[list[ArrayLike | None]] = [[1.0, *[None] * (width - 1)]]
        for k, x in enumerate(points.values()):
            terms.append([*[None] * (1 + 2 * k), 1.0, -np.log(x), *[None] * (width - 3 - 2 * k)])
        return PowerSum.of(terms)

    @staticmethod
    def _check_fit(found: RobustFit, variables: Sequence[str]) -> None:
        rising = [n for k, n in enumerate(variables) if found.theta[2 + 2 * k] <= 0]
        if rising:
            raise WarmstartError(
                f"The losses do not fall as {' and '.join(rising)} grow, so that no law of loss fits. Check the "
                "columns' units, and leave out runs that diverged or were not decayed at their end."
            )
        steep = {n: float(found.theta[2 + 2 * k]) for k, n in enumerate(variables)}
        if named := [f"{n}^-{power:.3g}" for n, power in steep.items() if not power < STEEPEST]:
            raise WarmstartError(
                f"The losses would fall as {' and '.join(named)}, which no law of loss does: between these points they hardly "
                "fall, or fall at once. Add budgets that lie further apart."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the draws."""
        return {
            "floor": float(self.floor),
            "amplitudes": {n: float(v) for n, v in self.amplitudes.items()},
            "exponents": {n: float(v) for n, v in self.exponents.items()},
        }

    def __str__(self) -> str:
        letters = {"compute": "C", "params": "N", "tokens": "D"}
        terms = (f"{a:.4g} {letters[n]}^-{self.exponents[n]:.4g}" for n, a in self.amplitudes.items())
        return " + ".join([f"L = {self.floor:.4g}", *terms])


def quantities(names: Mapping[str, Any], at: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """The quantities that a law is over, out of those that were passed; others may be there too.

    Raises:
        WarmstartError: one is missing, or not positive.
    """
    if missing := sorted(set(names) - set(at)):
        raise WarmstartError(f"The law is over {sorted(names)}; {missing} were not given.")
    given = {name: np.asarray(at[name], dtype=float) for name in names}
    if bad := sorted(f"{n}={v}" for n, v in given.items() if not (v > 0).all()):
        raise WarmstartError(f"Laws of powers take positive numbers, got {', '.join(bad)}.")
    return {name: value[()] for name, value in given.items()}


def _frontier(terms: Array) -> Array:
    """`ln K` and gamma of the compute-optimal law, (rows, 2), from `ln A, alpha, ln B, beta`, (rows, 4)."""
    ln_a, alpha, ln_b, beta = terms.T
    ln_g = (np.log(alpha / beta) + ln_a - ln_b) / (alpha + beta)
    gamma = alpha * beta / (alpha + beta)
    ln_k = np.logaddexp(ln_a - alpha * ln_g, ln_b + beta * ln_g) + gamma * math.log(6)
    return np.column_stack([ln_k, gamma])


def _starts(points: Mapping[str, Array], centre: Mapping[str, float], loss: Array) -> Array:
    """A grid over floors and exponents; each amplitude takes an equal part of the loss above the floor at the centre."""
    middle = float(np.median(loss))
    found = []
    grid = EXPONENT_STARTS if len(points) == 1 else EXPONENT_STARTS[1::2]
    for share, *exponents in itertools.product(FLOOR_STARTS, *[grid] * len(points)):
        floor = share * float(loss.min())
        amplitude = math.log(max(middle - floor, 1e-3 * middle) / len(points))
        found.append([math.log(floor), *itertools.chain.from_iterable((amplitude, a) for a in exponents)])
    return np.array(found)
