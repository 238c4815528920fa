"""Training in the parent's coordinates: the grown run is the parent's run, step for step.

For even copies every tensor is `w' = s * tile(w)` and its gradient `G' = gamma * tile(G)`, N times each entry. One
optimizer step then moves the child exactly as the parent when its settings are what `growth.optimizers` says for these
factors (for AdamW: learning rate * s, epsilon * gamma, decoupled weight decay / s), and gradients are clipped by the norm
that the parent would have had, `|G|^2 = sum |G'|^2 / (gamma^2 N)`. This proves that weights and training state were
carried rightly; it is no way to train, since the child stays the parent at several times the price.

The same groups serve muP's transfer of a learning rate, which does change how the child trains.

Source: arXiv 2602.10545 states the factors for muP; measured here for every tensor of a layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import StateError, WarmstartError
from .layout import collect
from .optimizers import RULES, Convert, Factors, rule_for_optimizer, settings_in_parent_coordinates
from .plan import GrowthPlan


def coordinate_factors(plan: GrowthPlan) -> dict[str, Factors]:
    """The factors of each of the child's tensors.

    Raises:
        WarmstartError: some tensor's factor varies inside it (uneven copies, slices, noise) or layers are new, so that
            the parent cannot be followed; all such tensors are named.
    """
    if plan.deepens:
        raise WarmstartError("New layers have no counterpart in the parent's coordinates. Grow in width only.")
    factors, varying = {}, []
    for name in plan.names:
        growth = plan.tensor(name)
        weight, gradient, copies = growth.factor, 1 / growth.factor, 1.0
        constant = growth.noise == 0 and growth.shrink is None
        for axis_map, role in zip(growth.maps, growth.layout.roles, strict=True):
            out, back = (axis_map.write, axis_map.read) if role == "write" else (axis_map.read, axis_map.write)
            even = bool((axis_map.copies == axis_map.copies[0]).all()) and not bool(axis_map.unsourced.any())
            constant = constant and even and _constant(out) and _constant(back)
            weight, gradient = weight * float(out[0]), gradient * float(back[0])
            copies *= axis_map.m / axis_map.n
        if not constant:
            varying.append(name)
        before = tuple(axis_map.n for axis_map in growth.maps)
        shifted = bool(growth.layout.offset) and weight != 1.0
        factors[name] = Factors(weight, gradient, copies, before, growth.shape, shifted)
    if varying:
        raise WarmstartError(
            f"In the parent's coordinates each tensor needs one factor, but it varies in {len(varying)} tensors of this "
            f"growth ({plan.growth_config.width_operator}):\n{collect(varying[:8])}\n"
            "Use width_operator='exact_copy' with a whole factor."
        )
    return factors


def _constant(values: Tensor) -> bool:
    return bool(torch.allclose(values, values[:1].expand_as(values), rtol=1e-12, atol=0))


def coordinate_groups(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], factors: Mapping[str, Factors]
) -> list[dict]:
    """An optimizer's groups, split so that all parameters of a group share the settings that its rule gives them.

    Args:
        optimizer: its `param_groups` hold the settings for the parent. names: name of each parameter by `id`.
        factors: from `coordinate_factors`.

    Raises:
        StateError: no rule knows the optimizer.
        WarmstartError: a norm of the form `1 + weight` would be decayed, which has no counterpart.
    """
    convert = settings_in_parent_coordinates(optimizer)
    return split_groups(optimizer.param_groups, names, lambda name, group: _converted(name, group, factors, convert))


def _converted(name: str, group: Mapping, factors: Mapping[str, Factors], convert: Convert) -> dict[str, Any]:
    if factors[name].shifted and group.get("weight_decay"):
        raise WarmstartError(
            f"{name} enters as 1 + weight and is rescaled; its weight decay has no counterpart in the parent's coordinates. "
            "Exclude it from weight decay."
        )
    return convert(group, factors[name])


def transferred_groups(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], plan: GrowthPlan
) -> list[dict[str, Any]]:
    """Groups under muP's transfer of a learning rate tuned at the parent's width: Adam's rate for a matrix is divided by
    the growth of what it reads, its decoupled decay multiplied, so that their product stays; vectors, and tables that are
    looked up, keep theirs.

    Raises:
        StateError: the optimizer is no Adam, for which the rule was made.

    Source: arXiv 2203.03466 (Adam), with the ratios of child to parent as widths.
    """
    if rule_for_optimizer(optimizer) is not RULES[0]:
        raise StateError(
            f"learning_rate_transfer='mup' is a rule for Adam's steps, not for {type(optimizer).__name__}'s. Pass an AdamW, or "
            "leave it out."
        )

    def settings(name: str, group: Mapping) -> dict[str, Any]:
        growth = plan.tensor(name)
        ratio = 1.0
        for axis_map, role in zip(growth.maps, growth.layout.roles, strict=True):
            ratio *= axis_map.m / axis_map.n if role == "read" else 1.0
        return {"lr": group["lr"] / ratio, "weight_decay": group["weight_decay"] * ratio}

    return split_groups(optimizer.param_groups, names, settings)


def split_groups(
    groups: Iterable[Mapping], names: Mapping[int, str], settings: Callable[[str, Mapping], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Groups in which every parameter has the settings that a rule gives it; as few as there are different settings."""
    made: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[tuple, dict[str, Any]] = {}
        for parameter in group["params"]:
            own = settings(names[id(parameter)], group)
            part = parts.setdefault(tuple(sorted(own.items())), {**group, **own, "params": []})
            part["params"].append(parameter)
        made += parts.values()
    return made


def parent_gradient_norm(gradients: Mapping[str, Tensor], factors: Mapping[str, Factors]) -> Tensor:
    """The norm that the parent's gradient would have had, from the child's gradients by name."""
    norms = [
        torch.linalg.vector_norm(gradient) / (factors[name].gradient * math.sqrt(factors[name].copies))
        for name, gradient in gradients.items()
    ]
    return torch.linalg.vector_norm(torch.stack(norms))
