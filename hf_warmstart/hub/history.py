"""What a trainer logged since the growth: rows for a card's table, and its curves."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CURVES_NAME = "curves.png"
SHOWN = 8  # rows of the table at most


@dataclass(frozen=True)
class Story:
    """A run as logged.

    Args:
        losses: (step, training loss) as logged. evaluations: (step, held-out loss). rates: (step, learning rate). norms: (step,
            gradient norm).
        steps (`int`): optimizer steps. tokens (`int`, *optional*): of input, where the trainer counted them.
    """

    losses: list[tuple[int, float]]
    evaluations: list[tuple[int, float]]
    rates: list[tuple[int, float]]
    norms: list[tuple[int, float]]
    steps: int
    tokens: int | None

    @property
    def rows(self) -> list[tuple[int, float]]:
        """Some of the evaluations: the first, the last and as many between as a table takes."""
        count = len(self.evaluations)
        if count <= SHOWN:
            return self.evaluations
        return [self.evaluations[round(k * (count - 1) / (SHOWN - 1))] for k in range(SHOWN)]

    @property
    def has_curves(self) -> bool:
        """Whether there is anything to draw."""
        return len(self.losses) > 1 or len(self.evaluations) > 1


def story(history: Iterable[Mapping[str, Any]] | None) -> Story | None:
    """The story of a run from `trainer.state.log_history`; None where nothing was trained."""
    rows = [row for row in history or () if isinstance(row.get("step"), int)]

    def points(name: str) -> list[tuple[int, float]]:
        found = [(row["step"], row[name]) for row in rows if name in row]
        return [
            (step, float(value)) for step, value in found if isinstance(value, (int, float)) and math.isfinite(value)
        ]

    steps = max((row["step"] for row in rows), default=0)
    if not steps:
        return None
    tokens = [row["num_input_tokens_seen"] for row in rows if row.get("num_input_tokens_seen")]
    return Story(
        points("loss"),
        points("eval_loss"),
        points("learning_rate"),
        points("grad_norm"),
        steps,
        tokens[-1] if tokens else None,
    )


def draw_curves(told: Story, path: str | os.PathLike) -> None:
    """Training and held-out loss over steps, as a PNG; no window, no global state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for points, style, label in ((told.losses, "-", "training"), (told.evaluations, "o-", "held out")):
        if points:
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, style, ms=4, lw=1.2, label=label)
    axis.set(xlabel="optimizer steps since the growth", ylabel="loss, nats per token")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.savefig(os.fspath(path), dpi=120, metadata={"Software": None})
