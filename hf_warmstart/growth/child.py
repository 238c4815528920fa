"""The child of a growth as its class builds it: config, map of each stack of layers, shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import LayoutError, SizeError
from .config import GrowthConfig
from .configs import get_attribute, resize_config
from .layout import Layout, Stack, layer_signatures
from .maps import LayerMap
from .operators import DEPTH_OPERATORS
from .sizes import Sizes, TargetSizes
from .twin import FAULTS, meta_shapes


def built_child(
    model_class: type[PreTrainedModel],
    layout: Layout,
    config: PreTrainedConfig,
    target: TargetSizes,
    asked: GrowthConfig,
    shapes: Mapping[str, tuple[int, ...]],
    before: Sizes,
) -> tuple[PreTrainedConfig, dict[str, LayerMap], dict[str, tuple[int, ...]]]:
    """The child's config, the map of each stack, and the child's tensors as the class builds them.

    Where new layers between old ones would shift a pattern that the class computes from a layer's number, they are
    appended. New layers copy only layers that the layout says they may, and follow those.

    Raises:
        SizeError: the class builds other tensors than planned, whichever way.
    """
    problems: list[str] = []
    counts = {stack.attribute: get_attribute(config, stack.attribute) for stack in layout.stacks}
    signatures = layer_signatures(shapes, layout.stacks)
    deepest = max((counts[path] for path in counts if target.layers[path] != counts[path]), default=0)
    whole = () if any(stack.special for stack in layout.stacks) else (deepest,)
    for period in (None, *whole, *range(1, deepest)) if deepest else (None,):
        layer_maps: dict[str, LayerMap] = {}
        for stack in layout.stacks:
            had, after = counts[stack.attribute], target.layers[stack.attribute]
            able = [k for k in range(had) if stack.may_copy(k, signatures)]
            made = _layer_map(stack, asked, after, period, had, able)
            if made is None:
                break
            layer_maps[stack.attribute] = made
        else:
            deeper = {path: m for path, m in layer_maps.items() if not m.is_identity}
            try:
                grown_config, built = _built(model_class, config, target, deeper)
                problem = _mismatch(layout, grown_config, layer_maps, built, shapes, (before, target.spaces))
            except SizeError as error:
                problem = str(error)
            if not problem:
                return grown_config, layer_maps, built
            problems.append(problem)
    raise SizeError(
        problems[0] if problems else f"{model_class.__name__} has no stack of layers that could be deepened."
    )


def _layer_map(
    stack: Stack, asked: GrowthConfig, after: int, period: int | None, before: int, able: Sequence[int]
) -> LayerMap | None:
    """The map of one stack: by the operator; or, with a period, new layers at the end that repeat the last ones.

    None where there is no such map: new layers copy layers of `able` alone.
    """
    if before == after:
        return LayerMap.identity(before)
    identity = asked.depth_operator == "identity_blocks"
    if period is not None:
        if not identity or period > before:
            return None
        new = tuple(before - period + k % period for k in range(after - before))
        if not set(new) <= set(able):
            return None
        return LayerMap(before, (*range(before), *new), (False,) * before + (True,) * len(new))
    if stack.reason and identity:
        raise SizeError(
            f"A new layer of {stack.prefix} cannot be an identity: {stack.reason}. Use depth_operator='stack' or 'interleave', "
            "which do not keep the function."
        )
    if stack.append and identity:
        return None
    if identity and not able:
        raise SizeError(f"None of the {before} layers {stack.prefix} is of the kind that a new layer may copy.")
    made = DEPTH_OPERATORS[asked.depth_operator].build(before, after)
    if made.after != after:
        raise SizeError(f"{asked.depth_operator} made {made.after} layers where {after} were asked for.")
    return made.copying(able) if identity and len(able) < before else made


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
    except FAULTS as error:
        raise SizeError(f"{model_class.__name__} cannot be built with {target.attributes}: {error}") from error


def _mismatch(layout: Layout, config, layer_maps, built, shapes, sizes: tuple[Sizes, Sizes]) -> str:
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
        fitted = layout.fitted(placed[name], shapes[source], sizes[0])
        expected = tuple(axis.size(sizes[1]) for axis in fitted.axes)
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
