"""Laws of loss and of settings: values, inverses, gradients, draws, and fits that give back what was planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_warmstart import LossLaw, WarmstartError
from hf_warmstart.scaling.fits.laws import PowerLaw, interval

COMPUTE = LossLaw(1.5, {"compute": 60.0}, {"compute": 0.09})
BOTH = LossLaw(1.8172, {"params": 477.8, "tokens": 2143.9}, {"params": 0.3473, "tokens": 0.3672})
PRINTED = LossLaw(1.8169, {"params": 482.0, "tokens": 2085.4}, {"params": 0.3478, "tokens": 0.3658})
HOFFMANN = LossLaw(
    math.exp(0.5267228),
    {"params": math.exp(6.0073404), "tokens": math.exp(6.0179186)},
    {"params": 0.33917, "tokens": 0.28491},
)


@given(st.floats(1e14, 1e26))
def test_the_inverse_of_a_law_of_compute_gives_the_compute_back(compute):
    assert COMPUTE.inverse(COMPUTE(compute=compute)) == pytest.approx(compute, rel=1e-6)


@given(st.floats(1e6, 1e12), st.floats(1e8, 1e13))
def test_the_inverse_of_a_law_of_both_gives_either_back(params, tokens):
    loss = BOTH(params=params, tokens=tokens)
    assert BOTH.inverse(loss, params=params) == pytest.approx(tokens, rel=1e-5)
    assert BOTH.inverse(loss, tokens=tokens) == pytest.approx(params, rel=1e-5)


@pytest.mark.parametrize("law", [COMPUTE, BOTH])
def test_gradients_are_those_of_finite_differences(law):
    at = {"compute": 1e19, "params": 3e8, "tokens": 7e9}
    for name, slope in law.gradient(**at).items():
        step = 1e-5 * at[name]
        change = law(**at | {name: at[name] + step}) - law(**at | {name: at[name] - step})
        assert slope == pytest.approx(change / (2 * step), rel=1e-5) and slope < 0


@pytest.mark.parametrize(
    ("law", "gamma", "k", "losses"),
    [(HOFFMANN, 0.1548, 814, {}), (PRINTED, 0.1783, 1968, {1e18: 3.49, 1e20: 2.553, 1e22: 2.141})],
)
def test_the_compute_optimal_law_is_the_one_of_the_literature(law, gamma, k, losses):
    """gamma, K and the losses as worked out from Hoffmann et al. 2022 and Besiroglu et al. 2024."""
    best = law.compute_optimal()
    assert best.exponents["compute"] == pytest.approx(gamma, abs=5e-5)
    assert best.amplitudes["compute"] * 6 ** -best.exponents["compute"] == pytest.approx(k, abs=1.0)
    for compute, loss in losses.items():
        assert best(compute=compute) == pytest.approx(loss, abs=6e-3)
        n = law.compute_optimal_params(compute)
        around = [law(params=n * f, tokens=compute / (6 * n * f)) for f in (0.9, 1.0, 1.1)]
        assert around[1] == min(around) == pytest.approx(best(compute=compute), rel=1e-9)


@pytest.mark.parametrize("law", [COMPUTE, BOTH])
@pytest.mark.parametrize("loss", [0.0, 1.5, math.nan])
def test_a_loss_at_or_below_the_floor_belongs_to_no_budget(law, loss):
    fixed = {} if law is COMPUTE else {"params": 1e9}
    with pytest.raises(WarmstartError, match="at or below"):
        law.inverse(loss, **fixed)


def test_a_planted_law_of_compute_comes_back_with_draws_round_it():
    compute = np.geomspace(1e17, 1e21, 9)
    rng = np.random.default_rng(0)
    truth = COMPUTE(compute=compute)
    found = LossLaw.fit(truth + rng.normal(0, 5e-4, 9), compute=compute, draws=200)
    assert found.floor == pytest.approx(1.5, abs=0.1) and found.exponents["compute"] == pytest.approx(0.09, rel=0.1)
    assert found.draws.shape[1] == 3 and len(found.draws) > 150
    low, high = interval(found.at_draws(compute=1e19))
    assert low < COMPUTE(compute=1e19) < high and high - low < 5e-3
    at_own_loss = found.inverse_draws(found(compute=1e19))
    low, high = interval(at_own_loss)
    assert low < 1e19 < high < 1e20


def test_a_planted_law_of_params_and_tokens_comes_back():
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)))
    found = LossLaw.fit(BOTH(params=n, tokens=d), params=n, tokens=d, draws=20)
    assert found.floor == pytest.approx(BOTH.floor, rel=1e-4)
    for name in ("params", "tokens"):
        assert found.exponents[name] == pytest.approx(BOTH.exponents[name], rel=1e-3)
    tokens = found.inverse_draws(BOTH(params=1e8, tokens=1e10), params=1e8)
    assert np.median(tokens) == pytest.approx(1e10, rel=1e-2)
    assert found.compute_optimal().draws.shape == (len(found.draws), 3)


def test_given_draws_of_the_losses_are_fitted_each():
    compute = np.geomspace(1e17, 1e20, 6)
    truth = COMPUTE(compute=compute)
    tables = np.stack([truth, truth * 1.01])
    found = LossLaw.fit(truth, compute=compute, loss_draws=tables)
    assert found.at_draws(compute=1e18) == pytest.approx(
        [COMPUTE(compute=1e18), 1.01 * COMPUTE(compute=1e18)], rel=1e-6
    )


def test_draws_that_never_reach_a_loss_are_infinite():
    draws = np.array([[math.log(1.0), 0.0, 0.1], [math.log(2.0), 0.0, 0.1]])
    law = LossLaw(1.0, {"compute": 1.0}, {"compute": 0.1}, draws)
    assert law.inverse_draws(1.5).tolist() == [pytest.approx(1024.0), math.inf]
    assert interval([1.0, math.inf])[1] == math.inf


@pytest.mark.parametrize(
    ("loss", "at", "words"),
    [
        ([3.0, 2.5, 2.2], {"params": [1e8, 1e9, 1e10]}, "No law is over"),
        ([3.0, 2.0, 2.0, 2.0], {"compute": [1e17, 1e18, 1e19, 1e20]}, "which no law of loss does"),
        ([3.0, 2.5], {"compute": [1e18, 1e19]}, "cannot be fitted to 2 points"),
        ([2.0, 2.5, 3.0, 3.2], {"compute": [1e17, 1e18, 1e19, 1e20]}, "do not fall"),
        ([3.0, 2.5, 2.0], {"compute": [1e18] * 3}, "do not vary"),
        ([3.0, 2.5, 2.0], {"compute": [1e18, -1e18, 1e20]}, "positive and finite"),
        ([3.0, math.nan, 2.0], {"compute": [1e18, 1e19, 1e20]}, "positions"),
    ],
)
def test_points_without_a_law_are_refused(loss, at, words):
    with pytest.raises(WarmstartError, match=words):
        LossLaw.fit(loss, **at)


def test_laws_that_cannot_be_are_refused_with_everything_that_is_wrong():
    with pytest.raises(WarmstartError, match=r"floor=-1.0.*amplitudes.*exponents"):
        LossLaw(-1.0, {"compute": 0.0}, {"compute": -0.1})
    with pytest.raises(WarmstartError, match="Pass both for the same"):
        LossLaw(1.0, {"compute": 1.0}, {"params": 0.1})


def test_a_power_law_wants_its_own_quantities_and_ignores_others():
    law = PowerLaw(1.79, {"params": -0.713, "tokens": 0.307})
    assert law(params=7e9, tokens=1.4e12, compute=1.0) == pytest.approx(9.2e-4, rel=0.01)
    with pytest.raises(WarmstartError, match="'tokens'"):
        law(params=7e9)
    with pytest.raises(WarmstartError, match="positive"):
        law(params=7e9, tokens=0)


def test_draws_of_a_power_law_take_one_point_or_one_each():
    draws = np.array([[0.0, 1.0], [math.log(2.0), 1.0]])
    law = PowerLaw(1.0, {"compute": 1.0}, draws)
    assert law.at_draws(compute=3.0) == pytest.approx([3.0, 6.0])
    assert law.at_draws(compute=np.array([3.0, 5.0])) == pytest.approx([3.0, 10.0])
