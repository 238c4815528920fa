"""The files of a training state beside a model's weights: which are grown, which are copied, which are left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import WarmstartError
from ...growth.plan import GrowthPlan
from ...growth.twin import build
from ..memory import Pieces
from ..ranks import mesh_of_ranks, on_main
from ..torch_files.sharded import is_sharded
from .parent_state import (
    SCHEDULER_NAMES,
    SHARDED_OPTIMIZER,
    ParentState,
    load_file,
    optimizer_file,
    read_parent_state,
    read_settings,
)
from .set_aside import set_aside_for_us
from .state_stream import optimizer_bytes, write_optimizer, write_sharded_optimizer
from .trainer_files import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, TRAINER_STATE_NAME


@dataclass(frozen=True)
class TrainingFiles:
    """A training state on its way into a grown checkpoint. Nothing is written before `write`."""

    plan: GrowthPlan
    folder: Path
    state: ParentState
    policy: str

    @classmethod
    def of(cls, folder: Path, plan: GrowthPlan, policy: str) -> TrainingFiles | None:
        """The state in a folder; None where it is no training checkpoint.

        Raises:
            StateError: it is incomplete, or of a kind that cannot be carried. WarmstartError: not under this policy.
        """
        if not (folder / TRAINER_STATE_NAME).is_file() and not any(folder.glob("random_states_*.pkl")):
            return None

        def parent_on_meta(config: PreTrainedConfig | None) -> PreTrainedModel:
            return build(plan.model_class, plan.source_config, "meta")

        def decay_names(model: nn.Module) -> list[str]:
            from transformers import Trainer  # slow to import, and of no use to a model without a state

            return Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]

        reset = policy == "reset"
        scheduler = any((folder / name).is_file() for name in SCHEDULER_NAMES)
        state = read_parent_state(folder, parent_on_meta, decay_names, optimizer=not reset, scheduler=scheduler)
        if reset and not is_sharded(folder / SHARDED_OPTIMIZER):
            settings = read_settings(folder, parent_on_meta(None), decay_names)
            if settings is not None:
                state = replace(state, optimizer={"state": {}, "param_groups": settings})
        made = cls(plan, folder, state, policy)
        made._check_policy()
        return made

    def _check_policy(self) -> None:
        if self.policy != "asymmetric_reset" or self.state.optimizer is None:
            return
        if self.is_sharded:
            raise WarmstartError(
                "A sharded checkpoint cannot keep two step counts per tensor for a stock resume. Pass it as warmstart_from to "
                "WarmstartTrainer(state_policy='asymmetric_reset'), or state_policy='carry'."
            )
        if self._name != OPTIMIZER_NAME:
            raise WarmstartError(
                "Only WarmstartTrainer resumes a state under 'asymmetric_reset', from one device or DDP. Pass the checkpoint "
                "as warmstart_from to it, or state_policy='carry'."
            )

    @property
    def is_sharded(self) -> bool:
        """Whether the optimizer's state lies in DCP's shards."""
        return is_sharded(self.folder / SHARDED_OPTIMIZER)

    @property
    def _name(self) -> str:
        """Of the optimizer's file, where one holds it whole."""
        is_bin = optimizer_file(self.folder) == self.folder / OPTIMIZER_NAME_BIN
        return OPTIMIZER_NAME_BIN if is_bin else OPTIMIZER_NAME

    @cached_property
    def _named(self) -> bool:
        """Whether that file has its state by name, as that of an FSDP model has."""
        file = optimizer_file(self.folder)
        return file is not None and any(isinstance(name, str) for name in load_file(file)["state"])

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the optimizer's file, exactly; 0 where there is none, or shards."""
        if self.state.optimizer is None or self.is_sharded:
            return 0
        return optimizer_bytes(self.state.optimizer, self.plan, Path(self._name), self.policy, self._named).file

    def write(self, made: Path, pieces: Pieces, progress: Callable[[int], None]) -> None:
        """Write the state; every rank takes part.

        Args:
            made: the folder. progress: called with bytes of the optimizer that were written.
        """
        if self.state.optimizer is not None and self.is_sharded:
            write_sharded_optimizer(
                self.state.optimizer,
                self.plan,
                made / SHARDED_OPTIMIZER,
                self.policy,
                mesh_of_ranks(),
                max_block_bytes=pieces.state_block,
            )
        on_main(lambda: self._write_whole(made, pieces, progress))

    def _write_whole(self, made: Path, pieces: Pieces, progress: Callable[[int], None]) -> None:
        """What one process writes: all but shards."""
        if self.state.optimizer is not None and not self.is_sharded:
            write_optimizer(
                self.state.optimizer,
                self.plan,
                made / self._name,
                self.policy,
                self._named,
                max_block_bytes=pieces.state_block,
                progress=progress,
            )
            if self.policy == "asymmetric_reset":
                set_aside_for_us(made)
        for name in SCHEDULER_NAMES:
            # Without an optimizer file neither is loaded.
            if self.state.optimizer is not None and (self.folder / name).is_file():
                shutil.copy2(self.folder / name, made / name)
        if self.state.trainer:
            # The best checkpoint so far is the parent's, which the grown run cannot load.
            best = {"best_metric": None, "best_model_checkpoint": None, "best_global_step": None}
            (made / TRAINER_STATE_NAME).write_text(json.dumps({**self.state.trainer, **best}, indent=2) + "\n")
