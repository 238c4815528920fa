"""`select_warmstart`: which warm start goes on best, asked of short runs before a budget is spent on one.

    1. every candidate: zero-step metrics and a probe, in its own folder (`arms`)
    2. as many survivors as the budget affords: the whole continuation, from where the probe stopped
    3. rounds of repeats on other data, the worse half dropped after each, until the leader is clear (`halving`)
    4. a `SelectionReport`, which says what was not settled

Every decision is made from results on disk, so that a selection that was stopped goes on, and several processes that are
given the same work share it (`run`), to the same ranking.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoints.memory import bytes_of
from ..checkpoints.state.parent_state import SCHEDULER_NAMES, SHARDED_OPTIMIZER, optimizer_file
from ..checkpoints.torch_files.sharded import is_sharded
from ..errors import StateError, WarmstartError
from ..growth.layout import collect
from ..growth.source import class_and_config
from .candidates import Candidate, candidate_pool, check_names
from .halving import LEAST_REPEATS, MOST_REPEATS, affordable, half, leader_is_clear, ordered
from .outcomes import OBJECTIVES, outcome
from .probes import LAGS
from .regimes import Regime, matched_steps
from .report import SelectionReport, make_report
from .run import Runner
from .study import ARMS, Study, as_warmstart_arguments, planned_steps, with_length

CONTINUATION_STEPS = 128  # arXiv 2604.04281
MATCHES = ("steps", "flops", "time")


def select_warmstart(
    parent: str | os.PathLike,
    candidates: Iterable[Candidate] | None = None,
    *,
    train_dataset: Any,
    eval_dataset: Any,
    args: TrainingArguments,
    regime: str | Regime = "deterministic",
    probe_steps: int | Sequence[int] = LAGS,
    continuation_steps: int = CONTINUATION_STEPS,
    budget: float | str | None = None,
    match: str = "steps",
    objective: str = "final_loss",
    eval_every: int | None = None,
    repeats: int = MOST_REPEATS,
    max_memory: str | int | None = None,
    **trainer_options: Any,
) -> SelectionReport:
    """Rank warm starts by how they go on, and choose one.

    Args:
        parent (`str` or `os.PathLike`): the parent's Trainer checkpoint.
        candidates (iterable of `Candidate`, *optional*): at least two; None for `candidate_pool()`, width 2. What of the pool
            a model does not admit is left out, with its reason in the report.
        train_dataset, eval_dataset: as for `Trainer`. Of a stream the first examples are taken, as many as are needed.
        args (`TrainingArguments`): of the run that is to be started: its steps, schedule, batch and learning rate. Arms lie
            in `output_dir/_selection`, which is never pushed, the report in `output_dir`. `full_determinism=True` asks for
            deterministic kernels. A step takes `per_device_train_batch_size * gradient_accumulation_steps` examples in one
            process, and several processes share the arms: for a run planned over n processes pass n times the accumulation.
        regime (`str` or `Regime`, defaults to `"deterministic"`): `"deterministic"`, `"shuffled"`, `"dropout"` or
            `"stochastic"`; what the planned run will be like.
        probe_steps (`int` or several, defaults to `(16, 64)`): lags at which probes measure; the last is a probe's length,
            and the loss there says who is continued. 16 alone, as in arXiv 2604.04281, ranks badly.
        continuation_steps (`int`, defaults to 128): steps of a continuation.
        budget (`float` or `str`, *optional*): the most that the selection may cost, as a share of the planned run's FLOPs:
            `0.02` or `"2%"`. Evaluations and measures count. None: no limit.
        match (`str`, defaults to `"steps"`): what continuations have in common: `"steps"`, `"flops"` or `"time"`
            (seconds as measured in the probes: other machines, and other runs, rank otherwise).
        objective (`str`, defaults to `"final_loss"`): `"final_loss"` of the continuation, or `"auc"`, the mean over its
            steps (the paper's).
        eval_every (`int`, *optional*): steps between two evaluations; by default an eighth of the continuation.
        repeats (`int`, defaults to 5): of a continuation, at most.
        max_memory (`str` or `int`, *optional*): what an arm may take, such as `"8GB"`; by default what is free.
        **trainer_options: for every trainer: `data_collator`, `processing_class` and the like.

    Returns:
        The `SelectionReport`, also saved in `args.output_dir`.

    Raises:
        WarmstartError: nothing to choose, an empty evaluation set, a budget that does not pay for the probes, candidates
            that do not fit in memory, a folder with another selection's arms.
        StateError: candidates need training state that the checkpoint does not have; `state_policy="reset"` does not.
            All are raised before anything is written.

    Example:

        >>> report = select_warmstart("runs/base/checkpoint-2000", train_dataset=train, eval_dataset=held_out,
        ...                           args=args, regime="stochastic", budget="2%")          # doctest: +SKIP
        >>> report.best, report.cost_fraction                                               # doctest: +SKIP
        ('reference_slice', 0.018)
        >>> report.start().train()                                                          # doctest: +SKIP

    Source: arXiv 2604.04281 (states as candidates, lags, regimes); halving: arXiv 1502.07943.
    """
    selection = prepare_selection(
        parent,
        candidates,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        args=args,
        regime=regime,
        probe_steps=probe_steps,
        continuation_steps=continuation_steps,
        budget=budget,
        match=match,
        objective=objective,
        eval_every=eval_every,
        repeats=repeats,
        max_memory=max_memory,
        **trainer_options,
    )
    return selection.run()


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
        steps = progress.steps = self._matched(progress)
        names = progress.probe_order
        first = lambda name: study.arm_flops(name, study.probe_steps, steps[name], False)  # noqa: E731
        again = lambda name: study.arm_flops(name, 0, steps[name], False)  # noqa: E731
        left = None if self.budget is None else self.budget - progress.spent
        alive, _ = affordable(names, first, again, left)
        if not alive:
            progress.stopped = "the budget pays for no continuation" if len(names) > 1 else "one candidate is left"
            alive = names[:1]
        progress.drop([name for name in names if name not in alive], "by the probe")
        runner.drop([name for name in names if name not in alive])
        for repeat in range(self.repeats):
            price = sum((first if repeat == 0 else again)(name) for name in alive)
            if len(alive) < 2 or (left is not None and price > left):
                progress.stopped = progress.stopped or (
                    "one candidate is left" if len(alive) < 2 else "the budget was spent"
                )
                break
            left = None if left is None else left - price
            progress.spent += price
            for result in runner.run([(name, repeat, steps[name], False) for name in alive]):
                progress.add_continuation(result, self.objective)
            alive = ordered({name: progress.losses[name] for name in alive if name not in progress.out})
            if len(alive) > 1 and leader_is_clear({name: progress.losses[name] for name in alive}, self.least_repeats):
                progress.stopped = "the leader is clear"
                break
            kept = half(alive) if repeat + 1 < self.repeats else alive
            progress.drop([name for name in alive if name not in kept], f"after repeat {repeat}")
            runner.drop([name for name in alive if name not in kept])
            alive = kept
        progress.stopped = progress.stopped or "all repeats were made"
        progress.alive = alive

    def _matched(self, progress: Progress) -> dict[str, int]:
        study, most = self.study, self.study.continuation_steps
        names = progress.probe_order
        if self.match == "steps" or not names:
            return dict.fromkeys(names, most)
        prices = {name: study.step_flops(name) for name in names}
        if self.match == "time":
            prices = {name: max(progress.seconds[name], 1e-9) for name in names}
        return {name: max(steps, study.probe_steps) for name, steps in matched_steps(most, prices).items()}


@dataclass
class Progress:
    """What a selection has found so far, made anew from the results by every process."""

    probes: dict[str, list] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    out: dict[str, str] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    curves: dict[str, list[list]] = field(default_factory=dict)
    rates: dict[str, float | None] = field(default_factory=dict)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    alive: list[str] = field(default_factory=list)
    spent: float = 0.0
    stopped: str = ""

    def add_probe(self, result: Mapping[str, Any]) -> None:
        name = result["candidate"]
        self.probes[name] = result["evaluations"]
        if result["reason"] is not None:
            self.out[name] = result["reason"]
        else:
            self.seconds[name] = result["seconds_per_step"] or 0.0

    def add_continuation(self, result: Mapping[str, Any], objective: str) -> None:
        name = result["candidate"]
        if result["reason"] is not None:
            self.out[name] = result["reason"]
            return
        self.losses.setdefault(name, []).append(outcome(result["evaluations"], objective))
        self.curves.setdefault(name, []).append(result["evaluations"])
        self.rates[name] = result["learning_rate"]

    def drop(self, names: Sequence[str], when: str) -> None:
        """Note that candidates are not continued, the better ones last."""
        self.dropped += [(name, when) for name in reversed(names)]

    @property
    def probe_order(self) -> list[str]:
        """Candidates that are not out, by their loss at the end of the probe."""
        ends = {name: rows[-1][1] for name, rows in self.probes.items() if name not in self.out}
        return sorted(ends, key=lambda name: (ends[name], name))

    @property
    def ranking(self) -> list[str]:
        """All candidates, best first: those that stayed, then those dropped last; at the end those that are out."""
        gone = [name for name, _ in reversed(self.dropped) if name not in self.out]
        return [*self.alive, *gone, *sorted(self.out)]


def prepare_selection(
    parent: str | os.PathLike,
    candidates: Iterable[Candidate] | None = None,
    *,
    train_dataset: Any,
    eval_dataset: Any,
    args: TrainingArguments,
    regime: str | Regime = "deterministic",
    probe_steps: int | Sequence[int] = LAGS,
    continuation_steps: int = CONTINUATION_STEPS,
    budget: float | str | None = None,
    match: str = "steps",
    objective: str = "final_loss",
    eval_every: int | None = None,
    repeats: int = MOST_REPEATS,
    max_memory: str | int | None = None,
    from_pool: bool = False,
    **trainer_options: Any,
) -> Selection:
    """Check everything that `select_warmstart` needs, without writing or training; the arguments are its own.

    `from_pool` says that the candidates are a pool's: what cannot be is left out instead of raised.
    """
    folder = Path(parent)
    if not folder.is_dir():
        raise WarmstartError(
            f"parent={str(parent)!r} is no folder. Pass the parent's checkpoint: runs/base/checkpoint-500."
        )
    lags = _lags(probe_steps, continuation_steps)
    for name, value, choices in (("match", match, MATCHES), ("objective", objective, OBJECTIVES)):
        if value not in choices:
            raise WarmstartError(f"{name}={value!r} is none of {list(choices)}.")
    if repeats < 1:
        raise WarmstartError(f"repeats={repeats!r} must be at least 1.")
    if budget is not None:
        _share(budget)
    regime, own = Regime.of(regime), as_warmstart_arguments(args)
    chosen = candidates is not None and not from_pool
    pool = candidate_pool() if candidates is None else list(candidates)
    check_names(pool)
    model_class, config = class_and_config(folder)
    config = regime.configured(config)
    examples = repeats * continuation_steps * own.per_device_train_batch_size * own.gradient_accumulation_steps
    train_dataset = with_length(train_dataset, examples)
    eval_dataset = with_length(eval_dataset, examples)
    for name, data in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        if data is None or len(data) == 0:
            raise WarmstartError(
                f"{name} is empty: candidates cannot be told apart. Pass examples with input_ids and labels."
            )
    planned = planned_steps(own, len(train_dataset))
    if planned < continuation_steps:
        raise WarmstartError(
            f"continuation_steps={continuation_steps} is more than the {planned} steps of the planned run (args). Pass fewer, "
            "or the max_steps of the run that is to be started."
        )
    pool, notes = _with_their_state(pool, folder, chosen=chosen)
    study = Study(
        folder,
        model_class,
        config,
        {candidate.name: candidate for candidate in pool},
        own,
        regime,
        train_dataset,
        eval_dataset,
        planned,
        lags,
        continuation_steps,
        eval_every or max(1, continuation_steps // 8),
        Path(own.output_dir, ARMS),
        trainer_options,
        {"match": match, "objective": objective, "repeats": repeats, "budget": budget},
    )
    study.first_example  # noqa: B018  raises now where the parent's place in its data is not known
    refused = _plan_all(study, chosen=chosen)
    check_memory(study, max_memory)
    selection = Selection(study, None, match, objective, repeats, refused, notes)
    selection.budget = _budget(budget, selection)
    return selection


def _lags(probe_steps: int | Sequence[int], continuation_steps: int) -> tuple[int, ...]:
    lags = tuple(sorted({probe_steps} if isinstance(probe_steps, int) else set(probe_steps)))
    whole = lags and all(isinstance(lag, int) and lag > 0 for lag in lags)
    if not whole or not isinstance(continuation_steps, int) or lags[-1] > continuation_steps:
        raise WarmstartError(
            f"probe_steps={probe_steps!r} must be whole numbers above 0, at most continuation_steps={continuation_steps!r}."
        )
    return lags


def _with_their_state(pool: list[Candidate], folder: Path, chosen: bool) -> tuple[list[Candidate], list[str]]:
    """The candidates that the checkpoint has the state for, and what is lost without the others."""
    has_optimizer = optimizer_file(folder) is not None or is_sharded(folder / SHARDED_OPTIMIZER)
    has_schedule = (
        any((folder / name).is_file() for name in SCHEDULER_NAMES) and (folder / TRAINER_STATE_NAME).is_file()
    )
    lacking = [
        c for c in pool if (c.needs_optimizer and not has_optimizer) or (c.needs_scheduler and not has_schedule)
    ]
    if not lacking:
        return pool, []
    missing = [word for word, there in (("optimizer state", has_optimizer), ("schedule", has_schedule)) if not there]
    lost = []
    if not has_optimizer:
        lost.append(
            "first and second moments and step counts, so that the first dozens of steps are those of a fresh Adam"
        )
    if not has_schedule:
        lost.append("the place in the schedule, so that the learning rate begins anew")
    words = f"The checkpoint {folder.name} has no {' and no '.join(missing)}. Lost: {'; '.join(lost)}."
    if chosen:
        raise StateError(
            f"{words} These candidates need it: {', '.join(sorted(c.name for c in lacking))}. Give them state_policy='reset' "
            "and schedule_policy='rewarm', or leave candidates out for those of weights only."
        )
    left = [
        weights_only(c) if c in lacking else c
        for c in pool
        if not (c in lacking and c.state_policy == "asymmetric_reset")
    ]
    left = [c for c in left if c.name != "weights_only"]  # the perturbed copy under another name
    return left, [f"{words} All candidates start from weights alone."]


def weights_only(candidate: Candidate) -> Candidate:
    """A candidate that takes nothing but weights from its parent."""
    data = candidate.to_dict()
    return Candidate.from_dict({**data, "state_policy": "reset", "schedule_policy": "rewarm", "arguments": {}})


def _plan_all(study: Study, chosen: bool) -> dict[str, str]:
    """Plan all growths; what the model does not admit is raised, or of the pool left out: name and reason."""
    from ..growth.plan import make_plan

    refused = {}
    for name, candidate in study.candidates.items():
        try:
            make_plan(study.model_class, study.config, candidate.growth)
        except WarmstartError as fault:
            refused[name] = " ".join(str(fault).split())
    if refused and chosen:
        lines = [f"{name}: {reason}" for name, reason in sorted(refused.items())]
        raise WarmstartError(f"{study.model_class.__name__} cannot be grown as candidates ask:\n{collect(lines)}")
    study.candidates = {name: c for name, c in study.candidates.items() if name not in refused}
    check_names(study.candidates.values())
    return refused


def needed_bytes(study: Study, name: str) -> int:
    """What an arm takes beside what the process has, activations apart: the child with its gradients and two moments, the
    parent, and the child as it was at step 0."""
    plan = study.plans[name]
    itemsize = plan.tensor_bytes // max(plan.parameters_after, 1)
    return plan.tensor_bytes * 5 + plan.parameters_before * itemsize


def check_memory(study: Study, max_memory: str | int | None) -> None:
    """Raise, naming all of them, where candidates do not fit in memory."""
    free = bytes_of(max_memory, "max_memory") if max_memory is not None else free_bytes(study.args.device)
    too_large = {name: needed for name in study.candidates if (needed := needed_bytes(study, name)) > free}
    if too_large:
        lines = [f"{name} needs {needed / 1e9:.3g} GB" for name, needed in sorted(too_large.items())]
        raise WarmstartError(
            f"{len(too_large)} candidates do not fit in memory ({free / 1e9:.3g} GB), activations apart:\n{collect(lines)}\n"
            "Pass smaller growths, or a machine with more."
        )


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _budget(budget: float | str | None, selection: Selection) -> float | None:
    """A budget in FLOPs.

    Raises:
        WarmstartError: it is no share, or does not pay for the probes.
    """
    if budget is None:
        return None
    share = _share(budget)
    flops = share * selection.planned_flops
    if flops < selection.probes_flops:
        least = selection.probes_flops / selection.planned_flops
        raise WarmstartError(
            f"budget={budget!r} does not pay for the probes of {len(selection.study.candidates)} candidates, which cost "
            f"{least:.2%} of the planned run. Pass at least that, fewer candidates, or fewer probe_steps."
        )
    return flops


def _share(budget: float | str) -> float:
    text = str(budget).strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1 or isinstance(budget, bool):
        raise WarmstartError(f"budget={budget!r} is no share of the planned run. Pass 0.02 or '2%'.")
    return share
