"""Block expansion: new layers between old ones, trained alone; or depth up-scaling, where everything trains.

    python examples/block_expansion.py                        # identity blocks, all else frozen (LLaMA Pro, arXiv 2401.02415)
    python examples/block_expansion.py --depth-operator overlap     # depth up-scaling (SOLAR, arXiv 2312.15166)
    python examples/block_expansion.py --parent runs/base/checkpoint-500 --text my-text.txt

With identity blocks the child begins at its parent's loss to the last digit, and keeps every weight of its parent: what it
learns lies in the new layers alone, so that taking them out gives the parent back. Without `--parent` a tiny Llama over
bytes is trained first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from small_text import TEXT, arguments, blocks_of, collate, trained_parent
from transformers import AutoModelForCausalLM

from hf_warmstart import WarmstartTrainer, WarmstartTrainingArguments, grow
from hf_warmstart.metrics import held_out_metrics


def main(given: Sequence[str] | None = None) -> dict[str, float]:
    """Grow in depth, train, compare; the held-out losses."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parent", type=Path, help="a checkpoint over bytes")
    parser.add_argument("--text", type=Path, default=TEXT, help="what to train on")
    parser.add_argument("--depth", type=float, default=2.0, help="factor on the number of layers")
    parser.add_argument(
        "--depth-operator", default="identity_blocks", help="identity_blocks, stack, interleave or overlap"
    )
    parser.add_argument("--steps", type=int, default=100, help="of the child")
    parser.add_argument("--output", type=Path, default=Path("runs/block_expansion"))
    options = parser.parse_args(given)

    checkpoint = options.parent or trained_parent(options.output / "parent", 100, num_hidden_layers=4)
    train, held_out = blocks_of(options.text)
    parent = AutoModelForCausalLM.from_pretrained(checkpoint)
    child = grow(parent, depth=options.depth, depth_operator=options.depth_operator)
    exact = options.depth_operator == "identity_blocks"
    found = {"parent": held_out_metrics(parent, held_out)["eval_loss"]}
    found["child before"] = held_out_metrics(child, held_out)["eval_loss"]

    args = arguments(
        options.output / "child",
        options.steps,
        WarmstartTrainingArguments,
        train_only="new" if exact else "all",  # an inexact child has to mend what its parent's layers no longer fit
        schedule_policy="rewarm",
    )
    trainer = WarmstartTrainer(child, args, train_dataset=train, data_collator=collate, warmstart_from=checkpoint)
    trainer.train()
    found["child after"] = held_out_metrics(child, held_out)["eval_loss"]

    for name, loss in found.items():
        print(f"{name:13} {loss:.4f} nats per byte")
    if trainer.new_parts is not None:
        kept = sum(p.numel() for p in child.parameters()) - trainer.new_parts.entries
        print(
            f"trained {trainer.new_parts.entries:,} numbers; {kept:,} kept the parent's bits: {_kept(parent, child)}"
        )
    child.save_pretrained(options.output / "child")
    return found


def _kept(parent: torch.nn.Module, child: torch.nn.Module) -> bool:
    """Whether every tensor of the parent is in the child still."""
    shapes: dict[tuple, list[torch.Tensor]] = {}
    for tensor in child.state_dict().values():
        shapes.setdefault(tuple(tensor.shape), []).append(tensor)
    return all(any(torch.equal(old, new) for new in shapes[tuple(old.shape)]) for old in parent.state_dict().values())


if __name__ == "__main__":
    main()
