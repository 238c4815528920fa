"""One arm: a candidate trained for some steps in a folder of its own, evaluated, and measured at the probes' lags.

    _selection/arms/<candidate>/repeat-<r>/
        start.json          the full state that it started from, field by field
        zero.json           zero-step metrics (repeat 0)
        measure-<lag>.json  probe measures (repeat 0)
        result-<steps>.json the evaluations up to a step, or why the arm is out; written last
        checkpoint-<steps>  where it goes on, or went on after it was killed

An arm whose result is there is never run again. One that was killed goes on from its last checkpoint, bit for bit as if it
had not been. Python's, numpy's and torch's random states are put back after each arm, and every arm begins by seeding them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..errors import ExactnessError
from ..training import WarmstartTrainer
from ..training.schedules import compress_schedule
from .metrics import zero_step_metrics
from .probes import Baseline, probe, random_state_kept
from .study import METRIC_BATCHES, NOISE_BATCHES, Study, write_json_file

Progress = Callable[[int], None]
LAUNCHERS = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    *("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_VERSION"),
)


class ArmIsOut(Exception):
    """An arm that cannot go on; the message says why."""


def result_path(study: Study, name: str, repeat: int, until: int) -> Path:
    return study.arm_folder(name, repeat) / f"result-{until}.json"


def read_result(study: Study, name: str, repeat: int, until: int) -> dict[str, Any] | None:
    """An arm's result up to a step; None where it is not there yet."""
    path = result_path(study, name, repeat, until)
    return json.loads(path.read_text()) if path.is_file() else None


def run_arm(
    study: Study, parent: PreTrainedModel, name: str, repeat: int, until: int, goes_on: bool, progress: Progress
) -> dict[str, Any]:
    """Run one arm up to a step, from its last checkpoint; its result.

    Args:
        parent: loaded by `study.load_parent`. until: the step. goes_on: whether it may be continued later, so that a
            checkpoint is left. progress: called with the steps as they are made.
    """
    folder = study.arm_folder(name, repeat)
    folder.mkdir(parents=True, exist_ok=True)
    watch = Watch(study, name, repeat, until, goes_on, progress)
    reason = None
    with random_state_kept(), one_process(), warnings.catch_warnings():
        # Locked copies are a candidate here like any other.
        warnings.filterwarnings("ignore", message="This model was widened by exact_copy")
        try:
            trainer = _trained(study, parent, name, repeat, watch)
        except ArmIsOut as out:
            reason = str(out)
        except (ExactnessError, torch.OutOfMemoryError) as fault:
            reason = f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}"
    result: dict[str, Any] = {"candidate": name, "repeat": repeat, "steps": until, "reason": reason}
    if reason is None:
        rows = [row for row in trainer.state.log_history if "eval_loss" in row]
        result["evaluations"] = [[row["step"], row["eval_loss"]] for row in rows]
        rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
        result["learning_rate"] = rates[-1] if rates else None
        result["seconds_per_step"] = watch.seconds_per_step
        result["used"] = used_up(trainer, study.planned_steps, [row["step"] for row in rows])
    else:
        result["evaluations"] = watch.evaluations
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    write_json_file(result_path(study, name, repeat, until), result)
    return result


def _trained(study: Study, parent: PreTrainedModel, name: str, repeat: int, watch: Watch) -> WarmstartTrainer:
    folder = study.arm_folder(name, repeat)
    last = get_last_checkpoint(str(folder))
    model = study.make_model(parent, name, repeat)
    trainer = study.make_trainer(model, name, repeat, watch, starts=last is None)
    watch.trainer = trainer
    done = int(last.rpartition("-")[2]) if last else 0
    if repeat == 0 and any(done < lag <= watch.until for lag in study.lags):
        with random_state_kept():
            _prepare_measures(study, parent, trainer, name, watch)
    trainer.train(resume_from_checkpoint=last)
    return trainer


def used_up(trainer: WarmstartTrainer, planned: int, steps: Sequence[int]) -> list[float]:
    """Shares of the planned run's learning rates that are used up at some steps: their sum so far over that of all steps.

    Of a schedule that depends on more than the step, shares of the steps.
    """
    scheduler, start = trainer.lr_scheduler, trainer._schedule_start
    rates = [1.0] * planned
    if isinstance(scheduler, LambdaLR):
        rates = [scheduler.lr_lambdas[0](start + step) for step in range(planned)]
    total = sum(rates) or 1.0
    so_far = [0.0, *accumulate(rates)]
    return [so_far[step] / total for step in steps]


def _prepare_measures(
    study: Study, parent: PreTrainedModel, trainer: WarmstartTrainer, name: str, watch: Watch
) -> None:
    """What the probes compare with, and the zero-step metrics."""
    device = trainer.args.device
    trainer.model.to(device)
    parent.to(device)
    batches = list(islice(trainer.get_eval_dataloader(), METRIC_BATCHES))
    plan = None if study.candidates[name].fresh else study.plans[name]
    watch.zero = zero_step_metrics(parent, trainer.model, batches, plan)
    write_json_file(study.arm_folder(name, 0) / "zero.json", watch.zero)
    baseline = Baseline.of(parent, trainer.model, batches)
    training = list(islice(trainer.get_train_dataloader(), NOISE_BATCHES))
    whole = [batch for batch in training if _examples(batch) == study.args.per_device_train_batch_size]
    watch.measure = lambda model: probe(model, baseline, batches, whole, plan)


def _examples(batch: Any) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


class Watch(TrainerCallback):
    """Says when an arm is evaluated, measured, saved and stopped, and notices losses that are not finite."""

    def __init__(self, study: Study, name: str, repeat: int, until: int, goes_on: bool, progress: Progress):
        self.study, self.name, self.repeat, self.until = study, name, repeat, until
        self.goes_on, self.progress = goes_on, progress
        self.evaluated = set(study.evaluated(until)) | set(study.evaluated(study.continuation_steps))
        self.saves = study.args.save_steps if study.args.save_strategy == "steps" else 0
        self.trainer: WarmstartTrainer | None = None
        self.measure: Callable[[Any], dict[str, Any]] | None = None
        self.zero: dict[str, Any] | None = None
        self.evaluations: list[list[float]] = []
        self.seconds: list[float] = []
        self.began = 0.0

    @property
    def folder(self) -> Path:
        return self.study.arm_folder(self.name, self.repeat)

    @property
    def seconds_per_step(self) -> float | None:
        """The median over the steps of this process."""
        ordered = sorted(self.seconds)
        return ordered[len(ordered) // 2] if ordered else None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer is not None and self.study.schedule_speed != 1:
            place, kind = self.trainer._schedule_start, args.lr_scheduler_type
            compress_schedule(self.trainer.lr_scheduler, place, self.study.schedule_speed, kind)
        if state.global_step == 0 and self.trainer is not None:
            start = describe_start(self.study, self.name, self.repeat, self.trainer)
            write_json_file(self.folder / "start.json", start)

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.began)
        step = state.global_step
        control.should_evaluate = control.should_log = step in self.evaluated
        ends = step >= self.until
        control.should_save = (ends and self.goes_on) or (not ends and bool(self.saves) and step % self.saves == 0)
        control.should_training_stop = ends
        if step in self.study.lags and self.measure is not None:
            with random_state_kept():
                write_json_file(self.folder / f"measure-{step}.json", self.measure(kwargs["model"]))
        self.progress(1)
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise ArmIsOut(f"the training loss was {loss} by step {state.global_step}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        loss = (metrics or {}).get("eval_loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise ArmIsOut(f"the evaluation loss was {loss} at step {state.global_step}")
        self.evaluations.append([state.global_step, loss])


def describe_start(study: Study, name: str, repeat: int, trainer: WarmstartTrainer) -> dict[str, Any]:
    """The full state that an arm starts from: every field that a candidate is made of."""
    candidate, plan = study.candidates[name], study.plans[name]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    entries = list(optimizer.state.values())
    steps = sorted({float(entry["step"]) for entry in entries if "step" in entry})
    order = study.regime.order(
        len(study.train_dataset), study.examples_per_step, study.first_example, study.args.seed, repeat
    )
    return {
        "weights": {
            "operators": [] if candidate.fresh else plan.operators,
            "growth": candidate.seeded(repeat).to_dict(),
            "exact": plan.exact and not candidate.fresh,
            "from_scratch": candidate.fresh,
            "parameters": plan.parameters_after,
        },
        "moments": {
            "state_policy": candidate.state_policy,
            "optimizer": type(optimizer).__name__,
            "entries": len(entries),
        },
        "step": {"parent": trainer.parent_state.step if trainer.parent_state else 0, "optimizer": steps},
        "schedule": {
            "schedule_policy": candidate.schedule_policy,
            "position": trainer._schedule_start,
            "learning_rates": sorted({float(group["lr"]) for group in optimizer.param_groups}),
            **candidate.arguments,
        },
        "data": {"shuffle": study.regime.shuffle, "first_step": order, "seed": study.args.seed, "repeat": repeat},
        "random": {
            "seed": trainer.args.seed,
            "dropout": study.regime.dropout,
            "torch": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()[:16],
        },
    }


@contextmanager
def one_process() -> Iterator[None]:
    """Context in which trainers are alone in their process, though a launcher started several.

    What launchers put into the environment, what accelerate remembers of it and torch's process group are put away and put
    back: `save_pretrained` writes nothing on another rank than 0.
    """
    hidden = {name: os.environ.pop(name) for name in LAUNCHERS if name in os.environ}
    states = [(kind, dict(kind._shared_state)) for kind in (AcceleratorState, PartialState)]
    rank = int(hidden.get("LOCAL_RANK", 0))
    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    for kind, _ in states:
        kind._shared_state.clear()
    launched = dist.is_available() and dist.is_initialized()
    world = dist.group.WORLD if launched else None
    if launched:
        dist.group.WORLD = None
    try:
        yield
    finally:
        if launched:
            dist.group.WORLD = world
        os.environ.update(hidden)
        for kind, state in states:
            kind._shared_state.clear()
            kind._shared_state.update(state)
