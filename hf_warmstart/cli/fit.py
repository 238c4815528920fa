"""`hf-warmstart fit`: laws of learning rate and batch from a table of runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .options import console, escape, named_values, new_table, write_json

if TYPE_CHECKING:
    from ..scaling.hparams.predictor import HparamPredictor

EXAMPLES = """examples:
  hf-warmstart fit runs.csv
  hf-warmstart fit sweep/ --form compute --output my-law --plot laws.png
  hf-warmstart fit wandb.csv --column loss=eval/loss --column tokens=train/num_input_tokens_seen
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "fit",
        help="fit laws of learning rate and batch to runs at several budgets",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", metavar="RUNS", help=".csv, .tsv, .json, .jsonl, .parquet, or a folder of Trainer runs"
    )
    parser.add_argument(
        "--form",
        default="auto",
        choices=["auto", "compute", "params_tokens"],
        help="of the laws (default: %(default)s)",
    )
    parser.add_argument(
        "--method",
        default="auto",
        choices=["auto", "quadratic", "near_optimal", "interpolation", "joint"],
        help="how a budget's optimum is found (default: %(default)s)",
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="a column under another name, such as loss=eval/loss",
    )
    parser.add_argument("--sequence-length", type=int, metavar="T", help="of the runs, where batches are in sequences")
    parser.add_argument(
        "--accounting", default="6ND", choices=["6ND", "config"], help="of compute; 'config' takes the table's"
    )
    parser.add_argument(
        "--recipe",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what the runs had besides: weight_decay=0.1, schedule=cosine",
    )
    parser.add_argument("--draws", type=int, default=1000, metavar="N", help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--name", default="fitted law", help="for tables and cards")
    parser.add_argument("--output", metavar="FOLDER", help="save the laws, their draws, the runs and a card there")
    parser.add_argument("--plot", metavar="FILE", help="save a plot there")
    parser.add_argument("--dry-run", action="store_true", help="fit and print, write neither --output nor --plot")
    parser.add_argument("--json", action="store_true", help="write JSON to stdout")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Fit, print, save where asked; 0."""
    from ..scaling.hparams.predictor import HparamPredictor

    predictor = HparamPredictor.fit(
        options.runs,
        options.form,
        columns={ours: str(theirs) for ours, theirs in named_values(options.column, "--column", literal=True).items()},
        accounting=options.accounting,
        sequence_length=options.sequence_length,
        method=options.method,
        draws=options.draws,
        seed=options.seed,
        recipe=named_values(options.recipe, "--recipe"),
        name=options.name,
    )
    if options.output and not options.dry_run:
        predictor.save_pretrained(options.output)
    if options.plot and not options.dry_run:
        predictor.plot(options.plot)
    if options.json:
        runs = predictor.runs
        aside = runs.set_aside if runs is not None else None
        write_json({**predictor.laws.to_dict(), "set_aside": [] if aside is None else aside.to_dict("records")})
    else:
        show(predictor)
        if options.dry_run and (files := [name for name in (options.output, options.plot) if name]):
            console().print(f"{escape(', '.join(files))} would be written; nothing was.", soft_wrap=True)
    return 0


def show(predictor: HparamPredictor) -> None:
    """Laws, the budgets' optima, and the runs that were set aside."""
    out = console()
    out.print(escape(str(predictor)), soft_wrap=True)
    table = new_table()
    for name in ("params", "tokens", "compute", "learning rate", "batch, tokens", "loss", "runs"):
        table.add_column(name, justify="right")
    table.add_column("optimum by")
    table.add_column("on an edge")
    for row in predictor.laws.optima:
        numbers = (f"{row[n]:.3g}" for n in ("params", "tokens", "compute", "learning_rate", "batch_tokens"))
        table.add_row(*numbers, f"{row['loss']:.4f}", str(row["runs"]), row["method"], ", ".join(row["edges"]))
    out.print(table)
    for row in predictor.runs.set_aside.to_dict("records") if predictor.runs is not None else []:
        settings = ", ".join(f"{n} {row[n]:.3g}" for n in ("params", "tokens", "learning_rate", "batch_tokens"))
        out.print(f"  set aside: {escape(str(row['reason']))} ({settings})", soft_wrap=True)
