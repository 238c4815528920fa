"""What a sweep costs, and which share that is of the grid search which it replaces.

    share = (sum of the proxies' FLOPs, evaluations included) / (runs of the grid * FLOPs of one run of the target)

FLOPs are read off the configs (`flops_per_token`): of small models the head is a large part, which `6 N D` leaves out on
both sides. An evaluation takes a third of a training step's FLOPs per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import SweepConfig
from .design import Point
from .proxies import Proxy
from .training import CHECKS, Horizon

GRID_POINTS, GRID_SEEDS = 25, 2  # a 5 x 5 grid a factor of two apart, two seeds, at the target's size
FORWARD_SHARE = 1 / 3


@dataclass(frozen=True)
class BudgetCost:
    """One proxy's part.

    Args:
        params: N. tokens: D of each horizon. runs: trunks of the first design, all seeds. run_flops: of one trunk with its
            branches and evaluations. most_runs: with every refinement.
    """

    params: int
    tokens: tuple[int, ...]
    runs: int
    run_flops: float
    most_runs: int


@dataclass(frozen=True)
class SweepCost:
    """The cost of a sweep in FLOPs, before it begins.

    Args:
        budgets: of each proxy. grid_flops: of the grid search at the target's size.
    """

    budgets: tuple[BudgetCost, ...]
    grid_flops: float

    @property
    def flops(self) -> float:
        """Of all first designs, every run to its end."""
        return sum(b.runs * b.run_flops for b in self.budgets)

    @property
    def most_flops(self) -> float:
        """With every refinement that there may be."""
        return sum(b.most_runs * b.run_flops for b in self.budgets)

    @property
    def share(self) -> float:
        """`flops` over the grid's."""
        return self.flops / self.grid_flops

    @property
    def most_share(self) -> float:
        """`most_flops` over the grid's."""
        return self.most_flops / self.grid_flops

    def to_dict(self) -> dict:
        """Plain data."""
        return {
            "budgets": [dict(b.__dict__) | {"tokens": list(b.tokens)} for b in self.budgets],
            "flops": self.flops,
            "most_flops": self.most_flops,
            "grid_flops": self.grid_flops,
            "grid": f"{GRID_POINTS} points, {GRID_SEEDS} seeds",
            "share": self.share,
            "most_share": self.most_share,
        }


def run_flops(proxy: Proxy, point: Point, asked: SweepConfig, eval_tokens: int) -> float:
    """FLOPs of one trunk with its branches and evaluations."""
    return spent_flops(proxy, sum(run_tokens(proxy, point, asked)), eval_tokens * evaluations(proxy, asked))


def run_tokens(proxy: Proxy, point: Point, asked: SweepConfig) -> list[int]:
    """Tokens that each horizon of a run adds: what the trunk goes on, and the branch."""
    found, step = [], 0
    batch = point.batch_sequences
    for sequences in proxy.horizons:
        horizon = Horizon.of(sequences, min(proxy.horizons), batch, asked)
        trunk = (horizon.stable_end - step) * batch
        branch = sequences - horizon.stable_end * batch
        found.append((trunk + branch) * proxy.sequence_length)
        step = horizon.stable_end
    return found


def evaluations(proxy: Proxy, asked: SweepConfig) -> int:
    """Passes over the held-out text of one run that is not stopped."""
    return len(proxy.horizons) + (len(CHECKS) if asked.stop_ratio is not None else 0)


def spent_flops(proxy: Proxy, trained_tokens: int, evaluated_tokens: int) -> float:
    """FLOPs of training and evaluating on so many tokens."""
    return proxy.flops_per_token * (trained_tokens + FORWARD_SHARE * evaluated_tokens)
