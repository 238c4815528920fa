"""FSDP2 through `Trainer` itself: a stock parent in shards or whole, grown, resumed and warm-started, against one process.

On two processes of gloo, or on all GPUs where there are some: `pytest -m slow tests/training/test_fsdp.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from transformers import AutoConfig, AutoModelForCausalLM

from hf_warmstart import WarmstartError, grow, grow_checkpoint
from hf_warmstart.checkpoints.torch_files.sharded import is_sharded

from ..models import tiny_model
from .conftest import BATCH, COMMON, blocks, losses, stock_trainer, warmstart_trainer
from .ranks import REPOSITORY, environment

pytestmark = pytest.mark.slow

FSDP2 = REPOSITORY / "examples" / "accelerate" / "fsdp2.yaml"
SCRIPT = REPOSITORY / "examples" / "grow_and_continue.py"
ON_GPU = torch.cuda.is_available()
PROCESSES = torch.cuda.device_count() if ON_GPU else 2
PARENT_STEPS, CHILD_STEPS = 6, 6
ALL_STEPS = PARENT_STEPS + CHILD_STEPS
GROWTH = {"width": 2, "depth": 2, "seed": 5}
OPTIONS = {"per_device_train_batch_size": BATCH // PROCESSES, "warmup_steps": 2, "save_steps": 3}
NOISE = 1e-4 if ON_GPU else 1e-5  # of losses near 4 in float32, summed in another order
KINDS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")


@dataclass(frozen=True)
class Alone:
    """The same runs in this process, without FSDP, and one without the parent's optimizer state."""

    parent: list[float]
    resumed: list[float]
    started: list[float]
    without: list[float]


def _launch(*command: str, kind: str = KINDS[0], precision: str = "no") -> str:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP2)]
    launch += ["--num_processes", str(PROCESSES), "--main_process_port", "0", "--mixed_precision", precision]
    launch += ["--fsdp_state_dict_type", kind, "-m", "tests.training.fsdp_job"]
    done = subprocess.run(
        [*launch, *command], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def _losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.fixture(scope="module")
def initial(tmp_path_factory) -> Path:
    """A model's weights and config."""
    folder = tmp_path_factory.mktemp("initial")
    torch.manual_seed(0)
    tiny_model("llama", randomised=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(initial, tmp_path_factory) -> Alone:
    """One process: the parent, its grown checkpoint resumed by a stock Trainer, and a warm start."""
    folder = tmp_path_factory.mktemp("alone")
    options = OPTIONS | {"per_device_train_batch_size": BATCH, "use_cpu": not ON_GPU}
    model = AutoModelForCausalLM.from_pretrained(initial)
    parent = stock_trainer(model, folder / "parent", ALL_STEPS, blocks(0, ALL_STEPS), **options)
    parent.train()
    checkpoint = folder / "parent" / f"checkpoint-{PARENT_STEPS}"
    grow_checkpoint(checkpoint, folder / "grown", **GROWTH)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "grown"))
    resumed = stock_trainer(model, folder / "resumed", ALL_STEPS, blocks(0, ALL_STEPS), **options)
    resumed.train(resume_from_checkpoint=str(folder / "grown"))
    children = []
    for policy in ("carry", "reset"):
        child = warmstart_trainer(
            grow(AutoModelForCausalLM.from_pretrained(checkpoint), **GROWTH),
            folder / policy,
            CHILD_STEPS,
            blocks(PARENT_STEPS, CHILD_STEPS),
            warmstart_from=checkpoint,
            state_policy=policy,
            **options,
        )
        child.train()
        children.append(losses(child))
    return Alone(losses(parent), losses(resumed)[-CHILD_STEPS:], *children)


@pytest.fixture(scope="module", params=KINDS)
def runs(request, initial, tmp_path_factory) -> Path:
    """The same under FSDP2, by one launch for each form of its checkpoints."""
    folder = tmp_path_factory.mktemp(request.param)
    parent, checkpoint = str(folder / "parent"), str(folder / "parent" / f"checkpoint-{PARENT_STEPS}")
    whole, part = OPTIONS | {"max_steps": ALL_STEPS}, OPTIONS | {"max_steps": CHILD_STEPS}
    ours = str(folder / "started" / "checkpoint-3")
    first = [("train", {"model": str(initial), "output": parent, "options": whole})]
    then = [
        ("grow_on_all", {"source": checkpoint, "output": str(folder / "grown"), "growth": GROWTH}),
        ("resume", {"checkpoint": str(folder / "grown"), "output": str(folder / "resumed"), "options": whole}),
        (
            "warmstart",
            {
                "model": checkpoint,
                "parent": checkpoint,
                "output": str(folder / "started"),
                "first": PARENT_STEPS,
                "growth": GROWTH,
                "options": part,
            },
        ),
        (
            "resume_ours",
            {"checkpoint": ours, "output": str(folder / "again"), "first": PARENT_STEPS, "options": part},
        ),
    ]
    (folder / "first.json").write_text(json.dumps(first))
    (folder / "then.json").write_text(json.dumps(then))
    _launch(str(folder / "first.json"), kind=request.param)
    if request.param == KINDS[0]:
        with pytest.raises(WarmstartError, match="config.json"):  # which Trainer leaves out of shards
            grow_checkpoint(checkpoint, folder / "nothing", **GROWTH)
        shutil.copy(initial / "config.json", checkpoint)
        merge_fsdp_weights(str(Path(checkpoint, "pytorch_model_fsdp_0")), checkpoint)
    _launch(str(folder / "then.json"), kind=request.param)
    return folder


def test_the_parent_trains_as_on_one_process(runs, alone, record_property):
    found = _losses(runs / "parent")
    record_property("difference", max(abs(a - b) for a, b in zip(found, alone.parent, strict=True)))
    assert found == pytest.approx(alone.parent, abs=NOISE)
    checkpoint = runs / "parent" / f"checkpoint-{PARENT_STEPS}"
    whole = "FULL" in runs.name
    assert is_sharded(checkpoint / "optimizer_0") is not whole  # or nothing was sharded at all
    assert (checkpoint / "optimizer.bin").is_file() is whole


@pytest.mark.parametrize("run", ["resumed", "started"])
def test_the_child_goes_on_as_on_one_process(runs, alone, run, record_property):
    """Resumed from the grown checkpoint by a stock Trainer, and started from the parent's by WarmstartTrainer."""
    found = _losses(runs / run)[-CHILD_STEPS:]
    expected = getattr(alone, run)
    record_property("difference", max(abs(a - b) for a, b in zip(found, expected, strict=True)))
    assert found == pytest.approx(expected, abs=NOISE)
    assert max(abs(a - b) for a, b in zip(found, alone.without, strict=True)) > 100 * NOISE


def test_the_two_ways_are_one(runs):
    assert _losses(runs / "started") == pytest.approx(_losses(runs / "resumed")[-CHILD_STEPS:], abs=NOISE)


def test_our_trainer_goes_on_from_its_own_checkpoint_as_if_it_had_not_stopped(runs):
    assert _losses(runs / "again") == _losses(runs / "started")


def test_the_example_under_its_own_config_starts_and_goes_on(runs, tmp_path, record_property):
    """As documented, in bfloat16, and stopped in the middle."""
    kind = KINDS["FULL" in runs.name]
    checkpoint = runs / "parent" / f"checkpoint-{PARENT_STEPS}"
    data = tmp_path / "blocks"
    blocks(PARENT_STEPS, CHILD_STEPS).remove_columns("labels").save_to_disk(data)
    given = COMMON | OPTIONS | {"parent": checkpoint, "data": data, "output_dir": tmp_path / "run"}
    given |= {"max_steps": CHILD_STEPS, "width": 2, "depth": 2, "growth_seed": 5, "use_cpu": False}
    arguments = [str(SCRIPT), *(f"--{name}={value}" for name, value in given.items())]
    printed = _launch(*arguments, kind=kind, precision="bf16")
    assert f"{CHILD_STEPS} steps on {PROCESSES} processes" in printed
    found = _losses(tmp_path / "run")
    expected = _losses(runs / "started")
    record_property("difference", max(abs(a - b) for a, b in zip(found, expected, strict=True)))
    assert found == pytest.approx(expected, abs=3e-2)
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{CHILD_STEPS}")
    _launch(*arguments, kind=kind, precision="bf16")
    assert _losses(tmp_path / "run") == pytest.approx(found, abs=1e-6)
    # What it wrote can grow again.
    last = tmp_path / "run" / f"checkpoint-{CHILD_STEPS}"
    record = grow_checkpoint(last, tmp_path / "again", depth=1.25)
    assert tuple(record.changes["num_hidden_layers"]) == (4, 5)
