"""The command line, `hf-warmstart`: one module per command.

Every command prints for people and, with `--json`, for machines; what went wrong is one message on stderr. Exit codes:
0, what was asked holds; 1, it was measured and does not hold; 2, it could not be done. Commands import torch and
transformers when they run, so that `--help` is quick. A command that was stopped by the keyboard has exit code 130.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from ..errors import WarmstartError
from ..version import __version__
from . import advise, certify, fit, grow, plan, recommend, report, select, sweep, verify
from .options import notice, notices

COMMANDS = (plan, certify, grow, verify, advise, select, sweep, fit, recommend, report)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="hf-warmstart", description="Grow trained transformers models.")
    parser.add_argument("--version", action="version", version=f"hf_warmstart {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    options = make_parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with notices(options.command):
            return options.run(options)
    except WarmstartError as error:
        notice(options.command, str(error))
        return 2
    except KeyboardInterrupt:
        notice(options.command, "Stopped." + getattr(options, "when_stopped", ""))
        return 130  # as shells have it for SIGINT


__all__ = ["main", "make_parser"]
