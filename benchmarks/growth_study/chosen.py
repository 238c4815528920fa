"""The arm that the trials choose, on a seed of their own: its figures on the reported seeds owe nothing to the choice.

The arm that does best on the reported seeds is best on them partly by chance, the more so the more arms there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .jobs import GROWN
from .running import Study
from .table import Cell


@dataclass(frozen=True)
class Tried:
    """An arm's trials.

    Args:
        base, method: which arm. losses: by the factor on its rate, at the budget; None where a trial diverged.
    """

    base: str
    method: str
    losses: Mapping[float, float | None]

    @property
    def least(self) -> tuple[float, float] | None:
        """The lowest loss, and the factor that it was reached with."""
        return min(((loss, factor) for factor, loss in self.losses.items() if loss is not None), default=None)

    def text(self) -> str:
        """Losses by factor."""
        return ", ".join(f"{factor:g}: {'diverged' if x is None else f'{x:.4f}'}" for factor, x in self.losses.items())


def tried(study: Study, target: str, rung: float) -> list[Tried]:
    """The arms of a target whose trials are all finished, in the order in which they are run."""
    found: dict[tuple, Tried] = {}
    for job in study.jobs:
        if job.kind != GROWN or job.target != target or (job.base, job.method) in found:
            continue
        made = {trial.rate: study.record(trial.name) for trial in study.trials(job)}
        losses = {
            factor: next((row["loss"] for row in record["rows"] if row["rung"] == rung), None)
            for factor, record in made.items()
            if record is not None and factor is not None
        }
        if len(losses) == len(made):
            found[job.base, job.method] = Tried(job.base or "", job.method or "", losses)
    return list(found.values())


def chosen(cells: list[Cell], trials: list[Tried]) -> tuple[Cell, Tried] | None:
    """Of some cells the one whose trials ended lowest."""
    by_arm = {(cell.base, cell.method): cell for cell in cells}
    able = [(t.least, by_arm[t.base, t.method], t) for t in trials if t.least and (t.base, t.method) in by_arm]
    best = min(able, key=lambda entry: entry[0], default=None)
    return None if best is None else best[1:]
