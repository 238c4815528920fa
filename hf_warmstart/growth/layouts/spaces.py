"""Spaces: atoms that move alike and are restricted alike are one space, in all layers.

The facts that a tape shows about an atom (`analysis`) decide its kind, and with it which maps it admits; the moves decide
which config attributes size it. Parts of the inside of a head that never occur apart (`[half; half; rest]` of rotary
embeddings) are joined, so that sizes follow the attributes whatever share of a head is rotated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..axes import Axis, Concat, Fixed, Product, Space
from ..configs import get_attribute
from ..layout import GROUPS, WIDENED, Kind, Move, SpaceInfo
from .analysis import KEPT
from .modifiers import Modifiers
from .moves import Move as MeasuredMove
from .moves import Moves, Trace, Tree, leaves, tree_size
from .stacks import layer_axes
from .terms import Term

# Spaces that `width` leaves alone although their kind could grow: vocabulary, positions, insides of heads, low ranks,
# states, experts, groups.
KEPT_ATTRIBUTES = re.compile(
    r".*(vocab|position|head_dim|dim_head|d_kv|_size_per_head|rank|lora|state|d_conv|kernel|expert(?!.*(size|dim))|group|topk|bucket|"
    r"label|channel|image|patch|n_mels|mel|per_layer_input|head_size|hc_mult|hc_count|streams|codebook).*"
)
# Attributes that count routed experts.
EXPERTS = re.compile(r"(\w+\.)?(moe_)?(num|n)_(local_|routed_)?experts")
_STRICTNESS: tuple[Kind, ...] = (
    "linear", "elementwise", "heads", "rms_normed", "layer_normed", "whole", "indexed", "experts", "contracted", "rotary",
    "fixed",
)  # fmt: skip


@dataclass
class Atom:
    """What became of one atom: its kind, the moves that change it, the name of its space."""

    kind: Kind
    powers: tuple[float, ...]
    reason: str
    space: str = ""


class Spaces:
    """The spaces of one derivation, and the parameter axes (`trees`) as expressions of their atoms."""

    def __init__(self, model_class: type[PreTrainedModel], base: Trace, moves: Moves, modifiers: Modifiers):
        self.model_class, self.base, self.moves, self.modifiers = model_class, base, moves, modifiers
        self.analysis = base.analysis
        self.broken = base.analysis.broken()
        self.trees = dict(base.trees)
        self.composites: set[Term] = set()
        self.constants: dict[int, Term] = {}
        self.inside: dict[Term, tuple] = {}
        self.inside_sizes: dict[str, int] = {}
        self.layer_attribute = ""
        self.layer_axis: Term | None = None
        self.residual = self._residual()
        self.sizes = [self._sizes_after(move) for move in moves.found]
        self.atoms = self._atoms()
        self._join_insides()
        self._name_spaces()
        self._layer_axes()

    # -- what a layout says ----------------------------------------------------------------------------------------------

    def infos(self) -> dict[str, SpaceInfo]:
        infos: dict[str, SpaceInfo] = {}
        for term, atom in self.atoms.items():
            if atom.space:
                scale = tuple(sorted(self.modifiers.space_scales.get(term, {}).items()))
                inside = (self.inside[term], tuple(sorted(self.inside_sizes.items()))) if atom.kind == "rotary" else ()
                info = SpaceInfo(
                    atom.kind,
                    self._attributes(atom),
                    term.size,
                    self._widens(atom),
                    atom.reason,
                    scale,
                    inside,
                    term in self.modifiers.copied and atom.kind in ("elementwise", "heads"),
                )
                infos.setdefault(atom.space, info)
        return dict(sorted(infos.items()))

    def layout_moves(self) -> tuple[Move, ...]:
        """The moves, by spaces."""
        moves = []
        for number, move in enumerate(self.moves.found):
            spaces = {
                atom.space: atom.powers[number] for atom in self.atoms.values() if atom.space and atom.powers[number]
            }
            moves.append(Move(dict(move.attributes), dict(sorted(spaces.items()))))
        return tuple(moves)

    def expression(self, branch: Tree) -> Axis:
        """A tree as an axis."""
        if branch[0] == "atom":
            space = self.atoms[branch[1]].space
            return Space(space) if space else Fixed(branch[1].size)
        parts = [self.expression(part) for part in branch[1:]]
        if all(isinstance(part, Fixed) for part in parts):
            sizes = [part.length for part in parts]  # type: ignore[attr-defined]
            total = 1
            for size in sizes:
                total *= size
            return Fixed(sum(sizes) if branch[0] == "cat" else total)
        return Concat(*parts) if branch[0] == "cat" else Product(*parts)

    def _attributes(self, atom: Atom) -> tuple[str, ...]:
        """The attributes that grow a space, those of the simplest move first."""
        if atom.kind == "layers":
            return (self.layer_attribute,)
        found = [
            (len(move.attributes), len(set(move.atoms)), number)
            for number, move in enumerate(self.moves.found)
            if atom.powers[number] > 0
        ]
        names = [path for *_, number in sorted(found) for path in self.moves.found[number].attributes]
        return tuple(dict.fromkeys(names))

    def _widens(self, atom: Atom) -> bool:
        """Whether `width` multiplies a space."""
        if atom.kind not in WIDENED or atom.kind in ("contracted", "rotary", "indexed", "experts"):
            return False
        if atom.space == "residual":
            return True
        if GROUPS.fullmatch(atom.space) or atom.kind == "linear":
            return False
        free = lambda move: not any(KEPT_ATTRIBUTES.fullmatch(a.rpartition(".")[2]) for a in move.attributes)  # noqa: E731
        return any(p > 0 and free(move) for p, move in zip(atom.powers, self.moves.found, strict=True))

    # -- atoms -----------------------------------------------------------------------------------------------------------

    def _residual(self) -> Term | None:
        """The atom of the first stream: the embeddings' width, or what most parameters share and norms act on.

        The latter where there is no table, and where its width is the rank of a factorised one, which no norm acts on.
        """
        table = self.modifiers.main_table()
        atoms = list(self.base.tape.parameters[table].dims[1].term.atoms()) if table else []
        uses: dict[Term, int] = {}
        for branch in self.trees.values():
            if branch[0] == "atom" and self.analysis.facts[branch[1]] & {"rms", "layer"}:
                uses[branch[1]] = uses.get(branch[1], 0) + 1
        if len(atoms) == 1 and (not uses or self.analysis.facts[atoms[0]] & {"rms", "layer", "co_normed", "group"}):
            return atoms[0]
        return max(uses, key=lambda term: uses[term]) if uses else None

    def _atoms(self) -> dict[Term, Atom]:
        found: dict[Term, Atom] = {}
        for branch in self.trees.values():
            for term in leaves(branch):
                if term in found:
                    continue
                powers = tuple(round(move.atoms.get(term, 0.0), 6) for move in self.moves.found)
                movers = [m.attributes for m, power in zip(self.moves.found, powers, strict=True) if power > 0]
                kind, reason = self._kind(term)
                if movers and all(len(m) == 1 and EXPERTS.fullmatch(next(iter(m))) for m in movers):
                    kind, reason = "experts", ""
                found[term] = Atom(kind, powers, reason)
        return found

    def _kind(self, term: Term) -> tuple[Kind, str]:
        facts = self.analysis.facts[term]

        def where(fact: str) -> str:
            node = self.analysis.why.get((term, fact))
            return fact if node is None else f"{fact} at {node}"

        if "tied" in facts:
            return "fixed", self.modifiers.whole[term]
        if kept := sorted(facts & (KEPT | {"contracted"}) - {"indexed"}):
            if kept == ["contracted"] and not facts & {"unit", "rms", "layer", "co_normed"}:
                return "contracted", where("contracted")
            return "fixed", where([*(f for f in kept if f != "contracted"), "contracted"][0])
        if "indexed" in facts or "scattered" in facts:
            return "indexed", ""
        if "group" in facts:
            return "fixed", where("group")
        normed = facts & {"rms", "layer"}
        if term in self.modifiers.whole:
            return "whole", self.modifiers.whole[term]
        if normed and "unit" in facts:
            return "whole", f"a norm and {where('unit')}"
        if normed and "batched" in facts:
            return "whole", "a norm over heads"
        if "layer" in facts:
            return ("whole", "a LayerNorm meets the raw stream") if term in self.broken else ("layer_normed", "")
        if "rms" in facts:
            return "rms_normed", ""
        if "batched" in facts:
            return "heads", ""
        return ("elementwise", "") if "unit" in facts else ("linear", "")

    def unreached(self, powers: tuple[float, ...]) -> Atom:
        """An axis of its own for a tensor that the forward pass does not reach and no known space explains."""
        return Atom("fixed", powers, "the forward pass does not reach it", f"unreached_{len(self.atoms)}")

    # -- insides of heads ------------------------------------------------------------------------------------------------

    def _sizes_after(self, move: MeasuredMove) -> dict[Term, int]:
        """The size of every atom after a move."""
        atoms = {term for branch in self.trees.values() for term in leaves(branch)}
        return {term: round(term.size * 2 ** move.atoms.get(term, 0.0)) for term in atoms}

    def _join_insides(self) -> None:
        """Neighbours inside of heads that never grow and never occur apart become one: `[half; half; rest]` is a head.

        Their sizes need not follow the attributes one by one (a rotated part may have an attribute of its own), but
        those of the whole do.
        """
        self.trees = {place: self._constants_alike(branch) for place, branch in self.trees.items()}
        while (run := self._closed_run()) is not None:
            form, parts = run
            sizes = [tree_size(part) for part in parts]
            joined = Term(sum(sizes) if form == "cat" else math.prod(sizes))
            members = [self.atoms[part[1]] for part in parts]
            for after in self.sizes:
                values = [after[part[1]] for part in parts]
                after[joined] = sum(values) if form == "cat" else math.prod(values)
            powers = tuple(round(math.log2(after[joined] / joined.size), 6) for after in self.sizes)
            strict = max(members, key=lambda atom: _STRICTNESS.index(atom.kind))
            # A constant has no reason of its own: what meets in the part beside it is why the whole stays.
            reason = strict.reason or next((atom.reason for atom in members if atom.kind == "contracted"), "")
            self.atoms[joined] = Atom(strict.kind, powers, reason)
            self.inside[joined] = (form, *(self._inside_of(part[1]) for part in parts))
            for term in {part[1] for part in parts} - set(self.constants.values()):
                self.modifiers.one_sided |= {joined} if term in self.modifiers.one_sided else set()
                if term in self.modifiers.space_scales:
                    self.modifiers.space_scales[joined] = self.modifiers.space_scales[term]
                del self.atoms[term]
            self.composites.add(joined)
            self.trees = {place: _replace_run(branch, form, parts, joined) for place, branch in self.trees.items()}

    def _inside_of(self, term: Term) -> str | int | tuple:
        """The structure of one part of a head: what is rotated by a table of angles, and the rest."""
        if term in self.inside:
            return self.inside[term]
        if term in self.constants.values():
            return term.size
        name = "rotated" if "constant" in self.analysis.facts[term] else "rest"
        self.inside_sizes[name] = term.size
        return name

    def _constants_alike(self, branch: Tree) -> Tree:
        """A tree in which everything that no move changes is one constant for each length (the 2 of rotated pairs)."""
        if all(not any(self.atoms[term].powers) for term in leaves(branch)):
            size = tree_size(branch)
            if size not in self.constants:
                self.constants[size] = Term(size)
                self.atoms[self.constants[size]] = Atom("fixed", (0.0,) * len(self.moves.found), "")
                for after in self.sizes:
                    after[self.constants[size]] = size
            return ("atom", self.constants[size])
        return branch if branch[0] == "atom" else (branch[0], *(self._constants_alike(part) for part in branch[1:]))

    def _closed_run(self) -> tuple[str, tuple[Tree, ...]] | None:
        """Two neighbours in a concatenation or product whose atoms occur nowhere else."""
        pairs: dict[tuple, int] = {}
        uses: dict[Term, int] = {}
        for branch in self.trees.values():
            for term in leaves(branch):
                uses[term] = uses.get(term, 0) + 1
            for form, parts in _composites(branch):
                k = 0
                while k + 1 < len(parts):
                    a, b = parts[k], parts[k + 1]
                    inside = a[0] == b[0] == "atom" and self._kept(a[1]) and self._kept(b[1])
                    if inside and (a[1] is not b[1] or a[1] not in self.composites):
                        pairs[form, a, b] = pairs.get((form, a, b), 0) + 1
                        k += 1 if a[1] is b[1] else 0
                    k += 1
        for (form, a, b), count in pairs.items():
            needed = {a[1]: 2 * count} if a[1] is b[1] else {a[1]: count, b[1]: count}
            constant = set(self.constants.values())
            if not set(needed) <= constant and all(
                uses[term] == number for term, number in needed.items() if term not in constant
            ):
                return form, (a, b)
        return None

    def _kept(self, term: Term) -> bool:
        """Whether an atom stays as it is, but moves: part of the inside of a head."""
        return self.atoms[term].kind in ("fixed", "contracted") or not any(self.atoms[term].powers)

    # -- names -----------------------------------------------------------------------------------------------------------

    def _name_spaces(self) -> None:
        """Atoms that move alike and are restricted alike are one space, in all layers.

        A normed stream takes factors that keep its statistics, and units take none: the two are never one space.
        """
        groups: dict[tuple, list[Term]] = {}
        for term, atom in self.atoms.items():
            if any(atom.powers):
                # Only kinds that ask for no factors share a space: one that a norm asks for would scale the others' units.
                own = atom.kind not in ("elementwise", "heads", "experts")
                kind = atom.kind if own else f"grows{term in self.modifiers.copied}"
                key = (atom.powers, kind, term is self.residual, term.size)
                groups.setdefault(key, []).append(term)
        taken: set[str] = set()
        for term, atom in self.atoms.items():
            rotated = "rotated" in str(self.inside.get(term, ""))
            if (
                atom.kind == "fixed"
                and rotated
                and term not in self.modifiers.one_sided
                and atom.reason.startswith("constant")
            ):
                atom.kind = "rotary"
        for (powers, _, is_residual, _), terms in groups.items():
            kinds = {self.atoms[t].kind for t in terms}
            strict = max(kinds, key=_STRICTNESS.index)
            reason = next((self.atoms[t].reason for t in terms if self.atoms[t].kind == strict), "")
            name = "residual" if is_residual else self._space_name(powers, strict, taken)
            taken.add(name)
            for term in terms:
                self.atoms[term].kind, self.atoms[term].reason, self.atoms[term].space = strict, reason, name

    def _layer_axes(self) -> None:
        """Axes with one part for each layer: an atom as long as the stack, which no size moves."""
        for place, path in layer_axes(self.base, self.model_class).items():
            layers = get_attribute(self.base.config, path)
            constant = self.constants.get(layers)
            if constant is None:
                continue
            if self.layer_axis is None:
                self.layer_axis = Term(layers)
                self.atoms[self.layer_axis] = Atom("layers", (0.0,) * len(self.moves.found), "", "layers")
            self.layer_attribute = path
            self.trees[place] = _replaced(self.trees[place], constant, self.layer_axis)

    def _space_name(self, powers: tuple[float, ...], kind: Kind, taken: set[str]) -> str:
        """A readable name: the attribute that sets the space, where one does."""
        up = [m.attributes for m, p in zip(self.moves.found, powers, strict=True) if p > 0]
        down = {a for m, p in zip(self.moves.found, powers, strict=True) if p < 0 for a in m.attributes}
        short = lambda path: path.rpartition(".")[2]  # noqa: E731
        rising = [a for attributes in sorted(up, key=len) for a in attributes if a not in down]
        of_heads = [a for a in rising if "head" in a and "dim" not in a]
        name = short(rising[0]) if rising else "space"
        if kind in ("heads", "whole") and of_heads:
            name = short(of_heads[0])
            if "key_value" in name:
                name = "kv_heads"
            elif any("key_value" in a for a in down):
                name = "group"
            elif name == "num_attention_heads":
                counted = any("key_value" in a for m in self.moves.found for a in m.attributes)
                name = "kv_heads" if counted else "heads"
        elif any("head" in a for a in down) and kind in ("contracted", "rotary", "linear", "fixed"):
            name = "head_dim"
        elif rising and name in ("hidden_size", "d_model"):
            name = "width"
        candidate, number = name, 2
        while candidate in taken or candidate == "residual":
            candidate, number = f"{name}_{number}", number + 1
        return candidate


def _composites(branch: Tree) -> Iterator[tuple[str, tuple[Tree, ...]]]:
    """All concatenations and products in a tree, inner ones first."""
    if branch[0] != "atom":
        for part in branch[1:]:
            yield from _composites(part)
        yield branch[0], branch[1:]


def _replaced(branch: Tree, old: Term, new: Term) -> Tree:
    """A tree with one atom in another's place."""
    if branch[0] == "atom":
        return ("atom", new) if branch[1] is old else branch
    return (branch[0], *(_replaced(part, old, new) for part in branch[1:]))


def _replace_run(branch: Tree, form: str, run: tuple[Tree, ...], joined: Term) -> Tree:
    """A tree with one atom for each occurrence of a run of neighbours."""
    if branch[0] == "atom":
        return branch
    parts = [_replace_run(part, form, run, joined) for part in branch[1:]]
    if branch[0] == form:
        made: list[Tree] = []
        k = 0
        while k < len(parts):
            if tuple(parts[k : k + len(run)]) == run:
                made.append(("atom", joined))
                k += len(run)
            else:
                made.append(parts[k])
                k += 1
        parts = made
    return parts[0] if len(parts) == 1 else (branch[0], *parts)
