"""A whole selection: its ranking, its records, what it starts, what it refuses."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import default_data_collator

from hf_warmstart import Candidate, SelectionReport, WarmstartError
from hf_warmstart.growth.plan import GrowthRecord
from hf_warmstart.hub.save import save_grown
from hf_warmstart.selection import prepare, rounds
from hf_warmstart.selection.prepare import prepare_selection
from hf_warmstart.selection.racing import extrapolated

from ..training.conftest import blocks
from .conftest import WIDE, arguments, held_out, small_selection, three


@pytest.fixture(scope="module")
def selected(parent, tmp_path_factory):
    """A selection of four candidates, one of which cannot go on, and its folder."""
    folder = tmp_path_factory.mktemp("selected")
    diverges = Candidate("diverges", **WIDE, state_policy="asymmetric_reset", new_lr_peak=1e30, new_lr_steps=0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    report = small_selection(parent, folder, [*three(), diverges], regime="stochastic")
    assert torch.equal(torch.get_rng_state(), before)  # a selection leaves no trace in random states
    return report, folder


def prepared(parent, folder, candidates=None, train=None, evaluation=None, arguments_=None, **options):
    own = {"probe_steps": (2, 4), "continuation_steps": 8, "repeats": 2}
    return prepare_selection(
        parent,
        candidates,
        train_dataset=blocks(0, 40) if train is None else train,
        eval_dataset=held_out() if evaluation is None else evaluation,
        args=arguments(folder, **(arguments_ or {})),
        data_collator=default_data_collator,
        **(own | options),
    )


def test_the_table_ranks_all_and_the_choice_is_its_first(selected):
    report, _ = selected
    rows = {row["candidate"]: row for row in report.table}
    assert [row["rank"] for row in report.table] == [1, 2, 3, None]
    assert report.best == report.table[0]["candidate"] and report.table[0]["stage"] == "chosen"
    continued = [row for row in report.table if row["loss"] is not None]
    assert continued[0]["loss"] <= continued[1]["loss"] and continued[0]["repeats"] == 2
    assert rows["slice"]["parameters"] == rows["copy"]["parameters"] > 0
    assert report.margin["candidate"] == continued[1]["candidate"] and report.margin["repeats"] == 2
    assert 0 < report.cost_fraction < 1 and not report.margin["clear"]
    assert any("not clear" in line for line in report.unsure)


def test_an_arm_whose_loss_is_not_finite_is_out_with_its_reason_and_the_selection_goes_on(selected):
    report, folder = selected
    row = report.table[-1]
    assert row["candidate"] == "diverges" and row["stage"] == "out" and "loss was nan" in row["reason"]
    assert row["rank"] is None and "diverges: " in report.to_markdown()
    assert not (folder / "_selection/arms/diverges/repeat-1").exists()


def test_all_candidates_have_the_same_batches_evaluations_and_random_state(selected):
    report, folder = selected
    starts = {p.parts[-3]: json.loads(p.read_text()) for p in folder.glob("_selection/arms/*/repeat-0/start.json")}
    first = starts["copy"]
    assert set(starts) == {"copy", "slice", "fresh_state", "diverges"}
    for start in starts.values():
        assert start["data"] == first["data"] and start["random"]["seed"] == first["random"]["seed"]
        assert start["random"]["torch"] == first["random"]["torch"]
    steps = {tuple(step for step, _ in curves[0]) for name, curves in report.curves.items() if name != "diverges"}
    assert steps == {(0, 2, 4, 8)}


def test_every_field_of_a_state_is_recorded(selected):
    _, folder = selected
    read = lambda name: json.loads((folder / f"_selection/arms/{name}/repeat-0/start.json").read_text())  # noqa: E731
    copy, fresh = read("copy"), read("fresh_state")
    assert copy["weights"]["operators"] == ["exact_copy"] and copy["weights"]["exact"]
    assert copy["moments"]["entries"] > 0 and copy["step"] == {"parent": 8, "optimizer": [8.0]}
    assert copy["schedule"]["position"] == 8
    assert fresh["moments"]["entries"] == 0 and fresh["step"]["optimizer"] == [] and fresh["schedule"]["position"] == 0
    assert fresh["schedule"]["learning_rates"] == [0.0]  # in warm-up
    assert copy["data"]["shuffle"] and copy["random"]["dropout"] == 0.1


def test_cheap_metrics_are_measured_and_compared_with_the_ranking(selected):
    report, folder = selected
    found = report.agreement["stochastic"]
    assert {"kl", "kl@2", "kl@4", "loss@4", "auc@4", "drift_parameters@4", "escape@4"} <= set(found)
    assert found["loss@4"]["candidates"] == 3 and -1 <= found["loss@4"]["spearman"] <= 1
    measure = json.loads((folder / "_selection/arms/copy/repeat-0/measure-4.json").read_text())
    assert measure["escape"]["update"] > 0  # dropout parts the copies
    assert measure["kl"] > 0 and "self_attn.q_proj" in measure["escape"]["families"]


def test_a_report_is_saved_and_loaded(selected, tmp_path):
    report, folder = selected
    assert {"selection.json", "selection.md", "selection.png"} <= {path.name for path in folder.iterdir()}
    loaded = SelectionReport.load(folder)
    assert loaded.best == report.best and loaded.to_markdown() == report.to_markdown()
    assert (folder / "selection.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(folder.glob("_selection/arms/*/*/checkpoint-*"))
    with pytest.raises(WarmstartError, match="Pass them to start"):
        loaded.start()
    with pytest.raises(WarmstartError, match="holds no selection.json"):
        SelectionReport.load(tmp_path)


def test_what_is_started_is_what_was_measured(selected):
    report, _ = selected
    report = SelectionReport.from_dict(report.to_dict() | {"best": "slice"})
    report._selection = selected[0]._selection
    trainer = report.start()
    assert trainer.args.max_steps == 200 and trainer.args.train_sampling_strategy == "random"
    assert trainer.model.config.attention_dropout == 0.1
    assert GrowthRecord.all_of(trainer.model.config)[-1].operators == ["reference_slice"]
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(report.curves["slice"][0][0][1], abs=1e-6)
    assert trainer.warmstart_from is not None and trainer.args.state_policy == "carry"


def test_the_card_of_the_grown_model_tells_how_it_was_chosen(selected, tmp_path):
    report, _ = selected
    save_grown(report.start().model, tmp_path, selection=report)
    card = (tmp_path / "README.md").read_text()
    assert "## How this start was chosen" in card and f"**{report.best}**, of 4 candidates" in card
    assert SelectionReport.load(tmp_path).best == report.best and (tmp_path / "selection.md").is_file()


def test_a_finished_selection_is_not_run_again(selected, parent, monkeypatch):
    report, folder = selected
    monkeypatch.setattr("hf_warmstart.selection.run.run_arm", None)  # would raise
    diverges = Candidate("diverges", **WIDE, state_policy="asymmetric_reset", new_lr_peak=1e30, new_lr_steps=0)
    again = small_selection(parent, folder, [*three(), diverges], regime="stochastic")
    assert again.table == report.table and again.curves == report.curves


def test_a_folder_with_another_selection_is_refused(selected, parent):
    _, folder = selected
    with pytest.raises(WarmstartError, match="holds arms of a selection with other candidates, regime"):
        small_selection(parent, folder, three())


def test_without_optimizer_state_weights_alone_are_offered_and_what_is_lost_is_said(parent, tmp_path):
    bare = tmp_path / parent.name
    shutil.copytree(parent, bare)
    (bare / "optimizer.pt").unlink()
    with pytest.raises(
        WarmstartError, match=r"no optimizer state\. Lost: first and second moments.*copy, slice\. Give"
    ):
        prepared(bare, tmp_path / "out", three())
    selection = prepared(bare, tmp_path / "out")
    assert {c.state_policy for c in selection.study.candidates.values()} == {"reset"}
    assert "reference_slice" in selection.study.candidates and "asymmetric_reset" not in selection.study.candidates
    assert "Lost: first and second moments" in selection.notes[0]
    (bare / "scheduler.pt").unlink()
    with pytest.raises(WarmstartError, match="no optimizer state and no schedule"):
        prepared(bare, tmp_path / "out", three())


def test_candidates_that_do_not_fit_in_memory_are_named_before_anything_starts(parent, tmp_path, monkeypatch):
    with pytest.raises(WarmstartError, match=r"(?s)3 candidates do not fit in memory \(0.001 GB\).*copy needs"):
        prepared(parent, tmp_path / "out", three(), max_memory="1MB")
    monkeypatch.setattr(prepare, "free_bytes", lambda device: 10)
    with pytest.raises(WarmstartError, match="do not fit in memory"):
        prepared(parent, tmp_path / "out", three())
    assert not (tmp_path / "out").exists()


def test_what_a_model_does_not_admit_is_left_out_of_the_pool_and_raised_for_those_named(parent, tmp_path):
    wrong = Candidate("odd", width=1.3, width_operator="reference_slice")
    with pytest.raises(WarmstartError, match="(?s)cannot be grown as candidates ask.*odd: "):
        prepared(parent, tmp_path / "out", [*three(), wrong])
    selection = prepared(parent, tmp_path / "out", [*three(), wrong], from_pool=True)
    assert list(selection.refused) == ["odd"] and len(selection.study.candidates) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluation": Dataset.from_dict({"input_ids": [], "labels": []})}, "eval_dataset is empty"),
        ({"train": Dataset.from_dict({"input_ids": [], "labels": []})}, "train_dataset is empty"),
        ({"budget": "0.01%"}, "does not pay for the probes of 3 candidates"),
        ({"budget": "two"}, "no share of the planned run"),
        ({"budget": 1.5}, "no share of the planned run"),
        ({"probe_steps": 9}, "at most continuation_steps=8"),
        ({"probe_steps": ()}, "whole numbers above 0"),
        ({"continuation_steps": 500, "probe_steps": 4}, "more than the 200 steps of the planned run"),
        ({"match": "tokens"}, "match='tokens' is none of"),
        ({"schedule": "short"}, "schedule='short' is none of"),
        ({"schedule": "compressed", "match": "flops"}, "ends with the continuation"),
        ({"objective": "extrapolated", "match": "flops"}, "under the planned schedule; given match='flops'"),
        ({"objective": "extrapolated", "schedule": "compressed"}, "given match='steps' and schedule='compressed'"),
        ({"objective": "extrapolated", "eval_every": 3}, "leaves the half of 4 steps out. Pass at most 2"),
        ({"objective": "accuracy"}, "objective='accuracy' is none of"),
        ({"repeats": 0}, "must be at least 1"),
        ({"regime": "random"}, "regime='random' is none of"),
        ({"candidates": []}, "0 candidates leave nothing to choose"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(parent, tmp_path, options, message):
    with pytest.raises(WarmstartError, match=message):
        prepared(parent, tmp_path / "out", **({"candidates": three()} | options))
    assert not (tmp_path / "out").exists()


def test_a_parent_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(WarmstartError, match="is no folder"):
        prepared(tmp_path / "nowhere", tmp_path / "out", three())


def test_a_budget_continues_the_best_of_the_probes_only(parent, tmp_path):
    selection = prepared(parent, tmp_path / "out", three(), budget="50%", eval_every=4)
    assert selection.budget == pytest.approx(0.5 * selection.planned_flops)
    share = selection.probes_flops / selection.planned_flops
    lean = small_selection(parent, tmp_path / "lean", budget=share * 1.001)
    assert lean.settings["stopped"] == "the budget pays for no continuation" and lean.margin["candidate"] is None
    assert [row["stage"] for row in lean.table] == ["chosen", "probed", "probed"]
    assert lean.cost_fraction <= share * 1.001 and "probes rank badly" in lean.unsure[0]


def test_a_compressed_schedule_ends_with_the_continuation_however_it_was_divided(parent, selected, tmp_path):
    pair = three()[:2]
    made = {
        lag: small_selection(parent, tmp_path / str(lag), pair, schedule="compressed", repeats=1, probe_steps=lag)
        for lag in (4, 8)
    }
    assert made[4].curves == made[8].curves and made[4].settings["schedule"] == "compressed"
    result = "_selection/arms/copy/repeat-0/result-8.json"
    rate = lambda folder: json.loads((folder / result).read_text())["learning_rate"]  # noqa: E731
    # The last of 8 steps begins at 7 x 25 of the 200; the parent had taken 8, and 5 warmed up.
    last = 3e-3 * (1 + math.cos(math.pi * (8 + 175 - 5) / (8 + 200 - 5))) / 2
    assert rate(tmp_path / "4") == rate(tmp_path / "8") == pytest.approx(last)
    assert rate(selected[1]) > 1e-3  # the planned 200 steps have hardly begun
    assert "under the compressed schedule" in made[4].to_markdown()


RACE = {"objective": "extrapolated", "repeats": 1, "probe_steps": 4, "continuation_steps": 32, "eval_every": 2}


def test_a_race_drops_who_is_left_behind_and_ranks_the_others_by_where_they_end(parent, tmp_path, monkeypatch):
    behind = {4: ["slice"], 16: ["copy"]}
    asked = []

    def left_behind(curves):
        last = next(iter(curves.values()))[-1][0]
        asked.append((last, sorted(curves)))
        return behind.get(last, [])

    monkeypatch.setattr(rounds, "left_behind", left_behind)
    made = small_selection(parent, tmp_path / "dropped", **RACE)
    assert asked == [
        (4, ["copy", "fresh_state", "slice"]),
        (8, ["copy", "fresh_state"]),
        (16, ["copy", "fresh_state"]),
    ]
    rows = {row["candidate"]: row for row in made.table}
    assert made.best == "fresh_state" and made.settings["stopped"] == "one candidate is left"
    assert [row["candidate"] for row in made.table] == ["fresh_state", "copy", "slice"]
    assert rows["slice"]["reason"] == "left behind by step 4" and rows["copy"]["reason"] == "left behind by step 16"
    assert [step for step, _ in made.curves["copy"][0]] == [0, 2, 4, 6, 8, 12, 16]
    assert made.settings["steps"] == {"copy": 16, "fresh_state": 16, "slice": 4}
    assert "All others were left behind." in made.to_markdown() and "left behind by step 16" in made.unsure[0]
    monkeypatch.setattr(rounds, "left_behind", lambda curves: [])
    monkeypatch.setattr(rounds, "extrapolated", lambda curves, used: {"copy": 2.0, "fresh_state": 3.0, "slice": 1.0})
    whole = small_selection(parent, tmp_path / "whole", **RACE)
    assert [row["candidate"] for row in whole.table] == ["slice", "copy", "fresh_state"]
    assert whole.settings["stopped"] == "all repeats were made" and whole.margin["mean"] == 1.0
    assert whole.curves["copy"][0][:7] == made.curves["copy"][0]  # in parts as at once
    assert [step for step, _ in whole.curves["copy"][0]][7:] == [24, 32]


def test_a_race_goes_as_far_as_its_budget(parent, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "left_behind", lambda curves: [])
    study = prepared(parent, tmp_path / "none", three()[:2], **RACE).study

    def price(until):
        return sum(study.arm_flops(n, 0, 4, True) + study.arm_flops(n, 4, until, False) for n in study.plans)

    planned = 200 * max(map(study.step_flops, study.plans))
    made = small_selection(parent, tmp_path / "out", three()[:2], **RACE, budget=price(11) * 1.001 / planned)
    assert {rows[0][-1][0] for rows in made.curves.values()} == {11} and made.settings[
        "stopped"
    ] == "the budget was spent"
    assert made.settings["spent_flops"] == pytest.approx(price(11), rel=1e-9)
    used = json.loads((tmp_path / "out/_selection/arms/copy/repeat-0/result-11.json").read_text())["used"]
    rates = [(1 + math.cos(math.pi * (8 + step - 5) / (8 + 200 - 5))) / 2 for step in range(200)]
    assert used == pytest.approx([sum(rates[:step]) / sum(rates) for step in (0, 2, 4, 6, 8, 11)])
    shares = dict(zip((0, 2, 4, 6, 8, 11), used, strict=True))
    shares = dict(zip((0, 2, 4, 6, 8, 11), used, strict=True))
    ends = extrapolated({n: rows[0] for n, rows in made.curves.items()}, dict.fromkeys(made.curves, shares))
    assert {row["candidate"]: row["loss"] for row in made.table} == pytest.approx(ends)


@pytest.mark.slow
def test_at_equal_flops_a_dearer_candidate_takes_fewer_steps(parent, tmp_path):
    pair = [Candidate("wide", **WIDE), Candidate("deep", depth=2)]
    report = small_selection(parent, tmp_path, pair, match="flops", repeats=1, probe_steps=2)
    steps, flops = report.settings["steps"], {row["candidate"]: row["step_flops"] for row in report.table}
    dear, cheap = sorted(flops, key=flops.get, reverse=True)
    assert steps[cheap] == 8 and steps[dear] == max(2, int(8 * flops[cheap] / flops[dear])) < 8
    assert report.curves[dear][0][-1][0] == steps[dear]
