"""`WarmstartTrainingArguments`: `TrainingArguments` and what a warm start adds."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..errors import WarmstartError
from ..growth.state import STATE_POLICIES
from .data_position import DATA_POLICIES
from .schedules import SCHEDULE_POLICIES

AUTO_STATE = "auto"
TRANSFERS = ("mup",)
TRAINED = ("all", "new")


@dataclass
class WarmstartTrainingArguments(TrainingArguments):
    """`TrainingArguments`, with no default changed, and these fields.

    Args:
        state_policy (`str`, defaults to `"auto"`): what becomes of the parent's optimizer state. `"carry"` takes moments
            and step counts through the growth's maps; `"asymmetric_reset"` does so for the first copy of each old entry and
            starts everything new at zero with a step count of its own (the optimizer is then `GrownAdamW`, and only
            `WarmstartTrainer` resumes it); `"reset"` starts fresh. `"auto"` is `"asymmetric_reset"` after a growth that added
            fresh units (`reference_slice`), where the trainer makes an unsharded AdamW for a parent that had one, and
            `"carry"` elsewhere: the starts that need the fewest tokens near twofold growth (`docs/growth-study.md`).
        schedule_policy (`str`, defaults to `"continue"`): where the learning rate schedule starts. With P the parent's
            steps and N the steps of this run:

            - `"continue"`: at step P of a schedule over P + N steps;
            - `"rewind"`: at the peak, that is at the end of the warm-up of a schedule over warm-up + N steps;
            - `"rewarm"`: at step 0 of a schedule over N steps, warm-up included;
            - `"equal_loss"`: at the step s, of a schedule over s + N steps, at which a model of the child's size trained
              from scratch has the parent's loss (arXiv 2203.06211); `equal_loss_step` or `equal_loss_run` says which.
        equal_loss_step (`int`, *optional*): that step.
        equal_loss_run (`str`, *optional*): the folder of such a run, whose logged evaluations give the step.
        schedule_ramp_steps (`int`, defaults to 0): steps over which the rate rises from 0 to the schedule's after the start.
        decay_fraction (`float`, *optional*): with a schedule that ends in a decay (`warmup_stable_decay`), the share of this
            run's steps, and so of its tokens, that the decay takes.
        new_lr_peak (`float`, defaults to 1.0): under `"asymmetric_reset"`, what the learning rate of new entries rises to,
            relative to that of old ones (arXiv 2602.02472 measures 1.3).
        new_lr_steps (`int`, defaults to 250): over how many steps.
        data_policy (`str`, defaults to `"restart"`): `"continue"` goes on in the training data where the parent stopped, in
            the order that the same `seed` gives; `"restart"` begins them anew.
        learning_rate_transfer (`str`, *optional*): `"mup"` takes `learning_rate` as tuned at the parent's width and divides
            it, for matrices, by the growth of what they read (arXiv 2203.03466).
        train_only (`str`, defaults to `"all"`): `"new"` freezes all that the model has from its parent: layers that the growth
            added train, and new entries of tensors that it widened (`freeze_parent`; arXiv 2401.02415).
        parent_coordinates (`bool`, defaults to `False`): run in the parent's coordinates, so that an exact copy follows
            its parent step for step. A diagnostic that costs the larger model's compute for the parent's progress.

    Raises:
        WarmstartError: a value that does not exist, or options that exclude one another.
    """

    state_policy: str = field(
        default=AUTO_STATE,
        metadata={"help": f"What becomes of the parent's optimizer state: one of {[AUTO_STATE, *STATE_POLICIES]}."},
    )
    schedule_policy: str = field(
        default="continue",
        metadata={"help": f"Where the learning rate schedule starts: one of {list(SCHEDULE_POLICIES)}."},
    )
    equal_loss_step: int | None = field(
        default=None, metadata={"help": "The step at which a model of the child's size has the parent's loss."}
    )
    equal_loss_run: str | None = field(
        default=None, metadata={"help": "A run from scratch at the child's size, whose log gives equal_loss_step."}
    )
    schedule_ramp_steps: int = field(
        default=0, metadata={"help": "Steps over which the rate rises from 0 to the schedule's after the start."}
    )
    decay_fraction: float | None = field(
        default=None, metadata={"help": "Share of this run's steps that a warmup_stable_decay schedule decays over."}
    )
    new_lr_peak: float = field(
        default=1.0, metadata={"help": "asymmetric_reset: the peak of new entries' rate, relative to old ones'."}
    )
    new_lr_steps: int = field(default=250, metadata={"help": "asymmetric_reset: steps in which that peak is reached."})
    data_policy: str = field(
        default="restart", metadata={"help": f"Where the training data start: one of {list(DATA_POLICIES)}."}
    )
    learning_rate_transfer: str | None = field(
        default=None,
        metadata={"help": f"How learning_rate is taken from the parent's width: one of {list(TRANSFERS)}."},
    )
    train_only: str = field(
        default="all", metadata={"help": f"What is trained: one of {list(TRAINED)}; new is what the growth added."}
    )
    parent_coordinates: bool = field(
        default=False,
        metadata={"help": "Diagnostic: run in the parent's coordinates, so that an exact copy follows its parent."},
    )

    def __post_init__(self) -> None:
        _check_choice("state_policy", self.state_policy, (AUTO_STATE, *STATE_POLICIES))
        _check_choice("schedule_policy", self.schedule_policy, SCHEDULE_POLICIES)
        _check_choice("train_only", self.train_only, TRAINED)
        _check_choice("data_policy", self.data_policy, DATA_POLICIES)
        _check_choice("learning_rate_transfer", self.learning_rate_transfer, (None, *TRANSFERS))
        sources = [name for name in ("equal_loss_step", "equal_loss_run") if getattr(self, name) is not None]
        if (self.schedule_policy == "equal_loss") != (len(sources) == 1):
            raise WarmstartError(
                f"schedule_policy={self.schedule_policy!r} with {sources or 'neither equal_loss_step nor equal_loss_run'}: "
                "'equal_loss' needs one of them, other policies none."
            )
        if self.schedule_ramp_steps < 0:
            raise WarmstartError(f"schedule_ramp_steps={self.schedule_ramp_steps!r} must be at least 0.")
        if self.decay_fraction is not None and not 0 < self.decay_fraction <= 1:
            raise WarmstartError(f"decay_fraction={self.decay_fraction!r} is a share: above 0, at most 1.")
        if self.parent_coordinates and self.learning_rate_transfer:
            raise WarmstartError("parent_coordinates fixes every rate; leave learning_rate_transfer out.")
        if self.parent_coordinates and self.state_policy == "asymmetric_reset":
            raise WarmstartError("In the parent's coordinates nothing is new; pass state_policy='carry'.")
        if self.parent_coordinates and self.train_only == "new":
            raise WarmstartError("In the parent's coordinates nothing is new; pass train_only='all'.")
        super().__post_init__()


def _check_choice(name: str, value: str | None, choices: tuple) -> None:
    if value not in choices:
        raise WarmstartError(f"{name}={value!r} is none of {[choice for choice in choices if choice]}.")
