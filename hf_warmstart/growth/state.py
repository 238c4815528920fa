"""`grow_optimizer_state`: an Adam optimizer's state through the same maps as the weights.

A tensor's first moment is an average of its gradients, so it grows as gradients do, by the dual maps
(`G' = R_out G W_in^T`); its second moment by the squares of their factors; its step count stays. For even copies this
is exact: the grown moments are those that the grown model would have had. For uneven copies, noise and slices it is
the natural estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from ..errors import StateError, WarmstartError
from .layout import collect
from .plan import GrowthPlan
from .transform import Kind

StatePolicy = Literal["carry", "reset"]
STATE_POLICIES: tuple[str, ...] = ("carry", "reset")

# How each tensor of an optimizer's state grows. AMSGrad's running maximum is a second moment.
MOMENTS: dict[str, Kind] = {
    "exp_avg": "first_moment",
    "exp_avg_sq": "second_moment",
    "max_exp_avg_sq": "second_moment",
}


def grow_optimizer_state(
    state_dict: Mapping[str, Any], plan: GrowthPlan, *, state_policy: StatePolicy = "carry"
) -> dict[str, Any]:
    """Grow an Adam or AdamW state that is keyed by parameter name.

    Args:
        state_dict: `{"state": {name: {"step", "exp_avg", "exp_avg_sq"}}, "param_groups": [{"params": [name, ...], ...}]}`
            with the parent's names, or only the inner `{name: {...}}`. It is not changed.
        plan: the growth, from `plan_growth`.
        state_policy (`str`, defaults to `"carry"`): `"carry"` takes the moments and steps along, `"reset"` gives an empty
            state.

    Returns:
        The same form with the child's names. Parameters without a state in the parent (frozen, or never reached by a
        gradient) have none. Layers that add nothing at first have a zero first moment, since momentum that they never
        earned would move them.

    Raises:
        StateError: names or shapes that are not the parent's, or state tensors that are no Adam moments; all are named.

    Example:

        >>> plan = plan_growth("runs/base/checkpoint-500", width=2)                              # doctest: +SKIP
        >>> child_state = grow_optimizer_state(parent_state, plan)                               # doctest: +SKIP
    """
    check_state_policy(state_policy)
    whole = "state" in state_dict
    state: Mapping[str, Mapping[str, Any]] = state_dict["state"] if whole else state_dict
    groups = [dict(group) for group in state_dict.get("param_groups", [])] if whole else []
    _check(state, groups, plan, whole)
    children: dict[str, list[str]] = {}
    for name in plan.names:
        children.setdefault(plan.source_name(name), []).append(name)
    for group in groups:
        group["params"] = [child for name in group["params"] for child in children[name]]
        group.pop("param_names", None)
    grown: dict[str, dict[str, Any]] = {}
    if state_policy == "carry":
        for name in plan.names:
            entry = state.get(plan.source_name(name))
            if entry:
                growth = plan.tensor(name)
                grown[name] = {
                    key: growth.grow(value, MOMENTS[key]) if key in MOMENTS else _clone(value)
                    for key, value in entry.items()
                }
    return {"state": grown, "param_groups": groups} if whole else grown


def check_state_policy(state_policy: str) -> None:
    """Raise unless a state policy is known."""
    if state_policy not in STATE_POLICIES:
        raise WarmstartError(f"state_policy={state_policy!r} is none of {list(STATE_POLICIES)}.")


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _check(state: Mapping, groups: list[dict], plan: GrowthPlan, whole: bool) -> None:
    """Every name, state tensor and shape belongs to the plan's parent."""
    parent = plan.shapes
    problems = []
    for name in sorted({*state, *(name for group in groups for name in group["params"])} - set(parent)):
        problems.append(f"{name} is no parameter of the parent")
    for name in sorted(set(state) & set(parent)):
        for key, value in state[name].items():
            if key == "step":
                continue
            if key not in MOMENTS:
                problems.append(f"{name}: state tensor {key!r} is none of {sorted(MOMENTS)}")
            elif tuple(value.shape) != tuple(parent[name]):
                problems.append(f"{name}: {key} has shape {tuple(value.shape)}, the parent's is {tuple(parent[name])}")
    missing = sorted(set(parent) - set(state))
    if missing and not whole:
        problems += [f"{name} has no state" for name in missing]
    if problems:
        raise StateError(
            f"The optimizer state is not that of the parent {plan.model_class.__name__}:\n{collect(problems)}\n"
            "Pass the state of the model that was grown (Adam or AdamW, keyed by parameter name), or "
            "state_policy='reset'."
        )
