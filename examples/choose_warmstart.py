"""Choose a warm start by short runs, then start the planned run with the choice.

    python examples/choose_warmstart.py
    python examples/choose_warmstart.py --parent runs/base/checkpoint-500 --budget 5%

Three ways to double the width are probed and continued for some steps under the planned run's own arguments. The report says
which is ahead and what it is not sure of; it is saved beside the run, with a picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from small_text import TEXT, arguments, blocks_of, collate, trained_parent

from hf_warmstart import Candidate, SelectionReport, WarmstartTrainingArguments, select_warmstart

CANDIDATES = [
    Candidate("noise_state_carried", width=2, width_operator="perturbed_copy"),
    Candidate("noise_new_entries_fresh", width=2, width_operator="perturbed_copy", state_policy="asymmetric_reset"),
    Candidate("slice_state_carried", width=2, width_operator="reference_slice"),
]


def main(given: Sequence[str] | None = None) -> SelectionReport:
    """Select, print, train with the choice."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parent", type=Path, help="a Trainer checkpoint over bytes, with its optimizer")
    parser.add_argument("--text", type=Path, default=TEXT, help="what to train on")
    parser.add_argument("--steps", type=int, default=400, help="of the planned run")
    parser.add_argument("--continuation", type=int, default=32, help="steps of each candidate")
    parser.add_argument("--repeats", type=int, default=3, help="of a continuation, at most")
    parser.add_argument("--budget", help="the most that the selection may cost, such as 50%%")
    parser.add_argument("--output", type=Path, default=Path("runs/choose_warmstart"))
    options = parser.parse_args(given)

    checkpoint = options.parent or trained_parent(options.output / "parent", 100)
    train, held_out = blocks_of(options.text)
    args = arguments(options.output / "run", options.steps, WarmstartTrainingArguments, per_device_eval_batch_size=16)
    report = select_warmstart(
        checkpoint,
        CANDIDATES,
        train_dataset=train,
        eval_dataset=held_out,
        args=args,
        probe_steps=(4, max(5, options.continuation // 4)),
        continuation_steps=options.continuation,
        repeats=options.repeats,
        budget=options.budget,
        data_collator=collate,
    )
    print(report)
    print(f"chosen: {report.best}, for {report.cost_fraction:.0%} of the planned run")
    trainer = report.start(train_dataset=train, data_collator=collate)
    trainer.train()
    trainer.save_model()
    return report


if __name__ == "__main__":
    main()
