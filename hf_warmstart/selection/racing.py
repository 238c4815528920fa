"""A race: candidates run on while it is open who ends first, judged by curves alone. No model is run here.

What short runs show is where candidates are, and what is asked is where they end: one that was damaged recovers, one that
learns faster overtakes. So

- at each doubling of the steps those are dropped that are *left behind*: there is another one that they are behind of, by as
  much as at half the steps or more. Whoever is still catching up with all that are ahead stays, however far behind it is.
  What is saved makes the run of the others longer, and nothing tells the end as well as a longer run.
- at the end each distance g to the leader is taken on to the end of the planned run, over the share c of the planned run's
  learning rates that is used up (their sum so far over that of the whole run, so that the decay to come counts for the
  little that it moves):

      g(c) = a + b (1 - c^-alpha) / alpha,  alpha >= 0      c over today's, a: the distance now;  alpha -> 0: a + b log c

  fitted by least squares over the last two doublings of the steps. It is a power law that comes to rest, as of a damage that
  heals, and at its other end the straight line in log c.

Both have nothing to be tuned. How often they choose well is measured in `docs/selection.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import minimize_scalar

from .outcomes import final_loss

Curve = Sequence[Sequence[float]]
MOST_BENT = 2.0  # largest alpha: all but a step; what bends more has come to rest
DOUBLINGS = 2  # of the steps, that are fitted


def left_behind(curves: Mapping[str, Curve]) -> list[str]:
    """Who is behind of another one and not catching up with it.

    Args:
        curves: (step, loss) of each candidate from step 0, all to the same last step t, which are compared at t / 2 and t.

    Returns:
        Names in the curves' order; never all of them.
    """
    last = next(iter(curves.values()))[-1][0]
    losses = {name: np.interp([last / 2, last], *np.transpose(rows)) for name, rows in curves.items()}
    found = []
    for name, (middle, end) in losses.items():
        others = [losses[other] for other in curves if other != name]
        if any(end > theirs and end - theirs >= middle - before for before, theirs in others):
            found.append(name)
    return found


def extrapolated(curves: Mapping[str, Curve], used: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Losses of short runs, with the candidates' distances as they would be at the end of the planned run.

    Args:
        curves: (step, loss) of each candidate from step 0, on the same batches, to the same last step.
        used: of each candidate, step -> share of the planned run's learning rates that is used up, 1 at its end.

    Returns:
        The leader's loss at the last step and, for each candidate, that and its distance at the end.
    """
    leader = min(curves, key=lambda name: (final_loss(curves[name]), name))
    ahead = {row[0]: row[1] for row in curves[leader]}
    last, found = curves[leader][-1][0], {}
    for name, rows in curves.items():
        fitted = [(step, loss - ahead[step]) for step, loss in rows if step >= last / 2**DOUBLINGS and step > 0]
        shares = [used[name][int(step)] for step, _ in fitted]
        found[name] = final_loss(curves[leader]) + distance_at_end(shares, [gap for _, gap in fitted])
    return found


def distance_at_end(shares: Sequence[float], distances: Sequence[float]) -> float:
    """A distance at share 1, from what it was at smaller ones: the formula above.

    Args:
        shares: rising, above 0. distances: as many. Of fewer than three, or where the plan is done, the last is returned.
    """
    if len(shares) < 3 or shares[-1] >= 1 or min(shares) <= 0:
        return float(distances[-1])
    places, gaps = np.log(np.array(shares) / shares[-1]), np.array(distances)

    def basis(alpha: float, at: np.ndarray | float) -> np.ndarray:
        return -np.expm1(-alpha * np.asarray(at)) / alpha if alpha > 0 else np.asarray(at, float)

    def fit(alpha: float) -> tuple[np.ndarray, float]:
        columns = np.stack([np.ones_like(places), basis(alpha, places)], axis=1)
        weights = np.linalg.lstsq(columns, gaps, rcond=None)[0]
        return weights, float(np.sum((columns @ weights - gaps) ** 2))

    bent = minimize_scalar(lambda alpha: fit(alpha)[1], bounds=(1e-6, MOST_BENT), method="bounded").x
    alpha = min((0.0, float(bent)), key=lambda value: fit(value)[1])
    now, slope = fit(alpha)[0]
    return float(now + slope * basis(alpha, np.log(1 / shares[-1])))
