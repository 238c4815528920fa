"""Runs of laws that are known: a bowl in (ln rate, ln batch) whose bottom follows them, with noise between seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

BOWL = np.array([[0.030, -0.012], [-0.012, 0.020]])  # nats: a factor 2 costs 3 to 5 permille, as on public grids
SHAPES = {12: (4, 3), 30: (6, 5), 120: (12, 10)}
FIRST = 1e17


@dataclass(frozen=True)
class Planted:
    """Laws over compute from `FIRST` on: `rate * (C / FIRST)^-p`, `batch * (C / FIRST)^q`, `floor + above * (C / FIRST)^-g`."""

    rate: float = 3e-3
    rate_power: float = -0.25
    batch: float = 1e5
    batch_power: float = 0.3
    floor: float = 1.5
    above: float = 2.0
    gamma: float = 0.1
    tokens_per_param: float = 20.0
    noise: float = 0.0

    def learning_rate(self, compute: float) -> float:
        return self.rate * (compute / FIRST) ** self.rate_power

    def batch_tokens(self, compute: float) -> float:
        return self.batch * (compute / FIRST) ** self.batch_power

    def loss(self, compute: float) -> float:
        return self.floor + self.above * (compute / FIRST) ** -self.gamma

    def runs(self, points: int = 30, budgets: int = 5, decades: float = 2.5, seed: int = 0, reach: float = 2.1):
        """A grid of runs at each budget, its centre off the optimum by chance: a `DataFrame`."""
        rng, rows = np.random.default_rng(seed), []
        for compute in np.geomspace(FIRST, FIRST * 10**decades, budgets):
            params = math.sqrt(compute / 6 / self.tokens_per_param)
            off = rng.uniform(-0.4, 0.4, 2)
            for a in np.linspace(-reach, reach, SHAPES[points][0]) + off[0]:
                for b in np.linspace(-reach, reach, SHAPES[points][1]) + off[1]:
                    u = np.array([a, b])
                    loss = self.loss(compute) + 0.5 * u @ BOWL @ u + self.noise * rng.standard_normal()
                    rows.append((params, params * self.tokens_per_param, a, b, loss, compute))
        frame = pd.DataFrame(rows, columns=["params", "tokens", "a", "b", "loss", "compute_planted"])
        frame["learning_rate"] = np.exp(frame["a"]) * self.learning_rate(frame["compute_planted"])
        frame["batch_tokens"] = np.exp(frame["b"]) * self.batch_tokens(frame["compute_planted"])
        return frame.drop(columns=["a", "b", "compute_planted"])
