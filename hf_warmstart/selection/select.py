"""`select_warmstart`: which warm start goes on best, asked of short runs before a budget is spent on one.

    1. every candidate: zero-step metrics and a probe, in its own folder (`arms`)
    2. as many survivors as the budget affords: the whole continuation, from where the probe stopped
    3. rounds of repeats on other data, the worse half dropped after each, until the leader is clear (`halving`)
       (by `objective="extrapolated"` 2 is a race of all, for its length: `racing`)
    4. a `SelectionReport`, which says what was not settled

Every decision is made from results on disk, so that a selection that was stopped goes on, and several processes that are
given the same work share it (`run`), to the same ranking. What is checked beforehand is in `prepare`, the rounds in `rounds`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import TrainingArguments

from .candidates import Candidate
from .halving import MOST_REPEATS
from .prepare import CONTINUATION_STEPS, prepare_selection
from .probes import LAGS
from .regimes import Regime
from .report import SelectionReport


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
    schedule: str = "planned",
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
        train_dataset: as for `Trainer`. Of a stream the first examples are taken, as many as are needed.
        eval_dataset: likewise.
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
        schedule (`str`, defaults to `"planned"`): `"planned"`: short runs are beginnings of the planned run, at its rates.
            `"compressed"`: they are the planned run in little, with its whole schedule in `continuation_steps`, decay and
            warm-up included, so that what a decay brings out is seen. What is started is the same.
        objective (`str`, defaults to `"final_loss"`): `"final_loss"` of the continuation; `"auc"`, the mean over its steps
            (the paper's); or `"extrapolated"`: where candidates would be at the planned run's end. For that they race: whoever
            is behind another one and does not catch up with it is dropped, at the probe's end and at each doubling of the
            steps, to `continuation_steps` at most or as far as the budget goes, and distances are taken on over what is left
            of the planned learning rates (`selection/racing.py`). Give a budget, and `continuation_steps` well above the
            probe's; `repeats` are made only of a race that came to its end.
        eval_every (`int`, *optional*): steps between two evaluations; by default an eighth of the continuation. In a race half
            of the probe, and twice as many after each doubling of the steps.
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
        schedule=schedule,
        objective=objective,
        eval_every=eval_every,
        repeats=repeats,
        max_memory=max_memory,
        **trainer_options,
    )
    return selection.run()
