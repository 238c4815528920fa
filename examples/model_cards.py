"""Make the three cards in `model_cards/`, each as a user would get it:

    python examples/model_cards.py model_cards

- `grown_by_command`: what `hf-warmstart grow` leaves;
- `continued`: a child that `WarmstartTrainer` went on training, with both losses, curves and settings for going on;
- `chain`: two growths one after the other, the first of them not exact.

Parents are tiny Llamas that were trained on the bytes of this repository's LICENSE, so every number is measured here.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from small_text import LENGTH, arguments, blocks_of, collate, trained_parent
from transformers import AutoModelForCausalLM

from hf_warmstart import HparamPredictor, WarmstartTrainer, WarmstartTrainingArguments, grow
from hf_warmstart.cli import main as hf_warmstart
from hf_warmstart.hub import save_grown
from hf_warmstart.metrics import held_out_metrics

DATA = "apache-2.0-license-text"
SHOWN = ("README.md", "curves.png")


def grown_by_command(parent: Path, folder: Path) -> None:
    """`hf-warmstart grow parent grown --width 1.5 --depth 2`."""
    if hf_warmstart(["grow", str(parent), str(folder), "--width", "1.5", "--depth", "2"]):
        raise SystemExit("the growth failed")


def continued(parent: Path, folder: Path, steps: int) -> None:
    """Grow, go on from the parent's state, evaluate both, save with the card."""
    train, held_out = blocks_of()
    before = AutoModelForCausalLM.from_pretrained(parent)
    child = grow(before, width=2, depth=2, width_operator="uneven_copy")
    args = arguments(
        folder.parent / "run",
        steps,
        WarmstartTrainingArguments,
        eval_strategy="steps",
        eval_steps=max(1, steps // 6),
        save_strategy="no",
        per_device_eval_batch_size=16,
    )
    trainer = WarmstartTrainer(
        child, args, train_dataset=train, eval_dataset=held_out, data_collator=collate, warmstart_from=parent
    )
    trainer.train()
    found = HparamPredictor.from_pretrained("steplaw").recommend(
        model=child, tokens=2e6, sequence_length=LENGTH, tokens_seen=2 * steps * 8 * LENGTH
    )
    save_grown(
        child,
        folder,
        metrics=held_out_metrics(child, held_out),
        parent_metrics=held_out_metrics(before, held_out),
        dataset=DATA,
        license="apache-2.0",
        model_name="tiny-llama-continued",
        history=trainer.state.log_history,
        recommendation=found,
    )


def chain(parent: Path, folder: Path) -> None:
    """Stack layers, which changes the function, then widen."""
    stacked = grow(AutoModelForCausalLM.from_pretrained(parent), depth=2, depth_operator="stack")
    save_grown(grow(stacked, width=2), folder, license="apache-2.0", model_name="tiny-llama-stacked-and-widened")


def make(output: Path, work: Path, steps: int) -> None:
    """All three, whole in `work`; what people read in `output`."""
    parent = trained_parent(work / "parent", steps)
    grown_by_command(parent, work / "grown_by_command")
    continued(parent, work / "continued", steps)
    chain(parent, work / "chain")
    for name in ("grown_by_command", "continued", "chain"):
        (output / name).mkdir(parents=True, exist_ok=True)
        for file in SHOWN:
            if (work / name / file).exists():
                shutil.copyfile(work / name / file, output / name / file)


def main() -> None:
    """Read the options and make the cards."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="folder of the cards")
    parser.add_argument("--work", type=Path, help="keep parents and grown models here")
    parser.add_argument("--steps", type=int, default=120, help="of the parent, and of what follows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as spare:
        make(options.output, options.work or Path(spare), options.steps)


if __name__ == "__main__":
    main()
