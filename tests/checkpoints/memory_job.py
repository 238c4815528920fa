"""Grows in a process of its own, whose memory others watch.

    python -m tests.checkpoints.memory_job stream SOURCE TARGET OPTIONS
    python -m tests.checkpoints.memory_job memory SIZES OPTIONS

Prints as JSON, before it begins: `has`, the anonymous memory so far, and `predicted`, the most that it will have.
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_warmstart import grow, plan_growth
from hf_warmstart.checkpoints.grow_checkpoint import prepare_growth
from hf_warmstart.checkpoints.memory import anonymous_memory

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
}


def say(predicted: int) -> None:
    sys.stdout.write(json.dumps({"has": anonymous_memory(), "predicted": predicted}) + "\n")
    sys.stdout.flush()


def stream(source: str, target: str, options: dict) -> None:
    """From files to files."""
    growth = prepare_growth(source, target, **options)
    say(growth.peak_memory_bytes)
    growth.run()
    growth.close()


def in_memory(sizes: dict, options: dict) -> None:
    """In memory; the class's layout and torch's own tables are made on a small model first."""
    grow(LlamaForCausalLM(LlamaConfig(**SMALL)), **options)
    model = LlamaForCausalLM(LlamaConfig(**sizes, dtype="bfloat16")).bfloat16().eval()
    predicted = plan_growth(model, **options).peak_memory_bytes
    say(anonymous_memory() + predicted)
    grow(model, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, *given, options = sys.argv[1:]
    if kind == "stream":
        stream(*given, json.loads(options))
    else:
        in_memory(*map(json.loads, given), json.loads(options))
