"""A selection's report in Markdown: for its folder, and for the card of the grown model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import SelectionReport

MOST_METRICS = 12


def markdown(report: SelectionReport, heading: str) -> str:
    """The whole report."""
    return "\n\n".join([heading, *_parts(report)])


def _parts(report: SelectionReport) -> Iterator[str]:
    settings = report.settings
    yield (
        f"**{report.best}**, of {len(report.table)} candidates, under the regime `{settings['regime']}` "
        f"(shuffled data: {'yes' if settings['shuffle'] else 'no'}; dropout: {settings['dropout']:g}). {_margin(report)}"
    )
    length = f"continuations of {settings['continuation_steps']} steps"
    if settings["objective"] == "extrapolated":
        length = f"a race to step {settings['steps'][report.best]}"
    yield (
        f"Probes of {settings['probe_steps'][-1]} steps for all, {length} for survivors, at equal {settings['match']}, "
        f"under the {settings.get('schedule', 'planned')} schedule, ranked by `{settings['objective']}`; stopped since "
        f"{settings['stopped']}. Cost: {settings['spent_flops']:.3g} FLOPs, "
        f"{report.cost_fraction:.2%} of the planned run of {settings['planned_steps']} steps."
    )
    yield from report.notes
    yield "\n".join(_table(report))
    yield "Losses in nats per token, means over repeats; *behind* is paired within repeats."
    if report.unsure:
        yield "Not settled:"
        yield "\n".join(f"- {line}" for line in report.unsure)
    if out := [row for row in report.table if row["stage"] == "out"]:
        yield "Out:"
        yield "\n".join(f"- {row['candidate']}: {_safe(row['reason'])}" for row in out)
    for regime, metrics in report.agreement.items():
        if metrics:
            yield f"Agreement of cheap metrics with this ranking (`{regime}`, continued candidates; escape counts as good):"
            yield "\n".join(_agreement(metrics))


def _margin(report: SelectionReport) -> str:
    found = report.margin
    if found["candidate"] is None:
        raced = report.settings["objective"] == "extrapolated" and report.table[0]["repeats"]
        return "All others were left behind." if raced else "Chosen by the probe alone."
    reach = "no interval after one repeat"
    if found["low"] is not None:
        reach = f"{report.settings['level']:.0%} interval {found['low']:+.4f} to {found['high']:+.4f}"
    verdict = "clear" if found["clear"] else "not clear"
    return (
        f"Ahead of {found['candidate']} by {found['mean']:.4f} nats ({reach}, {found['repeats']} repeats): {verdict}."
    )


def _table(report: SelectionReport) -> Iterator[str]:
    yield "| | candidate | stage | repeats | loss | behind | interval | auc | probe loss | parameters |"
    yield "|--:|---|---|--:|--:|--:|---|--:|--:|--:|"
    for row in report.table:
        reach = "" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
        behind = "" if row["behind"] is None else f"{row['behind']:+.4f}"
        cells: list[Any] = [
            row["rank"] or "",
            row["candidate"],
            row["stage"],
            row["repeats"] or "",
            _number(row["loss"]),
            behind,
        ]
        cells += [reach, _number(row["auc"]), _number(row["probe_loss"])]
        cells.append("" if row["parameters"] is None else f"{row['parameters']:,}")
        yield "| " + " | ".join(map(str, cells)) + " |"


def _agreement(metrics: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "| metric | Spearman | best is the choice | candidates |"
    yield "|---|--:|---|--:|"
    known = {name: row for name, row in metrics.items() if row["spearman"] is not None}
    for name in sorted(known, key=lambda name: (-known[name]["spearman"], name))[:MOST_METRICS]:
        row = metrics[name]
        top = {True: "yes", False: "no", None: "several are best"}[row["top_1"]]
        yield f"| `{name}` | {row['spearman']:+.2f} | {top} | {row['candidates']} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _safe(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
