"""One arm of the quickstart: a training run in a worker process, by the stock `Trainer` or by `WarmstartTrainer`.

An arm is one trunk at a constant learning rate and some rungs. Each rung is the trunk up to some step and then a decay of
its own, resumed from the trunk's checkpoint: so every loss that is compared comes from a decayed run, and a ladder of
token budgets costs little more than its longest one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from quickstart_text import BlockStream
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging

from hf_warmstart import WarmstartTrainer, WarmstartTrainingArguments, grow

BASE_STREAM, NEW_STREAM = 0, 1
REPORT_EVERY = 10


@dataclass(frozen=True)
class Setup:
    """What all arms of one experiment share.

    Args:
        work: folder of the blocks and of the runs. parent: the parent's checkpoint or id. growth: a `GrowthConfig`'s fields.
        carries: whether the parent's folder holds optimizer and schedule. parent_steps: its step.
        batch: sequences per step. length: tokens per sequence. warmup: steps. decay: share of a run that decays.
        evaluations: points of a trunk's curve. seed: of initialisation, growth and data order.
    """

    work: str
    parent: str
    growth: dict[str, Any]
    carries: bool
    parent_steps: int
    batch: int
    length: int
    warmup: int
    decay: float
    evaluations: int
    seed: int

    def decay_steps(self, steps: int) -> int:
        """Steps of a run in which the learning rate falls."""
        return max(1, round(self.decay * steps))

    def trained_steps(self, arm: Arm) -> int:
        """Steps that an arm computes: its trunk and the decays of its shorter rungs."""
        return arm.rungs[-1] + sum(self.decay_steps(rung) for rung in arm.rungs[:-1])


@dataclass(frozen=True)
class Arm:
    """One run and its rungs.

    Args:
        name: in the report. kind: `base` (never decays), `base trial`, `scratch`, `grown` or `control`.
        learning_rate: of the plateau. rungs: steps of its decayed runs, rising; the last is the trunk.
        state_policy: of a grown arm; `auto` is the trainer's default.
    """

    name: str
    kind: str
    learning_rate: float
    rungs: tuple[int, ...]
    state_policy: str = "auto"

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-")


@dataclass(frozen=True)
class Result:
    """What an arm gave.

    Args:
        ladder: steps -> held-out losses by domain, decayed. curve: (steps, loss on the source domain) of the trunk.
        model: folder of the trunk's last model. cpu_seconds, wall_seconds: of all of it.
    """

    arm: Arm
    ladder: dict[int, dict[str, float]]
    curve: list[tuple[int, float]]
    model: str
    cpu_seconds: float
    wall_seconds: float
    checkpoints: dict[int, str] = field(default_factory=dict)

    @property
    def final(self) -> dict[str, float]:
        """Losses at the end of the longest run."""
        return self.ladder[self.arm.rungs[-1]]


class Stopped(Exception):
    """Another arm failed, so this one ends."""


_CHANNEL: list[Any] = []


def start_worker(queue: Any, stop: Any) -> None:
    """Prepare a worker process: one thread (two collapse when a neighbour takes a core), no progress bars."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    _CHANNEL[:] = [queue, stop]


def flops_per_token(config: PreTrainedConfig, length: int) -> float:
    """Training FLOPs per token: `6 (N + L T a)`.

    N: parameters in matrix products (all but the table that is looked up; a tied table counts once, for the head).
    L T a: causal attention over sequences of T tokens, L layers whose heads are a wide together.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = model.get_output_embeddings() is None or config.get_text_config().tie_word_embeddings
    looked_up = 0 if tied else model.get_input_embeddings().weight.numel()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 6.0 * (model.num_parameters() - looked_up + config.num_hidden_layers * length * width)


def run_arm(arm: Arm, setup: Setup) -> Result:
    """Train an arm: the trunk, then its shorter rungs."""
    wall, cpu = time.perf_counter(), time.process_time()
    data: dict[str, Tensor] = torch.load(Path(setup.work, "blocks.pt"), mmap=True)
    folder = Path(setup.work, arm.folder)
    branches = {} if arm.kind == "base" else {rung - setup.decay_steps(rung): rung for rung in arm.rungs[:-1]}
    saves = {arm.rungs[-1]} if arm.kind == "base" else set(branches)
    trunk = _trainer(arm, setup, data, folder / "trunk", _first_model(arm, setup), arm.rungs[-1], saves=saves)
    resumes = arm.kind == "control" and setup.carries
    trunk.train(resume_from_checkpoint=setup.parent if resumes else None)
    ladder = {arm.rungs[-1]: _evaluate(trunk, data)}
    curve = [point for point in trunk.watch.curve if point[0] < arm.rungs[-1]]
    trunk.save_model(folder / "model")
    for start, rung in sorted(branches.items()):
        checkpoint = trunk.watch.saved[start]
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        branch = _trainer(arm, setup, data, folder / f"rung-{rung}", model, rung, start=start)
        branch.train(resume_from_checkpoint=checkpoint)
        ladder[rung] = _evaluate(branch, data)
    return Result(
        arm,
        dict(sorted(ladder.items())),
        [*curve, (arm.rungs[-1], ladder[arm.rungs[-1]]["source"])],
        str(folder / "model"),
        time.process_time() - cpu,
        time.perf_counter() - wall,
        {step: str(path) for step, path in trunk.watch.saved.items()},
    )


def _first_model(arm: Arm, setup: Setup) -> PreTrainedModel:
    """The model that an arm starts from."""
    if arm.kind in ("base", "base trial", "scratch"):
        config = AutoConfig.from_pretrained(Path(setup.work, f"{arm.kind.split()[0]}-config"))
        torch.manual_seed(setup.seed)
        return AutoModelForCausalLM.from_config(config)
    parent = AutoModelForCausalLM.from_pretrained(setup.parent, dtype=torch.float32)
    return grow(parent, **setup.growth) if arm.kind == "grown" else parent


def _trainer(
    arm: Arm,
    setup: Setup,
    data: dict[str, Tensor],
    folder: Path,
    model: PreTrainedModel,
    steps: int,
    start: int = 0,
    saves: Iterable[int] = (),
) -> Trainer:
    """The trainer of a trunk (from step 0) or of a rung that leaves it at step `start`."""
    # A control that carries the parent's state goes on counting the parent's steps.
    before = setup.parent_steps if arm.kind == "control" and setup.carries else 0
    carried = arm.kind == "grown" and setup.carries
    is_trunk = start == 0
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": before + steps,
        "per_device_train_batch_size": setup.batch,
        "per_device_eval_batch_size": 32,
        "train_sampling_strategy": "sequential",
        "ignore_data_skip": True,  # the stream below already starts where the run does
        "learning_rate": arm.learning_rate,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {
            "num_decay_steps": 0 if arm.kind == "base" else setup.decay_steps(steps),
            "decay_type": "linear",
        },
        "warmup_steps": setup.warmup,
        "eval_strategy": "steps" if is_trunk and setup.evaluations else "no",
        "eval_steps": max(1, steps // max(1, setup.evaluations)),
        "prediction_loss_only": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": setup.seed,
    }
    stream = 2 * setup.seed + (BASE_STREAM if arm.kind == "base" else NEW_STREAM)
    watch = Watch(arm, before, start, set(saves))
    common: dict[str, Any] = {
        "model": model,
        "train_dataset": BlockStream(data["train"], stream, start * setup.batch, (steps - start) * setup.batch),
        "eval_dataset": BlockStream(data["source"], 0, 0, len(data["source"])),
        "data_collator": default_data_collator,
        "callbacks": [watch],
    }
    if arm.kind == "grown":
        # Fresh moments need their warm-up; carried ones go on along the parent's plateau.
        policy = "continue" if carried and arm.state_policy != "reset" else "rewarm"
        trainer: Trainer = WarmstartTrainer(
            args=WarmstartTrainingArguments(**arguments, state_policy=arm.state_policy, schedule_policy=policy),
            warmstart_from=setup.parent if carried and is_trunk else None,
            **common,
        )
    else:
        trainer = Trainer(args=TrainingArguments(**arguments), **common)
    trainer.remove_callback(PrinterCallback)
    trainer.watch = watch
    return trainer


def _evaluate(trainer: Trainer, data: dict[str, Tensor]) -> dict[str, float]:
    """Held-out loss on both domains, in nats per token."""
    domains = {name: BlockStream(data[name], 0, 0, len(data[name])) for name in ("source", "docs")}
    metrics = trainer.evaluate(domains)
    return {name: metrics[f"eval_{name}_loss"] for name in domains}


class Watch(TrainerCallback):
    """Saves a trunk where its rungs leave it, and tells the main process how far an arm is."""

    def __init__(self, arm: Arm, before: int, start: int, saves: set[int]):
        self.arm, self.before, self.done, self.saves = arm, before, start, saves
        self.curve: list[tuple[int, float]] = []
        self.saved: dict[int, Path] = {}

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        # Resuming restores the checkpoint's rate over `args.learning_rate`: a control would keep its base's, untuned.
        lr_scheduler.base_lrs = [self.arm.learning_rate for _ in lr_scheduler.base_lrs]
        factors = [rate(lr_scheduler.last_epoch) for rate in lr_scheduler.lr_lambdas]
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["initial_lr"], group["lr"] = self.arm.learning_rate, self.arm.learning_rate * factor

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step - self.before
        if step in self.saves:
            control.should_save = True
        if step - self.done >= REPORT_EVERY or state.global_step == state.max_steps:
            self._tell(step - self.done, self.curve[-1][1] if self.curve else None)
            self.done = step

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if "eval_loss" in metrics:
            self.curve.append((state.global_step - self.before, metrics["eval_loss"]))

    def on_save(self, args, state, control, **kwargs):
        self.saved[state.global_step - self.before] = Path(args.output_dir, f"checkpoint-{state.global_step}")

    def _tell(self, steps: int, loss: float | None) -> None:
        if _CHANNEL:
            queue, stop = _CHANNEL
            queue.put((self.arm, steps, loss))
            if stop.is_set():
                raise Stopped(self.arm.name)
