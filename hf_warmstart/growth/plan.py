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

from ..errors import SizeError, WarmstartError
from ..version import __version__
from .axes import SCALE
from .config import GrowthConfig
from .configs import LAYER_THRESHOLDS, config_dtype, resize_config
from .fresh import Recipe, recipes
from .layout import WIDENED, Layout
from .layouts import derive_layout
from .layouts.measure import embedding_multiplier
from .maps import LayerMap, SpaceMap
from .operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from .sizes import TargetSizes, resolve_sizes
from .transform import TensorGrowth
from .twin import build, meta_shapes

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
        layout: the class's layout. maps: each space's map. layer_map: the stack's map.
    """

    growth_config: GrowthConfig
    model_class: type[PreTrainedModel]
    source_config: PreTrainedConfig
    target_config: PreTrainedConfig
    layout: Layout
    maps: Mapping[str, SpaceMap]
    layer_map: LayerMap
    sizes: tuple[dict[str, int], dict[str, int]]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    # -- tensors --------------------------------------------------------------------------------------------------

    @cached_property
    def names(self) -> list[str]:
        """Names of the child's tensors (tied ones once), in a fixed order."""
        found = []
        for name in self.shapes:
            template, layer = self.layout.template(name)
            if layer is None:
                found.append(name)
            elif layer == 0:
                found += [template.replace("{i}", str(k)) for k in range(self.layer_map.after)]
        return found

    def source_name(self, name: str) -> str:
        """The parent's tensor that a child's tensor grows from."""
        template, layer = self.layout.template(name)
        return name if layer is None else template.replace("{i}", str(self.layer_map.source[layer]))

    def tensor(self, name: str) -> TensorGrowth:
        """How one of the child's tensors grows."""
        layout = self.layout.tensor(name)
        _, layer = self.layout.template(name)
        new_layer = layer is not None and self.layer_map.gated[layer]
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
            gate=new_layer and self.layout.is_branch_end(name),
            new_layer=new_layer,
        )

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
        return width + ([] if self.layer_map.is_identity else [self.growth_config.depth_operator])

    @cached_property
    def parameters_before(self) -> int:
        """Entries of the parent's tensors, tied ones once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def parameters_after(self) -> int:
        """Entries of the child's tensors, tied ones once."""
        return sum(self._entries(name) for name in self.names)

    def _entries(self, name: str) -> int:
        return math.prod(axis.size(self.sizes[1]) for axis in self.layout.tensor(name).axes)

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
        return self.output_bytes + 3 * 4 * max(self._entries(name) for name in self.names)

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
        if not self.layer_map.exact:
            reasons.append(DEPTH_OPERATORS[self.growth_config.depth_operator].reason)
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
    layout = layout or derive_layout(model_class, config)
    shapes = meta_shapes(model_class, config)
    before = layout.sizes(config, shapes)
    target = resolve_sizes(layout, config, before, asked)
    if target.layers != config.num_hidden_layers and not layout.layers:
        raise SizeError(f"{model_class.__name__} has no stack of layers that could be deepened.")
    operator = WIDTH_OPERATORS[asked.width_operator]
    maps = {
        name: operator.build(before[name], target.spaces[name], info.kind, asked.options)
        if info.kind in WIDENED and before[name] != target.spaces[name]
        else SpaceMap.identity(before[name])
        for name, info in layout.spaces.items()
    }
    for name in ("kv_heads", "group", "head_dim"):
        maps.setdefault(name, SpaceMap.identity(before[name]))
    layer_map = LayerMap.identity(config.num_hidden_layers)
    if target.layers != config.num_hidden_layers:
        layer_map = DEPTH_OPERATORS[asked.depth_operator].build(config.num_hidden_layers, target.layers)
        if layer_map.after != target.layers:
            raise SizeError(
                f"{asked.depth_operator} made {layer_map.after} layers where {target.layers} were asked for."
            )
    grown_config = _grown_config(model_class, layout, config, target, layer_map)
    _check_target_config(asked, grown_config)
    if layout.embedding_scale:
        scale = 1.0
        if before["residual"] != target.spaces["residual"] and operator.shrink(asked.options) is None:
            scale = _multiplier(model_class, layout, config) / _multiplier(model_class, layout, grown_config)
        maps[SCALE] = SpaceMap.identity(1).scaled(scale)
    plan = GrowthPlan(
        asked, model_class, config, grown_config, layout, maps, layer_map, (before, target.spaces), shapes
    )
    _check_target_shapes(plan)
    return plan


def _grown_config(
    model_class: type[PreTrainedModel],
    layout: Layout,
    config: PreTrainedConfig,
    target: TargetSizes,
    layer_map: LayerMap,
) -> PreTrainedConfig:
    """The child's config. Attributes that the parent leaves unset (GPT-2's `n_inner`) stay so where that suffices."""
    attributes = target.attributes(layout, config)
    layers = None if layer_map.is_identity else layer_map
    unset = {name for name in attributes if getattr(config, name, None) is None}
    if unset:
        left = resize_config(config, {n: v for n, v in attributes.items() if n not in unset}, layers)
        if not layout.wrong_shapes(meta_shapes(model_class, left), target.spaces):
            return left
    return resize_config(config, attributes, layers)


def _check_target_config(asked: GrowthConfig, grown: PreTrainedConfig) -> None:
    """All that a target config says holds for the child: what no growth changes is refused, not dropped."""
    made, own = grown.to_dict(), grown.attribute_map
    given = {own.get(name, name) for name in asked.sizes} | set(LAYER_THRESHOLDS)
    wanted = {own.get(name, name): value for name, value in (asked.target_config or {}).items()}
    different = [
        f"{n}={v!r} (stays {made.get(n)!r})" for n, v in wanted.items() if n not in given and made.get(n) != v
    ]
    if different:
        raise SizeError(
            f"The target config asks for what a growth does not change: {', '.join(sorted(different))}. Give it the parent's "
            "values, or pass sizes={...} by name."
        )


def _check_target_shapes(plan: GrowthPlan) -> None:
    """The child that the class builds has the tensors that the plan fills."""
    built = meta_shapes(plan.model_class, plan.target_config)
    if set(built) != set(plan.names):
        different = sorted(set(built) ^ set(plan.names))
        raise SizeError(f"The target config builds other tensors than planned: {different}.")
    plan.layout.check_shapes(built, plan.sizes[1])


def _multiplier(model_class: type[PreTrainedModel], layout: Layout, config: PreTrainedConfig) -> float:
    """What the class multiplies embeddings by at this width, in the config's dtype; measured on one small layer."""
    small = {name: 8 for s, info in layout.spaces.items() if info.kind == "elementwise" for name in info.attributes}
    small |= {"vocab_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    small |= {name: 0 for name in config.to_dict() if name.endswith("token_id")}
    reduced = resize_config(config, small, LayerMap(config.num_hidden_layers, (0,), (False,)))
    model = build(model_class, reduced)
    torch.nn.init.ones_(model.get_input_embeddings().weight)
    value = embedding_multiplier(model)
    if value is None:
        raise WarmstartError(f"{model_class.__name__}: the multiplier of the embeddings could not be measured.")
    return value


def _itemsize(config: PreTrainedConfig) -> int:
    return (config_dtype(config) or torch.float32).itemsize
