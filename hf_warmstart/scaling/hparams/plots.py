"""Plots of laws: losses, learning rates and batches over compute, with the budgets' optima, intervals and one run's point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..fits.laws import interval
from .fitted import FittedLaws

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .recommendation import HparamRecommendation

POINTS = 60
LABELS = {
    "loss": "held-out loss, nats per token",
    "learning_rate": "peak learning rate",
    "batch_tokens": "batch, tokens",
}
LAW, DATA, RUN = "#1f5fa8", "#444444", "#c8441b"


def plot_laws(laws: FittedLaws) -> Figure:
    """Laws with their data; of a preset, over its range."""
    return _figure(laws, None)


def plot_recommendation(found: HparamRecommendation, laws: FittedLaws) -> Figure:
    """The same, with the run's point on each."""
    return _figure(laws, found)


def _figure(laws: FittedLaws, found: HparamRecommendation | None) -> Figure:
    from matplotlib.figure import Figure

    panels = [n for n in ("loss", "learning_rate", "batch_tokens") if _law(laws, n) is not None]
    figure = Figure(figsize=(4.6 * len(panels), 3.9), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    compute = np.geomspace(*_span(laws, found), POINTS)
    for axis, name in zip(axes, panels, strict=True):
        _draw(axis, laws, name, compute, found)
    if not any(axis.lines for axis in axes):
        axes[0].text(
            0.5, 0.5, "a law of something else than size and compute", ha="center", transform=axes[0].transAxes
        )
    handles, labels = axes[-1].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(
        laws.name if found is None else f"{laws.name}: {found.params:.3g} parameters, {found.tokens:.3g} new tokens",
        fontsize=11,
    )
    return figure


def _law(laws: FittedLaws, name: str) -> Any:
    if name == "loss":
        return laws.loss_params_tokens if laws.form == "params_tokens" and laws.loss_params_tokens else laws.loss
    return getattr(laws, name)


def _span(laws: FittedLaws, found: HparamRecommendation | None) -> tuple[float, float]:
    """Compute from the smallest to the largest of the data's and the run's."""
    ends = list(laws.range.get("compute", ()))
    if not ends and {"params", "tokens"} <= set(laws.range):
        ends = [6 * n * d for n, d in zip(laws.range["params"], laws.range["tokens"], strict=True)]
    if not ends and "params" in laws.range:
        ends = [120 * n * n for n in laws.range["params"]]
    if found is not None:
        ends += [found.total_compute]
        ends += [found.equivalent_compute] if found.equivalent_compute > 0 else []
    ends = ends or [1e17, 1e21]
    return min(ends) / 2, max(ends) * 2


def _draw(axis: Any, laws: FittedLaws, name: str, compute: Any, found: HparamRecommendation | None) -> None:
    law = _law(laws, name)
    params = found.params if found is not None else np.sqrt(compute / 120)
    at = {"compute": compute, "params": params + 0 * compute, "tokens": compute / (6 * params)}
    names = law.variables if name == "loss" else tuple(law.exponents)
    axis.set(xscale="log", yscale="linear" if name == "loss" else "log", xlabel="compute, FLOPs", ylabel=LABELS[name])
    axis.grid(alpha=0.25, which="major")
    axis.spines[["top", "right"]].set_visible(False)
    if set(names) <= set(at) and not hasattr(law, "intercept"):
        axis.plot(compute, law(**at) + 0 * compute, color=LAW, label="law")
        if law.draws is not None:
            bands = np.array([interval(law.at_draws(**{k: v[i] for k, v in at.items()})) for i in range(len(compute))])
            axis.fill_between(compute, *bands.T, color=LAW, alpha=0.18, linewidth=0, label="95 % interval")
    if laws.optima:
        x, y = ([o[key] for o in laws.optima] for key in ("compute", name))
        spread = [0.0 if name == "loss" else o[f"ln_{name}_sd"] for o in laws.optima]
        error = [
            np.array(y) * (1 - np.exp(-1.96 * np.array(spread))),
            np.array(y) * (np.exp(1.96 * np.array(spread)) - 1),
        ]
        axis.errorbar(x, y, yerr=error, fmt="o", ms=4, color=DATA, elinewidth=1, label="optimum of a budget")
    if low_high := laws.range.get("compute"):
        axis.axvspan(*low_high, color=DATA, alpha=0.05, linewidth=0)
    if found is not None:
        _mark(axis, name, found)


def _mark(axis: Any, name: str, found: HparamRecommendation) -> None:
    """The run's point: the checkpoint on the loss law, the settings at the total compute."""
    if name == "loss":
        if found.eval_loss is not None and found.equivalent_compute > 0:
            axis.plot([found.equivalent_compute], [found.eval_loss], "D", color=RUN, ms=7, zorder=5)
            axis.annotate(
                "checkpoint",
                (found.equivalent_compute, found.eval_loss),
                xytext=(7, 7),
                textcoords="offset points",
                fontsize=9,
            )
            axis.axvline(found.total_compute, color=RUN, ls=":", lw=1)
        return
    value = found.learning_rate if name == "learning_rate" else found.batch_tokens
    axis.plot([found.total_compute], [value], "D", color=RUN, ms=7, zorder=5, label="this run")
    if name in found.intervals:
        axis.plot([found.total_compute] * 2, found.intervals[name], color=RUN, lw=2, alpha=0.6)
    axis.annotate(
        f"{value:.3g}",
        (found.total_compute, value),
        xytext=(-6, 9),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
