"""Smaller models of a model's own family: growth's arithmetic of sizes run the other way, for configs alone.

No weight is made smaller here: a smaller config is for a proxy that is trained from scratch. As with a growth, `head_dim`,
vocabulary, positions, state sizes and experts stay; the number of heads sets the width, the MLP follows in proportion, and
the first layers are kept, as many as hold every kind of layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import SizeError
from .configs import get_attribute, layer_tag, resize_config
from .layout import Layout, layer_signatures
from .layouts import layout_of
from .maps import LayerMap
from .plan import RECORD_KEY, counter
from .sizes import Sizes, free_width, target_sizes
from .twin import parent_shapes

NO_HEADS = 16  # models without heads take the width in sixteenths
ALIGNED = 8  # MLP widths keep the multiple of 8 that matrix products like


@dataclass(frozen=True)
class SmallerSize:
    """One size of a family.

    Args:
        width: its width over the model's. layers: of each stack, by the attribute that counts them.
        entries: numbers in its layers (embeddings, head and final norm apart).
        named: sizes by the path of their attribute, which say the rest.
    """

    width: Fraction
    layers: Mapping[str, int]
    entries: int
    named: Mapping[str, int]

    def shape_distortion(self, deepest: int) -> float:
        """How far width over depth is from the model's, as the logarithm of a factor."""
        return abs(math.log(float(self.width) * deepest / next(iter(self.layers.values()))))


class SmallerModels:
    """What a model's family holds below it.

    Args:
        model_class: the class. config: the model's config.

    Raises:
        SizeError: the model has no stack of layers, or nothing of it can be smaller.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig):
        self.model_class, self.config = model_class, config
        shapes = parent_shapes(model_class, config)
        self.layout: Layout = layout_of(model_class, config)
        self.before: Sizes = self.layout.told_sizes(config, shapes)[0]
        if not self.layout.stacks:
            raise SizeError(
                f"{type(config).__name__} has no stack of layers that an attribute counts: it has no proxies."
            )
        self.counts: Sizes = {s.attribute: get_attribute(config, s.attribute) for s in self.layout.stacks}
        self.main = self.layout.stacks[0].attribute
        inside = {name: shape for name, shape in shapes.items() if self.layout.template(name)[1] is not None}
        self._count = counter(self.layout, config, inside, self.before)
        self._signatures = layer_signatures(shapes, self.layout.stacks)
        self.entries = self._count(self.before, self.counts)

    @property
    def deepest(self) -> int:
        """The model's own number of layers."""
        return self.counts[self.main]

    def sizes(self) -> list[SmallerSize]:
        """All admissible sizes, the model's own included, the smallest first."""
        found = []
        for width, named, spaces in self._widths():
            for layers in self._depths():
                found.append(SmallerSize(width, layers, self._count(spaces, layers), named))
        return sorted(found, key=lambda size: (size.entries, size.width))

    def config_of(self, size: SmallerSize) -> PreTrainedConfig:
        """The config of a size, once the class was built from it in shapes alone.

        Raises:
            SizeError: the config or the class refuses it; their words are kept.
        """
        target = target_sizes(
            self.layout, self.config, self.before, float(size.width), dict(size.named), dict(size.layers)
        )
        fewer = {
            path: LayerMap(self.counts[path], tuple(range(count)), (False,) * count)
            for path, count in size.layers.items()
            if count != self.counts[path]
        }
        config = resize_config(self.config, target.attributes, fewer)
        if hasattr(config, RECORD_KEY):
            delattr(config, RECORD_KEY)
        config._name_or_path = ""
        built = parent_shapes(self.model_class, config)
        if wrong := sorted(self._misbuilt(config, built, target.spaces)):
            raise SizeError(f"{self.model_class.__name__} builds other sizes than {dict(size.named)}: {wrong[:5]}.")
        return config

    def _misbuilt(
        self, config: PreTrainedConfig, built: Mapping[str, tuple[int, ...]], spaces: Sizes
    ) -> Iterator[str]:
        for name, size in self.layout.told_sizes(config, built)[0].items():
            if spaces[name] != size:
                yield f"{name} {size} for {spaces[name]}"

    def _widths(self) -> Iterator[tuple[Fraction, Sizes, Sizes]]:
        """(width, sizes by name, sizes of spaces) of every admissible width up to the model's own."""
        movable = {path for move in self.layout.moves for path in move.attributes}
        level = self.main.removesuffix(self.main.rpartition(".")[2])
        heads_path, kv_path = level + "num_attention_heads", level + "num_key_value_heads"
        heads = get_attribute(self.config, heads_path, None) if heads_path in movable else None
        kv_heads = get_attribute(self.config, kv_path, None) if kv_path in movable else None
        inner, inner_path = free_width(self.layout, self.before)
        for k in range(1, (heads or NO_HEADS) + 1):
            width = Fraction(k, heads or NO_HEADS)
            named: Sizes = {}
            if inner is not None and inner_path is not None:
                unit = math.gcd(self.before[inner], ALIGNED)
                named[inner_path] = max(1, round(width * self.before[inner] / unit)) * unit
            choices = [named]
            if heads and kv_heads:
                choices += [{heads_path: k, kv_path: math.gcd(k, kv_heads), **named}]
            for choice in choices:
                try:
                    target = target_sizes(self.layout, self.config, self.before, float(width), choice, self.counts)
                except SizeError:
                    continue
                if all(1 <= size <= self.before[name] for name, size in target.spaces.items()) or k == heads:
                    yield width, choice, target.spaces
                    break

    def _depths(self) -> Iterator[Sizes]:
        """Layers of each stack that holds every kind of layer still; stacks of one part become shallower together."""
        level = self.main.rpartition(".")[0]
        beside = [path for path in self.counts if path.rpartition(".")[0] == level]
        for layers in range(1, self.deepest + 1):
            fewer = {path: max(1, round(self.counts[path] * layers / self.deepest)) for path in beside}
            if all(self._kinds(path, count) == self._kinds(path, self.counts[path]) for path, count in fewer.items()):
                yield self.counts | fewer

    def _kinds(self, path: str, layers: int) -> set[tuple]:
        """The kinds of the first layers of the stacks that an attribute counts."""
        prefixes = [stack.prefix for stack in self.layout.stacks if stack.attribute == path]
        return {
            (layer_tag(self.config, path, k), *(self._signatures.get(p.replace("{i}", str(k))) for p in prefixes))
            for k in range(layers)
        }
