"""`grow_optimizer_state`: an optimizer's state through the same maps as the weights.

`growth.optimizers` says how each piece of a state grows. Three policies say what becomes of it:

- `carry`: every entry of the child takes what its source kept, with exact factors; entries without a source take the mean
  second moment of the carried ones. For even copies this is the state that the grown model would have had itself.
- `asymmetric_reset`: the first copy of each old entry keeps its moments, everything that the growth added starts at zero
  with a step count of its own (arXiv 2602.02472). `training.GrownAdamW` continues from it: under the one count of a stock
  optimizer, whose bias correction is long over, a second moment that starts at zero is a learning rate several times too
  large (with beta2 = 0.999 3 to 6.6 times for the first dozens of steps).
- `reset`: nothing is taken along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import StateError, WarmstartError
from .adapted_plan import AdaptedPlan
from .layout import collect
from .optimizers import RULES, StateRule, rule_for_entry
from .plan import GrowthPlan
from .transform import TensorGrowth

StatePolicy = Literal["carry", "asymmetric_reset", "reset"]
STATE_POLICIES: tuple[str, ...] = ("carry", "asymmetric_reset", "reset")
# What `asymmetric_reset` adds to an Adam entry: which entries are new, and the step count at which they began.
NEW, BORN = "new", "born"


def grow_optimizer_state(
    state_dict: Mapping[str, Any], plan: GrowthPlan | AdaptedPlan, *, state_policy: StatePolicy = "carry"
) -> dict[str, Any]:
    """Grow an optimizer's state that is keyed by parameter name.

    Args:
        state_dict: `{"state": {name: {"step", "exp_avg", ...}}, "param_groups": [{"params": [name, ...], ...}]}` with the
            parent's names, or only the inner `{name: {...}}`. It is not changed. Known are Adam and AdamW (with AMSGrad's
            maximum), SGD with momentum, Lion, Muon, and Adafactor of transformers and of torch.
        plan: the growth, from `plan_growth`; for a model with LoRA adapters an `AdaptedPlan` of it.
        state_policy (`str`, defaults to `"carry"`): `"carry"` takes the state along, `"asymmetric_reset"` only for the first
            copy of each entry (Adam's moments only; the state is `GrownAdamW`'s), `"reset"` gives an empty state.

    Returns:
        The same form with the child's names. Parameters without a state in the parent (frozen, or never reached by a
        gradient) have none. Layers that add nothing at first have a zero first moment, since momentum that they never
        earned would move them.

    Raises:
        StateError: names or shapes that are not the parent's, or state tensors that no known optimizer keeps; all are named.

    Example:

        >>> plan = plan_growth("runs/base/checkpoint-500", width=2)                              # doctest: +SKIP
        >>> child_state = grow_optimizer_state(parent_state, plan)                               # doctest: +SKIP
    """
    check_state_policy(state_policy)
    whole = "state" in state_dict
    state: Mapping[str, Mapping[str, Any]] = state_dict["state"] if whole else state_dict
    groups = list(state_dict.get("param_groups", [])) if whole else []
    if state_policy != "reset":
        check_state(state, groups, plan, complete=not whole)
    grown = {}
    if state_policy != "reset":
        for name in plan.names:
            entry = state.get(plan.source_name(name))
            if entry:
                grown[name] = grow_entry(plan, name, entry, state_policy)
    return {"state": grown, "param_groups": grow_groups(groups, plan)} if whole else grown


def grow_entry(
    plan: GrowthPlan | AdaptedPlan,
    name: str,
    entry: Mapping[str, Any],
    state_policy: str,
    rows: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The optimizer's entry of one of the child's parameters, or of some of its rows, from that of its source."""
    growth = plan.tensor(name)
    rule = rule_of(name, entry, state_policy)
    grown = rule.grow(growth, entry, rows)
    if state_policy == "asymmetric_reset":
        new = new_entries(plan, growth, rows)
        for key, kind in rule.pieces.items():
            if key in grown and kind != "scalar":
                grown[key] = grown[key].masked_fill(new.to(grown[key].device), 0.0)
        grown[NEW] = new
        grown[BORN] = int(entry["step"])  # no tensor: torch casts those to the parameter's dtype when it loads a state
    return grown


def rule_of(name: str, entry: Mapping[str, Any], state_policy: str) -> StateRule:
    """The rule that the entry of one of the child's parameters grows by.

    Raises:
        StateError: there is none, or the policy does not go with it.
    """
    rule = rule_for_entry(entry)
    if rule is None:
        raise StateError(_unknown(name, entry))
    if state_policy == "asymmetric_reset" and (reason := _against_two_ages(rule, entry)):
        raise StateError(f"{name}: state_policy='asymmetric_reset' {reason}. Pass state_policy='carry' or 'reset'.")
    return rule


def _against_two_ages(rule: StateRule, entry: Mapping[str, Any]) -> str | None:
    """What `GrownAdamW` cannot continue from in an entry; None where nothing stands against it."""
    if rule is not RULES[0] or "step" not in entry:
        return f"needs Adam's moments and step; {sorted(entry)} is a state of {rule.name}"
    if "max_exp_avg_sq" in entry:
        return "has no optimizer that keeps AMSGrad's maximum"
    return None


def can_have_two_ages(state: Mapping[str, Any]) -> bool:
    """Whether `asymmetric_reset` can continue from each entry of a whole state."""
    rules = ((rule_for_entry(entry), entry) for entry in state["state"].values() if entry)
    return all(rule is not None and _against_two_ages(rule, entry) is None for rule, entry in rules)


def new_entries(plan: GrowthPlan | AdaptedPlan, growth: TensorGrowth, rows: tuple[int, int] | None = None) -> Tensor:
    """bool of a grown tensor, or of some of its rows: what `asymmetric_reset` takes for new."""
    if not plan.is_added(growth.name):
        return growth.new_entries(rows)
    length = growth.shape if rows is None else (rows[1] - rows[0], *growth.shape[1:])
    return torch.ones(length, dtype=torch.bool)


def grow_groups(groups: list[Mapping[str, Any]], plan: GrowthPlan | AdaptedPlan) -> list[dict[str, Any]]:
    """Parameter groups with the child's names, each in the child's own order of parameters."""
    children: dict[str, list[str]] = {}
    for name in plan.names:
        children.setdefault(plan.source_name(name), []).append(name)
    order = {name: number for number, name in enumerate(plan.names)}
    return [
        {
            **{key: value for key, value in group.items() if key != "param_names"},
            "params": sorted((child for name in group["params"] for child in children[name]), key=order.__getitem__),
        }
        for group in groups
    ]


def check_state_policy(state_policy: str) -> None:
    """Raise unless a state policy is known."""
    if state_policy not in STATE_POLICIES:
        raise WarmstartError(f"state_policy={state_policy!r} is none of {list(STATE_POLICIES)}.")


def check_state(
    state: Mapping[str, Mapping[str, Any]], groups: list[Mapping], plan: GrowthPlan | AdaptedPlan, *, complete: bool
) -> None:
    """Raise unless every name, state tensor and shape belongs to the plan's parent.

    Args:
        complete: whether every parameter must have a state.
    """
    parent = plan.shapes
    problems = []
    for name in sorted({*state, *(name for group in groups for name in group["params"])} - set(parent)):
        problems.append(f"{name} is no parameter of the parent")
    for name in sorted(set(state) & set(parent)):
        problems += check_entry(name, state[name], tuple(parent[name]))
    missing = sorted(set(parent) - set(state))
    if missing and complete:
        problems += [f"{name} has no state" for name in missing]
    if problems:
        raise StateError(
            f"The optimizer state is not that of the parent {plan.model_class.__name__}:\n{collect(problems)}\n"
            "Pass the state of the model that was grown, keyed by parameter name, or state_policy='reset'."
        )


def check_entry(name: str, entry: Mapping[str, Any], shape: tuple[int, ...]) -> list[str]:
    """What is wrong with the entry of a parameter of a shape."""
    rule = rule_for_entry(entry)
    if rule is None:
        return [_unknown(name, entry)] if entry else []
    problems = []
    # An entry that reads from disk tells the shapes of its pieces without reading them.
    described = entry.described() if hasattr(entry, "described") else entry
    for key, value in described.items():
        if isinstance(value, torch.Tensor) and tuple(value.shape) != (expected := rule.shape(key, shape, value)):
            problems.append(f"{name}: {key} has shape {tuple(value.shape)}, the parent's is {expected}")
    return problems


def _unknown(name: str, entry: Mapping[str, Any]) -> str:
    described = entry.described() if hasattr(entry, "described") else entry
    quantised = any(key.startswith(("qmap", "absmax")) for key in entry) or any(
        isinstance(value, torch.Tensor) and value.dtype == torch.uint8 for value in described.values()
    )
    if quantised:
        return (
            f"{name}: its moments are quantised to 8 bits ({', '.join(sorted(entry))}), whose blocks no map follows; resume "
            "the parent for a step with an unquantised optimizer, or pass state_policy='reset'"
        )
    return (
        f"{name}: state tensors {sorted(entry)} are of no known optimizer ({', '.join(rule.name for rule in RULES)})"
    )
