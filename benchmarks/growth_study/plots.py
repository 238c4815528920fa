"""Plots of a study: loss over growth factor at equal FLOPs, and loss over tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf_warmstart.scaling.growing.gain_law import GainLaw

from .jobs import GROWN, SCRATCH, TRANSFERRED
from .table import Cell, Interval

COLOURS = ("#1f5fa8", "#c8441b", "#3b8a3e", "#7a4fa3", "#a87f1f", "#444444", "#b03070", "#2aa0a0")


def best_scratch(runs: pd.DataFrame, target: str) -> pd.DataFrame:
    """The better run from scratch of each seed (rows) and budget (columns)."""
    own = runs[runs["kind"].isin([SCRATCH, TRANSFERRED]) & (runs["target"] == target)].dropna(subset="loss")
    return own.groupby(["seed", "rung"])["loss"].min().unstack("rung")


def plot_isoflops(
    runs: pd.DataFrame, cells: Sequence[Cell], laws: Mapping[str, GainLaw | None], targets: Sequence[str], path: Path
) -> None:
    """Loss over growth factor, a line for each budget of a target: its FLOPs are the same at every g, the base's left out.

    Args:
        runs, cells: of the study. laws: of the methods that are drawn; of one without, only points are. path: of the picture.
    """
    from matplotlib.figure import Figure

    panels = [(t, m) for t in targets for m in laws if any(c.target == t and c.method == m for c in cells)]
    if not panels:
        return
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (target, method) in zip(axes, panels, strict=False):
        _isoflops(axis, runs, [c for c in cells if c.target == target and c.method == method], laws[method], target)
        axis.set_title(f"{target}: {method}", fontsize=10)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=120)


def _isoflops(axis: Any, runs: pd.DataFrame, cells: Sequence[Cell], law: GainLaw | None, target: str) -> None:
    scratch = best_scratch(runs, target)
    for colour, rung in zip(COLOURS, sorted({cell.rung for cell in cells}), strict=False):
        own = sorted((c for c in cells if c.rung == rung and c.ratios), key=lambda c: c.growth_factor)
        if rung not in scratch or not own:
            continue
        level = float(scratch[rung].mean())
        curve = np.geomspace(1, own[-1].growth_factor * 1.1, 50)
        if law is not None:
            axis.plot(curve, [level * math.exp(law.log_ratio(g, own[0].each)) for g in curve], color=colour, lw=1)
        axis.plot([1], [level], "s", color=colour, ms=5, label=f"{own[0].each:.3g} tokens per parameter")
        for cell in own:
            made = Interval.of(cell.ratios.values()).map(lambda x, level=level: level * math.exp(x))
            ends = (made.mean if made.low is None else made.low, made.mean if made.high is None else made.high)
            error = [[made.mean - ends[0]], [ends[1] - made.mean]]
            beside = cell.growth_factor * (
                1 + 0.02 * (COLOURS.index(colour) - 1)
            )  # so that intervals can be told apart
            axis.errorbar([beside], [made.mean], yerr=error, fmt="o", ms=4, color=colour, capsize=2)
    axis.set(xscale="log", xlabel="growth factor g (1: scratch)", ylabel="held-out loss, nats per token")
    axis.set_xticks([1, 2, 4], ["1", "2", "4"])
    axis.minorticks_off()
    _finish(axis)


def plot_ladders(runs: pd.DataFrame, cells: Sequence[Cell], target: str, scale: float, path: Path) -> None:
    """Loss over tokens per parameter since the growth: scratch, and every arm that was run to the last budget.

    Args:
        scale: what budgets were multiplied with, see `Study.scale`.
    """
    from matplotlib.figure import Figure

    scratch = best_scratch(runs, target)
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axis = figure.subplots()
    if len(scratch):
        axis.plot(scale * scratch.columns, scratch.mean(), "s-", color="black", lw=1.6, ms=5, label="scratch")
    last = max((cell.rung for cell in cells if cell.target == target), default=0)
    arms = [(c.base, c.method, c.growth_factor) for c in cells if c.target == target and c.rung == last]
    for number, (base, method, factor) in enumerate(arms):
        own = sorted(
            (c for c in cells if (c.target, c.base, c.method) == (target, base, method)), key=lambda c: c.rung
        )
        losses = [sum(c.losses.values()) / len(c.losses) for c in own]
        label = f"{method}, g = {factor:.2f}"
        axis.plot(
            [scale * c.rung for c in own], losses, "o-", color=COLOURS[number % len(COLOURS)], lw=1, ms=4, label=label
        )
    axis.set(xscale="log", xlabel="tokens per parameter since the growth", ylabel="held-out loss, nats per token")
    ticks = sorted({*scratch.columns, *runs.loc[runs["kind"] == GROWN, "rung"]})
    axis.set_xticks([scale * tick for tick in ticks], [f"{scale * tick:.3g}" for tick in ticks])
    axis.minorticks_off()
    _finish(axis)
    figure.savefig(path, dpi=120)


def _finish(axis: Any) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
