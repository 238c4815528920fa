"""Charts as SVG that lies in the page: drawn by matplotlib, text as text, width given by the page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]
# Dark enough on white for small text and thin lines (contrast above 4.5).
COLOURS = ("#1f5fa8", "#b0371b", "#24703a", "#6a3d9a", "#7a5a00", "#444444", "#a0195e", "#006b6b")


def lines(
    series: Mapping[str, Points], *, x: str, y: str, title: str, log: bool = False, from_zero: bool = False
) -> str:
    """Lines over a common axis of whole numbers; marks where a line has few points."""
    from matplotlib.ticker import MaxNLocator

    figure, axis = _figure(title)
    for number, (name, points) in enumerate(series.items()):
        xs, ys = zip(*points, strict=True)
        style = "o-" if len(points) < 30 else "-"
        axis.plot(xs, ys, style, ms=3.5, lw=1.4, color=COLOURS[number % len(COLOURS)], label=name)
    axis.set(xlabel=x, ylabel=y)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    if from_zero:
        axis.set_ylim(bottom=0)
    if log and all(value > 0 for points in series.values() for _, value in points):
        axis.set_yscale("log")
    return _svg(figure, axis, title, len(series) > 1)


def bars(groups: Mapping[str, Mapping[str, float]], *, x: str, title: str) -> str:
    """Horizontal bars: a place for each name, a bar in it for each group."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    figure, axis = _figure(title, height=1.0 + 0.28 * len(names) * max(1, len(groups)) ** 0.5)
    height = 0.8 / max(1, len(groups))
    for number, (group, values) in enumerate(groups.items()):
        places = [at + number * height for at, name in enumerate(names) if name in values]
        axis.barh(places, [values[n] for n in names if n in values], height, color=COLOURS[number], label=group)
    axis.set(xlabel=x, yticks=[at + 0.4 - height / 2 for at in range(len(names))], yticklabels=names)
    axis.invert_yaxis()
    return _svg(figure, axis, title, len(groups) > 1)


def _figure(title: str, height: float = 2.8):
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, height), layout="constrained")
    FigureCanvasSVG(figure)
    axis = figure.subplots()
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return figure, axis


def _svg(figure, axis, title: str, legend: bool) -> str:
    from matplotlib import rc_context

    if legend:
        axis.legend(frameon=False, fontsize=9)
    written = io.StringIO()
    # A fixed salt gives the same names inside the file for the same picture.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    text = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest  # the page sets the width, viewBox the shape
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # Several pictures share one page, and so their names.
    salt = re.sub(r"\W+", "-", title)
    text = re.sub(r'\bid="', f'id="{salt}-', text)
    text = re.sub(r"url\(#", f"url(#{salt}-", text)
    text = re.sub(r'xlink:href="#', f'xlink:href="#{salt}-', text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title, quote=True)}" ', 1)
