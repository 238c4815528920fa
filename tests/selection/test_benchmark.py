"""The study's figures are those of the losses that they are made from."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scipy import stats

from benchmarks import selection
from benchmarks.selection import MARKERS, SETTINGS, Outcomes, candidates, claims, interval
from hf_warmstart.selection.candidates import check_names
from hf_warmstart.selection.run import held

from ..test_package import ROOT


def outcomes(slice_is_ahead: float) -> Outcomes:
    """Three settings, in which the slice ends ahead of the copy by about as much."""
    made = Outcomes()
    for name, behind in (("exact_copy", 0.0), ("reference_slice", -slice_is_ahead), ("asymmetric_reset", 0.5)):
        made.probe[name] = [3.0 + abs(behind)] * 3
        made.area[name] = [2.5 + behind, 2.6 + behind, 2.7 + 1.1 * behind]
        made.final[name] = [2.0 + behind] * 3
    escapes = {"exact_copy": 0.0, "reference_slice": 0.4, "asymmetric_reset": 0.2}
    made.metrics = [{name: {"escape@64": e, "kl@16": e} for name, e in escapes.items()} for _ in range(3)]
    return made


def test_claims_count_winners_and_pair_differences():
    lines = claims({"deterministic": outcomes(0.2), "stochastic": outcomes(-0.2)}, SETTINGS["full"])
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert cells["exact copy first in every probe (16 steps, mean loss)"] == ["first in 3 of 3", "first in 3 of 3"]
    winners = "structured non-clone first after deterministic continuation (128 steps, mean loss)"
    assert cells[winners] == ["first in 3 of 3", "first in 0 of 3"]
    mean, reach = interval([-0.2, -0.2, -0.22])
    assert cells["reference slice behind exact copy, mean loss (negative: ahead)"][0] == f"{mean:+.4f} ± {reach:.4f}"
    (escape,) = [found for name, found in cells.items() if name.startswith("escape tells")]
    assert [cell.split()[0] for cell in escape] == ["+0.50", "-0.50"]


def test_intervals_are_students():
    values = [1.0, 1.5, 0.7]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, reach = interval(values)
    assert (mean - reach, mean + reach) == pytest.approx((low, high)) and interval([2.0, 3.0]) == (2.5, None)


def test_the_full_study_is_what_it_has_to_be():
    full = SETTINGS["full"]
    check_names(candidates(full))
    assert len(full.parent_steps) == 2 and len(candidates(full)) >= 6 and len(full.seeds) >= 3
    assert 16 in full.lags and full.steps == 128 and len(full.regimes) == 4
    assert all(marker in (ROOT / "docs/selection.md").read_text() for marker in MARKERS)


def test_what_another_process_is_at_is_left_to_it_until_nothing_else_is_left(tmp_path, monkeypatch):
    setting, made = replace(SETTINGS["quick"], seeds=(0, 1)), []

    def select(parent, folder, *_):
        assert parent.is_dir()
        folder.mkdir()
        (folder / "selection.json").write_text("{}")
        made.append(folder.name)

    def make_parent(folder, *_):
        for step in setting.parent_steps:
            (folder / f"checkpoint-{step}").mkdir()
        made.append(folder.name)

    monkeypatch.setattr(selection, "load_data", lambda *_: (None, None, 0))
    monkeypatch.setattr(selection, "make_parent", make_parent)
    monkeypatch.setattr(selection, "select", select)
    with held(tmp_path / ".seed-0-step-40-stochastic.lock") as mine:  # whole, by another process
        assert mine
        selection.run_study(tmp_path, tmp_path, tmp_path, setting)
    places = [f"step-{step}-{regime}" for step in (40, 80) for regime in ("deterministic", "stochastic")]
    of_seed = {seed: [f"seed-{seed}-{place}" for place in places] for seed in (0, 1)}
    shared = of_seed[0].pop(1)
    assert made == ["parent-seed-0", *of_seed[0], "parent-seed-1", *of_seed[1], shared]


def test_a_parent_that_another_process_trains_is_not_waited_for(tmp_path):
    with held(tmp_path / "base" / ".checkpoint-2.lock"):
        assert not selection.made_if_free(tmp_path / "base" / "checkpoint-2", lambda: pytest.fail("it is being made"))
    assert selection.made_if_free(tmp_path / "base" / "checkpoint-2", (tmp_path / "base" / "checkpoint-2").mkdir)
