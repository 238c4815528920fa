"""`Selection`: the rounds of a selection, and `Progress`: what they have found.

A checked selection runs in two parts: all candidates to the end of their probe, then rounds of continuations over those
that the budget affords, the worse half dropped after each. Ranked by what is extrapolated, the first round is a race
(`racing`): all go on, those left behind are dropped at each doubling of the steps, and the budget says how far it goes.
Every decision is made from results on disk.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from .halving import LEAST_REPEATS, affordable, half, leader_is_clear, ordered
from .outcomes import final_loss, outcomes
from .racing import extrapolated, left_behind
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
        begin = self._race if study.racing else self._continue_best
        alive = begin(runner, progress)
        again = lambda name: study.arm_flops(name, 0, progress.steps[name], False)  # noqa: E731
        for repeat in range(1, self.repeats + 1):
            alive = progress.ordered(alive, self.objective)
            if len(alive) > 1 and leader_is_clear({name: progress.losses[name] for name in alive}, self.least_repeats):
                progress.stopped = progress.stopped or "the leader is clear"
            if progress.stopped or repeat == self.repeats:
                break
            kept = half(alive)
            progress.drop([name for name in alive if name not in kept], f"after repeat {repeat - 1}")
            runner.drop([name for name in alive if name not in kept])
            alive = kept
            price = sum(again(name) for name in alive)
            if len(alive) < 2:
                progress.stopped = "one candidate is left"
            elif not self._affords(progress, price):
                progress.stopped = "the budget was spent"
            if progress.stopped:
                break
            progress.spent += price
            for result in runner.run([(name, repeat, progress.steps[name], False) for name in alive]):
                progress.add_continuation(result)
        progress.stopped = progress.stopped or "all repeats were made"
        progress.alive = alive

    def _affords(self, progress: Progress, price: float) -> bool:
        return self.budget is None or progress.spent + price <= self.budget

    def _continue_best(self, runner: Runner, progress: Progress) -> list[str]:
        """The first repeat of as many as the budget affords, the best of the probes; their names."""
        study = self.study
        names = progress.order_by_probe()
        steps = progress.steps = self._matched(names, progress.seconds)
        first = lambda name: study.arm_flops(name, study.probe_steps, steps[name], False)  # noqa: E731
        again = lambda name: study.arm_flops(name, 0, steps[name], False)  # noqa: E731
        left = None if self.budget is None else self.budget - progress.spent
        alive, _ = affordable(names, first, again, left, self.least_repeats)
        if len(alive) < 2:
            progress.stopped = "the budget pays for no continuation" if len(names) > 1 else "one candidate is left"
            alive = alive or names[:1]
        progress.drop([name for name in names if name not in alive], "by the probe")
        runner.drop([name for name in names if name not in alive])
        if not progress.stopped:
            progress.spent += sum(map(first, alive))
            for result in runner.run([(name, 0, steps[name], False) for name in alive]):
                progress.add_continuation(result)
        return alive

    def _race(self, runner: Runner, progress: Progress) -> list[str]:
        """The first repeat of all, who are dropped where they are left behind, as far as the budget goes; who is left."""
        study = self.study
        at, alive = study.probe_steps, progress.order_by_probe()
        while True:
            behind = left_behind({name: progress.probes[name] for name in alive}) if len(alive) > 1 else []
            progress.drop([name for name in alive if name in behind], f"left behind by step {at}")
            runner.drop(behind)
            alive = [name for name in alive if name not in behind]
            until = self._next(alive, at, progress)
            if len(alive) < 2 or until == at:
                break
            progress.spent += sum(study.arm_flops(name, at, until, False) for name in alive)
            for result in runner.run([(name, 0, until, until < study.continuation_steps) for name in alive]):
                progress.add_probe(result)
            at, alive = until, [name for name in alive if name not in progress.out]
        progress.steps = {name: int(rows[-1][0]) for name, rows in progress.probes.items() if rows}
        progress.reached(alive)
        if len(alive) < 2:
            progress.stopped = "one candidate is left"
        elif at < study.continuation_steps:
            progress.stopped = "the budget was spent"
        return alive

    def _next(self, names: Sequence[str], at: int, progress: Progress) -> int:
        """How far a race goes from a step: to twice as many, or as far as the budget pays for; that step where for none."""
        study = self.study
        price = lambda until: sum(study.arm_flops(name, at, until, False) for name in names)  # noqa: E731
        most = min(2 * at, study.continuation_steps)
        return next((until for until in range(most, at, -1) if self._affords(progress, price(until))), at)

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
    results: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    used: dict[str, dict[int, float]] = field(default_factory=dict)
    curves: dict[str, list[list]] = field(default_factory=dict)
    rates: dict[str, float | None] = field(default_factory=dict)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    alive: list[str] = field(default_factory=list)
    spent: float = 0.0
    stopped: str = ""

    def add_probe(self, result: Mapping[str, Any]) -> None:
        """A candidate's first repeat, as far as it went."""
        name = result["candidate"]
        self.probes[name], self.results[name] = result["evaluations"], result
        if result["reason"] is not None:
            self.out[name] = result["reason"]
        else:
            self.seconds[name] = result["seconds_per_step"] or 0.0

    def reached(self, names: Sequence[str]) -> None:
        """The first repeat of those that are left is their first continuation."""
        for name in names:
            self.add_continuation(self.results[name])

    def add_continuation(self, result: Mapping[str, Any]) -> None:
        name = result["candidate"]
        if result["reason"] is not None:
            self.out[name] = result["reason"]
            return
        self.curves.setdefault(name, []).append(result["evaluations"])
        self.rates[name] = result["learning_rate"]
        steps = (step for step, _ in result["evaluations"])
        self.used[name] = dict(zip(steps, result["used"], strict=True))

    def ordered(self, names: Sequence[str], objective: str) -> list[str]:
        """Those that are not out, by what candidates are ranked by, which is taken anew, repeat by repeat."""
        self.losses = {name: [] for name in self.curves}
        for repeat in range(max(map(len, self.curves.values()), default=0)):
            curves = {name: rows[repeat] for name, rows in self.curves.items() if repeat < len(rows)}
            ends = extrapolated(curves, self.used) if objective == "extrapolated" else outcomes(curves, objective)
            for name, loss in ends.items():
                self.losses[name].append(loss)
        left = [name for name in names if name not in self.out]
        return ordered({name: self.losses[name] for name in left}) if self.losses else left

    def drop(self, names: Sequence[str], when: str) -> None:
        """Note that candidates are not continued, the better ones last."""
        self.dropped += [(name, when) for name in reversed(names)]

    def order_by_probe(self) -> list[str]:
        """Candidates that are not out, by their loss at the end of the probe."""
        ends = {name: final_loss(rows) for name, rows in self.probes.items() if name not in self.out}
        return sorted(ends, key=lambda name: (ends[name], name))

    @property
    def ranking(self) -> list[str]:
        """All candidates, best first: those that stayed, then those dropped last; at the end those that are out."""
        gone = [name for name, _ in reversed(self.dropped) if name not in self.out]
        return [*self.alive, *gone, *sorted(self.out)]
