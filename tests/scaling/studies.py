"""Studies whose laws are known: runs from scratch and grown ones, with the noise of seeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

SIZES = (1e6, 2e6, 4e6)
FACTORS = (1.5, 2.0, 4.0, 8.0)
BUDGETS = (5.0, 10.0, 20.0)
GAIN = {"x": -0.024, "x u": 0.008, "x^2": 0.015, "x^2 u": -0.003}  # optimum 2.2 and bound 5 at 20 tokens per parameter


def scratch_loss(params: float, tokens: float) -> float:
    return 1.5 + 20 * params**-0.3 + 60 * tokens**-0.3


def log_ratio(factor: float, each: float, gain: dict[str, float] = GAIN) -> float:
    x, u = math.log(factor), math.log(each / 20)
    return gain["x"] * x + gain["x u"] * x * u + gain["x^2"] * x * x + gain["x^2 u"] * x * x * u


def study(
    seed: int = 0, noise: float = 0.0, seeds: int = 3, sizes=SIZES, factors=FACTORS, budgets=BUDGETS, gain=GAIN
) -> list[dict[str, Any]]:
    """Rows of a study: scratch and one grown run for each factor, size, budget and seed."""
    rng, rows = np.random.default_rng(seed), []
    for params in sizes:
        for run in range(seeds):
            for each in budgets:
                tokens = each * params
                common = {"params": params, "tokens": tokens, "seed": run}
                level = scratch_loss(params, tokens)
                rows.append({"method": "scratch", "loss": level * math.exp(noise * rng.normal()), **common})
                for factor in factors:
                    base = {"base_params": params / factor, "base_tokens": 20 * params / factor}
                    loss = level * math.exp(log_ratio(factor, each, gain) + noise * rng.normal())
                    rows.append({"method": "grown", "loss": loss, **common, **base})
    return rows
