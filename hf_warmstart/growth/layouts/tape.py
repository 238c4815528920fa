"""The tape: one forward pass of a small model, written down operation by operation, with the terms of every axis.

Every tensor gets a `Value`: for each axis a term (see `terms`) and, where the value is made of parameters alone, the
parameter axes that it comes from. Every operation becomes a `Node`. What operations do to axes is said once for each
kind of operation; one that is neither known here nor pointwise by the framework's own word is opaque, which
keeps its axes from growing rather than growing them wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .rules import RULES, opaque
from .terms import Tangle, Term, cut, unify
from .values import (
    ALIKE,
    CREATES,
    NORMS,
    PRODUCES,
    SAME,
    VIEWS,
    Dim,
    Event,
    Kind,
    Node,
    ParameterAxis,
    Value,
    fresh,
    matrices,
)


class Tape(TorchDispatchMode):
    """Records a forward pass; see the module's docstring."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.nodes: list[Node] = []
        self.events: list[Event] = []
        self.unknown: dict[str, str] = {}
        self.tangles: list[str] = []
        self.values: dict[int, Value] = {}
        self.writes: dict[int, list[Value]] = {}
        self.parameters: dict[str, Value] = {}
        self.calls: dict[str, tuple[list[Value], list[Value]]] = {}
        self.roles: dict[ParameterAxis, set[str]] = {}
        self._scope: list[str] = [""]
        self._by_storage: dict[int, Value] = {}
        self._constants: dict[int, list[Value]] = {}
        for name, tensor in parameters.items():
            dims = tuple(Dim(Term(size), frozenset({(name, k)})) for k, size in enumerate(tensor.shape))
            value = Value(dims, "weight", None, tensor, tensor.untyped_storage()._cdata, name)
            self.parameters[name] = self.values[id(tensor)] = self._by_storage[value.storage] = value
        self._model = model

    # -- running --------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Run the model on inputs and write everything down; returns the model's output."""
        for value in inputs.values():
            if isinstance(value, Tensor):
                made = self._new(value, tuple(fresh(size) for size in value.shape), "activation", None)
                self.event("input", made.dims, Node("input", [], ""))
        handles = []
        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name), with_kwargs=True))
        try:
            with torch.no_grad(), self:
                return self._model(**inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable:
        def hook(module, args, kwargs):
            self._scope.append(name)
            read = [self.values[id(t)] for t in _tensors([args, list(kwargs.values())]) if id(t) in self.values]
            self.calls.setdefault(name, (read, []))

        return hook

    def _leave(self, name: str) -> Callable:
        def hook(module, args, kwargs, output):
            self._scope.pop()
            made = output.to_tuple() if hasattr(output, "to_tuple") else output
            self.calls[name][1].extend(self.values[id(t)] for t in _tensors([made]) if id(t) in self.values)

        return hook

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        inputs = [self.value(t) for t in _tensors([args, list(kwargs.values())])]
        out = func(*args, **kwargs)
        outs = list(_tensors([out]))
        node = Node(name, inputs, self._scope[-1], _scalars(args, kwargs, inputs))
        self.nodes.append(node)
        plain = name.rstrip("_") if name.endswith("_") and not name.startswith("__") else name
        rule = RULES.get(plain)
        try:
            if plain in CREATES:
                dims = [[fresh(size) for size in t.shape] for t in outs]
            elif rule is not None:
                dims = rule(self, node, args, kwargs, outs)
            elif torch.Tag.pointwise in func.tags or plain in ALIKE:
                dims = self.pointwise(node, inputs, outs)
            else:
                self.unknown.setdefault(plain, f"{[tuple(v.tensor.shape) for v in inputs]}")
                dims = (
                    opaque(self, node, args, kwargs, outs) if inputs else [[fresh(s) for s in t.shape] for t in outs]
                )
        except Tangle as tangle:
            self.tangles.append(f"{node}: {tangle}")
            self.opaque(node)
            dims = [[fresh(size) for size in t.shape] for t in outs]
        kinds = {value.kind for value in inputs}
        kind: Kind = "activation" if "activation" in kinds else "weight" if "weight" in kinds else "constant"
        if plain in CREATES:
            kind = "constant"  # made in the shape of another value, not of its numbers
        elif plain in NORMS and kind == "weight":
            kind = "activation"  # learned latents: a norm's image of them is a stream, whose axes are no parameter's
        for tensor, made in zip(outs, dims, strict=True):
            value = self._new(tensor, tuple(made), kind, node)
            if plain in _KEEPS_PARAMETER and inputs and inputs[0].parameter is not None:
                value.parameter, value.offset = inputs[0].parameter, inputs[0].offset
            elif plain == "add" and len(inputs) == 1 and inputs[0].parameter and len(node.scalars) == 1:
                value.parameter, value.offset = inputs[0].parameter, inputs[0].offset + node.scalars[0]
            value.stream = kind == "weight" and (plain in PRODUCES or any(v.stream for v in inputs))
            node.outputs.append(value)
            if name != plain or plain == "copy":
                self.writes.setdefault(value.storage, []).append(value)
                if kind == "activation":
                    self._written(value.storage)
        return out

    def value(self, tensor: Tensor) -> Value:
        """The value of a tensor; one that was never seen is a constant."""
        found = self.values.get(id(tensor))
        if found is not None:
            return found
        base = self._by_storage.get(tensor.untyped_storage()._cdata)
        if base is not None and base.tensor.shape == tensor.shape:  # `parameter.data`
            self.values[id(tensor)] = base
            self._alive = [*getattr(self, "_alive", []), tensor]
            return base
        return self._new(tensor, tuple(fresh(size) for size in tensor.shape), "constant", None)

    def _new(self, tensor: Tensor, dims: tuple[Dim, ...], kind: Kind, node: Node | None) -> Value:
        if kind != "weight":
            dims = tuple(Dim(dim.term) for dim in dims)
        value = Value(dims, kind, node, tensor, tensor.untyped_storage()._cdata)
        self.values[id(tensor)] = value
        if kind == "constant":
            self._constants.setdefault(value.storage, []).append(value)
        return value

    def _written(self, storage: int) -> None:
        """Room that was made by numbers alone and is filled in place, part by part, holds activations from then on."""
        for value in self._constants.pop(storage, ()):
            if self.values.get(id(value.tensor)) is value:  # what was written as a whole has a value of its own
                value.kind, value.filled = "activation", True

    # -- what operations do to axes -------------------------------------------------------------------------------

    def event(self, kind: str, dims: Iterable[Dim | Term], node: Node) -> None:
        for dim in dims:
            term = dim.term if isinstance(dim, Dim) else dim
            if term.size > 1:
                self.events.append(Event(kind, term, node))

    def role(self, dim: Dim, role: str) -> None:
        for place in dim.source:
            self.roles.setdefault(place, set()).add(role)

    def opaque(self, node: Node) -> None:
        for value in node.inputs:
            self.event("opaque", value.dims, node)

    def pointwise(self, node: Node, inputs: Sequence[Value], outs: Sequence[Tensor]) -> list[list[Dim]]:
        """Operands are lined up from the right; axes of equal length become one."""
        made = []
        for out in outs:
            dims = []
            for k in range(1, out.ndim + 1):
                size = out.shape[-k]
                matching = [v.dims[-k] for v in inputs if len(v.dims) >= k and v.dims[-k].size == size]
                odd = [v for v in inputs if len(v.dims) >= k and v.dims[-k].size not in (1, size)]
                if odd or any(len(v.dims) > out.ndim for v in inputs):
                    self.unknown.setdefault(
                        node.name, f"{[tuple(v.tensor.shape) for v in inputs]} -> {tuple(out.shape)}"
                    )
                    self.opaque(node)
                    return [[fresh(size) for size in t.shape] for t in outs]
                dims.append(self.join(matching) if matching else fresh(size))
            made.append(dims[::-1])
        if any(value.kind != "weight" for value in inputs):
            for value in inputs:
                for dim in value.dims:
                    self.role(dim, "write")
        return made

    def part(self, dim: Dim, start: int, stop: int, node: Node) -> Dim:
        """Neighbouring coordinates of an axis; where they cut across its structure, an axis that nothing is known of."""
        try:
            return Dim(cut(dim.term, start, stop), dim.source)
        except Tangle as tangle:
            self.tangles.append(f"{node}: {tangle}")
            self.event("opaque", [dim], node)
            return fresh(stop - start)

    def looked_up(self, value: Value, dims: Iterable[Dim], node: Node) -> None:
        """A table of constants that an activation looks up is constants still, along the axes that are kept."""
        if value.kind == "constant":
            for k, dim in enumerate(value.dims):
                varies = dim.size > 1 and not bool((value.tensor == value.tensor.select(k, 0).unsqueeze(k)).all())
                if varies and any(dim is kept for kept in dims):
                    self.event("constant", [dim], node)

    def join(self, dims: Sequence[Dim]) -> Dim:
        for other in dims[1:]:
            unify(dims[0].term, other.term)
        return Dim(dims[0].term.find(), frozenset().union(*(dim.source for dim in dims)))

    def match(self, a: Sequence[Dim], b: Sequence[Dim]) -> list[Dim]:
        return [self.join([x, y]) if x.size == y.size else (x if x.size > 1 else y) for x, y in zip(a, b, strict=True)]

    def contract(self, node: Node, a: Dim, b: Dim, left: Value, right: Value) -> None:
        """Two axes meet in a matrix product."""
        unify(a.term, b.term)
        node.axes = (a.term.find(),)
        found = matrices(left, right)
        for dim, value in ((a, left), (b, right)):
            if value in found:
                self.role(dim, "read")
        if not found and "constant" not in (left.kind, right.kind):
            self.event("contracted", [a], node)
        for value in (left, right):
            if value.kind == "constant" and bool((value.tensor != 0).any()):
                self.event("constant", [a], node)


def _tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)


def _scalars(args: Sequence, kwargs: Mapping, inputs: Sequence[Value]) -> tuple[float, ...]:
    numbers = [float(a) for a in args if isinstance(a, (int, float)) and not isinstance(a, bool)]
    numbers += [float(kwargs["alpha"])] if kwargs.get("alpha", 1) != 1 else []
    numbers += [float(kwargs["scale"])] if kwargs.get("scale") is not None else []
    for value in inputs:
        if value.kind == "constant" and value.tensor.numel() == 1 and not value.tensor.is_complex():
            numbers.append(float(value.tensor))
    return tuple(numbers)


_KEEPS_PARAMETER = SAME | VIEWS | {
    "t", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select", "split", "split_with_sizes", "unbind",
    "expand", "movedim",
}  # fmt: skip
