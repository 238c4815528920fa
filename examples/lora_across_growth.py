"""A LoRA adapter across a growth: train it on the parent, grow both, go on training it on the child.

    python examples/lora_across_growth.py
    python examples/lora_across_growth.py --width 1.5 --depth 2

The adapter's matrices take the maps of the spaces that they read and write, so that the child with its adapter computes what
the parent with its adapter did. Rank, scaling and names stay. `grow(..., merge_adapter=True)` gives a model without adapters.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from small_text import TEXT, arguments, blocks_of, collate, trained_parent
from transformers import AutoModelForCausalLM, Trainer, set_seed

from hf_warmstart import grow
from hf_warmstart.metrics import held_out_metrics

LORA = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}


def main(given: Sequence[str] | None = None) -> dict[str, float]:
    """Adapt, grow, adapt further, save and load; the held-out losses."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parent", type=Path, help="a checkpoint over bytes")
    parser.add_argument("--text", type=Path, default=TEXT, help="what the adapter learns")
    parser.add_argument("--width", type=float, default=2.0)
    parser.add_argument("--depth", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=60, help="of the adapter, before and after")
    parser.add_argument("--output", type=Path, default=Path("runs/lora"))
    options = parser.parse_args(given)
    growth = {"width": options.width, "depth": options.depth}

    checkpoint = options.parent or trained_parent(options.output / "parent", 50)
    train, held_out = blocks_of(options.text)
    set_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), LoraConfig(**LORA))
    found = {"parent": _loss(adapted, held_out)}
    _train(adapted, train, options.output / "adapter", options.steps)
    found["parent, adapted"] = _loss(adapted, held_out)

    grown = grow(adapted, **growth)
    found["child, adapter grown"] = _loss(grown, held_out)
    _train(grown, train, options.output / "grown_adapter", options.steps)
    found["child, adapted further"] = _loss(grown, held_out)
    for name, loss in found.items():
        print(f"{name:23} {loss:.4f} nats per byte")

    # peft saves the adapter alone. Its base is what the parent's base grows to, with or without an adapter.
    grown.save_pretrained(options.output / "grown_adapter")
    base = grow(AutoModelForCausalLM.from_pretrained(checkpoint), **growth)
    base.save_pretrained(options.output / "grown_base")
    again = PeftModel.from_pretrained(base, options.output / "grown_adapter")
    found["loaded"] = _loss(again, held_out)
    return found


def _loss(model: PeftModel, rows) -> float:
    return held_out_metrics(model, rows)["eval_loss"]


def _train(model: PeftModel, rows, folder: Path, steps: int) -> None:
    args = arguments(folder, steps, save_strategy="no", learning_rate=1e-2)
    Trainer(model, args, train_dataset=rows, data_collator=collate).train()


if __name__ == "__main__":
    main()
