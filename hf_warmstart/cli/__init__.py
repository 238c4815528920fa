"""The command line, `hf-warmstart`: one module per command.

Every command prints for people and, with `--json`, for machines; what went wrong is one message on stderr. Exit codes:
0, what was asked holds; 1, it was measured and does not hold; 2, it could not be done. Commands import torch and
transformers when they run, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..errors import WarmstartError
from ..version import __version__
from . import certify, grow, plan, verify

COMMANDS = (plan, certify, grow, verify)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = argparse.ArgumentParser(prog="hf-warmstart", description="Grow trained transformers models.")
    parser.add_argument("--version", action="version", version=f"hf_warmstart {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    options = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return options.run(options)
    except WarmstartError as error:
        sys.stderr.write(f"hf-warmstart {options.command}: {error}\n")
        return 2


__all__ = ["main"]
