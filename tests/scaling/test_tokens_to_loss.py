"""Tokens-to-loss: exact on ladders that are linear in ln tokens, bounded outside, refused where it has no meaning."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_warmstart import WarmstartError
from hf_warmstart.scaling import Bounded, loss_at_tokens, speedup, tokens_to_loss

tokens = st.floats(1e3, 1e12)
slopes = st.floats(0.01, 2.0)


@given(
    start=tokens, factors=st.lists(st.floats(1.1, 10.0), min_size=1, max_size=5), slope=slopes, share=st.floats(0, 1)
)
def test_a_ladder_that_is_linear_in_ln_tokens_gives_its_own_line(start, factors, slope, share):
    budgets = [start]
    for factor in factors:
        budgets.append(budgets[-1] * factor)
    ladder = {d: 5.0 - slope * math.log(d / start) for d in budgets}
    asked = start * (budgets[-1] / start) ** share
    loss = 5.0 - slope * math.log(asked / start)
    found = tokens_to_loss(ladder, min(max(loss, min(ladder.values())), max(ladder.values())))
    assert found.known and found.value == pytest.approx(asked, rel=1e-6)
    assert loss_at_tokens(ladder, min(max(asked, start), budgets[-1])).value == pytest.approx(loss, abs=1e-6)


@given(st.permutations([(1e6, 3.0), (2e6, 2.6), (4e6, 2.4), (9e6, 2.1)]))
def test_the_order_of_rungs_does_not_matter_and_rungs_are_met_exactly(rungs):
    for budget, loss in rungs:
        assert tokens_to_loss(rungs, loss) == Bounded(budget)


def test_outside_the_ladder_there_is_only_a_bound():
    ladder = {1e6: 3.0, 4e6: 2.0}
    assert tokens_to_loss(ladder, 3.1) == Bounded(1e6, "<=")
    assert tokens_to_loss(ladder, 1.9) == Bounded(4e6, ">=")
    assert loss_at_tokens(ladder, 5e6) == Bounded(2.0, "<=")
    assert loss_at_tokens(ladder, 1e5) == Bounded(3.0, ">=")


@pytest.mark.parametrize(
    ("ladder", "words"),
    [
        ({1e6: 3.0}, "at least two rungs, got 1"),
        ({}, "at least two rungs, got 0"),
        ({1e6: 3.0, 2e6: 3.0}, "must fall"),
        ({1e6: 3.0, 2e6: 3.1}, "must fall"),
        ([(1e6, 3.0), (1e6, 2.0)], "must fall"),
        ({1e6: math.nan, 2e6: 2.0}, "impossible rungs"),
        ({0: 3.0, 2e6: 2.0}, "impossible rungs"),
    ],
)
def test_ladders_without_meaning_are_refused(ladder, words):
    with pytest.raises(WarmstartError, match=words):
        tokens_to_loss(ladder, 2.5)


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(WarmstartError, match="finite"):
        tokens_to_loss({1e6: 3.0, 4e6: 2.0}, math.inf)


def test_speedup_counts_the_base_and_keeps_the_bound():
    assert speedup(Bounded(3e6), 10.0, 2e7).value == pytest.approx(1.5)
    assert speedup(Bounded(3e6, ">="), 10.0, 2e7, base_flops=1e7) == Bounded(1.0, ">=")
    with pytest.raises(WarmstartError, match="base_flops"):
        speedup(Bounded(3e6), 10.0, 2e7, base_flops=-1.0)
