"""`hf-warmstart completion`: a script by which a shell completes commands and options, made by shtab."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..errors import WarmstartError

SHELLS = ("bash", "fish", "tcsh", "zsh")
EXAMPLES = """examples:
  hf-warmstart completion bash
What it prints goes where the shell looks for such scripts; it is made once, so that completing costs no start of Python:
  hf-warmstart completion bash > ~/.local/share/bash-completion/completions/hf-warmstart
  hf-warmstart completion zsh > ~/.zfunc/_hf-warmstart     (with ~/.zfunc in fpath, before compinit)
"""
# Options that name files by these words in their help are completed by files.
PATHS = {"FILE", "FOLDER", "DATA", "SOURCE", "TARGET", "OUTPUT", "CHECKPOINT", "GROWN", "RUNS", "RECIPE", "LAW"}


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands and options in a shell",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the script; 0."""
    try:
        import shtab
    except ImportError as error:
        raise WarmstartError(
            "Completion scripts are made by shtab, which is not installed: pip install 'hf_warmstart[completion]'."
        ) from error
    from . import make_parser

    parser = make_parser()
    for command in subparsers(parser).values():
        for action in command._actions:
            if action.metavar in PATHS and action.choices is None:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    sys.stdout.write(shtab.complete(parser, options.shell) + "\n")
    return 0


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands' own parsers, by name."""
    (found,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)
