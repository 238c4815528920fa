"""What a study's runs say: the table of runs, and every arm beside scratch, beside its base trained on, and at equal FLOPs.

Scratch is, for each seed and budget, the better of the run with its own tuned rate and the one with the rate that muP carries
over from the base. Every comparison is within a seed; intervals are Student's, over seeds, of differences or of logarithms of
ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pandas as pd

from benchmarks.intervals import interval
from hf_warmstart import WarmstartError
from hf_warmstart.scaling.growing.growth_runs import CONTINUE
from hf_warmstart.scaling.growing.growth_runs import SCRATCH as FROM_SCRATCH
from hf_warmstart.scaling.growing.tokens_to_loss import (
    AT_LEAST,
    AT_MOST,
    EXACT,
    Bounded,
    loss_at_tokens,
    speedup,
    tokens_to_loss,
)

from .jobs import BASE, CONTROL, GROWN, SCRATCH, TRANSFERRED
from .running import Study

METHODS = {SCRATCH: FROM_SCRATCH, TRANSFERRED: FROM_SCRATCH, BASE: FROM_SCRATCH, CONTROL: CONTINUE}
NEAR = {2: (1.5, 2.75), 4: (2.75, 6.0), 8: (6.0, 12.0)}  # growth factors that count as near a power of two


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval.

    Args:
        mean. low, high: None where there is one seed only. seeds: how many. relation: `=`; `>=` or `<=` where some of the
            numbers are only known to lie beyond what was run.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    relation: str = EXACT

    @classmethod
    def of(cls, values: Iterable[float], relation: str = EXACT) -> Interval:
        """Of numbers, one for each seed."""
        made = interval(list(values))
        return cls(made["mean"], made["low"], made["high"], made["seeds"], relation)

    def map(self, function: Callable[[float], float]) -> Interval:
        """Through a rising function."""
        low, high = (None if x is None else function(x) for x in (self.low, self.high))
        return Interval(function(self.mean), low, high, self.seeds, self.relation)

    def text(self, form: str = "{:.3f}") -> str:
        """For a table."""
        sign = "" if self.relation == EXACT else f"{self.relation} "
        if self.low is None or self.high is None:
            return sign + form.format(self.mean)
        return f"{sign}{form.format(self.mean)} ({form.format(self.low)} to {form.format(self.high)})"


@dataclass(frozen=True)
class Cell:
    """One arm at one budget, over its seeds.

    Args:
        target, base, method: which arm. growth_factor: g. rung: its nominal tokens per parameter. each: the true ones.
        rate_factor: on the learning rate, as tuned. losses: by seed, nats per token. ratios: ln(loss / scratch's).
        speedups: tokens that scratch needs for the loss, over the arm's own. with_base: the same in FLOPs, with the base's
            counted. equal_flops: loss less that of scratch with the FLOPs of arm and base together. control: loss less that
            of the base trained on for the arm's FLOPs. All by seed, without those that cannot be told.
    """

    target: str
    base: str
    method: str
    growth_factor: float
    rung: float
    each: float
    rate_factor: float
    losses: Mapping[int, float]
    ratios: Mapping[int, float]
    speedups: Mapping[int, Bounded]
    with_base: Mapping[int, Bounded]
    equal_flops: Mapping[int, Bounded]
    control: Mapping[int, float]

    @property
    def near(self) -> int | None:
        """The power of two that g is near."""
        return next((k for k, (low, high) in NEAR.items() if low <= self.growth_factor < high), None)

    @property
    def change(self) -> Interval | None:
        """Loss over scratch's, less one."""
        return Interval.of(self.ratios.values()).map(math.expm1) if self.ratios else None

    @property
    def speedup(self) -> Interval | None:
        """Of tokens."""
        return geometric(self.speedups.values())

    @property
    def speedup_with_base(self) -> Interval | None:
        """Of FLOPs, the base's counted."""
        return geometric(self.with_base.values())

    @property
    def at_equal_flops(self) -> Interval | None:
        """Loss less scratch's at equal total FLOPs; at least so much where scratch's ladder ends before."""
        if not self.equal_flops:
            return None
        return Interval.of((b.value for b in self.equal_flops.values()), relation(self.equal_flops.values()))

    @property
    def against_control(self) -> Interval | None:
        """Loss less that of the base trained on."""
        return Interval.of(self.control.values()) if self.control else None


def relation(bounds: Iterable[Bounded]) -> str:
    """What a mean of numbers, some of them bounds, is; where bounds point both ways nothing is said by it."""
    found = {bound.relation for bound in bounds} - {EXACT}
    return found.pop() if len(found) == 1 else EXACT if not found else "?"


def geometric(bounds: Iterable[Bounded]) -> Interval | None:
    """Geometric mean of positive numbers."""
    kept = list(bounds)
    if not kept:
        return None
    return Interval.of((math.log(b.value) for b in kept), relation(kept)).map(math.exp)


def runs_of(study: Study) -> pd.DataFrame:
    """The table of runs, one row for each decayed end; trials are not in it. `advise_growth(laws=...)` reads it."""
    rows = []
    for job in study.jobs:
        made = study.record(job.name)
        if made is None or job.is_trial or job.seed == study.setting.tuning_seed:
            continue
        f = study.flops_per_token[made["size"]]
        seen = made["base_tokens"]
        for row in made["rows"]:
            base_flops = seen * study.flops_per_token[job.base] if seen and job.base else 0.0
            rows.append(
                {
                    "method": METHODS.get(job.kind, job.method),
                    "params": made["params"],
                    "tokens": row["tokens"],
                    "loss": row["loss"],
                    "base_params": study.setting.params[job.base] if job.kind == GROWN and job.base else None,
                    "base_tokens": seen,
                    "seed": job.seed,
                    "kind": job.kind,
                    "target": job.target,
                    "base": job.base if job.kind != TRANSFERRED else None,
                    "rung": row["rung"],
                    "tokens_per_parameter": row["tokens"] / made["params"],
                    "learning_rate": made["learning_rate"],
                    "rate_factor": made["rate_factor"],
                    "flops": row["tokens"] * f,
                    "base_flops": base_flops,
                    "epochs": (row["tokens"] + (seen or 0)) / study.text.tokens,
                }
            )
    if not rows:
        raise WarmstartError(f"{study.folder} has no finished runs of a reported seed yet.")
    return pd.DataFrame(rows)


def scratch_ladder(runs: pd.DataFrame, target: str, seed: int) -> dict[float, float]:
    """tokens -> the better of scratch's losses, for one seed."""
    own = runs[runs["kind"].isin([SCRATCH, TRANSFERRED]) & (runs["target"] == target) & (runs["seed"] == seed)]
    return own.dropna(subset="loss").groupby("tokens")["loss"].min().to_dict()


def cells_of(study: Study, runs: pd.DataFrame) -> list[Cell]:
    """Every arm at every budget, in the order of arms and budgets."""
    found = []
    grown = runs[(runs["kind"] == GROWN) & runs["loss"].notna()]
    for (target, base, method, rung), own in grown.groupby(["target", "base", "method", "rung"], sort=False):
        parts = _parts(study, runs, own, target, base, rung)
        first = own.iloc[0]
        found.append(
            Cell(
                target, base, method, study.setting.growth_factor(target, base), rung,
                float(first["tokens_per_parameter"]), float(first["rate_factor"]),
                {int(run.seed): run.loss for run in own.itertuples()}, *parts,
            )
        )  # fmt: skip
    return found


def _parts(study: Study, runs: pd.DataFrame, own: pd.DataFrame, target: str, base: str, rung: float) -> list[dict]:
    """By seed: ratios, speed-ups without and with the base, losses against equal FLOPs and against the base trained on."""
    ratios, speedups, with_base, equal, control = ({} for _ in range(5))
    f = study.flops_per_token[target]
    beside = runs[(runs["kind"] == CONTROL) & (runs["target"] == target) & (runs["base"] == base)]
    beside = beside[(beside["rung"] == rung) & beside["loss"].notna()].set_index("seed")["loss"]
    for run in own.itertuples():
        seed, ladder = int(run.seed), scratch_ladder(runs, target, int(run.seed))
        if run.tokens in ladder:
            ratios[seed] = math.log(run.loss / ladder[run.tokens])
        if seed in beside.index:
            control[seed] = run.loss - float(beside[seed])
        try:
            needed = tokens_to_loss(ladder, run.loss)
            level = loss_at_tokens(ladder, (run.flops + run.base_flops) / f)
        except WarmstartError:  # a ladder of one rung, or one that does not fall
            continue
        speedups[seed] = speedup(needed, f, run.flops)
        with_base[seed] = speedup(needed, f, run.flops, base_flops=run.base_flops)
        turned = {EXACT: EXACT, AT_LEAST: AT_MOST, AT_MOST: AT_LEAST}[level.relation]
        equal[seed] = Bounded(run.loss - level.value, turned)
    return [ratios, speedups, with_base, equal, control]


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Interval | None:
    """First less second, over the seeds that both have."""
    common = sorted(set(first) & set(second))
    return Interval.of(first[seed] - second[seed] for seed in common) if common else None
