"""The runs of a study, in the order in which they are worth most, each with what it needs.

A study that is cut short at any time has whole comparisons: seed by seed, the first target and its first arms first, or target
by target where the setting says so. What a run needs (its base, the trials of its rate) comes right before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from .settings import Arm, Setting

TRIAL, BASE, SCRATCH, TRANSFERRED, CONTROL = "trial", "base", "scratch", "transferred", "continue"
GROWN_TRIAL, GROWN, TRANSFERRED_TRIAL = "grown-trial", "grown", "transferred-trial"


@dataclass(frozen=True)
class Job:
    """A run: one trunk, and a decayed end at each of its rungs.

    Args:
        kind: what it is. target: the size that is trained, of a control the one that it stands beside. seed: of the study.
        base: what is grown or trained on. arm: of a grown one. rungs: tokens per parameter of the target.
        rate: of a trial, its learning rate, or the factor on an arm's or a transferred one. needs: names of jobs that come
            before.
    """

    kind: str
    target: str
    seed: int
    rungs: tuple[float, ...]
    base: str | None = None
    arm: Arm | None = None
    method: str | None = None
    rate: float | None = None
    needs: tuple[str, ...] = ()

    @cached_property
    def name(self) -> str:
        """Its name, and that of its file."""
        parts = [self.kind, self.target]
        parts += [self.base] if self.base else []
        parts += [re.sub(r"[^a-z0-9.]+", "-", self.method)] if self.method else []
        parts += [f"{self.rate:g}"] if self.rate is not None else []
        return "_".join([*parts, f"s{self.seed}"])

    @property
    def is_transferred(self) -> bool:
        """Whether it is from scratch, at its base's rate."""
        return self.kind in (TRANSFERRED, TRANSFERRED_TRIAL)

    @property
    def is_trial(self) -> bool:
        """Whether it only serves the choice of a rate."""
        return self.kind in (TRIAL, GROWN_TRIAL, TRANSFERRED_TRIAL)


def jobs_of(setting: Setting, seeds: tuple[int, ...] | None = None) -> list[Job]:
    """All runs of a study, in order; no run before what it needs."""
    pairs = [(seed, target) for seed in seeds or setting.seeds for target in setting.targets]
    if setting.target_by_target:
        targets = list(setting.targets)
        pairs.sort(key=lambda pair: targets.index(pair[1]))  # stable: seeds stay in order
    ordered: dict[str, Job] = {}
    for seed, target in pairs:
        for job in _of_target(setting, target, seed):
            ordered.setdefault(job.name, job)
    return list(ordered.values())


def _of_target(setting: Setting, target: str, seed: int) -> Iterator[Job]:
    """One seed of everything about a target."""
    trials = list(trials_of(setting, target))
    yield from trials
    names = tuple(job.name for job in trials)
    yield Job(SCRATCH, target, seed, setting.scratch_rungs, needs=names)
    tuned_at = list(trials_of(setting, setting.targets[target]))
    yield from tuned_at
    of_base = tuple(job.name for job in tuned_at)
    transferred = []
    if len(setting.scratch_factors) > 1:
        transferred = [
            Job(TRANSFERRED_TRIAL, target, setting.tuning_seed, setting.rungs[:2], setting.targets[target], rate=factor,
                needs=of_base)
            for factor in setting.scratch_factors
        ]  # fmt: skip
        yield from transferred
    needs = (*of_base, *(job.name for job in transferred))
    yield Job(TRANSFERRED, target, seed, setting.rungs, base=setting.targets[target], needs=needs)
    for arm in (arm for arm in setting.arms if arm.target == target):
        needs = of_base if arm.transfer and arm.base == setting.targets[target] else names
        needs += tuple(job.name for job in trials_of(setting, arm.base))
        yield from _of_arm(setting, arm, seed, needs)
    for _, base in (pair for pair in setting.controls if pair[0] == target):
        before = list(_base(setting, base, seed))
        yield from before
        yield Job(CONTROL, target, seed, setting.rungs[:2], base=base, needs=(before[-1].name,))


def _of_arm(setting: Setting, arm: Arm, seed: int, needs: tuple[str, ...]) -> Iterator[Job]:
    """One seed of an arm, its trials and bases before it."""
    method = setting.method(arm)
    before = list(_base(setting, arm.base, setting.tuning_seed))
    yield from before
    trials = [
        Job(GROWN_TRIAL, arm.target, setting.tuning_seed, setting.rungs[:2], arm.base, arm, method, factor,
            (*needs, before[-1].name))
        for factor in setting.factors
    ]  # fmt: skip
    yield from trials
    base = list(_base(setting, arm.base, seed))
    yield from base
    rungs = setting.rungs if arm.long else setting.rungs[:2]
    yield Job(GROWN, arm.target, seed, rungs, arm.base, arm, method, None,
              (*needs, *(job.name for job in trials), base[-1].name))  # fmt: skip


def trials_of(setting: Setting, size: str) -> Iterator[Job]:
    """The trials of a size's rate from scratch."""
    for rate in setting.rates:
        yield Job(TRIAL, size, setting.tuning_seed, setting.rungs[:2], rate=rate)


def _base(setting: Setting, size: str, seed: int) -> Iterator[Job]:
    """The trials of a base's rate, and the base."""
    trials = list(trials_of(setting, size))
    yield from trials
    yield Job(BASE, size, seed, (setting.base_rung,), needs=tuple(job.name for job in trials))
