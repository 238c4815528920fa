"""Who is left behind in a race, and where the others end, on planted curves."""

from __future__ import annotations

import math

import pytest

from hf_warmstart.selection.racing import distance_at_end, extrapolated, left_behind
from hf_warmstart.selection.study import Study

STEPS = [0, 16, 32, 64]


def curve(*losses: float) -> list[list[float]]:
    return [[step, loss] for step, loss in zip(STEPS, losses, strict=True)]


def test_those_are_left_behind_that_another_one_leads_and_leads_by_more():
    curves = {
        "first": curve(4.0, 3.2, 3.0, 2.9),
        "recovers": curve(5.0, 4.2, 3.8, 3.6),  # far behind, and catching up with all
        "keeps": curve(4.0, 3.3, 3.1, 3.0),  # behind as before
        "falls": curve(4.0, 3.2, 3.05, 2.98),
        "between": curve(4.0, 3.35, 3.15, 3.02),  # catches up with the first, and with `keeps` and `falls`
    }
    assert left_behind(curves) == ["keeps", "falls"]
    # One that is left behind by another that is no leader: `turned` loses to `recovers` alone.
    curves = {name: curves[name] for name in ("first", "recovers")}
    curves["turned"] = curve(4.0, 3.9, 3.75, 3.62)
    assert left_behind(curves) == ["turned"]
    assert left_behind({"a": curve(4, 3, 2, 1), "b": curve(4, 3, 2, 1)}) == []
    assert left_behind({"alone": curve(4, 3, 2, 1)}) == []


def test_the_half_of_a_last_step_between_evaluations_is_interpolated():
    leader = [[0, 4.0], [16, 3.0], [32, 2.0], [48, 1.0]]
    assert left_behind({"a": leader, "b": [[0, 4.0], [16, 3.5], [32, 2.5], [48, 1.4]]}) == []
    assert left_behind({"a": leader, "b": [[0, 4.0], [16, 3.3], [32, 2.4], [48, 1.4]]}) == ["b"]


@pytest.mark.parametrize("alpha", [0.3, 1.0, 1.7])
def test_a_power_law_that_comes_to_rest_is_taken_on_exactly(alpha):
    law = lambda share: -0.05 + 0.02 * share**-alpha  # noqa: E731
    shares = [0.05, 0.07, 0.1, 0.15, 0.2]
    assert distance_at_end(shares, list(map(law, shares))) == pytest.approx(law(1.0), abs=1e-4)


def test_a_straight_line_in_the_logarithm_is_taken_on_and_nothing_that_speeds_up_is_taken_further():
    shares = [0.05, 0.1, 0.2]
    line = lambda share: 0.1 - 0.03 * math.log(share)  # noqa: E731
    assert distance_at_end(shares, list(map(line, shares))) == pytest.approx(line(1.0), abs=1e-4)
    speeds_up = [0.3, 0.28, 0.2]
    straight = distance_at_end(shares, speeds_up)
    assert straight == pytest.approx(0.26 - 0.05 * (1 + math.log2(5)), abs=1e-4)  # the straight line through them


def test_too_few_points_or_a_plan_that_is_done_leave_the_last_distance():
    assert distance_at_end([0.1, 0.2], [0.3, 0.1]) == 0.1
    assert distance_at_end([0.5, 0.7, 1.0], [0.3, 0.2, 0.1]) == 0.1


def test_distances_to_the_leader_are_taken_over_the_last_two_doublings():
    used = {step: step / 640 for step in (0, 16, 32, 64, 128)}
    leader = [[0, 9.0], [16, 8.0], [32, 3.0], [64, 2.5], [128, 2.0]]
    gap = lambda step: 0.5 - 0.1 * math.log2(step / 32)  # noqa: E731
    other = [[0, 0.0], [16, 1.0], *([step, loss + gap(step)] for step, loss in leader[2:])]
    found = extrapolated({"other": other, "leader": leader}, {"other": used, "leader": used})
    assert found == pytest.approx({"leader": 2.0, "other": 2.0 + gap(640)}, abs=1e-4)


def test_a_race_is_evaluated_as_often_in_each_doubling():
    study = object.__new__(Study)
    study.lags, study.eval_every, study.racing = (48,), 24, True
    assert study.evaluated(300) == [24, 48, 72, 96, 144, 192, 288, 300]
    assert study.evaluated(48) == [24, 48] and study.evaluated(100) == [24, 48, 72, 96, 100]
    study.racing = False
    assert study.evaluated(100) == [24, 48, 72, 96, 100]
