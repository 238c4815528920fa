"""Runs of a growth study, and their pairs: a grown run beside the best run from scratch of its size, budget and seed.

A table of runs has one row for each run that was decayed at its own end:

| column | |
|---|---|
| `method` | `scratch`, or a name of how it was grown; `continue` for a base trained further, which is in no pair |
| `params` | parameters of the model, counted in one way for all rows (arXiv 2605.13405 counts all) |
| `tokens` | tokens of training since the model was made: of a grown one, since the growth |
| `loss` | held-out loss after them, nats per token |
| `base_params` | of a grown run: parameters of what was grown |
| `base_tokens` | optional: tokens that the base had seen |
| `seed` | optional: runs of one seed are paired |

Other columns (learning rate, batch, operator) do not matter here: where rows differ in nothing else, the lowest loss is
taken, of scratch as of the grown, so that each stands with its best settings. A comparison with a run from scratch whose
rate was not tuned is the easiest way to see a gain that is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import WarmstartError
from ..tables.run_sources import read_table
from .tokens_to_loss import Bounded, tokens_to_loss

if TYPE_CHECKING:
    import pandas

SCRATCH, CONTINUE = "scratch", "continue"
NEEDED = ("method", "params", "tokens", "loss")
SAME_BUDGET = 0.02  # budgets within 2 % count as one: steps are whole numbers


@dataclass(frozen=True)
class Pair:
    """A grown run and the best run from scratch at its size, budget and seed.

    Args:
        method: how it was grown. params: N. base_params: of what was grown. tokens: D, since the growth.
        loss: of the grown run. scratch_loss: of the other; nats per token.
        seed: of both; None where the table has none. base_tokens: that the base had seen; None where not known.
    """

    method: str
    params: float
    base_params: float
    tokens: float
    loss: float
    scratch_loss: float
    seed: Any = None
    base_tokens: float | None = None

    @property
    def growth_factor(self) -> float:
        """g = N / base_params."""
        return self.params / self.base_params

    @property
    def tokens_per_parameter(self) -> float:
        """r = D / N."""
        return self.tokens / self.params

    @property
    def ratio(self) -> float:
        """Loss of the grown run over that from scratch: below 1 the growth helped."""
        return self.loss / self.scratch_loss


def read_runs(runs: Any) -> pandas.DataFrame:
    """A table of runs, checked.

    Args:
        runs: whatever `run_sources` reads: a file, a `pandas.DataFrame`, a `datasets.Dataset`, or rows as dicts.

    Returns:
        `pandas.DataFrame` with the module's columns; rows without a finite loss (diverged runs) are left out.

    Raises:
        WarmstartError: it cannot be read; columns are missing; numbers that cannot be; all that was found.
    """
    import pandas

    frame = read_table(runs)
    if missing := [name for name in NEEDED if name not in frame]:
        raise WarmstartError(
            f"A table of runs needs the columns {list(NEEDED)}; {missing} are missing. It has {sorted(map(str, frame))}."
        )
    for name in ("base_params", "base_tokens", "seed"):
        if name not in frame:
            frame[name] = None
    problems = []
    for name in ("params", "tokens", "loss", "base_params", "base_tokens"):
        given = frame[name]
        frame[name] = pandas.to_numeric(given, errors="coerce")
        words = given[frame[name].isna() & given.notna()]
        problems += [f"row {row}: {name}={value!r} is no number" for row, value in words.items()]
    frame = frame[frame["loss"].notna() & frame["loss"].abs().lt(math.inf)]
    grown = ~frame["method"].isin([SCRATCH, CONTINUE])
    for name, rows in {"params": frame, "tokens": frame, "loss": frame, "base_params": frame[grown]}.items():
        wrong = rows[~(rows[name] > 0)]
        problems += [f"row {row}: {name}={value!r} must be positive" for row, value in wrong[name].items()]
    smaller = frame[grown & (frame["params"] < frame["base_params"])]
    problems += [
        f"row {row}: params={run.params:g} is smaller than base_params={run.base_params:g}"
        for row, run in smaller.iterrows()
    ]
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise WarmstartError(f"The table of runs cannot be used: {'; '.join(problems[:10])}{more}.")
    return frame.reset_index(drop=True)


def pairs_of(runs: pandas.DataFrame, method: str | None = None) -> list[Pair]:
    """The pairs in a table of runs.

    Args:
        runs: from `read_runs`. method: of these grown runs only; all by default.

    Raises:
        WarmstartError: no grown run has a run from scratch beside it; the message says at which sizes and budgets.
    """
    scratch = runs[runs["method"] == SCRATCH]
    grown = runs[~runs["method"].isin([SCRATCH, CONTINUE])]
    if method is not None:
        if method not in set(grown["method"]):
            raise WarmstartError(f"No runs of method {method!r}; the table has {sorted(set(grown['method']))}.")
        grown = grown[grown["method"] == method]
    ladders: dict[float, list[tuple[float, Any, float]]] = {}
    for params, tokens, seed, loss in scratch[["params", "tokens", "seed", "loss"]].itertuples(index=False):
        ladders.setdefault(params, []).append((tokens, _known(seed), loss))
    best: dict[tuple, float] = {}
    keys = ["method", "params", "base_params", "tokens", "seed", "base_tokens", "loss"]
    for *key, loss in grown[keys].itertuples(index=False):
        what = tuple(map(_known, key))
        best[what] = min(loss, best.get(what, math.inf))
    pairs, alone = [], []
    for (name, params, base, tokens, seed, seen), loss in best.items():
        by_seed: dict[Any, float] = {}
        for budget, other, found in ladders.get(params, []):
            if abs(budget / tokens - 1) < SAME_BUDGET:
                by_seed[other] = min(found, by_seed.get(other, math.inf))
        if not by_seed:
            alone.append(f"{params:g} parameters and {tokens:g} tokens")
            continue
        # Without the same seed, the best settings' mean over seeds is what one more run would come near.
        beside = by_seed.get(seed, sum(by_seed.values()) / len(by_seed))
        pairs.append(
            Pair(str(name), float(params), float(base), float(tokens), float(loss), float(beside), seed, seen)
        )
    if not pairs:
        where = f" None was run from scratch with {'; '.join(sorted(set(alone))[:6])}." if alone else ""
        raise WarmstartError(
            f"No grown run has a run from scratch of the same size and budget beside it.{where} Add rows with method='scratch'."
        )
    return pairs


def _known(value: Any) -> Any:
    """A cell of a table; None where it is empty."""
    return None if value is None or value != value else value


def equal_loss_tokens(runs: pandas.DataFrame) -> list[dict[str, Any]]:
    """For each grown run, the tokens that scratch needs for its loss, by scratch's ladder at that size and seed.

    Returns:
        Rows with `method`, `params`, `base_params`, `tokens`, `seed`, `equal_loss_tokens` (`Bounded`: nothing is extrapolated)
        and `speedup` (`Bounded`), those tokens over the run's own: the base's cost is not in it. Grown runs without a
        ladder of at least two budgets, or with one that does not fall, are left out.
    """
    found = []
    scratch = runs[runs["method"] == SCRATCH]
    for pair in pairs_of(runs):
        own = scratch[scratch["params"] == pair.params]
        if pair.seed is not None:
            own = own[own["seed"] == pair.seed]
        try:
            needed = tokens_to_loss(own.groupby("tokens")["loss"].min().to_dict(), pair.loss)
        except WarmstartError:
            continue
        found.append(
            {
                "method": pair.method,
                "params": pair.params,
                "base_params": pair.base_params,
                "tokens": pair.tokens,
                "seed": pair.seed,
                "equal_loss_tokens": needed,
                "speedup": Bounded(needed.value / pair.tokens, needed.relation),
            }
        )
    return found
