"""What commands share: the options that say what to grow, and ways to write results.

rich is imported when something is shown: it takes most of the time in which `--help` could be there.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import WarmstartError
from ..redaction import redact

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 110  # of tables that go to a file or a pipe


def add_growth_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that become a `GrowthConfig`; their group."""
    growth = parser.add_argument_group("what to grow")
    growth.add_argument("--width", type=float, metavar="X", help="multiplies hidden size, MLP units and heads")
    growth.add_argument("--depth", type=float, metavar="X", help="multiplies the number of layers")
    growth.add_argument("--growth-factor", type=float, metavar="X", help="multiplies the number of parameters")
    growth.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a size by its transformers name (hidden_size=768) or a field of GrowthConfig (width_operator=uneven_copy)",
    )
    return growth


def growth_options(options: argparse.Namespace) -> dict[str, Any]:
    """The growth options as keywords of `plan_growth` and `certify`.

    Raises:
        WarmstartError: as `named_values`.
    """
    given: dict[str, Any] = {
        name: value for name in ("width", "depth", "growth_factor") if (value := getattr(options, name)) is not None
    }
    return named_values(options.set, "--set", given)


def named_values(
    texts: Sequence[str], option: str, given: Mapping[str, Any] | None = None, literal: bool = False
) -> dict[str, Any]:
    """An option that was passed as NAME=VALUE any number of times, beside what is `given`; `literal` values stay text.

    Raises:
        WarmstartError: one is no name and value, or a name is there twice.
    """
    found, problems = dict(given or {}), []
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name or not value.strip():
            problems.append(f"{option} {text!r} is not NAME=VALUE")
        elif name in found:
            problems.append(f"{name} is given twice")
        else:
            found[name] = value.strip() if literal else parse_value(value.strip())
    if problems:
        raise WarmstartError("; ".join(problems) + ".")
    return found


def parse_value(text: str) -> Any:
    """A value of `--set` and its like: a number, a JSON value, or the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def write_json(data: Any) -> None:
    """Strict JSON on stdout; numbers that are not finite are written as text."""
    sys.stdout.write(json.dumps(plain(data), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers that are not finite and objects as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def notice(command: str, words: str) -> None:
    """One message on stderr."""
    sys.stderr.write(f"hf-warmstart {command}: {words}\n")


@contextmanager
def notices(command: str) -> Iterator[None]:
    """Context in which what the library has to say appears on stderr."""

    class Notices(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notice(command, redact(record.getMessage()))

    logger, handler = logging.getLogger("hf_warmstart"), Notices(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def console(stderr: bool = False) -> Console:
    """Where people read: as wide as the terminal, or `WIDTH` where there is none."""
    from rich.console import Console

    class Raises(Console):
        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704  what rich has caught: `main` has an exit code for it

    made = Raises(stderr=stderr, highlight=False)
    return made if made.is_terminal else Raises(stderr=stderr, highlight=False, width=max(made.width, WIDTH))


def new_table(**options: Any) -> Table:
    """A table as all commands show them; options are those of `rich.table.Table`."""
    from rich.table import Table

    return Table(**{"box": None, "padding": (0, 2), "header_style": "dim", **options})


def escape(text: str) -> str:
    """A text whose brackets are no markup."""
    from rich import markup

    return markup.escape(text)
