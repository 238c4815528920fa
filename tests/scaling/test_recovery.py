"""Planted laws come back inside their 95 % intervals at the nominal rate, whatever the size of the grid."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_warmstart import HparamPredictor

from .planted import FIRST, SHAPES, Planted

LAWS = Planted(noise=0.005)
BUDGETS, DECADES, BEYOND = 6, 3.0, 1e21  # BEYOND: ten times the largest budget
REPEATS = 200
# 3 standard deviations of a share of 95 % in 200 repeats are 4.6 %.
TOLERANCE = 3 * math.sqrt(0.95 * 0.05 / REPEATS)


def inside(points: int, seed: int) -> dict[str, bool]:
    """For each quantity, whether the truth lies in the interval of one fit."""
    predictor = HparamPredictor.fit(LAWS.runs(points, BUDGETS, DECADES, seed=seed), "compute", draws=400, seed=seed)
    laws, law = predictor.laws, predictor.loss_law
    found = predictor.recommend(params=1e9, tokens=5e9, sequence_length=1, eval_loss=LAWS.loss(7e19))
    truths = {
        "rate's exponent": (laws.learning_rate.draws[:, 1], LAWS.rate_power),
        "batch's exponent": (laws.batch_tokens.draws[:, 1], LAWS.batch_power),
        "rate beyond": (laws.learning_rate.at_draws(compute=BEYOND), LAWS.learning_rate(BEYOND)),
        "batch beyond": (laws.batch_tokens.at_draws(compute=BEYOND), LAWS.batch_tokens(BEYOND)),
        "floor": (np.exp(law.draws[:, 0]), LAWS.floor),
        "loss's exponent": (law.draws[:, 2], LAWS.gamma),
        "loss beyond": (law.at_draws(compute=BEYOND), LAWS.loss(BEYOND)),
        "compute of a loss": (law.inverse_draws(LAWS.loss(1e19)), 1e19),
        "compute of a loss beyond": (law.inverse_draws(LAWS.loss(BEYOND)), BEYOND),
    }
    hits = {}
    for name, (draws, truth) in truths.items():
        low, high = np.quantile(draws, [0.025, 0.975])
        hits[name] = bool(low <= truth <= high)
    total = 7e19 + 6 * 1e9 * 5e9
    for name, truth in (("learning_rate", LAWS.learning_rate(total)), ("batch_tokens", LAWS.batch_tokens(total))):
        low, high = found.intervals[name]
        hits[f"recommended {name}"] = bool(low <= truth <= high)
    return hits


def coverage(points: int, repeats: int) -> dict[str, float]:
    """The share of repeats in which each truth lies in its interval."""
    hits = [inside(points, seed) for seed in range(repeats)]
    return {name: float(np.mean([hit[name] for hit in hits])) for name in hits[0]}


@pytest.mark.slow
@pytest.mark.parametrize("points", SHAPES)
def test_intervals_hold_the_truth_at_the_nominal_rate(points):
    shares = coverage(points, REPEATS)
    print(points, {name: round(share, 3) for name, share in shares.items()})  # noqa: T201 -- with -s, the figures themselves
    low = {name: share for name, share in shares.items() if share < 0.95 - TOLERANCE}
    assert not low, low
    assert np.mean(list(shares.values())) < 0.985  # nor so wide that they say nothing


def test_a_few_repeats_hold_the_truth_mostly():
    shares = coverage(12, 8)
    assert np.mean(list(shares.values())) > 0.85 and FIRST < BEYOND
