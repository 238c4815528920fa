"""`prepare_selection`: everything that a selection needs, checked before anything is written or trained."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoints.memory import bytes_of
from ..checkpoints.state.parent_state import SCHEDULER_NAMES, SHARDED_OPTIMIZER, optimizer_file
from ..checkpoints.torch_files.sharded import is_sharded
from ..errors import StateError, WarmstartError
from ..growth.layout import collect
from ..growth.source import class_and_config
from .candidates import Candidate, candidate_pool, check_names
from .halving import MOST_REPEATS
from .outcomes import OBJECTIVES
from .probes import LAGS
from .regimes import Regime
from .rounds import Selection
from .study import ARMS, Study, as_warmstart_arguments, planned_steps, with_length

CONTINUATION_STEPS = 128  # arXiv 2604.04281
MATCHES = ("steps", "flops", "time")
SCHEDULES = ("planned", "compressed")


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
    schedule: str = "planned",
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
    choices_of = (("match", match, MATCHES), ("schedule", schedule, SCHEDULES), ("objective", objective, OBJECTIVES))
    for name, value, choices in choices_of:
        if value not in choices:
            raise WarmstartError(f"{name}={value!r} is none of {list(choices)}.")
    if schedule == "compressed" and match != "steps":
        raise WarmstartError(
            f"schedule='compressed' ends with the continuation, which match={match!r} makes of several lengths. Pass "
            "match='steps', or schedule='planned'."
        )
    if objective == "extrapolated" and (match != "steps" or schedule != "planned"):
        raise WarmstartError(
            f"objective='extrapolated' compares curves step by step under the planned schedule; given match={match!r} and "
            f"schedule={schedule!r}. Pass match='steps' and schedule='planned'."
        )
    racing = objective == "extrapolated"
    every = eval_every or max(1, lags[-1] // 2 if racing else continuation_steps // 8)
    if racing and every > max(1, lags[-1] // 2):
        raise WarmstartError(
            f"objective='extrapolated' compares losses at half the probe with those at its end, and eval_every={every} leaves "
            f"the half of {lags[-1]} steps out. Pass at most {lags[-1] // 2}."
        )
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
        every,
        Path(own.output_dir, ARMS),
        trainer_options,
        {"match": match, "schedule": schedule, "objective": objective, "repeats": repeats, "budget": budget},
        schedule,
        racing,
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
