"""`WarmstartTrainer`: a `Trainer` that starts a grown model from its parent's training state, once.

The model's config carries the record of its growth. From it and the parent's checkpoint the plan is rebuilt, the
parent's optimizer state is keyed by name and taken through the plan's maps, and put into the optimizer after it was
made and wrapped. Checkpoints written afterwards are this run's own: resuming them never grows again, and a process that
is killed at any point leaves each of them whole or not at all.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput, has_length
from transformers.utils import CONFIG_NAME

from .._compat import load_checkpoint_weights
from ..checkpoints.fetch import training_state_folder
from ..checkpoints.state.parent_state import GROWN_NAME, OWN_STATE, ParentState, read_parent_state
from ..checkpoints.state.set_aside import set_aside_for_us
from ..errors import StateError, WarmstartError
from ..growth.adapted_plan import AdaptedPlan, clean, is_adapters
from ..growth.adapters import adapted_on_meta
from ..growth.config import GrowthConfig
from ..growth.coordinates import (
    Factors,
    coordinate_factors,
    coordinate_groups,
    parent_gradient_norm,
    transferred_groups,
)
from ..growth.plan import GrowthPlan, GrowthRecord, make_plan
from ..growth.state import can_have_two_ages
from ..growth.twin import build
from ..growth.wrapped import base_of, is_wrapped
from ..hub.card import render_card
from ..hub.history import CURVES_NAME, draw_curves, story
from ..hub.save import CARD_NAME
from ..redaction import UnsavedToken
from .arguments import AUTO_STATE, WarmstartTrainingArguments
from .carry import load_grown_state
from .data_position import ContinuedSampler, SkippedOnce, add_places, place_in_data, samples_seen
from .grown_adamw import GrownAdamW
from .new_parts import NewParts, freeze_parent
from .schedules import check_decays, place_schedule, ramp_schedule, starting_position
from .whole_checkpoints import WholeCheckpointsTrainer

LONG_DIAGNOSTIC = 1000
# What `load_dataset` calls data that it read from files or code.
FILE_FORMATS = {"text", "json", "csv", "parquet", "arrow", "pandas", "generator", "webdataset", "xml"}


class WarmstartTrainer(WholeCheckpointsTrainer):
    """A `Trainer` for grown models.

    A folder `checkpoint-N` is always complete, also after a SIGKILL: see `WholeCheckpointsTrainer`.

    Args:
        model: a grown model (from `grow`, or loaded from where one was saved); one with LoRA adapters, grown along with it,
            goes on from the checkpoint of its parent with adapters.
        args: `WarmstartTrainingArguments`; plain `TrainingArguments` give its defaults.
        warmstart_from (`str` or `os.PathLike`, *optional*): the parent's checkpoint folder, with `optimizer.pt`,
            `scheduler.pt` and `trainer_state.json`, or a Hub id. Without it the run starts like a stock `Trainer`'s.
        warmstart_revision (`str`, *optional*): branch, tag or commit of a Hub id.
        warmstart_subfolder (`str`, *optional*): where in the repository or folder the checkpoint lies, such as
            `"checkpoint-500"` where `hub_strategy="all_checkpoints"` put it.
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
    optimizer_cls_and_kwargs: Any
    train_dataset: Any

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: WarmstartTrainingArguments | None = None,
        *more: Any,
        warmstart_from: str | os.PathLike | None = None,
        warmstart_revision: str | None = None,
        warmstart_subfolder: str = "",
        **kwargs: Any,
    ):
        self.selection: Any = None  # the SelectionReport that this start was chosen by, for the card
        self.parent_state: ParentState | None = None
        self._start: tuple[ParentState, GrowthPlan] | None = None
        self._schedule_start = 0
        self._data_place: list[int] | None = None
        self._stream_skip = 0
        self._factors: dict[str, Factors] | None = None
        self.new_parts: NewParts | None = None  # what alone is trained, under train_only="new"
        self._made_optimizer = self._starts_warm = self._resumes_two_ages = False
        if warmstart_from is not None and model is not None:
            _last_record(model)
        if warmstart_from is None and (warmstart_revision or warmstart_subfolder):
            raise WarmstartError("warmstart_revision and warmstart_subfolder are of warmstart_from; pass that, too.")
        # Fetched here, so that a fault costs nothing.
        self.warmstart_from = (
            None
            if warmstart_from is None
            else training_state_folder(warmstart_from, warmstart_revision, warmstart_subfolder)
        )
        super().__init__(model, args, *more, **kwargs)
        if self.args.hub_token is not None:
            # Trainer pickles its arguments and pushes them: a token among them would be published.
            self.args.hub_token = UnsavedToken(self.args.hub_token)

    # -- what the arguments say -----------------------------------------------------------------------------------

    def _option(self, name: str) -> Any:
        """An argument of `WarmstartTrainingArguments`, or its default under plain `TrainingArguments`."""
        return getattr(self.args, name, WarmstartTrainingArguments.__dataclass_fields__[name].default)

    @property
    def _base(self) -> PreTrainedModel:
        """The model, without what peft has wrapped it in."""
        return base_of(self.model) if is_wrapped(self.model) else self.model

    def _plan(self, parent_config: PreTrainedConfig | None = None) -> GrowthPlan:
        """The plan of the model's last growth."""
        record = _last_record(self.model)
        config = parent_config or record.parent_config(self._base.config)
        return make_plan(type(self._base), config, GrowthConfig.from_dict(record.growth_config))

    def _with_adapters(self, plan: GrowthPlan) -> GrowthPlan | AdaptedPlan:
        """The plan by the names of the model's own parameters."""
        return AdaptedPlan(plan, self.model) if is_wrapped(self.model) else plan

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train: from the parent's state where this run is a new one, else from its own."""
        # A loop that starts over with smaller batches (auto_find_batch_size) starts from the parent as well.
        self._starts_warm = (
            not resume_from_checkpoint
            and self.warmstart_from is not None
            and (self.model_init is not None or not self._has_optimizer_state())
        )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # -- the warm start -------------------------------------------------------------------------------------------

    def _inner_training_loop(
        self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None
    ):
        # The parent is read before anything is made: a fault in its checkpoint costs nothing.
        self._start, self._schedule_start, self._resumes_two_ages = None, 0, False
        if resume_from_checkpoint is not None:
            self._read_own_state(resume_from_checkpoint)
        elif self._starts_warm and self.warmstart_from is not None:
            self._start = self._read_parent(self.warmstart_from)
            self.parent_state = self._start[0]
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _has_optimizer_state(self) -> bool:
        """Whether an optimizer has stepped or was loaded: a second `train()` goes on with it."""
        return bool(getattr(getattr(self.optimizer, "optimizer", self.optimizer), "state", None))

    def _read_parent(self, folder: str | os.PathLike) -> tuple[ParentState, GrowthPlan]:
        """Read and check the parent's checkpoint; its state, and the growth from its own config."""
        state = read_parent_state(
            folder,
            self._parent_on_meta,
            self.get_decay_parameter_names,
            optimizer=self._option("state_policy") != "reset",
            scheduler=self._option("schedule_policy") == "continue",
        )
        plan = self._plan_from(state.config)
        if self._option("data_policy") == "continue":
            if has_length(self.train_dataset):
                examples, drop_last = len(self.train_dataset), self.args.dataloader_drop_last
                place = place_in_data(state.trainer, examples, self.args.world_size, drop_last)
                self._data_place = list(add_places(place, state.own.get("data_place") or (0, 0), examples))
            else:
                self._stream_skip = state.own.get("stream_seen") or samples_seen(
                    state.trainer, self.args.gradient_accumulation_steps, self.args.world_size
                )
        return state, plan

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self._warn_of_locked_copies()
        if self._start is not None:
            policy = self._option("schedule_policy")
            self._schedule_start = starting_position(policy, self.args, max_steps, self._start[0])
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self._start is not None:
            state, plan = self._start
            if state.optimizer is not None:
                load_grown_state(
                    self.optimizer, state.optimizer, self._with_adapters(plan), state_policy=self._state_policy
                )
            if self._schedule_start or self._ramp_steps:
                place_schedule(self.lr_scheduler, self._schedule_start, self.args.lr_scheduler_type)
        return prepared

    def _plan_from(self, config: PreTrainedConfig | None) -> GrowthPlan:
        """The growth from a checkpoint's own config.

        Raises:
            StateError: it does not lead to this model.
        """
        plan, recorded = self._plan(config), _last_record(self.model).changes
        tied = set(self._base.all_tied_weights_keys)
        tensors = {clean(name): tensor for name, tensor in self._base.state_dict().items() if not is_adapters(name)}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in tied}
        if plan.changes != recorded:
            differing = f"growing its config changes {plan.changes}, the model's record says {recorded}"
        elif shapes != {name: tuple(shape) for name, shape in plan.target_shapes.items()}:
            differing = "grown, it has other tensors than the model (another number of layers, another vocabulary)"
        else:
            return plan
        name = Path(self.warmstart_from or "").name
        raise StateError(
            f"The checkpoint {name} is not of this model's parent: {differing}. Pass the checkpoint that was grown."
        )

    def _parent_on_meta(self, config: PreTrainedConfig | None) -> nn.Module:
        """The parent without weights, its parameters frozen where those of the child are."""
        plan = self._plan_from(config)
        parent: nn.Module = build(plan.model_class, plan.source_config, "meta")
        if is_wrapped(self.model):
            parent = adapted_on_meta(parent, Path(self.warmstart_from or ""), self.model)
        frozen = self.new_parts  # what this run froze, its parent trained
        trained = frozen.trained_before if frozen else [n for n, p in self.model.named_parameters() if p.requires_grad]
        whole = self._with_adapters(plan)
        trainable = {whole.source_name(name) for name in trained}
        for name, parameter in parent.named_parameters():
            parameter.requires_grad_(name in trainable)
        return parent

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
        """The stock optimizer with its parameters' names; `GrownAdamW` or other groups where the arguments ask for them."""
        made = self.optimizer is None
        self._made_optimizer = self._made_optimizer or made
        target = model if model is not None else self.model
        self._refuse_with_adapters()
        if made and self._option("train_only") == "new":
            if self.new_parts is not None:
                self.new_parts.release()
            self.new_parts = freeze_parent(target)
            if self.is_fsdp_enabled and self.new_parts.masks:
                raise WarmstartError(
                    "train_only='new' holds single entries of tensors that FSDP cuts up. Train on one device or with DDP, or "
                    "grow in depth alone."
                )
        classes = self.optimizer_cls_and_kwargs
        if made and classes is None and self._takes_two_ages(target):
            self.optimizer_cls_and_kwargs = self._grown_adamw(target)
        try:
            optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = classes  # another trial of a search has another learning rate
        names = {id(p): name for name, p in target.named_parameters()}
        coordinates, transfer = self._option("parent_coordinates"), self._option("learning_rate_transfer")
        if not self._made_optimizer and (transfer or coordinates or self._option("train_only") == "new"):
            raise WarmstartError(
                "parent_coordinates, learning_rate_transfer and train_only='new' make their own parameter groups; pass no "
                "optimizer beside them."
            )
        # A new optimizer has no state yet, so its groups can simply be others.
        if made and coordinates:
            if self.args.max_steps > LONG_DIAGNOSTIC:
                warnings.warn(
                    f"parent_coordinates is a diagnostic: for {self.args.max_steps} steps this model costs its own "
                    "compute and makes its parent's progress.",
                    stacklevel=2,
                )
            self._factors = coordinate_factors(self._plan())
            optimizer.param_groups[:] = coordinate_groups(optimizer, names, self._factors)
        elif made and transfer:
            optimizer.param_groups[:] = transferred_groups(optimizer, names, self._plan())
        if made and self.new_parts is not None:
            self.new_parts.hold(optimizer)
        for group in optimizer.param_groups:
            group["param_names"] = [names[id(parameter)] for parameter in group["params"]]
        self.optimizer = optimizer
        return optimizer

    def _refuse_with_adapters(self) -> None:
        """Raise where an argument is of the base's tensors, and adapters train."""
        names = ("parent_coordinates", "learning_rate_transfer")
        given = [name for name in names if self._option(name)]
        given += ["train_only='new'"] if self._option("train_only") == "new" else []
        if given and is_wrapped(self.model):
            raise WarmstartError(
                f"{' and '.join(given)} cannot be followed for adapters. Leave it out, or train the model with its adapters "
                "merged: grow(..., merge_adapter=True)."
            )

    def _takes_two_ages(self, model: nn.Module) -> bool:
        """Whether the optimizer that is made keeps a step count of their own for new entries.

        Under `"auto"` that is so after a growth that added fresh units, of whose moments nothing can be carried, where nothing
        stands against it; a run that is resumed goes on as it was started.
        """
        asked = self._option("state_policy")
        if asked != AUTO_STATE:
            return bool(asked == "asymmetric_reset")
        if self._resumes_two_ages or self._start is None:
            return self._resumes_two_ages
        state = self._start[0].optimizer
        kind, _ = self.get_optimizer_cls_and_kwargs(self.args, model)
        others = self._option("parent_coordinates") or self._option("train_only") == "new" or is_wrapped(self.model)
        return (
            "reference_slice" in _last_record(self.model).operators
            and kind is torch.optim.AdamW
            and not (others or self.is_fsdp_enabled or self.is_deepspeed_enabled)
            and state is not None
            and can_have_two_ages(state)
        )

    @property
    def _state_policy(self) -> str:
        """What becomes of the parent's state, where `"auto"` is asked for by the optimizer that there is."""
        asked = self._option("state_policy")
        if asked != AUTO_STATE:
            return str(asked)
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return "asymmetric_reset" if isinstance(inner, GrownAdamW) else "carry"

    def _grown_adamw(self, model: nn.Module) -> tuple[type[GrownAdamW], dict[str, Any]]:
        """`GrownAdamW` in the place of the AdamW that the arguments name."""
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        if kind is not torch.optim.AdamW:
            raise WarmstartError(
                f"state_policy='asymmetric_reset' is made for AdamW; optim={self.args.optim.value!r} is none. Pass "
                "optim='adamw_torch' or another state_policy."
            )
        return GrownAdamW, {
            **options,
            "new_lr_peak": self._option("new_lr_peak"),
            "new_lr_steps": self._option("new_lr_steps"),
        }

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        made = self.lr_scheduler is None
        fraction = self._option("decay_fraction")
        if fraction is not None and made:
            check_decays(self.args.lr_scheduler_type)
            self.args.lr_scheduler_kwargs = {
                **(self.args.lr_scheduler_kwargs or {}),
                "num_decay_steps": max(1, round(fraction * num_training_steps)),
            }
        scheduler = super().create_scheduler(num_training_steps + self._schedule_start, optimizer)
        if self._ramp_steps and made:
            ramp_schedule(scheduler, self._schedule_start, self._ramp_steps, self.args.lr_scheduler_type)
        return scheduler

    @property
    def _ramp_steps(self) -> int:
        return self._option("schedule_ramp_steps")

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if self._data_place is None or sampler is None:
            return sampler
        return ContinuedSampler(self._repeatable(sampler), *self._data_place)

    def _repeatable(self, sampler: Sampler) -> Sampler:
        """A sampler whose pass k has the order that it had in a run with this seed."""
        if isinstance(sampler, SequentialSampler):
            return sampler
        if type(sampler) is RandomSampler and self.args.accelerator_config.use_seedable_sampler:
            seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
            return SeedableRandomSampler(sampler.data_source, generator=torch.Generator(), data_seed=seed)
        raise WarmstartError(
            f"data_policy='continue' cannot find the parent's place in the order of {type(sampler).__name__}. Pass "
            "train_sampling_strategy='random' or 'sequential', with accelerate's seedable sampler, or data_policy='restart'."
        )

    def get_train_dataloader(self) -> DataLoader:
        if not self._stream_skip or self.train_dataset is None:
            return super().get_train_dataloader()
        whole = self.train_dataset
        if not hasattr(whole, "skip"):
            raise WarmstartError(
                f"data_policy='continue' skips {self._stream_skip} examples, and {type(whole).__name__} has no skip(). Pass a "
                "datasets.IterableDataset, or skip them yourself and pass data_policy='restart'."
            )
        try:
            self.train_dataset = SkippedOnce(whole, self._stream_skip)
            return super().get_train_dataloader()
        finally:
            self.train_dataset = whole

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

    @contextmanager
    def _names_as_files_have_them(self) -> Iterator[None]:
        """FSDP keys a state by name, so its groups hold no names: asked for, they would be missing in other checkpoints."""
        groups = self.optimizer.param_groups if self.is_fsdp_enabled else []
        names = [group.pop("param_names", None) for group in groups]
        try:
            yield
        finally:
            for group, part in zip(self.optimizer.param_groups, names, strict=False):
                if part is not None:
                    group["param_names"] = part

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._names_as_files_have_them():
            super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return
        own = {
            "schedule_start": self._schedule_start,
            "schedule_policy": self._option("schedule_policy"),
            "state_policy": self._state_policy,
            "data_place": self._data_place,
            "stream_skip": self._stream_skip,
            "stream_seen": self._stream_skip + self.state.global_step * self.get_total_train_batch_size(self.args),
        }
        Path(output_dir, OWN_STATE).write_text(json.dumps(own) + "\n")
        is_bare = self.is_fsdp_enabled and not Path(output_dir, CONFIG_NAME).exists()
        if is_bare and isinstance(self.model, PreTrainedModel):
            # Trainer leaves it out of shards, and with it the record of the growth, which the next one needs.
            self._save_config(output_dir)
        if self._keeps_ages():
            set_aside_for_us(output_dir)

    def _save_config(self, output_dir: str) -> None:
        config = copy.deepcopy(self.model.config)
        # fully_shard makes a class of its own of the model's.
        config.architectures = [type(self.model).__name__.removeprefix("FSDP")]
        config.save_pretrained(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not Path(checkpoint, GROWN_NAME).is_file():
            with self._names_as_files_have_them():
                super()._load_optimizer_and_scheduler(checkpoint)
            return
        if not self._keeps_ages():
            raise StateError(
                f"{Path(checkpoint).name} was written under state_policy='asymmetric_reset'. Pass the same to resume it."
            )
        self.optimizer.load_state_dict(torch.load(Path(checkpoint, GROWN_NAME), map_location="cpu", weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _keeps_ages(self) -> bool:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return isinstance(inner, GrownAdamW) and not self.is_fsdp_enabled

    def _read_own_state(self, checkpoint: str) -> None:
        """What a checkpoint of this trainer says of its start."""
        path = Path(checkpoint, OWN_STATE)
        own = json.loads(path.read_text()) if path.is_file() else {}
        self._schedule_start = int(own.get("schedule_start", 0))
        self._resumes_two_ages = Path(checkpoint, GROWN_NAME).is_file()
        self._data_place, self._stream_skip = own.get("data_place"), int(own.get("stream_skip") or 0)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of the growth, with the last evaluation; the stock card for a model that was not grown."""
        if not isinstance(self.model, PreTrainedModel) or not GrowthRecord.all_of(self.model.config):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            told = story(self.state.log_history)
            card = render_card(
                self.model,
                metrics=_last_evaluation(self.state.log_history),
                dataset=_dataset_name(kwargs.get("dataset"), self.eval_dataset),
                license=kwargs.get("license"),
                model_name=kwargs.get("model_name"),
                selection=self.selection,
                history=self.state.log_history,
            )
            if told is not None and told.has_curves:
                draw_curves(told, Path(self.args.output_dir, CURVES_NAME))
            if self.selection is not None:
                self.selection.save(self.args.output_dir)
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
    base = base_of(model) if is_wrapped(model) else model
    records = GrowthRecord.all_of(base.config) if isinstance(base, PreTrainedModel) else []
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


def _dataset_name(given: Any, dataset: Any) -> str | None:
    """The name of the held-out data: as given, else as `load_dataset` had it; none for files and for rows made in memory."""
    if given:
        return given if isinstance(given, str) else ", ".join(given)
    name = getattr(getattr(dataset, "info", None), "dataset_name", None)
    return name if name and name not in FILE_FORMATS else None


def _has_dropout(model: nn.Module) -> bool:
    """Whether any dropout is active in training: as a module, or as a rate that a module keeps for its forward."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or any(isinstance(rate, float) and rate > 0 and "drop" in name for name, rate in vars(module).items())
        for module in model.modules()
    )
