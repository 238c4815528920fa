"""`run_sweep`: train a sweep's proxies, and leave the table that the laws are fitted to; its rounds are in `runner.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import WarmstartError
from ..tables.compute import training_flops
from .config import SweepConfig
from .design import best_point, on_edge
from .folder import Row, check_folder
from .plan import SweepPlan, plan_sweep
from .pool import WorkerPool
from .runner import Progress, Runner, TrainJobs, mean_losses, train_job
from .training import FINISHED


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
    workers: int = 0,
    report: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Sweep:
    """Train small proxies of a target over learning rates and batches, for the laws of hyper-parameters.

    Proxies are smaller configs of the target's own family, trained from scratch on the data that the target is to be
    trained on; their best settings, as laws in compute, give the target's. Runs are divided over `workers`, or over the ranks
    of `accelerate launch`, which share `output_dir`. A sweep that was stopped goes on when it is started again.

    Args:
        target: a model, a config, a folder or a Hub id; no weights are used.
        train_dataset: the target's training data: files of text (a path or several), a `Dataset` with a column `text` or
            `input_ids`, or token ids.
        eval_dataset: held-out text, in one of these forms.
        output_dir: new, empty, or of this very sweep.
        tokens (`float`): D that is planned for the target, in tokens; only the cost beforehand depends on it.
        sequence_length (`int`): T, in tokens.
        tokenizer: a tokenizer, or where it lies; by default the target's. Not needed with token ids.
        sweep_config: a `SweepConfig`; or its fields as keywords.
        dry_run (`bool`, defaults to False): check everything and count the cost; nothing is written or trained.
        workers (`int`, defaults to 0): processes of one thread that are started for the runs, in place of `accelerate launch`;
            with an accelerator they share it. 0 trains in this process.
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
    return Sweep(plan) if dry_run else train_sweep(plan, output_dir, report, workers)


def train_sweep(
    plan: SweepPlan,
    output_dir: str | os.PathLike,
    report: Callable[[Progress], None] | None = None,
    workers: int = 0,
    train_jobs: TrainJobs | None = None,
) -> Sweep:
    """Train what was planned, or the rest of it; see `run_sweep`.

    Args:
        train_jobs: trains runs elsewhere, where a caller has processes of its own, in place of `workers`.
    """
    from accelerate import PartialState

    if not (isinstance(workers, int) and workers >= 0):
        raise WarmstartError(f"workers={workers!r} must be a number of processes, 0 or more.")
    state = PartialState()
    if workers and state.num_processes > 1:
        raise WarmstartError(
            f"workers={workers} was asked for under {state.num_processes} ranks. Use either, not both."
        )
    if not workers or train_jobs is not None:
        rows, path = Runner(plan, output_dir, report, train_jobs).run()
    else:
        with WorkerPool(workers, train_job, (plan, str(state.device))) as pool:
            rows, path = Runner(plan, output_dir, report, lambda jobs, done: pool.run(jobs, done=done)).run()
    return Sweep(plan, path, rows)
