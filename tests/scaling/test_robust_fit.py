"""Robust fits: exact laws come back, outliers do not pull, and a batch of fits is the same as scipy's one by one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from hf_warmstart import WarmstartError
from hf_warmstart.scaling.fits.robust_fit import HUBER_DELTA, PowerSum, fit, huber, refit

POINTS = np.geomspace(1.0, 1e3, 9)
STARTS = [[e, a, p] for e in (-1.0, 0.5) for a in (-1.0, 1.0) for p in (0.05, 0.5)]


def floor_and_power(x: np.ndarray = POINTS) -> PowerSum:
    return PowerSum.of([[1.0, None, None], [None, 1.0, -np.log(x)]])


def noisy(sigma: float, seed: int = 0, rows: int | None = None) -> np.ndarray:
    size = len(POINTS) if rows is None else (rows, len(POINTS))
    return (1.5 + 2.0 * POINTS**-0.3) * np.exp(np.random.default_rng(seed).normal(0, sigma, size))


def test_slopes_are_those_of_finite_differences():
    law, theta, step = floor_and_power(), np.array([0.4, 0.7, 0.3]), 1e-6
    slopes = law.log_and_slope(theta)[1]
    for k in range(3):
        up, down = theta.copy(), theta.copy()
        up[k] += step
        down[k] -= step
        assert slopes[:, k] == pytest.approx((law.log(up) - law.log(down)) / (2 * step), abs=1e-8)


def test_an_exact_law_comes_back():
    found = fit(floor_and_power(), noisy(0.0), STARTS)
    assert np.exp(found.theta[:2]) == pytest.approx([1.5, 2.0], rel=1e-6) and found.theta[2] == pytest.approx(0.3)
    assert found.agreeing == found.starts == len(STARTS)


def test_an_outlier_hardly_moves_the_law():
    data = noisy(0.0)
    data[4] *= 1.5
    found = fit(floor_and_power(), data, STARTS)
    assert np.exp(found.theta[:2]) == pytest.approx([1.5, 2.0], rel=0.02)
    assert found.residuals[4] == pytest.approx(np.log(1.5), rel=0.01)


@pytest.mark.parametrize("sigma", [3e-4, 3e-3])
def test_the_optimum_is_scipys(sigma):
    law, data = floor_and_power(), noisy(sigma)
    weights = np.linspace(0.5, 2.0, len(data))
    found = fit(law, data, STARTS, weights=weights)
    cost = lambda theta: 1e6 * (weights * huber(np.log(data) - law.log(theta))).sum()  # noqa: E731
    best = min(
        minimize(cost, s, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-12, "maxiter": 9000}).fun
        for s in STARTS
    )
    assert found.cost * 1e6 <= best * (1 + 1e-5)


def test_a_batch_of_refits_is_the_fits_one_by_one():
    law, data = floor_and_power(), noisy(1e-3, rows=6)
    start = fit(law, noisy(1e-3), STARTS).theta
    counts = np.random.default_rng(1).multinomial(9, [1 / 9] * 9, size=6)
    together = refit(law, data, start, weights=counts)
    for row, (targets, weights) in enumerate(zip(data, counts, strict=True)):
        alone = fit(law, targets, [start], weights=weights)
        cost = (weights * huber(np.log(targets) - law.log(together[row]))).sum()
        assert cost <= alone.cost * (1 + 1e-5) + 1e-15


def test_batches_do_not_depend_on_their_size(monkeypatch):
    law, data = floor_and_power(), noisy(1e-3, rows=7)
    whole = refit(law, data, [0.4, 0.7, 0.3])
    monkeypatch.setattr("hf_warmstart.scaling.fits.robust_fit.BATCH_NUMBERS", 60)
    assert refit(law, data, [0.4, 0.7, 0.3]) == pytest.approx(whole, rel=1e-12)


def test_huber_is_continuous_and_linear_beyond_its_threshold():
    assert huber(np.array([HUBER_DELTA])) == pytest.approx(huber(np.array([HUBER_DELTA * (1 + 1e-12)])))
    assert np.diff(huber(np.array([1.0, 2.0, 3.0]))) == pytest.approx([HUBER_DELTA] * 2)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.array([1.0, np.nan, 2.0, 1.0, 1, 1, 1, 1, 1]), r"positions \[1\]"),
        (np.array([1.0, 0.0, 2.0, -1.0, 1, 1, 1, 1, 1]), r"positions \[1, 3\]"),
    ],
)
def test_what_has_no_logarithm_is_refused(data, words):
    with pytest.raises(WarmstartError, match=words):
        fit(floor_and_power(), data, STARTS)


def test_too_few_points_are_refused():
    with pytest.raises(WarmstartError, match="3 parameters cannot be fitted to 2 points"):
        fit(floor_and_power(POINTS[:2]), noisy(0.0)[:2], STARTS)
