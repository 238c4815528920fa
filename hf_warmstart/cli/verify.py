"""`hf-warmstart verify`: is a folder the growth of its parent, byte for byte?"""

from __future__ import annotations

import argparse
from typing import Any

from .options import console, escape, write_json
from .progress import bar

EXAMPLES = """examples:
  hf-warmstart verify runs/grown --parent runs/base/checkpoint-500
  hf-warmstart verify my-model-deep --all
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "verify",
        help="check a grown folder against its checksums, its record and its parent",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="a folder or Hub id that was grown and not trained since")
    parser.add_argument(
        "--parent", metavar="SOURCE", help="its parent's folder or Hub id (default: the record's Hub id)"
    )
    count = parser.add_mutually_exclusive_group()
    count.add_argument(
        "--blocks", type=int, default=64, metavar="N", help="of 4 MiB to make anew (default: %(default)s)"
    )
    count.add_argument("--all", action="store_true", help="make everything anew, and read the whole parent")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of blocks (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="write JSON to stdout")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Verify; 0 where all that was checked holds, 1 where it does not."""
    from ..checkpoints.verify import verify

    with bar("verifying") as report:
        found = verify(
            options.folder,
            options.parent,
            blocks=None if options.all else options.blocks,
            seed=options.seed,
            progress=report,
        )
    if options.json:
        write_json({"ok": found.ok, "reason": found.reason, **found.__dict__})
    else:
        verdict = "[bold green]ok[/]" if found.ok else "[bold red]differs[/]"
        console().print(f"{escape(options.folder)} {verdict}: {escape(found.reason)}", soft_wrap=True)
    return 0 if found.ok else 1
