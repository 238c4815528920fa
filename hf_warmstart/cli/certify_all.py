"""`hf-warmstart certify --all`: every type in worker processes, with progress, a summary and a document."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import WarmstartError
from ..growth import zoo
from ..growth.zoo import TypeResult
from . import architectures, coverage, workers
from .coverage import Count, figure
from .options import console, write_json

LIMIT = 300.0  # seconds for one type
STYLES = {"exact": "green", "post-norm": "cyan", "approximate": "yellow", "refused": "yellow", "not exact": "bold red"}


def run_all(options: argparse.Namespace) -> int:
    """Certify every type that is asked for; 0 where nothing that was planned as exact was measured otherwise."""
    jobs = options.jobs if options.jobs is not None else _cores()
    if jobs < 1:
        raise WarmstartError(f"--jobs {jobs} must be at least 1.")
    if options.output is not None and not options.output.parent.is_dir():
        raise WarmstartError(f"--output {options.output}: there is no folder {options.output.parent}.")
    if options.readme is not None:
        coverage.check_markers(options.readme)
    tasks = zoo.entries(_names(options.kind), _names(options.types))
    if options.dry_run:
        if options.json:
            write_json(
                {"types": [{"kind": kind, "type": name} for kind, name in tasks], "jobs": min(jobs, len(tasks))}
            )
        else:
            console().print(
                f"{len(tasks)} types by {min(jobs, len(tasks))} processes. Nothing was measured or written."
            )
        return 0
    rows = _measured(tasks, min(jobs, len(tasks)))
    command = _command(options)
    if options.output is not None:
        options.output.write_text(architectures.document(rows, command))
    if options.readme is not None:
        link = os.path.relpath(options.output, options.readme.parent) if options.output is not None else ""
        coverage.update_readme(options.readme, coverage.coverage_line(rows, link))
    if options.json:
        write_json(coverage.as_data(rows, command))
    else:
        _show_summary(rows, options.output)
    return 1 if coverage.not_exact(rows) else 0


def _measured(tasks: Sequence[tuple[str, str]], jobs: int) -> list[TypeResult]:
    """The rows of all tasks, in their order; progress is shown on stderr."""
    rows: dict[tuple[str, ...], TypeResult] = {}
    with _Watch(len(tasks)) as watch:
        for task, result in workers.results(zoo.certify_type, tasks, jobs, LIMIT, watch.started):
            if isinstance(result, workers.Lost):
                kind, name = task
                row = TypeResult(kind, name, zoo.class_name(kind, name))
                result = zoo.refused_row(row, result.reason, result.seconds)
            rows[task] = result
            watch.finished(result)
    return [rows[task] for task in tasks]


class _Watch:
    """Progress on stderr: a bar with counts and what runs now in a terminal, else one line for each type."""

    def __init__(self, total: int) -> None:
        self.out: Console = console(stderr=True)
        self.total, self.done = total, 0
        self.counts: Counter[str] = Counter()
        self.running: list[str] = []
        self.bar = Progress(
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.out,
            disable=not self.out.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=total)

    def __enter__(self) -> _Watch:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def started(self, task: tuple[str, ...]) -> None:
        self.running.append(task[1])
        self._describe()

    def finished(self, row: TypeResult) -> None:
        """Count a row, and show it where there is no bar or something is wrong."""
        self.running.remove(row.model_type)
        self.done += 1
        statuses = [result.status.value for result in row.results] or ["cannot be built"]
        self.counts.update(statuses)
        if not self.out.is_terminal or "not exact" in statuses:
            words = "  ".join(f"[{STYLES.get(s, 'dim')}]{s:<9}[/]" for s in statuses)
            self.out.print(
                f"{self.done:>4}/{self.total}  {escape(row.model_type):<28} {words}  {row.seconds:.1f} s",
                soft_wrap=True,
            )
        self.bar.advance(self.task)
        self._describe()

    def _describe(self) -> None:
        found = " ".join(
            f"[{style}]{self.counts[status]} {status}[/]" for status, style in STYLES.items() if self.counts[status]
        )
        self.bar.update(
            self.task, description=f"growths: {found or 'none yet'}  [dim]{escape(', '.join(self.running))}[/]"
        )


def _show_summary(rows: Sequence[TypeResult], output: Path | None) -> None:
    """The counts for people, then what is wrong."""
    out = console()
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("growth", no_wrap=True)
    for name in ("types", "exact", "error", "post-norm", "error", "approx.", "refused", "not exact", "can't build"):
        table.add_column(name, justify="right", no_wrap=True)
    kind = ""
    for count in coverage.counts(rows):
        if count.kind != kind:
            kind = count.kind
            table.add_row(f"[bold]{kind}[/]")
        table.add_row(*_cells(count))
    out.print(table)
    if held_out := coverage.held_out_figure(rows):
        out.print(f"\n{escape(str(held_out))}")
    unexpected = [row.model_type for row in rows if any(result.unexpected for result in row.results)]
    if unexpected:
        out.print(f"\n[yellow]Refused by an error that says nothing to a user[/]: {escape(', '.join(unexpected))}")
    for line in coverage.not_exact(rows):
        out.print(f"[bold red]NOT EXACT[/] {escape(line)}")
    if output is not None:
        out.print(f"\nEvery type and reason: {escape(str(output))}", soft_wrap=True)


def _cells(count: Count) -> list[str]:
    def shown(number: int, style: str = "") -> str:
        return f"[{style}]{number}[/]" if number and style else str(number) if number else "[dim]0[/]"

    return [
        f"  {count.growth}",
        str(count.types),
        shown(count.exact, "green"),
        figure(count.exact_error) if count.exact else "",
        shown(count.post_norm, "cyan"),
        figure(count.post_norm_error) if count.post_norm else "",
        shown(count.approximate, "yellow"),
        shown(count.refused, "yellow"),
        shown(count.not_exact, "bold red"),
        shown(count.cannot_build),
    ]


def _command(options: argparse.Namespace) -> str:
    """The command, as it is typed."""
    words = ["hf-warmstart", "certify", "--all"]
    for name in ("kind", "types", "output"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
