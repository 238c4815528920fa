"""`GrowthPlan`: what follows for one model before any weight is touched; `GrowthRecord`: what the grown model carries.

The plan is the only carrier of maps. It is pure data derived from the parent's class and config and from the
`GrowthConfig`, so it can be rebuilt from a record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, SizeError, UntraceableError, WarmstartError
from ..version import __version__
from .axes import SCALE
from .child import built_child
from .config import GrowthConfig
from .configs import config_dtype, get_attribute, resize_config
from .default_operator import with_operator
from .fresh import Recipe, recipes
from .layerwise import marks
from .layout import Layout, Stack, TensorLayout
from .layouts import layout_of
from .layouts.moves import measured_scalar
from .layouts.probe import probe_config, set_dtype
from .maps import LayerMap, SpaceMap
from .operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from .sizes import Count, Sizes, TargetSizes, resolve_sizes
from .space_maps import layer_axis, space_maps
from .transform import TensorGrowth
from .twin import parent_shapes

RECORD_KEY = "warmstart"
WORK_BYTES = 16 * 2**20  # rows under way in float32, what they are drawn from, and what a forward pass leaves behind


@dataclass(frozen=True)
class GrowthRecord:
    """One growth, as it travels in `config.json` under `warmstart`: enough to rebuild the model from its parent.

    On a CPU bit for bit, on any machine, by the library's version that it names; a GPU rounds some operators differently.

    Args:
        growth_config: the `GrowthConfig` as plain data.
        operators: the operators that were used: one for width, one for depth, or both.
        changes: config attribute -> [before, after].
        parameters: [before, after]. exact: whether the growth keeps the function.
        parent: the parent's Hub id, or the name of its folder. revision: its commit, if known.
        subfolder: of the repository, in which the parent lies; empty for its top and for folders.
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
    subfolder: str = ""

    def to_dict(self) -> dict:
        """Plain data; `subfolder` stands there only where it says something."""
        return {name: value for name, value in self.__dict__.items() if value or name != "subfolder"}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GrowthRecord:
        """Read what `to_dict` wrote.

        Raises:
            WarmstartError: it is no record, or has fields that this version does not know.
        """
        known = {item.name: item.default is MISSING for item in fields(cls)}
        given = set(data) if isinstance(data, Mapping) else set()
        if unknown := sorted(given - set(known)):
            raise WarmstartError(f"A growth record has no fields {unknown}; it may come from a newer hf_warmstart.")
        if missing := sorted(name for name, needed in known.items() if needed and name not in given):
            raise WarmstartError(f"A growth record lacks {missing}: it is damaged, or none of hf_warmstart's.")
        changes = data["changes"]
        pairs = isinstance(changes, Mapping) and all(
            isinstance(v, (list, tuple)) and len(v) == 2 for v in changes.values()
        )
        if not pairs or not isinstance(data["growth_config"], Mapping):
            raise WarmstartError("A growth record is damaged: its growth_config or its changes are none.")
        return cls(**data)

    @classmethod
    def all_of(cls, config: PreTrainedConfig) -> list[GrowthRecord]:
        """The records that a config carries, oldest first."""
        return cls.all_in(getattr(config, RECORD_KEY, None))

    @classmethod
    def all_in(cls, data: Any) -> list[GrowthRecord]:
        """The records in what a config holds under `warmstart`, None for nothing, oldest first."""
        if not isinstance(data or [], list):
            raise WarmstartError(f"Growth records are a list, not {type(data).__name__}.")
        return [cls.from_dict(entry) for entry in data or []]

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
        growth_config: what was asked, with the width operator's name. model_class: the class of parent and child.
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
        found = self.layout.placed(self.target_config, self.target_shapes)
        return {n: self.layout.fitted(t, self.shapes[self.source_name(n)], self.sizes[0]) for n, t in found.items()}

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

    def is_added(self, name: str) -> bool:
        """Whether one of the child's tensors is the growth's own: in a layer that adds nothing, or in a further run of a layer.

        In a run of post-norm layers that add nothing the last one holds the old layer's final norm, and the others new ones.
        """
        template, stack, layer = self.layout.template(name)
        if stack is None:
            return False
        layers = self.layer_maps[stack.attribute]
        if stack.post_norms and template in stack.post_norms[-1]:
            followed = layer + 1 < layers.after and layers.gated[layer + 1]
            if followed or layers.gated[layer]:
                return followed
        kept = [s for s, gated in zip(layers.source[:layer], layers.gated[:layer], strict=True) if not gated]
        return layers.gated[layer] or layers.source[layer] in kept

    def tensor(self, name: str) -> TensorGrowth:
        """How one of the child's tensors grows."""
        layout = self.placed[name]
        template, stack, layer = self.layout.template(name)
        gated = stack is not None and any(self.layer_maps[stack.attribute].gated)
        operator = WIDTH_OPERATORS[self.growth_config.width_operator]
        options = self.growth_config.options
        return TensorGrowth(
            layout,
            tuple(axis.map(self.maps) for axis in layout.axes),
            name,
            self.growth_config.seed,
            operator.noise(options),
            operator.shrink(options) if self.widens else None,
            lambda start, stop: self.recipes[name].rows(self.growth_config.seed, name, start, stop),
            factor=2.0 ** -sum(self.steps[number] * power for number, power in layout.scale),
            fill=None if stack is None else self._fill(stack, template, layer, layout.offset),
            new_layer=gated and self.is_added(name),
        )

    def _fill(self, stack: Stack, template: str, layer: int, offset: float) -> float | None:
        """The constant that a tensor of a new layer, or before one, holds; None where it is carried."""
        gated = self.layer_maps[stack.attribute].gated
        if gated[layer] and template in stack.branch_ends:
            return -offset
        if gated[layer] and template in stack.gates:
            return 1.0 - offset
        inner = next((norm for norm in stack.inner_norms if template in norm), None)
        if gated[layer] and inner is not None:
            return 0.0 if inner.index(template) else 1.0 - offset
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
    def tensor_bytes(self) -> int:
        """Bytes of the child's tensors in memory, in the parent's dtype."""
        return self.parameters_after * _itemsize(self.source_config)

    @cached_property
    def output_bytes(self) -> int:
        """Bytes of the safetensors files, with their index, that `save_pretrained` writes of the child, exactly.

        Of a class that is loaded or saved in a way of its own: those of its tensors, without the files' headers.
        """
        from ..checkpoints.weights.saved_bytes import saved_bytes  # growing knows of no disk

        try:
            return saved_bytes(self)
        except (UntraceableError, CheckpointError):
            return self.tensor_bytes

    @property
    def peak_memory_bytes(self) -> int:
        """Memory that `grow` needs beside the parent: the child, and what some rows are made with."""
        return self.tensor_bytes + WORK_BYTES

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
        normed: dict[tuple, str] = {}  # by the norms: lists side by side may make layers together
        for stack in self.layout.stacks:
            deeper = not self.layer_maps[stack.attribute].is_identity
            if deeper and stack.normed and self.growth_config.depth_operator == "identity_blocks":
                where = "ends in" if stack.post_norms else "goes on from"
                words = f"{stack.prefix} {where} a norm of the stream, which a new layer applies once more"
                normed.setdefault(stack.post_norms + stack.inner_norms, words)
            if deeper and stack.scaled and self.growth_config.depth_operator == "identity_blocks":
                reasons.append(f"{stack.prefix} scales the stream, which the norm behind takes back but for its eps")
        return [*reasons, *normed.values()]

    @property
    def changes(self) -> dict[str, list]:
        """Config attributes that the growth changes: name -> [before, after]."""
        before, after = self.source_config.to_dict(), self.target_config.to_dict()
        skip = {RECORD_KEY, "transformers_version"}
        return {n: [before.get(n), after[n]] for n in after if n not in skip and before.get(n) != after[n]}

    def record(
        self, parent: str = "", revision: str | None = None, digest: str | None = None, subfolder: str = ""
    ) -> GrowthRecord:
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
            subfolder=subfolder,
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
        WarmstartError: the class cannot be built from the config. LayoutError: tensors that cannot be placed. SizeError:
            sizes that are not admissible.
    """
    shapes = parent_shapes(model_class, config)
    layout = layout or layout_of(model_class, config)
    before, shared = layout.told_sizes(config, shapes)
    count = counter(layout, config, shapes, before)
    target = resolve_sizes(layout, config, before, asked, count)
    asked = with_operator(asked, layout, before, target.spaces)
    operator = WIDTH_OPERATORS[asked.width_operator]
    _check_numbers(layout, target)
    _check_told(config, before, target, shared)
    maps = space_maps(layout, before, target, asked)
    grown_config, layer_maps, target_shapes = built_child(model_class, layout, config, target, asked, shapes, before)
    maps |= {
        name: layer_axis(layer_maps[info.attributes[0]])
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


def _check_told(config: PreTrainedConfig, before: Sizes, target: TargetSizes, shared: frozenset[str]) -> None:
    """Refuse a growth of what tensors tell in sum only: where one part ends and the next begins would matter."""
    if changed := sorted(name for name in shared if target.spaces[name] != before[name]):
        raise SizeError(f"The sizes of {changed} in {type(config).__name__} could not be told one by one.")


def counter(layout: Layout, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]], before: Sizes) -> Count:
    """Counts entries of all tensors under other sizes and depths; other layers are like those there are, on average.

    With the shapes of some tensors it counts those.
    """
    placed = layout.placed(config, shapes)
    axes = [(layout.fitted(t, shapes[name], before).axes, layout.template(name)[1]) for name, t in placed.items()]

    def count(sizes: Mapping[str, int], layers: Mapping[str, int]) -> int:
        total = 0.0
        for expressions, stack in axes:
            entries = math.prod(axis.size(sizes) for axis in expressions)
            deeper = layers[stack.attribute] / get_attribute(config, stack.attribute) if stack is not None else 1.0
            total += entries * deeper
        return round(total)

    return count


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
