"""`grow_checkpoint`: a checkpoint goes in, one comes out that a stock `Trainer` resumes."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, Trainer

from hf_warmstart import WarmstartError, grow, grow_checkpoint
from hf_warmstart.errors import CheckpointError

from ..models import some_tokens, tiny_model
from .conftest import blocks, losses, stock_trainer, warmstart_trainer
from .ranks import run_on_ranks
from .sharded_jobs import GROWTH


def test_a_stock_trainer_goes_on_from_the_grown_checkpoint_as_ours_does_from_the_parent(base, tmp_path):
    """Same weights, moments, schedule and step: 100 steps of each, the whole horizon being 120."""
    record = grow_checkpoint(base, tmp_path / "grown", width=2, seed=5)
    assert record.growth_config["width"] == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    stock = stock_trainer(copy.deepcopy(model), tmp_path / "stock", 120, blocks(0, 120))
    stock.train(resume_from_checkpoint=str(tmp_path / "grown"))
    ours = warmstart_trainer(model, tmp_path / "ours", 100, blocks(20, 100), warmstart_from=base, state_policy="carry")
    ours.train()
    assert type(stock) is Trainer
    assert stock.state.global_step == 120
    assert losses(stock)[-100:] == losses(ours)
    for (name, a), b in zip(stock.model.state_dict().items(), ours.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_depth_keeps_every_entry_with_its_own_layer(base, tmp_path):
    grow_checkpoint(base, tmp_path / "grown", depth=2)
    child, parent = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "grown", base))
    before = _moments(base, stock_trainer(parent, tmp_path / "parent", 1, blocks(0, 1)))
    after = _moments(tmp_path / "grown", stock_trainer(child, tmp_path / "child", 1, blocks(0, 1)))
    assert len({float(moment.sum()) for moment in before.values()}) == len(before)  # so that a wrong layer shows
    # A new layer adds nothing at first; the others are the parent's, in its order.
    new = [not layer.mlp.down_proj.weight.any() for layer in child.model.layers]
    old = [number for number, is_new in enumerate(new) if not is_new]
    assert new == [False, True, False, True]
    assert set(after) == {name for name, _ in child.named_parameters()}
    for name, moment in after.items():
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        if not name.startswith("model.layers."):
            assert torch.equal(moment, before[name]), name
        elif new[int(layer)]:
            assert not moment.any(), name
        else:
            assert torch.equal(moment, before[f"model.layers.{old.index(int(layer))}.{rest}"]), name


def _moments(checkpoint: Path, trainer: Trainer) -> dict[str, torch.Tensor]:
    """The first moments in a checkpoint by the names that a stock Trainer's optimizer has at their numbers."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    order = [names[id(p)] for group in trainer.create_optimizer().param_groups for p in group["params"]]
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert [number for group in saved["param_groups"] for number in group["params"]] == list(range(len(order)))
    return {order[number]: entry["exp_avg"] for number, entry in saved["state"].items()}


def test_a_folder_of_accelerates_save_state_is_grown_and_loads_again(tmp_path):
    model = tiny_model("llama")
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = accelerator.prepare(LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    for step in range(3):
        ids = some_tokens(2, 12, seed=step)
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.unwrap_model(model).config.save_pretrained(tmp_path / "state")
    accelerator.free_memory()

    grow_checkpoint(tmp_path / "state", tmp_path / "grown", width=2)
    child = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    again = Accelerator(cpu=True)
    other = torch.optim.AdamW(child.parameters(), lr=1e-3)
    child, other = again.prepare(child, other)
    again.load_state(str(tmp_path / "grown"))
    entries = list(other.optimizer.state.values())
    assert len(entries) == len(list(child.parameters()))
    assert {float(entry["step"]) for entry in entries} == {3.0}


def test_a_model_without_training_state_is_grown_alone(base, tmp_path):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "model")
    grow_checkpoint(tmp_path / "model", tmp_path / "grown", depth=2)
    assert not (tmp_path / "grown" / "optimizer.pt").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "grown").config.num_hidden_layers == 4


def test_reset_keeps_the_settings_and_the_schedule_and_no_moment(base, tmp_path):
    grow_checkpoint(base, tmp_path / "grown", width=2, state_policy="reset")
    saved, parents = (torch.load(f / "optimizer.pt", weights_only=True) for f in (tmp_path / "grown", base))
    assert saved["state"] == {}
    numbered = ("params", "param_names")
    for group, parent in zip(saved["param_groups"], parents["param_groups"], strict=True):
        assert group | dict.fromkeys(numbered) == parent | dict.fromkeys(numbered)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    stock = stock_trainer(model, tmp_path / "stock", 120, blocks(0, 120), save_strategy="no")
    stock.train(resume_from_checkpoint=str(tmp_path / "grown"))
    assert stock.state.global_step == 120
    parent_run = stock_trainer(_parent(base), tmp_path / "parent", 120, blocks(0, 120), save_strategy="no")
    parent_run.train(resume_from_checkpoint=str(base))
    assert _rates(stock) == _rates(parent_run)
    assert {float(entry["step"]) for entry in stock.optimizer.state.values()} == {100.0}


def _parent(base: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(base)


def test_reset_of_a_state_of_no_known_kind_keeps_its_settings(base, tmp_path):
    source = shutil.copytree(base, tmp_path / "source")
    saved = torch.load(base / "optimizer.pt", weights_only=True)
    saved["state"] = {
        number: {"step": entry["step"], "sum": entry["exp_avg"]} for number, entry in saved["state"].items()
    }
    torch.save(saved, source / "optimizer.pt")
    grow_checkpoint(source, tmp_path / "grown", width=2, state_policy="reset")
    grown = torch.load(tmp_path / "grown" / "optimizer.pt", weights_only=True)
    assert [group["lr"] for group in grown["param_groups"]] == [group["lr"] for group in saved["param_groups"]]
    assert grown["state"] == {} and (tmp_path / "grown" / "scheduler.pt").exists()


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_reset_without_a_readable_optimizer_leaves_it_and_the_schedule_out(content, base, tmp_path):
    """A stock Trainer loads both or neither."""
    source = shutil.copytree(base, tmp_path / "source")
    (source / "optimizer.pt").unlink()
    if content:
        (source / "optimizer.pt").write_bytes(content)
    grow_checkpoint(source, tmp_path / "grown", width=2, state_policy="reset")
    assert not [name for name in ("optimizer.pt", "scheduler.pt") if (tmp_path / "grown" / name).exists()]
    assert (tmp_path / "grown" / "trainer_state.json").exists()


def test_our_trainer_goes_on_from_a_grown_checkpoint_where_the_run_stood(base, tmp_path):
    """The parent is itself a grown run: its place in the schedule lies in a file of ours."""
    child = grow(AutoModelForCausalLM.from_pretrained(base), width=2)
    whole = warmstart_trainer(child, tmp_path / "run", 20, blocks(20, 20), warmstart_from=base, save_steps=10)
    whole.train()
    grow_checkpoint(tmp_path / "run" / "checkpoint-10", tmp_path / "grown", depth=2)
    grandchild = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    resumed = warmstart_trainer(grandchild, tmp_path / "resumed", 20, blocks(20, 20))
    resumed.train(resume_from_checkpoint=str(tmp_path / "grown"))
    assert resumed.state.global_step == 20
    assert _rates(resumed)[10:] == _rates(whole)[10:]
    assert min(_rates(resumed)[10:]) > 0 and len(set(_rates(whole))) == 20


def _rates(trainer: Trainer) -> list[float]:
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


def test_every_file_is_taken_along_that_a_growth_does_not_change(base, tmp_path):
    source = shutil.copytree(base, tmp_path / "source")
    kept = ["chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json", "spiece.model", "tokenizer.json"]
    kept += ["preprocessor_config.json", "special_tokens_map.json", "modeling_mine.py", "LICENSE"]
    gone = ["README.md", "growth.json", "pytorch_model.bin", "model-00001-of-00002.safetensors", "flax_model.msgpack"]
    for name in [*kept, *gone]:
        (source / name).write_text(f"the parent's {name}")
    (source / "tokenizer_files").mkdir()
    grow_checkpoint(source, tmp_path / "grown", width=2)
    grown = {path.name: path for path in (tmp_path / "grown").iterdir()}
    assert all(grown[name].read_text() == f"the parent's {name}" for name in kept)
    assert (source / "rng_state.pth").read_bytes() == grown["rng_state.pth"].read_bytes()
    written = {"README.md", "growth.json", "config.json", "generation_config.json", "model.safetensors"}
    written |= {"optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"}
    assert set(grown) == {*kept, *written}
    assert not any(path.read_bytes().startswith(b"the parent's") for name, path in grown.items() if name in written)


def test_a_model_without_training_state_keeps_its_tokenizer(base, tmp_path):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    grow_checkpoint(tmp_path / "model", tmp_path / "grown", depth=2)
    assert (tmp_path / "grown" / "tokenizer.json").read_text() == "{}"


def test_others_may_read_the_grown_folder_as_any_that_is_made(base, tmp_path):
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        try:
            grow_checkpoint(base, tmp_path / f"grown-{umask}", width=2)
            assert os.umask(umask) == umask
        finally:
            os.umask(before)
        assert (tmp_path / f"grown-{umask}").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("made", [True, False])
def test_the_target_may_be_a_link(made, base, tmp_path):
    """To an empty folder, or to none."""
    if made:
        (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    grow_checkpoint(base, tmp_path / "link", depth=2)
    assert (tmp_path / "link").is_symlink()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "disk").config.num_hidden_layers == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_what_is_in_the_way_stays(base, tmp_path):
    target = tmp_path / "grown"
    target.mkdir()
    (target / "mine.txt").write_text("precious")
    with pytest.raises(WarmstartError, match="not empty"):
        grow_checkpoint(base, target, width=2)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


def test_a_fault_leaves_nothing_under_the_targets_name(base, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_warmstart.checkpoints.weights.whole.stream_weights", full_disk)
    with pytest.raises(CheckpointError, match="No space"):
        grow_checkpoint(base, tmp_path / "out" / "grown", width=2)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_without_a_config_says_what_it_lacks(base, tmp_path):
    """As those are that Trainer saves in shards."""
    shutil.copytree(base, tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(WarmstartError, match="Put the model's config.json there"):
        grow_checkpoint(tmp_path / "bare", tmp_path / "grown", **GROWTH)
    assert not (tmp_path / "grown").exists()


def test_two_ranks_grow_a_whole_checkpoint_as_one_process_does(base, tmp_path):
    grow_checkpoint(base, tmp_path / "alone", **GROWTH)
    arguments = {"parent": str(base), "reports": str(tmp_path)}
    run_on_ranks(
        tmp_path / "ranks",
        [
            ("grow_whole_on_ranks", 2, arguments | {"grown": str(tmp_path / "grown")}),
            ("fail_to_grow_on_ranks", 2, arguments | {"grown": str(tmp_path / "failed")}),
        ],
    )
    alone, grown = ({p.name: p for p in (tmp_path / name).iterdir()} for name in ("alone", "grown"))
    assert set(grown) == set(alone)
    for name in ("model.safetensors", "config.json", "scheduler.pt", "trainer_state.json"):
        assert grown[name].read_bytes() == alone[name].read_bytes(), name
    a, b = (torch.load(files["optimizer.pt"], weights_only=True) for files in (alone, grown))
    assert a["param_groups"] == b["param_groups"] and set(a["state"]) == set(b["state"])
    for number, entry in a["state"].items():
        assert all(torch.equal(value, b["state"][number][key]) for key, value in entry.items())
    first, second = (json.loads((tmp_path / f"record-{rank}.json").read_text()) for rank in range(2))
    assert first == second and first["growth_config"]["depth"] == 2
    # A fault of the main rank is one of all, and leaves nothing.
    assert all("No space left" in (tmp_path / f"fault-{rank}.txt").read_text() for rank in range(2))
    assert not [path for path in tmp_path.iterdir() if "failed" in path.name]
