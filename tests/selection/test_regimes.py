"""Regimes: shuffle and dropout are two switches, and every candidate gets the same data."""

from __future__ import annotations

import pytest

from hf_warmstart import WarmstartError
from hf_warmstart.selection.regimes import DROPOUT, Regime, matched_steps

from ..models import tiny_config


@pytest.mark.parametrize(
    ("name", "shuffle", "dropout"),
    [
        ("deterministic", False, 0.0),
        ("shuffled", True, 0.0),
        ("dropout", False, DROPOUT),
        ("stochastic", True, DROPOUT),
    ],
)
def test_four_regimes_are_two_switches(name, shuffle, dropout):
    regime = Regime.of(name)
    assert (regime.shuffle, regime.dropout, regime.name) == (shuffle, dropout, name)
    assert Regime.of(regime) is regime and Regime.of("both") == Regime.of("stochastic")


def test_dropout_sets_every_rate_that_the_class_has_and_the_input_is_untouched():
    config = tiny_config("gpt2")
    made = Regime(dropout=0.3).configured(config)
    assert (made.resid_pdrop, made.embd_pdrop, made.attn_pdrop) == (0.3, 0.3, 0.3)
    assert config.resid_pdrop == 0.0
    assert Regime().configured(made).attn_pdrop == 0.0
    opt = Regime(dropout=0.3).configured(tiny_config("opt"))
    assert (opt.dropout, opt.attention_dropout, opt.layerdrop) == (0.3, 0.3, 0.0)


def test_a_class_without_dropout_is_refused_where_it_is_asked_for():
    config = tiny_config("llama")
    del config.attention_dropout
    with pytest.raises(WarmstartError, match="LlamaConfig has no rate of dropout. Pass regime='shuffled'"):
        Regime.of("stochastic").configured(config)
    assert Regime.of("shuffled").configured(config) is not config


def test_repeats_in_order_take_the_next_part_and_shuffled_ones_another_order():
    assert Regime().order(10, 4, 3, seed=0, repeat=0) == [3, 4, 5, 6]
    assert Regime().order(10, 4, 3, seed=0, repeat=1) == [7, 8, 9, 0]
    shuffled = Regime(shuffle=True)
    first = shuffled.order(10, 25, 0, seed=0, repeat=0)
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(10)) and first[:10] != first[10:20]
    assert first == shuffled.order(10, 25, 0, seed=0, repeat=0)
    assert first != shuffled.order(10, 25, 0, seed=0, repeat=1) != shuffled.order(10, 25, 0, seed=1, repeat=1)


def test_at_equal_prices_the_cheapest_takes_all_steps():
    assert matched_steps(128, {"small": 1.0, "large": 2.5}) == {"small": 128, "large": 51}


@pytest.mark.parametrize("wrong", ["random", "", None])
def test_unknown_regimes_are_refused(wrong):
    with pytest.raises(WarmstartError, match="is none of .'deterministic', 'shuffled'"):
        Regime.of(wrong)
    with pytest.raises(WarmstartError, match="is no rate"):
        Regime(dropout=1.0)
