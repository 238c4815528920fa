"""From a table of runs to laws: optima of budgets, laws through them, and which form of law the budgets support.

| form | learning rate | batch | loss |
|---|---|---|---|
| `compute` | `a C^p` | `b C^q` | `E + A C^-gamma`, best runs of each compute |
| `params_tokens` | `a N^p D^q` | `b D^r` | `E + A N^-alpha + B D^-beta`, best runs of each budget; else `E + B D^-beta` |

The batch follows tokens alone in the second form: the best and the critical batch hardly depend on the size of the model
(arXiv 2410.21676, 2505.13738, 2503.04715). A law of compute alone holds only along one path of tokens per parameter: over
budgets of mixed shape it explains almost nothing of the learning rate. `auto` compares the forms by what their advice costs:
each budget in turn is left out, the laws fitted to the others predict its settings, and the *regret* is the loss there over
its best. R2 alone would not do, since a law can explain much and miss by much. Optima of a joint fit lie on its law, so that
nothing is left to compare: the form is the one that was fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import WarmstartError
from .laws import FORMS, LOSS_FORMS, LossLaw, PowerLaw
from .optima import AXES, SAME_TOKENS, Optimum
from .robust_fit import Array
from .settings_law import SettingsFit, determined, fit_power_law

FEWEST_BUDGETS = 3
WORTH = 1e-4  # of the loss: a regret that is smaller by less does not speak for the form with more parameters
RATIO_SPREAD = 1.5  # of tokens per parameter, over which a law of compute alone becomes doubtful
LAW_VARIABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "compute": {"learning_rate": ("compute",), "batch_tokens": ("compute",)},
    "params_tokens": {"learning_rate": ("params", "tokens"), "batch_tokens": ("tokens",)},
}


@dataclass(frozen=True)
class FormFit:
    """What one form of law makes of the budgets.

    Args:
        form (`str`): its name. learning_rate, batch_tokens (`SettingsFit`): the laws of the settings.
        regret (`dict[str, float]`): `mean` and `max` over budgets left out, as a share of the loss; empty where there were too
            few budgets to leave one out.
    """

    form: str
    learning_rate: SettingsFit
    batch_tokens: SettingsFit
    regret: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: laws, R2, scatter and regret."""
        return {
            "form": self.form,
            "regret": dict(self.regret),
            **{
                name: {**own.law.to_dict(), "r_squared": own.r_squared, "scatter": own.scatter, "points": own.points}
                for name, own in (("learning_rate", self.learning_rate), ("batch_tokens", self.batch_tokens))
            },
        }


def fit_forms(optima: Sequence[Optimum], form: str, seed: int = 0) -> tuple[FormFit, dict[str, FormFit], list[str]]:
    """The laws of settings in the form asked for, or in the one that the budgets support.

    Args:
        optima: of all budgets. form: `"compute"`, `"params_tokens"` or `"auto"`. seed: of the draws.

    Returns:
        The form chosen, all forms that could be fitted, and warnings.

    Raises:
        WarmstartError: an unknown form, fewer than three budgets, or budgets that do not determine the form asked for.
    """
    if form not in (*FORMS, "auto"):
        raise WarmstartError(f"form={form!r} is none of {[*FORMS, 'auto']}.")
    if len(optima) < FEWEST_BUDGETS:
        raise WarmstartError(
            f"Laws need at least {FEWEST_BUDGETS} budgets with enough runs (better 4 or more, over 1.5 decades of "
            f"compute), got {len(optima)}. Run proxies at more budgets."
        )
    fitted: dict[str, FormFit] = {}
    refused = {}
    for name in FORMS:
        try:
            laws = _laws(optima, name, seed)
            fitted[name] = FormFit(name, laws["learning_rate"], laws["batch_tokens"], _regret(optima, name))
        except WarmstartError as error:
            refused[name] = str(error)
    if form != "auto":
        if form not in fitted:
            raise WarmstartError(f"form={form!r} cannot be fitted: {refused[form]}")
        chosen = fitted[form]
    elif not fitted:
        raise WarmstartError(" ".join(refused.values()))
    else:
        chosen = _supported(fitted, all(o.method == "joint" for o in optima))
    return chosen, fitted, _doubts(optima, chosen, fitted)


def fit_loss(optima: Sequence[Optimum], form: str, seed: int = 0) -> LossLaw:
    """The law of loss in a form, with draws of the optima's losses and of their scatter round the law.

    Returns:
        `LossLaw`; of `"params_tokens"` one of tokens alone where losses fall with tokens, and not with parameters.

    Raises:
        WarmstartError: the budgets do not determine it.
    """
    if form != "params_tokens":
        return _fit_loss(_best_of_each_compute(optima), FORMS[form], seed)
    logs = [np.log([getattr(o, name) for o in optima]) for name in FORMS[form]]
    if not determined(np.column_stack([np.ones(len(optima)), *(x - x.mean() for x in logs)])):
        raise WarmstartError("Parameters and tokens of the budgets vary together.")
    try:
        return _fit_loss(optima, FORMS[form], seed)
    except WarmstartError as error:
        try:
            return _fit_loss(optima, LOSS_FORMS["tokens"], seed)
        except WarmstartError:
            raise error from None


def _fit_loss(points: Sequence[Optimum], variables: Sequence[str], seed: int) -> LossLaw:
    at: dict[str, Any] = {name: np.array([getattr(o, name) for o in points]) for name in variables}
    loss = np.array([o.loss for o in points])
    draws = np.stack([o.draws[:, 2] for o in points], axis=1)
    first = LossLaw.fit(loss, draws=0, **at)
    spare = len(points) - 1 - 2 * len(at)
    if spare > 0:
        squares = float(((loss - first(**at)) ** 2).sum()) / spare
        scatter = math.sqrt(max(0.0, squares - float(draws.var(axis=0).mean())))
        draws = draws + scatter * np.random.default_rng(seed + 1).standard_normal(draws.shape)
    return LossLaw.fit(loss, loss_draws=draws.clip(1e-3), **at) if len(draws) else first


def _best_of_each_compute(optima: Sequence[Optimum]) -> list[Optimum]:
    """Of budgets that share their compute, the one whose shape got the lowest loss: the law's envelope."""
    found: list[Optimum] = []
    for optimum in sorted(optima, key=lambda o: o.compute):
        if found and math.log(optimum.compute / found[-1].compute) < 2 * SAME_TOKENS:
            found[-1] = min(found[-1], optimum, key=lambda o: o.loss)
        else:
            found.append(optimum)
    return found


def _laws(optima: Sequence[Optimum], form: str, seed: int) -> dict[str, SettingsFit]:
    """The laws of both settings. Optima on an edge are left out where enough others remain."""
    found = {}
    for column, name in enumerate(AXES):
        inside = [o for o in optima if not any(edge.startswith(name) for edge in o.edges)]
        variables = LAW_VARIABLES[form][name]
        used = inside if len(inside) >= max(FEWEST_BUDGETS, len(variables) + 2) else list(optima)
        values = np.log([getattr(o, name) for o in used])
        draws = np.stack([o.draws[:, column] for o in used], axis=1)
        fixed = all(name in o.fixed for o in used) and float(np.ptp(values)) < 1e-6
        at = {} if fixed else {v: np.array([getattr(o, v) for o in used]) for v in variables}
        found[name] = fit_power_law(values, draws, at, seed)
    return found


def predict(laws: Mapping[str, PowerLaw], optimum: Optimum) -> tuple[float, float]:
    """Learning rate and batch, in tokens, that laws give a budget."""
    at = {name: getattr(optimum, name) for name in ("compute", "params", "tokens")}
    return laws["learning_rate"](**at), laws["batch_tokens"](**at)


def _regret(optima: Sequence[Optimum], form: str) -> dict[str, float]:
    """What the laws of the other budgets cost each budget, as a share of its loss."""
    shares = []
    if all(o.method == "joint" for o in optima):
        return {}
    for left_out in optima:
        others = [_without_draws(o) for o in optima if o is not left_out]
        try:
            laws = {name: own.law for name, own in _laws(others, form, 0).items()}
        except WarmstartError:
            continue
        # The quadratic's own minimum may be anything far away; within the grid it is what was measured.
        rate, batch = predict(laws, left_out)
        low, high = np.exp(left_out.settings.min(0)), np.exp(left_out.settings.max(0))
        best = min(left_out.loss, left_out.best_run) if left_out.curvature is None else left_out.loss
        loss = left_out.loss_at(float(np.clip(rate, low[0], high[0])), float(np.clip(batch, low[1], high[1])))
        shares.append(max(0.0, loss / best - 1))
    if len(shares) < len(optima):
        return {}
    return {"mean": float(np.mean(shares)), "max": float(np.max(shares))}


def _without_draws(optimum: Optimum) -> Optimum:
    """The optimum with its draws thinned: their variance is all that a prediction needs."""
    return Optimum(**{**optimum.__dict__, "draws": optimum.draws[:64]})


def _supported(fitted: Mapping[str, FormFit], jointly: bool) -> FormFit:
    """The form whose advice cost less on budgets that it had not seen; compute alone where both cost the same."""
    compute, both = fitted.get("compute"), fitted.get("params_tokens")
    if both is not None and jointly:
        return both
    if compute is None or both is None:
        return next(iter(fitted.values()))
    if not (compute.regret and both.regret):
        return compute
    return both if both.regret["mean"] < compute.regret["mean"] - WORTH else compute


def _doubts(optima: Sequence[Optimum], chosen: FormFit, fitted: Mapping[str, FormFit]) -> list[str]:
    """What about the budgets and the laws through them should be looked at."""
    found = []
    decades = math.log10(max(o.compute for o in optima) / min(o.compute for o in optima))
    if len(optima) < 4:
        found.append(
            f"Only {len(optima)} budgets: the laws go through them with hardly a check. Four or more are better."
        )
    if decades < 1.5:
        found.append(
            f"The budgets span {decades:.2g} decades of compute; 1.5 or more are needed for exponents to be known."
        )
    ratios = [o.tokens / o.params for o in optima]
    if chosen.form == "compute" and max(ratios) > RATIO_SPREAD * min(ratios):
        untold = "" if "params_tokens" in fitted else "; these budgets do not tell parameters and tokens apart"
        found.append(
            f"Tokens per parameter run from {min(ratios):.3g} to {max(ratios):.3g}, and a law of compute alone holds only "
            f"along one path of them{untold}."
        )
    edged = [f"{o.params:.3g} parameters on {o.tokens:.3g} tokens ({', '.join(o.edges)})" for o in optima if o.edges]
    if edged:
        found.append(f"The optimum lay on the edge of what was tried at {'; '.join(edged)}: widen the grid there.")
    for name, wanted in (("learning_rate", "fall"), ("batch_tokens", "grow")):
        own: SettingsFit = getattr(chosen, name)
        slope = _slope(own.law)
        if not own.law.exponents:
            found.append(f"{name} was not varied: its law is the value that all runs had.")
        elif (slope >= 0) == (wanted == "fall"):
            found.append(
                f"{name} {'grows' if slope >= 0 else 'falls'} with compute (exponent {slope:.3g}), where published laws have "
                f"it {wanted}: noise, or a grid that cuts the optimum off?"
            )
    fallen = [o for o in optima if o.method == "near_optimal"]
    if fallen and len(fallen) < len(optima):
        found.append(
            f"{len(fallen)} of {len(optima)} budgets have no convex quadratic; their optimum is the mean of near-optimal runs."
        )
    return found


def _slope(law: PowerLaw) -> float:
    """The exponent in compute along a path of fixed tokens per parameter, where both grow as its square root."""
    powers = law.exponents
    return powers.get("compute", 0.0) + 0.5 * (powers.get("params", 0.0) + powers.get("tokens", 0.0))


def ridge_of(optima: Sequence[Optimum]) -> tuple[float, Array] | None:
    """`d ln rate / d ln batch` along the optimum's valley: the median over budgets, and all of them; None if none is known."""
    known = np.array([o.ridge for o in optima if o.ridge is not None and -0.5 < o.ridge < 1.5], dtype=float)
    return (float(np.median(known)), known) if len(known) else None
