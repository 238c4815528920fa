"""`GrowthAdvice` as text: a table for people."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from .gain_law import Estimate, number

if TYPE_CHECKING:
    from .advise import GrowthAdvice

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def text_of(made: GrowthAdvice) -> str:
    """The advice, its figures, and what they rest on."""
    found = made.estimates
    rows = [
        ("advice", _advice(made)),
        ("growth factor", f"{made.growth_factor:.3g} (best by the law: {found['growth_factor']})"),
        ("upper bound", str(found["upper_bound"])),
        ("loss against scratch", _each(found["loss_change"], percent)),
        ("in nats per token", _each(found["loss_difference"], lambda v: f"{v or 0.0:+.3f}")),
        ("speed-up, base as given", str(found["speedup"])),
        ("speed-up, base's cost counted", str(found["speedup_with_base_cost"])),
        ("tokens saved", _each(found["tokens_saved"], count)),
        ("pays up to", _each(found["budget_limit"], lambda v: f"{number(v)} tokens per parameter")),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [
        f"Target: {count(made.params)} parameters, {count(made.tokens)} tokens ({made.tokens / made.params:.3g} per parameter)"
    ]
    lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    lines += ["At equal FLOPs, loss against scratch:"]
    for row in made.options:
        change = percent(row["loss_change"]) if row["loss_change"] is not None else f"not known: {row['reason']}"
        lines.append(
            f"  {row['option']:<{width}}  {change}, {count(row['params'])} parameters on {count(row['tokens'])} tokens"
        )
    if made.bases:
        lines.append("Bases:")
    for row in made.bases:
        change = "" if row["loss_change"] is None else f", {percent(row['loss_change'])}"
        verdict = "serves" if row["serves"] else "does not serve"
        reason = f" ({row['reason']})" if row["reason"] else ""
        lines.append(f"  {row['name']:<{width}}  {verdict}: factor {row['growth_factor']:.3g}{change}{reason}")
    if made.paths is not None:
        path = made.paths
        sizes = " -> ".join(count(size) for size in path.sizes)
        lines.append(f"In stages, {sizes}, or at once, against scratch at equal FLOPs after the base:")
        lines.append(f"  {'staged':<{width}}  {_each(path.staged, percent)}")
        lines.append(f"  {'at once':<{width}}  {_each(path.at_once, percent)}")
        lines.append(f"  {'better':<{width}}  {path.better}")
    layers, timing = made.depth["growth_factor_in_layers"], made.depth["base_tokens"]
    lines.append(
        f"In depth, by stacking ({made.depth['source']}): {layers} times the layers, base tokens {_each(timing, count)}"
    )
    for title, words in (("Warnings", made.warnings), ("Assumptions", made.assumptions), ("Sources", made.sources)):
        lines += [f"{title}:", *(f"  - {line}" for line in words)] if words else []
    return "\n".join(lines)


def _advice(made: GrowthAdvice) -> str:
    if made.advice == "grow":
        return f"grow by {made.growth_factor:.3g}, from {count(made.base_params)} parameters"
    if made.advice == "scratch":
        return "train from scratch"
    return made.advice


def _each(estimate: Estimate, words: Callable[[float | None], str]) -> str:
    """An estimate, its numbers in words of their own."""
    if estimate.value is None:
        return str(estimate)
    ends = f" ({words(estimate.low)} to {words(estimate.high)})" if estimate.interval else ""
    return words(estimate.value) + ends


def percent(value: float | None) -> str:
    """A relative change."""
    return "not known" if value is None else f"{100 * value:+.2f} %"


def count(value: float | None) -> str:
    """A number of parameters or tokens, three digits and a unit.

    Example:

        >>> count(134561280), count(-2.5e9), count(7)
        ('135M', '-2.5B', '7')
    """
    if value is None or not math.isfinite(value):
        return "not known" if value is None else "no bound"
    for size, unit in UNITS:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
