"""`hf-warmstart grow`: a checkpoint in, a grown one out, in bounded memory; or one that was grown before, anew."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WarmstartError
from ..version import __version__
from .options import add_growth_options, console, escape, growth_options, notice
from .plan import as_data, show, size_text
from .progress import bar, json_lines, write_line

if TYPE_CHECKING:
    from ..checkpoints.grow_checkpoint import CheckpointGrowth
    from ..growth.plan import GrowthRecord

EXAMPLES = """examples:
  hf-warmstart grow runs/base/checkpoint-500 runs/grown --width 2
  hf-warmstart grow my-org/my-model my-model-deep --depth 1.5 --max-memory 2GB
  hf-warmstart grow my-org/my-model wide --width 2 --dry-run
  hf-warmstart grow my-org/my-model wide/checkpoint-500 --subfolder checkpoint-500 --width 2
  hf-warmstart grow my-org/my-model again --record my-org/my-grown-model
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
    add_growth_options(parser).add_argument(
        "--record",
        metavar="GROWN",
        help="instead: grow as the record in this grown folder or Hub id tells, and compare parent and result with it",
    )
    parser.add_argument("--state-policy", default="carry", choices=["carry", "asymmetric_reset", "reset"])
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: %(default)s)")
    parser.add_argument("--max-memory", metavar="SIZE", help="the most memory that the process may take, such as 2GB")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="that compute (default: one for each processor but one, at most 8)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--subfolder",
        metavar="PATH",
        help="of the source, with its training state; such as checkpoint-500 (default: what a --record names)",
    )
    parser.add_argument(
        "--low-disk", action="store_true", help="fetch a Hub id's files of weights one by one, and drop each after use"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print bytes and memory, write nothing"
    )
    parser.add_argument("--json", action="store_true", help="write JSON lines to stdout: progress, then the result")
    parser.set_defaults(run=run, when_stopped=" The same command goes on after the last file that was finished.")


def run(options: argparse.Namespace) -> int:
    """Grow; 0, or 1 where another growth was to be made again and the bytes are others."""
    from ..checkpoints.grow_checkpoint import prepare_growth
    from ..checkpoints.records import parents_subfolder
    from ..growth.config import GrowthConfig

    asked, record = growth_options(options), None
    if options.record is not None:
        record = _record(options, asked)
        asked = {"growth_config": GrowthConfig.from_dict(record.growth_config)}
        if options.subfolder is None:
            options.subfolder = parents_subfolder(record, options.source)
    how = {
        "state_policy": options.state_policy,
        "max_shard_size": options.max_shard_size,
        "max_memory": options.max_memory,
        "revision": options.revision,
        "subfolder": options.subfolder or "",
        "threads": options.threads,
        "low_disk": options.low_disk,
    }
    start = time.monotonic()
    growth = prepare_growth(options.source, options.target, **how, **asked)
    try:
        if record is not None:
            growth.check_parent(record)
        if options.dry_run:
            _show(growth, options)
            return 0
        with json_lines() if options.json else bar("growing") as report:
            made = growth.run(report)
    finally:
        growth.close()
    seconds = time.monotonic() - start
    same = None if record is None else _same_files(options.target, options.record)
    if options.json:
        rebuilt = {} if record is None else {"same_files": same}
        write_line({"event": "done", "target": options.target, "seconds": seconds, "record": made.to_dict()} | rebuilt)
    else:
        before, after = made.parameters
        words = f"{before:,} -> {after:,} parameters in {seconds:.0f} s, {'exact' if made.exact else 'not exact'}."
        words += _check_with(growth, options) if record is None else _compared(same, options)
        console().print(f"{escape(options.target)}: {escape(words)}", soft_wrap=True)
    return 1 if same is False else 0


def _record(options: argparse.Namespace, asked: dict[str, Any]) -> GrowthRecord:
    """The record that `--record` names.

    Raises:
        WarmstartError: there is none, or other growth options were given beside.
    """
    from ..checkpoints.records import last_record

    if asked:
        raise WarmstartError(f"--record says what to grow: {sorted(asked)} cannot be given with it. Leave out one.")
    record = last_record(options.record)
    if record.library_version != __version__:
        words = f"{options.record} was grown by hf_warmstart {record.library_version}; this is {__version__}: "
        notice(options.command, words + "the bytes may be others.")
    return record


def _same_files(target: str, grown: str) -> bool | None:
    """Whether the files of weights have the sha256 that another folder's `growth.json` lists; None where it lists others."""
    from ..checkpoints.records import checksums

    ours, theirs = checksums(target), checksums(grown)
    return ours == theirs if ours and set(ours) == set(theirs) else None


def _compared(same: bool | None, options: argparse.Namespace) -> str:
    if same is None:
        return f" {options.record} lists no checksums of files of these names: the bytes were not compared."
    return f" The files {'have' if same else 'do not have'} the sha256 that {options.record} lists."


def _check_with(growth: CheckpointGrowth, options: argparse.Namespace) -> str:
    """The command that checks what was written, where one does."""
    from ..checkpoints.weights.whole import StreamedWeights

    if not isinstance(growth.weights, StreamedWeights):
        return ""
    command = ["hf-warmstart", "verify", options.target]
    command += ["--parent", str(growth.folder)] if Path(options.source).is_dir() else []
    return f" Check it with: {shlex.join(command)}"


def _show(growth: CheckpointGrowth, options: argparse.Namespace) -> None:
    """What a growth would take."""
    traffic, at_once = growth.fetched_bytes
    needs = {"output_bytes": growth.output_bytes, "peak_memory_bytes": growth.peak_memory_bytes}
    needs |= {"fetched_bytes": traffic, "fetched_bytes_at_once": at_once} if options.low_disk else {}
    if options.json:
        write_line({"event": "plan", **as_data(growth.plan), **needs})
        return
    memory = size_text(growth.peak_memory_bytes)
    show(growth.plan, f"{options.target} takes {growth.output_bytes:,} bytes of disk, growing it {memory} of memory")
    if options.low_disk:
        console().print(f"  {traffic:,} bytes would be fetched, at most {at_once:,} of them on the disk at once")
