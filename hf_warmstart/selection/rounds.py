"""`Selection`: the rounds of a selection, and `Progress`: what they have found.

A checked selection runs in two parts: all candidates to the end of their probe, then rounds of continuations over those
that the budget affords, the worse half dropped after each. Every decision is made from results on disk.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from .halving import LEAST_REPEATS, affordable, half, leader_is_clear, ordered
from .outcomes import outcomes
from .regimes import matched_steps
from .report import SelectionReport, make_report
from .run import Runner
from .study import Study


@dataclass
class Selection:
    """A checked selection that has not begun.

    Args:
        study: what its arms share. budget: in FLOPs; None for no limit. match, objective, repeats: as asked.
        refused: candidates of the pool that the model does not admit, with the reason. notes: what was said beforehand.
    """

    study: Study
    budget: float | None
    match: str
    objective: str
    repeats: int
    refused: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def least_repeats(self) -> int:
        """Repeats before a leader can be clear."""
        return min(LEAST_REPEATS, self.repeats)

    @property
    def probes_flops(self) -> float:
        """What the probes cost."""
        study = self.study
        return sum(study.arm_flops(name, 0, study.probe_steps, True) for name in study.candidates)

    @property
    def planned_flops(self) -> float:
        """What the planned run costs with the dearest candidate, its evaluations apart."""
        return self.study.planned_steps * max(self.study.step_flops(name) for name in self.study.candidates)

    def run(self) -> SelectionReport:
        """Run what is missing, and report."""
        study = self.study
        study.claim_folder()
        total = self._most_steps()
        with tqdm(total=total, unit="step", desc="selecting", disable=study.args.disable_tqdm) as bar:
            runner = Runner(study, bar.update)
            progress = self._probe(runner)
            self._continue(runner, progress)
        report = make_report(self, progress)
        if int(os.environ.get("RANK", 0)) == 0:
            report.save(study.args.output_dir)
        runner.drop(list(study.candidates))
        return report

    def _most_steps(self) -> int:
        names = list(self.study.candidates)
        left, total = names, len(names) * self.study.continuation_steps
        for _ in range(1, self.repeats):
            left = half(left)
            total += len(left) * self.study.continuation_steps
        return total

    def _probe(self, runner: Runner) -> Progress:
        """All candidates, to the end of the probe."""
        study = self.study
        until = study.probe_steps
        results = runner.run([(name, 0, until, True) for name in study.candidates])
        progress = Progress()
        progress.spent = self.probes_flops
        for result in results:
            progress.add_probe(result)
        return progress

    def _continue(self, runner: Runner, progress: Progress) -> None:
        """Rounds of continuations over the survivors."""
        study = self.study
        names = progress.order_by_probe(self.objective, study.planned_steps)
        steps = progress.steps = self._matched(names, progress.seconds)
        first = lambda name: study.arm_flops(name, study.probe_steps, steps[name], False)  # noqa: E731
        again = lambda name: study.arm_flops(name, 0, steps[name], False)  # noqa: E731
        left = None if self.budget is None else self.budget - progress.spent
        alive, _ = affordable(names, first, again, left, self.least_repeats)
        if not alive:
            progress.stopped = "the budget pays for no continuation" if len(names) > 1 else "one candidate is left"
            alive = names[:1]
        progress.drop([name for name in names if name not in alive], "by the probe")
        runner.drop([name for name in names if name not in alive])
        for repeat in range(self.repeats):
            price = sum((first if repeat == 0 else again)(name) for name in alive)
            if len(alive) < 2 or (left is not None and price > left):
                progress.stopped = progress.stopped or (
                    "one candidate is left" if len(alive) < 2 else "the budget was spent"
                )
                break
            left = None if left is None else left - price
            progress.spent += price
            for result in runner.run([(name, repeat, steps[name], False) for name in alive]):
                progress.add_continuation(result)
            progress.judge(self.objective, study.planned_steps)
            alive = ordered({name: progress.losses[name] for name in alive if name not in progress.out})
            if len(alive) > 1 and leader_is_clear({name: progress.losses[name] for name in alive}, self.least_repeats):
                progress.stopped = "the leader is clear"
                break
            kept = half(alive) if repeat + 1 < self.repeats else alive
            progress.drop([name for name in alive if name not in kept], f"after repeat {repeat}")
            runner.drop([name for name in alive if name not in kept])
            alive = kept
        progress.stopped = progress.stopped or "all repeats were made"
        progress.alive = alive

    def _matched(self, names: Sequence[str], seconds: Mapping[str, float]) -> dict[str, int]:
        study, most = self.study, self.study.continuation_steps
        if self.match == "steps" or not names:
            return dict.fromkeys(names, most)
        prices = {name: study.step_flops(name) for name in names}
        if self.match == "time":
            prices = {name: max(seconds[name], 1e-9) for name in names}
        return {name: max(steps, study.probe_steps) for name, steps in matched_steps(most, prices).items()}


@dataclass
class Progress:
    """What a selection has found so far, made anew from the results by every process."""

    probes: dict[str, list] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    out: dict[str, str] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    curves: dict[str, list[list]] = field(default_factory=dict)
    rates: dict[str, float | None] = field(default_factory=dict)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    alive: list[str] = field(default_factory=list)
    spent: float = 0.0
    stopped: str = ""

    def add_probe(self, result: Mapping[str, Any]) -> None:
        name = result["candidate"]
        self.probes[name] = result["evaluations"]
        if result["reason"] is not None:
            self.out[name] = result["reason"]
        else:
            self.seconds[name] = result["seconds_per_step"] or 0.0

    def add_continuation(self, result: Mapping[str, Any]) -> None:
        name = result["candidate"]
        if result["reason"] is not None:
            self.out[name] = result["reason"]
            return
        self.curves.setdefault(name, []).append(result["evaluations"])
        self.rates[name] = result["learning_rate"]

    def judge(self, objective: str, planned_steps: int) -> None:
        """What the candidates that were continued are ranked by, repeat by repeat."""
        self.losses = {name: [] for name in self.curves}
        for repeat in range(max(map(len, self.curves.values()), default=0)):
            curves = {name: rows[repeat] for name, rows in self.curves.items() if repeat < len(rows)}
            for name, loss in outcomes(curves, objective, planned_steps).items():
                self.losses[name].append(loss)

    def drop(self, names: Sequence[str], when: str) -> None:
        """Note that candidates are not continued, the better ones last."""
        self.dropped += [(name, when) for name in reversed(names)]

    def order_by_probe(self, objective: str, planned_steps: int) -> list[str]:
        """Candidates that are not out, by their loss at the end of the probe, or by what that is extrapolated to."""
        curves = {name: rows for name, rows in self.probes.items() if name not in self.out}
        if not curves:
            return []
        kind = objective if objective == "extrapolated" else "final_loss"
        ends = outcomes(curves, kind, planned_steps)
        return sorted(ends, key=lambda name: (ends[name], name))

    @property
    def ranking(self) -> list[str]:
        """All candidates, best first: those that stayed, then those dropped last; at the end those that are out."""
        gone = [name for name, _ in reversed(self.dropped) if name not in self.out]
        return [*self.alive, *gone, *sorted(self.out)]
