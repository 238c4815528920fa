"""`Candidate`: one way to start a grown model, over its full training state, under a name that stays.

A candidate is not a set of weights. What continues is weights, moments, step counts, the place in the schedule, the place
in the data and the random state together; two candidates with equal weights and different moments are two candidates. A
growth (width and depth operators with their options), a state policy and a schedule policy say all that differs between
candidates; the data and the random state are the same for all of them, and are recorded beside the rest.

Source: arXiv 2604.04281 (what a candidate is, and the four families); the controls and the other operators are ours.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import WarmstartError
from ..growth.config import GrowthConfig
from ..growth.state import check_state_policy
from ..training.schedules import SCHEDULE_POLICIES

# The arguments of a warm start that a candidate may set: no others may differ between candidates.
ARGUMENTS = (
    "decay_fraction",
    "equal_loss_run",
    "equal_loss_step",
    "learning_rate_transfer",
    "new_lr_peak",
    "new_lr_steps",
    "schedule_ramp_steps",
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
NOISES = (0.05, 0.2, 0.5)  # ours: the paper's sizes are not known; 0.2 is the default of `perturbed_copy`
SHRINKS = (0.4, 0.7)  # 0.4: arXiv 2605.13405; 0.7: the best of three in a study in miniature, within its spread
NEW_LR_PEAK, NEW_LR_STEPS = 1.3, 250  # arXiv 2602.02472


class Candidate:
    """One way to start a grown model.

    Args:
        name (`str`): names the candidate in tables and its folder on disk: letters, digits, `_`, `.` and `-`.
        state_policy (`str`, defaults to `"carry"`): as in `WarmstartTrainingArguments`, without its `"auto"`: a candidate
            says which state it is.
        schedule_policy (`str`, defaults to `"continue"`): as in `WarmstartTrainingArguments`.
        **growth: fields of `GrowthConfig` or sizes by their transformers names, as for `grow`; and `new_lr_peak`,
            `new_lr_steps`, `schedule_ramp_steps`, `equal_loss_step`, `equal_loss_run`, `decay_fraction` and
            `learning_rate_transfer`, as in `WarmstartTrainingArguments`.

    Raises:
        WarmstartError: the name cannot name a folder, a policy does not exist, or the growth asks for nothing.

    Example:

        >>> Candidate("slice", width=2, width_operator="reference_slice").state_policy
        'carry'
    """

    def __init__(
        self, name: str, *, state_policy: str = "carry", schedule_policy: str = "continue", **growth: Any
    ) -> None:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise WarmstartError(
                f"A candidate cannot be named {name!r}: its name is a folder's. Pass up to 64 letters, digits, '_', '.' or '-'."
            )
        check_state_policy(state_policy)
        if schedule_policy not in SCHEDULE_POLICIES:
            raise WarmstartError(f"schedule_policy={schedule_policy!r} is none of {list(SCHEDULE_POLICIES)}.")
        self.name = name
        self.state_policy = state_policy
        self.schedule_policy = schedule_policy
        self.arguments = {key: growth.pop(key) for key in ARGUMENTS if key in growth}
        self.growth = GrowthConfig.of(None, growth)
        self.fresh = False

    @classmethod
    def from_scratch(cls, name: str = "from_scratch", **growth: Any) -> Candidate:
        """The control that takes nothing along: a new model of the grown size, at the beginning of its schedule."""
        made = cls(name, state_policy="reset", schedule_policy="rewarm", **growth)
        made.fresh = True
        return made

    @property
    def needs_optimizer(self) -> bool:
        """Whether the parent's optimizer state is read."""
        return self.state_policy != "reset"

    @property
    def needs_scheduler(self) -> bool:
        """Whether the parent's place in its schedule is read."""
        return self.schedule_policy == "continue" and not self.fresh

    def seeded(self, repeat: int) -> GrowthConfig:
        """The growth with the seed of a repeat: what is drawn anew differs between repeats, nothing else does."""
        return dataclasses.replace(self.growth, seed=self.growth.seed + repeat)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, enough to make it again."""
        return {
            "name": self.name,
            "growth": self.growth.to_dict(),
            "state_policy": self.state_policy,
            "schedule_policy": self.schedule_policy,
            "arguments": dict(self.arguments),
            "from_scratch": self.fresh,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        """Read what `to_dict` wrote."""
        growth = {n: v for n, v in data["growth"].items() if n != "library_version"}
        made = cls(
            data["name"],
            state_policy=data["state_policy"],
            schedule_policy=data["schedule_policy"],
            **growth,
            **data["arguments"],
        )
        made.fresh = bool(data["from_scratch"])
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Candidate) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return (
            f"Candidate({self.name!r}, state_policy={self.state_policy!r}, schedule_policy={self.schedule_policy!r})"
        )


def candidate_pool(
    width: float | None = 2.0,
    depth: float | None = None,
    *,
    noises: Iterable[float] = NOISES,
    shrinks: Iterable[float] = SHRINKS,
    **growth: Any,
) -> list[Candidate]:
    """The built-in pool for one growth.

    In width: the four families of arXiv 2604.04281 (exact copy; perturbed copy at several sizes of noise; asymmetric reset
    with and without a re-warmed rate of the new entries; reference slice), the slice with an asymmetric reset, which is the
    default of `grow` and `WarmstartTrainer` where it can be, uneven copy, and shrink-pad-perturb at several factors. Of
    layers, `stack` beside `identity_blocks`; where only a width is asked for, a stack of about as many parameters (matrices
    grow by the square of the width). Two controls: weights only, and from scratch.

    Args:
        width, depth: factors, as in `GrowthConfig`; None for none.
        noises: sizes of noise of the perturbed copies. shrinks: factors of shrink-pad-perturb.
        **growth: further fields of all candidates' growths, such as `seed` or sizes by name.

    Returns:
        Candidates with names that do not depend on their number or order.

    Raises:
        WarmstartError: nothing to grow.
    """
    asked = {**({"width": width} if width else {}), **({"depth": depth} if depth else {}), **growth}
    widens = bool(width) or bool(set(growth) - {"seed", "depth_operator"})
    pool: list[Candidate] = []

    def add(name: str, **options: Any) -> None:
        pool.append(Candidate(name, **{**asked, **options}))

    if widens:
        add("exact_copy", width_operator="exact_copy")
        for noise in noises:
            add(f"perturbed_copy_{noise:g}", width_operator="perturbed_copy", noise=noise)
        add("asymmetric_reset", width_operator="exact_copy", state_policy="asymmetric_reset")
        add(
            "asymmetric_reset_rewarmed",
            width_operator="exact_copy",
            state_policy="asymmetric_reset",
            new_lr_peak=NEW_LR_PEAK,
            new_lr_steps=NEW_LR_STEPS,
        )
        add("reference_slice", width_operator="reference_slice")
        add("reference_slice_reset", width_operator="reference_slice", state_policy="asymmetric_reset")
        add("uneven_copy", width_operator="uneven_copy")
        for shrink in shrinks:
            add(f"szp_{shrink:g}", width_operator="szp", shrink=shrink)
    elif depth:
        add("identity_blocks", depth_operator="identity_blocks")
    if depth:
        add("stack", depth_operator="stack")
    elif width and width > 1:
        only_deeper = {name: value for name, value in asked.items() if name not in ("width", "sizes")}
        pool.append(Candidate("stack", **{**only_deeper, "depth": max(2, round(width**2)), "depth_operator": "stack"}))
    add("weights_only", state_policy="reset", schedule_policy="rewarm")
    pool.append(Candidate.from_scratch(**asked))
    return pool


def check_names(candidates: Iterable[Candidate]) -> None:
    """Raise where a name is used twice, or where there is nothing to choose from."""
    names = [candidate.name for candidate in candidates]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise WarmstartError(f"Candidates are told apart by their names, and {twice} are used more than once.")
    if len(names) < 2:
        raise WarmstartError(
            f"{len(names)} candidates leave nothing to choose. Pass at least two, or None for the pool."
        )
