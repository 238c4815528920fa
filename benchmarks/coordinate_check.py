"""Coordinate checks of growths: how far activations move, against the width grown to, with muP's transfer and without.

    python -m benchmarks.coordinate_check --output docs/coordinate-check.png

A small Llama with random weights takes a few AdamW steps on random tokens, at its own width and grown to several times it.
Prints a table for each operator, and draws that of the default one. About ten seconds on one core.
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_warmstart.training.coordinate_check import coordinate_check, plot_coordinate_checks

OPERATORS = ("perturbed_copy", "uneven_copy", "reference_slice", "szp")
WIDTHS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="where to draw the default operator's checks, a .png or .svg")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    batches = [{"input_ids": (ids := torch.randint(128, (8, 32))), "labels": ids} for _ in range(options.steps)]
    for operator in OPERATORS:
        checks = [
            coordinate_check(
                model,
                batches,
                learning_rate=options.learning_rate,
                widths=WIDTHS,
                learning_rate_transfer=transfer,
                width_operator=operator,
            )
            for transfer in ("mup", None)
        ]
        print(*checks, sep="\n", end="\n\n", flush=True)
        if operator == OPERATORS[0] and options.output:
            plot_coordinate_checks(checks, options.output)


if __name__ == "__main__":
    main()
