"""Tokens-to-loss: how many tokens a training method needs for a given held-out loss.

A *ladder* is a method run at several token budgets, every run with its learning rate decayed at its own end. Between
two rungs the loss is taken as linear in the logarithm of the tokens; beyond them nothing is said but a bound.
`docs/tokens-to-loss.md` defines the quantity and says why.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from ...errors import WarmstartError

EXACT, AT_LEAST, AT_MOST = "=", ">=", "<="
Ladder = Mapping[float, float] | Iterable[tuple[float, float]]


@dataclass(frozen=True)
class Bounded:
    """A number that is known, or known only to lie on one side of a bound.

    Args:
        value (`float`): the number, or the bound.
        relation (`str`): `"="`, `">="` (the number is at least `value`) or `"<="` (at most).

    Example:

        >>> print(Bounded(2.5, ">="))
        >= 2.5
    """

    value: float
    relation: str = EXACT

    @property
    def known(self) -> bool:
        """Whether the number itself is known."""
        return self.relation == EXACT

    def times(self, factor: float) -> Bounded:
        """The number times a positive factor."""
        return Bounded(self.value * factor, self.relation)

    def to_dict(self) -> dict[str, float | str]:
        """Plain data for a report."""
        return {"value": self.value, "relation": self.relation}

    def __str__(self) -> str:
        return f"{self.value:.4g}" if self.known else f"{self.relation} {self.value:.4g}"


def tokens_to_loss(ladder: Ladder, loss: float) -> Bounded:
    """The tokens that a method needs to reach a loss, by its ladder.

    Between neighbouring rungs `(D0, L0)` and `(D1, L1)`, with L the `loss` asked for:

        ln D = ln D0 + (ln D1 - ln D0) (L0 - L) / (L0 - L1)

    Args:
        ladder (`dict[float, float]` or pairs): tokens -> loss of a run of that many tokens, decayed at its end. At least
            two rungs, in any order; the loss falls from each rung to the next.
        loss (`float`): the loss to reach, in the ladder's unit (nats per token).

    Returns:
        `Bounded`: the tokens; `<=` the first rung where the loss lies above it, `>=` the last where it lies below.
        Nothing is extrapolated.

    Raises:
        WarmstartError: fewer than two rungs, tokens that are not positive, numbers that are not finite, a budget twice, or
            a loss that does not fall. Where more tokens gave no lower loss, the rungs are closer than the noise, or a run
            diverged or over-fitted: no single number of tokens belongs to a loss.

    Example:

        >>> ladder = {1e6: 3.0, 4e6: 2.0}
        >>> print(tokens_to_loss(ladder, 2.5), "|", tokens_to_loss(ladder, 1.9))
        2e+06 | >= 4e+06

    Source: the speed-up of arXiv 2405.15319 (tokens that scratch needs for the same loss), there read off one run's
    curve; here every point is a decayed run of its own.
    """
    tokens, losses = _rungs(ladder)
    if not math.isfinite(loss):
        raise WarmstartError(f"The loss to reach is {loss!r}. Pass a finite number.")
    if loss > losses[0]:
        return Bounded(tokens[0], AT_MOST)
    if loss < losses[-1]:
        return Bounded(tokens[-1], AT_LEAST)
    upper = max(1, bisect_left(losses, -loss, key=lambda value: -value))
    share = (losses[upper - 1] - loss) / (losses[upper - 1] - losses[upper])
    return Bounded(_between(tokens[upper - 1], tokens[upper], share))


def loss_at_tokens(ladder: Ladder, tokens: float) -> Bounded:
    """The loss that a method has after a number of tokens, by its ladder: the inverse of `tokens_to_loss`.

    Args:
        ladder (`dict[float, float]` or pairs): as for `tokens_to_loss`.
        tokens (`float`): a positive number of tokens.

    Returns:
        `Bounded`: the loss; `>=` the first rung's loss for fewer tokens, `<=` the last rung's for more.

    Raises:
        WarmstartError: as for `tokens_to_loss`.

    Example:

        >>> print(loss_at_tokens({1e6: 3.0, 4e6: 2.0}, 2e6))
        2.5
    """
    budgets, losses = _rungs(ladder)
    if not (math.isfinite(tokens) and tokens > 0):
        raise WarmstartError(f"tokens={tokens!r} must be a positive finite number.")
    if tokens < budgets[0]:
        return Bounded(losses[0], AT_LEAST)
    if tokens > budgets[-1]:
        return Bounded(losses[-1], AT_MOST)
    upper = max(1, bisect_left(budgets, tokens))
    share = math.log(tokens / budgets[upper - 1]) / math.log(budgets[upper] / budgets[upper - 1])
    return Bounded(losses[upper - 1] + share * (losses[upper] - losses[upper - 1]))


def speedup(
    equivalent_tokens: Bounded, flops_per_token: float, arm_flops: float, *, base_flops: float = 0.0
) -> Bounded:
    """How many times less compute an arm took than scratch needs for the arm's loss.

        speed-up = D_scratch * f / (F_arm + F_base)

    Args:
        equivalent_tokens (`Bounded`): D_scratch, from `tokens_to_loss(scratch_ladder, arm_loss)`.
        flops_per_token (`float`): f, training FLOPs of scratch's model per token.
        arm_flops (`float`): F_arm, FLOPs of the arm since the growth.
        base_flops (`float`, defaults to 0): F_base, FLOPs of the base's own training; 0 takes the base as given.

    Returns:
        `Bounded`: the factor, with the bound that the tokens carry. Above 1 the arm was cheaper.

    Raises:
        WarmstartError: FLOPs that are not positive and finite (`base_flops` may be 0).

    Example:

        >>> print(speedup(Bounded(3e6), 10.0, 2e7), speedup(Bounded(3e6), 10.0, 2e7, base_flops=1e7))
        1.5 1
    """
    wrong = [
        f"{name}={value!r}"
        for name, value in (("flops_per_token", flops_per_token), ("arm_flops", arm_flops))
        if not (math.isfinite(value) and value > 0)
    ]
    if not (math.isfinite(base_flops) and base_flops >= 0):
        wrong.append(f"base_flops={base_flops!r}")
    if wrong:
        raise WarmstartError(f"FLOPs must be positive and finite, got {', '.join(wrong)}.")
    return equivalent_tokens.times(flops_per_token / (arm_flops + base_flops))


def _between(low: float, high: float, share: float) -> float:
    """Geometric interpolation, exact at both ends."""
    if share in (0.0, 1.0):
        return high if share else low
    return low * (high / low) ** share


def _rungs(ladder: Ladder) -> tuple[list[float], list[float]]:
    """A ladder's tokens and losses in order of tokens, checked."""
    rungs = sorted(ladder.items() if isinstance(ladder, Mapping) else ladder)
    problems = [
        f"{tokens:g} tokens with loss {loss!r}: both must be finite, and the tokens positive"
        for tokens, loss in rungs
        if not (math.isfinite(tokens) and math.isfinite(loss) and tokens > 0)
    ]
    if problems:
        raise WarmstartError("A ladder with impossible rungs: " + "; ".join(problems) + ".")
    if len(rungs) < 2:
        raise WarmstartError(
            f"A ladder needs at least two rungs, got {len(rungs)}. Run the method at one more token budget, decayed."
        )
    flat = [
        f"{before[1]:.6g} at {before[0]:g} tokens, {after[1]:.6g} at {after[0]:g}"
        for before, after in pairwise(rungs)
        if not (before[0] < after[0] and before[1] > after[1])
    ]
    if flat:
        raise WarmstartError(
            "On a ladder the loss must fall from each budget to the next, got " + "; ".join(flat) + ". Put the rungs "
            "further apart, evaluate on more text, or leave the faulty run out."
        )
    return [tokens for tokens, _ in rungs], [loss for _, loss in rungs]
