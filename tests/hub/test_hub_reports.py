"""A selection's report and laws: pushed, loaded from another cache, and what is none."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from hf_warmstart import HparamPredictor, SelectionReport, WarmstartError

from ..scaling.planted import Planted


def small_report() -> SelectionReport:
    """A report with two candidates, without arms."""
    row = dict.fromkeys(("final_loss", "auc", "probe_loss", "error"))
    table = [
        {
            **row,
            "rank": 1,
            "candidate": "copy",
            "stage": "chosen",
            "reason": "",
            "repeats": 2,
            "loss": 3.5,
            "behind": None,
        }
        | {"low": None, "high": None, "metrics": {}, "parameters": 100, "step_flops": 1.0, "exact": True},
        {**row, "rank": 2, "candidate": "slice", "stage": "continued", "reason": "", "repeats": 2, "loss": 3.75}
        | {
            "behind": 0.25,
            "low": 0.2,
            "high": 0.3,
            "metrics": {},
            "parameters": 100,
            "step_flops": 1.0,
            "exact": True,
        },
    ]
    margin = {"candidate": "slice", "mean": 0.25, "low": 0.2, "high": 0.3, "error": 0.01, "repeats": 2, "clear": True}
    settings = {"regime": "shuffled", "shuffle": True, "dropout": 0.0, "probe_steps": [16], "continuation_steps": 32}
    settings |= {
        "steps": 32,
        "match": "steps",
        "objective": "final_loss",
        "repeats": 2,
        "planned_steps": 100,
        "seed": 0,
    }
    settings |= {
        "parent": "checkpoint-8",
        "budget_flops": None,
        "spent_flops": 10.0,
        "stopped": "all is clear",
        "level": 0.9,
    }
    curves = {name: [[[0, 4.0], [32, loss]]] for name, loss in (("copy", 3.5), ("slice", 3.75))}
    candidates = {"copy": {"name": "copy"}, "slice": {"name": "slice"}}
    return SelectionReport("copy", table, {"shuffled": {}}, 0.02, margin, [], settings, candidates, curves)


@pytest.fixture
def report(monkeypatch) -> SelectionReport:
    """A report that draws nothing: plots take longer than all else here."""
    monkeypatch.setattr(SelectionReport, "plot", lambda self, path: path.write_bytes(b"png"))
    return small_report()


def test_a_report_is_pushed_in_one_commit_and_loaded_from_another_cache(hub, report, use_hub, tmp_path):
    info = report.push_to_hub("user/choice", license="mit", private=True)
    (commit,) = hub.commits("user/choice")
    assert (info.oid, commit.changed) == (commit.oid, ["README.md", "selection.json", "selection.md", "selection.png"])
    assert hub.repos["user/choice"].private
    use_hub(hub, cache="another")
    again = SelectionReport.from_pretrained("user/choice", revision=commit.oid)
    assert again.to_dict() == report.to_dict()
    card = ModelCard.load("user/choice")
    assert (card.data.license, card.data.library_name) == ("mit", "hf_warmstart")
    assert "SelectionReport.from_pretrained('user/choice')" in card.text and "**copy**" in card.text
    report.save(tmp_path / "here")
    assert SelectionReport.from_pretrained(tmp_path / "here").best == "copy"


def test_what_is_no_report_is_said(hub, grown):
    hub.add("user/other", {"README.md": b""})
    with pytest.raises(WarmstartError, match="'user/other' holds no selection.json"):
        SelectionReport.from_pretrained("user/other")
    with pytest.raises(WarmstartError, match="'user/none' is no folder, and the Hub does not give it"):
        SelectionReport.from_pretrained("user/none")


def test_a_predictor_goes_there_and_back_on_a_branch_without_xet(hub, use_hub):
    use_hub(hub, "absent")
    predictor = HparamPredictor.fit(Planted().runs(), draws=20, name="tiny law")
    predictor.push_to_hub("user/law", branch="v1", private=True)
    assert hub.commits("user/law") == [] and hub.repos["user/law"].private
    use_hub(hub, "absent", cache="another")
    again = HparamPredictor.from_pretrained("user/law", revision="v1")
    run = {"params": 1e8, "tokens": 2e9, "sequence_length": 128, "eval_loss": 3.0}
    assert json.dumps(again.recommend(**run).to_dict()) == json.dumps(predictor.recommend(**run).to_dict())
