"""What no axis shows alone: tied heads, norms over many heads, numbers that depend on sizes, the two sides of scores.

Each is found by walking the tape back from where it acts to the parameters that write there (`Analysis.writers`), and
says which parameter axes are modified, or which atoms can only grow by whole copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .analysis import Writer
from .gates import gates_of
from .moves import Moves, ScalarKey, Trace, leaves, tree
from .terms import Term
from .values import (
    ADDS,
    ATTENTION,
    CONTRACTIONS,
    MULS,
    SCALING,
    STRUCTURAL,
    Node,
    ParameterAxis,
    Value,
    base_name,
    carries,
)

EXACT_ROUNDING = 48  # powers of sizes in a class's numbers are halves, thirds, quarters ...


class Modifiers:
    """Modifiers of parameter axes, found on one tape.

    Attributes:
        duals: axes that write what a head reads which is tied to a table. prenorms: axes before a norm over all of them.
        scaled_tables: tables that the model multiplies by a function of the width, and `scale_key`, which number that is.
        scales: parameter -> (move -> power) of a number that it takes back. space_scales: the same for scores, by atom.
        gates: axes that write what multiplies a normed stream entry by entry (see `gates`), by the stream's atom.
        copied: atoms whose new parts must be copies of old ones, since a norm averages over them what they compute.
        queries, keys: axes that write the left and the right side of a product of two activations; `one_sided`: atoms of
            products whose sides could not be told. whole: atoms that grow by whole copies only, and why.
    """

    def __init__(self, base: Trace, moves: Moves):
        self.base, self.moves, self.analysis, self.trees = base, moves, base.analysis, base.trees
        self.notes: list[str] = list(base.tape.tangles)
        self.unresolved: list[tuple[str, tuple[tuple[int, float], ...]]] = []
        self.duals: set[ParameterAxis] = set()
        self.prenorms: set[ParameterAxis] = set()
        self.gates: dict[ParameterAxis, Term] = {}
        self.copied: set[Term] = set()
        self.scales: dict[str, dict[int, float]] = {}
        self.scaled_tables: set[ParameterAxis] = set()
        self.scale_key: ScalarKey | None = None
        self.space_scales: dict[Term, dict[int, float]] = {}
        self.queries: set[ParameterAxis] = set()
        self.keys: set[ParameterAxis] = set()
        self.one_sided: set[Term] = set()
        self.whole: dict[Term, str] = {}
        self._absorbed: dict[tuple, Node] = {}
        self._tied_heads()
        self._both_ways()
        self._gates()
        self._wide_norms()
        self._scalars()
        self._two_sides()

    def main_table(self) -> str:
        """The name of the model's embedding table; empty where it has none."""
        try:
            table = self.base.model.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            return ""  # a class without a table of tokens
        weight = getattr(table, "weight", None)
        found = (n for n, v in self.base.tape.parameters.items() if v.tensor is weight and len(v.dims) == 2)
        return next(found, "")

    def _tied_heads(self) -> None:
        """Where a table is looked up and read by the head as well, the head's input must be written dually."""
        looked_up = {
            place
            for node in self.base.tape.nodes
            if node.name == "embedding"
            for place in node.inputs[0].dims[1].source
        }
        for place in sorted(looked_up & set(self.analysis.reads)):
            term = next(iter(self.trees[place][1:]), None)
            if not isinstance(term, Term):
                continue
            for node, value in self.analysis.reads[place]:
                for writer in self.analysis.writers(value, {term}):
                    if writer.kind not in ("gain", "write") or set(writer.places) & looked_up:
                        problem = f"{writer.kind} at {writer.node}"
                    elif (other := self._norm_behind(writer.node, term)) is not None:
                        problem = f"{other} reads it as well"
                    else:
                        self.duals |= set(writer.places)
                        continue
                    self.whole.setdefault(term, f"the input of the tied head at {node} cannot be rescaled: {problem}")
                    self.analysis.facts[term].add("tied")

    def _norm_behind(self, writer: Node | None, term: Term) -> Node | None:
        """A norm of what an operation writes along an axis: it would see the stream as the tied head asks for it."""
        norms = {id(value): node for node, _, _, value in self.analysis.norms}
        seen: set[int] = set()
        todo = [out for out in writer.outputs if carries(out, term)] if writer is not None else []
        while todo:
            value = todo.pop()
            if id(value) in norms:
                return norms[id(value)]
            linear = [n for n in self.analysis.consumers[id(value)] if base_name(n) in STRUCTURAL | ADDS]
            todo += [out for n in linear for out in n.outputs if id(n) not in seen and carries(out, term)]
            seen |= {id(n) for n in linear}
        return None

    def _both_ways(self) -> None:
        """A matrix that writes along an axis and reads along it elsewhere (`W` and its transpose) keeps it as it is.

        What is written takes `W_map`, what reads takes `R_map`: one matrix cannot have both. A table that is a head as
        well can, since what the head reads is written dually (`_tied_heads`).
        """
        looked_up = {p for n in self.base.tape.nodes if n.name == "embedding" for p in n.inputs[0].dims[1].source}
        for place in self.analysis.reads:
            if {"read", "write"} <= self.base.tape.roles.get(place, set()) and place not in looked_up | self.duals:
                for term in leaves(self.trees[place]):
                    self.whole.setdefault(term, f"one matrix, {place[0]}, both writes it and reads it")
                    self.analysis.facts[term].add("tied")

    def _gates(self) -> None:
        """Streams that only gates keep from carrying a norm's factors: what writes the gates carries none."""
        for atom, facts in self.analysis.facts.items():
            if {"rms", "unit"} <= facts and not facts & {"layer", "batched", "tied"}:
                places = gates_of(self.analysis, atom)
                self.gates |= dict.fromkeys(places, atom)
                if places:
                    facts.discard("unit")

    def _two_sides(self) -> None:
        """Which projections write the left side of a product of two activations, and which the right."""
        for node in self.base.tape.nodes:
            if base_name(node) not in CONTRACTIONS or any(v.kind != "activation" for v in node.inputs[:2]):
                continue
            atoms = {a for term in node.axes for a in term.atoms() if "contracted" in self.analysis.facts[a]}
            if not atoms:
                continue
            sides = [list(self.analysis.writers(value, atoms)) for value in node.inputs[:2]]
            if all(side and all(w.kind == "write" for w in side) for side in sides):
                self.queries |= {place for w in sides[0] for place in w.places}
                self.keys |= {place for w in sides[1] for place in w.places}
            else:
                self.one_sided |= atoms

    def _wide_norms(self) -> None:
        """Norms over many heads, or over units: the projection behind them keeps the mean square, if nothing is between."""
        for node, term, kind, value in self.analysis.norms:
            atoms = set(term.atoms())
            heads = any("batched" in self.analysis.facts[atom] for atom in atoms)
            if kind == "rms" and term.find().form != "atom" and not heads:
                # A mean over streams side by side, or over parts of one: kept where each stream keeps its own.
                streams = {a for a in atoms if not self.analysis.facts[a] & {"unit", "batched"}}
                for atom in streams:
                    self.analysis.facts[atom].add("rms")
                if streams == atoms:
                    continue
                atoms -= streams
            facts = set().union(*(self.analysis.facts[a] for a in atoms))
            alone = term.find().form == "atom"
            if alone and not facts & {"unit", "batched"}:
                continue
            if not alone and kind == "group":
                for atom in atoms:
                    self.analysis.facts[atom].add("group")
                continue
            writers = list(self.analysis.writers(value, atoms))
            gains = self._gains_after(node, atoms)
            places = {place for w in writers for place in w.places}
            plain = bool(writers) and bool(gains) and all(w.kind == "write" for w in writers)
            repeats = [self._repeated(place, term) for place in places]
            if plain and all(repeated is not None for repeated in repeats):
                self.prenorms |= places | gains
                if self._product_behind(value, 0) is not None:  # what attention mixes is alike only in copies of heads
                    self.copied |= atoms
                for atom in set().union(*filter(None, repeats)):
                    self.whole[atom] = f"a norm over repeated units at {node}"
                if alone:
                    self.analysis.facts[term.find()] -= {"rms"}
                continue
            for atom in atoms:
                self.whole[atom] = f"a norm over units at {node}"

    def _repeated(self, place: ParameterAxis, term: Term) -> set[Term] | None:
        """The atoms of a norm's axis along which a parameter axis is repeated; None where it is no such axis."""
        own, normed = self.trees[place], tree(term)
        if own == normed:
            return set()
        if not own[0] == normed[0] == "prod":
            return None
        parts = set(leaves(normed)) - set(leaves(own))
        kept = [part for part in normed[1:] if not (part[0] == "atom" and part[1] in parts)]
        return parts if list(own[1:]) == kept else None

    def _gains_after(self, node: Node, atoms: set[Term]) -> set[ParameterAxis]:
        """Gains of the module in which a norm runs."""
        return {
            place
            for place, uses in self.analysis.gains.items()
            if any(use.scope == node.scope for use, *_ in uses) and set(leaves(self.trees[place])) <= atoms
        }

    # -- numbers that depend on sizes ------------------------------------------------------------------------------------

    def _scalars(self) -> None:
        """Numbers that depend on sizes: what writes the scaled value takes the factor back."""
        keys = {key for move in self.moves.found for key in move.scalars}
        if not keys:
            return
        counts: dict[tuple[str, str], int] = {}
        for node in self.base.tape.nodes:
            name = base_name(node)
            if name not in SCALING:
                continue
            count = counts[node.scope, name] = counts.get((node.scope, name), -1) + 1
            key = (node.scope, name, count)
            if key not in keys or id(node) in self.analysis.averages:
                continue
            powers = {
                number: round(move.scalars[key] * EXACT_ROUNDING) / EXACT_ROUNDING
                for number, move in enumerate(self.moves.found)
                if key in move.scalars
            }
            if name == "div" and node.inputs[0].kind == "activation" and len(node.inputs) <= 2:
                powers = {number: -power for number, power in powers.items()}
            if name in ADDS:
                self.unresolved.append((f"{node} adds a number that depends on sizes", tuple(powers.items())))
                continue
            if name == ATTENTION and node.inputs[0].kind == "weight":
                for parameter in {p for dim in node.inputs[0].dims for p, _ in dim.source}:
                    self.scales[parameter] = powers  # a query of its own
                continue
            activation = next((v for v in node.inputs if v.kind == "activation"), None)
            if activation is not None and self._scores(node, activation, powers):
                continue
            if activation is None or not self._absorb(node, activation, powers, key):
                note = f"{node} multiplies by a number that depends on sizes, and nothing there can take it back"
                self.unresolved.append((note, tuple(powers.items())))

    def _scores(self, node: Node, value: Value, powers: Mapping[int, float]) -> bool:
        """Whether a number multiplies scores, before or after the product that makes them: their space takes it back."""
        met: Node | None = node
        if base_name(node) not in CONTRACTIONS | {ATTENTION}:
            met = self._product_behind(value, 0) or self._product_ahead(node, 0)
        if met is None:
            return False
        inside = [
            a
            for term in met.axes
            for a in term.atoms()
            if "contracted" in self.analysis.facts[a] and any(a in self.moves.found[number].atoms for number in powers)
        ]
        for atom in inside:
            self.space_scales.setdefault(atom, dict(powers))
        return bool(inside)

    def _product_behind(self, value: Value, depth: int) -> Node | None:
        node = value.node
        if node is None or depth > 12:
            return None
        if base_name(node) in CONTRACTIONS:
            return node if all(v.kind == "activation" for v in node.inputs[:2]) else None
        if base_name(node) in STRUCTURAL | ADDS | MULS and node.inputs:
            return self._product_behind(node.inputs[0], depth + 1)
        return None

    def _product_ahead(self, node: Node, depth: int) -> Node | None:
        if depth > 24:
            return None
        for out in node.outputs:
            for user in self.analysis.consumers[id(out)]:
                if base_name(user) in CONTRACTIONS:
                    return user if all(v.kind == "activation" for v in user.inputs[:2]) else None
                if base_name(user) in STRUCTURAL | ADDS | MULS:
                    found = self._product_ahead(user, depth + 1)
                    if found is not None:
                        return found
        return None

    def _absorb(self, node: Node, value: Value, powers: Mapping[int, float], key: ScalarKey) -> bool:
        writers: list[Writer] = list(self._whole_writers(value))
        if not writers or any(w.kind not in ("write", "gain", "table") for w in writers):
            return False
        main = self.main_table()
        names = {place[0] for writer in writers for place in writer.places}
        if main in names:
            # Measured when a growth is planned: classes round it. A tied head reads the table unscaled.
            self.scaled_tables.add((main, 1))
            self.scale_key = key
        for name in names - {main}:
            earlier = self._absorbed.setdefault((name, node.scope, tuple(sorted(powers.items()))), node)
            if earlier is not node and not self._comes_from(value, earlier, 0):
                continue  # the same number on another slice of the same tensor's effect
            known = self.scales.setdefault(name, {})
            for number, power in powers.items():
                known[number] = known.get(number, 0.0) + power
        return True

    def _comes_from(self, value: Value, node: Node, depth: int) -> bool:
        """Whether a value was made from what an operation made, by linear steps."""
        if value.node is node:
            return True
        if value.node is None or depth > 12 or base_name(value.node) not in STRUCTURAL | ADDS | MULS:
            return False
        return any(self._comes_from(v, node, depth + 1) for v in value.node.inputs if v.kind == "activation")

    def _whole_writers(self, value: Value) -> Iterator[Writer]:
        for writer in self.analysis.writers(value, None):
            if writer.kind == "product":
                yield from self._whole_writers(writer.operands[0])
            else:
                yield writer
