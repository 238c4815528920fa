"""What is published on growth, with its sources: runs and laws of arXiv 2605.13405, the guideline of arXiv 2405.15319.

`published_growth.json` holds the figures, each with its source and how it was come by. The laws of gain are fitted here, to
the losses that are there, by the same code as a user's own runs; scratch's law is the authors' own.
"""

from __future__ import annotations

import json
import math
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from ..fits.laws import LossLaw
from .gain_law import Estimate, fit_gain
from .growth_laws import GrowthLaws, LossOfMethod, error_of
from .growth_runs import SCRATCH, pairs_of, read_runs

FILE = "published_growth.json"


@cache
def published() -> dict[str, Any]:
    """The figures as they stand in the file."""
    data: dict[str, Any] = json.loads(files(__package__).joinpath(FILE).read_text(encoding="utf-8"))
    return data


def published_runs() -> list[dict[str, Any]]:
    """The published losses as a table of runs; scratch at the learning rate of each base, the lowest of which counts."""
    data = published()
    sizes, found = data["sizes"], []
    for row in data["runs"]["rows"]:
        run = dict(zip(data["runs"]["columns"], row, strict=True))
        params, base = sizes[run["target"]], sizes[run["base"]]
        grown = {"base_params": base, "base_tokens": base * data["base_tokens_per_parameter"]}
        found.append(
            {
                "method": run["method"],
                "params": params,
                "tokens": params * run["tokens_per_parameter"],
                "loss": run["loss"],
                **({} if run["method"] == SCRATCH else grown),
            }
        )
    return found


@cache
def published_laws() -> GrowthLaws:
    """The laws that advice rests on where no others are given.

    Example:

        >>> law = published_laws().gain("szp")
        >>> print(f"{law.optimum(20).value:.1f} {law.upper_bound(20).value:.1f}")
        2.1 4.4
    """
    data = published()
    # Of the two shrink factors of a pair the better one counts, as of the learning rates of scratch.
    table = read_runs(published_runs())
    gains = {}
    for method in sorted(set(table["method"]) - {SCRATCH}):
        gains[method] = fit_gain(pairs_of(table, method), source=data["source"])
    scratch = next(found.law for found in published_loss_laws() if found.method == SCRATCH)
    assert scratch is not None  # it is in the file
    return GrowthLaws(
        gains,
        scratch,
        (),
        data["source"],
        float(data["base_tokens_per_parameter"]),
        error_of(scratch, table),
    )


def published_loss_laws() -> list[LossOfMethod]:
    """The laws `L(N, D)` that the source states, without draws; few points tell their constants badly."""
    data = published()
    return [
        LossOfMethod(law["method"], law["growth_factor"], _law(law), data["loss_laws_note"])
        for law in data["loss_laws"]
    ]


def _law(data: dict[str, Any]) -> LossLaw:
    (a, alpha), (b, beta) = data["params"], data["tokens"]
    return LossLaw(data["floor"], {"params": a, "tokens": b}, {"params": alpha, "tokens": beta})


def stack_guideline(params: float, tokens: float) -> tuple[float, Estimate]:
    """The growth factor in layers, and the tokens of the base, for depth by stacking.

        log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74,     C = 6 N D,     g = 4

    Args:
        params (`float`): N of the target. tokens (`float`): D of the target.

    Returns:
        g, and d; d is not known where the formula gives more than the whole budget, outside of what it was fitted to.

    Example:

        >>> factor, base_tokens = stack_guideline(7e9, 2e12)  # the source prints 11.11B
        >>> print(factor, f"{base_tokens.value:.4g}")
        4 1.111e+10

    Source: arXiv 2405.15319 and its repository's README; tried there up to 7B parameters and 750B tokens.
    """
    data = published()["stacking"]
    terms = data["log10_tokens"]
    log10 = (
        terms["log10_params"] * math.log10(params)
        + terms["inverse_log10_flops"] / math.log10(6 * params * tokens)
        + terms["constant"]
    )
    seen = float(np.power(10.0, min(log10, 300.0)))
    if seen >= tokens:
        return data["growth_factor"], Estimate(
            None,
            reason=f"the formula gives {seen:.3g} tokens, more than the whole budget, and was fitted to larger models",
        )
    return data["growth_factor"], Estimate(seen)
