"""Coordinate check: how far activations move in the first steps, against the width that a model was grown to.

A learning rate that was tuned at one width holds at another where the size of an update to the activations does not depend
on the width. Adam moves every entry of a matrix by about its rate, so that with one rate for all a unit that reads k times
as many inputs moves k times as far; muP divides by k. The check grows one model to several widths, takes the same few steps
with each, and fits the slope of `ln(RMS(change) / RMS(before))` of the activations against `ln width`: near 0 where the rate
holds. The change is relative because some growths rescale a stream on purpose (a tied head's norm).

Source: the coordinate check of arXiv 2203.03466, there of fresh models, here of growths of one.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import WarmstartError
from ..growth.coordinates import transferred_groups
from ..growth.grow import grow, plan_growth
from .arguments import TRANSFERS


@dataclass(frozen=True)
class CoordinateCheck:
    """What a coordinate check measured.

    Args:
        widths: factors to which the model was widened. learning_rate_transfer: `"mup"`, or None for one rate for all.
        operator: how it was widened. steps: how many steps were taken.
        scale (`dict[str, list[float]]`): for each part (`embedding`, `layer 1`, ..., `final norm`, `logits`) the root mean
            square of its activations before the first step, at each width.
        change (`dict[str, list[float]]`): the root mean square of how far they moved over that, at each width.
    """

    widths: list[float]
    learning_rate_transfer: str | None
    operator: str
    steps: int
    scale: dict[str, list[float]]
    change: dict[str, list[float]]

    @property
    def slopes(self) -> dict[str, float]:
        """For each part the slope of `ln change` against `ln width`: near 0 where the rate holds."""
        x = np.log(self.widths)
        return {part: float(np.polyfit(x, np.log(values), 1)[0]) for part, values in self.change.items()}

    @property
    def steepest(self) -> float:
        """The slope that is farthest from 0."""
        return max(self.slopes.values(), key=abs)

    def __str__(self) -> str:
        transfer = self.learning_rate_transfer or "one rate"
        lines = [f"relative RMS change of activations after {self.steps} steps, {self.operator}, {transfer}"]
        lines += [f"{'width':>12}" + "".join(f"{width:>10.3g}" for width in self.widths) + f"{'slope':>10}"]
        for part, values in self.change.items():
            lines.append(f"{part:>12}" + "".join(f"{v:>10.3g}" for v in values) + f"{self.slopes[part]:>10.2f}")
        return "\n".join(lines)


def coordinate_check(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    *,
    learning_rate: float,
    widths: Sequence[float] = (1, 2, 4),
    learning_rate_transfer: str | None = "mup",
    betas: tuple[float, float] = (0.9, 0.95),
    **growth: Any,
) -> CoordinateCheck:
    """Grow a model to several widths and measure how far a few AdamW steps move its activations.

    Args:
        model: a model with hidden states; it is not changed.
        batches (`list[dict[str, Tensor]]`): one step is taken on each, `labels` included; activations are measured on the
            first.
        learning_rate (`float`): as tuned at the model's own width.
        widths: factors, in rising order; 1 is the model itself.
        learning_rate_transfer (`str`, *optional*): as in `WarmstartTrainingArguments`; None takes one rate for all.
        betas: of AdamW, which decays nothing here.
        **growth: fields of `GrowthConfig` but the width.

    Returns:
        `CoordinateCheck`; `print` shows it as a table, `plot_coordinate_checks` as a figure.

    Raises:
        WarmstartError: fewer than two widths, no batches, a transfer that does not exist; or what cannot be grown.
    """
    problems = []
    if len(set(widths)) < 2 or list(widths) != sorted(widths) or min(widths, default=0) < 1:
        problems.append(f"widths={list(widths)} must be at least two rising factors of 1 or more")
    if not batches:
        problems.append("batches is empty; pass at least one")
    if learning_rate_transfer not in (None, *TRANSFERS):
        problems.append(f"learning_rate_transfer={learning_rate_transfer!r} is none of {[None, *TRANSFERS]}")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        problems.append(f"learning_rate={learning_rate!r} must be positive")
    if problems:
        raise WarmstartError("; ".join(problems) + ".")
    for width in widths:  # all that may be wrong is so before anything is run
        if width != 1:
            plan_growth(model, width=width, **growth)
    scale: dict[str, list[float]] = {}
    change: dict[str, list[float]] = {}
    operator = ""
    for width in widths:
        grown = copy.deepcopy(model) if width == 1 else grow(model, width=width, **growth)
        optimizer = torch.optim.AdamW(grown.parameters(), lr=learning_rate, betas=betas, weight_decay=0.0)
        if width != 1:
            plan = plan_growth(model, width=width, **growth)
            operator = plan.operators[0]
            if learning_rate_transfer is not None:
                names = {id(parameter): name for name, parameter in grown.named_parameters()}
                optimizer.param_groups[:] = transferred_groups(optimizer, names, plan)
        before = _activations(grown, batches[0])
        _train(grown, optimizer, batches)
        for part, after in _activations(grown, batches[0]).items():
            scale.setdefault(part, []).append(_rms(before[part]))
            change.setdefault(part, []).append(_rms(after - before[part]) / scale[part][-1])
    return CoordinateCheck([float(w) for w in widths], learning_rate_transfer, operator, len(batches), scale, change)


def plot_coordinate_checks(checks: Sequence[CoordinateCheck], path: str | os.PathLike) -> None:
    """Draw checks side by side, change of activations against width, one line for each part, both axes logarithmic.

    Args:
        checks: from `coordinate_check`, such as one with and one without a transfer. path: of the image, by its ending.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(checks), 3.6), layout="constrained")
    axes = figure.subplots(1, len(checks), sharey=True, squeeze=False)[0]
    for axis, check in zip(axes, checks, strict=True):
        for part, values in check.change.items():
            axis.plot(check.widths, values, marker="o", label=part)
        axis.set(xscale="log", yscale="log", xlabel="width factor", xticks=check.widths)
        axis.set_xticklabels([f"{width:g}" for width in check.widths])
        axis.minorticks_off()
        axis.set_title(f"{check.operator}, {check.learning_rate_transfer or 'one rate'}")
    axes[0].set_ylabel(f"relative RMS change, {checks[0].steps} steps")
    axes[-1].legend(fontsize="small")
    figure.savefig(path)


def _train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batches: Sequence[dict[str, Tensor]]) -> None:
    """One step on each batch, without dropout."""
    model.eval()
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@torch.no_grad()
def _activations(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The residual stream after the embedding, after each layer but the last and after the final norm, and the logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    output = model.eval()(**inputs, output_hidden_states=True)
    stream = output.hidden_states
    layers = {f"layer {k}": h for k, h in enumerate(stream[1:-1], start=1)}
    named = {"embedding": stream[0], **layers, "final norm": stream[-1], "logits": output.logits}
    return {name: value.double() for name, value in named.items()}


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
