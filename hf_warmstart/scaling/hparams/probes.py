"""Probes: short runs of the model itself, from its checkpoint on the new text, each decayed at its end.

Two things are read off them, both ours and not the paper's.

**What the checkpoint is worth.** A checkpoint of other text starts at a high loss, which tells of the text rather than of what
the checkpoint knows, and is at a much lower one within a few steps. Its loss L_p after D_p tokens tells more:

    C_pre = max(C(L), C(L_p) - 6 N D_p)

**Where its best learning rate lies.** A law carries the optimum of small models to this one, over the gap between them, and
errs by the error of its exponents times that gap. Three probes or more, alike but for their rates, find the optimum of this
very model at few tokens: the lowest point of the parabola in ln rate through those within a factor of four of the best. The
law is then asked for the step from few tokens to many alone:

    lr = lr(C_pre + C) * lr_p / lr(C_pre + C_p)      lr_p at the probes' batch, moved to the law's along the ridge

This holds for a checkpoint that is new to the text. One that is worth more of it than the probes saw has its best loss in a
short run at a rate that is too low for a long one: in `benchmarks.hparams` by a factor of 2.5. From such the rate is not taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import WarmstartError
from ..fits.robust_fit import Array
from ..tables.run_sources import plain_name, read_table
from ..tables.runs import read_runs

FEWEST = 3  # rates, for a parabola
NEAR = 4.0  # factor of the best probe's rate, within which the parabola is fitted
ALIKE = 0.01  # share by which tokens and batches of probes may differ


@dataclass(frozen=True)
class Probes:
    """Short runs that differ in learning rate alone.

    Args:
        rates (`np.ndarray`, (runs,)): peaks, rising. losses (`np.ndarray`, (runs,)): held out, in nats per token, finite.
        tokens (`float`): of each run. batch_tokens (`float`): of each step.
        lost (`tuple[float, ...]`): rates at which one diverged, or learnt nothing.
    """

    rates: Array
    losses: Array
    tokens: float
    batch_tokens: float
    lost: tuple[float, ...] = ()

    @classmethod
    def of(cls, source: Any, params: float) -> Probes:
        """Read probes.

        Args:
            source: a table of runs in any form that `read_runs` takes, with columns `learning_rate`, `batch_tokens`, `tokens`
                and `loss`. params: N of the model, where the table does not say.

        Raises:
            WarmstartError: columns are missing, units cannot be, no run ended well, or runs differ in more than their rate.
        """
        table = read_table(source)
        if "params" not in map(plain_name, table.columns):
            table = table.assign(params=float(params))
        runs = read_runs(table)
        frame, aside = runs.frame.sort_values("learning_rate"), runs.set_aside
        for name in ("tokens", "batch_tokens"):
            values = frame[name].to_numpy()
            if np.ptp(values) > ALIKE * values.max():
                raise WarmstartError(
                    f"Probes differ in their learning rate alone, and these have {name} from {values.min():g} to "
                    f"{values.max():g}. Pass runs of one length and one batch."
                )
        lost = aside.loc[aside["reason"].str.contains("diverged"), "learning_rate"] if len(aside) else []
        return cls(
            frame["learning_rate"].to_numpy(),
            frame["loss"].to_numpy(),
            float(frame["tokens"].mean()),
            float(frame["batch_tokens"].mean()),
            tuple(map(float, lost)),
        )

    @property
    def lowest(self) -> float:
        """The lowest loss."""
        return float(self.losses.min())

    def tell_the_rate(self, worth: float) -> bool:
        """Whether there are enough of them for a best learning rate, from a checkpoint worth so many tokens of the new text."""
        return len(self.rates) >= FEWEST and worth <= self.tokens

    def doubts(self, worth: float) -> list[str]:
        """What about the best rate should be looked at."""
        if len(self.rates) < FEWEST:
            return [f"{len(self.rates)} probes do not tell where the best learning rate lies: that takes {FEWEST}."]
        if not self.tell_the_rate(worth):
            return [
                f"The checkpoint is worth {worth:,.0f} tokens of this text, the probes saw {self.tokens:,.0f}: so short a run "
                "from it prefers lower rates than a long one, and the law's rate was not corrected."
            ]
        best = float(self.rates[int(np.argmin(self.losses))])
        tried = [*self.rates, *self.lost]
        if best in (min(tried), max(tried)):
            end = "highest" if best == max(tried) else "lowest"
            return [f"The best probe has the {end} learning rate of all: the best may lie beyond. Add a probe there."]
        return []

    def best_rate(self, noise: float | None = None, draws: int = 0, seed: int = 0) -> tuple[float, Array]:
        """The lowest point of the parabola, within the rates that were tried, and draws of it.

        Args:
            noise (`float`, *optional*): of a loss between seeds, in nats. draws (`int`): how many.

        Returns:
            The rate, and (draws,) of it: the losses are drawn anew with that noise and the parabola fitted to each.
        """
        best = self.rates[int(np.argmin(self.losses))]
        near = (self.rates <= 1.001 * NEAR * best) & (self.rates >= best / NEAR / 1.001)
        places, losses = np.log(self.rates[near] / best), self.losses[near]
        generator = np.random.default_rng(seed)
        drawn = losses + (noise or 0.0) * generator.standard_normal((draws, len(losses)))
        lowest = _lowest(places, np.concatenate([losses[None], drawn]))
        rates = best * np.exp(lowest)
        return float(rates[0]), rates[1:]


def _lowest(places: Array, losses: Array) -> Array:
    """Where the parabola through each row of losses (rows, points) is lowest; where it is not convex, the best point."""
    at_best = places[losses.argmin(1)]
    if len(places) < FEWEST:
        return at_best
    design = np.column_stack([np.ones_like(places), places, places**2])
    _, slope, bend = np.linalg.pinv(design) @ losses.T
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(bend > 0, -slope / (2 * bend), at_best)
    return np.clip(found, places.min(), places.max())
