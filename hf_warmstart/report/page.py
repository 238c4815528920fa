"""`write_report`: the page of a run. It holds all that it shows; nothing is fetched by who opens it.

A section stands where the folder holds what it is about; what it does not hold is listed at the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import WarmstartError
from ..hub.facts import scalar_changes
from ..version import __version__
from .charts import bars, lines
from .contents import Contents, read_contents
from .measures import Measures, measure

TEMPLATE = Path(__file__).with_name("page.html.j2")
PAGE_NAME = "report.html"


@dataclass(frozen=True)
class Section:
    """A part of the page. words: sentences. chart: SVG. head, rows: a table."""

    name: str
    title: str
    words: Sequence[str] = ()
    chart: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def write_report(run: str | os.PathLike, output: str | os.PathLike | None = None, *, measured: bool = True) -> Path:
    """Write the page of a run.

    Args:
        run: the output_dir of a run, a checkpoint, or the folder of a grown model.
        output (*optional*): the file; `report.html` in the run's folder by default.
        measured (`bool`, defaults to `True`): load the checkpoints' weights, where they are below 1 GiB each, for spectrum,
            activations and escape.

    Returns:
        The file.

    Raises:
        WarmstartError: there is nothing to report, or the file cannot be written there. CheckpointError: a file is damaged.

    Example:

        >>> write_report("runs/grown")                                                            # doctest: +SKIP
        PosixPath('runs/grown/report.html')
    """
    contents = read_contents(Path(run))
    path = Path(output) if output is not None else contents.folder / PAGE_NAME
    if path.is_dir() or not path.parent.is_dir():
        raise WarmstartError(f"{str(path)!r} cannot be written: pass a file in a folder that is there.")
    text = render(contents, measure(contents) if measured else Measures(skipped=["Weights were not looked at."]))
    path.write_text(text, encoding="utf-8")
    return path


def render(contents: Contents, measures: Measures) -> str:
    """The page as text."""
    import jinja2

    sections = [section for section in _sections(contents, measures) if section is not None]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=contents.folder.resolve().name,
        summary=_summary(contents),
        sections=sections,
        missing=[*_missing(contents), *measures.skipped],
        version=__version__,
    )


def _summary(contents: Contents) -> list[str]:
    """The first sentences."""
    found = []
    if contents.records:
        record = contents.records[-1]
        before, after = record.parameters
        exact = "exact" if record.exact else "not exact"
        found.append(
            f"{contents.architecture or 'A model'} grown from {record.parent or 'a model without a name'}: {before:,} to "
            f"{after:,} parameters by {' and '.join(record.operators)}, {exact}."
        )
    elif contents.architecture:
        found.append(f"{contents.architecture}; it carries no record of a growth.")
    told = contents.story
    if told is not None:
        tokens = f", {told.tokens:,} tokens" if told.tokens else ""
        found.append(f"{told.steps:,} optimizer steps{tokens}.")
        if told.evaluations:
            found.append(
                f"Held-out loss {told.evaluations[0][1]:.4f} at first, {told.evaluations[-1][1]:.4f} at last, nats per token."
            )
    return found


def _sections(contents: Contents, measures: Measures) -> Iterator[Section | None]:
    yield from (_growth(contents), _curves(contents), _schedule(contents), _norms(contents))
    yield from (_spectrum(measures), _activations(measures), _escape(measures))
    yield from (_selection(contents), _recommendation(contents))


def _growth(contents: Contents) -> Section | None:
    if not contents.records:
        return None
    record = contents.records[-1]
    rows: list[tuple[str, ...]] = [(name, _cell(old), _cell(new)) for name, (old, new) in scalar_changes(record)]
    rows.append(("parameters", *(f"{count:,}" for count in record.parameters)))
    certificate = contents.facts.get("certificate") or {}
    words = [f"The last of {len(contents.records)} growths."] if len(contents.records) > 1 else []
    if certificate:
        words.append(
            f"Certificate: {'exact' if certificate.get('exact') else 'not exact'}, {certificate.get('reason')}; on a twin in "
            f"float64 logits differ by {_cell(certificate.get('max_relative_error'))} of the largest, pulled-back gradients by "
            f"{_cell(certificate.get('max_pullback_error'))}."
        )
    return Section("growth", "Growth", words, head=("config", "parent", "grown"), rows=rows)


def _curves(contents: Contents) -> Section | None:
    told = contents.story
    series = {} if told is None else {"training": told.losses, "held out": told.evaluations}
    series = {name: points for name, points in series.items() if points}
    if told is None or not series:
        return None
    chart = lines(series, x="optimizer step", y="loss, nats per token", title="Loss over steps")
    return Section(
        "curves",
        "Curves",
        chart=chart,
        head=("step", "held-out loss"),
        rows=[(f"{s}", f"{v:.4f}") for s, v in told.rows],
    )


def _schedule(contents: Contents) -> Section | None:
    told = contents.story
    if told is None or not told.rates:
        return None
    start = contents.start
    words = []
    if start.get("schedule_policy"):
        words.append(
            f"Schedule policy {start['schedule_policy']}: it began at step {start.get('schedule_start', 0)} of its schedule."
        )
    chart = lines(
        {"learning rate": told.rates},
        x="optimizer step",
        y="learning rate",
        title="Learning rate over steps",
        from_zero=True,
    )
    ends = [
        ("first", told.rates[0]),
        ("highest", max(told.rates, key=lambda point: point[1])),
        ("last", told.rates[-1]),
    ]
    rows = [(name, f"{step}", f"{rate:.3g}") for name, (step, rate) in ends]
    return Section("schedule", "Schedule", words, chart, ("", "step", "learning rate"), rows)


def _norms(contents: Contents) -> Section | None:
    told = contents.story
    if told is None or len(told.norms) < 2:
        return None
    chart = lines(
        {"norm": told.norms}, x="optimizer step", y="gradient norm", title="Gradient norm over steps", log=True
    )
    return Section("norms", "Gradient norm", chart=chart)


def _spectrum(measures: Measures) -> Section | None:
    if not measures.spectrum:
        return None
    words = [
        "Effective rank of the matrices of each kind (exp of the entropy of their normalised singular values) over the "
        "largest that they could have. Copies that are still alike keep it low."
    ]
    chart = bars(measures.spectrum, x="effective rank, share of the full rank", title="Spectrum of the weights")
    names = list(dict.fromkeys(name for values in measures.spectrum.values() for name in values))
    rows = [
        (name, *(f"{values[name]:.3f}" if name in values else "" for values in measures.spectrum.values()))
        for name in names
    ]
    return Section("spectrum", "Spectrum", words, chart, ("matrices", *measures.spectrum), rows)


def _activations(measures: Measures) -> Section | None:
    if not measures.activations:
        return None
    words = [
        "Root mean square of the embeddings (0) and of each layer's output, the last after the final norm, on random tokens."
    ]
    series = {name: list(enumerate(values)) for name, values in measures.activations.items()}
    ends = dict([next(iter(series.items())), list(series.items())[-1]])
    chart = lines(ends, x="layer", y="root mean square", title="Scale of activations")
    rows = [(name, *(f"{value:.3g}" for value in values)) for name, values in measures.activations.items()]
    width = max(len(values) for values in measures.activations.values())
    return Section(
        "activations", "Activation scale", words, chart, ("checkpoint", *(str(k) for k in range(width))), rows
    )


def _escape(measures: Measures) -> Section | None:
    if not measures.escape:
        return None
    words = [
        "How far the weights have left what equal copies of the parent's can express, as share of their norm; 0 for copies."
    ]
    chart = ""  # one number is no line
    if len(measures.escape) > 1:
        series = {"escape": list(enumerate(measures.escape.values(), 1))}
        title = "Escape from the cloned subspace"
        chart = lines(series, x="checkpoint, in order", y="|w - P w| / |w|", title=title, from_zero=True)
    rows = [(name, f"{value:.4g}") for name, value in measures.escape.items()]
    return Section("escape", "Escape", words, chart, ("checkpoint", "escape"), rows)


def _selection(contents: Contents) -> Section | None:
    report = contents.selection
    if report is None:
        return None
    words = [f"Chosen: {report.best}, for {report.cost_fraction:.1%} of the planned run's compute.", *report.unsure]
    curves = {name: [(row[0], row[1]) for row in runs[0]] for name, runs in report.curves.items() if runs and runs[0]}
    chart = (
        lines(curves, x="step", y="evaluation loss, nats per token", title="Continuations of the candidates")
        if curves
        else ""
    )
    rows = [
        (_cell(row.get("rank")), str(row["candidate"]), str(row.get("stage", "")), _cell(row.get("loss")))
        for row in report.table
    ]
    return Section("selection", "Choice of the start", words, chart, ("rank", "candidate", "stage", "loss"), rows)


def _recommendation(contents: Contents) -> Section | None:
    found = contents.recommendation
    if found is None:
        return None
    arguments = found.get("training_arguments") or {}
    rows = [(name, _cell(value)) for name, value in arguments.items() if not isinstance(value, dict)]
    words = [f"Law {found.get('law', 'not named')}.", *found.get("warnings", [])]
    return Section("recommendation", "Recommendation", words, head=("argument", "value"), rows=rows)


def _missing(contents: Contents) -> list[str]:
    found = []
    if contents.story is None:
        found.append("Curves and schedule: no trainer_state.json with a history.")
    if contents.selection is None:
        found.append("Choice of the start: no selection.json.")
    if contents.recommendation is None:
        found.append(
            "Recommendation: no recommendation.json (hf-warmstart recommend ... --json > recommendation.json)."
        )
    return found


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
