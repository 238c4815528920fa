"""`hf-warmstart grow`: a checkpoint in, a grown one out, in bounded memory."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from .options import add_growth_options, console, growth_options
from .plan import as_data, show, size_text
from .progress import bar, json_lines, write_line

if TYPE_CHECKING:
    from ..checkpoints.grow_checkpoint import CheckpointGrowth

EXAMPLES = """examples:
  hf-warmstart grow runs/base/checkpoint-500 runs/grown --width 2
  hf-warmstart grow my-org/my-model my-model-deep --depth 1.5 --max-memory 2GB
  hf-warmstart grow my-org/my-model wide --width 2 --dry-run
A run that was stopped goes on where it was when the same command runs again.
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "grow",
        help="grow a checkpoint into a new folder, with its training state",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="a model's folder, a training checkpoint, or a Hub id")
    parser.add_argument("target", metavar="TARGET", help="the new folder; nothing is overwritten")
    add_growth_options(parser)
    parser.add_argument("--state-policy", default="carry", choices=["carry", "asymmetric_reset", "reset"])
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: %(default)s)")
    parser.add_argument("--max-memory", metavar="SIZE", help="the most memory that the process may take, such as 2GB")
    parser.add_argument("--threads", type=int, metavar="N", help="that compute (default: one for each processor)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--low-disk", action="store_true", help="fetch a Hub id's files of weights one by one, and drop each after use"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print bytes and memory, write nothing"
    )
    parser.add_argument("--json", action="store_true", help="write JSON lines to stdout: progress, then the result")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Grow; 0."""
    from ..checkpoints.grow_checkpoint import prepare_growth

    how = {
        "state_policy": options.state_policy,
        "max_shard_size": options.max_shard_size,
        "max_memory": options.max_memory,
        "revision": options.revision,
        "threads": options.threads,
        "low_disk": options.low_disk,
    }
    start = time.monotonic()
    growth = prepare_growth(options.source, options.target, **how, **growth_options(options))
    try:
        if options.dry_run:
            _show(growth, options)
            return 0
        with json_lines() if options.json else bar("growing") as report:
            record = growth.run(report)
    finally:
        growth.close()
    seconds = time.monotonic() - start
    if options.json:
        write_line({"event": "done", "target": options.target, "seconds": seconds, "record": record.to_dict()})
    else:
        before, after = record.parameters
        console().print(
            f"{escape(options.target)}: {before:,} -> {after:,} parameters in {seconds:.0f} s, "
            f"{'exact' if record.exact else 'not exact'}. Check it with: hf-warmstart verify {escape(options.target)}"
        )
    return 0


def _show(growth: CheckpointGrowth, options: argparse.Namespace) -> None:
    """What a growth would take."""
    traffic, at_once = growth.fetched_bytes
    needs = {"output_bytes": growth.output_bytes, "peak_memory_bytes": growth.peak_memory_bytes}
    needs |= {"fetched_bytes": traffic, "fetched_bytes_at_once": at_once} if options.low_disk else {}
    if options.json:
        write_line({"event": "plan", **as_data(growth.plan), **needs})
        return
    show(growth.plan)
    console().print(
        f"  {escape(options.target)} would take {growth.output_bytes:,} bytes of disk; growing it "
        f"{size_text(growth.peak_memory_bytes)} of memory"
    )
    if options.low_disk:
        console().print(f"  {traffic:,} bytes would be fetched, at most {at_once:,} of them on the disk at once")
