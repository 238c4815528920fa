"""Is the advice right on cells that the laws were not fitted to?

A cell is a target, a budget and a method of growing. All runs of that target at that budget are left out, grown ones and
those from scratch; `advise_growth` then chooses among the bases that were run and scratch. The regret is the mean loss of
what it chose over that of the best choice, less one.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from hf_warmstart import WarmstartError, advise_growth
from hf_warmstart.scaling.growing.growth_laws import GrowthLaws
from hf_warmstart.scaling.growing.growth_runs import CONTINUE
from hf_warmstart.scaling.growing.growth_runs import SCRATCH as FROM_SCRATCH

from .jobs import GROWN, SCRATCH, TRANSFERRED

GOOD = 0.002  # of the loss
DRAWS = 100


@dataclass(frozen=True)
class Choice:
    """What was advised on a held-out cell.

    Args:
        target, method, rung: the cell. advised: a growth factor, 1 for scratch; None where nothing could be. best: the best.
        regret: of the advised. reason: why there was none.
    """

    target: str
    method: str
    rung: float
    advised: float | None
    best: float
    regret: float | None
    reason: str = ""

    @property
    def good(self) -> bool:
        """Whether it is as good as the best, within 0.2 %."""
        return self.regret is not None and self.regret <= GOOD


def check_advice(runs: pd.DataFrame, methods: tuple[str, ...]) -> list[Choice]:
    """Leave out every cell in turn.

    Args:
        runs: of the study. methods: those whose cells are checked.
    """
    found = []
    for target in runs.loc[runs["kind"] == GROWN, "target"].unique():
        own = runs[(runs["target"] == target) & runs["kind"].isin([GROWN, SCRATCH, TRANSFERRED])]
        for method in methods:
            for rung in sorted(own.loc[own["method"] == method, "rung"].unique()):
                losses = _losses(own, method, rung)
                if len(losses) > 1 and 1.0 in losses:
                    kept = runs.drop(own[own["rung"] == rung].index)
                    found.append(_check(kept, own, target, method, rung, losses))
    return found


def _losses(own: pd.DataFrame, method: str, rung: float) -> dict[float, float]:
    """g -> mean loss over seeds, scratch at 1: for each seed the better of its runs."""
    cell = own[(own["rung"] == rung) & own["method"].isin([method, FROM_SCRATCH])].copy()
    cell["g"] = (cell["params"] / cell["base_params"]).fillna(1.0)
    best = cell.dropna(subset="loss").groupby(["g", "seed"])["loss"].min().unstack("g").dropna()
    return best.mean().to_dict() if len(best) else {}


def _check(
    kept: pd.DataFrame, own: pd.DataFrame, target: str, method: str, rung: float, losses: dict[float, float]
) -> Choice:
    best = min(losses, key=lambda g: losses[g])
    params = float(own["params"].iloc[0])
    tokens = float(own.loc[own["rung"] == rung, "tokens"].iloc[0])
    try:
        fitted = GrowthLaws.fit(kept[kept["method"].isin([method, FROM_SCRATCH, CONTINUE])], draws=DRAWS)
        family = [params / g for g in losses if g > 1]
        advice = advise_growth(params, tokens, family=family, laws=fitted, method=method)
    except WarmstartError as fault:
        return Choice(target, method, rung, None, best, None, str(fault))
    chosen = 1.0 if advice.advice == "scratch" else min(losses, key=lambda g: abs(g - advice.growth_factor))
    return Choice(target, method, rung, chosen, best, losses[chosen] / losses[best] - 1)
