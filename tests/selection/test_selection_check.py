"""The check of selections: its rule of ties and its regrets on planted losses, its settings, and a small whole one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import selection_check
from benchmarks.selection_check import MARKERS, Check, gather
from benchmarks.selection_outcomes import Outcome, figures, regrets
from benchmarks.selection_settings import HELD_OUT, PARENT_PART, PART, SETS, SPENT, candidates
from hf_warmstart.selection.candidates import check_names

from ..test_package import ROOT

FIRST = [2.0, 2.1, 2.2, 2.3, 2.4]


def behind(differences: list[float]) -> list[float]:
    return [loss + difference for loss, difference in zip(FIRST, differences, strict=True)]


def outcome(pick: str, second: list[float], third: list[float]) -> Outcome:
    return Outcome("planted", pick, 0.1, {"third": behind(third), "second": behind(second), "first": FIRST})


NOISY = [0.03, -0.02, 0.02, -0.02, 0.01]  # mean 0.004, standard error 0.0103
CLEAR = [0.011, 0.009, 0.012, 0.008, 0.010]  # mean 0.010, standard error 0.0007


@pytest.mark.parametrize(
    ("pick", "second", "third", "right"),
    [
        ("first", CLEAR, CLEAR, True),
        ("second", CLEAR, [0.5] * 5, False),
        ("second", NOISY, [0.5] * 5, True),
        # A third within one standard error is no tie, whatever the second is: two candidates at most.
        ("third", NOISY, [d + 0.001 for d in NOISY], False),
        ("second", NOISY, [d + 0.001 for d in NOISY], True),
        # Losses that scatter alike are told apart by their pairs, however much they scatter together.
        ("second", [0.0001] * 4 + [0.00011], [0.5] * 5, False),
    ],
)
def test_the_winner_or_the_next_within_a_paired_standard_error_is_right(pick, second, third, right):
    made = outcome(pick, second, third)
    assert made.winner == "first" and made.is_right is right
    assert made.regret("first") == 0 and made.regret("second") == pytest.approx(sum(second) / 5)


def test_regrets_are_those_of_choice_best_constant_and_random():
    one = Outcome("one", "a", 0.1, {"a": [1.0, 1.0], "b": [1.2, 1.2], "c": [1.3, 1.5]})
    two = Outcome("two", "c", 0.1, {"a": [2.6, 2.6], "b": [2.0, 2.0], "c": [2.3, 2.3]})
    sums = regrets([one, two])
    assert sums["selection"] == pytest.approx((0.0 + 0.3) / 2)
    assert sums["constant_choice"] == "b" and sums["constant"] == pytest.approx((0.2 + 0.0) / 2)
    assert sums["random"] == pytest.approx(((0.0 + 0.2 + 0.4) / 3 + (0.6 + 0.0 + 0.3) / 3) / 2)
    assert (sums["right"], sums["settings"]) == (1, 2)


def test_longer_races_are_counted_by_their_own_picks_once_all_are_there():
    losses = {"exact_copy": [1.0, 1.0], "szp_0.4": [1.2, 1.3]}
    one = Outcome(HELD_OUT[0].name, "szp_0.4", 0.1, losses, longer={256: ("szp_0.4", 0.2), 512: ("exact_copy", 0.3)})
    two = Outcome(HELD_OUT[1].name, "exact_copy", 0.1, losses, longer={256: ("exact_copy", 0.1)})
    text = figures(SETS["held-out"][0], HELD_OUT, [one, two], "held-out")
    wrong = HELD_OUT[0].seed
    assert f"| a budget of 10% | 10.0% | 1 of 2 | 0.1250 | {wrong} (szp_0.4) |" in text
    assert f"| 256 steps | 15.0% | 1 of 2 | 0.1250 | {wrong} (szp_0.4) |" in text and "| 512 steps" not in text
    two.longer[512] = ("exact_copy", 0.5)
    assert "| 512 steps | 40.0% | 2 of 2 | 0.0000 |  |" in figures(
        SETS["held-out"][0], HELD_OUT, [one, two], "held-out"
    )


def column(name: str, cases) -> list:
    return sorted(getattr(case, name) for case in cases)


def test_held_out_settings_are_drawn_from_the_kinds_of_those_before_and_measured_on_other_text():
    (design, developed), (held, _) = SETS["development"], SETS["held-out"]
    assert held == replace(design, half=0, longer=held.longer) and design.half == 1
    assert design.steps == 1280 and design.repeats >= 5 and design.share == 0.1
    assert len(HELD_OUT) == len(SPENT) == 10 and set(SPENT) < set(developed)
    assert not {case.seed for case in developed} & {case.seed for case in HELD_OUT}
    assert not {case.start for case in SPENT} & {case.start for case in HELD_OUT}
    assert all(case.start + PARENT_PART + PART <= 1 for case in (*developed, *HELD_OUT))
    for name in (
        "family",
        "width",
        "layers",
        "text",
        "parent_text",
        "parent_steps",
        "learning_rate",
        "regime",
        "schedule",
    ):
        assert column(name, HELD_OUT) == column(name, SPENT)
    # Drawn once: another draw, or another order, would be a choice.
    assert [(c.family, c.learning_rate, c.regime) for c in HELD_OUT[:3]] == [
        ("llama", 1e-3, "shuffled"),
        ("llama", 3e-3, "deterministic"),
        ("gpt2", 2e-3, "stochastic"),
    ]
    check_names(candidates(held))
    assert 6 <= len(candidates(held)) <= 10
    assert all(marker in (ROOT / "docs/selection.md").read_text() for marker in MARKERS)


@pytest.mark.slow
def test_a_small_check_runs_counts_and_is_not_run_again(tmp_path, monkeypatch):
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "saw",
        "dog",
        "that",
        "ran",
        "to",
        "it",
        "in",
        "sun",
        "while",
        "we",
    ]
    texts = {}
    for name, step in (("stories", 3), ("mathematics", 5)):
        files = [tmp_path / f"{name}.txt", tmp_path / f"{name}-held-out.txt"]
        for file, count in zip(files, (40, 12), strict=True):
            text = [" ".join(words[(k * step + j * j) % len(words)] for j in range(60)) for k in range(count)]
            file.write_text("<|endoftext|>".join(text))
        texts[name] = files
    check = Check(tmp_path / "out", "quick", texts)
    assert gather(check) == []
    for unit in check.units():
        check.run(unit)
        assert check.path_of(unit).exists()
    found = gather(check)
    assert [made.name for made in found] == [case.name for case in check.cases]
    for made in found:
        assert set(made.losses) == {"exact_copy", "reference_slice"} and all(len(v) == 2 for v in made.losses.values())
        assert made.pick in made.losses and 0 < made.share <= check.scale.share
        assert set(made.longer) == {16} and made.longer[16][0] in made.losses
        assert made.longer[16][1] >= made.share  # a race may be decided before
        assert made.losses["exact_copy"][0] != made.losses["exact_copy"][1]  # other data in each repeat
    text = figures(check.scale, check.cases, found, "quick")
    assert "2 of 2 settings are complete" in text and "best constant choice" in text and "| 8 |" in text
    assert text.count("| 16 steps |") == 1
    monkeypatch.setattr(selection_check, "train_parent", None)
    monkeypatch.setattr(selection_check, "select_warmstart", None)
    monkeypatch.setattr("hf_warmstart.selection.run.run_arm", None)
    again = Check(tmp_path / "out", "quick", texts)
    for unit in again.units():
        again.run(unit)
    assert gather(again) == found
