"""Escape: how far a grown model has left the subspace that its parent's weights span in it.

A copying growth starts inside the *cloned subspace*: all copies of an entry are equal, up to the factors of their maps.
With `P` the projector onto it, per tensor and summed over tensors before the root,

    state  = |w - P w| / |w|            update = |u - P u| / |u|,   u = w - w_0

`P` takes the mean over the copies of each entry, along each axis by the growth's own maps (`SpaceMap.source`, with the
factors of `W` where the axis writes and of `R` where it reads), and over layers that copy one layer. Both are exactly 0.0
for copies that are equal bit for bit: the mean is taken of the differences to the first copy. Copies stay so where the
machine's kernels treat equal columns equally: seen in float32 on CPUs; in float64 MKL adds up columns in an order that
depends on their place, so that copies part by rounding (1e-16), unless `MKL_CBWR=COMPATIBLE` is in the environment.

A growth that copies nothing has no cloned subspace. For it `outside` says which share of the update's energy `|u|^2` lies
outside the parent's slice: in coordinates without a source, and in layers that are new. For copies `outside` is what new
coordinates and layers take (0 in whole widths); `state` and `update` are None for growths that copy nothing.

Source: named in arXiv 2604.04281, whose formula is not known; this one is ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..growth.maps import SpaceMap
from ..growth.plan import GrowthPlan


@dataclass(frozen=True)
class Escape:
    """How far a model has left its parent's subspace.

    Args:
        copies: whether the growth copies, so that there is a cloned subspace.
        state, update: relative norms outside the cloned subspace; None where nothing is copied, or nothing moved.
        outside: share of the update's energy outside the parent's slice; None where nothing moved.
        families: the same three for each family of tensors, such as `self_attn.q_proj`.
    """

    copies: bool
    state: float | None
    update: float | None
    outside: float | None
    families: Mapping[str, Mapping[str, float | None]]

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "families": {name: dict(values) for name, values in self.families.items()}}


@dataclass
class _Energies:
    """Sums of squares of some tensors: of state and update, whole and beside the subspace."""

    state: float = 0.0
    state_beside: float = 0.0
    update: float = 0.0
    update_beside: float = 0.0
    outside: float = 0.0

    def add(self, other: _Energies) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def ratios(self, copies: bool) -> dict[str, float | None]:
        moved = self.update > 0
        return {
            "state": sqrt(self.state_beside / self.state) if copies and self.state > 0 else None,
            "update": sqrt(self.update_beside / self.update) if copies and moved else None,
            "outside": self.outside / self.update if moved else None,
        }


def copies_entries(plan: GrowthPlan) -> bool:
    """Whether a growth holds any entry or layer of its parent more than once."""
    spaces = any(bool((axis_map.copies > 1).any()) for name in plan.names for axis_map in plan.tensor(name).maps)
    return spaces or any(len(group) > 1 for group in _kept_layers(plan).values())


@torch.no_grad()
def escape(plan: GrowthPlan, now: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Escape:
    """The escape of a model under the plan that grew it.

    Args:
        plan: the growth. now: its tensors by name. start: those that it started from, on any device.

    Returns:
        The `Escape`; the tensors are untouched.
    """
    copies = copies_entries(plan)
    whole = _Energies()
    families: dict[str, _Energies] = defaultdict(_Energies)
    for names in _by_source(plan).values():
        kept = [name for name in names if not _is_new_layer(plan, name)]
        states = {name: now[name] for name in names if now[name].is_floating_point()}
        updates = {name: now[name] - start[name].to(now[name].device) for name in states}
        for name in states:
            energy = _Energies(_square(states[name]), 0.0, _square(updates[name]))
            if name not in kept:
                energy.state_beside, energy.update_beside, energy.outside = energy.state, energy.update, energy.update
            else:
                axis_maps = plan.tensor(name).maps
                inside = _masked(updates[name], axis_maps)
                energy.outside = _square(updates[name] - inside)
                if copies:
                    energy.state_beside = _square(states[name] - _projected(plan, name, kept, states))
                    energy.update_beside = _square(updates[name] - _projected(plan, name, kept, updates))
            whole.add(energy)
            families[family(plan, name)].add(energy)
    return Escape(copies, **whole.ratios(copies), families={n: e.ratios(copies) for n, e in sorted(families.items())})


def family(plan: GrowthPlan, name: str) -> str:
    """The family of a tensor: its place in a layer, or in the model where it lies in none."""
    template, stack, _ = plan.layout.template(name)
    if stack is not None:
        template = template.removeprefix(stack.prefix).removeprefix(".")
    return template.rpartition(".")[0] or template


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def _by_source(plan: GrowthPlan) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in plan.names:
        groups[plan.source_name(name)].append(name)
    return groups


def _is_new_layer(plan: GrowthPlan, name: str) -> bool:
    _, stack, layer = plan.layout.template(name)
    return stack is not None and plan.layer_maps[stack.attribute].gated[layer]


def _kept_layers(plan: GrowthPlan) -> dict[str, list[str]]:
    return {
        source: kept
        for source, names in _by_source(plan).items()
        if (kept := [name for name in names if not _is_new_layer(plan, name)])
    }


def _projected(plan: GrowthPlan, name: str, kept: list[str], tensors: Mapping[str, Tensor]) -> Tensor:
    """A tensor's projection onto the cloned subspace: over the copies along its axes, and over layers."""
    growth = plan.tensor(name)
    first = tensors[kept[0]]
    mean = first
    if len(kept) > 1:
        mean = first + sum(tensors[other] - first for other in kept[1:]) / len(kept)
    for axis, (axis_map, role) in enumerate(zip(growth.maps, growth.layout.roles, strict=True)):
        mean = _mean_of_copies(axis_map, axis_map.write if role == "write" else axis_map.read, mean, axis)
    return mean


def _masked(tensor: Tensor, axis_maps: tuple[SpaceMap, ...]) -> Tensor:
    """A tensor with zeros at coordinates without a source."""
    for axis, axis_map in enumerate(axis_maps):
        if bool(axis_map.unsourced.any()):
            tensor = tensor * _along((~axis_map.unsourced).to(tensor), axis, tensor.ndim)
    return tensor


def _mean_of_copies(axis_map: SpaceMap, factors: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """The mean over copies along an axis, each entry over its factor, at every copy, times its factor; 0 without a source."""
    if not bool((axis_map.copies > 1).any()):
        return _masked(tensor, (*(_whole(size) for size in tensor.shape[:axis]), axis_map))
    at = torch.arange(axis_map.m)
    firsts = torch.full((axis_map.n,), axis_map.m, dtype=torch.int64)
    sourced = ~axis_map.unsourced
    firsts.scatter_reduce_(0, axis_map.source[sourced], at[sourced], "amin")
    source = axis_map.source.clamp(min=0)
    first = firsts[source].clamp(max=axis_map.m - 1)
    usable = sourced & (factors != 0) & (factors[first] != 0)
    ratio = torch.where(usable, factors / torch.where(usable, factors[first], torch.ones(())), 1.0)
    scaled = bool((ratio != 1).any())
    ratio_here = _along(ratio.to(tensor), axis, tensor.ndim)
    values = tensor / ratio_here if scaled else tensor
    base = values.index_select(axis, first.to(tensor.device))
    weights = (sourced.double() / axis_map.copies[source].clamp(min=1)).to(tensor)
    shape = list(tensor.shape)
    shape[axis] = axis_map.n
    beside = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    source = source.to(tensor.device)
    beside.index_add_(axis, source, (values - base) * _along(weights, axis, tensor.ndim))
    mean = base + beside.index_select(axis, source)
    mean = mean * ratio_here if scaled else mean
    return mean * _along(sourced.to(tensor), axis, tensor.ndim)


def _whole(size: int) -> SpaceMap:
    return SpaceMap.identity(size)


def _along(values: Tensor, axis: int, ndim: int) -> Tensor:
    return values.reshape([-1 if k == axis else 1 for k in range(ndim)])
