"""Moves: how a class's config attributes change its spaces.

A *move* multiplies one attribute of a small config (or a few, where a class accepts them only together: the width and
the heads of Mamba 2) and sees, in a trace of the larger model, by how much each atom grew. Sizes are products of powers
of attributes, so moves combine like vectors: which attributes make every space 1.5 times as large is a linear system.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import SizeError
from ..configs import attribute_paths, get_attribute, layer_attributes, resize_config, unset_sizes
from ..maps import LayerMap
from ..twin import build, meta_shapes, randomise
from .analysis import Analysis
from .probe import output_of, probe_inputs
from .tape import Tape
from .terms import Term, flat
from .values import SCALING, Node, base_name

REFUSALS = (
    StrictDataclassError, SizeError, ValueError, RuntimeError, AssertionError, TypeError, ZeroDivisionError, IndexError,
    KeyError, AttributeError,
)  # fmt: skip
Tree = tuple
ScalarKey = tuple[str, str, int]  # module, operation, how many before it in that module


class Trace:
    """A small model and what is known after one forward pass of it."""

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig):
        self.config = config
        self.model = build(model_class, config)
        randomise(self.model, seed=1)
        tied = set(self.model.all_tied_weights_keys)
        tensors = {n: t for n, t in self.model.state_dict(keep_vars=True).items() if n not in tied}
        self.tape = Tape(self.model, tensors)
        returned = self.tape.values.get(id(output_of(self.tape.run(probe_inputs(self.model)))))
        if returned is not None:  # tokens may be added to the last axis; more of any other is another output
            self.tape.event("returned", returned.dims[:-1], Node("output", [], ""))
        self.trees = {
            (name, k): tree(dim.term)
            for name, value in self.tape.parameters.items()
            for k, dim in enumerate(value.dims)
        }

    @cached_property
    def analysis(self) -> Analysis:
        """What acts on what; larger models, which only tell sizes, are never asked."""
        return Analysis(self.tape)

    def scalars(self) -> dict[ScalarKey, float]:
        """Numbers that the class multiplies or adds by."""
        found: dict[ScalarKey, float] = {}
        counts: dict[tuple[str, str], int] = {}
        for node in self.tape.nodes:
            name = base_name(node)
            if name in SCALING:
                count = counts[node.scope, name] = counts.get((node.scope, name), -1) + 1
                if len(node.scalars) == 1 and node.scalars[0]:
                    found[node.scope, name, count] = node.scalars[0]
        return found


def measured_scalar(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, key: ScalarKey | None
) -> float | None:
    """The number behind a key under a config, in the config's dtype; None where there is none."""
    return Trace(model_class, config).scalars().get(key) if key else None


def tree(term: Term) -> Tree:
    """A term as nested tuples: an atom, or a form with its parts."""
    node = term.find()
    if node.form == "atom":
        return ("atom", node)
    parts = flat(node, node.form)
    return (node.form, *(tree(part) for part in parts)) if len(parts) > 1 else tree(parts[0])


def leaves(branch: Tree) -> Iterator[Term]:
    """The atoms of a tree, with repetitions."""
    if branch[0] == "atom":
        yield branch[1]
    else:
        for part in branch[1:]:
            yield from leaves(part)


def tree_size(branch: Tree) -> int:
    if branch[0] == "atom":
        return branch[1].size
    sizes = [tree_size(part) for part in branch[1:]]
    return sum(sizes) if branch[0] == "cat" else math.prod(sizes)


@dataclass(frozen=True)
class Move:
    """Attributes that change together (binary logarithms of their factors) and what follows, in the same unit."""

    attributes: Mapping[str, float]
    atoms: Mapping[Term, float] = field(default_factory=dict)
    scalars: Mapping[ScalarKey, float] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def _new_sizes(base: Trace, other: Trace) -> dict[Term, int] | None:
    """The size in `other` of every atom of `base`; None where the structures cannot be matched."""
    sizes: dict[Term, int] = {}
    unmatched: list[tuple[Tree, int]] = []

    def match(a: Tree, b: Tree) -> bool:
        if a[0] == "atom":
            size = tree_size(b)
            return sizes.setdefault(a[1], size) == size
        if b[0] == a[0] and len(a) == len(b):
            return min([match(x, y) for x, y in zip(a[1:], b[1:], strict=True)])  # all of them, none left out
        unmatched.append((a, tree_size(b)))
        return True

    for place, branch in base.trees.items():
        if not match(branch, other.trees[place]):
            return None
    for branch, size in unmatched:  # one unknown factor of a product can still be told
        if branch[0] != "prod":
            continue
        known = [p for p in branch[1:] if p[0] != "atom" or p[1] in sizes]
        rest = [p for p in branch[1:] if p not in known]
        if len(rest) == 1:
            try:
                total = math.prod(_with(p, sizes) for p in known)
            except KeyError:
                continue
            if size % total == 0:
                sizes.setdefault(rest[0][1], size // total)
    return sizes


def _with(branch: Tree, sizes: Mapping[Term, int]) -> int:
    if branch[0] == "atom":
        return sizes[branch[1]]
    parts = [_with(part, sizes) for part in branch[1:]]
    return sum(parts) if branch[0] == "cat" else math.prod(parts)


def _with_all(branch: Tree, sizes: Mapping[Term, int]) -> int | None:
    try:
        return _with(branch, sizes)
    except KeyError:
        return None


def deeper_configs(config: PreTrainedConfig, path: str, layers: int) -> Iterator[PreTrainedConfig]:
    """Configs with one layer more, and with twice as many, as far as the class takes them."""
    for source in ((*range(layers), layers - 1), tuple(range(layers)) * 2):
        try:
            yield resize_config(config, {}, {path: LayerMap(layers, source, (False,) * len(source))})
        except REFUSALS:
            continue


class Moves:
    """All moves of a class, measured from one small config."""

    def __init__(self, model_class: type[PreTrainedModel], base: Trace):
        self.model_class, self.base = model_class, base
        self.shapes = meta_shapes(model_class, base.config)
        self.found: list[Move] = []
        self.implied: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        attributes = [p for p in attribute_paths(base.config) if get_attribute(base.config, p) > 1]
        stubborn = []
        for path in attributes:
            outcome = self._try(self._paired({path: 1.0}))
            if outcome is None:
                stubborn.append(path)
        settled: set[str] = set()
        for path in stubborn:
            for company in self._company(path, stubborn, attributes):
                changes = self._paired(company)
                if len(settled & set(changes)) == len(changes):
                    continue
                changes = self._fewest(path, changes)
                if self._try(changes):
                    settled |= set(changes)
                    break
        for path in unset_sizes(base.config):
            self._try_unset(path)
        for path in layer_attributes(base.config):
            self._try_depth(path)

    def _try_unset(self, path: str) -> None:
        """Measure a size that the config leaves to the class (GPT-2's `n_inner`): found by setting what it is already."""
        sizes = sorted({atom.size for branch in self.base.trees.values() for atom in leaves(branch)})
        for size in sizes:
            try:
                same = resize_config(self.base.config, {path: size})
                if get_attribute(same, path) != size or meta_shapes(self.model_class, same) != self.shapes:
                    continue
            except REFUSALS:
                continue
            self.implied[path] = size
            if not self._try({path: 1.0}):
                del self.implied[path]
            return

    def _try_depth(self, path: str) -> None:
        """Measure the numbers in the forward that depend on the number of layers."""
        layers = get_attribute(self.base.config, path)
        if layers < 1:
            return
        for config in deeper_configs(self.base.config, path, layers):
            try:
                other = Trace(self.model_class, config)
            except REFUSALS as error:
                self.failed[path] = f"{type(error).__name__}: {error}"
                continue
            log = math.log2(get_attribute(config, path) / layers)
            if not log:
                return
            scalars = {key: power / log for key, power in self._scalars_against(other).items()}
            if scalars:
                self.found.append(Move({path: 1.0}, {}, scalars, self.shapes))
            return

    def _scalars_against(self, other: Trace) -> dict[ScalarKey, float]:
        """Binary logarithms of the factors between this model's numbers and another's, where they differ."""
        before, after = self.base.scalars(), other.scalars()
        return {
            key: math.log2(after[key] / number)
            for key, number in before.items()
            if key in after and after[key] != number and after[key] / number > 0
        }

    def value(self, path: str) -> int:
        """An attribute's value in the small config; where it is unset, what the class makes of that."""
        return self.implied.get(path) or get_attribute(self.base.config, path)

    def _paired(self, changes: Mapping[str, float]) -> dict[str, float]:
        """Changes in which heads of keys stay as many as heads of queries, where they are as many."""
        made = dict(changes)
        for path, power in changes.items():
            prefix = path.removesuffix(path.rpartition(".")[2])
            pair = [prefix + "num_attention_heads", prefix + "num_key_value_heads"]
            values = [get_attribute(self.base.config, other, None) for other in pair]
            if path in pair and values[0] == values[1]:
                made |= dict.fromkeys(pair, power)
        return made

    def _fewest(self, path: str, changes: dict[str, float]) -> dict[str, float]:
        """Joint changes without the attributes that need not come along."""
        shapes = self._shapes_after(changes) if len(changes) > 2 else None
        if shapes is None:
            return changes
        for other in [p for p in changes if p != path]:
            fewer = {p: power for p, power in changes.items() if p != other}
            if self._paired(fewer) == fewer and self._shapes_after(fewer) is not None:
                changes = fewer
        return changes

    def _shapes_after(self, changes: Mapping[str, float]) -> Mapping[str, tuple[int, ...]] | None:
        """Shapes after changes; None where the class refuses them, builds other tensors, or cannot run them."""
        try:
            values = {path: int(self.value(path) * 2**power) for path, power in changes.items()}
            resized = resize_config(self.base.config, values)
            shapes = meta_shapes(self.model_class, resized)
            if shapes.keys() != self.shapes.keys() or shapes == self.shapes:
                return None
            model = build(self.model_class, resized)
            with torch.no_grad():
                model(**probe_inputs(model))
        except REFUSALS:
            return None
        return shapes

    def _company(self, path: str, stubborn: Sequence[str], attributes: Sequence[str]) -> Iterator[dict[str, float]]:
        """Combinations in which an attribute may move that does not move alone."""
        value = get_attribute(self.base.config, path)
        alike = [a for a in attributes if a != path and get_attribute(self.base.config, a) == value]
        if len(alike) > 1:
            yield {path: 1.0, **dict.fromkeys(alike, 1.0)}
        widths = [a for a in alike if a.endswith(("_dim", "_size", "d_model", "_embd"))]
        if widths:
            yield {path: 1.0, **dict.fromkeys(widths, 1.0)}
        name, part = path.rpartition(".")[2], path.rpartition(".")[0]
        near = lambda a: a.rpartition(".")[0] == part or a.rpartition(".")[2] == name  # noqa: E731
        same = [a for a in attributes if a != path and a.rpartition(".")[2] == name]
        if len(same) > 1:
            yield {path: 1.0, **dict.fromkeys(same, 1.0)}
        others = [a for a in stubborn if a != path and near(a)] + [
            a for a in attributes if a not in stubborn and near(a)
        ]
        for other in others:
            yield {path: 1.0, other: 1.0}
        for other in filter(near, stubborn):
            if other != path:
                yield {path: 1.0, other: -1.0}
        heads = [a for a in others if "head" in a]
        for k, other in enumerate(heads):
            for third in heads[k + 1 :]:
                yield {path: 1.0, other: 1.0, third: 1.0}
        if len(heads) > 2:
            yield {path: 1.0, **dict.fromkeys(heads, 1.0)}

    def _try(self, changes: Mapping[str, float]) -> bool | None:
        """Measure a move. True: something grew; False: nothing did; None: the class refuses it."""
        config = self.base.config
        values = {path: self.value(path) * 2**power for path, power in changes.items()}
        if any(value != int(value) for value in values.values()):
            return None
        try:
            resized = resize_config(config, {path: int(value) for path, value in values.items()})
            if any(get_attribute(resized, path) != int(value) for path, value in values.items()):
                return None
            shapes = meta_shapes(self.model_class, resized)
        except REFUSALS as error:
            self.failed[",".join(changes)] = f"{type(error).__name__}: {error}"
            return None
        if shapes.keys() != self.shapes.keys():
            return None
        if shapes == self.shapes and not any(re.search("head|group", path) for path in changes):
            return False  # heads may be regrouped within the same shapes; nothing else hides
        try:
            other = Trace(self.model_class, resized)
        except REFUSALS as error:
            self.failed[",".join(changes)] = f"{type(error).__name__}: {error}"
            return None
        sizes = _new_sizes(self.base, other)
        if sizes is None:
            self.failed[",".join(changes)] = "the structure of some axis changes"
            return None
        if any(_with_all(branch, sizes) != tree_size(other.trees[place]) for place, branch in self.base.trees.items()):
            self.failed[",".join(changes)] = "the structure of some axis changes"
            return None
        atoms = {atom: math.log2(size / atom.size) for atom, size in sizes.items() if size != atom.size}
        scalars = self._scalars_against(other)
        if not atoms and not scalars:
            return False
        self.found.append(Move(dict(changes), atoms, scalars, shapes))
        return True
