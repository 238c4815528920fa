"""`hf-warmstart select`: a whole selection from the shell, dry runs, and what is refused."""

from __future__ import annotations

import json

import pytest

from hf_warmstart.cli import main

from ..selection.conftest import _no_plots, held_out, parent  # noqa: F401  fixtures
from ..training.conftest import blocks


@pytest.fixture
def given(parent, tmp_path):  # noqa: F811
    blocks(0, 20).save_to_disk(tmp_path / "train")
    held_out().save_to_disk(tmp_path / "eval")
    (tmp_path / "args.json").write_text(json.dumps({"learning_rate": 1e-3, "use_cpu": True, "save_strategy": "no"}))
    words = f"select --parent {parent} --train {tmp_path}/train --eval {tmp_path}/eval --output {tmp_path}/out --steps 2000"
    return [*words.split(), "--args", f"{tmp_path}/args.json", "--arg", "per_device_train_batch_size=4"]


SHORT = ["--probe-steps", "1", "--continuation-steps", "1", "--repeats", "1", "--depth", "2", "--regime", "shuffled"]


def test_a_selection_from_the_shell(given, tmp_path, capsys):
    assert main([*given, *SHORT, "--json"]) == 1  # one repeat: nothing is clear
    report = json.loads(capsys.readouterr().out)
    names = {row["candidate"] for row in report["table"]}
    assert names == {"identity_blocks", "stack", "weights_only", "from_scratch"} and report["best"] in names
    assert report["settings"]["regime"] == "shuffled" and (tmp_path / "out" / "selection.md").is_file()
    assert main([*given, *SHORT]) == 1
    assert report["best"] in capsys.readouterr().out


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(given, tmp_path, capsys):
    assert main([*given, "--dry-run", "--json", "--budget", "99%"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "reference_slice" in {row["candidate"] for row in plan["candidates"]} and plan["probes_share"] > 0
    assert main([*given, "--dry-run", "--depth", "2"]) == 0
    assert "Nothing was run." in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "lots"], "no share of the planned run"),
        (["--arg", "learning=1"], "are no training arguments"),
        (["--arg", "learning_rate"], "is not NAME=VALUE"),
        (["--probe-steps", "a,b"], "are no whole numbers"),
        (["--train", "nowhere"], "neither a folder of Dataset.save_to_disk nor a text file"),
        (["--regime", "wild"], "is none of"),
    ],
)
def test_what_cannot_be_is_said(given, more, message, capsys):
    assert main([*given, *more]) == 2
    assert message in capsys.readouterr().err
