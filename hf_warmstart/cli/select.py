"""`hf-warmstart select`: which warm start goes on best from a checkpoint, before a budget is spent on one."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WarmstartError
from .options import add_growth_options, console, escape, growth_options, new_table, parse_value, write_json

if TYPE_CHECKING:
    from ..selection.report import SelectionReport
    from ..selection.rounds import Selection

EXAMPLES = """examples:
  hf-warmstart select --parent runs/base/checkpoint-2000 --width 1.5 --train train.txt --eval held_out.txt \\
      --steps 20000 --output runs/selection --dry-run
  hf-warmstart select --parent runs/base/checkpoint-2000 --regime stochastic --budget 2% \\
      --train blocks/train --eval blocks/held_out --steps 20000 --arg learning_rate=3e-4 --output runs/selection
A selection that was stopped goes on when the same command runs again; the same command elsewhere (another device, another
process of accelerate launch) shares its work.
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "select",
        help="rank warm starts by short runs and choose one",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parent", required=True, metavar="FOLDER", help="the parent's Trainer checkpoint")
    parser.add_argument(
        "--train", required=True, metavar="DATA", help="a folder of Dataset.save_to_disk, or a text file"
    )
    parser.add_argument("--eval", required=True, metavar="DATA", help="the same, held out")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for arms and report")
    parser.add_argument("--steps", required=True, type=int, metavar="N", help="of the run that is to be started")
    parser.add_argument(
        "--regime",
        default="deterministic",
        metavar="NAME",
        help="deterministic, shuffled, dropout or stochastic: what that run will be like (default: %(default)s)",
    )
    parser.add_argument(
        "--budget", metavar="SHARE", help="of that run's FLOPs, such as 2%% or 0.02 (default: no limit)"
    )
    parser.add_argument(
        "--probe-steps", default="16,64", metavar="N,M", help="lags of the probes (default: %(default)s)"
    )
    parser.add_argument("--continuation-steps", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--match", default="steps", metavar="NAME", help="steps, flops or time (default: %(default)s)")
    parser.add_argument(
        "--schedule",
        default="planned",
        metavar="NAME",
        help="of short runs: planned, or compressed into the continuation (default: %(default)s)",
    )
    parser.add_argument(
        "--objective",
        default="final_loss",
        metavar="NAME",
        help="final_loss, auc, or extrapolated, by a race as far as the budget goes (default: %(default)s)",
    )
    parser.add_argument(
        "--max-memory", metavar="SIZE", help="that an arm may take, such as 8GB (default: what is free)"
    )
    parser.add_argument("--block-size", type=int, default=128, metavar="N", help="tokens of a block of a text file")
    parser.add_argument("--args", type=Path, metavar="FILE", help="training arguments of that run, a JSON object")
    parser.add_argument(
        "--arg", action="append", default=[], metavar="NAME=VALUE", help="one training argument: learning_rate=3e-4"
    )
    add_growth_options(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print candidates and cost, train nothing"
    )
    parser.add_argument("--json", action="store_true", help="write JSON to stdout")
    parser.set_defaults(run=run, when_stopped=" The same command goes on where it was.")


def run(options: argparse.Namespace) -> int:
    """Select; 0 where the choice is clear, 1 where it is not."""
    from transformers import default_data_collator

    from ..selection.candidates import candidate_pool
    from ..selection.prepare import prepare_selection

    growth = growth_options(options)
    width, depth = growth.pop("width", None), growth.pop("depth", None)
    if width is None and depth is None and not growth:
        width = 2.0
    selection = prepare_selection(
        options.parent,
        candidate_pool(width, depth, **growth),
        train_dataset=_data(options.train, "--train", options),
        eval_dataset=_data(options.eval, "--eval", options),
        args=_arguments(options),
        regime=options.regime,
        probe_steps=_lags(options.probe_steps),
        continuation_steps=options.continuation_steps,
        budget=options.budget,
        match=options.match,
        schedule=options.schedule,
        objective=options.objective,
        repeats=options.repeats,
        max_memory=options.max_memory,
        from_pool=True,
        data_collator=default_data_collator,
    )
    if options.dry_run:
        _show_plan(selection, options)
        return 0
    report = selection.run()
    if options.json:
        write_json(report.to_dict())
    else:
        show(report)
        console().print(f"Report: {escape(str(Path(options.output, 'selection.md')))}")
    return 0 if report.margin["clear"] else 1


def _arguments(options: argparse.Namespace) -> Any:
    """The planned run's arguments.

    Raises:
        WarmstartError: a name that is no training argument, or a value that is none.
    """
    from ..training import WarmstartTrainingArguments

    given: dict[str, Any] = {}
    if options.args is not None:
        if not options.args.is_file():
            raise WarmstartError(f"--args {options.args} is no file.")
        given = json.loads(options.args.read_text())
    for text in options.arg:
        name, equals, value = text.partition("=")
        if not equals or not value.strip():
            raise WarmstartError(f"--arg {text!r} is not NAME=VALUE.")
        given[name.strip()] = parse_value(value.strip())
    known = {item.name for item in dataclasses.fields(WarmstartTrainingArguments) if item.init}
    if unknown := sorted(set(given) - (known - {"output_dir", "max_steps"})):
        raise WarmstartError(
            f"{unknown} are no training arguments here; --output and --steps have options of their own."
        )
    quiet = {"report_to": "none", "disable_tqdm": options.json or not console(stderr=True).is_terminal}
    return WarmstartTrainingArguments(options.output, max_steps=options.steps, **{**quiet, **given})


def _lags(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise WarmstartError(f"--probe-steps {text!r} are no whole numbers. Pass 16,64.")
    return tuple(int(part) for part in parts)


def _data(place: str, option: str, options: argparse.Namespace) -> Any:
    """Blocks of tokens: a saved `Dataset`, or a text file in the parent's tokens."""
    path = Path(place)
    if path.is_dir():
        from datasets import load_from_disk

        blocks = load_from_disk(str(path))
        return blocks if "labels" in blocks.column_names else blocks.add_column("labels", blocks["input_ids"][:])
    if not path.is_file():
        raise WarmstartError(f"{option} {place!r} is neither a folder of Dataset.save_to_disk nor a text file.")
    from datasets import Dataset
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.parent)
    except (OSError, ValueError) as error:
        raise WarmstartError(
            f"{option} {place!r} is text, and {options.parent} has no tokenizer: {error} Pass a folder of "
            "Dataset.save_to_disk with input_ids."
        ) from error
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    size = options.block_size
    blocks = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def _show_plan(selection: Selection, options: argparse.Namespace) -> None:
    """What a selection would run, and what that costs."""
    study = selection.study
    share = selection.probes_flops / selection.planned_flops
    rows: list[dict[str, Any]] = [
        {
            "candidate": name,
            "operators": [] if candidate.fresh else study.plans[name].operators,
            "state_policy": candidate.state_policy,
            "schedule_policy": candidate.schedule_policy,
            "parameters": study.plans[name].parameters_after,
            "step_flops": study.step_flops(name),
        }
        for name, candidate in study.candidates.items()
    ]
    if options.json:
        budget = {"probes_share": share, "budget_flops": selection.budget, "planned_flops": selection.planned_flops}
        write_json({"candidates": rows, "refused": selection.refused, "notes": selection.notes, **budget})
        return
    out = console()
    table = new_table()
    for column in ("candidate", "operators", "state", "schedule"):
        table.add_column(column)
    table.add_column("parameters", justify="right")
    for row in rows:
        operators = " + ".join(row["operators"]) or "from scratch"
        table.add_row(
            row["candidate"], operators, row["state_policy"], row["schedule_policy"], f"{row['parameters']:,}"
        )
    out.print(table)
    for line in [*selection.notes, *(f"{name} is left out: {why}" for name, why in selection.refused.items())]:
        out.print(escape(line), soft_wrap=True)
    limit = "no limit" if selection.budget is None else f"{selection.budget / selection.planned_flops:.2%}"
    out.print(f"Probes alone cost {share:.2%} of the planned run; budget: {limit}. Nothing was run.")


def show(report: SelectionReport) -> None:
    """A report for people."""
    out = console()
    out.print(
        f"[bold]{escape(report.best)}[/], regime {report.settings['regime']}, {report.cost_fraction:.2%} of the planned run"
    )
    table = new_table()
    for column in ("", "candidate", "stage", "repeats", "loss", "behind", "interval"):
        table.add_column(column, justify="left" if column in ("candidate", "stage") else "right")
    for row in report.table:
        numbers = ["" if row[key] is None else f"{row[key]:.4f}" for key in ("loss", "behind")]
        reach = "" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
        table.add_row(
            str(row["rank"] or ""), escape(row["candidate"]), row["stage"], str(row["repeats"] or ""), *numbers, reach
        )
    out.print(table)
    for line in report.unsure:
        out.print(f"- {escape(line)}", soft_wrap=True)
