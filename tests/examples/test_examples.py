"""The small examples, each run at a few steps: what they say of themselves holds."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_warmstart import GrowthRecord

EXAMPLES = Path(__file__).parents[2] / "examples"
README = EXAMPLES.parent / "README.md"
# The quickstart is a study of its own, in four files.
SMALL = sorted(path for path in EXAMPLES.glob("*.py") if not path.name.startswith("quickstart"))


@pytest.fixture
def example(monkeypatch):
    """An example's `main`."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str):
        sys.modules.pop("small_text", None)
        return importlib.import_module(name).main

    return load


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> list[str]:
    """The option that names a parent, trained once for a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        checkpoint = importlib.import_module("small_text").trained_parent(tmp_path_factory.mktemp("parent"), 12)
    return ["--parent", str(checkpoint)]


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_examples_are_short_and_say_how_to_run_them(path):
    text = path.read_text()
    assert len(text.splitlines()) < 150
    assert path.stem == "small_text" or f"python examples/{path.name}" in text


def test_block_expansion_trains_new_layers_alone(example, parent, tmp_path, capsys):
    found = example("block_expansion")([*parent, "--steps", "8", "--output", str(tmp_path)])
    assert found["child before"] == pytest.approx(found["parent"], abs=1e-5)
    assert found["child after"] != found["child before"]
    assert "kept the parent's bits: True" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    assert model.config.num_hidden_layers == 4 and GrowthRecord.all_of(model.config)


@pytest.mark.slow
def test_depth_up_scaling_trains_everything(example, tmp_path):
    scaled = example("block_expansion")(
        ["--steps", "8", "--output", str(tmp_path), "--depth-operator", "overlap", "--depth", "1.5"]
    )
    assert scaled["child before"] > scaled["parent"] and scaled["child after"] < scaled["child before"]


def test_dense_to_experts_begins_at_the_dense_models_loss_and_experts_part(example, parent, tmp_path):
    found = example("dense_to_experts")([*parent, "--steps", "8", "--output", str(tmp_path)])
    assert found["mixture before"] == pytest.approx(found["dense"], abs=1e-4)
    assert found["mixture after"] != found["mixture before"] and found["apart"] > 1e-4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "mixture").config.num_local_experts == 4


@pytest.mark.slow
def test_choose_warmstart_reports_and_starts_the_choice(example, tmp_path, capsys):
    options = ["--steps", "10", "--continuation", "6", "--repeats", "2", "--output", str(tmp_path)]
    report = example("choose_warmstart")(options)
    assert len(report.table) == 3 and report.best in {row["candidate"] for row in report.table}
    assert f"chosen: {report.best}" in capsys.readouterr().out
    assert (tmp_path / "run" / "selection.png").exists()
    assert GrowthRecord.all_of(AutoModelForCausalLM.from_pretrained(tmp_path / "run").config)


@pytest.mark.slow
def test_sweep_to_continue_learns_the_new_domain(example, tmp_path, capsys):
    found = example("sweep_to_continue")(
        ["--new", str(README), "--tokens", "8000", "--ratio", "1.5", "--output", str(tmp_path)]
    )
    assert "learning rate" in capsys.readouterr().out
    assert (tmp_path / "law" / "README.md").exists()
    assert found["after"]["new"] < found["before"]["new"]


# peft 0.21 still calls names that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_lora_goes_on_where_it_was(example, parent, tmp_path):
    found = example("lora_across_growth")([*parent, "--steps", "20", "--depth", "1.5", "--output", str(tmp_path)])
    assert found["parent, adapted"] < found["parent"]
    assert found["child, adapter grown"] == pytest.approx(found["parent, adapted"], abs=1e-5)
    assert found["child, adapted further"] < found["child, adapter grown"]
    assert found["loaded"] == pytest.approx(found["child, adapted further"], abs=1e-6)
