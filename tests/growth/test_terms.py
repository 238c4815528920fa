"""Terms: whatever is viewed, cut and unified, coordinates keep their places and sizes add and multiply up."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_warmstart.growth.layouts.terms import (
    Tangle,
    Term,
    concat,
    cut,
    flat,
    product,
    split_at,
    split_product,
    unify,
)

Structure = int | tuple


def _structures(inner):
    return st.tuples(st.sampled_from(["cat", "prod"]), st.lists(inner, min_size=2, max_size=3).map(tuple))


def size_of(structure: Structure) -> int:
    if isinstance(structure, int):
        return structure
    sizes = [size_of(part) for part in structure[1]]
    return sum(sizes) if structure[0] == "cat" else math.prod(sizes)


# The true structure of an axis: a size, or ("cat" | "prod", parts).
structures = st.recursive(st.integers(2, 4), _structures, max_leaves=6).filter(lambda s: size_of(s) <= 150)


def whole(structure: Structure) -> Term:
    """The term of a structure, all of it known."""
    if isinstance(structure, int):
        return Term(structure)
    parts = [whole(part) for part in structure[1]]
    return concat(parts) if structure[0] == "cat" else product(parts)


def reveal(term: Term, structure: Structure, draw, path: tuple = ()) -> dict[tuple, Term]:
    """Refine an unknown axis by some of the views and cuts that its true structure allows; the pieces by their place."""
    if isinstance(structure, int) or not draw(st.booleans()):
        return {path: term}
    form, parts = structure
    sizes = [size_of(part) for part in parts]
    if form == "prod":
        pieces = split_product(term, sizes)
    else:
        ends = list(itertools.accumulate(sizes, initial=0))
        pieces = [cut(term, start, stop) for start, stop in itertools.pairwise(ends)]
    found = {path: term}
    for k, (piece, part) in enumerate(zip(pieces, parts, strict=True)):
        found |= reveal(piece, part, draw, (*path, k))
    return found


def coordinates(term: Term) -> list[tuple]:
    """What each coordinate of a term is: one (atom, number) for each atom that it is indexed by."""
    node = term.find()
    if node.form == "atom":
        return [((node, k),) if node.size > 1 else () for k in range(node.size)]
    parts = [coordinates(part) for part in node.parts]
    if node.form == "cat":
        return [place for part in parts for place in part]
    return [sum(places, ()) for places in itertools.product(*parts)]


def adds_up(term: Term) -> bool:
    node = term.find()
    if node.form == "atom":
        return not node.parts
    sizes = [part.find().size for part in node.parts]
    total = sum(sizes) if node.form == "cat" else math.prod(sizes)
    return node.size == total and all(adds_up(part) for part in node.parts)


def factorisations(size: int) -> list[list[int]]:
    return [[outer, size // outer] for outer in range(1, size + 1) if size % outer == 0]


@given(structures, st.data())
def test_two_partial_views_of_one_axis_become_one(structure, data):
    first, second = Term(size_of(structure)), Term(size_of(structure))
    pieces, others = reveal(first, structure, data.draw), reveal(second, structure, data.draw)
    unify(first, second)
    for place in pieces.keys() & others.keys():
        assert coordinates(pieces[place]) == coordinates(others[place])
        assert adds_up(pieces[place]) and adds_up(others[place])


@given(structures, st.data())
def test_an_axis_that_meets_its_true_structure_takes_it(structure, data):
    seen, truth = Term(size_of(structure)), whole(structure)
    known = coordinates(truth)
    reveal(seen, structure, data.draw)
    unify(seen, truth)
    assert coordinates(seen) == known, "a consistent view refines nothing that was known"
    assert coordinates(truth) == known


@given(structures, st.data())
def test_three_axes_unified_in_any_order_are_one(structure, data):
    terms = [Term(size_of(structure)) for _ in range(3)]
    for term in terms:
        reveal(term, structure, data.draw)
    a, b, c = data.draw(st.permutations(terms))
    unify(a, b)
    unify(c, a)
    assert coordinates(a) == coordinates(b) == coordinates(c)


@given(structures, st.data())
def test_a_cut_holds_the_coordinates_between_its_ends(structure, data):
    term = whole(structure)
    start = data.draw(st.integers(0, term.size))
    stop = data.draw(st.integers(start, term.size))
    try:
        piece = cut(term, start, stop)
    except Tangle:
        assert _crosses(term, start) or _crosses(term, stop)
        return
    assert piece.size == stop - start
    assert coordinates(piece) == coordinates(term)[start:stop]
    assert adds_up(term) and adds_up(piece)


def _crosses(term: Term, place: int) -> bool:
    """Whether a place lies inside the inner coordinates of a product."""
    node = term.find()
    if node.form == "atom" or place in (0, node.size):
        return False
    if node.form == "prod":
        parts = flat(node, "prod")
        return place % (node.size // parts[0].size) != 0 or _crosses(parts[0], place * parts[0].size // node.size)
    for part in flat(node, "cat"):
        if place <= part.size:
            return _crosses(part, place)
        place -= part.size
    raise AssertionError


@given(st.integers(2, 60), st.data())
def test_cuts_side_by_side_are_the_whole(size, data):
    term = Term(size)
    ends = [0, *sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=4))), size]
    pieces = [cut(term, start, stop) for start, stop in itertools.pairwise(ends)]
    assert [piece.size for piece in pieces] == [stop - start for start, stop in itertools.pairwise(ends)]
    assert coordinates(concat(pieces)) == coordinates(term)
    assert adds_up(term)


@given(structures, st.data())
def test_factors_have_their_sizes_and_index_the_same_coordinates(structure, data):
    term = whole(structure)
    sizes = data.draw(st.sampled_from(factorisations(term.size)))
    try:
        factors = split_product(term, sizes)
    except Tangle:
        assert not isinstance(structure, int), "an atom can be viewed in every way"
        return
    assert [factor.size for factor in factors] == sizes
    assert adds_up(term) and all(map(adds_up, factors))
    atoms = list(term.atoms())
    repeats = len(set(atoms)) < len(atoms) or any(atom.size == 1 for atom in atoms)
    if not repeats:  # what counts repetitions is new
        assert coordinates(product(factors)) == coordinates(term)


@given(st.lists(st.sampled_from([2, 3, 5, 7]), min_size=2, max_size=4))
def test_a_product_of_primes_is_viewed_as_its_own_factors_and_as_nothing_else(sizes):
    for outer, inner in factorisations(math.prod(sizes)):
        atoms = [Term(size) for size in sizes]
        first = next((k for k in range(len(sizes) + 1) if math.prod(sizes[:k]) == outer), None)
        if first is None:
            with pytest.raises(Tangle):
                split_product(product(atoms), [outer, inner])
            continue
        left, right = split_product(product(atoms), [outer, inner])
        assert coordinates(left) == coordinates(product(atoms[:first]))
        assert coordinates(right) == coordinates(product(atoms[first:]))


def test_a_view_that_cuts_through_two_factors_is_a_tangle():
    with pytest.raises(Tangle):
        split_product(product([Term(2), Term(3)]), [3, 2])


def test_a_view_may_split_one_factor():
    term = product([Term(2), Term(6)])
    outer, inner = split_product(term, [4, 3])
    assert [atom.size for atom in outer.atoms()] == [2, 2]
    assert [atom.size for atom in term.atoms()] == [2, 2, 3]
    assert inner.find() in list(term.atoms())


@given(st.integers(2, 30), st.integers(2, 30))
def test_axes_of_different_lengths_are_a_tangle(a, b):
    if a != b:
        with pytest.raises(Tangle):
            unify(Term(a), Term(b))


@given(st.integers(2, 5), st.integers(2, 5))
def test_products_in_different_orders_are_a_tangle_unless_they_can_be_split(a, b):
    if math.gcd(a, b) == 1:
        with pytest.raises(Tangle):
            unify(product([Term(a), Term(b)]), product([Term(b), Term(a)]))


def test_a_product_is_not_cut_inside_its_inner_factor():
    with pytest.raises(Tangle):
        split_at(product([Term(4), Term(3)]), 4)


def test_atoms_of_length_one_are_never_joined():
    a, b = Term(1), Term(1)
    unify(a, b)
    assert a.find() is not b.find()
    first, second = concat([Term(1), x := Term(3)]), concat([c := Term(1), y := Term(3)])
    one = next(first.atoms())
    unify(first, second)
    assert x.find() is y.find()
    assert one.find() is not c.find()


def test_factors_of_one_and_empty_parts_are_dropped():
    atom = Term(4)
    assert product([Term(1), atom, Term(1)]) is atom
    assert concat([Term(0), atom]) is atom
    assert product([Term(1), Term(1)]).size == 1
    assert concat([]).size == 0


def test_repeated_segments_are_one_pattern():
    """[a; b; a; b] is two times [a; b]."""
    a, b = Term(3), Term(2)
    outer, inner = split_product(concat([a, b, a, b]), [2, 5])
    assert outer.size == 2
    assert list(inner.atoms()) == [a, b]


def test_fused_heads_are_told_from_fused_blocks():
    """[q; k; v] that meets heads becomes heads in each block; heads outermost stay outermost."""
    heads, width = Term(4), Term(5)
    blocks = Term(60)
    for k in range(3):
        unify(cut(blocks, 20 * k, 20 * (k + 1)), product([heads, width]))
    assert [blocks.find().form, [part.find().form for part in flat(blocks, "cat")]] == ["cat", ["prod"] * 3]
    interleaved = Term(60)
    outer, inner = split_product(interleaved, [4, 15])
    unify(outer, heads)
    for k in range(3):
        unify(cut(inner, 5 * k, 5 * (k + 1)), width)
    assert interleaved.find().form == "prod"
    assert flat(interleaved, "prod")[0].find() is heads.find()
    assert [part.find() for part in flat(flat(interleaved, "prod")[1], "cat")] == [width.find()] * 3
