"""The command line, `hf-warmstart`: one module per command.

Every command prints for people and, with `--json`, for machines; what went wrong is one message on stderr, with `--debug` after
its traceback. Commands import torch and transformers when they run, so that `--help` is quick.

| exit code | |
|---|---|
| 0 | what was asked holds, or is done |
| 1 | it was measured and does not hold |
| 2 | it could not be done: the request, the files or the Hub do not allow it |
| 3 | an error that nobody foresaw |
| 130, 141 | stopped by the keyboard; whoever read the output went away (as shells have it for SIGINT and SIGPIPE) |
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..errors import WarmstartError
from ..redaction import redact
from ..version import __version__
from . import advise, certify, completion, fit, grow, plan, push, recipe, recommend, report, select, sweep, verify
from .options import notice, notices

COMMANDS = (plan, certify, grow, verify, advise, select, sweep, fit, recommend, push, recipe, report, completion)
EPILOG = """examples:
  hf-warmstart plan runs/base/checkpoint-500 --width 1.5 --depth 2
  hf-warmstart grow runs/base/checkpoint-500 runs/grown --width 1.5 --depth 2
  hf-warmstart grow --help

exit codes: 0 done, or what was asked holds; 1 it was measured and does not hold; 2 it could not be done; 3 an error that
nobody foresaw; 130 stopped by the keyboard. With --json, results go to stdout for machines; messages go to stderr always.
"""
LONGEST = 500  # of an error that nobody foresaw, in characters


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, and where to read on."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: {' '.join(message.split())}. See: {self.prog} --help\n")
        raise SystemExit(2)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="hf-warmstart",
        description="Grow trained transformers models, carry their training state, keep training.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf_warmstart {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    for own in commands.choices.values():
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    options = make_parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # bars of the Hub's client and of transformers
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with notices(options.command):
            code: int = options.run(options)
        sys.stdout.flush()
        return code
    except WarmstartError as error:
        _tell(options, error, str(error))
        return 2
    except KeyboardInterrupt:
        notice(options.command, "Stopped." + getattr(options, "when_stopped", ""))
        return 130
    except BrokenPipeError:
        # Nothing more can be written there, not even what is buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # the last place that can tell a person anything
        words = " ".join(f"{type(error).__name__}: {error}".split())
        short = words if len(words) <= LONGEST else words[:LONGEST] + " ..."
        advice = "" if options.debug else " --debug shows where."
        _tell(options, error, f"{short}{advice}")
        return 3


def _tell(options: argparse.Namespace, error: BaseException, words: str) -> None:
    """An error on stderr, its traceback before it where that was asked for; neither with a token in it."""
    if options.debug:
        import traceback

        sys.stderr.write(redact("".join(traceback.format_exception(error))))
    notice(options.command, redact(words))


__all__ = ["main", "make_parser"]
