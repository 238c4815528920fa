"""A dense model into a mixture of experts (sparse upcycling, arXiv 2212.05055): equal experts at first, apart once trained.

    python examples/dense_to_experts.py
    python examples/dense_to_experts.py --parent runs/base/checkpoint-500 --experts 8 --per-token 2

The mixture begins at the dense model's loss. It is a model of another class, so it has no growth record, and starts with a
fresh optimizer. Which tokens go where, and how far the experts have parted, is printed at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from small_text import TEXT, arguments, blocks_of, collate, trained_parent
from transformers import AutoModelForCausalLM, Trainer

from hf_warmstart import upcycle
from hf_warmstart.metrics import held_out_metrics


def main(given: Sequence[str] | None = None) -> dict[str, float]:
    """Upcycle, train, compare; the held-out losses and how far experts are apart."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parent", type=Path, help="a dense Llama or Mistral over bytes")
    parser.add_argument("--target", default="mixtral", help="the type of the mixture")
    parser.add_argument("--text", type=Path, default=TEXT, help="what to train on")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--per-token", type=int, default=2, help="experts that each token is sent to")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("runs/dense_to_experts"))
    options = parser.parse_args(given)

    checkpoint = options.parent or trained_parent(options.output / "parent", 100)
    train, held_out = blocks_of(options.text)
    dense = AutoModelForCausalLM.from_pretrained(checkpoint)
    # The loss that balances the router is off by default in transformers; without it few experts get all tokens.
    mixture = upcycle(
        dense,
        options.target,
        num_experts=options.experts,
        num_experts_per_tok=options.per_token,
        output_router_logits=True,
    )
    found = {"dense": held_out_metrics(dense, held_out)["eval_loss"]}
    found["mixture before"] = held_out_metrics(mixture, held_out)["eval_loss"]
    trainer = Trainer(
        mixture, arguments(options.output / "mixture", options.steps), train_dataset=train, data_collator=collate
    )
    trainer.train()
    found["mixture after"] = held_out_metrics(mixture, held_out)["eval_loss"]
    for name, loss in found.items():
        print(f"{name:15} {loss:.4f} nats per byte")
    found["apart"] = distance(mixture)
    print(f"experts differ from their mean by {found['apart']:.1%} of its size")
    mixture.save_pretrained(options.output / "mixture")
    return found


def distance(mixture: torch.nn.Module) -> float:
    """How far experts lie from their mean, over the mean's norm."""
    stacks = [tensor for name, tensor in mixture.state_dict().items() if name.endswith("experts.down_proj")]
    spread = sum(float((stack - stack.mean(0)).square().sum(dtype=torch.float64) / len(stack)) for stack in stacks)
    return (spread / sum(float(stack.mean(0).square().sum(dtype=torch.float64)) for stack in stacks)) ** 0.5


if __name__ == "__main__":
    main()
