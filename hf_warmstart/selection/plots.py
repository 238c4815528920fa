"""A selection's plots: curves of evaluation loss, rank over lag, and cheap metrics against the outcome."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import SelectionReport

SHOWN = ("kl", "kl@", "loss@", "drift_parameters@", "escape@", "loss_change")


def draw(report: SelectionReport, path: str | os.PathLike) -> None:
    """Draw a report into a PNG; no window, no global state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    curves, ranks, metrics = figure.subplots(1, 3)
    names = [row["candidate"] for row in report.table if report.curves.get(row["candidate"])]
    colours = {name: f"C{number % 10}" for number, name in enumerate(names)}
    styles = {name: ("-", "--", ":")[number // 10 % 3] for number, name in enumerate(names)}
    for name in names:
        for number, rows in enumerate(report.curves[name]):
            steps, losses = [row[0] for row in rows], [row[1] for row in rows]
            width = 2.0 if name == report.best else 1.0
            curves.plot(steps, losses, styles[name], color=colours[name], lw=width, label=None if number else name)
    curves.set(
        xlabel="steps", ylabel="evaluation loss, nats per token", title=f"continuations, {report.settings['regime']}"
    )
    _zoom(curves, [rows for name in names for rows in report.curves[name]])
    curves.legend(fontsize=7)
    _draw_ranks(ranks, report, names, colours, styles)
    _draw_metrics(metrics, report)
    figure.savefig(os.fspath(path), dpi=110, metadata={"Software": None})


def _zoom(axes: Any, curves: Sequence[Sequence[Sequence[float]]]) -> None:
    """Show what is near the best: a candidate that starts far off would flatten all others."""
    ends = sorted(rows[-1][1] for rows in curves if rows)
    if len(ends) > 2:
        low, middle = ends[0], ends[len(ends) // 2]
        axes.set_ylim(low - 0.3 * max(middle - low, 1e-3), middle + 3 * max(middle - low, 1e-3))


def _draw_ranks(axes: Any, report: SelectionReport, names: list[str], colours: dict, styles: dict) -> None:
    """The rank of each candidate by its evaluation loss, at each step of the first repeat."""
    by_step: dict[int, dict[str, float]] = {}
    for name in names:
        for step, loss in report.curves[name][0]:
            if loss is not None:
                by_step.setdefault(int(step), {})[name] = loss
    for name in names:
        steps = [step for step in sorted(by_step) if name in by_step[step]]
        places = [1 + sum(loss < by_step[step][name] for loss in by_step[step].values()) for step in steps]
        axes.plot(steps, places, styles[name], color=colours[name], marker=".", lw=1)
    axes.invert_yaxis()
    axes.set(xlabel="lag, steps", ylabel="rank", title="rank over lag, first repeat")


def _draw_metrics(axes: Any, report: SelectionReport) -> None:
    """Each cheap metric's rank against the rank of the outcome, of candidates that were continued."""
    rows = [row for row in report.table if row["loss"] is not None and row["rank"] is not None]
    keys = sorted({key for row in rows for key in row["metrics"] if key in SHOWN or key.startswith(SHOWN[1:5])})
    for number, key in enumerate(keys):
        known = [row for row in rows if key in row["metrics"]]
        order = sorted(known, key=lambda row: row["metrics"][key])
        places = [1 + order.index(row) for row in known]
        axes.plot(
            range(1, len(known) + 1), places, "o", ms=3 + number % 3, color=f"C{number % 10}", alpha=0.6, label=key
        )
    axes.set(xlabel="rank of the outcome", ylabel="rank by the metric, least first", title="metric against outcome")
    if keys:
        axes.legend(fontsize=6, ncols=2)
