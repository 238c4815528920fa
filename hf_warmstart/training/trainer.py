"""`WarmstartTrainer`: a `Trainer` that starts a grown model from its parent's training state, once.

The model's config carries the record of its growth. From it and the parent's checkpoint the plan is rebuilt, the
parent's optimizer state is keyed by name and taken through the plan's maps, and put into the optimizer after it was
made and wrapped. Checkpoints written afterwards are this run's own: resuming them never grows again.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

from .._compat import load_checkpoint_weights
from ..errors import StateError, WarmstartError
from ..growth.config import GrowthConfig
from ..growth.coordinates import Factors, coordinate_factors, coordinate_groups, parent_gradient_norm
from ..growth.plan import GrowthPlan, GrowthRecord, make_plan
from ..growth.state import grow_optimizer_state
from ..growth.twin import build
from ..hub.card import render_card
from ..hub.save import CARD_NAME
from .arguments import WarmstartTrainingArguments
from .checkpoint import ParentState, read_parent_state

STATE_NAME = "warmstart_state.json"
LONG_DIAGNOSTIC = 1000


class WarmstartTrainer(Trainer):
    """A `Trainer` for grown models.

    Args:
        model: a grown model (from `grow`, or loaded from where one was saved).
        args: `WarmstartTrainingArguments`; plain `TrainingArguments` give its defaults.
        warmstart_from (`str` or `os.PathLike`, *optional*): the parent's checkpoint folder, with `optimizer.pt`,
            `scheduler.pt` and `trainer_state.json`. Without it the run starts like a stock `Trainer`'s.
        **kwargs: as for `transformers.Trainer`.

    Raises:
        WarmstartError: the model carries no record of a growth, or the checkpoint is not its parent's. Raised before
            anything is written.

    Example:

        >>> trainer = WarmstartTrainer(                                                           # doctest: +SKIP
        ...     grow(parent, width=2), WarmstartTrainingArguments("runs/grown", max_steps=500),
        ...     train_dataset=dataset, warmstart_from="runs/base/checkpoint-500",
        ... )
        >>> trainer.train()                                                                       # doctest: +SKIP
    """

    optimizer: Any

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: WarmstartTrainingArguments | None = None,
        *more: Any,
        warmstart_from: str | os.PathLike | None = None,
        **kwargs: Any,
    ):
        self.warmstart_from = warmstart_from
        self.parent_state: ParentState | None = None
        self._schedule_start = 0
        self._schedule_extra = 0
        self._factors: dict[str, Factors] | None = None
        if warmstart_from is not None and model is not None:
            _last_record(model)
            if not Path(warmstart_from).is_dir():
                raise StateError(f"warmstart_from={os.fspath(warmstart_from)!r} is no folder.")
        super().__init__(model, args, *more, **kwargs)

    # -- what the arguments say -----------------------------------------------------------------------------------

    def _option(self, name: str) -> Any:
        """An argument of `WarmstartTrainingArguments`, or its default under plain `TrainingArguments`."""
        return getattr(self.args, name, WarmstartTrainingArguments.__dataclass_fields__[name].default)

    def _plan(self, parent_config: PreTrainedConfig | None = None) -> GrowthPlan:
        """The plan of the model's last growth."""
        record = _last_record(self.model)
        config = parent_config or record.parent_config(self.model.config)
        return make_plan(type(self.model), config, GrowthConfig.from_dict(record.growth_config))

    # -- the warm start -------------------------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        grown_state = None
        if resume_from_checkpoint is not None:
            self._read_own_state(resume_from_checkpoint)
        elif self.warmstart_from is not None and self.parent_state is None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise WarmstartError(
                    "A parent's state cannot be carried into sharded optimizers yet. Train on one device or under DDP, or "
                    "leave warmstart_from out."
                )
            grown_state = self._read_parent(self.warmstart_from, max_steps)
        self._warn_of_locked_copies()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if grown_state is not None:
            self._load_grown_state(grown_state)
        if self._schedule_start and resume_from_checkpoint is None:
            self._place_schedule(self._schedule_start)
        return prepared

    def _read_parent(self, folder: str | os.PathLike, max_steps: int) -> dict[str, Any] | None:
        """Read and check the parent's checkpoint; the grown optimizer state, or None under `reset`."""
        carry, policy = self._option("state_policy") == "carry", self._option("schedule_policy")
        state = read_parent_state(
            folder,
            self._parent_on_meta,
            self.get_decay_parameter_names,
            optimizer=carry,
            scheduler=policy == "continue",
        )
        plan = self._plan(state.config)
        recorded = _last_record(self.model).changes
        if plan.changes != recorded:
            raise StateError(
                f"The checkpoint {Path(folder).name} is not of this model's parent: growing its config "
                f"changes {plan.changes}, the model's record says {recorded}. Pass the checkpoint that was grown."
            )
        grown = grow_optimizer_state(state.optimizer, plan)["state"] if state.optimizer is not None else None
        self.parent_state = state
        if policy == "continue":
            self._schedule_start = self._schedule_extra = state.scheduler_step or 0
        elif policy == "rewind":
            # The end of the warm-up, which as a share of the steps depends on how many it adds.
            warmup = 0
            while (longer := self.args.get_warmup_steps(max_steps + warmup)) > warmup:
                warmup = longer
            self._schedule_start = self._schedule_extra = warmup
        return grown

    def _parent_on_meta(self, config: PreTrainedConfig) -> nn.Module:
        """The parent without weights, its parameters frozen where those of the child are."""
        parent = build(type(self.model), config, "meta")
        plan = self._plan(config)
        trainable = {plan.source_name(name) for name, p in self.model.named_parameters() if p.requires_grad}
        for name, parameter in parent.named_parameters():
            parameter.requires_grad_(name in trainable)
        return parent

    def _load_grown_state(self, grown: dict[str, Any]) -> None:
        """Put a state keyed by name into the optimizer."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            raise StateError(
                f"The parent's state holds Adam's moments, which {type(optimizer).__name__} cannot use. Pass "
                "optim='adamw_torch' (or its fused form), or state_policy='reset'."
            )
        whole = self.optimizer.state_dict()
        for group in whole["param_groups"]:
            for number, name in zip(group["params"], group["param_names"], strict=True):
                if name in grown:
                    whole["state"][number] = grown[name]
        self.optimizer.load_state_dict(whole)

    def _place_schedule(self, position: int) -> None:
        """Move the schedule to a position, as if it had stepped there."""
        scheduler = self.lr_scheduler
        if not isinstance(scheduler, LambdaLR):
            raise WarmstartError(
                f"The schedule {self.args.lr_scheduler_type} has no position that could be continued. Pass "
                "schedule_policy='rewarm', or a schedule that depends on the step alone."
            )
        rates = [base * rate(position) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler.last_epoch, scheduler._step_count, scheduler._last_lr = position, position + 1, rates
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _warn_of_locked_copies(self) -> None:
        records = GrowthRecord.all_of(self.model.config)
        if records and "exact_copy" in records[-1].operators and not _has_dropout(self.model):
            warnings.warn(
                "This model was widened by exact_copy and has no dropout: its copies have equal gradients and stay equal, "
                "so that it trains as its parent would. Grow with perturbed_copy, uneven_copy or reference_slice to use "
                "the new units.",
                stacklevel=2,
            )

    # -- hooks of Trainer -----------------------------------------------------------------------------------------

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The stock optimizer with its parameters' names; in the parent's coordinates where that is asked for."""
        given = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        names = {id(p): name for name, p in (model if model is not None else self.model).named_parameters()}
        if self._option("parent_coordinates") and self._factors is None:
            if given:
                raise WarmstartError("parent_coordinates makes its own parameter groups; pass no optimizer beside it.")
            if self.args.max_steps > LONG_DIAGNOSTIC:
                warnings.warn(
                    f"parent_coordinates is a diagnostic: for {self.args.max_steps} steps this model costs its own "
                    "compute and makes its parent's progress.",
                    stacklevel=2,
                )
            self._factors = coordinate_factors(self._plan())
            # The optimizer has no state yet, so its groups can simply be others.
            optimizer.param_groups[:] = coordinate_groups(optimizer.param_groups, names, self._factors)
        for group in optimizer.param_groups:
            group["param_names"] = [names[id(parameter)] for parameter in group["params"]]
        self.optimizer = optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        return super().create_scheduler(num_training_steps + self._schedule_extra, optimizer)

    def _clip_grad_norm(self, model):
        if self._factors is None:
            return super()._clip_grad_norm(model)
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        self.accelerator.unscale_gradients()
        norm = parent_gradient_norm(gradients, self._factors)
        scale = torch.clamp(self.args.max_grad_norm / (norm + 1e-6), max=1.0)
        for gradient in gradients.values():
            gradient.mul_(scale)
        return norm

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            own = {"schedule_extra": self._schedule_extra, "schedule_policy": self._option("schedule_policy")}
            Path(output_dir, STATE_NAME).write_text(json.dumps(own) + "\n")

    def _read_own_state(self, checkpoint: str) -> None:
        path = Path(checkpoint, STATE_NAME)
        if path.is_file():
            self._schedule_extra = int(json.loads(path.read_text())["schedule_extra"])

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of the growth, with the last evaluation; the stock card for a model that was not grown."""
        if not isinstance(self.model, PreTrainedModel) or not GrowthRecord.all_of(self.model.config):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            card = render_card(
                self.model,
                metrics=_last_evaluation(self.state.log_history),
                dataset=kwargs.get("dataset"),
                license=kwargs.get("license"),
                model_name=kwargs.get("model_name"),
            )
            card.save(Path(self.args.output_dir, CARD_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._loads_plainly(resume_from_checkpoint):
            load_checkpoint_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and self._loads_plainly(best):
            load_checkpoint_weights(self.model, best)
        else:
            super()._load_best_model()

    def _loads_plainly(self, folder: str) -> bool:
        """Whether a checkpoint holds whole weights for a plain model: neither sharded by FSDP or DeepSpeed nor adapters."""
        whole = any(Path(folder).glob("model*.safetensors*"))
        return (
            whole
            and isinstance(self.model, PreTrainedModel)
            and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        )


def _last_record(model: nn.Module) -> GrowthRecord:
    """The record of a model's last growth."""
    records = GrowthRecord.all_of(model.config) if isinstance(model, PreTrainedModel) else []
    if not records:
        raise WarmstartError(
            f"{type(model).__name__} carries no record of a growth, so no state can be carried into it. Pass a model from "
            "grow(), or leave warmstart_from out."
        )
    return records[-1]


def _last_evaluation(history: list[dict[str, Any]]) -> dict[str, float]:
    """The numbers of the last evaluation that a trainer logged."""
    rows = [row for row in history if "eval_loss" in row]
    return {name: value for name, value in rows[-1].items() if name.startswith("eval_")} if rows else {}


def _has_dropout(model: nn.Module) -> bool:
    """Whether any dropout is active in training: as a module, or as a rate that a module keeps for its forward."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or any(isinstance(rate, float) and rate > 0 and "drop" in name for name, rate in vars(module).items())
        for module in model.modules()
    )
