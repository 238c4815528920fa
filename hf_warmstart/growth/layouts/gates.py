"""Gates on a normed stream: what multiplies it entry by entry, written for that alone.

A norm over a stream asks what writes the stream for factors (`t` in `operators.base`), and a nonlinearity allows none. Where
every nonlinearity on the stream's axis lies between a projection and a product with the stream, both are kept: the
gate's projection copies its rows with factor one, so that each copy of an entry meets the gate of that entry, and the
stream keeps its factors through the product.
"""

from __future__ import annotations

from .analysis import Analysis
from .terms import Term
from .values import ADDS, CONTRACTIONS, MULS, NORMS, Node, ParameterAxis, Value, base_name, carries


def gates_of(analysis: Analysis, atom: Term) -> set[ParameterAxis]:
    """The parameter axes that write gates of a stream; empty where its nonlinearities are not all of this form."""
    pending = list(dict.fromkeys(analysis.units[atom]))
    places: set[ParameterAxis] = set()
    known: set[int] = set()
    for node in pending:
        if base_name(node) != "mul" or len(node.inputs) != 2:
            continue
        found = [_Gate(analysis, atom, node, value) for value in node.inputs]
        gates = [gate for gate in found if gate.holds]
        if len(gates) == 1 and not found[0].places & found[1].places:  # a fused [gate; up] has one axis for both
            places |= gates[0].places
            known |= gates[0].nodes | {id(node)}
    return places if all(id(node) in known for node in pending) else set()


class _Gate:
    """One factor of a product, walked back to what writes it.

    Attributes:
        holds: whether it comes from projections alone, by steps on each entry, a nonlinear one among them, and goes
            nowhere but into the product. places: the axes that write it. nodes: the operations on the way, by id.
    """

    def __init__(self, analysis: Analysis, atom: Term, product: Node, value: Value):
        self.analysis, self.atom = analysis, atom
        self.places: set[ParameterAxis] = set()
        self.nodes: set[int] = set()
        self.values: list[Value] = []
        written = self._walk(value)
        made = [out for v in self.values for out in v.node.outputs]  # type: ignore[union-attr]
        uses = {id(user) for out in made for user in analysis.consumers[id(out)]}
        nonlinear = any(id(node) in self.nodes for node in analysis.units[atom])
        self.holds = written and nonlinear and uses <= self.nodes | {id(product)}

    def _walk(self, value: Value) -> bool:
        """Whether all that gives a value its entries along the atom is written; collects the way."""
        if value.kind == "weight":
            self.places |= set(self.analysis.along(value, self.atom))
            return True
        node = value.node
        if node is None or value.kind == "constant":
            return False
        self.values.append(value)
        self.nodes.add(id(node))
        name = base_name(node)
        if name in CONTRACTIONS:
            written = {p for v in node.inputs if v.kind == "weight" for p in self.analysis.along(v, self.atom, node)}
            self.places |= written
            return bool(written)
        if name == "embedding" or name in NORMS or id(node) in self.analysis.normalising:
            return False
        inputs = [v for v in node.inputs if carries(v, self.atom)]
        if any(v.kind == "weight" for v in inputs) and name not in ADDS:
            return False
        return bool(inputs) and (len(inputs) == 1 or name in ADDS | MULS) and all(map(self._walk, inputs))
