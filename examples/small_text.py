"""What the small examples share: bytes of a text as tokens, and a tiny Llama that was trained on them for a while.

The text is by default the LICENSE beside this folder, English that every copy has; any other file of text does. Tokens are the
text's bytes, so that nothing is downloaded: for a model of your own, load it and its tokenizer instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

TEXT = Path(__file__).parents[1] / "LICENSE"
LENGTH = 64  # tokens of a sequence
QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": not torch.cuda.is_available()}


def blocks_of(path: Path = TEXT, held_out: float = 0.25) -> tuple[Dataset, Dataset]:
    """Blocks of bytes for training, and those of the text's end held out: rows of `input_ids` and `labels`."""
    data = list(path.read_bytes())
    rows = [data[start : start + LENGTH] for start in range(0, len(data) - LENGTH + 1, LENGTH)]
    cut = round(len(rows) * (1 - held_out))
    return tuple(Dataset.from_dict({"input_ids": part, "labels": part}) for part in (rows[:cut], rows[cut:]))  # type: ignore[return-value]


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama over bytes with fresh weights."""
    own: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 2 * LENGTH,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(own | changes)))


def trained_parent(output: Path, steps: int, path: Path = TEXT, **changes: Any) -> Path:
    """Train a tiny Llama for some steps; the checkpoint's folder. One that is there already is taken as it is."""
    checkpoint = output / f"checkpoint-{steps}"
    if not checkpoint.is_dir():
        set_seed(0)
        trainer = Trainer(
            tiny_llama(**changes), arguments(output, steps), train_dataset=blocks_of(path)[0], data_collator=collate
        )
        trainer.train()
    return checkpoint


def arguments(output: Path, steps: int, kind: type = TrainingArguments, **changes: Any) -> Any:
    """Arguments of a short run on this text."""
    own: dict[str, Any] = {
        "max_steps": steps,
        "save_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "logging_steps": max(1, steps // 10),
        "include_num_input_tokens_seen": "all",
        "dataloader_pin_memory": False,
    }
    return kind(str(output), **(own | QUIET | changes))


collate = default_data_collator
