"""A killed process leaves whole checkpoints only, and a run that goes on from them is the run that was never stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.trainer_utils import get_last_checkpoint

from hf_warmstart import WarmstartError, grow
from hf_warmstart.checkpoints.state.parent_state import GROWN_NAME
from hf_warmstart.checkpoints.target.complete import STAGING, last_whole_checkpoint, publish
from hf_warmstart.growth.plan import GrowthRecord

from ..models import tiny_model
from .conftest import blocks, losses, stock_trainer, warmstart_trainer
from .killed import PARENT_STEPS, TINY

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "kills", [pytest.param(3, id="3_kills"), pytest.param(25, id="25_kills", marks=pytest.mark.slow)]
)
def test_a_run_killed_at_random_points_ends_as_the_uninterrupted_one(kills, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.killed", str(tmp_path), str(kills), "7"],
        cwd=ROOT,
        # Where there is a GPU, autograd has a thread for it, and no process with such threads may be forked.
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])

    assert seen["faults"] == []
    assert seen["half_written"] == []
    # The last start was from a checkpoint in the middle of the run, and took nothing from the parent once more.
    assert seen["starts"] == sorted(seen["starts"]) and seen["starts"][-1] > 0
    assert seen["last_is_warm"] is False
    if kills > 20:
        assert seen["while_saving"] > 3

    whole, killed = (Path(get_last_checkpoint(tmp_path / name)) for name in ("whole", "killed"))
    assert whole.name == killed.name
    state, other = (json.loads((folder / "trainer_state.json").read_text()) for folder in (whole, killed))
    assert len(state["log_history"]) == state["global_step"] == state["max_steps"]
    assert other["log_history"] == state["log_history"]
    weights = load_file(killed / "model.safetensors")
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
    assert len(GrowthRecord.all_of(AutoConfig.from_pretrained(killed))) == 1
    optimizer = torch.load(killed / GROWN_NAME, weights_only=True)["state"]
    assert {float(entry["step"]) for entry in optimizer.values()} == {PARENT_STEPS + state["max_steps"]}
    assert [path.name for path in (tmp_path / "killed").glob(STAGING)] == []


class Died(BaseException):
    """Stands for a kill."""


def _dies_while_saving(trainer, monkeypatch):
    """After the weights are written, before the optimizer is."""

    def die(*args):
        raise Died

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", die)


@pytest.fixture
def model():
    return grow(tiny_model("llama", **TINY), width=2)


def test_a_checkpoint_that_is_written_once_more_is_the_old_one_until_the_new_one_is_complete(
    model, tmp_path, monkeypatch
):
    warmstart_trainer(model, tmp_path, 2, blocks(0, 2)).train()
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}

    again = warmstart_trainer(model, tmp_path, 2, blocks(2, 2))
    _dies_while_saving(again, monkeypatch)
    with pytest.raises(Died):
        again.train()
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()} == before
    assert (tmp_path / STAGING / "checkpoint-2" / "model.safetensors").is_file()

    warmstart_trainer(model, tmp_path, 2, blocks(2, 2)).train()
    after = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}
    assert after.keys() == before.keys()
    assert after["model.safetensors"] != before["model.safetensors"]
    assert not (tmp_path / STAGING).exists()


def test_what_a_stock_trainer_left_half_written_is_skipped_with_a_warning(model, tmp_path, monkeypatch):
    stock = stock_trainer(model, tmp_path, 4, blocks(0, 4), save_steps=2)
    stock.train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"global_step": 6, "log_hi')
    assert get_last_checkpoint(tmp_path).endswith("checkpoint-6")

    resumed = warmstart_trainer(model, tmp_path, 4, blocks(0, 4), save_steps=2)
    with pytest.warns(UserWarning) as seen:
        resumed.train(resume_from_checkpoint=True)
    assert [str(w.message).split()[0] for w in seen if "skipped" in str(w.message)] == ["checkpoint-6", "checkpoint-4"]
    assert losses(resumed) == losses(stock)


def test_a_folder_without_a_whole_checkpoint_is_refused(model, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    trainer = warmstart_trainer(model, tmp_path, 2, blocks(0, 2))
    with (
        pytest.warns(UserWarning, match="checkpoint-2 has no readable"),
        pytest.raises(WarmstartError, match="no complete checkpoint"),
    ):
        trainer.train(resume_from_checkpoint=True)


def test_checkpoints_that_go_lose_their_name_before_their_files(model, tmp_path, monkeypatch):
    gone = []

    def look(folder, **kwargs):
        names = [path.name for path in Path(folder).glob("*")] if Path(folder).exists() else []
        gone.append((Path(folder).name, names, [path.name for path in tmp_path.glob("checkpoint-*")]))

    monkeypatch.setattr("hf_warmstart.checkpoints.target.complete.shutil.rmtree", look)
    trainer = warmstart_trainer(
        model,
        tmp_path,
        3,
        blocks(0, 3),
        eval_dataset=blocks(3, 1),
        save_steps=1,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        warmup_steps=1,  # the first step changes nothing, and the others diverge
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    # Steps 2 and 3 were the newest for a while; what was removed is the staging folder, with them in it.
    assert {name for name, _, _ in gone} == {STAGING}
    assert any("checkpoint-2" in names and "checkpoint-2" not in left for _, names, left in gone)
    assert any("checkpoint-3" in names and "checkpoint-3" not in left for _, names, left in gone)


def test_the_last_whole_checkpoint_is_the_one_with_the_highest_number(tmp_path):
    for number in (9, 10, 2):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def _checkpoint(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_text(content)
    return folder


def test_a_checkpoint_that_is_published_stays_when_nothing_more_is_staged(tmp_path):
    """Called twice: by two nodes, on a disk that both see."""
    _checkpoint(tmp_path / "checkpoint-1", "old")
    _checkpoint(tmp_path / STAGING / "checkpoint-1", "new")
    for _ in range(2):
        publish(tmp_path, "checkpoint-1")
        assert (tmp_path / "checkpoint-1" / "weights").read_text() == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_another_node_may_publish_at_any_point_of_ones_own_publishing(at, old, tmp_path, monkeypatch):
    if old:
        _checkpoint(tmp_path / "checkpoint-1", "old")
    _checkpoint(tmp_path / STAGING / "checkpoint-1", "new")
    rename, renames = Path.rename, []

    def with_another_node(path, target):
        renames.append(path)
        if len(renames) == at + 1:
            publish(tmp_path, "checkpoint-1")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", with_another_node)
    publish(tmp_path, "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_the_old_checkpoint_is_put_back_when_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    _checkpoint(tmp_path / "checkpoint-1", "old")
    _checkpoint(tmp_path / STAGING / "checkpoint-1", "new")
    rename = Path.rename

    def refuse_the_new_one(path, target):
        if Path(target) == tmp_path / "checkpoint-1" and (path / "weights").read_text() == "new":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(OSError, match="Input/output"):
        publish(tmp_path, "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "weights").read_text() == "old"
