"""`hf-warmstart advise`: when and how much to grow."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WarmstartError
from .options import console, write_json

if TYPE_CHECKING:
    from ..scaling.growing.advise import GrowthAdvice

UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "advise", help="when and how much to grow: factor, bound, speed-up, or scratch after all"
    )
    parser.add_argument("--params", metavar="N", help="parameters of the target: 134.6M, 7B")
    parser.add_argument("--tokens", metavar="D", required=True, help="tokens that it will be trained on: 2.7B")
    base = parser.add_argument_group("the base, by one of")
    base.add_argument("--checkpoint", metavar="SOURCE", help="a folder or Hub id: size and tokens are read off it")
    base.add_argument("--base-params", metavar="N", help="its parameters")
    base.add_argument(
        "--base",
        action="append",
        metavar="[NAME=]N",
        help="one of several to choose from: a size, a folder or a Hub id",
    )
    parser.add_argument("--base-tokens", metavar="D", help="tokens that the base has seen")
    parser.add_argument(
        "--count-base-cost", action="store_true", help="advise as if the base were trained for this purpose"
    )
    laws = parser.add_argument_group("the laws")
    laws.add_argument("--runs", metavar="FILE", help="a table of runs to fit them to, instead of published ones")
    laws.add_argument("--method", metavar="NAME", help="how the target is grown, as the runs name it")
    parser.add_argument("--json", action="store_true", help="write JSON to stdout")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the advice; 0."""
    from ..scaling.growing.advise import advise_growth

    numbers, problems = {}, []
    for name in ("params", "tokens", "base_params", "base_tokens"):
        text = getattr(options, name)
        try:
            numbers[name] = None if text is None else amount(text)
        except WarmstartError as fault:
            problems.append(f"--{name.replace('_', '-')} {fault}")
    family, more = _family(options.base)
    if problems + more:
        raise WarmstartError("; ".join(problems + more) + ".")
    advice = advise_growth(
        numbers["params"],
        numbers["tokens"] or math.nan,
        base_tokens=numbers["base_tokens"],
        laws=options.runs,
        base_params=numbers["base_params"],
        checkpoint=options.checkpoint,
        family=family,
        method=options.method,
        count_base_cost=options.count_base_cost,
    )
    if options.json:
        write_json(advice.to_dict())
    else:
        show(advice)
    return 0


def show(advice: GrowthAdvice) -> None:
    """The advice as a table."""
    console().print(str(advice), soft_wrap=True, markup=False)


def amount(text: str) -> float:
    """A number with a unit, `134.6M`, `2.7e9`, `20B`.

    Raises:
        WarmstartError: it is none.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([KMBT]?)\s*", text.upper())
    try:
        return float(found[1]) * UNITS[found[2]] if found else float(text)
    except ValueError:
        raise WarmstartError(f"{text!r} is no number; pass one such as 134.6M or 2.7e9") from None


def _family(given: list[str] | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Bases by name: sizes, or folders and Hub ids as they stand; and what was wrong."""
    if not given:
        return None, []
    made: dict[str, Any] = {}
    problems = []
    for text in given:
        name, equals, value = text.partition("=")
        name, value = (name, value) if equals else (text, text)
        try:
            made[name] = amount(value)
        except WarmstartError:
            if "/" not in value and not Path(value).is_dir():
                problems.append(f"--base {text!r} is neither a size such as 67M nor a folder or Hub id")
            made[name] = value
    return made, problems
