"""The map of each space of one growth: by the operator, or by what the space's kind asks for."""

from __future__ import annotations

import torch

from ..errors import SizeError
from .axes import axis_from_data
from .config import GrowthConfig
from .layout import Layout, SpaceInfo
from .maps import LayerMap, SpaceMap
from .operators import WIDTH_OPERATORS, WidthOperator
from .operators.base import copy_map, even
from .sizes import Sizes, TargetSizes, regrouping


def space_maps(layout: Layout, before: Sizes, target: TargetSizes, asked: GrowthConfig) -> dict:
    """Maps by the name of the space; regrouped heads also by the pair of theirs.

    Raises:
        SizeError: a space cannot grow so by this operator.
    """
    operator = WIDTH_OPERATORS[asked.width_operator]
    pair = regrouping(before, target.spaces)
    maps: dict = {}
    for name, info in layout.spaces.items():
        if info.kind == "layers" or pair and name in pair:
            continue
        if before[name] == target.spaces[name]:
            maps[name] = SpaceMap.identity(before[name])
        else:
            maps[name] = _space_map(operator, name, info, before[name], target, asked)
    return maps | (_regrouped(pair, before, target.spaces) if pair else {})


def _space_map(
    operator: WidthOperator, name: str, info: SpaceInfo, before: int, target: TargetSizes, asked: GrowthConfig
) -> SpaceMap:
    """The map of one space, by the operator or by what its kind asks for."""
    after = target.spaces[name]
    if info.kind == "contracted":
        # Both sides of the product are written alike: f^2 copies (s'/s) = 1 for scores multiplied by s.
        source = torch.arange(after) % before
        copies = torch.bincount(source, minlength=before)[source].double()
        change = 2.0 ** sum(target.steps[number] * power for number, power in info.scale)
        factor = (1 / (copies * change)).sqrt()
        return SpaceMap.build(before, source, factor, 1 / (copies * factor))
    if info.kind == "rotary":
        return _rotary_map(name, info, before, target)
    if info.kind == "indexed":
        # Appended rows: nothing that was looked up before changes, and nothing new has to be silent.
        return SpaceMap.build(
            before, torch.where(torch.arange(after) < before, torch.arange(after), -1), silent="none"
        )
    if info.kind == "experts" or info.copied and operator.name == "reference_slice":
        return copy_map(before, after, "elementwise", even)
    if info.kind != "whole":
        return operator.build(before, after, info.kind, asked.options)
    if after % before:
        raise SizeError(
            f"{name} can only grow by whole factors ({info.reason}): {before} -> {after}. Pass a multiple of {before}."
        )
    if operator.name == "reference_slice":
        if name == "residual":
            raise SizeError(
                f"reference_slice cannot keep the function of this model ({info.reason}). Use perturbed_copy or uneven_copy."
            )
        return copy_map(before, after, "elementwise", even)
    return operator.build(before, after, "elementwise", asked.options)


def _rotary_map(name: str, info: SpaceInfo, before: int, target: TargetSizes) -> SpaceMap:
    """The map of the inside of rotated heads.

    Angles of width n are among those of width c n, at every c-th place (theta^(-2i/n) = theta^(-2ic/(cn))), so old pairs
    keep their angles there. New coordinates of queries are zero, those of keys are fresh. Both sides take the square root
    of what the scores' factor changes by.
    """
    after = target.spaces[name]
    if after % before:
        raise SizeError(
            f"The inside of rotated heads ({name}) can only grow by whole factors, where its angles nest: {before} -> {after}."
        )
    form, sizes = info.inside
    if any(size * before % info.size for _, size in sizes):
        raise SizeError(
            f"The inside of rotated heads ({name}) cannot grow: which of its {before} entries are rotated could not be told."
        )
    ratio = after // before
    maps = {}
    for part, size in sizes:
        n = size * before // info.size
        source = torch.full((n * ratio,), -1)
        source[torch.arange(n) * (ratio if part == "rotated" else 1)] = torch.arange(n)
        maps[part] = SpaceMap.build(n, source)
    nested = axis_from_data(form).map(maps)
    factor = 2.0 ** (-sum(target.steps[number] * power for number, power in info.scale) / 2)
    return nested.scaled(factor)


def _regrouped(pair: tuple[str, str], before: Sizes, after: Sizes) -> dict:
    """Maps where key/value heads are copied for smaller groups: query heads stay, each finds its keys where they were."""
    heads, _ = pair
    copies = after[heads] // before[heads]
    return {
        heads: SpaceMap.build(before[heads], torch.arange(after[heads]) // copies, 1.0, 1.0 / copies),
        pair: SpaceMap.identity(before[heads] * before[pair[1]]),
    }


def layer_axis(layer_map: LayerMap) -> SpaceMap:
    """The map of an axis with one part for each layer (per-layer embeddings): new layers' parts are not read yet."""
    read = torch.tensor([0.0 if gated else 1.0 for gated in layer_map.gated], dtype=torch.float64)
    return SpaceMap.build(layer_map.before, layer_map.source, 1.0, read)
