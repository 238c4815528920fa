"""The optimum of a budget: planted bowls are found by every method, edges are flagged, noise is measured."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from hf_warmstart import WarmstartError
from hf_warmstart.scaling.fits.optima import METHODS, NEAR_OPTIMAL, SEED_NOISE, find_optima
from hf_warmstart.scaling.tables.runs import read_runs

from .planted import BOWL, SHAPES, Planted


@pytest.mark.parametrize("points", SHAPES)
@pytest.mark.parametrize(("method", "rate", "batch"), [("auto", 1e-6, 1e-6), ("interpolation", 0.35, 0.5)])
def test_planted_optima_are_found(points, method, rate, batch):
    laws = Planted()
    found, noise = find_optima(read_runs(laws.runs(points)).frame, method=method, draws=0)
    assert noise == pytest.approx(0.0, abs=1e-9) and len(found) == 5
    for optimum in found:
        assert abs(math.log(optimum.learning_rate / laws.learning_rate(optimum.compute))) < rate
        assert abs(math.log(optimum.batch_tokens / laws.batch_tokens(optimum.compute))) < batch
        assert optimum.loss == pytest.approx(laws.loss(optimum.compute), abs=1e-9 if method == "auto" else 0.02)
        assert optimum.edges == () and optimum.runs == points


def test_the_near_optimal_set_is_averaged():
    frame = read_runs(Planted().runs(120, budgets=1)).frame
    (optimum,), _ = find_optima(frame, method="near_optimal", draws=0)
    inside = frame[frame["loss"] <= frame["loss"].min() * (1 + NEAR_OPTIMAL)]
    assert 4 < len(inside) < 30
    assert optimum.learning_rate == pytest.approx(np.exp(np.log(inside["learning_rate"]).mean()))
    assert optimum.batch_tokens == pytest.approx(np.exp(np.log(inside["batch_tokens"]).mean()))


def test_a_quadratic_knows_its_bowl_and_ridge():
    (optimum,), _ = find_optima(read_runs(Planted().runs(30, budgets=1)).frame, draws=0)
    assert optimum.method == "quadratic" and optimum.curvature == pytest.approx(BOWL, rel=1e-5)
    assert optimum.ridge == pytest.approx(0.4, rel=1e-5)
    twice = optimum.loss_at(2 * optimum.learning_rate, optimum.batch_tokens) - optimum.loss
    assert twice == pytest.approx(0.5 * 0.030 * math.log(2) ** 2, rel=1e-4)
    moved = optimum.loss_at(2**optimum.ridge * optimum.learning_rate, 2 * optimum.batch_tokens)
    assert moved < optimum.loss_at(optimum.learning_rate, 2 * optimum.batch_tokens)


@pytest.mark.parametrize("points", SHAPES)
def test_noise_between_seeds_is_measured_and_drawn(points):
    found, noise = find_optima(read_runs(Planted(noise=0.005).runs(points, budgets=12)).frame, draws=400)
    assert noise == pytest.approx(0.005, rel=0.25)
    exact, _ = find_optima(read_runs(Planted().runs(points, budgets=12)).frame, draws=0)
    errors = [
        (math.log(a.learning_rate / b.learning_rate), a.draws[:, 0].std()) for a, b in zip(found, exact, strict=True)
    ]
    standardised = np.array([error / spread for error, spread in errors])
    assert 0.5 < np.sqrt((standardised**2).mean()) < 1.7
    spread = [optimum.draws[:, 2].std() for optimum in found]
    assert 0.3 * 0.005 / math.sqrt(points) < np.mean(spread) < 0.006


@pytest.mark.parametrize("method", [name for name in METHODS if name != "joint"])
@pytest.mark.parametrize(("side", "keep"), [("low", 1), ("high", -1)])
@pytest.mark.parametrize("column", ["learning_rate", "batch_tokens"])
def test_optima_on_an_edge_of_the_grid_are_flagged(method, side, keep, column):
    laws = Planted()
    frame = laws.runs(30, budgets=1)
    centre = laws.learning_rate(1e17) if column == "learning_rate" else laws.batch_tokens(1e17)
    half = frame[keep * np.log(frame[column] / centre) > 0.3]
    (optimum,), _ = find_optima(read_runs(half).frame, method=method, draws=5)
    assert f"{column} {side}" in optimum.edges
    levels = np.sort(np.log(half[column].unique()))
    assert levels[0] - 1 < math.log(getattr(optimum, column)) < levels[-1] + 1


def test_rates_at_which_runs_diverged_close_the_grid():
    laws = Planted()
    frame = laws.runs(30, budgets=1)
    low = np.log(frame["learning_rate"] / laws.learning_rate(1e17)) < -0.2
    diverged = frame.assign(loss=np.where(low, frame["loss"], math.nan))
    table = read_runs(diverged)
    assert "learning_rate high" in find_optima(table.frame, method="near_optimal")[0][0].edges
    (optimum,), _ = find_optima(table.frame, set_aside=table.set_aside, method="near_optimal")
    assert optimum.edges == ()


def test_budgets_are_pairs_of_params_and_tokens_whatever_the_rounding_to_steps():
    frame = Planted().runs(12, budgets=3)
    frame["tokens"] = (frame["tokens"] // 300_000) * 300_000
    assert len(find_optima(read_runs(frame).frame, draws=0)[0]) == 3


def test_a_rate_alone_may_be_varied():
    frame = Planted().runs(30, budgets=2)
    frame = frame.assign(batch_tokens=2.0**17, loss=2 + 0.5 * 0.03 * (np.log(frame["learning_rate"] / 2e-3)) ** 2)
    found, _ = find_optima(read_runs(frame.assign(seed=range(len(frame)))).frame, draws=10)
    for optimum in found:
        assert optimum.fixed == ("batch_tokens",) and optimum.batch_tokens == pytest.approx(2.0**17)
        assert optimum.learning_rate == pytest.approx(2e-3, rel=1e-6) and optimum.ridge is None


def test_surfaces_without_a_minimum_fall_back_to_the_best_runs():
    frame = Planted().runs(30, budgets=1)
    saddle = frame.assign(loss=3 - 0.01 * np.log(frame["learning_rate"] / 3e-3) ** 2)
    (optimum,), _ = find_optima(read_runs(saddle).frame, draws=20)
    assert optimum.method == "near_optimal" and optimum.loss == saddle["loss"].min()
    assert np.isfinite(optimum.draws).all()


def test_few_runs_give_a_near_optimal_set_and_the_usual_noise():
    rows = Planted().runs(12, budgets=1).iloc[[0, 4, 7, 9]]
    (optimum,), noise = find_optima(read_runs(rows).frame, draws=20)
    assert optimum.method == "near_optimal" and noise == SEED_NOISE and optimum.draws[:, 2].std() > 0


def test_budgets_without_three_runs_are_refused():
    frame = pd.concat([Planted().runs(12, budgets=4).groupby("params").head(2)])
    with pytest.raises(WarmstartError, match="None of 4 budgets .* has 3 runs"):
        find_optima(read_runs(frame).frame)
    with pytest.raises(WarmstartError, match="none of"):
        find_optima(frame, method="argmin")
