"""From small runs to a continued model: sweep -> law -> recommend -> go on, on a new domain with replay of the old.

    python examples/sweep_to_continue.py --new my-domain.txt

1. `run_sweep` trains proxies of the model's own family on the new domain's text;
2. `HparamPredictor.fit` makes laws of their best learning rate and batch, and of their loss;
3. `recommend` reads them at the compute that the checkpoint's loss on that text is worth, plus the planned run's;
4. the run goes on with these settings, on new text with a share of the old mixed in against forgetting.

The old domain is what the parent was trained on (the LICENSE), the new one the pages of `docs/`. At this size the laws are
worth little, which their intervals and warnings say; the steps are those of a real run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from datasets import interleave_datasets
from small_text import LENGTH, QUIET, TEXT, blocks_of, collate, trained_parent
from transformers import AutoModelForCausalLM

from hf_warmstart import HparamPredictor, WarmstartTrainer, WarmstartTrainingArguments, grow, run_sweep
from hf_warmstart.metrics import held_out_metrics

DOCS = Path(__file__).parents[1] / "docs"


def main(given: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """All four steps; losses on both domains before and after."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--new", type=Path, help="text of the new domain (default: the pages of docs/)")
    parser.add_argument("--tokens", type=float, default=100_000, help="of the run")
    parser.add_argument("--replay", type=float, default=0.25, help="share of the old text")
    parser.add_argument("--proxies", type=int, nargs="+", default=[1300, 2400, 4500], help="their parameters")
    parser.add_argument("--ratio", type=float, default=20.0, help="tokens for each parameter of a proxy")
    parser.add_argument("--output", type=Path, default=Path("runs/sweep_to_continue"))
    options = parser.parse_args(given)

    new = options.new or _docs_in_one(options.output)
    (train, held_out), (old_train, old_held_out) = blocks_of(new), blocks_of(TEXT)
    parent = AutoModelForCausalLM.from_pretrained(trained_parent(options.output / "parent", 100))
    model = grow(parent, width=2)

    sweep = run_sweep(
        model,
        train_dataset=train.select_columns("input_ids"),
        eval_dataset=held_out.select_columns("input_ids"),
        output_dir=options.output / "sweep",
        tokens=options.tokens,
        sequence_length=LENGTH,
        proxies=options.proxies,
        tokens_per_parameter=options.ratio,
        learning_rates=3,
        batch_sizes=3,
        learning_rate=2e-2,
        batch_tokens=4 * LENGTH,
        min_steps=5,
        refinements=1,
    )
    law = HparamPredictor.fit(sweep)
    law.save_pretrained(options.output / "law")
    found = law.recommend(
        model=model,
        eval_dataset=held_out.select_columns("input_ids"),
        tokens=options.tokens,
        sequence_length=LENGTH,
        replay_share=options.replay,
        trust_loss=True,
    )
    print(found)

    mixed = interleave_datasets(
        [train, old_train],
        probabilities=[1 - options.replay, options.replay],
        seed=0,
        stopping_strategy="all_exhausted",
    )
    args = found.training_arguments(
        options.output / "run", args_class=WarmstartTrainingArguments, save_strategy="no", logging_steps=20, **QUIET
    )
    before = _losses(model, held_out, old_held_out)
    trainer = WarmstartTrainer(model, args, train_dataset=mixed, data_collator=collate)
    trainer.train()
    after = _losses(model, held_out, old_held_out)
    for domain in before:
        print(f"{domain:4} {before[domain]:.3f} -> {after[domain]:.3f} nats per byte")
    model.save_pretrained(options.output / "run")
    return {"before": before, "after": after}


def _losses(model, new, old) -> dict[str, float]:
    return {name: held_out_metrics(model, rows)["eval_loss"] for name, rows in (("new", new), ("old", old))}


def _docs_in_one(output: Path) -> Path:
    """The pages of `docs/` as one file of text."""
    path = output / "docs.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(page.read_text() for page in sorted(DOCS.glob("*.md")) if page.stem != "architectures"))
    return path


if __name__ == "__main__":
    main()
