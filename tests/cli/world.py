"""What the examples in the help speak of: a parent's checkpoint with a tokenizer, texts, runs, a model on a Hub."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ..checkpoints.folders import bytes_of
from ..hub.minihub import MiniHub
from ..models import tiny_model
from ..scaling.planted import Planted
from ..training.conftest import blocks, stock_trainer

VOCABULARY = 97
PARENT = "runs/base/checkpoint-500"


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w96."""
    made = Tokenizer(WordLevel({f"w{k}": k for k in range(VOCABULARY)}, unk_token="w0"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", eos_token="w2")


def make_world(folder: Path, words: int = 20_000) -> None:
    """Lay it all out below a folder."""
    run = folder / "run"
    stock_trainer(tiny_model("llama", randomised=False), run, 2, blocks(0, 2), warmup_steps=0).train()
    for place in (PARENT, "runs/base/checkpoint-2000"):
        shutil.copytree(run / "checkpoint-2", folder / place)
        tokenizer().save_pretrained(folder / place)
    shutil.rmtree(run)
    drawn = random.Random(0)
    for name in ("corpus.txt", "train.txt", "held-out.txt", "held_out.txt"):
        (folder / name).write_text(" ".join(f"w{drawn.randrange(VOCABULARY)}" for _ in range(words)) + "\n")
    Planted(noise=0.005).runs().to_csv(folder / "runs.csv", index=False)


def publish_model(hub: MiniHub, folder: Path) -> None:
    """`my-org/my-model`: a config of 7 million parameters and a tokenizer; its weights are asked for by no example."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_attention_heads=4,
        num_hidden_layers=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    hub.add("my-org/my-model", bytes_of(folder))
