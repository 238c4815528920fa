"""Training in the parent's coordinates: the grown run is the parent's run, step for step.

For even copies every tensor is `w' = s * tile(w)` and its gradient `G' = gamma * tile(G)`, N times each entry. One
AdamW step then moves the child exactly as the parent when

    learning rate * s        epsilon * gamma        decoupled weight decay / s

and gradients are clipped by the norm that the parent would have had, `|G|^2 = sum |G'|^2 / (gamma^2 N)`. This proves
that weights and training state were carried rightly; it is no way to train, since the child stays the parent at
several times the price.

Source: arXiv 2602.10545 states the factors for muP; measured here for every tensor of a layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import WarmstartError
from .layout import collect
from .plan import GrowthPlan


@dataclass(frozen=True)
class Factors:
    """Factors of one tensor: on the weight `s`, on the gradient `gamma`, and copies of each entry."""

    weight: float
    gradient: float
    copies: float
    shifted: bool = False  # w' = s (w + 1) - 1: decay towards zero has no counterpart unless s = 1


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
        factors[name] = Factors(weight, gradient, copies, bool(growth.layout.offset) and weight != 1.0)
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
    groups: Iterable[Mapping], names: Mapping[int, str], factors: Mapping[str, Factors]
) -> list[dict]:
    """Split optimizer groups so that all parameters of a group share their factors, and apply these.

    Args:
        groups: groups of an AdamW optimizer, with `lr`, `eps`, `weight_decay` and `params`.
        names: name of each parameter by `id`. factors: from `coordinate_factors`.

    Raises:
        WarmstartError: a norm of the form `1 + weight` would be decayed, which has no counterpart.
    """
    made = []
    for group in groups:
        by_factors: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            factor = factors[names[id(parameter)]]
            if factor.shifted and group["weight_decay"]:
                raise WarmstartError(
                    f"{names[id(parameter)]} enters as 1 + weight and is rescaled; its weight decay has no counterpart in "
                    "the parent's coordinates. Exclude it from weight decay."
                )
            by_factors.setdefault((factor.weight, factor.gradient), []).append(parameter)
        for (weight, gradient), parameters in by_factors.items():
            made.append(
                {
                    **group,
                    "params": parameters,
                    "lr": group["lr"] * weight,
                    "eps": group["eps"] * gradient,
                    "weight_decay": group["weight_decay"] / weight,
                }
            )
    return made


def parent_gradient_norm(gradients: Mapping[str, Tensor], factors: Mapping[str, Factors]) -> Tensor:
    """The norm that the parent's gradient would have had, from the child's gradients by name."""
    norms = [
        torch.linalg.vector_norm(gradient) / (factors[name].gradient * math.sqrt(factors[name].copies))
        for name, gradient in gradients.items()
    ]
    return torch.linalg.vector_norm(torch.stack(norms))
