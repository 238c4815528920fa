"""From what is asked (`width=1.5`, `growth_factor=2`, `sizes={...}`) to the size of every space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from transformers import PreTrainedConfig

from ..errors import SizeError
from .config import GrowthConfig
from .configs import standard_name
from .layout import WIDENED, Layout

Sizes = dict[str, int]
_LAYERS = "num_hidden_layers"
NEAR = 0.005


@dataclass(frozen=True)
class TargetSizes:
    """The sizes of a grown model: every space, and the number of layers."""

    spaces: Sizes
    layers: int

    def attributes(self, layout: Layout, config: PreTrainedConfig) -> dict[str, int]:
        """Config attributes (standard names) that give these sizes; those that stay are left out."""
        values = {"num_attention_heads": self.spaces["kv_heads"] * self.spaces["group"]}
        for name, info in layout.spaces.items():
            if info.kind in WIDENED and name != "group":
                values |= dict.fromkeys(info.attributes, self.spaces[name])
        if getattr(config, "num_key_value_heads", None) is None:
            values.pop("num_key_value_heads", None)
        current = {name: getattr(config, name, None) for name in values}
        return {name: value for name, value in values.items() if current[name] != value}


def count_parameters(layout: Layout, sizes: Mapping[str, int], layers: int) -> int:
    """Entries of all tensors, tied ones once."""
    total = 0
    for name, tensor in layout.tensors.items():
        entries = math.prod(axis.size(sizes) for axis in tensor.axes)
        total += entries * (layers if "{i}" in name else 1)
    return total


def resolve_sizes(layout: Layout, config: PreTrainedConfig, before: Sizes, asked: GrowthConfig) -> TargetSizes:
    """The sizes that a growth asks for.

    Raises:
        SizeError: sizes that shrink, do not divide, are unknown or are not for growing; all of them named.
    """
    layers = config.num_hidden_layers
    explicit = _explicit(layout, config, asked)
    after = dict(before)
    if asked.growth_factor is not None:
        layers = _deepen(layers, asked.depth, explicit)
        after = _solve(layout, config, before, config.num_hidden_layers, layers, asked.growth_factor)
    else:
        if asked.width is not None:
            after = _widen(layout, before, asked.width, explicit)
        after |= {name: value for name, value in explicit.items() if name in before}
        layers = _deepen(layers, asked.depth, explicit)
    _check(layout, config, before, after, layers)
    return TargetSizes(after, layers)


def _explicit(layout: Layout, config: PreTrainedConfig, asked: GrowthConfig) -> Sizes:
    """Sizes given by name, as spaces (and layers)."""
    given = {standard_name(config, name): value for name, value in asked.sizes.items()}
    if asked.target_config is not None:
        given = _from_target(layout, config, asked.target_config) | given
    wrong = [f"{n}={v!r}" for n, v in given.items() if not isinstance(v, int) or isinstance(v, bool) or v < 1]
    if wrong:
        raise SizeError(f"Sizes are positive integers; got {', '.join(sorted(wrong))}.")
    sizes: Sizes = {}
    heads = given.pop("num_attention_heads", None)
    kv_heads = given.pop("num_key_value_heads", None)
    if heads or kv_heads:
        old_heads = config.num_attention_heads
        old_kv = getattr(config, "num_key_value_heads", None) or old_heads
        has_kv = getattr(config, "num_key_value_heads", None) is not None
        heads = heads or old_heads
        kv_heads = kv_heads or (old_kv if has_kv else heads)
        if heads % kv_heads:
            raise SizeError(
                f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}. Pass both so that it is."
            )
        sizes |= {"kv_heads": kv_heads, "group": heads // kv_heads}
    unknown = []
    for name, value in given.items():
        space = layout.space_of_attribute(name)
        if name == _LAYERS:
            sizes[_LAYERS] = value
        elif space is not None and (layout.spaces[space].kind in WIDENED or value == getattr(config, name)):
            sizes[space] = value
        else:
            unknown.append(name)
    if unknown:
        growable = sorted(
            {a for s in layout.spaces.values() if s.kind in WIDENED for a in s.attributes}
            | {_LAYERS, "num_attention_heads"}
        )
        raise SizeError(f"{sorted(unknown)} cannot be grown. What {layout.model_type} grows by name: {growable}.")
    return sizes


def _from_target(layout: Layout, config: PreTrainedConfig, target: Mapping) -> Sizes:
    """The sizes that a target config changes."""
    if target.get("model_type", config.model_type) != config.model_type:
        raise SizeError(
            f"The target config is for {target['model_type']!r}, the model is {config.model_type!r}. A growth keeps the class."
        )
    reverse = {own: standard for standard, own in config.attribute_map.items()}
    names = {a for info in layout.spaces.values() for a in info.attributes} | {_LAYERS, "num_attention_heads"}
    current = config.to_dict()
    return {
        reverse.get(name, name): value
        for name, value in target.items()
        if reverse.get(name, name) in names and value is not None and value != current.get(name)
    }


def _deepen(layers: int, depth: float | None, explicit: Sizes) -> int:
    if _LAYERS in explicit:
        return explicit[_LAYERS]
    if depth is None:
        return layers
    deeper = Fraction(depth).limit_denominator(1000) * layers
    if deeper.denominator != 1:
        near = [f"{Fraction(k, layers)} ({k} layers)" for k in (math.floor(deeper), math.ceil(deeper))]
        raise SizeError(f"depth={depth} of {layers} layers is {float(deeper)}. Admissible near it: {', '.join(near)}.")
    return int(deeper)


def _multiplied(layout: Layout, before: Sizes) -> list[str]:
    """Spaces that `width` multiplies. One key/value head stays one, and the group grows instead."""
    heads = "group" if before["kv_heads"] == 1 and before["group"] > 1 else "kv_heads"
    return [
        name
        for name, info in layout.spaces.items()
        if info.kind in WIDENED and (info.kind != "heads" or name == heads)
    ]


def _widen(layout: Layout, before: Sizes, width: float, explicit: Sizes) -> Sizes:
    ratio = Fraction(width).limit_denominator(1000)
    spaces = [name for name in _multiplied(layout, before) if name not in explicit]
    wrong = sorted(name for name in spaces if (ratio * before[name]).denominator != 1)
    if wrong:
        unit = math.gcd(*(before[name] for name in spaces))
        near = sorted({Fraction(max(k, unit), unit) for k in (math.floor(ratio * unit), math.ceil(ratio * unit))})
        listed = ", ".join(f"{float(f):.6g} ({f})" for f in near)
        detail = ", ".join(f"{name} {before[name]} -> {float(ratio * before[name]):.6g}" for name in wrong)
        raise SizeError(
            f"width={width} does not divide: {detail}. Admissible widths near it: {listed}. Or pass sizes={{...}} by name."
        )
    return before | {name: int(ratio * before[name]) for name in spaces}


def _solve(layout, config, before: Sizes, layers: int, new_layers: int, factor: float) -> Sizes:
    """Sizes whose parameter count is nearest to `factor` times the parent's.

    Heads and residual stream grow by one ratio; the MLP's width takes up what whole heads leave, within a factor of two
    of its proportion to the residual stream. Of all sizes within half a percent the best proportioned are taken.
    """
    target = factor * count_parameters(layout, before, layers)
    spaces = _multiplied(layout, before)
    heads = next(name for name in spaces if layout.spaces[name].kind == "heads")
    inner = next((name for name in spaces if layout.spaces[name].kind == "elementwise"), None)
    candidates: list[tuple[bool, float, Sizes]] = []
    for count in range(before[heads], math.ceil(before[heads] * factor) + 1):
        ratio = Fraction(count, before[heads])
        if (ratio * before["residual"]).denominator != 1:
            continue
        sizes = before | {name: math.floor(ratio * before[name]) for name in spaces}
        distortion = 0.0
        if inner is not None:
            base = count_parameters(layout, sizes | {inner: 0}, new_layers)
            slope = count_parameters(layout, sizes | {inner: 1}, new_layers) - base
            even = float(ratio * before[inner])
            fitted = round(min(max((target - base) / slope, even / 2, before[inner]), max(even * 2, before[inner])))
            sizes[inner] = fitted
            distortion = abs(math.log(fitted / even))
        error = abs(count_parameters(layout, sizes, new_layers) / target - 1)
        near = error < NEAR
        candidates.append((not near, distortion if near else error, sizes))
    if not candidates:
        raise SizeError(f"growth_factor={factor}: no whole number of heads divides {config.hidden_size}. Pass sizes.")
    return min(candidates, key=lambda candidate: candidate[:2])[2]


def _check(layout: Layout, config: PreTrainedConfig, before: Sizes, after: Sizes, layers: int) -> None:
    problems = []
    for name, size in after.items():
        if size < before[name]:
            attribute = (layout.spaces[name].attributes or (name,))[0] if name in layout.spaces else name
            shown = (before[name], size)
            if name == "group":
                attribute, shown = (
                    "num_attention_heads / num_key_value_heads",
                    (before[name], size),
                )
            problems.append(f"{attribute} would shrink from {shown[0]} to {shown[1]}")
    if layers < config.num_hidden_layers:
        problems.append(f"num_hidden_layers would shrink from {config.num_hidden_layers} to {layers}")
    heads = after["kv_heads"] * after["group"]
    if not getattr(config, "head_dim", None) and after["residual"] != heads * before["head_dim"]:
        problems.append(
            f"hidden_size {after['residual']} over {heads} heads makes head_dim {after['residual'] / heads:g}, which must "
            f"stay {before['head_dim']}; pass hidden_size={heads * before['head_dim']} or "
            f"num_attention_heads={after['residual'] // before['head_dim']}"
        )
    if problems:
        raise SizeError("Growth only adds: " + "; ".join(sorted(problems)) + ".")
    if after == before and layers == config.num_hidden_layers:
        raise SizeError("Nothing would grow: every size equals the parent's.")
