"""Single runs, each a file: what a process of the pool does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.utils import logging

from hf_warmstart.scaling.sweeps.design import Point
from hf_warmstart.scaling.sweeps.folder import write_atomically
from hf_warmstart.scaling.sweeps.plan import SweepPlan
from hf_warmstart.scaling.sweeps.proxies import Proxy
from hf_warmstart.scaling.sweeps.runner import RunJob, train_job
from hf_warmstart.scaling.sweeps.text import Blocks
from hf_warmstart.scaling.sweeps.training import Outcome, Reference, held_out_loss, train

from .setting import PROBE, Target

logging.disable_progress_bar()


@dataclass(frozen=True)
class Shared:
    """What every process knows.

    Args:
        target: with its setting. folder: for parents and runs. plan: of the sweep, with its texts. pretrain: text of each
            parent. device: of all runs.
    """

    target: Target
    folder: Path
    plan: SweepPlan
    pretrain: dict[str, Blocks]
    device: str


@dataclass(frozen=True)
class ParentJob:
    """Train a parent."""

    name: str


@dataclass(frozen=True)
class ProbeJob:
    """Train the target from a parent for a short while."""

    parent: str
    point: Point


@dataclass(frozen=True)
class TargetJob:
    """Train the target from a parent."""

    parent: str
    point: Point
    seed: int


def work(shared: Shared, job: RunJob | ParentJob | ProbeJob | TargetJob) -> Any:
    """Do a job; what a run of the sweep came to, the others leave files."""
    if isinstance(job, RunJob):
        return train_job((shared.plan, shared.device), job)
    if isinstance(job, ParentJob):
        return _train_parent(shared, job)
    if isinstance(job, ProbeJob):
        return _train_probe(shared, job)
    return _train_target(shared, job)


def parent_file(folder: Path, name: str) -> Path:
    """There once the parent is whole: its loss and how it was trained."""
    return folder / f"parent-{name}" / "loss.json"


def probe_file(folder: Path, job: ProbeJob) -> Path:
    """There once the probe is over."""
    point = job.point
    return folder / f"probes-{job.parent}" / f"b{point.batch_sequences}-lr{point.learning_rate:.6g}.json"


def target_file(folder: Path, job: TargetJob) -> Path:
    """There once the run is over."""
    point = job.point
    return folder / f"target-{job.parent}" / f"b{point.batch_sequences}-lr{point.learning_rate:.6g}-s{job.seed}.json"


def _train_parent(shared: Shared, job: ParentJob) -> None:
    target, asked = shared.target, shared.target.setting.shared
    file = parent_file(shared.folder, job.name)
    run = target.run_of(target.setting.parents[job.name])
    point = target.usual(run.tokens[0])

    def keep(model: LlamaForCausalLM) -> None:
        model.save_pretrained(file.parent)
        loss = held_out_loss(model, shared.plan.evaluation, asked)
        said = {"loss": loss, "learning_rate": point.learning_rate, "batch_sequences": point.batch_sequences}
        write_atomically(file, json.dumps(said | {"tokens": run.tokens[0]}))

    # What it has learnt is seen on its own text: of another one it may know less than nothing.
    texts = shared.pretrain[job.name], shared.pretrain[job.name].first(shared.plan.evaluation.count)
    device = torch.device(shared.device)
    train(LlamaForCausalLM, run, point, 0, texts, asked, Reference(), device, take=keep)


def _train_probe(shared: Shared, job: ProbeJob) -> None:
    outcome, run = _continued(shared, job.parent, job.point, 0, PROBE * shared.target.setting.tokens_per_parameter)
    said = {"learning_rate": job.point.learning_rate, "batch_sequences": job.point.batch_sequences}
    said |= {"batch_tokens": job.point.batch_sequences * run.sequence_length, "tokens": run.tokens[0]}
    file = probe_file(shared.folder, job)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(said | {"loss": outcome.loss, "seconds": round(outcome.seconds, 3)}))


def _train_target(shared: Shared, job: TargetJob) -> None:
    outcome, _ = _continued(shared, job.parent, job.point, job.seed, shared.target.setting.tokens_per_parameter)
    file = target_file(shared.folder, job)
    file.parent.mkdir(parents=True, exist_ok=True)
    said = {"learning_rate": job.point.learning_rate, "batch_sequences": job.point.batch_sequences, "seed": job.seed}
    said |= {"status": outcome.status, "loss": outcome.loss, "seconds": round(outcome.seconds, 3)}
    write_atomically(file, json.dumps(said))


def _continued(
    shared: Shared, parent: str, point: Point, seed: int, tokens_per_parameter: float
) -> tuple[Outcome, Proxy]:
    """A run of the target from a parent: what came of it, and its length."""
    run = shared.target.run_of(tokens_per_parameter)
    [outcome] = train(
        LlamaForCausalLM, run, point, seed, (shared.plan.train, shared.plan.evaluation), shared.target.setting.shared,
        Reference(), torch.device(shared.device), weights=_weights(parent_file(shared.folder, parent).parent),
    )  # fmt: skip
    return outcome, run


@lru_cache(maxsize=2)
def _weights(folder: Path) -> dict[str, Tensor]:
    return LlamaForCausalLM.from_pretrained(folder).state_dict()
