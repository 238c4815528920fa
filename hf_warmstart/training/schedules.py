"""Where the learning rate schedule of a grown model starts, in the stock schedulers.

With N the steps of this run, a policy gives a position s; the run then lasts from step s to step s + N of the schedule
that `TrainingArguments` name, over s + N steps:

| policy | s |
|---|---|
| `continue` | the parent's position |
| `rewind` | the end of the warm-up: the peak |
| `rewarm` | 0: a schedule of its own, warm-up included |
| `equal_loss` | the step at which a model of the child's size, trained from scratch, has the parent's loss |

From any of them the rate can be ramped up anew over some steps, from 0 to where the schedule then is (`equal_loss` in
arXiv 2203.06211 takes 150 to 200).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType, get_last_checkpoint

from ..checkpoints.state.parent_state import ParentState
from ..errors import StateError, WarmstartError
from ..scaling import tokens_to_loss

SCHEDULE_POLICIES = ("continue", "rewind", "rewarm", "equal_loss")


def starting_position(policy: str, args: TrainingArguments, max_steps: int, parent: ParentState) -> int:
    """The step of the schedule at which a policy starts.

    Raises:
        StateError: the parent's checkpoint, or the run named by `equal_loss_run`, does not say what the policy needs.
    """
    if policy == "continue":
        return parent.scheduler_step or 0
    if policy == "rewind":
        return warmup_within(args, max_steps)
    if policy == "equal_loss":
        return _equal_loss_position(args, parent)
    return 0


def warmup_within(args: TrainingArguments, max_steps: int) -> int:
    """The warm-up of a schedule over warm-up + `max_steps` steps; as a share of the steps it depends on how many it adds."""
    warmup = 0
    while (longer := args.get_warmup_steps(max_steps + warmup)) > warmup:
        warmup = longer
    return warmup


def _equal_loss_position(args: Any, parent: ParentState) -> int:
    if args.equal_loss_step is not None:
        return int(args.equal_loss_step)
    if parent.eval_loss is None:
        raise StateError(
            "schedule_policy='equal_loss' compares evaluation losses, and the parent's trainer_state.json logs none. Pass "
            "equal_loss_step, the step at which a model of the child's size has the parent's loss."
        )
    return equal_loss_step(args.equal_loss_run, parent.eval_loss)


def equal_loss_step(run: str | os.PathLike, loss: float) -> int:
    """The step at which a run first had an evaluation loss, by its log.

    Args:
        run: folder of a `Trainer` run from scratch at the child's size: its own or its last checkpoint's
            `trainer_state.json`, with evaluations on the parent's evaluation text.
        loss: nats per token.

    Raises:
        StateError: no log, fewer than two evaluations that improved, or a loss outside what they span.

    Source: arXiv 2203.06211.
    """
    folder = Path(run)
    last = get_last_checkpoint(run) if folder.is_dir() else None
    states = [folder / TRAINER_STATE_NAME, Path(last or run, TRAINER_STATE_NAME)]
    file = next((path for path in states if path.is_file()), None)
    if file is None:
        raise StateError(
            f"equal_loss_run={str(run)!r} holds no {TRAINER_STATE_NAME}. Pass the folder of a Trainer run."
        )
    best, ladder = float("inf"), {}
    for row in json.loads(file.read_text())["log_history"]:
        if row.get("eval_loss", best) < best and row.get("step", 0) > 0:
            best = row["eval_loss"]
            ladder[float(row["step"])] = best
    try:
        step = tokens_to_loss(ladder, loss)
    except WarmstartError as fault:
        raise StateError(f"The evaluations in {folder.name} give no step for a loss: {fault}") from fault
    if not step.known:
        raise StateError(
            f"The parent's evaluation loss {loss:.4g} lies outside those of {folder.name}, {min(ladder.values()):.4g} to "
            f"{max(ladder.values()):.4g}. Pass equal_loss_step, or another schedule_policy."
        )
    return round(step.value)


def place_schedule(scheduler: Any, position: int, kind: str) -> None:
    """Move a schedule to a position, as if it had stepped there.

    Raises:
        WarmstartError: its rate depends on more than the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise WarmstartError(
            f"The schedule {_name(kind)} has no position that could be continued. Pass schedule_policy='rewarm', or a schedule "
            "that depends on the step alone."
        )
    rates = [base * rate(position) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.last_epoch, scheduler._step_count, scheduler._last_lr = position, position + 1, rates
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def ramp_schedule(scheduler: Any, start: int, steps: int, kind: str) -> None:
    """Let a schedule's rate rise linearly from 0 at step `start` to its own `steps` later.

    Raises:
        WarmstartError: its rate depends on more than the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise WarmstartError(
            f"The schedule {_name(kind)} depends on more than the step and cannot be ramped. Leave schedule_ramp_steps out, or "
            "pass another schedule."
        )

    def ramped(rate: Any) -> Any:
        return lambda step: rate(step) * min(1.0, max(0.0, (step - start) / steps))

    scheduler.lr_lambdas = [ramped(rate) for rate in scheduler.lr_lambdas]


def check_decays(kind: str) -> None:
    """Raise unless a schedule ends in a decay whose length can be chosen."""
    if SchedulerType(kind) is not SchedulerType.WARMUP_STABLE_DECAY:
        raise WarmstartError(
            f"decay_fraction is the share of a decay at the end, which the schedule {_name(kind)} does not have. Pass "
            "lr_scheduler_type='warmup_stable_decay', or leave decay_fraction out."
        )


def _name(kind: Any) -> str:
    return str(SchedulerType(kind).value)
