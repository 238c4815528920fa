"""One run of a study: what it starts from, its rate, and the file that it leaves.

    finished/NAME.json   what a run was and came to; it takes its name when it is complete
    states/NAME.pt       weights and moments of a base where its trunk ends, before any decay

Everything is trained by the loop of the sweeps (`hf_warmstart.scaling.sweeps.training`): a trunk at a constant rate, from which
a decay branches off for each budget. Growth and state are the library's own: `grow`, and `load_grown_state`, by which
`WarmstartTrainer` carries moments too.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from hf_warmstart import GrowthConfig, WarmstartError, grow, plan_growth
from hf_warmstart.growth.coordinates import transferred_groups
from hf_warmstart.scaling.sweeps.design import Point
from hf_warmstart.scaling.sweeps.folder import write_atomically
from hf_warmstart.scaling.sweeps.proxies import Proxy
from hf_warmstart.scaling.sweeps.training import (
    FINISHED,
    RATE_FACTOR,
    Horizon,
    Reference,
    new_model,
    new_optimizer,
    train,
)
from hf_warmstart.scaling.tables.compute import flops_per_token
from hf_warmstart.training import GrownAdamW
from hf_warmstart.training.carry import load_grown_state

from .jobs import BASE, CONTROL, GROWN, GROWN_TRIAL, TRANSFERRED_TRIAL, TRIAL, Job, jobs_of, trials_of
from .settings import ASYMMETRIC, FRESH, Setting
from .text import Text

DONE, STATES = "finished", "states"
Row = dict[str, Any]
Started = tuple[PreTrainedModel, torch.optim.Optimizer]


class Study:
    """A study in a folder.

    Args:
        folder: its files. setting, text: what is run, on what. device: where. states: folder of the bases' weights and moments,
            which may be large; by default within the study's. seeds: reported ones, in place of the setting's.
    """

    def __init__(
        self,
        folder: Path,
        setting: Setting,
        text: Text,
        device: str = "cpu",
        states: Path | None = None,
        seeds: tuple[int, ...] | None = None,
    ):
        self.folder, self.setting, self.text = folder, setting, text
        self.device = torch.device(device)
        self.states = states or folder / STATES
        self.jobs = jobs_of(setting, seeds)
        self.by_name = {job.name: job for job in self.jobs}
        self._read: dict[str, Row] = {}

    # -- what is there --------------------------------------------------------------------------------------------

    def record(self, name: str) -> Row | None:
        """What a finished run left; None while it is not finished."""
        if name not in self._read:
            file = self.folder / DONE / f"{name}.json"
            if not file.is_file():
                return None
            self._read[name] = json.loads(file.read_text())
        return self._read[name]

    def is_done(self, job: Job) -> bool:
        """Whether a run is finished; a base whose state is gone counts only while nothing needs it any more."""
        if self.record(job.name) is None:
            return False
        return job.kind != BASE or self._state_file(job.name).is_file() or not self._is_needed(job)

    def _is_needed(self, base: Job) -> bool:
        return any(base.name in job.needs and self.record(job.name) is None for job in self.jobs)

    def is_ready(self, job: Job) -> bool:
        """Whether all that a run needs is there."""
        return all(self.is_done(self.by_name[name]) for name in job.needs)

    def _state_file(self, name: str) -> Path:
        return self.states / f"{name}.pt"

    # -- budgets and rates ----------------------------------------------------------------------------------------

    @cached_property
    def flops_per_token(self) -> dict[str, float]:
        """Of training, for each size."""
        return {name: flops_per_token(self.setting.config(name), self.setting.length) for name in self.setting.sizes}

    def scale(self, size: str) -> float:
        """What budgets of a size are multiplied with, so that no run takes more passes over the text than are allowed."""
        most = self.setting.max_epochs * self.text.tokens
        return min(1.0, most / (self.setting.scratch_rungs[-1] * self.setting.params[size]))

    def sequences(self, size: str, rung: float) -> int:
        """Sequences of a budget in tokens per parameter."""
        return max(1, round(rung * self.scale(size) * self.setting.params[size] / self.setting.length))

    def trained_size(self, job: Job) -> str:
        """The size that a run trains."""
        return job.base if job.kind == CONTROL and job.base else job.target

    def horizons(self, job: Job) -> tuple[int, ...]:
        """Sequences of a run at each of its rungs; of a control only as far as passes over the text are allowed."""
        counts = [self.sequences(job.target, rung) for rung in job.rungs]
        if job.kind == BASE:
            return tuple(math.ceil(n / (1 - self.setting.asked().decay)) for n in counts)
        if job.kind != CONTROL or job.base is None:
            return tuple(counts)
        costs = self.flops_per_token[job.target] / self.flops_per_token[job.base]
        counts = [round(n * costs) for n in counts]
        left = self.setting.max_epochs * self.text.tokens / self.setting.length
        left -= self.sequences(job.base, self.setting.base_rung)
        return tuple(n for n in counts if n <= left)

    def cost(self, job: Job) -> float:
        """FLOPs of a run, its branches included."""
        horizons, decay = self.horizons(job), self.setting.asked().decay
        sequences = sum(decay * n for n in horizons[:-1]) + (horizons[-1] if horizons else 0)
        return sequences * self.setting.length * self.flops_per_token[self.trained_size(job)]

    def best_trial(self, jobs: list[Job]) -> float:
        """The rate, or factor, whose trial ended lowest.

        Raises:
            WarmstartError: every one diverged.
        """
        losses = {job.rate: (self.record(job.name) or {"rows": [{"loss": None}]})["rows"][-1]["loss"] for job in jobs}
        found = {rate: loss for rate, loss in losses.items() if rate is not None and loss is not None}
        if not found:
            raise WarmstartError(f"Every trial diverged: {', '.join(job.name for job in jobs)}.")
        return min(found, key=lambda rate: found[rate])

    def tuned_rate(self, size: str) -> float:
        """The rate of a size from scratch."""
        return self.best_trial(list(trials_of(self.setting, size)))

    def factor(self, job: Job) -> float:
        """The factor on an arm's rate, or on a transferred one: a trial's own, else the best of them; 1 without trials."""
        if job.rate is not None:
            return job.rate
        trials = self.trials(job)
        return self.best_trial(trials) if trials else 1.0

    def trials(self, job: Job) -> list[Job]:
        """The trials that choose the factor on a run's rate."""
        return [other for name in job.needs if (other := self.by_name[name]).kind in (GROWN_TRIAL, TRANSFERRED_TRIAL)]

    def rate(self, job: Job) -> float:
        """The peak learning rate of a run."""
        if job.kind == TRIAL and job.rate is not None:
            return job.rate
        if job.kind == CONTROL and job.base:
            return self.tuned_rate(job.base)
        if job.is_transferred and job.base:
            return self.tuned_rate(job.base) * self.factor(job)
        if job.arm is not None:
            return self.tuned_rate(job.arm.base if job.arm.transfer else job.target) * self.factor(job)
        return self.tuned_rate(job.target)

    # -- running --------------------------------------------------------------------------------------------------

    def run(self, job: Job) -> Row:
        """Train, and leave the file."""
        setting, rate = self.setting, self.rate(job)
        size, horizons = self.trained_size(job), self.horizons(job)
        proxy = self._proxy(size, horizons)
        warms_up = job.kind != CONTROL and (job.arm is None or job.arm.warms_up)
        wall, cpu = time.perf_counter(), time.process_time()
        outcomes = []
        if horizons:
            outcomes = train(
                LlamaForCausalLM,
                proxy,
                Point(rate, setting.batch),
                2 * job.seed + (job.kind != BASE),  # what is new to a grown model is another stream than its base's
                (self.text.train, self.text.held_out),
                setting.asked(warms_up),
                Reference(),
                self.device,
                begin=lambda: self._begin(job, rate),
                take_trunk=lambda model, optimizer: self._keep(job, model, optimizer),
            )
        rows = [
            {"rung": rung, "tokens": n * setting.length, "loss": o.loss if o.status == FINISHED else None}
            for rung, n, o in zip(job.rungs, horizons, outcomes, strict=False)
        ]
        made = {
            "name": job.name,
            "kind": job.kind,
            "target": job.target,
            "base": job.base,
            "method": job.method,
            "seed": job.seed,
            "size": size,
            "params": setting.params[size],
            "learning_rate": rate,
            "rate_factor": self.factor(job) if job.arm or job.is_transferred else None,
            "arm": dataclasses.asdict(job.arm) if job.arm else None,
            "rows": rows,
            "base_tokens": self.base_tokens(job.base) if job.base and not job.is_transferred else None,
            "trained_flops": sum(o.spent_tokens for o in outcomes) * self.flops_per_token[size],
            "seconds": round(time.perf_counter() - wall, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU, one thread",
            "torch": torch.__version__,
        }
        (self.folder / DONE).mkdir(exist_ok=True)
        write_atomically(self.folder / DONE / f"{job.name}.json", json.dumps(made, indent=1) + "\n")
        return made

    def base_tokens(self, size: str) -> int:
        """Tokens that a base has seen where its trunk ends."""
        setting = self.setting
        [n] = self.horizons(Job(BASE, size, 0, (setting.base_rung,)))
        return Horizon.of(n, n, setting.batch, setting.asked()).stable_end * setting.batch * setting.length

    def _proxy(self, size: str, horizons: tuple[int, ...]) -> Proxy:
        setting = self.setting
        return Proxy(setting.config(size), setting.params[size], self.flops_per_token[size], setting.length, horizons)

    def _begin(self, job: Job, rate: float) -> Started:
        """The model and the optimizer that a run starts with."""
        if job.kind == CONTROL:
            return self._continued(job, rate)
        if job.kind in (GROWN, GROWN_TRIAL):
            return self._grown(job, rate)
        model = new_model(LlamaForCausalLM, self._proxy(job.target, ()), self.device)
        optimizer = _named(model, new_optimizer(model, rate, self.setting.asked()))
        if job.is_transferred and job.base:
            plan = plan_growth(self.setting.config(job.base), self._growth(job))
            _transfer(model, optimizer, plan, rate)
        return model, optimizer

    def _continued(self, job: Job, rate: float) -> Started:
        """A base as its trunk ended."""
        model, saved = self._base(job)
        model = model.to(self.device).train()
        optimizer = _named(model, new_optimizer(model, rate, self.setting.asked()))
        optimizer.load_state_dict(saved["optimizer"])
        return model, optimizer

    def _grown(self, job: Job, rate: float) -> Started:
        """A grown base, with what its arm takes of the state; grown on the CPU, wherever it is trained."""
        arm = job.arm
        if arm is None:
            raise WarmstartError(f"{job.name} has no arm.")
        base, saved = self._base(job)
        growth = self._growth(job)
        plan = plan_growth(base, growth)
        model = grow(base, growth).to(self.device).train()
        kind = GrownAdamW if arm.state == ASYMMETRIC else torch.optim.AdamW
        optimizer = _named(model, new_optimizer(model, rate, self.setting.asked(), kind))
        if arm.transfer:
            _transfer(model, optimizer, plan, rate)
        if arm.state != FRESH:
            state = saved["optimizer"]
            named = {saved["names"][number]: entry for number, entry in state["state"].items()}
            whole = {"state": named, "param_groups": state["param_groups"]}
            load_grown_state(optimizer, whole, plan, state_policy=arm.state)
        return model, optimizer

    def _growth(self, job: Job) -> GrowthConfig:
        arm = job.arm
        target = self.setting.config(job.target)
        if arm is None:
            return GrowthConfig(target_config=target)
        return GrowthConfig(
            target_config=target,
            width_operator=arm.width,
            depth_operator=arm.depth,
            shrink=arm.shrink,
            seed=job.seed,
        )

    def _base(self, job: Job) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        """The base of a run, on the CPU, and what was kept beside its weights."""
        name = Job(BASE, job.base or "", job.seed, ()).name
        saved = torch.load(self._state_file(name), map_location="cpu")
        model = new_model(LlamaForCausalLM, self._proxy(job.base or "", ()), torch.device("cpu"))
        model.load_state_dict(saved["model"])
        return model, saved

    def _keep(self, job: Job, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Write a base's state."""
        if job.kind != BASE:
            return
        self.states.mkdir(parents=True, exist_ok=True)
        names = [name for group in optimizer.param_groups for name in group["param_names"]]
        beside = self.states / f".{job.name}.{os.getpid()}"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "names": names}, beside)
        os.replace(beside, self._state_file(job.name))


def _named(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer whose groups say the names of their parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["param_names"] = [names[id(p)] for p in group["params"]]
    return optimizer


def _transfer(model: PreTrainedModel, optimizer: torch.optim.Optimizer, plan: Any, rate: float) -> None:
    """Split an optimizer's groups by muP's factors on the rate."""
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer.param_groups[:] = transferred_groups(optimizer, names, plan)
    for group in optimizer.param_groups:
        group[RATE_FACTOR] = group["lr"] / rate
    _named(model, optimizer)
