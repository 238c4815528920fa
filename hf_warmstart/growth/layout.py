"""Layouts: for one class of models, which spaces each tensor touches.

A `Layout` is plain data keyed by state-dict name, with `{i}` for the layer: nothing is stored on modules or
parameters. It says for each tensor the expression of each axis and whether the axis *writes* its space (rows of a
projection, columns of an embedding) or *reads* it (columns of a projection), and for the model its spaces, the config
attributes that size them, its ties, its stack of layers and the tensors that end a residual branch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PreTrainedConfig

from ..errors import LayoutError
from .axes import Axis, Space, axis_from_data

Role = Literal["write", "read"]
Kind = Literal["rms_normed", "layer_normed", "linear", "elementwise", "heads", "fixed", "indexed", "routed"]

# Kinds that `width` multiplies. Vocabulary, positions, experts and head_dim keep their size.
WIDENED: tuple[Kind, ...] = ("rms_normed", "layer_normed", "linear", "elementwise", "heads")


@dataclass(frozen=True)
class TensorLayout:
    """The axes of one tensor.

    Args:
        axes: one expression for each axis, in the tensor's own order.
        roles: `"write"` or `"read"` for each axis.
        offset: what the forward adds to the tensor before use: 1 for norms that multiply by `1 + weight`, else 0.
    """

    axes: tuple[Axis, ...]
    roles: tuple[Role, ...]
    offset: float = 0.0

    def to_data(self) -> dict:
        data: dict = {"axes": [[role, axis.to_data()] for role, axis in zip(self.roles, self.axes, strict=True)]}
        return data | ({"offset": self.offset} if self.offset else {})

    @classmethod
    def from_data(cls, data: Mapping) -> TensorLayout:
        roles, axes = zip(*data["axes"], strict=True) if data["axes"] else ((), ())
        return cls(tuple(axis_from_data(axis) for axis in axes), tuple(roles), data.get("offset", 0.0))


@dataclass(frozen=True)
class SpaceInfo:
    """What acts on a space, and the config attributes (standard names) that set its size together."""

    kind: Kind
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """The layout of one class of models; see the module's docstring.

    Args:
        model_type: the config's `model_type`.
        spaces: each space by name.
        tensors: each parameter and persistent buffer by templated name.
        layers: the templated prefix of a layer, such as `model.layers.{i}`; empty when the class has no stack.
        branch_ends: templated names of the tensors that end a residual branch: zero them and the layer is an identity.
        ties: tied name -> the name that holds the tensor.
        embedding_scale: whether the model multiplies embeddings by a function of the width.
    """

    model_type: str
    spaces: dict[str, SpaceInfo]
    tensors: dict[str, TensorLayout]
    layers: str = ""
    branch_ends: tuple[str, ...] = ()
    ties: dict[str, str] = field(default_factory=dict)
    embedding_scale: bool = False

    # -- names ----------------------------------------------------------------------------------------------------

    def template(self, name: str) -> tuple[str, int | None]:
        """The templated form of a tensor's name, and the layer's number if it lies in a layer."""
        if self.layers:
            prefix, suffix = self.layers.split("{i}")
            match = re.match(re.escape(prefix) + r"(\d+)(?=\.|$)" + re.escape(suffix), name)
            if match:
                return self.layers + name[match.end() :], int(match.group(1))
        return name, None

    def tensor(self, name: str) -> TensorLayout:
        """The layout of a tensor by its full name."""
        template, _ = self.template(name)
        if template not in self.tensors:
            raise LayoutError(f"{name} is not in the layout of {self.model_type}.")
        return self.tensors[template]

    def is_branch_end(self, name: str) -> bool:
        """Whether a tensor ends a residual branch."""
        return self.template(name)[0] in self.branch_ends

    # -- sizes ----------------------------------------------------------------------------------------------------

    def sizes(self, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The size of every space of one model: heads from its config, all others from its tensors' shapes."""
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        sizes = {"kv_heads": kv_heads, "group": heads // kv_heads, "head_dim": head_dim}
        for name, shape in shapes.items():
            for axis, length in zip(self.tensor(name).axes, shape, strict=True):
                if isinstance(axis, Space):
                    sizes.setdefault(axis.name, length)
        self.check_shapes(shapes, sizes)
        return sizes

    def wrong_shapes(self, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> list[str]:
        """In words, the tensors that do not have the shape that the layout gives them."""
        wrong = []
        for name, shape in shapes.items():
            expected = tuple(axis.size(sizes) for axis in self.tensor(name).axes)
            if expected != tuple(shape):
                wrong.append(f"{name}: has {tuple(shape)}, the layout says {expected}")
        return wrong

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> None:
        """Raise, naming every tensor, unless each has the shape that the layout gives it."""
        if wrong := self.wrong_shapes(shapes, sizes):
            raise LayoutError(
                f"{len(wrong)} tensors do not have the shape that the layout of {self.model_type} gives them:\n{collect(wrong)}"
            )

    def space_of_attribute(self, attribute: str) -> str | None:
        """The space that a config attribute sizes, if any."""
        return next((name for name, info in self.spaces.items() if attribute in info.attributes), None)

    # -- plain data -----------------------------------------------------------------------------------------------

    def with_tensor(self, template: str, tensor: TensorLayout) -> Layout:
        """A copy in which one tensor has another layout."""
        return replace(self, tensors={**self.tensors, template: tensor})

    def to_data(self) -> dict:
        return {
            "model_type": self.model_type,
            "layers": self.layers,
            "spaces": {n: {"kind": s.kind, "attributes": list(s.attributes)} for n, s in self.spaces.items()},
            "tensors": {name: tensor.to_data() for name, tensor in self.tensors.items()},
            "branch_ends": list(self.branch_ends),
            "ties": self.ties,
            "embedding_scale": self.embedding_scale,
        }

    @classmethod
    def from_data(cls, data: Mapping) -> Layout:
        return cls(
            data["model_type"],
            {n: SpaceInfo(s["kind"], tuple(s["attributes"])) for n, s in data["spaces"].items()},
            {name: TensorLayout.from_data(tensor) for name, tensor in data["tensors"].items()},
            data["layers"],
            tuple(data["branch_ends"]),
            dict(data["ties"]),
            data["embedding_scale"],
        )

    def __str__(self) -> str:
        return json.dumps(self.to_data(), indent=1)


def collect(names: Iterable[str]) -> str:
    """Names one under the other, sorted, for error messages."""
    return "\n".join(f"  {name}" for name in sorted(names))
