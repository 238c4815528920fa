"""Who goes on, when a leader is clear, what a budget affords, and how metrics agree with an outcome."""

from __future__ import annotations

import pytest
from scipy import stats

from hf_warmstart.selection.halving import affordable, half, leader_is_clear, margin, ordered, price_of_rounds
from hf_warmstart.selection.outcomes import agreement, loss_auc, outcomes, spearman


def test_a_margin_is_paired_within_repeats():
    leader, rival = [2.0, 3.0, 2.5], [2.1, 3.12, 2.58]
    found = margin(leader, rival)
    test = stats.ttest_rel(rival, leader)
    low, high = test.confidence_interval(0.95)
    assert found.mean == pytest.approx(0.1) and (found.low, found.high) == pytest.approx((low, high))
    assert found.clear and found.repeats == 3
    assert margin(leader, rival, rivals=4).low < found.low
    alone = margin([2.0], [2.1])
    assert alone.low is None and not alone.clear


def test_a_leader_is_clear_over_all_rivals_after_enough_repeats():
    losses = {"a": [1.0, 2.0, 3.0], "b": [1.1, 2.11, 3.09], "c": [1.5, 2.4, 3.6]}
    assert leader_is_clear(losses)
    assert not leader_is_clear({name: values[:2] for name, values in losses.items()})
    assert not leader_is_clear({**losses, "d": [0.9, 2.3, 3.2]})


def test_the_order_is_taken_over_common_repeats():
    assert ordered({"late": [1.0], "b": [2.0, 0.0], "a": [2.0, 0.1]}) == ["late", "a", "b"]
    assert half(["a", "b", "c", "d", "e"]) == ["a", "b", "c"] and half(["a", "b"]) == ["a", "b"]


def test_a_budget_says_how_many_are_continued():
    names = [f"c{k}" for k in range(8)]
    first, again = (lambda name: 64.0), (lambda name: 128.0)
    assert affordable(names, first, again, None) == (names, 3)
    # 4 x 64 for the first round, then two rounds of two
    assert price_of_rounds(names[:4], first, again, 3) == 4 * 64 + 2 * 2 * 128
    assert affordable(names, first, again, 768.0) == (names[:4], 3)
    assert affordable(names, first, again, 767.0) == (names[:3], 3)
    assert affordable(names, first, again, 128.0) == (names[:2], 1)
    assert affordable(names, first, again, 127.0) == ([], 0)
    # Of a selection that may repeat once there is but one round to pay for.
    assert affordable(names, first, again, 768.0, 1) == (names, 1)
    assert affordable(names, first, again, 384.0, 1) == (names[:6], 1)


def test_the_area_under_a_curve_is_its_mean():
    rows = [[0, 4.0], [2, 2.0], [8, 2.0]]
    assert loss_auc(rows) == pytest.approx((2 * 3.0 + 6 * 2.0) / 8)
    assert loss_auc(rows, 2) == pytest.approx(3.0) and loss_auc(rows[:1]) == 4.0
    assert outcomes({"a": rows}, "auc") == {"a": loss_auc(rows)} and outcomes({"a": rows}, "final_loss") == {"a": 2.0}


def test_agreement_is_spearmans_and_escape_counts_as_good():
    metrics = {
        "a": {"kl": 0.1, "escape@16": 0.9, "loss_change": 0.0},
        "b": {"kl": 0.3, "escape@16": 0.5, "loss_change": 0.0},
        "c": {"kl": 0.2, "escape@16": 0.1, "loss_change": 0.0, "drift_logits@16": 1.0},
    }
    found = agreement(metrics, ["a", "b", "c"])
    assert found["kl"] == {"spearman": pytest.approx(0.5), "top_1": True, "candidates": 3}
    assert found["escape@16"]["spearman"] == pytest.approx(1.0) and found["escape@16"]["top_1"] is True
    assert found["loss_change"] == {"spearman": None, "top_1": None, "candidates": 3}
    assert found["drift_logits@16"]["candidates"] == 1
    assert agreement(metrics, ["c", "b", "a"])["escape@16"] == {
        "spearman": pytest.approx(-1.0),
        "top_1": False,
        "candidates": 3,
    }
    assert spearman([1.0, 2.0]) is None
