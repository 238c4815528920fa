"""Predictors that many tests ask."""

from __future__ import annotations

import pytest

from hf_warmstart import HparamPredictor

from .planted import Planted


@pytest.fixture(scope="session")
def predictor() -> HparamPredictor:
    """Of planted laws of compute, exact but for draws."""
    return HparamPredictor.fit(Planted().runs(), draws=200)


@pytest.fixture(scope="session")
def noisy() -> HparamPredictor:
    """Of the same laws with noise between seeds."""
    return HparamPredictor.fit(Planted(noise=0.005).runs(), draws=400)
