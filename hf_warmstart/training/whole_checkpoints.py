"""`WholeCheckpointsTrainer`: a `Trainer` whose checkpoints exist whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput, sort_checkpoints

from ..checkpoints.target.complete import STAGING, clear_staging, discard, last_whole_checkpoint, publish, rotate
from ..errors import StateError


class WholeCheckpointsTrainer(Trainer):
    """A `Trainer` that may be killed at any point.

    A folder `checkpoint-N` is always complete: it is written below `_saving` and renamed when its last file is, and renamed
    away before it is deleted (`save_total_limit`). Whatever reads checkpoints finds whole ones, also after a SIGKILL, and a
    run that is resumed from the last of them ends as one that was never stopped. Where a checkpoint is written once more, a
    kill between two renames leaves neither the old one nor the new. A machine that loses power may lose what the system had
    not yet written to disk. `train(resume_from_checkpoint=True)` skips, with a warning, the unfinished checkpoint that a
    stock `Trainer` left.
    """

    _saving = False
    _ending = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; with `resume_from_checkpoint=True` from the last checkpoint in `output_dir` that is complete."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise StateError(f"{self.args.output_dir} holds no complete checkpoint. Call train() to start anew.")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        run_dir: str = super()._get_output_dir(trial)
        if self._ending:  # Trainer asks for it to delete there
            self._keep_the_best_alone(run_dir)
        return os.path.join(run_dir, STAGING) if self._saving else run_dir

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint below the staging folder and move it to its place; then push, then delete old ones."""
        run_dir, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        first_of_node = self.args.local_process_index == 0
        if first_of_node:
            clear_staging(run_dir)
        self.accelerator.wait_for_everyone()
        best_so_far = self.state.best_model_checkpoint
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.state.best_model_checkpoint = self._best_checkpoint(run_dir, best_so_far)
        if self.args.should_save:
            self.state.save_to_json(os.path.join(run_dir, STAGING, name, TRAINER_STATE_NAME))
        # A checkpoint is whole when all processes have written their files.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(run_dir, name)
        self.accelerator.wait_for_everyone()
        if first_of_node and Path(run_dir, STAGING, name).is_dir():
            publish(run_dir, name)  # on a disk of this node's own
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(run_dir, name))
        if self.args.should_save:
            rotate(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _best_checkpoint(self, run_dir: str, known: str | None) -> str | None:
        """The path of the best checkpoint, which may be the one that is being written."""
        if not self.state.best_global_step or self.args.save_strategy == SaveStrategy.NO:
            return known
        best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        return best if self.state.best_global_step == self.state.global_step or os.path.exists(best) else known

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, trial, num_train_samples, start_time) -> TrainOutput:
        self._ending = True
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self._ending = False

    def _keep_the_best_alone(self, run_dir: str) -> None:
        """What `Trainer` does at its end with `save_total_limit=1`, file by file; behind this it finds nothing to delete."""
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            for checkpoint in sort_checkpoints(run_dir):
                if not os.path.samefile(checkpoint, best):
                    discard(checkpoint)
