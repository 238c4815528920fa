"""The laws behind growth advice: the gain of each method on scratch, and the losses of scratch and grown runs themselves.

`L(N, D)` of scratch turns a gain into tokens, and compares sizes. It is fitted as every law of loss here (`laws`), where the
runs tell it; constants that they do not tell are named, since digits of them would mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import WarmstartError
from ..fits.laws import LossLaw, interval
from .gain_law import DRAWS, LEVEL_WIDTH, SPREAD, GainLaw, fit_gain, levels
from .growth_runs import CONTINUE, SCRATCH, pairs_of, read_runs


@dataclass(frozen=True)
class GrowthLaws:
    """What advice rests on: the gain of each method on scratch, and scratch's own loss.

    Args:
        gains: method -> `GainLaw`.
        scratch (`LossLaw`, *optional*): of scratch, over parameters and tokens, or over compute where one size was run;
            None where the runs tell neither.
        notes: what could not be fitted, and why.
        source: where the runs are from.
        base_tokens_per_parameter (`float`, *optional*): what bases are taken to have seen where nothing is said.
        scratch_error (`float`): root mean square of `ln(loss / law)` over the runs from scratch: what the law's losses, and
            with them comparisons of sizes, are good for.
    """

    gains: Mapping[str, GainLaw]
    scratch: LossLaw | None
    notes: tuple[str, ...] = ()
    source: str = "own runs"
    base_tokens_per_parameter: float | None = None
    scratch_error: float = 0.0

    @classmethod
    def fit(cls, runs: Any, *, draws: int = DRAWS, seed: int = 0, source: str = "own runs") -> GrowthLaws:
        """Fit the laws to a table of runs.

        Args:
            runs: a table as `growth_runs` says: a path, a `DataFrame`, a `Dataset` or rows as dicts.
            draws (`int`, defaults to 400): of each bootstrap. seed (`int`, defaults to 0): of the draws.
            source (`str`): where the runs are from, for warnings.

        Raises:
            WarmstartError: the table cannot be used, or no grown run has one from scratch beside it.
        """
        table = read_runs(runs)
        pairs = pairs_of(table)
        notes: list[str] = []
        gains = {}
        for method in sorted({pair.method for pair in pairs}):
            try:
                gains[method] = fit_gain(
                    [p for p in pairs if p.method == method], draws=draws, seed=seed, source=source
                )
            except WarmstartError as fault:
                notes.append(f"{method}: {fault}")
        if not gains:
            raise WarmstartError("; ".join(notes))
        scratch, note = _loss_law(_best_runs(table, SCRATCH), draws, seed)
        if note:
            notes.append(f"L(N, D) of scratch: {note}")
        seen = [p.base_tokens / p.base_params for p in pairs if p.base_tokens is not None]
        return cls(
            gains,
            scratch,
            tuple(notes),
            source,
            float(np.median(seen)) if seen else None,
            0.0 if scratch is None else error_of(scratch, table),
        )

    def gain(self, method: str | None = None) -> GainLaw:
        """The law of a method; by default of the one that gains most on scratch over the budgets of its runs.

        Raises:
            WarmstartError: there is no such method.
        """
        if method is None:
            return min(self.gains.values(), key=_best_change)
        if method not in self.gains:
            raise WarmstartError(f"No law of method {method!r}; there are laws of {sorted(self.gains)}.")
        return self.gains[method]

    def scratch_loss(self, params: float, tokens: float) -> float | None:
        """Scratch's loss, nats per token; None where there is no law."""
        return None if self.scratch is None else float(self.scratch(**_point(self.scratch, params, tokens)))

    def equal_loss_tokens(self, params: float, loss: float) -> float | None:
        """The tokens that scratch needs for a loss at a size: infinite below what it reaches; None where there is no law."""
        if self.scratch is None:
            return None
        fixed = {"params": params} if self.scratch.form == "params_tokens" else {}
        try:
            found = self.scratch.inverse(loss, **fixed)
        except WarmstartError:
            return math.inf
        return found if fixed else found / (6 * params)

    @property
    def compares_sizes(self) -> bool:
        """Whether scratch's law holds for more than one size."""
        return self.scratch is not None and self.scratch.form == "params_tokens"


@dataclass(frozen=True)
class LossOfMethod:
    """The law `L(N, D)` of one method at one growth factor.

    Args:
        method: how the runs were grown, or `scratch`. growth_factor: of all of them, within a tenth; 1 for scratch.
        law (`LossLaw`, *optional*): over parameters and tokens of the target; None where the runs tell none.
        note: which of its constants they do not tell, or why there is none.
    """

    method: str
    growth_factor: float
    law: LossLaw | None
    note: str = ""


def fit_loss_laws(runs: Any, *, draws: int = DRAWS, seed: int = 0) -> list[LossOfMethod]:
    """Fit the law of loss of each method at each growth factor, and of scratch.

    Where the laws of a method and of scratch cross, the one is no better than the other: how arXiv 2605.13405 tells when to
    grow. Each has five constants of its own, so that it takes many runs; `GainLaw` takes fewer.

    Args:
        runs: a table as `growth_runs` says. draws, seed: of the bootstrap of points.

    Returns:
        One for each, scratch first.

    Raises:
        WarmstartError: the table cannot be used.
    """
    table = read_runs(runs)
    found = [LossOfMethod(SCRATCH, 1.0, *_loss_law(_best_runs(table, SCRATCH), draws, seed))]
    grown = table[~table["method"].isin([SCRATCH, CONTINUE])]
    factors = grown["params"] / grown["base_params"]
    for method in sorted(set(grown["method"])):
        own = grown["method"] == method
        for level in levels(factors[own].to_numpy()):
            rows = grown[own & (factors >= level * 0.999) & (factors <= LEVEL_WIDTH * level)]
            found.append(LossOfMethod(method, level, *_loss_law(_best_runs(rows, method), draws, seed)))
    return found


def error_of(law: LossLaw, runs: Any) -> float:
    """Root mean square of `ln(loss / law)` over the best run from scratch of each size and budget in a table."""
    rows = _best_runs(runs, SCRATCH)
    predicted = law(**_point(law, rows["params"].to_numpy(), rows["tokens"].to_numpy()))
    return float(np.sqrt((np.log(rows["loss"].to_numpy() / predicted) ** 2).mean()))


def _best_runs(runs: Any, method: str) -> Any:
    """The lowest loss of a method at each size and budget."""
    return runs[runs["method"] == method].groupby(["params", "tokens"])["loss"].min().reset_index()


def _best_change(law: GainLaw) -> float:
    """The least ln(ratio) of a law at the middle of its budgets, over the growth factors of its runs."""
    low, high = law.ranges["tokens_per_parameter"]
    factors = np.geomspace(*law.ranges["growth_factor"], 20)
    return min(law.log_ratio(g, math.sqrt(low * high)) for g in factors)


def _point(law: LossLaw, params: Any, tokens: Any) -> dict[str, Any]:
    return {"compute": 6 * params * tokens} if law.form == "compute" else {"params": params, "tokens": tokens}


def _loss_law(rows: Any, draws: int, seed: int) -> tuple[LossLaw | None, str]:
    """A law of the lowest losses by size and budget; over compute where there is one size. None and why, where none is told."""
    sizes = rows["params"].nunique()
    needed = 5 if sizes > 1 else 3
    if len(rows) < needed:
        return None, f"{len(rows)} sizes and budgets, at least {needed} are needed"
    at = (
        {"params": rows["params"].to_numpy(), "tokens": rows["tokens"].to_numpy()}
        if sizes > 1
        else {"compute": 6 * rows["params"].to_numpy() * rows["tokens"].to_numpy()}
    )
    try:
        law = LossLaw.fit(rows["loss"].to_numpy(), draws=draws, seed=seed, **at)
    except WarmstartError as fault:
        return None, str(fault)
    return law, ill_conditioned(law)


def ill_conditioned(law: LossLaw) -> str:
    """Which constants of a law its draws do not tell, in words; empty where they tell all."""
    if law.draws is None or len(law.draws) < 20:
        return "no draws, so that its constants have no intervals"
    names = ["E", *(f"{kind} of {name}" for name in law.variables for kind in ("amplitude", "exponent"))]
    logs = [
        law.draws[:, 0],
        *(law.draws[:, k] if k % 2 else np.log(law.draws[:, k]) for k in range(1, law.draws.shape[1])),
    ]
    loose = [name for name, column in zip(names, logs, strict=True) if np.ptp(interval(column)) > math.log(SPREAD)]
    return (
        f"ill-conditioned: {', '.join(loose)} not told by the runs; only its predictions within their range are"
        if loose
        else ""
    )
