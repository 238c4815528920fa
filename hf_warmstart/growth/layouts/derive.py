"""Deriving the layout of a model class from the class itself.

A small probe of the class (`probe`) is run once and written down (`tape`); the axes of its parameters become
expressions of atoms (`terms`), restricted by what acts on them (`analysis`), and larger probes show which config
attributes move which atoms (`moves`). Here these become a `Layout`: atoms that move and act alike, in all layers, are
one space; each parameter axis writes or reads; and modifiers are placed where the tape asks for them:

- `Postnorm`, `Gain`: what a norm makes, and what scales it;
- `Dual`: whatever produces the input of a head that is tied to the embedding table;
- `Gate`: a projection whose output, after a nonlinearity, multiplies a normed stream;
- `Prenorm`: a projection whose whole output goes through one norm (q/k norms over all heads).

Nothing in here knows a model type. What the pass does not understand keeps its size, in a space of its own that says why.
"""

from __future__ import annotations

import math

from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import LayoutError
from ..axes import Axis, Concat, Dual, Fixed, Gain, Gate, Postnorm, Prenorm, Product, Query, Scaled, Space
from ..layout import Kind, Layout, Role, TensorLayout
from .modifiers import Modifiers
from .moves import REFUSALS, Moves, Trace, leaves
from .probe import probe_config
from .spaces import Spaces
from .stacks import find_stacks, merge_layers
from .terms import Term
from .values import ParameterAxis


def derive_layout(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Layout:
    """The layout of `model_class` under the switches of `config`, from nothing but the class; sizes do not matter.

    Raises:
        LayoutError: the class's probe does not run; its own words are kept.
    """
    try:
        probe = probe_config(config)
        base = Trace(model_class, probe)
        return _Derivation(model_class, base, Moves(model_class, base)).layout()
    except LayoutError:
        raise
    except REFUSALS as error:
        # Whatever a class does with a probe that it cannot run, it means one thing: nothing can be derived.
        raise LayoutError(
            f"{model_class.__name__}: its small probe could not be run ({type(error).__name__}: {error}). This class "
            "cannot be grown yet."
        ) from error


class _Derivation:
    """One derivation: spaces and modifiers are found, the tensors are placed in them."""

    def __init__(self, model_class: type[PreTrainedModel], base: Trace, moves: Moves):
        self.model_class, self.base, self.moves = model_class, base, moves
        self.analysis, self.roles = base.analysis, base.tape.roles
        self.modifiers = Modifiers(base, moves)
        self.spaces = Spaces(model_class, base, moves, self.modifiers)

    def layout(self) -> Layout:
        tensors = {name: self._tensor(name) for name in self.base.tape.parameters}
        stacks = find_stacks(self.base, self.moves.model_class)
        merged = merge_layers(tensors, stacks, self.base.config)
        used = {space for tensor in merged.values() for axis in tensor.axes for space in axis.spaces()}
        return Layout(
            self.base.config.model_type,
            {name: info for name, info in self.spaces.infos().items() if name in used},
            merged,
            tuple(stacks),
            dict(self.base.model.all_tied_weights_keys),
            self.modifiers.scale_key,
            self.spaces.layout_moves(),
            {path: self.moves.value(path) for move in self.moves.found for path in move.attributes},
            tuple(sorted(set(self.modifiers.notes))),
            tuple(sorted(set(self.modifiers.unresolved))),
        )

    # -- one tensor ------------------------------------------------------------------------------------------------------

    def _tensor(self, name: str) -> TensorLayout:
        value = self.base.tape.parameters[name]
        axes: list[Axis] = []
        roles: list[Role] = []
        reached = bool(self.analysis.consumers[id(value)])
        for k in range(len(value.dims)):
            axis = self._axis(name, k) if reached else self._by_shape(name, k)
            axes.append(axis)
            found = self.roles.get((name, k), {"write"})
            roles.append("read" if found == {"read"} else "write")
        if not reached and len(roles) > 1:
            roles[-1] = "read"
        offset = next((o for k in range(len(axes)) for *_, o in self.analysis.gains.get((name, k), ()) if o), 0.0)
        scale = self.modifiers.scales.get(name, {})
        return TensorLayout(tuple(axes), tuple(roles), offset, tuple(sorted(scale.items())))

    def _by_shape(self, name: str, k: int) -> Axis:
        """An axis that the forward pass never touched: by how it moves, if one space moves just so."""
        size = self.moves.shapes[name][k]
        ratios = [move.shapes[name][k] / size for move in self.moves.found]
        if all(ratio == 1 for ratio in ratios):
            return Fixed(size)
        spaces = {atom.space: (atom, term) for term, atom in self.spaces.atoms.items() if atom.space}
        for space, (atom, term) in spaces.items():
            if term.size == size and all(abs(2**p - r) < 1e-9 for p, r in zip(atom.powers, ratios, strict=True)):
                return Space(space)
        for first, (atom, term) in spaces.items():
            for second, (other, term2) in spaces.items():
                if term.size * term2.size == size and all(
                    abs(2 ** (p + q) - r) < 1e-9 for p, q, r in zip(atom.powers, other.powers, ratios, strict=True)
                ):
                    return Product(first, second) if "heads" in first else Product(second, first)
        for space, (atom, term) in spaces.items():
            if size % term.size == 0 and all(abs(2**p - r) < 1e-9 for p, r in zip(atom.powers, ratios, strict=True)):
                return Concat(*[Space(space)] * (size // term.size))
        powers = tuple(round(math.log2(ratio), 6) for ratio in ratios)
        own = Term(size)
        self.spaces.atoms[own] = self.spaces.unreached(powers)
        return Space(self.spaces.atoms[own].space)

    # -- one axis --------------------------------------------------------------------------------------------------------

    def _axis(self, name: str, k: int) -> Axis:
        place = name, k
        branch = self.spaces.trees[place]
        plain = self.spaces.expression(branch)
        if place in self.modifiers.gates:
            return _gate(plain, self.spaces.atoms[self.modifiers.gates[place]].space)
        if branch[0] == "atom" and self.spaces.atoms[branch[1]].space:
            atom = self.spaces.atoms[branch[1]]
            if place in self.modifiers.scaled_tables:
                plain = Scaled(plain)
            if atom.kind in ("rms_normed", "layer_normed", "whole"):
                plain = self._normed_axis(place, branch[1], plain, atom.kind)
            elif place in self.modifiers.duals:
                plain = Dual(plain)
            return (
                Prenorm(plain)
                if place in self.modifiers.prenorms and place not in self.analysis.gains
                else (Gain(Prenorm(plain), plain) if place in self.modifiers.prenorms else plain)
            )
        if place in self.modifiers.prenorms:
            return Gain(Prenorm(plain), plain) if place in self.analysis.gains else Prenorm(plain)
        if place in self.modifiers.duals:
            return Dual(plain)
        normed = {self.spaces.atoms[a].kind for a in leaves(branch)} & {"rms_normed", "layer_normed", "whole"}
        if normed and place in self.analysis.gains:
            return Gain(plain, plain)
        return self._queried(place, plain)

    def _queried(self, place: ParameterAxis, plain: Axis) -> Axis:
        """An axis whose rotated heads are queries'; in a fused axis the first of them are."""
        if place not in self.modifiers.queries:
            return plain
        names = {atom.space for atom in self.spaces.atoms.values() if atom.kind == "rotary"}
        return _query(plain, names, first=place in self.modifiers.keys)[0]

    def _normed_axis(self, place: ParameterAxis, term: Term, plain: Axis, kind: Kind) -> Axis:
        analysis = self.analysis
        inner = plain.axis if isinstance(plain, Scaled) else plain
        if place in analysis.gains:
            made = Dual(self._table_axis(inner)) if place in self.modifiers.duals else Postnorm(inner)
            return Gain(inner, made)
        if place in self.modifiers.duals:
            return Dual(self._table_axis(inner))
        if kind != "layer_normed":
            return plain
        roles = self.roles.get(place, set())
        if roles == {"read"}:
            phases = {analysis.phase(value, term) for _, value in analysis.reads.get(place, ())}
            return Postnorm(plain) if phases == {"normed"} else plain
        added = {analysis.phase(value, term) for _, value in analysis.adds.get(place, ())}
        return Postnorm(plain) if added == {"normed"} else plain

    def _table_axis(self, plain: Axis) -> Axis:
        return Scaled(plain) if self.modifiers.scaled_tables else plain


def _gate(axis: Axis, name: str) -> Axis:
    """An axis with `Gate` around the space of a name, wherever it occurs."""
    if isinstance(axis, Space):
        return Gate(axis) if axis.name == name else axis
    return type(axis)(*(_gate(part, name) for part in axis.axes)) if isinstance(axis, (Concat, Product)) else axis


def _query(axis: Axis, names: set[str], first: bool) -> tuple[Axis, bool]:
    """An axis with `Query` around the spaces of some names: all of them, or the first; and whether one was found."""
    if isinstance(axis, Space):
        return (Query(axis), True) if axis.name in names else (axis, False)
    if not isinstance(axis, (Concat, Product)):
        return axis, False
    parts: list[Axis] = []
    done = False
    for part in axis.axes:
        made, found = (part, False) if done and first else _query(part, names, first)
        parts.append(made)
        done = done or found
    return type(axis)(*parts), done
