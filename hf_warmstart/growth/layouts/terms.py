"""Terms: what is known of the length of an axis while a forward pass is followed.

An axis starts as an *atom* of known size. Operations refine it: a `view` into heads makes it a product, a `split` makes
it a concatenation, and whatever adds or contracts two axes *unifies* their terms, as in first-order unification. When
the pass is over, each axis of each parameter is an expression over the atoms that are left, and fused orders
(`[q; k; v]`, heads outermost, interleaved gates) have been found without being guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

Form = Literal["atom", "cat", "prod"]


class Tangle(Exception):
    """Two terms that cannot be one: their axes have structures that do not fit together."""


class Term:
    """A node of a union-find forest: an atom, or a concatenation or product of terms."""

    __slots__ = ("_link", "_roots", "form", "parts", "size")

    def __init__(self, size: int, form: Form = "atom", parts: tuple[Term, ...] = ()):
        self.size = size
        self.form: Form = form
        self.parts = parts
        self._link: Term | None = None
        self._roots: frozenset[Term] | None = None

    def find(self) -> Term:
        """The representative of all terms that were unified with this one."""
        node = self
        while node._link is not None:
            if node._link._link is not None:
                node._link = node._link._link
            node = node._link
        return node

    def atoms(self) -> Iterator[Term]:
        """The atoms that the term is made of, with repetitions."""
        node = self.find()
        if node.form == "atom":
            yield node
        for part in node.parts:
            yield from part.atoms()

    def roots(self) -> frozenset[Term]:
        """The atoms once each. Remembered: to be asked only when nothing is unified any more."""
        if self._roots is None:
            self._roots = frozenset(self.atoms())
        return self._roots

    def __repr__(self) -> str:
        node = self.find()
        if node.form == "atom":
            return str(node.size)
        return f"{node.form}({', '.join(map(repr, node.parts))})"


def _become(node: Term, form: Form, parts: Sequence[Term]) -> None:
    """Refine an atom in place."""
    node.form, node.parts = form, tuple(parts)


def flat(term: Term, form: Form) -> list[Term]:
    """The parts of a term as one flat concatenation or product; the term alone where it is neither."""
    node = term.find()
    if node.form != form:
        return [node]
    return [leaf for part in node.parts for leaf in flat(part, form) if form == "cat" or leaf.size > 1]


def product(terms: Sequence[Term]) -> Term:
    """The product of terms, outer first; factors of one are dropped."""
    parts = [leaf for term in terms for leaf in flat(term, "prod") if leaf.size > 1]
    if not parts:
        return Term(1)
    return parts[0] if len(parts) == 1 else Term(math.prod(p.size for p in parts), "prod", tuple(parts))


def concat(terms: Sequence[Term]) -> Term:
    """The concatenation of terms; empty ones are dropped."""
    parts = [leaf for term in terms for leaf in flat(term, "cat") if leaf.size]
    if not parts:
        return Term(0)
    return parts[0] if len(parts) == 1 else Term(sum(p.size for p in parts), "cat", tuple(parts))


def unify(a: Term, b: Term) -> None:
    """Make two terms one. Axes of length one are never joined: they carry nothing.

    Raises:
        Tangle: the structures do not fit.
    """
    a, b = a.find(), b.find()
    if a is b or a.size == 1 and b.size == 1:
        return
    if a.size != b.size:
        raise Tangle(f"{a} and {b}")
    if a.form != "atom" and b.form == "atom":
        a, b = b, a
    if a.form == "atom":
        if any(atom is a for atom in b.atoms()):
            raise Tangle(f"{a} within {b}")
        a._link = b
        return
    if a.form == b.form == "cat":
        _unify_cats(a, b)
    elif a.form == b.form == "prod":
        _unify_products(a, b)
    else:
        cat, prod = (a, b) if a.form == "cat" else (b, a)
        outer = flat(prod, "prod")[0]
        inner = prod.size // outer.size
        cut, rest = split_product(cat, [outer.size, inner])
        unify(outer, cut)
        unify(product(flat(prod, "prod")[1:]), rest)
    if a.find() is not b.find():
        a.find()._link = b.find()


def _unify_cats(a: Term, b: Term) -> None:
    left, right = flat(a, "cat"), flat(b, "cat")
    while left and right:
        x, y = left.pop(0).find(), right.pop(0).find()
        if x.size > y.size:
            head, tail = split_at(x, y.size)
            left.insert(0, tail)
            x = head
        elif y.size > x.size:
            head, tail = split_at(y, x.size)
            right.insert(0, tail)
            y = head
        unify(x, y)


def _unify_products(a: Term, b: Term) -> None:
    inner_a, inner_b = flat(a, "prod")[-1], flat(b, "prod")[-1]
    inner = inner_a if inner_a.size <= inner_b.size else inner_b
    outer_a, last_a = split_product(a, [a.size // inner.size, inner.size])
    outer_b, last_b = split_product(b, [b.size // inner.size, inner.size])
    unify(last_a, last_b)
    unify(outer_a, outer_b)


def split_at(term: Term, size: int) -> tuple[Term, Term]:
    """Cut a term in two after `size` coordinates."""
    node = term.find()
    if size == 0 or size == node.size:
        return (Term(0), node) if size == 0 else (node, Term(0))
    if node.form == "atom":
        head, tail = Term(size), Term(node.size - size)
        _become(node, "cat", (head, tail))
        return head, tail
    if node.form == "cat":
        parts = flat(node, "cat")
        taken: list[Term] = []
        for k, part in enumerate(parts):
            if size >= part.size:
                taken.append(part)
                size -= part.size
                if size == 0:
                    return concat(taken), concat(parts[k + 1 :])
            else:
                head, tail = split_at(part, size)
                return concat([*taken, head]), concat([tail, *parts[k + 1 :]])
    parts = flat(node, "prod")
    inner = node.size // parts[0].size
    if size % inner:
        raise Tangle(f"{node} cut at {size}")
    head, tail = split_at(parts[0], size // inner)
    return product([head, *parts[1:]]), product([tail, *parts[1:]])


def cut(term: Term, start: int, stop: int) -> Term:
    """The coordinates `start:stop` of a term."""
    _, rest = split_at(term, start)
    head, _ = split_at(rest, stop - start)
    return head


def split_product(term: Term, sizes: Sequence[int]) -> list[Term]:
    """A term as a product of factors with the given sizes, outer first."""
    if len(sizes) == 1:
        return [term.find()]
    outer, inner = _split_two(term, sizes[0], math.prod(sizes[1:]))
    return [outer, *split_product(inner, sizes[1:])]


def _split_two(term: Term, outer: int, inner: int) -> tuple[Term, Term]:
    node = term.find()
    if outer == 1:
        return Term(1), node
    if inner == 1:
        return node, Term(1)
    if node.form == "atom":
        made = Term(outer), Term(inner)
        _become(node, "prod", made)
        return made
    if node.form == "prod":
        parts = flat(node, "prod")
        taken: list[Term] = []
        while parts:
            have = math.prod(p.size for p in taken)
            if have == inner:
                break
            last = parts.pop()
            if have * last.size <= inner:
                taken.insert(0, last)
                continue
            need = inner // have
            if inner % have or last.size % need:
                raise Tangle(f"{node} as {outer} x {inner}")
            rest, more = _split_two(last, last.size // need, need)
            parts.append(rest)
            taken.insert(0, more)
        return product(parts), product(taken)
    parts = flat(node, "cat")
    if all(part.size % inner == 0 for part in parts):
        outers, inners = zip(*(_split_two(part, part.size // inner, inner) for part in parts), strict=True)
        for other in inners[1:]:
            unify(inners[0], other)
        return concat(outers), inners[0].find()
    # Whole repetitions of one pattern: [a; b; a; b] is 2 x [a; b].
    rows = [cut(node, k * inner, (k + 1) * inner) for k in range(outer)]
    for other in rows[1:]:
        unify(rows[0], other)
    return Term(outer), rows[0].find()
