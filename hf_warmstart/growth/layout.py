"""Layouts: for one class of models, which spaces each tensor touches.

A `Layout` is plain data keyed by state-dict name, with `{i}` for the layer: nothing is stored on modules or
parameters. It says for each tensor the expression of each axis and whether the axis *writes* its space (rows of a
projection, columns of an embedding) or *reads* it (columns of a projection), and for the model its spaces, how config
attributes size them, its ties, its stacks of layers and the tensors that end a residual branch.

Sizes follow attributes by *moves*, measured on the small config that the layout was derived from: multiplying some
attributes by powers of two multiplies some spaces by powers of two. What makes a space 1.5 times as large, and what the
size of a space is under other attributes, are then linear systems in logarithms.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from transformers import PreTrainedConfig

from ..errors import LayoutError
from .axes import Axis, Fixed, Space, axis_from_data
from .configs import get_attribute, layer_tag

Role = Literal["write", "read"]
Kind = Literal[
    "rms_normed", "layer_normed", "whole", "linear", "elementwise", "heads", "contracted", "rotary", "fixed", "indexed",
    "experts", "layers",
]  # fmt: skip

# Kinds whose spaces can grow by an operator's map.
WIDENED: tuple[Kind, ...] = (
    "rms_normed", "layer_normed", "whole", "linear", "elementwise", "heads", "contracted", "rotary", "indexed", "experts",
)  # fmt: skip
# Names of the spaces that number the queries for each head of keys and values, one in each stack that has a size of its own.
GROUPS = re.compile(r"group(_\d+)?")
NEAR_ZERO = 1e-6


@dataclass(frozen=True)
class TensorLayout:
    """The axes of one tensor.

    Args:
        axes: one expression for each axis, in the tensor's own order.
        roles: `"write"` or `"read"` for each axis.
        offset: what the forward adds to the tensor before use: 1 for norms that multiply by `1 + weight`, else 0.
        scale: (move, power) pairs: a number in the forward, by which the tensor's effect is multiplied, grows with these
            moves; the tensor takes it back.
    """

    axes: tuple[Axis, ...]
    roles: tuple[Role, ...]
    offset: float = 0.0
    scale: tuple[tuple[int, float], ...] = ()

    def to_data(self) -> dict:
        data: dict = {"axes": [[role, axis.to_data()] for role, axis in zip(self.roles, self.axes, strict=True)]}
        data |= {"offset": self.offset} if self.offset else {}
        return data | ({"scale": [list(pair) for pair in self.scale]} if self.scale else {})

    @classmethod
    def from_data(cls, data: Mapping) -> TensorLayout:
        roles, axes = zip(*data["axes"], strict=True) if data["axes"] else ((), ())
        scale = tuple((number, power) for number, power in data.get("scale", ()))
        return cls(tuple(axis_from_data(axis) for axis in axes), tuple(roles), data.get("offset", 0.0), scale)


@dataclass(frozen=True)
class SpaceInfo:
    """One space.

    Args:
        kind: what acts on it, and so which maps it admits.
        attributes: the config attributes that make it larger, the one that sets it first.
        size: its size in the small config that the layout was derived from.
        widens: whether `width` multiplies it.
        reason: why it cannot grow freely, where it cannot.
        scale: (move, power) pairs of the number that multiplies the scores of a contracted space.
        copied: whether new units are copies of old ones whatever the operator.
        inside: for the inside of rotated heads, an axis of `rotated` and `rest` (see `axes`) and the sizes of these two.
    """

    kind: Kind
    attributes: tuple[str, ...] = ()
    size: int = 0
    widens: bool = False
    reason: str = ""
    scale: tuple[tuple[int, float], ...] = ()
    inside: tuple = ()
    copied: bool = False


@dataclass(frozen=True)
class Move:
    """Attributes that change together and the spaces that follow, as binary logarithms of their factors."""

    attributes: Mapping[str, float]
    spaces: Mapping[str, float]


@dataclass(frozen=True)
class Stack:
    """A stack of layers.

    Args:
        prefix: templated prefix of a layer, such as `model.layers.{i}`. attribute: the config attribute that counts them.
        branch_ends: templated names of the tensors that end a residual branch: zero them and the layer is an identity.
        post_norms: for layers whose output is a norm of the stream (post-norm), the (gain, bias) of each such norm in
            order: a new layer is one more norm of what is normed already.
        inner_norms: for layers that go on from a norm of the stream, the (gain, bias) of each such norm in order: a new
            layer returns a norm of what it is given, and the norm that comes next takes it for the same.
        gates: templated names of tensors that multiply the stream itself: one in a new layer.
        reason: why no new layer can be an identity; empty where one can.
        append: whether new layers must follow all others, since the class computes something from a layer's number.
        special: whether some layers (a first one with a norm of its own) are not to be copied.
        scaled: whether a new layer multiplies the stream by a number, which the norm behind all layers takes back, but
            for its eps.
        copied: `layer_signatures` of the layers that a new one may copy; empty where it may copy any.
    """

    prefix: str
    attribute: str
    branch_ends: tuple[str, ...] = ()
    post_norms: tuple[tuple[str, ...], ...] = ()
    inner_norms: tuple[tuple[str, ...], ...] = ()
    gates: tuple[str, ...] = ()
    reason: str = ""
    append: bool = False
    special: bool = False
    scaled: bool = False
    copied: tuple[str, ...] = ()

    def may_copy(self, layer: int, signatures: Mapping[str, str]) -> bool:
        """Whether a new layer may copy a layer, by the `layer_signatures` of the model."""
        return not self.copied or signatures.get(self.prefix.replace("{i}", str(layer))) in self.copied

    @property
    def normed(self) -> bool:
        """Whether a new layer norms the stream once more."""
        return bool(self.post_norms or self.inner_norms)


@dataclass(frozen=True)
class Layout:
    """The layout of one class of models; see the module's docstring.

    Args:
        model_type: the config's `model_type`.
        spaces: each space by name.
        tensors: each parameter and persistent buffer by templated name; `{i:tag}` where layers of one kind differ.
        stacks: the stacks of layers; the first is the model's main one.
        ties: tied name -> the name that holds the tensor.
        embedding_scale: the (module, operation, number) that multiplies embeddings by a function of the width, if any.
        moves: how attributes size spaces. probe: the values of these attributes that `SpaceInfo.size` belongs to.
        notes: what could not be followed, in words.
        unresolved: (words, (move, power) pairs) of numbers in the forward that nothing takes back: a growth that changes one
            is refused.
    """

    model_type: str
    spaces: dict[str, SpaceInfo]
    tensors: dict[str, TensorLayout]
    stacks: tuple[Stack, ...] = ()
    ties: dict[str, str] = field(default_factory=dict)
    embedding_scale: tuple[str, str, int] | None = None
    moves: tuple[Move, ...] = ()
    probe: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unresolved: tuple[tuple[str, tuple[tuple[int, float], ...]], ...] = ()

    # -- names ----------------------------------------------------------------------------------------------------

    def template(self, name: str) -> tuple[str, Stack | None, int]:
        """The templated form of a tensor's name; the stack and the layer's number if it lies in a layer (else -1)."""
        for stack in self.stacks:
            prefix, suffix = stack.prefix.split("{i}")
            match = re.match(re.escape(prefix) + r"(\d+)(?=\.|$)" + re.escape(suffix), name)
            if match:
                return stack.prefix + name[match.end() :], stack, int(match.group(1))
        return name, None, -1

    def key(
        self,
        name: str,
        config: PreTrainedConfig,
        signatures: Mapping[str, str] | None = None,
        tags: dict[tuple[str, int], str] | None = None,
    ) -> str:
        """The key in `tensors` of a tensor of a model with a config; raises where there is none.

        Where layers of one name differ, a layer is told by being the last, by what the config says of it, or by the names
        of its tensors (`signatures`, by the layer's prefix). `tags` remembers what the config says.
        """
        template, stack, layer = self.template(name)
        if stack is not None:
            layers = get_attribute(config, stack.attribute)
            known: dict[tuple[str, int], str] = {} if tags is None else tags
            if (stack.attribute, layer) not in known:
                known[stack.attribute, layer] = layer_tag(config, stack.attribute, layer)
            tag = known[stack.attribute, layer]
            signature = (signatures or {}).get(stack.prefix.replace("{i}", str(layer)), "")
            words = ["last"] * (layer == layers - 1) + [f"@{signature}", tag, f"{tag}@{signature}"]
            for word in words:
                tagged = template.replace("{i}", f"{{i:{word}}}")
                if tagged in self.tensors:
                    return tagged
        if template not in self.tensors:
            raise LayoutError(f"{name} is not in the layout of {self.model_type}.")
        return template

    def tensor(self, name: str, config: PreTrainedConfig) -> TensorLayout:
        """The layout of a tensor by its full name."""
        return self.tensors[self.key(name, config)]

    def placed(self, config: PreTrainedConfig, names: Iterable[str]) -> dict[str, TensorLayout]:
        """The layout of all tensors of a model, by full name."""
        names = list(names)
        signatures = layer_signatures(names, self.stacks)
        tags: dict[tuple[str, int], str] = {}
        return {name: self.tensors[self.key(name, config, signatures, tags)] for name in names}

    # -- sizes ----------------------------------------------------------------------------------------------------

    def sizes(self, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The size of every space of one model, from its tensors' shapes and its config's attributes."""
        return self.told_sizes(config, shapes)[0]

    def told_sizes(
        self, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, int], frozenset[str]]:
        """`sizes`, and the spaces of which only the sum is known: these can only stay as they are."""
        layouts = self.placed(config, shapes)
        sizes = self.predicted_sizes(config)
        pending = [
            (axis, length)
            for name, shape in shapes.items()
            for axis, length in zip(layouts[name].axes, shape, strict=True)
        ]
        # A constant length is the probe's, not the model's (see `fitted`): what has none tells sizes first.
        pure = [(axis, length) for axis, length in pending if not any(isinstance(x, Fixed) for x in axis.leaves())]
        attributes = {name for name in self.spaces for path in self.probe if self._is_attribute(name, path)}
        for axis, length in pure:  # a size that the class rounds is what its tensors say
            names = set(axis.spaces())
            unsure = names - attributes if len(names) > 1 else names
            if len(unsure) == 1 and names <= set(sizes) and axis.size(sizes) != length:
                del sizes[unsure.pop()]
        for axis, length in (*pure, *pure, *pending, *pending):  # an axis with one unknown space tells its size
            unknown = set(axis.spaces()) - set(sizes)
            if len(unknown) == 1:
                name = unknown.pop()
                at = [axis.size({**sizes, name: k}) for k in (0, 1)]
                if at[1] > at[0] and (length - at[0]) % (at[1] - at[0]) == 0:
                    sizes[name] = (length - at[0]) // (at[1] - at[0])
        shared = self._shared_sizes(pending, sizes)
        sizes |= shared
        if missing := sorted(set(self.spaces) - set(sizes)):
            raise LayoutError(f"The sizes of {missing} in {type(config).__name__} could not be told.")
        if wrong := self.wrong_shapes(config, shapes, sizes):
            raise LayoutError(
                f"{len(wrong)} tensors do not have the shape that the layout of {self.model_type} gives them:\n{collect(wrong)}"
            )
        return sizes, frozenset(shared)

    def _shared_sizes(self, pending: Iterable[tuple[Axis, int]], sizes: Mapping[str, int]) -> dict[str, int]:
        """Sizes of two spaces that tensors tell together only, as the rotated and the other part of a head, in some way.

        Where both stay, so does each entry of the axes that they share, wherever one ends and the other begins.
        """
        known = dict(sizes)
        for axis, length in pending:
            unknown = [name for name in dict.fromkeys(axis.spaces()) if name not in known]
            if len(unknown) == 2:
                a, b = unknown
                at = [axis.size({**known, a: m, b: n}) for m, n in ((0, 0), (1, 0), (0, 1))]
                step = at[1] - at[0]
                total = (length - at[0]) // step if step > 0 and at[1] == at[2] else 0
                share = round(total * self.spaces[a].size / (self.spaces[a].size + self.spaces[b].size))
                if 0 < share < total and axis.size({**known, a: share, b: total - share}) == length:
                    known |= {a: share, b: total - share}
        return {name: size for name, size in known.items() if name not in sizes}

    def predicted_sizes(self, config: PreTrainedConfig) -> dict[str, int]:
        """Sizes by the config's attributes alone, of the spaces that they determine."""
        names = sorted(self.probe)
        values = {name: get_attribute(config, name) for name in names}
        logs = {n: math.log2(v / self.probe[n]) for n, v in values.items() if isinstance(v, int) and v > 0}
        usable = [m for m in self.moves if set(m.attributes) <= set(logs)]
        matrix = np.array([[m.attributes.get(n, 0.0) for m in usable] for n in logs]).reshape(len(logs), len(usable))
        steps, *_ = np.linalg.lstsq(matrix, np.array(list(logs.values())), rcond=None)
        if len(logs) and np.abs(matrix @ steps - np.array(list(logs.values()))).max() > NEAR_ZERO:
            # Some attribute lies off every move (two that only move together were set apart): trust shapes.
            reached = np.abs(matrix @ steps - np.array(list(logs.values()))) < NEAR_ZERO
            off = {n for n, ok in zip(logs, reached, strict=True) if not ok}
        else:
            off = set()
        found = {}
        for name, info in self.spaces.items():
            if info.kind == "layers":
                found[name] = get_attribute(config, info.attributes[0])
                continue
            if off & {a for m in self.moves if name in m.spaces for a in m.attributes}:
                alike = {v for a, v in values.items() if self._is_attribute(name, a) and isinstance(v, int)}
                found |= {name: alike.pop()} if len(alike) == 1 else {}
                continue
            size = info.size * 2 ** sum(float(s) * m.spaces.get(name, 0.0) for s, m in zip(steps, usable, strict=True))
            if abs(size - round(size)) < 1e-4 * size:
                found[name] = round(size)
        return found

    def _is_attribute(self, name: str, path: str) -> bool:
        """Whether a space is as large as an attribute says: so it is in the probe, and in each move."""
        moved = all(move.spaces.get(name, 0.0) == move.attributes.get(path, 0.0) for move in self.moves)
        return moved and self.probe[path] == self.spaces[name].size

    def fitted(self, tensor: TensorLayout, shape: tuple[int, ...], sizes: Mapping[str, int]) -> TensorLayout:
        """A tensor's layout with the constant lengths that the tensor of a model has, whose shape and sizes are given.

        A layout has its constants from the probe: what no attribute moves there stays, however long it is, and so does what
        must stay. Where one of them is all that an axis leaves open, the axis tells it.
        """
        if len(shape) != len(tensor.axes):
            return tensor
        axes = tuple(self._fitted(axis, length, sizes) for axis, length in zip(tensor.axes, shape, strict=True))
        return tensor if axes == tensor.axes else replace(tensor, axes=axes)

    def _fitted(self, axis: Axis, length: int, sizes: Mapping[str, int]) -> Axis:
        if axis.size(sizes) == length:
            return axis
        leaves = list(axis.leaves())
        kept = [leaf for leaf in leaves if isinstance(leaf, Space) and self.spaces[leaf.name].kind == "fixed"]
        still = [leaf for leaf in leaves if isinstance(leaf, Fixed)] or kept
        if len(still) != 1:
            return axis
        none, one = (axis.replaced(still[0], Fixed(n)).size(sizes) for n in (0, 1))
        if one <= none or length <= none or (length - none) % (one - none):
            return axis
        return axis.replaced(still[0], Fixed((length - none) // (one - none)))

    def wrong_shapes(
        self, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]
    ) -> list[str]:
        """In words, the tensors that do not have the shape that the layout gives them."""
        wrong = []
        layouts = self.placed(config, shapes)
        for name, shape in shapes.items():
            expected = tuple(axis.size(sizes) for axis in self.fitted(layouts[name], shape, sizes).axes)
            if expected != tuple(shape):
                wrong.append(f"{name}: has {tuple(shape)}, the layout says {expected}")
        return wrong

    # -- plain data -----------------------------------------------------------------------------------------------

    def with_tensor(self, template: str, tensor: TensorLayout) -> Layout:
        """A copy in which one tensor has another layout."""
        return replace(self, tensors={**self.tensors, template: tensor})

    def to_data(self) -> dict:
        return {
            "model_type": self.model_type,
            "spaces": {name: _plain(info) for name, info in self.spaces.items()},
            "stacks": [_plain(stack) for stack in self.stacks],
            "tensors": {name: tensor.to_data() for name, tensor in self.tensors.items()},
            "ties": self.ties,
            "embedding_scale": list(self.embedding_scale) if self.embedding_scale else None,
            "moves": [[dict(m.attributes), dict(m.spaces)] for m in self.moves],
            "probe": dict(self.probe),
            "notes": list(self.notes),
            "unresolved": _lists(self.unresolved),
        }

    @classmethod
    def from_data(cls, data: Mapping) -> Layout:
        spaces = {
            name: SpaceInfo(
                **{
                    **s,
                    "attributes": tuple(s["attributes"]),
                    "scale": tuple(map(tuple, s.get("scale", ()))),
                    "inside": _tuples(s.get("inside", ())),
                }
            )
            for name, s in data["spaces"].items()
        }
        stacks = tuple(
            Stack(
                **{
                    **s,
                    "branch_ends": tuple(s.get("branch_ends", ())),
                    "post_norms": tuple(map(tuple, s.get("post_norms", ()))),
                    "inner_norms": tuple(map(tuple, s.get("inner_norms", ()))),
                    "gates": tuple(s.get("gates", ())),
                    "copied": tuple(s.get("copied", ())),
                }
            )
            for s in data["stacks"]
        )
        return cls(
            data["model_type"],
            spaces,
            {name: TensorLayout.from_data(tensor) for name, tensor in data["tensors"].items()},
            stacks,
            dict(data["ties"]),
            tuple(data["embedding_scale"]) if data["embedding_scale"] else None,
            tuple(Move(attributes, moved) for attributes, moved in data["moves"]),
            dict(data["probe"]),
            tuple(data["notes"]),
            _tuples(data["unresolved"]),
        )

    def __str__(self) -> str:
        return json.dumps(self.to_data(), indent=1)


def layer_signatures(names: Iterable[str], stacks: Iterable[Stack]) -> dict[str, str]:
    """For each layer (by its prefix), a short digest of the names of its tensors."""
    suffixes: dict[str, list[str]] = {}
    for stack in stacks:
        start, end = (re.escape(part) for part in stack.prefix.split("{i}"))
        pattern = re.compile(rf"({start}\d+{end})(?=\.|$)(.*)")
        for name in names:
            if match := pattern.match(name):
                suffixes.setdefault(match.group(1), []).append(match.group(2))
    return {layer: hashlib.sha256("\n".join(sorted(s)).encode()).hexdigest()[:6] for layer, s in suffixes.items()}


def _tuples(data):
    """Nested lists as nested tuples."""
    return tuple(_tuples(part) for part in data) if isinstance(data, (list, tuple)) else data


def _plain(item: SpaceInfo | Stack) -> dict:
    """A record as plain data, without what is empty."""
    data = {name: value for name, value in item.__dict__.items() if value or name in ("kind", "attributes")}
    return {name: _lists(value) for name, value in data.items()}


def _lists(data):
    """Nested tuples as nested lists."""
    return [_lists(part) for part in data] if isinstance(data, tuple) else data


def collect(names: Iterable[str]) -> str:
    """Names one under the other, sorted, for error messages."""
    return "\n".join(f"  {name}" for name in sorted(names))
