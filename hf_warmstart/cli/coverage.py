"""What the rows of `certify --all` come to: counts by kind and growth, and the figure on types that nobody chose."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import WarmstartError
from ..growth.zoo import KINDS, SUITE, Status, TypeResult, entries
from ..growth.zoo import held_out as held_out_types
from ..version import __version__

BEGIN, END = "<!-- coverage:begin -->", "<!-- coverage:end -->"


@dataclass(frozen=True)
class Count:
    """The types of one kind under one growth.

    Args:
        types: all of them; those that `cannot_build` are in no other count.
        exact_error, post_norm_error: the largest relative or pull-back error among them.
        unexpected: how many of the refused met an error that is no `WarmstartError`, or ran out of time.
    """

    kind: str
    growth: str
    types: int
    exact: int
    exact_error: float
    post_norm: int
    post_norm_error: float
    approximate: int
    refused: int
    unexpected: int
    not_exact: int
    cannot_build: int

    @property
    def built(self) -> int:
        """How many can be built."""
        return self.types - self.cannot_build


@dataclass(frozen=True)
class HeldOut:
    """The held-out types that were run, in width 2.

    Args:
        types: how many were run, of how many there are. exact: exact with nothing declared by hand: the untuned figure.
        exact_declared: exact with something declared. others: the status of each other one.
    """

    types: tuple[int, int]
    exact: tuple[str, ...]
    exact_declared: dict[str, tuple[str, ...]]
    others: dict[str, str]

    def __str__(self) -> str:
        run, there_are = self.types
        text = f"{len(self.exact)} of {run} held-out types are exact in width 2 with nothing declared"
        if run != there_are:
            text += f" ({run} of the {there_are} were run)"
        if self.exact_declared:
            text += f"; exact with an entry in probes.json: {', '.join(self.exact_declared)}"
        if self.others:
            text += "; " + ", ".join(f"{name}: {what}" for name, what in self.others.items())
        return text + "."


def figure(error: float | None) -> str:
    """An error to one digit."""
    return "0" if error == 0 else f"{error:.0e}"


def counts(rows: Sequence[TypeResult]) -> list[Count]:
    """The counts of every kind that was run, under every growth."""
    return [
        _count(kind, growth.name, of_kind)
        for kind in KINDS
        if (of_kind := [row for row in rows if row.kind == kind])
        for growth in SUITE
    ]


def _count(kind: str, growth: str, rows: Sequence[TypeResult]) -> Count:
    results = [result for row in rows if (result := row.result(growth)) is not None]
    by = {status: [result for result in results if result.status is status] for status in Status}

    def largest(status: Status) -> float:
        return max((max(r.relative_error or 0.0, r.pullback_error or 0.0) for r in by[status]), default=0.0)

    return Count(
        kind,
        growth,
        len(rows),
        len(by[Status.EXACT]),
        largest(Status.EXACT),
        len(by[Status.POST_NORM]),
        largest(Status.POST_NORM),
        len(by[Status.APPROXIMATE]),
        len(by[Status.REFUSED]),
        sum(result.unexpected for result in results),
        len(by[Status.NOT_EXACT]),
        sum(bool(row.cannot_build) for row in rows),
    )


def held_out_figure(rows: Sequence[TypeResult]) -> HeldOut | None:
    """The figure on the held-out types; None where none was run."""
    known = {row.model_type: row for row in rows if row.kind == "causal-lm"}
    chosen = held_out_types()
    run = [known[name] for name in chosen if name in known]
    if not run:
        return None
    statuses = {row.model_type: _status(row) for row in run}
    exact = [row for row in run if statuses[row.model_type] == Status.EXACT.value]
    return HeldOut(
        (len(run), len(chosen)),
        tuple(row.model_type for row in exact if not row.declared),
        {row.model_type: row.declared for row in exact if row.declared},
        {name: status for name, status in statuses.items() if status != Status.EXACT.value},
    )


def _status(row: TypeResult) -> str:
    result = row.result(SUITE[0].name)
    return result.status.value if result is not None else "cannot be built"


def not_exact(rows: Sequence[TypeResult]) -> list[str]:
    """What was planned as exact and measured otherwise, one line each."""
    return [
        f"{row.kind} {row.model_type}, {result.growth}: {result.reason}"
        for row in rows
        for result in row.results
        if result.status is Status.NOT_EXACT
    ]


def versions() -> dict[str, str]:
    """The versions that the figures depend on."""
    return {"hf_warmstart": __version__, "transformers": transformers.__version__, "torch": torch.__version__}


def as_data(rows: Sequence[TypeResult], command: str) -> dict[str, Any]:
    """Everything, as plain data."""
    held_out = held_out_figure(rows)
    return {
        "command": command,
        "versions": versions(),
        "summary": [dataclasses.asdict(count) for count in counts(rows)],
        "held_out": dataclasses.asdict(held_out) if held_out else None,
        "not_exact": not_exact(rows),
        "rows": [row.to_dict() for row in rows],
    }


def coverage_line(rows: Sequence[TypeResult], link: str = "") -> str:
    """The README's figure: what is exact of what runs, kind by kind, as a small table."""
    found = {(count.kind, count.growth): count for count in counts(rows)}
    names = [growth.name for growth in SUITE]
    kinds = [kind for kind in KINDS if (kind, names[0]) in found]
    lines = [
        f"Types of transformers {transformers.__version__}, default configs; exact in float64, of those that run:",
        "",
        f"| kind | types that run | {' | '.join(names)} | {names[-1]}, up to a norm's eps |",
        "|---|--:|" + "--:|" * (len(names) + 1),
    ]
    for kind in kinds:
        row = [found[kind, name] for name in names]
        missing = len(entries([kind])) - row[0].types
        note = f" ({missing} not asked)" if missing else ""
        figures = " | ".join(str(count.exact) for count in row)
        lines.append(f"| {kind} | {row[0].built}{note} | {figures} | {row[-1].post_norm} |")
    wrong = len(not_exact(rows))
    outcome = f"{wrong}; `grow` raises there" if wrong else "none"
    where = f" ([every type]({link}))" if link else ""
    lines += [
        "",
        f"All others are refused with the reason. Growths planned as exact and measured otherwise: {outcome}. Measured by "
        f"`hf-warmstart certify --all`{where}.",
    ]
    return "\n".join(lines)


def check_markers(readme: Path) -> str:
    """The text of a README that has the markers once and in order.

    Raises:
        WarmstartError: there is no such file, or no such place in it.
    """
    if not readme.is_file():
        raise WarmstartError(f"--readme {readme}: there is no such file.")
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise WarmstartError(f"--readme {readme}: needs {BEGIN} and {END} around the figure, once each.")
    return text


def update_readme(readme: Path, line: str) -> None:
    """Put a line between the markers of a README; the space around it stays as it is."""
    pattern = re.compile(rf"({BEGIN}\s*)(.*?)(\s*{END})", re.DOTALL)
    readme.write_text(pattern.sub(lambda match: match[1] + line + match[3], check_markers(readme)))
