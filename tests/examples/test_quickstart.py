"""The quickstart, run as a user would run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_warmstart import GrowthRecord
from hf_warmstart.scaling import speedup, tokens_to_loss

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


def _run(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Some text to learn from."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    words = "the cat sat on a mat and saw the dog run over the hill to the sea where fish swim"
    choice = words.split()
    path.write_text(" ".join(choice[(7 * k * k + k // 3) % len(choice)] for k in range(40_000)))
    return path


@pytest.fixture(scope="module")
def left(tmp_path_factory, text) -> Path:
    """The folder that a quick run leaves."""
    folder = tmp_path_factory.mktemp("quick")
    run = _run("--quick", "--train-text", str(text), "--eval-text", str(text), "--output", "out", folder=folder)
    assert run.returncode == 0, run.stderr
    assert "carried" in run.stdout and "equal FLOPs" in run.stdout
    return folder / "out"


def test_it_leaves_model_card_curves_and_report(left):
    names = {path.name for path in left.iterdir()}
    assert names >= {"config.json", "growth.json", "README.md", "curves.png", "report.json", "tokenizer.json"}
    model = AutoModelForCausalLM.from_pretrained(left)
    assert GrowthRecord.all_of(model.config)
    assert AutoTokenizer.from_pretrained(left)("the cat")["input_ids"]
    assert "hf_warmstart" in ModelCard.load(left / "README.md").data.tags
    assert (left / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_follows_from_its_own_numbers(left):
    report = json.loads((left / "report.json").read_text())
    arms = report["arms"]
    assert set(arms) == {"carried", "fresh", "scratch", "control"}
    assert arms["carried"]["new_tokens"] == arms["scratch"]["new_tokens"] == report["equal_tokens"]
    assert arms["control"]["flops"] == pytest.approx(arms["carried"]["flops"], rel=0.05)
    ladder = {int(tokens): losses["source"] for tokens, losses in arms["scratch"]["ladder"].items()}
    assert report["scratch_loss_at_equal_tokens"] == ladder[report["equal_tokens"]]
    for name, arm in arms.items():
        found = arm["scratch_tokens_for_its_loss"]
        if "value" not in found:
            continue
        expected = tokens_to_loss(ladder, arm["eval_loss"]["source"])
        assert found == expected.to_dict(), name
        assert arm["speedup"] == speedup(expected, report["flops_per_token"]["child"], arm["flops"]).to_dict()
    trials = report["learning_rate_trials"]["loss"]
    for family, name in (("scratch", "scratch"), ("grown", "carried"), ("control", "control")):
        assert arms[name]["learning_rate"] == float(min(trials[family], key=trials[family].get)), family


def test_a_resumed_run_trains_at_its_own_learning_rate(monkeypatch):
    """Stock resuming keeps the checkpoint's rate, which would leave the control untuned."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from quickstart_arms import Arm, Watch

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=8e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    watch = Watch(Arm("control", "control", 1e-3, (10,)), 0, 0, set())
    watch.on_train_begin(None, None, None, optimizer=optimizer, lr_scheduler=scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)


@pytest.mark.slow
def test_a_model_without_optimizer_state_is_grown_in_depth_and_nothing_is_said_to_be_carried(left, text, tmp_path):
    arguments = ["--quick", "--model", str(left), "--depth", "2", "--train-text", str(text), "--eval-text", str(text)]
    run = _run(*arguments, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "holds no optimizer.pt" in run.stdout
    report = json.loads((tmp_path / "runs" / "quickstart" / "report.json").read_text())
    assert not report["state_carried"] and report["base_flops"] is None
    said = " ".join(report["verdict"])
    assert "no optimizer state" in said and "Carrying" not in said
    assert json.loads((left / "report.json").read_text())["state_carried"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train-text", "nowhere.txt"], "does not exist"),
        (["--width", "1.3"], "does not divide"),
        (["--width-operator", "magic"], "magic"),
    ],
)
def test_bad_input_is_one_line(arguments, words, tmp_path, text):
    source = [] if "--train-text" in arguments else ["--train-text", str(text)]
    run = _run("--quick", *source, "--eval-text", str(text), *arguments, folder=tmp_path)
    assert run.returncode != 0
    assert words in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "runs").exists()
