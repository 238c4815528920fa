"""The rounds of a sweep, and who trains their runs: this process, the ranks of `accelerate launch`, or a pool of workers.

Budgets go from the cheapest to the dearest, each centred on the optimum before it. Within a budget the runs go in rounds:
the centre, the rest of the first design, then neighbours of the optimum. What a round does depends on the losses of
the rounds before it alone, never on the clock or on which process was first, so that a sweep that was killed, or divided
over other processes, gives the same table.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import WarmstartError
from ...version import __version__
from ..tables.compute import training_flops
from .cost import run_flops, spent_flops
from .design import Point, best_point, first_points, further_points, moved_centre
from .folder import TABLE_NAME, Row, SweepFolder
from .plan import SweepPlan, guessed_centre
from .proxies import Proxy
from .training import CHECKS, FINISHED, Outcome, Reference, train

CHECK_COLUMNS = tuple(f"loss_at_{share:g}" for share in CHECKS)


@dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    Args:
        flops: spent on what is finished and under way, of this process and those beside it. of: `flops` and what is planned
            still; refinements count once they are decided on. seconds_left: by this process's rate; None at first.
        runs: finished runs.
    """

    flops: float
    of: float
    seconds_left: float | None
    runs: int


@dataclass(frozen=True)
class RunJob:
    """One run for another process.

    Args:
        proxy: its number in the plan. point, seed: of the run. reference: for stopping.
    """

    proxy: int
    point: Point
    seed: int
    reference: Reference


# Trains jobs, wherever that is, and tells of each as it comes.
TrainJobs = Callable[[Sequence[RunJob], Callable[[RunJob, list[Outcome]], None]], object]


def train_job(shared: tuple[SweepPlan, str], job: RunJob) -> list[Outcome]:
    """Train one run of a plan on a device."""
    plan, device = shared
    texts = plan.train, plan.evaluation
    return train(
        plan.model_class, plan.proxies[job.proxy], job.point, job.seed, texts, plan.asked, job.reference,
        torch.device(device),
    )  # fmt: skip


def mean_losses(rows: Sequence[Row], proxy: Proxy, horizon: int) -> dict[Point, float]:
    """Point -> mean loss over seeds on one budget; infinite where a run did not finish."""
    losses: dict[Point, list[float]] = {}
    for row in rows:
        if row["params"] == proxy.params and row["tokens"] == proxy.tokens[horizon]:
            loss = row["loss"] if row["status"] == FINISHED else math.inf
            losses.setdefault(Point(row["learning_rate"], row["batch_sequences"]), []).append(loss)
    return {point: sum(found) / len(found) for point, found in losses.items()}


class Runner:
    """Trains a plan into a folder.

    Args:
        report: called on the main process. train_jobs: trains runs in other processes; None trains this rank's here.
    """

    def __init__(
        self,
        plan: SweepPlan,
        output_dir: str | os.PathLike,
        report: Callable[[Progress], None] | None = None,
        train_jobs: TrainJobs | None = None,
    ):
        from accelerate import PartialState

        self.plan, self.asked, self.train_jobs = plan, plan.asked, train_jobs
        self.state = PartialState()
        self.report = report if self.state.is_main_process else None
        beside = {
            "made_with": {"hf_warmstart": __version__, "tokens": plan.tokens, "world_size": self.state.num_processes},
            "fingerprint": plan.fingerprint.to_dict(),
            "recipe": plan.recipe,
        }
        if self.state.is_main_process:
            self.folder = SweepFolder(output_dir, plan.identity, beside, plan.evaluation.tokens)
        self.state.wait_for_everyone()
        if not self.state.is_main_process:
            self.folder = SweepFolder(output_dir, plan.identity, writes=False)
        self.done = 0.0  # FLOPs, of this process
        self.left = self.later = 0.0  # of this round, and of budgets behind this one
        self.begun, self.since = time.perf_counter(), 0.0

    def run(self) -> tuple[list[Row], Path]:
        """The table's rows, and where it lies."""
        try:
            centre = guessed_centre(self.plan.proxies[0], self.asked)
            for number, proxy in enumerate(self.plan.proxies):
                behind = self.plan.cost.budgets[number + 1 :]
                self.later = sum(b.runs * b.run_flops for b in behind) / self.state.num_processes
                best = self._budget(proxy, centre)
                if behind:
                    factor = _compute(self.plan.proxies[number + 1]) / _compute(proxy)
                    centre = moved_centre(best, factor)
            return self.folder.table(), self.folder.path / TABLE_NAME
        finally:
            self.folder.close()

    def _budget(self, proxy: Proxy, centre: Point) -> Point:
        """All rounds of one proxy; the best point of its longest horizon."""
        limits = self.plan.limits(proxy)
        design = first_points(centre, limits, self.asked)
        rounds = [design] if self.asked.stop_ratio is None else [design[:1], design[1:]]
        for number, points in enumerate(rounds):
            self._round(proxy, number, points)
        for number in range(len(rounds), len(rounds) + self.asked.refinements):
            more: set[Point] = set()
            for horizon in range(len(proxy.horizons)):
                more |= set(further_points(self._losses(proxy, horizon, number), limits, self.asked))
            if not more:
                break
            self._round(proxy, number, sorted(more))
        best = best_point(self._losses(proxy, -1))
        if best is None:
            raise WarmstartError(
                f"Every run of the proxy of {proxy.params:,} parameters diverged. Pass a lower learning_rate; the table in "
                f"{self.folder.path} says which were tried."
            )
        return best

    def _losses(self, proxy: Proxy, horizon: int, before: float = math.inf) -> dict[Point, float]:
        """The losses of a budget in the rounds before one: a sweep that goes on knows later ones already."""
        rows = [row for row in self.folder.table() if row["round"] < before]
        return mean_losses(rows, proxy, horizon % len(proxy.horizons))

    def _round(self, proxy: Proxy, number: int, points: Sequence[Point]) -> None:
        """Train this process's part of a round; all processes end it together."""
        reference = self._reference(proxy, number)
        jobs = [(point, seed) for point in points for seed in self.asked.seeds]
        if self.train_jobs is not None:
            self._elsewhere(proxy, number, jobs, reference)
            return
        own = jobs[self.state.process_index :: self.state.num_processes]
        todo = [(point, seed) for point, seed in own if run_name(proxy, point, seed) not in self.folder.rows]
        costs = [self._flops(proxy, point) for point, _ in todo]
        for (point, seed), cost in zip(todo, costs, strict=True):
            self.left = sum(costs[todo.index((point, seed)) :])
            self._train(proxy, number, point, seed, reference, cost)
        self.left = 0.0
        self.state.wait_for_everyone()
        self.folder.refresh()
        self.state.wait_for_everyone()

    def _elsewhere(self, proxy: Proxy, number: int, jobs: Sequence[tuple[Point, int]], reference: Reference) -> None:
        """Have a round trained by other processes."""
        todo = [job for job in jobs if run_name(proxy, *job) not in self.folder.rows]
        self.left = sum(self._flops(proxy, point) for point, _ in todo)
        index = self.plan.proxies.index(proxy)

        def add(job: RunJob, outcomes: list[Outcome]) -> None:
            rows = self._rows(proxy, number, job.point, job.seed, outcomes)
            self.folder.add(run_name(proxy, job.point, job.seed), rows)
            self.done += sum(row["spent_flops"] for row in rows)
            self.left = max(0.0, self.left - self._flops(proxy, job.point))
            self._tell()

        assert self.train_jobs is not None
        self.train_jobs([RunJob(index, point, seed, reference) for point, seed in todo], add)
        self.left = 0.0

    def _train(self, proxy: Proxy, number: int, point: Point, seed: int, reference: Reference, cost: float) -> None:
        before, left = self.done, self.left

        def advance(tokens: int) -> None:
            self.done += spent_flops(proxy, tokens, 0)
            self.left = max(0.0, left - (self.done - before))
            self._tell()

        plan = self.plan
        texts = plan.train, plan.evaluation
        outcomes = train(
            plan.model_class, proxy, point, seed, texts, self.asked, reference, self.state.device, advance
        )
        rows = self._rows(proxy, number, point, seed, outcomes)
        self.done = before + sum(row["spent_flops"] for row in rows)
        self.left = left - cost
        self.folder.add(run_name(proxy, point, seed), rows)
        self._tell()

    def _tell(self) -> None:
        if self.report is None:
            return
        world = self.state.num_processes
        planned = self.left + self.later
        seconds = time.perf_counter() - self.begun
        left = planned * seconds / self.done if self.done else None
        self.report(Progress(self.done * world, (self.done + planned) * world, left, len(self.folder.rows)))

    def _flops(self, proxy: Proxy, point: Point) -> float:
        return run_flops(proxy, point, self.asked, self.plan.evaluation.tokens.numel())

    def _reference(self, proxy: Proxy, number: int) -> Reference:
        """The best losses at the checks that earlier rounds of a proxy had."""
        earlier = [row for row in self.folder.table() if row["params"] == proxy.params and row["round"] < number]
        found = [[row[name] for row in earlier if row[name] is not None] for name in CHECK_COLUMNS]
        return Reference(tuple(min(losses, default=None) for losses in found))

    def _rows(self, proxy: Proxy, number: int, point: Point, seed: int, outcomes: Sequence[Outcome]) -> list[Row]:
        rows = []
        length, eval_tokens = proxy.sequence_length, self.plan.evaluation.tokens.numel()
        for tokens, outcome in zip(proxy.tokens, outcomes, strict=True):
            rows.append(
                {
                    "name": f"{run_name(proxy, point, seed)}-d{tokens}",
                    "params": proxy.params,
                    "tokens": tokens,
                    "learning_rate": point.learning_rate,
                    "batch_tokens": point.batch_sequences * length,
                    "loss": outcome.loss,
                    "seed": seed,
                    "status": outcome.status,
                    "flops": training_flops(proxy.params, tokens),
                    "batch_sequences": point.batch_sequences,
                    "sequence_length": length,
                    "optimizer_steps": outcome.steps,
                    "round": number,
                    **dict(zip(CHECK_COLUMNS, outcome.check_losses, strict=True)),
                    "trained_tokens": outcome.spent_tokens,
                    "spent_flops": spent_flops(proxy, outcome.spent_tokens, outcome.spent_evaluations * eval_tokens),
                    "seconds": round(outcome.seconds, 3),
                }
            )
        return rows


def run_name(proxy: Proxy, point: Point, seed: int) -> str:
    """The name of a run, and of its file."""
    return f"n{proxy.params}-b{point.batch_sequences}-lr{point.learning_rate:.6g}-s{seed}"


def _compute(proxy: Proxy) -> float:
    return training_flops(proxy.params, proxy.tokens[-1])
