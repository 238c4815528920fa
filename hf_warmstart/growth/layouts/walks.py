"""Walks back along a tape: from a value, by linear steps, to the parameters that write it."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

import torch

from .terms import Term
from .values import ADDS, CONTRACTIONS, MULS, NORMS, STRUCTURAL, Node, ParameterAxis, Value, base_name, carries


@dataclass(frozen=True)
class Writer:
    """One end of a walk back: its kind, the parameter axes, the value that it reads, and the operation."""

    kind: str
    places: tuple[ParameterAxis, ...]
    reads: Value | None
    node: Node | None
    operands: tuple[Value, ...] = ()


class Walks:
    """The walks of an analysis, which knows the tape's writes in place and the last steps of norms."""

    writes: dict[int, list[Value]]
    normalising: set[int]

    def origin(self, value: Value) -> Value:
        """What a value is made of, casts and views skipped."""
        raise NotImplementedError

    def writers(
        self, value: Value, atoms: Set[Term] | None, stops: Set[int] = frozenset(), rooms: Set[int] = frozenset()
    ) -> Iterator[Writer]:
        """What gives a value its factor along some atoms (None: as a whole), found by walking back through linear steps.

        Yields parameters that write (`"write"`), gains and tables; `"stop"` where a value of `stops` (by id) is met; and
        `"blocked"` where a step is not linear. `rooms` holds what is filled in place and was met already: what is read
        from there to be written there is told by what else is written.
        """
        if id(value) in stops:
            yield Writer("stop", (), value, None)
            return
        node = value.node
        if value.kind == "weight":
            yield Writer("write", self._places(value, atoms), None, node)
            return
        if node is None or value.kind == "constant" or value.filled:
            written = [w for w in self.writes.get(value.storage, ()) if w is not value and w.kind == "activation"]
            empty = value.kind == "constant" and not bool((value.tensor != 0).any())
            if value.filled or empty or value.kind == "constant" and written:
                for other in written if value.storage not in rooms else ():
                    for source in other.node.inputs[1:]:  # type: ignore[union-attr]
                        if source.tensor.is_floating_point():  # what is written; the others say where
                            yield from self.writers(source, atoms, stops, rooms | {value.storage})
                return
            yield Writer("blocked", (), value, node)
            return
        name = base_name(node)
        acts = [v for v in node.inputs if v.kind == "activation"]
        carrying = acts if atoms is None else [v for v in acts if any(carries(v, atom) for atom in atoms)]
        if name in CONTRACTIONS:
            weights = [v for v in node.inputs if v.matrix]
            # As a whole, a product is scaled by its weight, whatever the weight's axes do.
            writing = [(v, self._places(v, atoms, node if atoms is not None else None)) for v in weights]
            if any(places for _, places in writing):
                for _, places in writing:
                    if places:
                        yield Writer("write", places, acts[0] if acts else None, node)
                return
            for other in carrying[-1:]:
                yield from self.writers(other, atoms, stops, rooms)
            return
        if name == "embedding":
            yield Writer("table", self._places(node.inputs[0], atoms), None, node)
            return
        if name in NORMS:
            for extra in node.inputs[1:]:
                first = extra is node.inputs[1]
                yield Writer(
                    "gain" if first else "write", self._places(extra, atoms), node.inputs[0] if first else None, node
                )
            if len(node.inputs) < 2:
                yield Writer("blocked", (), node.inputs[0], node)
            return
        if name in MULS and id(node) in self.normalising:
            yield Writer("blocked", (), carrying[0] if carrying else None, node)
            return
        if name in MULS:
            gains = [
                v for v in node.inputs if v.kind == "weight" and (atoms is None or any(carries(v, a) for a in atoms))
            ]
            if gains and carrying:
                yield Writer("gain", self._places(gains[0], atoms), carrying[0], node)
                return
            if len(carrying) > 1:
                yield Writer("product", (), None, node, tuple(carrying))
                return
            for other in carrying or acts[:1]:
                yield from self.writers(other, atoms, stops, rooms)
            return
        if name in ADDS or name in STRUCTURAL or name in ("sum", "mean"):
            inputs = [v for v in node.inputs if v.kind != "constant"]
            if name == "where" or name == "masked_fill":
                inputs = [v for v in inputs if v.tensor.dtype != torch.bool]
            if name in (
                "index",
                "gather",
                "index_select",
                "embedding",
                "index_add",
                "scatter",
                "scatter_add",
                "index_put",
            ):
                inputs = [v for v in node.inputs if v.tensor.is_floating_point()]
            for other in inputs:
                if atoms is None or any(carries(other, a) for a in atoms) or other.kind == "constant":
                    yield from self.writers(other, atoms, stops, rooms)
            return
        yield Writer("blocked", (), carrying[0] if carrying else None, node)

    def along(self, value: Value, atom: Term, node: Node | None = None) -> tuple[ParameterAxis, ...]:
        """The parameter axes of a weight that carry an atom; of an operand of `node`, those that it does not read."""
        return self._places(value, {atom}, node)

    def _places(self, value: Value, atoms: Set[Term] | None, node: Node | None = None) -> tuple[ParameterAxis, ...]:
        """The parameter axes of a weight that carry some atoms; of an operand of `node`, those that it does not read."""
        places: list[ParameterAxis] = []
        read = set(self._read_places(value, node)) if node is not None else set()
        for dim in value.dims:
            if atoms is None or dim.size > 1 and dim.term.roots() & atoms:
                places += sorted(dim.source - read)
        return tuple(dict.fromkeys(places))

    def _read_places(self, value: Value, node: Node) -> Iterator[ParameterAxis]:
        dims = value.dims
        if base_name(node) == "convolution":
            if len(dims) > 1:
                yield from dims[1].source
            return
        if len(dims) < 2:
            return
        inner = dims[-2] if value is node.inputs[1] else dims[-1]
        yield from inner.source

    def before_norm(self, value: Value, atoms: Set[Term]) -> Value:
        """What a norm over some atoms was given, from its image; any other value as it is."""
        node = self.origin(value).node
        if node is None or id(node) not in self.normalising:
            return value
        return next(v for v in node.inputs if v.kind == "activation" and any(carries(v, atom) for atom in atoms))

    def identity_gates(self, value: Value, entry: Value, depth: int = 0) -> set[str] | None:
        """Parameters that multiply `entry` on its way to `value` by linear steps; None where it does not get there."""
        if value is entry:
            return set()
        node = value.node
        if (
            node is None
            or depth > 40
            or base_name(node) not in STRUCTURAL | ADDS | MULS
            or id(node) in self.normalising
        ):
            return None
        for other in node.inputs:
            if other.kind != "activation":
                continue
            found = self.identity_gates(other, entry, depth + 1)
            if found is not None:
                weights = [v for v in node.inputs if v.kind == "weight"] if base_name(node) in MULS else []
                return found | {name for v in weights for dim in v.dims for name, _ in dim.source}
        return None

    def mixed(self, value: Value, entry: Value) -> Node | None:
        """The first product of activations, of the stream's size, that a walk from `value` back by linear steps meets."""
        pending, seen = [value], {id(entry)}
        while pending:
            value = pending.pop()
            node = value.node
            if node is None or id(value) in seen:
                continue
            seen.add(id(value))
            acts = [v for v in node.inputs if v.kind == "activation"]
            if base_name(node) in CONTRACTIONS and len(acts) > 1 and value.tensor.numel() == entry.tensor.numel():
                return node
            if base_name(node) in STRUCTURAL | ADDS | MULS:
                pending += acts
        return None
