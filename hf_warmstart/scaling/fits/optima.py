"""The best learning rate and batch size of each budget, from a handful of runs round it.

A *budget* is one pair of parameters and tokens that several runs share. In `u = (ln learning rate, ln batch)` its optimum is
found in one of four ways:

| method | optimum | source |
|---|---|---|
| `quadratic` | minimum of `c + g.u + u.H.u / 2`, fitted near the best runs | convex on all 17 budgets of Step Law's grid |
| `near_optimal` | mean of `u` over the runs within 0.25 % of the best loss | DeepSeek LLM, arXiv 2401.02954, section 3.1 |
| `interpolation` | minimum of Akima splines, over rates for each batch, then over batches | Porian et al., arXiv 2406.19146 |
| `joint` | on one law, in one fit to all budgets | ours: see `joint` |

`auto` is the quadratic where it is convex and has a run to spare, else the near-optimal set; and `joint` where noise leaves the
rates of most budgets unknown by more than a factor.

Draws are of the noise between seeds: its size is measured by what the quadratics leave over, pooled over the budgets, and new
losses are drawn round the fitted surface. Drawing runs with replacement instead would leave a quadratic of six numbers with
seven or eight distinct runs of twelve. What the method itself gets wrong appears as scatter of the budgets round the law, and
is counted there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import Akima1DInterpolator

from ...errors import WarmstartError
from .joint import JointFit, Runs, fit_jointly
from .robust_fit import Array

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("auto", "quadratic", "near_optimal", "interpolation", "joint")
UNSURE = 0.25  # standard deviation of ln learning rate, from which `auto` fits all budgets together
NEAR_OPTIMAL = 0.0025  # of the best loss: DeepSeek LLM, arXiv 2401.02954, section 3.1
WINDOW = 0.02  # of the best loss: runs within it shape the quadratic
FEWEST_IN_WINDOW = 10
SEED_NOISE = (
    0.005  # nats, where no run is left over to measure it: Porian et al., arXiv 2406.19146, for losses up to 3
)
SAME_PARAMS, SAME_TOKENS, SAME_SETTING = (
    0.01,
    0.05,
    0.02,
)  # of logarithms: how far runs of one budget, or level, may differ
FINE = 100  # points of a spline: as Porian et al.
FEWEST_RUNS = 3
FEWEST_TOGETHER = 3  # budgets of a joint fit
AXES = ("learning_rate", "batch_tokens")
KNOWN_TO_BE_BAD = r"diverged|incomplete: its state is (?:diverged|stopped)"


@dataclass(frozen=True)
class Optimum:
    """The best settings of one budget.

    Args:
        params, tokens, compute (`float`): the budget; compute in FLOPs.
        learning_rate, batch_tokens (`float`): the optimum, batch in tokens.
        loss (`float`): the loss there, in nats per token.
        best_run (`float`): the lowest loss of a run. runs (`int`): how many there are.
        method (`str`): how it was found.
        edges (`tuple[str, ...]`): where it lies at the end of what was tried, such as `"learning_rate high"`.
        fixed (`tuple[str, ...]`): which of the two was not varied.
        curvature (`np.ndarray`, (2, 2), *optional*): H, in nats, of a convex quadratic.
        draws (`np.ndarray`, (draws, 3)): of ln learning rate, ln batch and loss.
        settings (`np.ndarray`, (runs, 2)): ln learning rate and ln batch of the runs. losses (`np.ndarray`, (runs,)).
    """

    params: float
    tokens: float
    compute: float
    learning_rate: float
    batch_tokens: float
    loss: float
    best_run: float
    runs: int
    method: str
    edges: tuple[str, ...]
    fixed: tuple[str, ...]
    curvature: Array | None = field(repr=False)
    draws: Array = field(repr=False)
    settings: Array = field(repr=False)
    losses: Array = field(repr=False)

    def loss_at(self, learning_rate: float, batch_tokens: float) -> float:
        """The loss at other settings: by the quadratic, else of the nearest run, in nats per token."""
        point = np.log([learning_rate, batch_tokens])
        if self.curvature is not None:
            away = point - np.log([self.learning_rate, self.batch_tokens])
            return float(self.loss + 0.5 * away @ self.curvature @ away)
        spread = np.ptp(self.settings, axis=0)
        distances = (((self.settings - point) / np.where(spread > 0, spread, 1.0)) ** 2).sum(1)
        return float(self.losses[int(np.argmin(distances))])

    @property
    def ridge(self) -> float | None:
        """`d ln learning rate / d ln batch` along which the loss rises least, `-H_12 / H_11`; None where it is not known."""
        if self.curvature is None or self.fixed:
            return None
        return float(-self.curvature[0, 1] / self.curvature[0, 0])


def find_optima(
    runs: pd.DataFrame,
    *,
    set_aside: pd.DataFrame | None = None,
    method: str = "auto",
    draws: int = 1000,
    seed: int = 0,
) -> tuple[list[Optimum], float]:
    """The optimum of every budget of a table of runs.

    Args:
        runs (`DataFrame`): `RunTable.frame`.
        set_aside (`DataFrame`, *optional*): `RunTable.set_aside`; runs that diverged there bound a grid's edge.
        method (`str`, defaults to `"auto"`): one of `METHODS`.
        draws (`int`, defaults to 1000): of the noise between seeds. seed (`int`, defaults to 0): of them.

    Returns:
        The optima, by compute; and the noise between seeds, in nats.

    Raises:
        WarmstartError: an unknown method, or no budget with at least three runs.
    """
    if method not in METHODS:
        raise WarmstartError(f"method={method!r} is none of {list(METHODS)}.")
    cells = [_Cell(part, set_aside) for part in _budgets(runs)]
    usable = [cell for cell in cells if len(cell.losses) >= FEWEST_RUNS]
    if not usable:
        raise WarmstartError(
            f"None of {len(cells)} budgets (pairs of params and tokens) has {FEWEST_RUNS} runs, so that no optimum can be "
            "told. Run 12 to 30 settings of learning rate and batch at each budget."
        )
    spare = sum(cell.surface.spare for cell in usable if cell.surface)
    noise = (
        float(np.sqrt(sum(cell.surface.squares for cell in usable if cell.surface) / spare)) if spare else SEED_NOISE
    )
    generator = np.random.default_rng(seed)
    each = "auto" if method == "joint" else method
    found = [cell.optimum(each, noise, draws, generator) for cell in usable]
    together = [cell for cell in usable if not cell.fixed]
    can_be_joint = len(together) == len(usable) >= FEWEST_TOGETHER  # none is left out
    if method == "joint" and not can_be_joint:
        raise WarmstartError(
            f"method='joint' needs {FEWEST_TOGETHER} budgets or more, and both learning rates and batches varied in each; got "
            f"{len(together)} such of {len(usable)}."
        )
    is_unsure = draws > 0 and np.median([o.draws[:, 0].std() for o in found]) > UNSURE
    if method == "joint" or (method == "auto" and can_be_joint and is_unsure):
        joint = fit_jointly([cell.runs for cell in together], draws, seed)
        found = [
            cell.on_law(u, drawn, joint) for cell, u, drawn in zip(together, joint.optima, joint.draws, strict=True)
        ]
        noise = joint.noise
    return sorted(found, key=lambda optimum: (optimum.compute, optimum.params)), noise


def _budgets(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """The runs of each budget: neighbours in parameters, then in tokens."""
    found = []
    for same in _split(runs, "params", SAME_PARAMS):
        found += _split(same, "tokens", SAME_TOKENS)
    return found


def _split(runs: pd.DataFrame, column: str, same: float) -> list[pd.DataFrame]:
    ordered = runs.sort_values(column, kind="stable")
    cuts = np.flatnonzero(np.diff(np.log(ordered[column].to_numpy())) > same) + 1
    return [ordered.iloc[part] for part in np.split(np.arange(len(ordered)), cuts)]


def _levels(values: Array) -> Array:
    """The distinct values, of logarithms."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], np.diff(ordered) > SAME_SETTING])]


class _Surface:
    """A quadratic in the settings that vary, by least squares; linear in the losses, so that draws are one product."""

    def __init__(self, u: Array, losses: Array, axes: Sequence[int]):
        self.axes = list(axes)
        self.centre = u.mean(0)
        self.scale = np.where(np.ptp(u, axis=0) > 0, np.ptp(u, axis=0), 1.0)
        self.design = self._features(u)
        self.rank = int(np.linalg.matrix_rank(self.design))
        self.size = self.design.shape[1]
        near = self._near(losses, losses)
        for _ in range(2):  # chosen anew by the fitted losses: less by chance
            self.inverse = np.linalg.pinv(self.design[near])
            self.fitted = self.design @ (self.inverse @ losses[near])
            if not (again := self._near(self.fitted, losses)).any() or (again == near).all():
                break
            near = again
        self.near = near
        self.inverse = np.linalg.pinv(self.design[near])
        self.coefficients = self.inverse @ losses[near]
        self.fitted = self.design @ self.coefficients
        self.spare = int(near.sum() - np.linalg.matrix_rank(self.design[near]))
        self.squares = float(((losses - self.fitted)[near] ** 2).sum())
        self.determined = bool(np.linalg.matrix_rank(self.design[near]) == self.size)

    def _features(self, u: Array) -> Array:
        v = ((u - self.centre) / self.scale)[:, self.axes]
        pairs = [(i, j) for i in range(len(self.axes)) for j in range(i, len(self.axes))]
        return np.column_stack([np.ones(len(v)), v, *[v[:, i] * v[:, j] for i, j in pairs]])

    def _near(self, by: Array, losses: Array) -> NDArray[np.bool_]:
        """The runs that shape the surface: within the window of the best, and no fewer than it needs."""
        best = max(float(by.min()), 0.9 * float(losses.min()))
        count = min(len(by), max(FEWEST_IN_WINDOW, self.size + 2))
        return by <= max(best * (1 + WINDOW), float(np.sort(by)[count - 1]))

    def minimum(self, coefficients: Array) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
        """For coefficients (draws, size): stationary points (draws, 2), losses there, curvatures (draws, 2, 2), convexity."""
        k = len(self.axes)
        gradient = coefficients[:, 1 : 1 + k]
        curvature = np.zeros((len(coefficients), k, k))
        column = 1 + k
        for i in range(k):
            for j in range(i, k):
                curvature[:, i, j] += coefficients[:, column]
                curvature[:, j, i] += coefficients[:, column]
                column += 1
        values = np.linalg.eigvalsh(curvature)
        convex = np.asarray(values[:, 0] > 1e-6 * np.abs(values[:, -1]).clip(1e-12), dtype=bool)
        point = np.zeros_like(gradient)
        point[convex] = np.linalg.solve(curvature[convex], -gradient[convex, :, None])[..., 0]
        loss = coefficients[:, 0] + 0.5 * (gradient * point).sum(1)
        u = np.broadcast_to(self.centre, (len(coefficients), 2)).copy()
        u[:, self.axes] += point * self.scale[self.axes]
        full = np.zeros((len(coefficients), 2, 2))
        unit = np.outer(self.scale[self.axes], self.scale[self.axes])
        full[np.ix_(range(len(full)), self.axes, self.axes)] = curvature / unit
        return u, loss, full, convex


class _Cell:
    """The runs of one budget."""

    def __init__(self, runs: pd.DataFrame, set_aside: pd.DataFrame | None):
        self.params, self.tokens, self.compute = (
            float(np.exp(np.log(runs[name].to_numpy()).mean())) for name in ("params", "tokens", "compute")
        )
        self.u = np.log(runs[list(AXES)].to_numpy(dtype=float))
        self.losses = runs["loss"].to_numpy(dtype=float)
        self.levels = [_levels(self.u[:, axis]) for axis in range(2)]
        self.fixed = tuple(name for name, own in zip(AXES, self.levels, strict=True) if len(own) == 1)
        axes = [axis for axis in range(2) if len(self.levels[axis]) >= 3]
        varied = [axis for axis in range(2) if len(self.levels[axis]) >= 2]
        size = 1 + len(axes) + len(axes) * (len(axes) + 1) // 2
        enough = len(self.losses) >= size and bool(axes) and axes == varied
        surface = _Surface(self.u, self.losses, axes) if enough else None
        self.surface = surface if surface and surface.determined else None
        self.diverged = self._diverged(set_aside)

    def _diverged(self, set_aside: pd.DataFrame | None) -> Array:
        """Settings of this budget's runs that diverged, or that a sweep stopped as hopeless, (runs, 2)."""
        if set_aside is None or not len(set_aside):
            return np.zeros((0, 2))
        rows = set_aside[set_aside["reason"].str.match(KNOWN_TO_BE_BAD) & (set_aside["params"] > 0)]
        same = (np.log(rows["params"] / self.params).abs() < SAME_PARAMS) & (
            np.log(rows["tokens"] / self.tokens).abs() < SAME_TOKENS
        )
        return np.log(rows.loc[same, list(AXES)].to_numpy(dtype=float))

    @property
    def runs(self) -> Runs:
        """For a joint fit."""
        return Runs(self.params, self.tokens, self.compute, self.u, self.losses)

    def on_law(self, optimum: Array, draws: Array, joint: JointFit) -> Optimum:
        """The budget's optimum as a joint fit has it: (3,) and (draws, 3) of ln rate, ln batch and loss."""
        edges = self._bounded(optimum[:2], "quadratic")[1]
        return self._made("joint", optimum[:2], float(optimum[2]), draws, edges, joint.curvature)

    def _made(
        self, method: str, u: Array, loss: float, draws: Array, edges: tuple[str, ...], curvature: Array | None
    ) -> Optimum:
        return Optimum(
            params=self.params,
            tokens=self.tokens,
            compute=self.compute,
            learning_rate=float(np.exp(u[0])),
            batch_tokens=float(np.exp(u[1])),
            loss=loss,
            best_run=float(self.losses.min()),
            runs=len(self.losses),
            method=method,
            edges=edges,
            fixed=self.fixed,
            curvature=curvature,
            draws=draws,
            settings=self.u,
            losses=self.losses,
        )

    def optimum(self, method: str, noise: float, draws: int, generator: np.random.Generator) -> Optimum:
        """The budget's optimum by a method, with draws of the noise."""
        surface = self.surface
        convex = surface is not None and bool(surface.minimum(surface.coefficients[None])[3][0])
        if method == "auto":
            method = "quadratic" if convex and surface is not None and surface.spare > 0 else "near_optimal"
        curvature = None
        if convex and surface is not None:
            curvature = surface.minimum(surface.coefficients[None])[2][0]
        base = surface.fitted if convex and surface is not None else self.losses
        drawn = base + noise * generator.standard_normal((draws, len(base)))
        table = np.concatenate([self.losses[None], drawn])
        if method == "quadratic" and convex and surface is not None:
            found = self._by_quadratic(surface, table)
        elif method == "interpolation" and self._is_grid():
            found = self._by_interpolation(table)
        else:
            method = "near_optimal"
            found = self._near_optimal(table)
        u, edges = self._bounded(found[0, :2], method)
        low, high = self._box()
        samples = found[1:].copy()
        samples[:, :2] = samples[:, :2].clip(low, high)
        kept = curvature if method == "quadratic" else None
        return self._made(method, u, float(found[0, 2]), samples, edges, kept)

    def _by_quadratic(self, surface: _Surface, table: Array) -> Array:
        coefficients = table[:, surface.near] @ surface.inverse.T
        u, loss, _, convex = surface.minimum(coefficients)
        best = table.argmin(1)
        u[~convex] = self.u[best[~convex]]
        loss = np.where(convex, loss, table[np.arange(len(table)), best])
        return np.column_stack([u, loss])

    def _near_optimal(self, table: Array) -> Array:
        best = table.min(1, keepdims=True)
        inside = (table <= best * (1 + NEAR_OPTIMAL)).astype(float)
        u = inside @ self.u / inside.sum(1, keepdims=True)
        return np.column_stack([u, best[:, 0]])

    def _is_grid(self) -> bool:
        """Whether splines can be laid: at least two batches, and two rates at each."""
        counts = [(np.abs(self.u[:, 1] - level) <= SAME_SETTING).sum() for level in self.levels[1]]
        return len(counts) >= 2 and min(counts) >= 2

    def _by_interpolation(self, table: Array) -> Array:
        """Minimum over the rate for each batch, then over batches; all draws at once."""
        minima, rates = [], []
        for level in self.levels[1]:
            rows = np.flatnonzero(np.abs(self.u[:, 1] - level) <= SAME_SETTING)
            x, where = np.unique(self.u[rows, 0], return_inverse=True)
            y = np.stack([table[:, rows[where == k]].mean(1) for k in range(len(x))])
            at, loss = _spline_minimum(x, y)
            rates.append(at)
            minima.append(loss)
        batches = self.levels[1]
        at, loss = _spline_minimum(batches, np.stack(minima))
        rate = np.array([np.interp(a, batches, column) for a, column in zip(at, np.stack(rates).T, strict=True)])
        return np.column_stack([rate, at, loss])

    def _box(self) -> tuple[Array, Array]:
        """How far an optimum may lie off the grid: half a step."""
        low, high = np.empty(2), np.empty(2)
        for axis, own in enumerate(self.levels):
            step = np.diff(own) if len(own) > 1 else np.zeros(1)
            low[axis], high[axis] = own[0] - step[0] / 2, own[-1] + step[-1] / 2
        return low, high

    def _bounded(self, u: Array, method: str) -> tuple[Array, tuple[str, ...]]:
        """The optimum kept near the grid, and where it lies at the grid's edge.

        A rate or batch at which runs diverged is as good as one with a high loss: it closes the grid on its side.
        """
        low, high = self._box()
        best = self.u[int(np.argmin(self.losses))]
        edges = []
        for axis, name in enumerate(AXES):
            own = self.levels[axis]
            if len(own) == 1:
                continue
            margin = 0.25 * np.diff(own)[[0, -1]]
            closed = self.diverged[:, axis]
            at_low = u[axis] < own[0] + margin[0] or (method != "quadratic" and best[axis] <= own[0] + SAME_SETTING)
            at_high = u[axis] > own[-1] - margin[1] or (method != "quadratic" and best[axis] >= own[-1] - SAME_SETTING)
            if at_low and not (closed < own[0] - SAME_SETTING).any():
                edges.append(f"{name} low")
            if at_high and not (closed > own[-1] + SAME_SETTING).any():
                edges.append(f"{name} high")
        return u.clip(low, high), tuple(edges)


def _spline_minimum(x: Array, y: Array) -> tuple[Array, Array]:
    """Where Akima splines through y (points, draws) are lowest, and how low, (draws,) each."""
    fine = np.linspace(x[0], x[-1], FINE)
    values = (
        Akima1DInterpolator(x, y, axis=0)(fine) if len(x) > 2 else np.stack([np.interp(fine, x, c) for c in y.T], 1)
    )
    lowest = values.argmin(0)
    return fine[lowest], values[lowest, np.arange(values.shape[1])]
