"""From what is asked (`width=1.5`, `growth_factor=2`, `sizes={...}`) to the size of every space.

Sizes follow the config's attributes by the layout's moves, so a request is a linear system in logarithms. Its equations
are added in order of importance, each if it does not contradict those before it: what was asked by name, the width of
the residual stream, what can never grow, what `width` multiplies, what it leaves alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from transformers import PreTrainedConfig

from ..errors import SizeError
from .config import GrowthConfig
from .configs import get_attribute, resolve_attribute
from .layout import GROUPS, WIDENED, Layout, SpaceInfo

Sizes = dict[str, int]
Count = Callable[[Mapping[str, int], Mapping[str, int]], int]
NEAR = 0.005
CONSISTENT = 1e-7


@dataclass(frozen=True)
class TargetSizes:
    """The sizes of a grown model.

    Args:
        spaces: every space. attributes: config attributes (by path) that change, sizes and layers apart.
        layers: number of layers by the attribute that counts them. steps: how far each move of the layout went.
    """

    spaces: Sizes
    attributes: Sizes
    layers: Sizes
    steps: tuple[float, ...]


def resolve_sizes(
    layout: Layout, config: PreTrainedConfig, before: Sizes, asked: GrowthConfig, count: Count
) -> TargetSizes:
    """The sizes that a growth asks for.

    Args:
        count: (sizes of spaces, layers by attribute) -> entries of all tensors.

    Raises:
        SizeError: sizes that shrink, do not divide, are unknown or are not for growing; all of them named.
    """
    explicit = _explicit(layout, config, asked)
    layers = {s.attribute: get_attribute(config, s.attribute) for s in layout.stacks}
    deeper = {path: explicit.pop(path) for path in list(explicit) if path in layers}
    grown_layers = _deepen(layout, layers, asked.depth, deeper)
    if asked.growth_factor is not None:
        target = _solve(layout, config, before, layers, grown_layers, asked.growth_factor, count)
    else:
        target = target_sizes(layout, config, before, asked.width, explicit, grown_layers)
    _check(layout, config, before, target, layers)
    return target


# -- what was asked ---------------------------------------------------------------------------------------------------


def _explicit(layout: Layout, config: PreTrainedConfig, asked: GrowthConfig) -> Sizes:
    """Sizes given by name, by the path of their attribute."""
    given = {resolve_attribute(config, name): value for name, value in asked.sizes.items()}
    if asked.target_config is not None:
        given = _from_target(layout, config, asked.target_config) | given
    wrong = [f"{n}={v!r}" for n, v in given.items() if not isinstance(v, int) or isinstance(v, bool) or v < 1]
    if wrong:
        raise SizeError(f"Sizes are positive integers; got {', '.join(sorted(wrong))}.")
    movable = {path for move in layout.moves for path in move.attributes} | {s.attribute for s in layout.stacks}
    unknown = [
        name for name, value in given.items() if name not in movable and value != get_attribute(config, name, None)
    ]
    if unknown:
        raise SizeError(
            f"{sorted(unknown)} cannot be grown. What {layout.model_type} grows by name: {sorted(growable(layout))}."
        )
    _check_heads(config, {path: value for path, value in given.items() if path in movable}, movable)
    return given


def growable(layout: Layout) -> set[str]:
    """Attributes by which a model can be grown."""
    found = {s.attribute for s in layout.stacks}
    for move in layout.moves:
        if all(layout.spaces[name].kind in WIDENED for name in move.spaces):
            found |= set(move.attributes)
    return found


def _check_heads(config: PreTrainedConfig, given: Sizes, movable: set[str]) -> None:
    """Query heads come in whole groups for each key/value head."""
    for path in [p for p in given if p.rpartition(".")[2] in ("num_attention_heads", "num_key_value_heads")]:
        level = path.removesuffix(path.rpartition(".")[2])
        heads_path, kv_path = level + "num_attention_heads", level + "num_key_value_heads"
        if not {heads_path, kv_path} <= movable:
            continue  # one of them follows from the other
        kv_heads = given.get(kv_path, get_attribute(config, kv_path, None))
        heads = given.get(heads_path, get_attribute(config, heads_path, None))
        if kv_heads and heads and heads % kv_heads:
            raise SizeError(
                f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}. Pass both so that it is."
            )


def _from_target(layout: Layout, config: PreTrainedConfig, target: Mapping) -> Sizes:
    """The sizes that a target config changes."""
    if target.get("model_type", config.model_type) != config.model_type:
        raise SizeError(
            f"The target config is for {target['model_type']!r}, the model is {config.model_type!r}. A growth keeps the class."
        )
    reverse = {own: standard for standard, own in config.attribute_map.items()}
    names = {path for move in layout.moves for path in move.attributes} | {s.attribute for s in layout.stacks}
    current = config.to_dict()
    return {
        reverse.get(name, name): value
        for name, value in target.items()
        if reverse.get(name, name) in names and value is not None and value != current.get(name)
    }


def _deepen(layout: Layout, layers: Sizes, depth: float | None, explicit: Sizes) -> Sizes:
    """Layers of each stack. `depth` multiplies the main stack, and its partner in an encoder-decoder model."""
    grown = layers | explicit
    if depth is None or explicit:
        return grown
    if not layers:
        raise SizeError(
            f"{layout.model_type} has no stack of layers that an attribute counts, so it cannot be deepened."
        )
    main = layout.stacks[0].attribute
    level = main.rpartition(".")[0]
    for path, count in layers.items():
        if path.rpartition(".")[0] != level:
            continue
        deeper = Fraction(depth).limit_denominator(1000) * count
        if deeper.denominator != 1:
            near = [f"{Fraction(k, count)} ({k} layers)" for k in (math.floor(deeper), math.ceil(deeper))]
            raise SizeError(
                f"depth={depth} of {count} layers is {float(deeper)}. Admissible near it: {', '.join(near)}."
            )
        grown[path] = int(deeper)
    return grown


# -- the linear system ------------------------------------------------------------------------------------------------


class _System:
    """Equations `row . steps = value`, added while they do not contradict each other."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.rows = np.zeros((0, len(layout.moves)))
        self.values = np.zeros(0)

    def space(self, name: str) -> np.ndarray:
        return np.array([move.spaces.get(name, 0.0) for move in self.layout.moves])

    def attribute(self, path: str) -> np.ndarray:
        return np.array([move.attributes.get(path, 0.0) for move in self.layout.moves])

    def add(self, row: np.ndarray, value: float) -> bool:
        rows, values = np.vstack([self.rows, row]), np.append(self.values, value)
        steps = np.linalg.lstsq(rows, values, rcond=None)[0]
        if np.abs(rows @ steps - values).max() > CONSISTENT:
            return False
        self.rows, self.values = rows, values
        return True

    def steps(self) -> np.ndarray:
        return np.linalg.lstsq(self.rows, self.values, rcond=None)[0]


def target_sizes(
    layout: Layout, config: PreTrainedConfig, before: Sizes, width: float | None, explicit: Sizes, layers: Sizes
) -> TargetSizes:
    system = _System(layout)
    for path, value in explicit.items():
        current = get_attribute(config, path, None)
        if current is None:
            space, unit = implied(layout, path)
            if not system.add(system.space(space), math.log2(value / (before[space] * unit))):
                raise SizeError(
                    f"{path}={value} does not go together with the other sizes that were asked for: {explicit}."
                )
            continue
        if not system.add(system.attribute(path), math.log2(value / current)):
            raise SizeError(
                f"{path}={value} does not go together with the other sizes that were asked for: {explicit}."
            )
    spaces = layout.spaces
    ratio = Fraction(width).limit_denominator(1000) if width else Fraction(1)
    log = math.log2(ratio)
    held = _held(spaces, ratio)
    fixed = [n for n, info in spaces.items() if info.kind == "fixed"]
    for name in fixed:
        system.add(system.space(name), 0.0)
    if width and "residual" in spaces and not spaces["residual"].widens:
        raise SizeError(
            f"The width of {layout.model_type} cannot grow: {spaces['residual'].reason or 'its residual stream is fixed'}."
        )
    if width and not any(info.widens for info in spaces.values()):
        raise SizeError(f"The width of {layout.model_type} cannot grow: no attribute of its config sizes one.")
    if width:
        order = [n for n in ("residual",) if n in spaces and spaces[n].widens]
        inner = [n for n in spaces if n not in order and spaces[n].widens]
        order += sorted((n for n in inner if n not in held), key=lambda n: spaces[n].kind != "heads")
        for name in held:
            system.add(system.space(name), 0.0)
        for name in order:
            system.add(system.space(name), log)
        for name in sorted(spaces, key=lambda n: spaces[n].kind not in ("indexed", "heads")):
            if not spaces[name].widens:
                system.add(system.space(name), 0.0)
    for path, count in layers.items():  # numbers that depend on the depth
        system.add(system.attribute(path), math.log2(count / get_attribute(config, path)))
    paths = {path for move in layout.moves for path in move.attributes} - set(explicit) - set(layers)
    for path in sorted(paths):
        if not width and get_attribute(config, path, None) is None:
            system.add(system.space(implied(layout, path)[0]), 0.0)  # sizes by name: what is not named stays
        system.add(system.attribute(path), 0.0)
    steps = system.steps() if len(layout.moves) else np.zeros(0)
    if width and "residual" in spaces and abs(system.space("residual") @ steps - log) > CONSISTENT:
        own = set(spaces["residual"].attributes)
        stay = [n for n in (*fixed, *held) if set(spaces[n].attributes) & own] or held
        kept = sorted(f"{n} ({spaces[n].reason})" for n in stay)
        raise SizeError(
            f"The width of {layout.model_type} cannot grow: it would change what must stay: {', '.join(kept)}."
        )
    after, broken = {}, []
    for name in spaces:
        size = before[name] * 2 ** float(system.space(name) @ steps) if len(steps) else before[name]
        if spaces[name].kind == "layers":
            size = layers[spaces[name].attributes[0]]
        after[name] = round(size)
        if abs(size - round(size)) > 1e-6 * size:
            broken.append(f"{name} {before[name]} -> {size:.6g}")
    if broken:
        raise SizeError(_does_not_divide(layout, before, width, broken))
    attributes = {}
    for path in sorted({path for move in layout.moves for path in move.attributes}):
        current = get_attribute(config, path, None)
        grown = float(system.attribute(path) @ steps)
        if isinstance(current, int) and abs(grown) > CONSISTENT and path not in layers:
            exact = current * 2.0**grown
            if abs(exact - round(exact)) > 1e-6 * exact:
                raise SizeError(_does_not_divide(layout, before, width, [f"{path} {current} -> {exact:.6g}"]))
            attributes[path] = round(exact)
        elif current is None and abs(grown) > CONSISTENT:
            space, unit = implied(layout, path)
            attributes[path] = round(after[space] * unit)
    _more_active_experts(config, before, after, spaces, attributes)
    return TargetSizes(after, attributes, layers, tuple(float(s) for s in steps))


def _held(spaces: Mapping[str, SpaceInfo], ratio: Fraction) -> list[str]:
    """What `width` leaves as it is at a broken width: inner spaces that grow by whole copies only.

    The stream must grow, or nothing is widened; and heads that stay keep their groups.
    """
    if ratio.denominator == 1 or "residual" not in spaces:
        return []
    whole = [n for n, info in spaces.items() if n != "residual" and info.widens and info.kind == "whole"]
    return [*whole, *(n for n in spaces if whole and GROUPS.fullmatch(n))]


def _more_active_experts(config: PreTrainedConfig, before: Sizes, after: Sizes, spaces, attributes: Sizes) -> None:
    """Copies of experts share their tokens, so as many times more of them are active."""
    grown = {Fraction(after[n], before[n]) for n, info in spaces.items() if info.kind == "experts"} - {Fraction(1)}
    if not grown:
        return
    ratio = grown.pop()
    if grown or ratio.denominator != 1:
        raise SizeError(
            f"Experts are copied as a whole: their number can only grow by a whole factor, not by {float(ratio):g}."
        )
    path = next((p for p in active_experts(config)), None)
    if path is None:
        raise SizeError(
            f"{type(config).__name__} has no number of experts for each token that could grow with the experts."
        )
    attributes[path] = get_attribute(config, path) * int(ratio)


def active_experts(config: PreTrainedConfig) -> list[str]:
    """Paths of the attribute that says how many experts a token is sent to."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "top_k")
    parts = ["", *(f"{n}." for n in config.sub_configs if n == "text_config")]
    return [f"{part}{n}" for part in parts for n in names if isinstance(get_attribute(config, part + n, None), int)]


def implied(layout: Layout, path: str) -> tuple[str, float]:
    """For an attribute that a config leaves unset: the space that it would size, and its value over the space's size."""
    space = next(next(iter(move.spaces)) for move in layout.moves if set(move.attributes) == {path})
    return space, layout.probe[path] / layout.spaces[space].size


def _does_not_divide(layout: Layout, before: Sizes, width: float | None, wrong: list[str]) -> str:
    detail = ", ".join(sorted(wrong))
    if width is None:
        return f"The sizes that follow are no whole numbers: {detail}. Pass sizes that go together."
    unit = math.gcd(*(before[name] for name, info in layout.spaces.items() if info.widens))
    ratio = Fraction(width).limit_denominator(1000)
    near = sorted({Fraction(max(k, unit), unit) for k in (math.floor(ratio * unit), math.ceil(ratio * unit))})
    listed = ", ".join(f"{float(f):.6g} ({f})" for f in near)
    whole = {n: layout.spaces[n].reason for n in _held(layout.spaces, ratio) if layout.spaces[n].kind == "whole"}
    if whole:
        detail += "; by whole factors only: " + ", ".join(
            f"{name} ({reason})" for name, reason in sorted(whole.items())
        )
        return f"width={width} does not divide: {detail}. Pass a whole width, or sizes={{...}} by name."
    if near == [ratio]:  # what widens could grow so: something else is in the way
        return f"width={width} does not divide: {detail}. Pass sizes={{...}} by name."
    return (
        f"width={width} does not divide: {detail}. Admissible widths near it: {listed}. Or pass sizes={{...}} by name."
    )


def _solve(
    layout: Layout, config: PreTrainedConfig, before: Sizes, layers: Sizes, grown: Sizes, factor: float, count: Count
) -> TargetSizes:
    """Sizes whose parameter count is nearest to `factor` times the parent's.

    Heads and residual stream grow by one ratio; the MLP's width takes up what whole heads leave, within a factor of two
    of its proportion to the residual stream. Of all sizes within half a percent the best proportioned are taken.
    """
    goal = factor * count(before, layers)
    heads = next((n for n, i in layout.spaces.items() if i.widens and i.kind == "heads"), "residual")
    inner, path = free_width(layout, before)
    candidates: list[tuple[bool, float, TargetSizes]] = []
    for heads_after in range(before[heads], math.ceil(before[heads] * factor) + 1):
        ratio = Fraction(heads_after, before[heads])
        explicit: Sizes = {}
        if path is not None and inner is not None:
            explicit = {path: math.floor(ratio * before[inner])}
        try:
            target = target_sizes(layout, config, before, float(ratio), explicit, grown)
            if any(target.spaces[n] < before[n] for n in before):
                continue
            distortion = 0.0
            if path is not None and inner is not None:
                base = count(target.spaces | {inner: 0}, grown)
                slope = count(target.spaces | {inner: 1}, grown) - base
                even = float(ratio * before[inner])
                fitted = round(min(max((goal - base) / slope, even / 2, before[inner]), max(even * 2, before[inner])))
                target = target_sizes(layout, config, before, float(ratio), {path: fitted}, grown)
                distortion = abs(math.log(fitted / even))
        except SizeError:
            continue
        error = abs(count(target.spaces, grown) / goal - 1)
        near = error < NEAR
        candidates.append((not near, distortion if near else error, target))
    if not candidates:
        raise SizeError(f"growth_factor={factor}: no whole number of heads divides the sizes. Pass sizes.")
    return min(candidates, key=lambda candidate: candidate[:2])[2]


def free_width(layout: Layout, before: Sizes) -> tuple[str | None, str | None]:
    """The largest inner space that one attribute sizes alone, one to one, and this attribute."""
    options = []
    for move in layout.moves:
        if len(move.attributes) == len(move.spaces) == 1:
            (space,), (path,) = move.spaces, move.attributes
            info = layout.spaces[space]
            if info.widens and info.kind == "elementwise" and layout.probe[path] == info.size:
                options.append((before[space], space, path))
    if not options:
        return None, None
    _, space, path = max(options)
    return space, path


def regrouping(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[str, str] | None:
    """The spaces of key/value heads and of their groups, where more heads take smaller groups of the same queries."""
    if not {"kv_heads", "group"} <= set(before):
        return None
    fewer = after["group"] < before["group"]
    same = after["kv_heads"] * after["group"] == before["kv_heads"] * before["group"]
    return ("kv_heads", "group") if fewer and same and after["kv_heads"] % before["kv_heads"] == 0 else None


# -- the result -------------------------------------------------------------------------------------------------------


def _beside(layout: Layout, name: str) -> str:
    """What a space would have to grow along with, had that not to stay: in words, why the space shrinks."""
    own = set(layout.spaces[name].attributes)
    if not own:  # more of what it is the inside of share one width
        return " (more heads make each smaller, and no attribute is known to widen what they share)"
    near = ((n, i) for n, i in layout.spaces.items() if i.kind == "fixed" and i.reason and own & set(i.attributes))
    stay = [f"{n} must stay: {i.reason}" for n, i in near]
    return f" ({'; '.join(stay)})" if stay else ""


def _check(layout: Layout, config: PreTrainedConfig, before: Sizes, target: TargetSizes, layers: Sizes) -> None:
    problems = []
    regrouped = regrouping(before, target.spaces)
    for name, size in target.spaces.items():
        if regrouped and name in regrouped:
            continue
        info = layout.spaces[name]
        attribute = next((a for a in info.attributes if a in target.attributes), (info.attributes or (name,))[0])
        if size < before[name]:
            own = attribute if get_attribute(config, attribute, None) in (None, before[name]) else name
            what = "num_attention_heads / num_key_value_heads" if name == "group" else own
            problems.append(f"{what} would shrink from {before[name]} to {size}{_beside(layout, name)}")
        elif size > before[name] and info.kind not in (*WIDENED, "layers"):
            why = f" ({info.reason})" if info.reason else ""
            problems.append(
                f"{name} would grow from {before[name]} to {size}, which must stay{why}; it follows from "
                f"{sorted(target.attributes)}"
            )
    for path, count in layers.items():
        if target.layers[path] < count:
            problems.append(f"{path} would shrink from {count} to {target.layers[path]}")
    if problems:
        raise SizeError("Growth only adds: " + "; ".join(sorted(problems)) + ".")
    if target.spaces == before and target.layers == layers:
        raise SizeError("Nothing would grow: every size equals the parent's.")
