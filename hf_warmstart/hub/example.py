"""Prints the card of a tiny grown model: `python -m hf_warmstart.hub.example > model_cards/example.md`.

The parent is a Llama with random weights and the id that the card gives it is made up, but nothing else is: growth,
certificate and loss are computed here.
"""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..growth.grow import grow
from .card import render_card

PARENT = "example-org/tiny-llama"
NAME = "tiny-llama-grown"
DATASET = "uniform random tokens"


def example_card() -> str:
    """The card as text: a width and depth growth with certificate, held-out loss and licence."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=100,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parent = LlamaForCausalLM(config).eval()
        ids = torch.randint(config.vocab_size, (16, 64))
    parent.config._name_or_path = PARENT
    grown = grow(parent, width=1.5, depth=2)
    with torch.no_grad():
        loss = float(grown(input_ids=ids, labels=ids).loss)
    metrics = {"eval_loss": round(loss, 4), "eval_tokens": ids.numel()}
    return str(render_card(grown, metrics=metrics, dataset=DATASET, license="apache-2.0", model_name=NAME))


if __name__ == "__main__":
    sys.stdout.write(example_card())
