"""`WarmstartTrainingArguments`: `TrainingArguments` and what a warm start adds."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..errors import WarmstartError
from ..growth.state import STATE_POLICIES, check_state_policy

SCHEDULE_POLICIES = ("continue", "rewind", "rewarm")


@dataclass
class WarmstartTrainingArguments(TrainingArguments):
    """`TrainingArguments`, with no default changed, and three fields.

    Args:
        state_policy (`str`, defaults to `"carry"`): what becomes of the parent's optimizer state. `"carry"` takes moments
            and step counts through the growth's maps, `"reset"` starts fresh.
        schedule_policy (`str`, defaults to `"continue"`): where the learning rate schedule starts. With P the parent's
            steps and N the steps of this run:

            - `"continue"`: at step P of a schedule over P + N steps;
            - `"rewind"`: at the peak, that is at the end of the warm-up of a schedule over warm-up + N steps;
            - `"rewarm"`: at step 0 of a schedule over N steps, warm-up included.
        parent_coordinates (`bool`, defaults to `False`): run in the parent's coordinates, so that an exact copy follows
            its parent step for step. A diagnostic that costs the larger model's compute for the parent's progress.
    """

    state_policy: str = field(
        default="carry",
        metadata={"help": f"What becomes of the parent's optimizer state: one of {list(STATE_POLICIES)}."},
    )
    schedule_policy: str = field(
        default="continue",
        metadata={"help": f"Where the learning rate schedule starts: one of {list(SCHEDULE_POLICIES)}."},
    )
    parent_coordinates: bool = field(
        default=False,
        metadata={"help": "Diagnostic: run in the parent's coordinates, so that an exact copy follows its parent."},
    )

    def __post_init__(self) -> None:
        check_state_policy(self.state_policy)
        if self.schedule_policy not in SCHEDULE_POLICIES:
            raise WarmstartError(f"schedule_policy={self.schedule_policy!r} is none of {list(SCHEDULE_POLICIES)}.")
        super().__post_init__()
