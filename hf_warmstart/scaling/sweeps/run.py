"""`run_sweep`: train a sweep's proxies, budget by budget, and leave the table that the laws are fitted to.

Budgets go from the cheapest to the dearest, each centred on the optimum before it. Within a budget the runs go in rounds:
the centre, the rest of the first design, then neighbours of the optimum. What a round does depends on the losses of
the rounds before it alone, never on the clock or on which rank was first, so that a sweep that was killed, or divided
over other ranks, gives the same table.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import WarmstartError
from ...version import __version__
from ..tables.compute import training_flops
from .config import SweepConfig
from .cost import run_flops, spent_flops
from .design import Point, best_point, first_points, further_points, moved_centre, on_edge
from .folder import TABLE_NAME, Row, SweepFolder, check_folder
from .plan import SweepPlan, guessed_centre, plan_sweep
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
class Optimum:
    """The best point that was tried on one budget.

    Args:
        params: N. tokens: D. learning_rate, batch_tokens, loss: of the best point. edge: in which of the two nothing was
            tried beyond it.
    """

    params: int
    tokens: int
    learning_rate: float
    batch_tokens: int
    loss: float
    edge: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """A finished sweep, or with `dry_run` the plan of one.

    Args:
        plan: what was planned. path: the table, as JSON lines; None after a dry run. runs: its rows, for
            `HparamPredictor.fit`.
    """

    plan: SweepPlan
    path: Path | None = None
    runs: list[Row] = field(default_factory=list, repr=False)

    @property
    def spent_flops(self) -> float:
        """FLOPs of all runs, stopped ones and evaluations included."""
        return sum(row["spent_flops"] for row in self.runs)

    @property
    def spent_share(self) -> float:
        """`spent_flops` over those of the grid search at the target's size."""
        return self.spent_flops / self.plan.cost.grid_flops

    @property
    def optima(self) -> list[Optimum]:
        """The best point of each budget, the cheapest first."""
        found = []
        for proxy in self.plan.proxies:
            for number, tokens in enumerate(proxy.tokens):
                losses = mean_losses(self.runs, proxy, number)
                best = best_point(losses)
                if best is not None:
                    batch = best.batch_sequences * proxy.sequence_length
                    edge = tuple(on_edge(losses, self.plan.asked))
                    found.append(Optimum(proxy.params, tokens, best.learning_rate, batch, losses[best], edge))
        return sorted(found, key=lambda o: training_flops(o.params, o.tokens))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a report, without the rows."""
        data = self.plan.to_dict()
        if self.path is not None:
            statuses = [row["status"] for row in self.runs]
            data |= {
                "table": str(self.path),
                "rows": {status: statuses.count(status) for status in sorted(set(statuses))},
                "spent_flops": self.spent_flops,
                "spent_share": self.spent_share,
                "optima": [dict(o.__dict__) | {"edge": list(o.edge)} for o in self.optima],
            }
        return data

    def __str__(self) -> str:
        if self.path is None:
            return str(self.plan)
        lines = [f"{'params':>14} {'tokens':>16} {'learning rate':>14} {'batch tokens':>13} {'loss':>8}"]
        for o in self.optima:
            edge = f"  edge of what was tried in {' and '.join(o.edge)}" if o.edge else ""
            lines.append(
                f"{o.params:>14,} {o.tokens:>16,} {o.learning_rate:>14.3g} {o.batch_tokens:>13,} {o.loss:>8.4f}{edge}"
            )
        unfinished = sum(row["status"] != FINISHED for row in self.runs)
        lines.append(
            f"{len(self.runs)} rows, {unfinished} of runs that were stopped or diverged; {self.spent_flops:.2e} FLOPs, "
            f"{self.spent_share:.1%} of the grid search on the target."
        )
        return "\n".join(lines)


def run_sweep(
    target: PreTrainedModel | PreTrainedConfig | str | os.PathLike,
    *,
    train_dataset: Any,
    eval_dataset: Any,
    output_dir: str | os.PathLike,
    tokens: float,
    sequence_length: int,
    tokenizer: Any = None,
    sweep_config: SweepConfig | None = None,
    dry_run: bool = False,
    report: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Sweep:
    """Train small proxies of a target over learning rates and batches, for the laws of hyper-parameters.

    Proxies are smaller configs of the target's own family, trained from scratch on the data that the target is to be
    trained on; their best settings, as laws in compute, give the target's. Runs are divided over the ranks of `accelerate
    launch`, which share `output_dir`. A sweep that was stopped goes on when it is started again.

    Args:
        target: a model, a config, a folder or a Hub id; no weights are used.
        train_dataset, eval_dataset: files of text (a path or several), a `Dataset` with a column `text` or `input_ids`, or
            token ids. The target's training data, and held-out text of the same kind.
        output_dir: new, empty, or of this very sweep.
        tokens (`float`): D that is planned for the target, in tokens; only the cost beforehand depends on it.
        sequence_length (`int`): T, in tokens.
        tokenizer: a tokenizer, or where it lies; by default the target's. Not needed with token ids.
        sweep_config: a `SweepConfig`; or its fields as keywords.
        dry_run (`bool`, defaults to False): check everything and count the cost; nothing is written or trained.
        report: called with `Progress` at every step, on the main process.

    Returns:
        `Sweep`: `.runs` and `.path` hold the table, one row for each horizon of each run, with `params` (N), `tokens` (D),
        `learning_rate`, `batch_tokens`, `loss` (held-out, nats per token; None unless `status` is `"finished"`), `seed`,
        `status` (`finished`, `stopped`, `diverged`), `flops` (6 N D) and `spent_flops` (what it added, by the config).

    Raises:
        WarmstartError: what was asked cannot be done, before anything is written; or every run of a budget diverged.
        CheckpointError: another process runs the sweep in this folder.

    Source: arXiv 2606.05610, stage 1; the branches are those of arXiv 2404.06395.
    """
    plan = plan_sweep(
        target,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        tokens=tokens,
        sequence_length=sequence_length,
        tokenizer=tokenizer,
        sweep_config=sweep_config,
        **options,
    )
    check_folder(output_dir, plan.identity)
    return Sweep(plan) if dry_run else train_sweep(plan, output_dir, report)


def train_sweep(
    plan: SweepPlan, output_dir: str | os.PathLike, report: Callable[[Progress], None] | None = None
) -> Sweep:
    """Train what was planned, or the rest of it; see `run_sweep`."""
    return _Runner(plan, output_dir, report).run()


def mean_losses(rows: Sequence[Row], proxy: Proxy, horizon: int) -> dict[Point, float]:
    """Point -> mean loss over seeds on one budget; infinite where a run did not finish."""
    losses: dict[Point, list[float]] = {}
    for row in rows:
        if row["params"] == proxy.params and row["tokens"] == proxy.tokens[horizon]:
            loss = row["loss"] if row["status"] == FINISHED else math.inf
            losses.setdefault(Point(row["learning_rate"], row["batch_sequences"]), []).append(loss)
    return {point: sum(found) / len(found) for point, found in losses.items()}


class _Runner:
    def __init__(self, plan: SweepPlan, output_dir: str | os.PathLike, report: Callable[[Progress], None] | None):
        from accelerate import PartialState

        self.plan, self.asked = plan, plan.asked
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

    def run(self) -> Sweep:
        try:
            centre = guessed_centre(self.plan.proxies[0], self.asked)
            for number, proxy in enumerate(self.plan.proxies):
                behind = self.plan.cost.budgets[number + 1 :]
                self.later = sum(b.runs * b.run_flops for b in behind) / self.state.num_processes
                best = self._budget(proxy, centre)
                if behind:
                    factor = _compute(self.plan.proxies[number + 1]) / _compute(proxy)
                    centre = moved_centre(best, factor)
            return Sweep(self.plan, self.folder.path / TABLE_NAME, self.folder.table())
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
