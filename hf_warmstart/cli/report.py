"""`hf-warmstart report`: one self-contained HTML page about a run."""

from __future__ import annotations

import argparse
from typing import Any

from .options import console, escape, write_json

EXAMPLES = """examples:
  hf-warmstart report runs/grown
  hf-warmstart report runs/grown --output report.html --no-measure
The page opens without a network: curves, schedule, spectrum, activation scale, escape, the choice of the start and the
recommended settings, as far as the folder holds them.
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "report",
        help="a self-contained HTML page about a run: curves, spectrum, escape, schedule",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", metavar="RUN", help="the output_dir of a run, a checkpoint or a grown model's folder"
    )
    parser.add_argument("--output", metavar="FILE", help="where to write it (default: report.html in the folder)")
    parser.add_argument(
        "--no-measure", action="store_true", help="leave the weights alone: no spectrum, activations, escape"
    )
    parser.add_argument("--json", action="store_true", help="write JSON to stdout")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the page; 0."""
    from ..report import write_report

    path = write_report(options.folder, options.output, measured=not options.no_measure)
    if options.json:
        write_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        console().print(f"[bold]{escape(str(path))}[/], {path.stat().st_size / 1024:,.0f} KiB", soft_wrap=True)
    return 0
