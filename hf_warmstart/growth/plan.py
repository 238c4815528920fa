"""`GrowthPlan`: what follows for one model before any weight is touched; `GrowthRecord`: what the grown model carries.

The plan is the only carrier of maps. It is pure data derived from the parent's class and config and from the
`GrowthConfig`, so it can be rebuilt from a record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import LayoutError, SizeError, WarmstartError
from ..version import __version__
from .axes import SCALE, axis_from_data
from .config import GrowthConfig
from .configs import config_dtype, get_attribute, resize_config
from .fresh import Recipe, recipes
from .layerwise import marks
from .layout import Layout, SpaceInfo, Stack, TensorLayout
from .layouts import layout_of
from .layouts.moves import measured_scalar
from .layouts.probe import probe_config, set_dtype
from .maps import LayerMap, SpaceMap
from .operators import DEPTH_OPERATORS, WIDTH_OPERATORS, WidthOperator
from .operators.base import copy_map, even
from .sizes import Sizes, TargetSizes, regrouping, resolve_sizes
from .transform import TensorGrowth
from .twin import meta_shapes

RECORD_KEY = "warmstart"


@dataclass(frozen=True)
class GrowthRecord:
    """One growth, as it travels in `config.json` under `warmstart`: enough to rebuild the model bit for bit.

    Args:
        growth_config: the `GrowthConfig` as plain data.
        operators: the operators that were used: one for width, one for depth, or both.
        changes: config attribute -> [before, after].
        parameters: [before, after]. exact: whether the growth keeps the function.
        parent: the parent's Hub id, or the name of its folder. revision: its commit, if known.
        parent_digest: sha256 of the parent's tensors, in the order of their names.
        library_version: version of hf_warmstart.
    """

    growth_config: dict
    operators: list[str]
    changes: dict[str, list]
    parameters: list[int]
    exact: bool
    parent: str = ""
    revision: str | None = None
    parent_digest: str | None = None
    library_version: str = __version__

    def to_dict(self) -> dict:
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GrowthRecord:
        return cls(**data)

    @classmethod
    def all_of(cls, config: PreTrainedConfig) -> list[GrowthRecord]:
        """The records that a config carries, oldest first."""
        return [cls.from_dict(data) for data in getattr(config, RECORD_KEY, None) or []]

    def parent_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The parent's config, from the grown model's."""
        data = config.to_dict()
        data |= {name: before for name, (before, _) in self.changes.items()}
        data[RECORD_KEY] = (getattr(config, RECORD_KEY, None) or [])[:-1]
        return type(config).from_dict(data)


@dataclass(frozen=True)
class GrowthPlan:
    """What a growth does to one model.

    Args:
        growth_config: what was asked. model_class: the class of parent and child.
        source_config: the parent's config. target_config: the child's.
        layout: the class's layout. maps: each space's map. layer_maps: each stack's map, by the attribute that counts it.
        sizes: every space before and after. steps: how far each of the layout's moves went.
        shapes: the parent's tensors. target_shapes: the child's.
    """

    growth_config: GrowthConfig
    model_class: type[PreTrainedModel]
    source_config: PreTrainedConfig
    target_config: PreTrainedConfig
    layout: Layout
    maps: Mapping[str, SpaceMap]
    layer_maps: Mapping[str, LayerMap]
    sizes: tuple[dict[str, int], dict[str, int]]
    steps: tuple[float, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    target_shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    # -- tensors --------------------------------------------------------------------------------------------------

    @cached_property
    def names(self) -> list[str]:
        """Names of the child's tensors (tied ones once), in a fixed order."""
        return list(self.target_shapes)

    @cached_property
    def placed(self) -> Mapping[str, TensorLayout]:
        """The layout of each of the child's tensors."""
        return self.layout.placed(self.target_config, self.target_shapes)

    @property
    def layer_map(self) -> LayerMap:
        """The map of the main stack of layers."""
        if not self.layout.stacks:
            return LayerMap.identity(0)
        return self.layer_maps[self.layout.stacks[0].attribute]

    def source_name(self, name: str) -> str:
        """The parent's tensor that a child's tensor grows from."""
        template, stack, layer = self.layout.template(name)
        if stack is None:
            return name
        return template.replace("{i}", str(self.layer_maps[stack.attribute].source[layer]))

    def tensor(self, name: str) -> TensorGrowth:
        """How one of the child's tensors grows."""
        layout = self.placed[name]
        template, stack, layer = self.layout.template(name)
        new_layer = stack is not None and self.layer_maps[stack.attribute].gated[layer]
        operator = WIDTH_OPERATORS[self.growth_config.width_operator]
        options = self.growth_config.options
        return TensorGrowth(
            layout,
            tuple(axis.map(self.maps) for axis in layout.axes),
            name,
            self.growth_config.seed,
            operator.noise(options),
            operator.shrink(options) if self.widens else None,
            lambda: self.recipes[name].make(self.growth_config.seed, name),
            factor=2.0 ** -sum(self.steps[number] * power for number, power in layout.scale),
            fill=None if stack is None else self._fill(stack, template, layer, layout.offset),
            new_layer=new_layer,
        )

    def _fill(self, stack: Stack, template: str, layer: int, offset: float) -> float | None:
        """The constant that a tensor of a new layer, or before one, holds; None where it is carried."""
        gated = self.layer_maps[stack.attribute].gated
        if gated[layer] and template in stack.branch_ends:
            return -offset
        if gated[layer] and template in stack.gates:
            return 1.0 - offset
        followed = layer + 1 < len(gated) and gated[layer + 1]
        for number, norm in enumerate(stack.post_norms):
            # A run of post-norm layers that add nothing norms one vector again and again: only the last norm of the run
            # keeps gain and bias. Norms before the last of an old layer are its own.
            final = number == len(stack.post_norms) - 1
            if template in norm and (followed if final else gated[layer]):
                return 0.0 if norm.index(template) else 1.0 - offset
        return None

    @cached_property
    def recipes(self) -> Mapping[str, Recipe]:
        """How the class initialises each tensor of the child."""
        return recipes(self.model_class, self.target_config)

    # -- what follows ---------------------------------------------------------------------------------------------

    @property
    def widens(self) -> bool:
        """Whether any space grows."""
        return self.sizes[0] != self.sizes[1]

    @property
    def operators(self) -> list[str]:
        """Names of the operators that the growth uses."""
        width = [self.growth_config.width_operator] if self.widens else []
        return width + ([self.growth_config.depth_operator] if self.deepens else [])

    @property
    def deepens(self) -> bool:
        """Whether any stack grows."""
        return not all(layer_map.is_identity for layer_map in self.layer_maps.values())

    @cached_property
    def parameters_before(self) -> int:
        """Entries of the parent's tensors, tied ones once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def parameters_after(self) -> int:
        """Entries of the child's tensors, tied ones once."""
        return sum(math.prod(shape) for shape in self.target_shapes.values())

    @property
    def growth_factor(self) -> float:
        """Parameters after over parameters before."""
        return self.parameters_after / self.parameters_before

    @property
    def output_bytes(self) -> int:
        """Bytes of the child's tensors in the parent's dtype."""
        return self.parameters_after * _itemsize(self.source_config)

    @property
    def peak_memory_bytes(self) -> int:
        """Memory that `grow` needs beside the parent: the child, and the largest tensor three times in float32."""
        return self.output_bytes + 3 * 4 * max(math.prod(shape) for shape in self.target_shapes.values())

    @property
    def exact(self) -> bool:
        """Whether the child is planned to compute the parent's function; `certify` proves it."""
        return not self._inexact

    @property
    def reason(self) -> str:
        """Why the growth is exact, or why it is not."""
        if self._inexact:
            return "; ".join(self._inexact)
        return "; ".join((WIDTH_OPERATORS | DEPTH_OPERATORS)[name].reason for name in self.operators)

    @cached_property
    def _inexact(self) -> list[str]:
        width = WIDTH_OPERATORS[self.growth_config.width_operator]
        reasons = [width.reason] if self.widens and not width.exact else []
        if not all(layer_map.exact for layer_map in self.layer_maps.values()):
            reasons.append(DEPTH_OPERATORS[self.growth_config.depth_operator].reason)
        for stack in self.layout.stacks:
            deeper = not self.layer_maps[stack.attribute].is_identity
            if deeper and stack.post_norms and self.growth_config.depth_operator == "identity_blocks":
                reasons.append(f"{stack.prefix} ends in a norm of the stream, which a new layer applies once more")
        return reasons

    @property
    def changes(self) -> dict[str, list]:
        """Config attributes that the growth changes: name -> [before, after]."""
        before, after = self.source_config.to_dict(), self.target_config.to_dict()
        skip = {RECORD_KEY, "transformers_version"}
        return {n: [before.get(n), after[n]] for n in after if n not in skip and before.get(n) != after[n]}

    def record(self, parent: str = "", revision: str | None = None, digest: str | None = None) -> GrowthRecord:
        """The record of this growth."""
        return GrowthRecord(
            self.growth_config.to_dict(),
            self.operators,
            self.changes,
            [self.parameters_before, self.parameters_after],
            self.exact,
            parent,
            revision,
            digest,
        )

    def __str__(self) -> str:
        rows = [(name, before, after) for name, (before, after) in self.changes.items() if not isinstance(after, list)]
        rows.append(("parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}"))
        width = max(len(row[0]) for row in rows)
        table = "\n".join(f"  {name:<{width}}  {before!s:>14} -> {after!s}" for name, before, after in rows)
        return (
            f"{self.model_class.__name__}, {' + '.join(self.operators)}, seed {self.growth_config.seed}\n{table}\n"
            f"  growth factor {self.growth_factor:.3f}, {self.output_bytes / 2**20:,.1f} MiB\n"
            f"  {'exact' if self.exact else 'not exact'}: {self.reason}"
        )


def make_plan(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    asked: GrowthConfig,
    layout: Layout | None = None,
) -> GrowthPlan:
    """The plan for a class and config. `layout` replaces the derived one (for checks of the checker).

    Raises:
        LayoutError: tensors that cannot be placed. SizeError: sizes that are not admissible.
    """
    layout = layout or layout_of(model_class, config)
    shapes = meta_shapes(model_class, config)
    before = layout.sizes(config, shapes)
    count = _counter(layout, config, shapes)
    target = resolve_sizes(layout, config, before, asked, count)
    operator = WIDTH_OPERATORS[asked.width_operator]
    _check_numbers(layout, target)
    maps = {
        name: _space_map(operator, name, info, before[name], target, asked)
        if before[name] != target.spaces[name]
        else SpaceMap.identity(before[name])
        for name, info in layout.spaces.items()
        if info.kind != "layers" and name not in (regrouping(before, target.spaces) or ())
    }
    if pair := regrouping(before, target.spaces):
        maps |= _regrouped(pair, before, target.spaces)
    grown_config, layer_maps, target_shapes = _grown(model_class, layout, config, target, asked, shapes)
    maps |= {
        name: _layer_axis(layer_maps[info.attributes[0]])
        for name, info in layout.spaces.items()
        if info.kind == "layers"
    }
    _check_target_config(asked, grown_config)
    if layout.embedding_scale:
        scale = 1.0
        if before["residual"] != target.spaces["residual"] and operator.shrink(asked.options) is None:
            scale = _multiplier(model_class, layout, config) / _multiplier(model_class, layout, grown_config)
        maps[SCALE] = SpaceMap.identity(1).scaled(scale)
    plan = GrowthPlan(
        asked,
        model_class,
        config,
        grown_config,
        layout,
        maps,
        layer_maps,
        (before, target.spaces),
        target.steps,
        shapes,
        target_shapes,
    )
    _check_maps(plan)
    return plan


def _check_maps(plan: GrowthPlan) -> None:
    """Every axis has a map: expressions that join spaces which cannot grow together are refused now, not half-way."""
    for name, tensor in {plan.layout.template(n)[0]: (n, t) for n, t in plan.placed.items()}.values():
        try:
            for axis in tensor.axes:
                axis.map(plan.maps)
        except WarmstartError as error:
            raise SizeError(f"{name} cannot grow so: {error}") from error


def _check_numbers(layout: Layout, target: TargetSizes) -> None:
    """Refuse a growth that changes a number in the forward which no tensor can take back."""
    changed = {words for words, powers in layout.unresolved if abs(sum(target.steps[n] * p for n, p in powers)) > 1e-6}
    if changed:
        raise SizeError(f"{layout.model_type} cannot grow so: {'; '.join(sorted(changed)[:3])}.")


def _counter(layout: Layout, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]):
    """Counts entries of all tensors under other sizes and depths; new layers are like those there are, on average."""
    axes = [(tensor.axes, layout.template(name)[1]) for name, tensor in layout.placed(config, shapes).items()]

    def count(sizes: Mapping[str, int], layers: Mapping[str, int]) -> int:
        total = 0.0
        for expressions, stack in axes:
            entries = math.prod(axis.size(sizes) for axis in expressions)
            deeper = layers[stack.attribute] / get_attribute(config, stack.attribute) if stack is not None else 1.0
            total += entries * deeper
        return round(total)

    return count


def _layer_axis(layer_map: LayerMap) -> SpaceMap:
    """The map of an axis with one part for each layer (per-layer embeddings): new layers' parts are not read yet."""
    read = torch.tensor([0.0 if gated else 1.0 for gated in layer_map.gated], dtype=torch.float64)
    return SpaceMap.build(layer_map.before, layer_map.source, 1.0, read)


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
    if info.kind == "experts":
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


def _grown(
    model_class: type[PreTrainedModel],
    layout: Layout,
    config: PreTrainedConfig,
    target: TargetSizes,
    asked: GrowthConfig,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[PreTrainedConfig, dict[str, LayerMap], dict[str, tuple[int, ...]]]:
    """The child's config, the map of each stack, and the child's tensors as the class builds them.

    Where new layers between old ones would shift a pattern that the class computes from a layer's number, they are
    appended.

    Raises:
        SizeError: the class builds other tensors than planned, whichever way.
    """
    problems: list[str] = []
    counts = {stack.attribute: get_attribute(config, stack.attribute) for stack in layout.stacks}
    deepest = max((counts[path] for path in counts if target.layers[path] != counts[path]), default=0)
    whole = () if any(stack.special for stack in layout.stacks) else (deepest,)
    for period in (None, *whole, *range(1, deepest)) if deepest else (None,):
        layer_maps: dict[str, LayerMap] = {}
        for stack in layout.stacks:
            before, after = counts[stack.attribute], target.layers[stack.attribute]
            made = _layer_map(stack, asked, before, after, period)
            if made is None:
                break
            layer_maps[stack.attribute] = made
        else:
            deeper = {path: m for path, m in layer_maps.items() if not m.is_identity}
            try:
                grown_config, built = _built(model_class, config, target, deeper)
                problem = _mismatch(layout, grown_config, layer_maps, built, shapes, target.spaces)
            except SizeError as error:
                problem = str(error)
            if not problem:
                return grown_config, layer_maps, built
            problems.append(problem)
    raise SizeError(
        problems[0] if problems else f"{model_class.__name__} has no stack of layers that could be deepened."
    )


def _layer_map(stack: Stack, asked: GrowthConfig, before: int, after: int, period: int | None) -> LayerMap | None:
    """The map of one stack: by the operator; or, with a period, new layers at the end that repeat the last ones."""
    if before == after:
        return LayerMap.identity(before)
    identity = asked.depth_operator == "identity_blocks"
    if period is not None:
        if not identity or period > before:
            return None
        new = tuple(before - period + k % period for k in range(after - before))
        return LayerMap(before, (*range(before), *new), (False,) * before + (True,) * len(new))
    if stack.reason and identity:
        raise SizeError(
            f"A new layer of {stack.prefix} cannot be an identity: {stack.reason}. Use depth_operator='stack' or 'interleave', "
            "which do not keep the function."
        )
    if stack.append and identity:
        return None
    made = DEPTH_OPERATORS[asked.depth_operator].build(before, after)
    if made.after != after:
        raise SizeError(f"{asked.depth_operator} made {made.after} layers where {after} were asked for.")
    return made


def _built(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    target: TargetSizes,
    layer_maps: Mapping[str, LayerMap],
) -> tuple[PreTrainedConfig, dict[str, tuple[int, ...]]]:
    """The child's config and tensors."""
    grown = resize_config(config, target.attributes, layer_maps)
    try:
        return grown, meta_shapes(model_class, grown)
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, AssertionError) as error:
        raise SizeError(f"{model_class.__name__} cannot be built with {target.attributes}: {error}") from error


def _mismatch(layout: Layout, config, layer_maps, built, shapes, sizes: Sizes) -> str:
    """In words, how the class's tensors differ from those planned; empty where they do not."""
    wrong = []
    try:
        placed = layout.placed(config, built)
    except LayoutError as error:
        return f"The target config builds other tensors than planned: {error}"
    for name, shape in built.items():
        template, stack, layer = layout.template(name)
        source = name if stack is None else template.replace("{i}", str(layer_maps[stack.attribute].source[layer]))
        if source not in shapes:
            wrong.append(f"{name} has no source in the parent")
            continue
        expected = tuple(axis.size(sizes) for axis in placed[name].axes)
        if expected != tuple(shape):
            wrong.append(f"{name}: has {tuple(shape)}, the plan says {expected}")
    planned = {
        template.replace("{i}", str(k))
        for template, stack, layer in (layout.template(name) for name in shapes)
        if stack is not None
        for k, source in enumerate(layer_maps[stack.attribute].source)
        if source == layer
    }
    wrong += [f"{name} would be dropped" for name in planned - set(built)]
    return "The target config builds other tensors than planned:\n" + "\n".join(sorted(wrong)[:12]) if wrong else ""


def _check_target_config(asked: GrowthConfig, grown: PreTrainedConfig) -> None:
    """All that a target config says holds for the child: what no growth changes is refused, not dropped."""
    made, own = grown.to_dict(), grown.attribute_map
    given = {own.get(name, name) for name in asked.sizes}
    given |= {name for name, value in made.items() if marks(name, value, 1)}  # these follow the layers
    wanted = {own.get(name, name): value for name, value in (asked.target_config or {}).items()}
    different = [
        f"{n}={v!r} (stays {made.get(n)!r})" for n, v in wanted.items() if n not in given and made.get(n) != v
    ]
    if different:
        raise SizeError(
            f"The target config asks for what a growth does not change: {', '.join(sorted(different))}. Give it the parent's "
            "values, or pass sizes={...} by name."
        )


def _multiplier(model_class: type[PreTrainedModel], layout: Layout, config: PreTrainedConfig) -> float:
    """What the class multiplies embeddings by at this width, in the config's dtype.

    Measured, not computed, since classes round it to a dtype of their own; on a model that is small in all that does not
    change the width.
    """
    reduced = resize_config(
        probe_config(config),
        {
            path: get_attribute(config, path)
            for move in layout.moves
            if "residual" in move.spaces
            for path in move.attributes
        },
    )
    set_dtype(reduced, config_dtype(config) or torch.float32)
    value = measured_scalar(model_class, reduced, layout.embedding_scale)
    if value is None:
        raise WarmstartError(f"{model_class.__name__}: the multiplier of the embeddings could not be measured.")
    return value


def _itemsize(config: PreTrainedConfig) -> int:
    return (config_dtype(config) or torch.float32).itemsize
