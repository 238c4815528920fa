"""Runs for training tests: a dataset of fixed blocks, and trainers that write into a temporary folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_warmstart import WarmstartTrainer, WarmstartTrainingArguments

from ..models import some_tokens, tiny_model

BATCH = 4
COMMON = {
    "per_device_train_batch_size": BATCH,
    "train_sampling_strategy": "sequential",
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "seed": 3,
}


def blocks(start: int, steps: int) -> Dataset:
    """The data of steps `start` to `start + steps`: random blocks of 16 tokens."""
    ids = some_tokens((start + steps) * BATCH, 16, seed=11)[start * BATCH :].tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def stock_trainer(model, folder: Path, steps: int, dataset: Dataset, **options) -> Trainer:
    """A stock Trainer."""
    return _trainer(Trainer, TrainingArguments, model, folder, steps, dataset, options)


def warmstart_trainer(
    model, folder: Path, steps: int, dataset: Dataset, warmstart_from=None, eval_dataset=None, **options
):
    """Our trainer."""
    return _trainer(
        WarmstartTrainer,
        WarmstartTrainingArguments,
        model,
        folder,
        steps,
        dataset,
        options,
        warmstart_from=warmstart_from,
        eval_dataset=eval_dataset,
    )


def _trainer(trainer_class, arguments_class, model, folder, steps, dataset, options, **kwargs):
    arguments = arguments_class(str(folder), max_steps=steps, **(COMMON | {"save_steps": steps} | options))
    return trainer_class(
        model=model, args=arguments, train_dataset=dataset, data_collator=default_data_collator, **kwargs
    )


def losses(trainer: Trainer) -> list[float]:
    """The training loss of each step."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@dataclass(frozen=True)
class Base:
    """A parent's run: its folder's checkpoint after 20 steps, and its losses in the 100 steps that follow."""

    checkpoint: Path
    later_losses: list[float]


def train_base(folder: Path, family: str = "llama", **changes) -> Base:
    """A tiny model trained by the stock Trainer for 120 steps, saved at step 20."""
    torch.manual_seed(0)
    model = tiny_model(family, randomised=False, **changes)
    trainer = stock_trainer(model, folder, 120, blocks(0, 120), save_steps=20, save_total_limit=None)
    trainer.train()
    return Base(folder / "checkpoint-20", losses(trainer)[20:])


@pytest.fixture(scope="session")
def base_run(tmp_path_factory) -> Base:
    """A tiny Llama's run."""
    return train_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def base(base_run) -> Path:
    """The parent's checkpoint."""
    return base_run.checkpoint
