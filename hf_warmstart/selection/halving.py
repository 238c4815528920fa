"""Successive halving over survivors: who goes on, when the leader is clear, and what a budget affords. No model is run here.

Probes are cheap and rank badly at short lags, so they only say who is continued. Continuations then go by rounds: in round
r each survivor runs repeat r, the whole continuation on other data, and the worse half by the mean over all its repeats is
dropped; two at least stay. Differences are taken within repeats, since what the repeats have in common (their data) moves
all candidates together: in an earlier study in miniature losses moved by 0.018 between seeds and differences by 0.003.

With differences d_r of a rival's loss to the leader's over n repeats, the margin is their mean, with the interval

    mean(d) +- t(1 - 0.05 / (2 k), n - 1) sd(d) / sqrt(n),      k rivals (Bonferroni)

The leader is clear when the whole interval lies above 0 for every rival still in, after three repeats at least.

Source: successive halving, arXiv 1502.07943; here the resource is repeats, since more steps would be another question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from scipy.stats import t as student

LEVEL = 0.95
LEAST_REPEATS, MOST_REPEATS = 3, 5


@dataclass(frozen=True)
class Margin:
    """How far a rival lies behind, nats per token.

    Args:
        mean: over repeats. low, high: of the interval; None after one repeat. error: the paired standard error.
        repeats: how many.
    """

    mean: float
    low: float | None
    high: float | None
    error: float | None
    repeats: int

    @property
    def clear(self) -> bool:
        """Whether the rival lies behind for sure, at the level of the interval."""
        return self.low is not None and self.low > 0


def margin(leader: Sequence[float], rival: Sequence[float], rivals: int = 1) -> Margin:
    """The margin of a leader over a rival, from their losses in the same repeats."""
    differences = [b - a for a, b in zip(leader, rival, strict=False)]
    count = len(differences)
    mean = sum(differences) / count
    if count < 2:
        return Margin(mean, None, None, None, count)
    error = sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1) / count)
    reach = float(student.ppf(1 - (1 - LEVEL) / (2 * max(1, rivals)), count - 1)) * error
    return Margin(mean, mean - reach, mean + reach, error, count)


def ordered(losses: Mapping[str, Sequence[float]]) -> list[str]:
    """Names by their mean loss over the repeats that all of them have; equal means by name."""
    common = min((len(values) for values in losses.values()), default=0)
    return sorted(losses, key=lambda name: (sum(losses[name][:common]) / max(common, 1), name))


def leader_is_clear(losses: Mapping[str, Sequence[float]], least_repeats: int = LEAST_REPEATS) -> bool:
    """Whether the first of `ordered` is ahead of all others for sure."""
    first, *rivals = ordered(losses)
    if min(len(values) for values in losses.values()) < least_repeats:
        return False
    return all(margin(losses[first], losses[rival], len(rivals)).clear for rival in rivals)


def half(names: Sequence[str]) -> list[str]:
    """The better half of names in order, two at least."""
    return list(names[: max(2, -(-len(names) // 2))])


def affordable(
    names: Sequence[str],
    first: Callable[[str], float],
    next_one: Callable[[str], float],
    budget: float | None,
    rounds: int = LEAST_REPEATS,
) -> tuple[list[str], int]:
    """Which survivors of the probes a budget can continue, and through how many rounds at least.

    Args:
        names: in the probes' order. first: price of the first continuation, from the probe's end. next_one: of each further
            repeat. budget: what is left; None for no limit. rounds: that are wanted.

    Returns:
        As many names as can be continued and halved through so many rounds; of fewer rounds where not even two
        can be; no names where nothing can be.
    """
    if budget is None:
        return list(names), rounds
    for repeats in range(rounds, 0, -1):
        for count in range(len(names), 1, -1):
            if price_of_rounds(names[:count], first, next_one, repeats) <= budget:
                return list(names[:count]), repeats
    return [], 0


def price_of_rounds(
    names: Sequence[str], first: Callable[[str], float], next_one: Callable[[str], float], repeats: int
) -> float:
    """The price of continuing some names and halving them through a number of rounds."""
    total, left = sum(first(name) for name in names), list(names)
    for _ in range(1, repeats):
        left = half(left)
        total += sum(next_one(name) for name in left)
    return total
