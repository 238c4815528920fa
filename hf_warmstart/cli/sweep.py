"""`hf-warmstart sweep`: train small proxies of a target over learning rates and batches, as data for laws."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .options import console, named_values, write_json
from .progress import EVERY, write_line
from .recommend import count

if TYPE_CHECKING:
    from ..scaling.sweeps import Progress as SweepProgress

EXAMPLES = """examples:
  hf-warmstart sweep my-org/my-model runs/sweep --train corpus.txt --eval held-out.txt \\
      --tokens 20B --sequence-length 2048 --dry-run
  hf-warmstart sweep my-org/my-model runs/sweep --train corpus.txt --eval held-out.txt \\
      --tokens 20B --sequence-length 2048 --workers 8
  accelerate launch --no-python hf-warmstart sweep my-org/my-model runs/sweep --train corpus.txt --eval held-out.txt \\
      --tokens 20B --sequence-length 2048 --set proxies=[20e6,40e6,80e6,160e6] --set bf16=true
A sweep that was stopped goes on when the same command runs again.
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "sweep",
        help="train small proxies over learning rates and batches, as data for hyper-parameter laws",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target", metavar="TARGET", help="a folder with a config.json, or a Hub id; no weights are used"
    )
    parser.add_argument("output", metavar="OUTPUT", help="the sweep's folder, with its table runs.jsonl")
    parser.add_argument(
        "--train", nargs="+", required=True, metavar="FILE", help="text that the target is to be trained on"
    )
    parser.add_argument("--eval", nargs="+", required=True, metavar="FILE", help="held-out text of the same kind")
    parser.add_argument("--tokens", type=count, required=True, metavar="D", help="planned for the target, such as 20B")
    parser.add_argument("--sequence-length", type=int, required=True, metavar="T", help="in tokens")
    parser.add_argument("--tokenizer", metavar="SOURCE", help="a folder or Hub id (default: the target's)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of SweepConfig, such as budgets=5, tokens_per_parameter=[10,20] or stop_ratio=null",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes of one thread for the runs, in place of accelerate launch (default: this process alone)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the cost, write and train nothing"
    )
    parser.add_argument("--json", action="store_true", help="write JSON lines to stdout: progress, then the result")
    parser.set_defaults(run=run, when_stopped=" The same command goes on after the last run that was finished.")


def run(options: argparse.Namespace) -> int:
    """Run the sweep; 0."""
    from ..scaling.sweeps.folder import check_folder
    from ..scaling.sweeps.plan import plan_sweep
    from ..scaling.sweeps.run import Sweep, train_sweep

    plan = plan_sweep(
        options.target,
        train_dataset=options.train,
        eval_dataset=options.eval,
        tokens=options.tokens,
        sequence_length=options.sequence_length,
        tokenizer=options.tokenizer,
        **named_values(options.set, "--set"),
    )
    check_folder(options.output, plan.identity)
    if options.dry_run:
        if options.json:
            write_json(Sweep(plan).to_dict())
        else:
            console().print(str(plan), markup=False)
        return 0
    main = _is_main_process()
    if main and not options.json:
        console(stderr=True).print(str(plan), markup=False)
    with json_lines() if options.json else bar() as report:
        made = train_sweep(plan, options.output, report, options.workers)
    if main and options.json:
        write_line({"event": "done", **made.to_dict()})
    elif main:
        console().print(f"{made}\nTable: {made.path}", markup=False, soft_wrap=True)
    return 0


def _is_main_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


@contextmanager
def bar() -> Iterator[Callable[[SweepProgress], None]]:
    """A bar on stderr with the predicted end; where nobody looks, nothing."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    out = console(stderr=True)
    columns = (TextColumn("sweep"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[words]}"))
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as shown:
        task = shown.add_task("sweep", total=None, words="")

        def report(progress: SweepProgress) -> None:
            words = f"{progress.runs} runs"
            if progress.seconds_left is not None:
                words += f", ends {predicted_end(time.time(), progress.seconds_left)}"
            shown.update(task, completed=progress.flops, total=progress.of, words=words)

        yield report


def predicted_end(now: float, seconds_left: float) -> str:
    """The local time of an end, with the day where it is not today's."""
    end = time.localtime(now + seconds_left)
    today = time.localtime(now)[:3] == end[:3]
    return time.strftime("%H:%M:%S" if today else "%a %d %b %H:%M", end)


@contextmanager
def json_lines() -> Iterator[Callable[[SweepProgress], None]]:
    """`{"event": "progress", "flops": ..., "of": ..., "seconds_left": ..., "runs": ...}` on stdout, twice a second at most."""
    last = [0.0]

    def report(progress: SweepProgress) -> None:
        now = time.monotonic()
        if now - last[0] >= EVERY:
            last[0] = now
            write_line({"event": "progress", **progress.__dict__})

    yield report
