"""`advise_growth`: grow by how much, or train from scratch, or train the base on.

Three ways to spend the same FLOPs on a target of N parameters and D tokens are compared by the loss they are expected to
end at: a grown model, one from scratch, and the base trained on. The first two differ by the law of gain at `g = N / N0` and
`r = D / N` (`growth_laws`); what that is worth in tokens follows from scratch's own law, and so does the third. Two
figures are given for everything that a base costs: with the base as given, and with its `6 N0 D0` FLOPs counted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import WarmstartError
from .advice_text import text_of
from .base_checkpoint import Base, read_base
from .gain_law import Estimate, GainLaw
from .growth_laws import GrowthLaws
from .growth_options import Comparison
from .growth_paths import PathComparison, compare_paths
from .published_growth import published, published_laws, stack_guideline

PARAMS_RANGE, TOKENS_RANGE = (1e3, 1e14), (1e3, 1e18)  # what can be a count of parameters, and of tokens
STAGED_FROM, STAGED = 3.0, 4.0  # a path through a middle size is compared from the first on, else for the second


@dataclass(frozen=True)
class GrowthAdvice:
    """What to do with a budget; `print` shows it as a table.

    Args:
        advice (`str`): `"grow"`, `"scratch"` or `"continue the base"`: the least expected loss at equal FLOPs.
        growth_factor (`float`): parameters of the target over those of the base: of the base that was given, of the best of
            a family, else the best one by the law; 1 where no growth helps, or no base of the family serves.
        upper_bound (`float`, *optional*): the growth factor beyond which scratch is better; None where it is not known.
        expected_speedup (`float`, *optional*): tokens that scratch needs for the grown model's loss, over the grown model's.
        expected_speedup_with_base_cost (`float`, *optional*): the same with the FLOPs of the base's own training on the
            grown model's side.
        params (`float`): of the target. tokens (`float`): that it is to be trained on.
        base_params (`float`): of the base that was given or is meant.
        base_tokens (`float`, *optional*): that it has seen, or is taken to have.
        estimates (`dict[str, Estimate]`): every figure with its interval, or why it is not known: `growth_factor` (the best by
            the law), `upper_bound`, `loss_change` (relative to scratch), `loss_difference` (nats per token at the level of
            the law's source), `speedup`, `speedup_with_base_cost`, `tokens_saved`, `budget_limit` (tokens per
            parameter beyond which this growth no longer pays).
        options (`list[dict]`): the ways to spend the FLOPs, best first, with `loss_change` relative to scratch.
        bases (`list[dict]`): of a family: which would serve, best first.
        paths (`PathComparison`, *optional*): stages against one jump. depth (`dict`): the guideline for stacking.
        warnings (`list[str]`): in words; so are `assumptions` and `sources`.
    """

    advice: str
    growth_factor: float
    upper_bound: float | None
    expected_speedup: float | None
    expected_speedup_with_base_cost: float | None
    params: float
    tokens: float
    base_params: float
    base_tokens: float | None
    estimates: Mapping[str, Estimate]
    options: list[dict[str, Any]]
    bases: list[dict[str, Any]] = field(default_factory=list)
    paths: PathComparison | None = None
    depth: Mapping[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % intervals of `estimates`, where they are known."""
        return {name: ends for name, made in self.estimates.items() if (ends := made.interval) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = dict(self.__dict__)
        data["estimates"] = {name: made.to_dict() for name, made in self.estimates.items()}
        data["depth"] = {k: v.to_dict() if isinstance(v, Estimate) else v for k, v in self.depth.items()}
        data["paths"] = None if self.paths is None else self.paths.to_dict()
        return data

    def __str__(self) -> str:
        return text_of(self)


def advise_growth(
    params: float | None,
    tokens: float,
    *,
    base_tokens: float | None = None,
    laws: Any = None,
    base_params: float | None = None,
    checkpoint: str | os.PathLike | None = None,
    family: Mapping[str, Any] | Iterable[Any] | None = None,
    method: str | None = None,
    count_base_cost: bool = False,
) -> GrowthAdvice:
    """When and how much to grow.

    Args:
        params (`float`, *optional*): N, all parameters of the target, embeddings and head included. None with a base: the
            target is then the base times the growth factor that gains most at these tokens.
        tokens (`float`): D, tokens that the target is to be trained on after the growth; at least one per parameter.
        base_tokens (`float`, *optional*): tokens that the base has seen, for its cost. By default what the laws' bases had.
        laws (*optional*): `GrowthLaws`, or a table of runs to fit them to; by default those of arXiv 2605.13405.
        base_params (`float`, *optional*): parameters of the base that is at hand.
        checkpoint (*optional*): a folder or Hub id to read both off instead, by its config, record and `trainer_state.json`.
        family (*optional*): bases to choose from: name -> parameters, or -> a folder or Hub id; or such values alone.
        method (`str`, *optional*): how the target is grown, by the names of the laws; by default the one that gains most.
        count_base_cost (`bool`, defaults to `False`): whether the advice itself counts the base's cost, as where it
            would be trained for this purpose only. Both figures are given whatever this is.

    Returns:
        `GrowthAdvice`.

    Raises:
        WarmstartError: numbers that cannot be, fewer tokens than parameters, a target smaller than its base, or several
            ways to name the base; everything that was found.

    Example:

        >>> advice = advise_growth(134.6e6, 2.7e9)
        >>> advice.advice, round(advice.growth_factor, 1), round(advice.upper_bound, 1)
        ('grow', 2.1, 4.4)

    Source: arXiv 2605.13405 (laws and runs), arXiv 2405.15319 (depth).
    """
    _check(params, tokens, base_params, base_tokens, checkpoint, family)
    fitted = published_laws() if laws is None else laws if isinstance(laws, GrowthLaws) else GrowthLaws.fit(laws)
    gain = fitted.gain(method)
    warnings, assumptions = [], []
    if checkpoint is not None:
        base = read_base(checkpoint)
        base_params = float(base.params)
        base_tokens, words = _tokens_of(base, base_tokens)
        assumptions += words
    least = float(params) if params is not None else float(base_params or 0)
    if tokens < least:
        raise WarmstartError(
            f"tokens={tokens:.4g} is below one token per parameter ({least:.4g}); no law holds there."
        )
    target = float(params) if params is not None else _best_target(gain, least, tokens)
    bases = _bases(gain, target, tokens, family)
    given = base_params is not None
    if given:
        factor = target / float(base_params or target)
    elif bases:
        factor = bases[0]["growth_factor"] if bases[0]["serves"] else 1.0
    else:
        factor = _best_factor(gain, tokens / target)
    if factor < 1:
        raise WarmstartError(
            f"The target of {target:.4g} parameters is smaller than its base of {base_params:.4g}; nothing is grown then."
        )
    source = target / factor
    if laws is None:
        operator = f"{gain.method}: {published()['runs']['methods'][gain.method]}"
        assumptions.append(
            f"The target is grown in width as in the runs behind the law ({operator}); other operators gain otherwise."
        )
    if base_tokens is None and fitted.base_tokens_per_parameter is not None:
        base_tokens = fitted.base_tokens_per_parameter * source
        assumptions.append(
            f"The base has seen {fitted.base_tokens_per_parameter:.3g} tokens per parameter, as in the runs behind the laws."
        )
    compared = Comparison(fitted, gain, target, tokens, factor, base_tokens)
    estimates = compared.estimates()
    options = compared.options(given, count_base_cost)
    advice = compared.choice(options)
    warnings += gain.outside(
        growth_factor=factor,
        tokens_per_parameter=tokens / target,
        params=target,
        **({} if base_tokens is None else {"base_tokens_per_parameter": base_tokens / source}),
    )
    warnings += compared.doubts(options, advice, count_base_cost)
    factor_in_layers, timing = stack_guideline(target, tokens)
    return GrowthAdvice(
        advice,
        factor,
        estimates["upper_bound"].value,
        estimates["speedup"].value,
        estimates["speedup_with_base_cost"].value,
        target,
        float(tokens),
        source,
        base_tokens,
        estimates,
        options,
        bases,
        compare_paths(fitted, gain, target, tokens, target / (factor if factor >= STAGED_FROM else STAGED)),
        {"growth_factor_in_layers": factor_in_layers, "base_tokens": timing, "source": "arXiv 2405.15319"},
        warnings,
        assumptions,
        _sources(fitted, gain),
    )


# -- sizes and bases --------------------------------------------------------------------------------------------------


def _best_factor(gain: GainLaw, each: float) -> float:
    """The growth factor with the least loss, within those that were run; 1 where none helps."""
    optimum = gain.optimum(each)
    if optimum.value is not None:
        return optimum.value
    low, high = gain.ranges["growth_factor"]
    tried = np.geomspace(low, high, 50) if "x^2" in gain.terms else np.array([low])
    changes = [gain.log_ratio(g, each) for g in tried]
    best = int(np.argmin(changes))
    return float(tried[best]) if changes[best] < 0 else 1.0


def _best_target(gain: GainLaw, base_params: float, tokens: float) -> float:
    """The target, of those that the runs' growth factors and these tokens allow, that gains most on its own scratch."""
    high = min(gain.ranges["growth_factor"][1], tokens / base_params)
    factors = np.geomspace(min(gain.ranges["growth_factor"][0], high), high, 100)
    best = min(factors, key=lambda g: gain.log_ratio(g, tokens / (g * base_params)))
    return float(best) * base_params


def _bases(gain: GainLaw, params: float, tokens: float, family: Any) -> list[dict[str, Any]]:
    """Which bases of a family would serve a target, best first."""
    if family is None:
        return []
    rows = []
    for name, size in _sizes(family).items():
        factor = params / size
        row: dict[str, Any] = {"name": name, "params": size, "growth_factor": factor}
        if factor <= 1:
            words = "as large as the target" if factor == 1 else "larger than the target"
            rows.append(row | {"loss_change": None, "interval": None, "serves": False, "reason": words})
            continue
        change = gain.change(factor, tokens / params)
        beyond = gain.outside(growth_factor=factor)
        serves = (change.value or 0.0) < 0 and factor <= gain.ranges["growth_factor"][1] * 1.01
        reason = beyond[0] if beyond else "" if serves else "scratch is expected to be better"
        rows.append(
            row | {"loss_change": change.value, "interval": change.interval, "serves": serves, "reason": reason}
        )
    return sorted(
        rows, key=lambda row: (not row["serves"], math.inf if row["loss_change"] is None else row["loss_change"])
    )


def _sizes(family: Any) -> dict[str, float]:
    """Names and parameters of a family."""
    named = dict(family) if isinstance(family, Mapping) else {_name(value): value for value in family}
    made = {
        str(name): float(read_base(value).params) if isinstance(value, (str, os.PathLike)) else value
        for name, value in named.items()
    }
    if not made:
        raise WarmstartError("The family has no bases. Pass name -> parameters, or leave it out.")
    wrong = [
        problem for name, value in made.items() if (problem := _problem(f"family[{name!r}]", value, PARAMS_RANGE))
    ]
    if wrong:
        raise WarmstartError("; ".join(wrong) + ".")
    return made


def _name(value: Any) -> str:
    return os.fspath(value) if isinstance(value, (str, os.PathLike)) else f"{value:.3g}"


def _tokens_of(base: Base, given: float | None) -> tuple[float | None, list[str]]:
    """The tokens that a checkpoint has seen, and how they are known."""
    words = []
    if base.growths:
        words.append(
            f"The checkpoint was grown {base.growths} times: tokens of its earlier sizes count only where its state kept them."
        )
    if given is not None:
        return given, words
    if base.tokens is None:
        words.append(f"The checkpoint does not say how many tokens it has seen ({base.note}).")
    else:
        words.append(f"The checkpoint has seen {base.tokens:.3g} tokens ({base.note}).")
    return base.tokens, words


def _sources(laws: GrowthLaws, gain: GainLaw) -> list[str]:
    """What the figures rest on."""
    found = [f"gain by {gain.method}: {gain.source}, {gain.pairs} pairs in {gain.units} independent units"]
    if laws.scratch is not None:
        found.append(f"scratch's loss: {laws.source}, {laws.scratch}, within {laws.scratch_error:.1%} of its runs")
    return [*found, *laws.notes]


# -- checks ------------------------------------------------------------------------------------------------------------


def _check(params: Any, tokens: Any, base_params: Any, base_tokens: Any, checkpoint: Any, family: Any) -> None:
    """Raise on numbers that cannot be, all of them named."""
    problems = []
    named = {"params": (params, PARAMS_RANGE), "tokens": (tokens, TOKENS_RANGE)}
    named |= {"base_params": (base_params, PARAMS_RANGE), "base_tokens": (base_tokens, TOKENS_RANGE)}
    for name, (value, span) in named.items():
        if value is None and name != "tokens":
            continue
        if problem := _problem(name, value, span):
            problems.append(problem)
    ways = [
        name
        for name, value in (("base_params", base_params), ("checkpoint", checkpoint), ("family", family))
        if value is not None
    ]
    if len(ways) > 1:
        problems.append(f"{' and '.join(ways)} name the base more than once; pass one of them")
    if params is None and base_params is None and checkpoint is None:
        problems.append(
            "params is missing: pass the target's size, or a base (base_params or checkpoint) to size it by"
        )
    if not problems and params is not None and base_params is not None and params < base_params:
        problems.append(
            f"params={params:.4g} is smaller than base_params={base_params:.4g}: the growth factor would be "
            f"{params / base_params:.3g}, below 1"
        )
    if problems:
        raise WarmstartError("; ".join(problems) + ".")


def _problem(name: str, value: Any, span: tuple[float, float]) -> str:
    """What is wrong with a count; empty where nothing is."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, np.integer, np.floating))
        or not math.isfinite(value)
    ):
        return f"{name}={value!r} must be a finite number"
    if not span[0] <= value <= span[1]:
        return (
            f"{name}={value:g} cannot be a count of {'tokens' if 'tokens' in name else 'parameters'}: pass the whole number, "
            f"between {span[0]:g} and {span[1]:g}, not millions or billions of them"
        )
    return ""
