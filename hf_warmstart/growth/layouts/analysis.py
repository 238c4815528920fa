"""What a tape says about growth: how each atom may grow, and how each parameter axis takes part.

One pass over the tape, forward, finds for every atom (see `terms`) the facts that restrict it:

| fact | seen as | consequence |
|---|---|---|
| rms, layer | a mean of squares, or a LayerNorm, over the atom alone | maps that keep the statistic |
| unit | a nonlinearity, or a product of two activations, on each coordinate | whole units with factor one |
| batched | a batch axis of a product of two activations | heads: whole units |
| contracted | two activations meet in it | as it is (inside of heads, states) |
| constant, softmax, ordered, opaque, summed, l2 | a table of constants, a softmax, a sort ... | as it is |
| kernel, input, returned | the reach of a convolution, what the model is given, places of its output | as it is |
| indexed, scattered | looked up by number | rows appended, experts copied |
| broken | a LayerNorm's output meets the raw stream, a gain meets a raw stream | whole copies only |

and where the raw stream and its normalised image are, so that readers, gains and biases know what they touch. Backward
walks find what writes the input of a tied head, what a norm over many heads reads, and what ends a residual branch.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from .tape import Tape
from .terms import Term
from .values import (
    ADDS,
    ATTENTION,
    CONTRACTIONS,
    CREATES,
    MULS,
    NORMS,
    SAME,
    SOFTMAXES,
    STRUCTURAL,
    VIEWS,
    Dim,
    Node,
    ParameterAxis,
    Value,
    base_name,
    carries,
    matrices,
)
from .walks import Walks, Writer

KEPT = {"kernel", "input", "returned", "constant", "softmax", "ordered", "opaque", "summed", "l2"}


def roots(term: Term) -> frozenset[Term]:
    """The atoms of a term; a tape under analysis is finished, so they are looked up once."""
    return term.roots()


@dataclass
class Analysis(Walks):
    """Facts of a tape; see the module's docstring."""

    tape: Tape
    facts: dict[Term, set[str]] = field(default_factory=lambda: defaultdict(set))
    why: dict[tuple[Term, str], Node] = field(default_factory=dict)
    units: dict[Term, list[Node]] = field(default_factory=lambda: defaultdict(list))
    phases: dict[int, dict[Term, str]] = field(default_factory=dict)
    consumers: dict[int, list[Node]] = field(default_factory=lambda: defaultdict(list))
    gains: dict[ParameterAxis, list[tuple[Node, Value, float]]] = field(default_factory=lambda: defaultdict(list))
    adds: dict[ParameterAxis, list[tuple[Node, Value]]] = field(default_factory=lambda: defaultdict(list))
    reads: dict[ParameterAxis, list[tuple[Node, Value]]] = field(default_factory=lambda: defaultdict(list))
    norms: list[tuple[Node, Term, str, Value]] = field(default_factory=list)
    normalising: set[int] = field(default_factory=set)
    averages: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.writes = self.tape.writes
        for node in self.tape.nodes:
            for value in node.inputs:
                self.consumers[id(value)].append(node)
        for event in self.tape.events:
            kind = event.kind
            if kind.startswith("reduced:"):
                self._reduction(event.kind[8:], event.term, event.node)
                continue
            if kind in ("layer_norm", "rms_norm", "group_norm"):
                self._norm(
                    event.node,
                    event.term,
                    {"layer_norm": "layer", "rms_norm": "rms"}.get(kind, "group"),
                    event.node.inputs[0],
                )
                continue
            if event.node.name == "select" and not any(self.consumers[id(out)] for out in event.node.outputs):
                continue  # taken for its shape alone
            self._fact(kind, event.term, event.node)
        for node in self.tape.nodes:
            self._step(node)

    # -- facts ----------------------------------------------------------------------------------------------------

    def _fact(self, kind: str, term: Term, node: Node) -> None:
        for atom in roots(term):
            self.facts[atom].add(kind)
            self.why.setdefault((atom, kind), node)
            if kind == "unit":
                self.units[atom].append(node)

    def _norm(self, node: Node, term: Term, kind: str, value: Value) -> None:
        atoms = roots(term)
        if kind in ("rms", "layer") and term.find().form == "atom":
            self._fact(kind, term, node)
        else:
            for atom in atoms:
                self.facts[atom].add("co_normed")
        self.norms.append((node, term, kind, value))

    def _reduction(self, name: str, term: Term, node: Node) -> None:
        value = node.inputs[0]
        squared = self._is_square(value)
        if name == "mean" and squared:
            if not self._is_centred(value):
                self._norm(node, term, "rms", self._squared_input(value))
        elif name == "mean" or name in ("var", "std", "var_mean"):
            self._norm(node, term, "layer", value)
        elif name == "sum" and self._is_read(value, term, node):
            pass
        elif name in ("any", "all", "max", "min", "amax", "amin", "argmax", "argmin"):
            self._fact("ordered", term, node)
        elif name == "sum" and squared and self._is_averaged(node, term.size):
            self._norm(node, term, "rms", self._squared_input(value))
        elif name == "linalg_vector_norm" or squared:
            self._fact("l2", term, node)
        else:
            self._fact("summed", term, node)

    def _is_square(self, value: Value) -> bool:
        node = self._maker(value)
        if node is None:
            return False
        name = base_name(node)
        return (
            name == "square"
            or name == "pow"
            and node.scalars[:1] == (2.0,)
            or name == "mul"
            and len(node.inputs) == 2
            and node.inputs[0] is node.inputs[1]
        )

    def _is_averaged(self, node: Node, size: int) -> bool:
        """Whether a sum is divided by the number of its terms: a mean in two steps."""
        users = [user for out in node.outputs for user in self.consumers[id(out)]]
        found = bool(users) and all(
            base_name(u) == "div"
            and u.scalars == (float(size),)
            or base_name(u) == "mul"
            and u.scalars == (1.0 / size,)
            for u in users
        )
        self.averages |= {id(user) for user in users} if found else set()
        return found

    def _squared_input(self, value: Value) -> Value:
        return self._maker(value).inputs[0]  # type: ignore[union-attr]

    def _is_centred(self, value: Value) -> bool:
        maker = self._maker(self._squared_input(value))
        return maker is not None and base_name(maker) == "sub" and self._is_mean_of(maker.inputs[-1], maker.inputs[0])

    def _is_mean_of(self, mean: Value, value: Value) -> bool:
        node = self._maker(mean)
        return node is not None and node.name == "mean" and self.origin(node.inputs[0]) is self.origin(value)

    def _maker(self, value: Value) -> Node | None:
        """The operation that made a value, casts and copies skipped."""
        value = self.origin(value)
        return value.node

    def origin(self, value: Value) -> Value:
        while (
            value.node is not None
            and base_name(value.node) in SAME | VIEWS | {"unsqueeze", "squeeze"}
            and value.node.inputs
        ):
            value = value.node.inputs[0]
        return value

    def _is_read(self, value: Value, term: Term, node: Node) -> bool:
        """`(activation * weight).sum(axis)` is a contraction: the weight reads."""
        maker = self._maker(value)
        if maker is None or base_name(maker) != "mul" or len(maker.inputs) != 2:
            return False
        weights = [v for v in maker.inputs if v.kind == "weight"]
        others = [v for v in maker.inputs if v.kind == "activation"]
        if len(weights) != 1 or len(others) != 1:
            return False
        atoms = roots(term)
        for dim in weights[0].dims:
            if roots(dim.term) & atoms and dim.size > 1:
                for place in dim.source:
                    self.tape.roles.setdefault(place, set()).discard("write")
                    self.tape.roles[place].add("read")
                    self.reads[place].append((maker, others[0]))
                maker.axes = (*maker.axes, term)
                return True
        return False

    # -- one forward step -----------------------------------------------------------------------------------------

    def _step(self, node: Node) -> None:
        name = base_name(node)
        phases: dict[Term, str] = {}
        for value in node.inputs:
            for atom, phase in self.phases.get(id(value), {}).items():
                phases[atom] = phase if phases.get(atom, phase) == phase else "broken"
        if name in CONTRACTIONS:
            phases = self._contraction(node, phases)
        elif name == ATTENTION:
            phases = self._attention(node)
        elif name == "embedding":
            phases = dict.fromkeys(roots(node.inputs[0].dims[1].term), "raw")
        elif name in NORMS:
            phases |= dict.fromkeys({a for term in node.axes for a in roots(term)}, "normed")
            for extra in node.inputs[1:]:
                self._norm_parameter(node, extra, first=extra is node.inputs[1])
        elif name in ADDS:
            phases = self._add(node, phases)
        elif name in MULS:
            phases = self._mul(node, phases)
        elif name in CREATES:
            phases = {}
        elif name in STRUCTURAL or name in SOFTMAXES:
            if name in SOFTMAXES:
                self._nonlinear(node)
        elif name in ("sum", "mean", "var", "std", "linalg_vector_norm", "var_mean") or self._is_norm_square(node):
            pass
        elif node.outputs and any(len(v.dims) for v in node.inputs):
            self._nonlinear(node)
            phases = dict.fromkeys(phases, "broken")
        for out in node.outputs:
            if out.kind == "activation":
                present = {atom for dim in out.dims for atom in roots(dim.term)}
                self.phases[id(out)] = {atom: phase for atom, phase in phases.items() if atom in present}

    def _is_norm_square(self, node: Node) -> bool:
        """Whether an operation squares something only to average it."""
        return bool(node.outputs) and self._is_square(node.outputs[0]) and self._only_reduced(node.outputs[0])

    def _only_reduced(self, value: Value) -> bool:
        users = self.consumers[id(value)]
        return bool(users) and all(
            n.name in ("mean", "sum") or base_name(n) in SAME and all(self._only_reduced(o) for o in n.outputs)
            for n in users
        )

    def _nonlinear(self, node: Node) -> None:
        for value in node.inputs:
            if value.kind != "constant":
                for dim in value.dims:
                    if dim.size > 1:
                        self._fact("unit", dim.term, node)

    def _depthwise(self, node: Node, phases: dict[Term, str]) -> dict[Term, str]:
        """A convolution of each channel alone: its kernel scales the channel, as a gain does."""
        value = node.inputs[0]
        for weight in node.inputs[1:2]:
            for place in weight.dims[0].source:
                self.gains[place].append((node, value, 0.0))
        for bias in node.inputs[2:]:
            for place in bias.dims[0].source:
                self.adds[place].append((node, value))
        return {atom: "broken" if phase == "raw" else phase for atom, phase in phases.items()}

    def _contraction(self, node: Node, phases: dict[Term, str]) -> dict[Term, str]:
        if node.name == "convolution" and not node.axes:
            return self._depthwise(node, phases)
        left, right = node.inputs[:2]
        for value in matrices(left, right):
            for dim in value.dims:
                if node.axes and dim.term.find() is node.axes[0].find():
                    for place in dim.source:
                        self.reads[place].append((node, left if value is right else right))
        if node.name != "convolution":
            for value in node.inputs:
                self._held_by_constant(node, value)
        out_atoms = {atom for out in node.outputs for dim in out.dims for atom in roots(dim.term)}
        weight_out = {
            atom
            for value in node.inputs
            if value.kind == "weight"
            for dim in value.dims
            if not (node.axes and dim.term.find() is node.axes[0].find() and "read" in self._roles(dim))
            for atom in roots(dim.term)
        }
        return {atom: "raw" if atom in weight_out or atom not in phases else phases[atom] for atom in out_atoms}

    def _held_by_constant(self, node: Node, value: Value) -> None:
        """A constant that differs along an axis that it shares (heads of a batched product, scores' biases) holds it."""
        for dim in value.dims if value.kind == "constant" else ():
            for atom in roots(dim.term):
                if dim.size > 1 and self._uniform(value, atom) is None:
                    self._fact("constant", atom, node)

    def _attention(self, node: Node) -> dict[Term, str]:
        """Fused attention: linear in its values, whose inside comes out as it went in."""
        keys, values = node.inputs[1:3]
        self._fact("softmax", keys.dims[-2].term, node)
        return dict(self.phases.get(id(values), {}))

    def _roles(self, dim: Dim) -> set[str]:
        return {role for place in dim.source for role in self.tape.roles.get(place, ())}

    def _norm_parameter(self, node: Node, value: Value, first: bool) -> None:
        for dim in value.dims:
            for place in dim.source:
                if first:
                    self.gains[place].append((node, node.inputs[0], value.offset))
                else:
                    self.adds[place].append((node, node.outputs[0]))

    def _uniform(self, value: Value, atom: Term) -> float | None:
        """The number that a constant holds along an atom's axis, if it is one number."""
        for k, dim in enumerate(value.dims):
            if dim.size > 1 and atom in roots(dim.term):
                first = value.tensor.select(k, 0).unsqueeze(k)
                if not bool(torch.equal(value.tensor, first.expand_as(value.tensor))):
                    return None
                return float(first.abs().double().max()) if first.numel() else 0.0
        return 0.0

    def _add(self, node: Node, phases: dict[Term, str]) -> dict[Term, str]:
        inputs = node.inputs
        atoms = {atom for v in inputs for dim in v.dims if dim.size > 1 for atom in roots(dim.term)}
        centring = base_name(node) == "sub" and len(inputs) == 2 and self._is_mean_of(inputs[1], inputs[0])
        for atom in atoms:
            carriers = [v for v in inputs if carries(v, atom)]
            others = [v for v in inputs if v not in carriers]
            acts = [v for v in carriers if v.kind == "activation"]
            if not acts:
                continue
            if centring:
                phases[atom] = "normed"
                continue
            for value in carriers:
                if value.kind == "constant":
                    number = self._uniform(value, atom)
                    if number is None:
                        self._fact("constant", atom, node)
                    elif number:
                        self._fact("unit", atom, node)
                        phases[atom] = "broken"
                elif value.kind == "weight":
                    for dim in value.dims:
                        if dim.size > 1 and atom in roots(dim.term):
                            for place in dim.source:
                                self.adds[place].append((node, acts[0]))
            added = [v for v in others if v.kind != "constant" or bool((v.tensor != 0).any())]
            own = [s for s in node.scalars if s != 0] if len(inputs) == 1 else []
            if added or own:
                self._fact("unit", atom, node)
                phases[atom] = "broken"
        return phases

    def _mul(self, node: Node, phases: dict[Term, str]) -> dict[Term, str]:
        inputs = node.inputs
        if self._is_norm_square(node):
            return phases
        atoms = {atom for v in inputs for dim in v.dims if dim.size > 1 for atom in roots(dim.term)}
        for atom in atoms:
            carriers = [v for v in inputs if carries(v, atom)]
            acts = [v for v in carriers if v.kind == "activation"]
            if len(inputs) == 2 and len(acts) == 1 and self._is_scale_of(inputs, acts[0], atom):
                self.normalising.add(id(node))
                phases[atom] = "normed"
            if (
                base_name(node) == "div"
                and len(inputs) == 2
                and inputs[1].kind != "constant"
                and carries(inputs[1], atom)
            ):
                self._fact("unit", atom, node)
                phases[atom] = "broken"
            if len(carriers) < 2 or not acts:
                continue
            if len(acts) > 1:
                self._fact("unit", atom, node)
                phases[atom] = "broken"
            for value in carriers:
                if value.kind == "constant" and self._uniform(value, atom) is None:
                    self._fact("constant", atom, node)
                if value.kind == "weight":
                    for dim in value.dims:
                        if dim.size > 1 and atom in roots(dim.term):
                            for place in dim.source:
                                self.gains[place].append((node, acts[0], value.offset))
                    if phases.get(atom) == "raw":
                        phases[atom] = "broken"
        return phases

    def _is_scale_of(self, inputs: list[Value], value: Value, atom: Term) -> bool:
        """Whether the other factor was computed from an average over the atom: the last step of a norm."""
        other = inputs[1] if inputs[0] is value else inputs[0]
        for _ in range(8):
            node = self._maker(other)
            if node is None or not node.inputs:
                return False
            if node.name in ("mean", "var", "var_mean", "linalg_vector_norm", "sum", "std"):
                return any(atom in roots(term) for term in node.axes)
            if base_name(node) not in (
                "rsqrt",
                "sqrt",
                "reciprocal",
                "add",
                "pow",
                "clamp",
                "clamp_min",
                "mul",
                "div",
            ):
                return False
            other = node.inputs[0]
        return False

    # -- questions ------------------------------------------------------------------------------------------------

    def phase(self, value: Value, term: Term) -> str:
        """`raw` or `normed`: the stream as it was written, or a LayerNorm's image of it."""
        return self.phases.get(id(value), {}).get(term.find(), "raw")

    def broken(self) -> set[Term]:
        """Atoms of which some activation is neither the raw stream nor a norm's image of it."""
        return {atom for found in self.phases.values() for atom, phase in found.items() if phase == "broken"}


__all__ = ["KEPT", "Analysis", "Writer"]
