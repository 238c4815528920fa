"""Which points of (learning rate, batch) are tried: a first design, and what is added round its optimum.

The near-optimal set of a budget is about a factor of two wide in both directions, a factor-2 miss costs about 3 per mille
of the loss, and a quadratic over 12 to 30 points finds the optimum; see `docs/sweeps.md`. So a first design of 5 x 4 points
a factor of two apart is laid round a guess, and where the best point has no neighbour on some side, the neighbours are
added, until it lies within. Everything here is a function of the losses alone, so that a sweep that was stopped goes on as
if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product

from .config import SweepConfig

MAX_LEARNING_RATE = 1.0
# DeepSeek LLM (arXiv 2401.02954, section 3): optimal learning rate, and optimal batch in tokens, over compute in FLOPs.
DEEPSEEK_LEARNING_RATE = 0.3118, -0.1250
DEEPSEEK_BATCH = 0.2920, 0.3271


@dataclass(frozen=True, order=True)
class Point:
    """One setting: a learning rate, and a batch in sequences."""

    learning_rate: float
    batch_sequences: int


@dataclass(frozen=True)
class Limits:
    """What a budget admits: batches of at most `most_sequences`."""

    most_sequences: int

    def admits(self, point: Point) -> bool:
        return 0 < point.learning_rate <= MAX_LEARNING_RATE and 1 <= point.batch_sequences <= self.most_sequences


def first_centre(compute: float, sequence_length: int, asked: SweepConfig) -> Point:
    """Where the smallest budget's design is centred: as asked, else by DeepSeek's laws at its compute (FLOPs)."""
    rate = asked.learning_rate or DEEPSEEK_LEARNING_RATE[0] * compute ** DEEPSEEK_LEARNING_RATE[1]
    tokens = asked.batch_tokens or DEEPSEEK_BATCH[0] * compute ** DEEPSEEK_BATCH[1]
    return Point(rate, max(1, round(tokens / sequence_length)))


def moved_centre(best: Point, factor: float) -> Point:
    """An optimum carried to a budget of `factor` times the compute."""
    rate = best.learning_rate * factor ** DEEPSEEK_LEARNING_RATE[1]
    return Point(rate, max(1, round(best.batch_sequences * factor ** DEEPSEEK_BATCH[1])))


def first_points(centre: Point, limits: Limits, asked: SweepConfig) -> list[Point]:
    """The first design of a budget, its centre first.

    A grid's points are powers of its steps, so that budgets share them.
    """
    rate_step, batch_step = math.log(asked.learning_rate_step), math.log(asked.batch_step)
    rate = round(math.log(centre.learning_rate) / rate_step)
    top = math.floor(math.log(limits.most_sequences) / batch_step + 1e-9)
    batch = min(max(0, round(math.log(centre.batch_sequences) / batch_step)), top)
    rates = [rate + k for k in _centred(asked.learning_rates)]
    # The whole side stays within what the budget admits, where there is room for it.
    low = max(0, min(batch + _centred(asked.batch_sizes)[0], top - asked.batch_sizes + 1))
    batches = [k for k in range(low, low + asked.batch_sizes) if k <= top]
    on_grid: Iterable[tuple[float, float]] = product(rates, batches)
    lattice = on_grid if asked.design == "grid" else _sobol(rates, batches, asked.points)
    points = {_point(r, b, asked) for r, b in lattice}
    middle = _point(rate, min(max(batch, batches[0]), batches[-1]), asked)
    found = sorted((p for p in points if limits.admits(p)), key=lambda p: (_distance(p, middle, asked), p))
    return found


def further_points(losses: Mapping[Point, float], limits: Limits, asked: SweepConfig) -> list[Point]:
    """Neighbours that the best point lacks, sorted; none where it lies within what was tried.

    Args:
        losses: point -> loss; infinite where a run diverged or was stopped.
    """
    best = best_point(losses)
    if best is None:
        return []
    wanted = set()
    for across, along in product((-1, 0, 1), repeat=2):
        point = Point(
            best.learning_rate * asked.learning_rate_step**across,
            max(1, round(best.batch_sequences * asked.batch_step**along)),
        )
        near = any(_is_near(point, tried, asked) for tried in losses)
        if limits.admits(point) and not near:
            wanted.add(point)
    return sorted(wanted)


def best_point(losses: Mapping[Point, float]) -> Point | None:
    """The point of the lowest finite loss; the smallest of equals."""
    finite = [(loss, point) for point, loss in losses.items() if math.isfinite(loss)]
    return min(finite)[1] if finite else None


def on_edge(losses: Mapping[Point, float], asked: SweepConfig) -> list[str]:
    """On which sides the best point has nothing beyond it: among "learning_rate" and "batch_tokens"."""
    best = best_point(losses)
    if best is None:
        return []
    found = []
    for name, value in (
        ("learning_rate", lambda p: p.learning_rate),
        ("batch_tokens", lambda p: p.batch_sequences),
    ):
        others = [value(p) for p in losses]
        if value(best) in (min(others), max(others)):
            found.append(name)
    return found


def _centred(count: int) -> list[int]:
    return [k - (count - 1) // 2 for k in range(count)]


def _point(rate: float, batch: float, asked: SweepConfig) -> Point:
    return Point(asked.learning_rate_step**rate, max(1, round(asked.batch_step**batch)))


def _sobol(rates: list[int], batches: list[int], points: int) -> Iterable[tuple[float, float]]:
    """Sobol points over the region of a grid, in steps. Its second point is the region's middle."""
    from scipy.stats import qmc

    spans = (rates[-1] - rates[0], batches[-1] - batches[0])
    drawn = qmc.Sobol(2, scramble=False).random_base2(math.ceil(math.log2(points + 1)))[1 : points + 1]
    return [(rates[0] + x * spans[0], batches[0] + y * spans[1]) for x, y in drawn.tolist()]


def _distance(a: Point, b: Point, asked: SweepConfig) -> float:
    """In steps."""
    rates = math.log(a.learning_rate / b.learning_rate) / math.log(asked.learning_rate_step)
    batches = math.log(a.batch_sequences / b.batch_sequences) / math.log(asked.batch_step)
    return round(math.hypot(rates, batches), 9)


def _is_near(wanted: Point, tried: Point, asked: SweepConfig) -> bool:
    """Whether a point stands for another: within half a step in both directions."""
    rates = abs(math.log(wanted.learning_rate / tried.learning_rate)) / math.log(asked.learning_rate_step)
    batches = abs(math.log(wanted.batch_sequences / tried.batch_sequences)) / math.log(asked.batch_step)
    return max(rates, batches) <= 0.5
