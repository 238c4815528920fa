"""Several processes under `accelerate launch` (gloo, CPU) do what one process does, from a parent trained on one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_warmstart import grow

from .conftest import COMMON, blocks, losses, warmstart_trainer
from .ranks import REPOSITORY, environment

SCRIPT = REPOSITORY / "examples" / "grow_and_continue.py"
DDP = REPOSITORY / "examples" / "accelerate" / "ddp.yaml"
STEPS, BATCH = 6, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Blocks for every step, saved as the example reads them."""
    folder = tmp_path_factory.mktemp("data") / "blocks"
    blocks(20, 2 * STEPS).remove_columns("labels").save_to_disk(folder)
    return folder


def _launch(processes: int, parent: Path, data: Path, output: Path, **options) -> str:
    """The example under `accelerate launch`; what it printed."""
    given = COMMON | {
        "parent": parent,
        "data": data,
        "output_dir": output,
        "width": 2,
        "growth_seed": 5,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "optim": "adamw_torch",
    }
    arguments = [f"--{name}={value}" for name, value in (given | options).items()]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(DDP)]
    launch += ["--num_processes", str(processes), "--main_process_port", "0", str(SCRIPT)]
    done = subprocess.run([*launch, *arguments], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def _state(output: Path) -> dict:
    return json.loads((output / "trainer_state.json").read_text())


def _losses(output: Path) -> list[float]:
    return [row["loss"] for row in _state(output)["log_history"] if "loss" in row]


def _alone(parent: Path, folder: Path):
    """The same run in this process: the same examples at every step, in one batch."""
    child = grow(AutoModelForCausalLM.from_pretrained(parent), width=2, seed=5)
    trainer = warmstart_trainer(
        child,
        folder,
        STEPS,
        blocks(20, 2 * STEPS),
        warmstart_from=parent,
        per_device_train_batch_size=BATCH,
        optim="adamw_torch",
    )
    trainer.train()
    return trainer


@pytest.mark.slow
def test_the_example_on_two_processes_with_accumulation_is_the_run_on_one(base, data, tmp_path):
    """2 processes x 2 accumulated batches x 2 examples, against one batch of 8."""
    out = tmp_path / "ddp"
    printed = _launch(2, base, data, out, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert "6 steps on 2 processes" in printed  # accelerate's own --cpu would start only one
    alone = _alone(base, tmp_path / "alone")
    assert len(_losses(out)) == STEPS
    assert _losses(out) == pytest.approx(losses(alone), abs=1e-5)
    weights = alone.model.state_dict()
    for name, value in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(value, weights[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_the_example_goes_on_where_it_stopped_and_grows_nothing_twice(base, data, tmp_path):
    """On two processes, of which the last steps are lost."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    _launch(2, base, data, whole, **options)
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / f"checkpoint-{STEPS}")
    (stopped / "model.safetensors").unlink()
    _launch(2, base, data, stopped, **options)
    assert _losses(stopped) == _losses(whole)
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(a[name], b[name]) for name in a)
    saved = torch.load(stopped / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    assert {float(entry["step"]) for entry in saved["state"].values()} == {20.0 + STEPS}
