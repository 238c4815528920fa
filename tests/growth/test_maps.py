"""Properties of maps and axes, for random sizes: the invariant `R^T W = I`, and that expressions are Kronecker algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_warmstart import GrowthConfig, WarmstartError
from hf_warmstart.growth.axes import (
    Concat,
    Dual,
    Fixed,
    Gain,
    Postnorm,
    Prenorm,
    Product,
    Space,
    axis_from_data,
)
from hf_warmstart.growth.maps import LayerMap, SpaceMap
from hf_warmstart.growth.operators import DEPTH_OPERATORS, WIDTH_OPERATORS

KINDS = ("rms_normed", "layer_normed", "linear", "elementwise", "heads")
EXACT = sorted(name for name, operator in WIDTH_OPERATORS.items() if operator.exact)

sizes = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(n, 4 * n + 3)))
operators = st.sampled_from(EXACT)
kinds = st.sampled_from(KINDS)


def build(operator: str, size: tuple[int, int], kind: str) -> SpaceMap:
    return WIDTH_OPERATORS[operator].build(*size, kind, GrowthConfig(width=2).options)


def identity(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


maps = st.builds(build, operators, sizes, kinds)
plain_maps = st.builds(build, operators, sizes, st.just("elementwise"))


@given(maps)
def test_what_is_read_is_what_was_written(space):
    assert torch.allclose(space.dense_read().T @ space.dense_write(), identity(space.n), atol=1e-12)
    space.check()


def test_check_refuses_a_map_that_loses_something():
    with pytest.raises(WarmstartError, match="not zero"):
        SpaceMap.build(2, [0, 1, 0], 1.0, [1.0, 1.0, 0.5]).check()


@given(operators, sizes)
def test_root_mean_square_norms_see_the_same_mean_square(operator, size):
    space = build(operator, size, "rms_normed")
    x = torch.randn(7, space.n, dtype=torch.float64)
    grown = space.push(x, 1, "write")
    assert torch.allclose(grown.square().mean(1), x.square().mean(1), rtol=1e-12)


@given(operators, sizes)
def test_layer_norms_see_the_same_mean_and_variance(operator, size):
    space = build(operator, size, "layer_normed")
    x = torch.randn(7, space.n, dtype=torch.float64)
    grown = space.push(x, 1, "write")
    variance = lambda v: v.var(1, correction=0)  # noqa: E731
    assert torch.allclose(variance(grown), variance(x), rtol=1e-11)
    centred = grown - grown.mean(1, keepdim=True)
    # What the norm makes is written by the same factors, and nothing in the channels that held the mean.
    after = Postnorm("s").map({"s": space}).push(x - x.mean(1, keepdim=True), 1, "write")
    assert torch.allclose(centred, after, atol=1e-12)


@given(maps, st.sampled_from(["write", "read"]))
def test_pull_is_the_transpose_of_push(space, side):
    matrix = space.dense_write() if side == "write" else space.dense_read()
    y = torch.randn(space.m, 3, dtype=torch.float64)
    assert torch.allclose(space.pull(y, 0, side), matrix.T @ y, atol=1e-12)
    x = torch.randn(2, space.n, dtype=torch.float64)
    assert torch.allclose(space.push(x, 1, side), x @ matrix.T, atol=1e-12)


@given(plain_maps)
def test_square_squares_every_entry(space):
    assert torch.allclose(space.square().dense_write(), space.dense_write() ** 2)
    assert torch.allclose(space.square().dense_read(), space.dense_read() ** 2)


@given(plain_maps)
def test_the_dual_swaps_writing_and_reading(space):
    assert torch.equal(space.dual().dense_write(), space.dense_read())
    assert torch.equal(space.dual().dual().dense_write(), space.dense_write())


@given(plain_maps, plain_maps)
def test_a_product_is_a_kronecker_product_and_a_concat_a_direct_sum(a, b):
    both = {"a": a, "b": b}
    product = Product("a", "b").map(both)
    assert torch.allclose(product.dense_write(), torch.kron(a.dense_write(), b.dense_write()))
    assert torch.allclose(product.dense_read(), torch.kron(a.dense_read(), b.dense_read()))
    concat = Concat("a", "b").map(both)
    assert torch.allclose(concat.dense_write(), torch.block_diag(a.dense_write(), b.dense_write()))
    assert Concat("a", "b").size({"a": a.m, "b": b.m}) == concat.m
    assert Product("a", "b").size({"a": a.m, "b": b.m}) == product.m
    product.check(), concat.check()


@given(operators, sizes, st.sampled_from(KINDS), st.integers(0, 20))
def test_maps_compose(operator, size, kind, more):
    first = build(operator, size, kind)
    second = build("exact_copy", (first.m, first.m * (1 + more % 3)), kind)
    composed = second.compose(first)
    assert torch.allclose(composed.dense_write(), second.dense_write() @ first.dense_write(), atol=1e-12)
    assert torch.allclose(composed.dense_read(), second.dense_read() @ first.dense_read(), atol=1e-12)
    composed.check()


@given(plain_maps, plain_maps)
def test_before_a_norm_over_several_spaces_the_mean_square_is_kept_and_nothing_is_left_out(a, b):
    both = {"a": a, "b": b}
    space = Prenorm(Product("a", "b")).map(both)
    x = torch.randn(5, space.n, dtype=torch.float64)
    assert torch.allclose(space.push(x, 1, "write").square().mean(1), x.square().mean(1), rtol=1e-12)
    assert not bool(space.unsourced.any())


@given(operators, sizes, st.sampled_from(["rms_normed", "layer_normed"]))
def test_a_gain_joins_what_its_norm_reads_and_makes(operator, size, kind):
    spaces = {"s": build(operator, size, kind)}
    for makes in (Postnorm("s"), Dual("s")):
        gain = Gain("s", makes).map(spaces)
        x = torch.randn(4, gain.n, dtype=torch.float64)
        x = x - x.mean(1, keepdim=True)
        weight = torch.randn(gain.n, dtype=torch.float64)
        grown = spaces["s"].push(x, 1, "write") * gain.push(weight, 0, "write")
        expected = makes.map(spaces).push(x * weight, 1, "write")
        sourced = ~spaces["s"].unsourced
        assert torch.allclose(grown[:, sourced], expected[:, sourced], atol=1e-12)
        gain.check()


@given(sizes)
def test_a_tied_head_reads_with_what_the_embedding_writes(size):
    space = build("uneven_copy", size, "rms_normed")
    head_input = Dual("s").map({"s": space})
    table, x = torch.randn(9, space.n, dtype=torch.float64), torch.randn(4, space.n, dtype=torch.float64)
    logits = head_input.push(x, 1, "write") @ space.push(table, 1, "write").T
    assert torch.allclose(logits, x @ table.T, atol=1e-11)


expressions = st.recursive(
    st.one_of(st.sampled_from(["a", "b", "c"]).map(Space), st.integers(1, 9).map(Fixed)),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: Concat(*parts)),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: Product(*parts)),
        inner.map(Prenorm),
        inner.map(Dual),
        st.tuples(inner, inner).map(lambda pair: Gain(*pair)),
    ),
    max_leaves=6,
)


@given(expressions)
def test_expressions_survive_being_written_as_data(axis):
    assert axis_from_data(axis.to_data()) == axis


@pytest.mark.parametrize("data", [["sum", "a"], [], ["gain"]])
def test_unknown_expressions_are_refused(data):
    with pytest.raises((WarmstartError, TypeError)):
        axis_from_data(data)


@pytest.mark.parametrize("name", sorted(DEPTH_OPERATORS))
@given(before=st.integers(1, 12), extra=st.integers(0, 12))
@settings(max_examples=40)
def test_layer_maps_have_the_asked_depth_and_use_every_layer(name, before, extra):
    after = before + min(extra, before)
    layers = DEPTH_OPERATORS[name].build(before, after)
    assert layers.after == after
    assert name == "overlap" or set(layers.source) == set(range(before))
    assert layers.exact == (DEPTH_OPERATORS[name].exact or after == before)
    assert LayerMap.identity(after).compose(layers) == layers


@given(st.integers(1, 10), st.integers(1, 25))
def test_identity_blocks_are_spread_evenly(before, extra):
    layers = DEPTH_OPERATORS["identity_blocks"].build(before, before + extra)
    counts = [sum(s == k and g for s, g in zip(layers.source, layers.gated, strict=True)) for k in range(before)]
    assert sum(counts) == extra
    assert max(counts) - min(counts) <= 1


@given(st.integers(1, 10), st.integers(0, 25), st.data())
def test_new_layers_follow_the_nearest_layer_that_they_may_copy(before, extra, data):
    able = sorted(data.draw(st.sets(st.integers(0, before - 1), min_size=1)))
    layers = LayerMap.inserted(before, data.draw(st.lists(st.integers(0, before - 1), min_size=extra, max_size=extra)))
    copying = layers.copying(able)
    assert copying.after == layers.after and copying.exact
    assert {s for s, new in zip(copying.source, copying.gated, strict=True) if new} <= set(able)
    assert layers.copying(range(before)) == layers
