"""What the study of selections and its check have in common: texts, tokenizers, parents, and work that is done once.

All of it may be asked for by several processes at once: whoever comes first makes it, the others wait.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    default_data_collator,
)

from examples.quickstart_text import END, train_tokenizer
from hf_warmstart import WarmstartTrainer, WarmstartTrainingArguments
from hf_warmstart.selection.run import PAUSE, held


def made_if_free(path: Path, make: Callable[[], object]) -> bool:
    """Make a file or folder that is missing, unless another process is at it; whether it is there.

    Args:
        make: moves it to its place when it is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with held(path.with_name(f".{path.name}.lock")) as mine:
            if mine and not path.exists():
                make()
    return path.exists()


def made_once(path: Path, make: Callable[[], object]) -> Path:
    """The same, waiting for another process that is at it."""
    while not made_if_free(path, make):
        time.sleep(PAUSE)
    return path


def documents(path: Path, most: int | None = None) -> list[str]:
    """The first documents of a file, which the end token parts; all for None."""
    found = [text.strip() for text in path.read_text(encoding="utf-8").split(END) if text.strip()]
    return found[:most]


def tokenizer_of(place: Path, texts: Callable[[], list[str]], vocabulary: int) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, trained on texts where there is none."""

    def make() -> None:
        part = place.with_name(f"{place.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        train_tokenizer(texts(), vocabulary).save_pretrained(part)
        part.rename(place)

    return PreTrainedTokenizerFast.from_pretrained(made_once(place, make))


def common_arguments(batch: int, learning_rate: float, seed: int) -> dict[str, Any]:
    """What parents and continuations have in common. `batch`: blocks of a step."""
    return {
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 30,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "seed": seed,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


def train_parent(
    folder: Path, model: PreTrainedModel, data: Dataset, steps: int, every: int, arguments: dict[str, Any]
) -> None:
    """Train a parent, saved whole or not at all each so many steps."""
    own = {"max_steps": steps, "save_steps": every, "logging_steps": 10**6}
    args = WarmstartTrainingArguments(str(folder), **own, **arguments)
    trainer = WarmstartTrainer(model, args, train_dataset=data, data_collator=default_data_collator)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
