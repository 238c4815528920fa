"""A parent trained under FSDP2 on two ranks: grown shard by shard, continued on any number of ranks, nothing executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from datasets import Dataset
from transformers import LlamaForCausalLM

from hf_warmstart import grow, grow_checkpoint, grow_optimizer_state, plan_growth
from hf_warmstart.checkpoints.torch_files.sharded import ShardedFolder
from hf_warmstart.errors import StateError

from ..models import some_tokens
from .conftest import losses, warmstart_trainer
from .ranks import run_on_ranks
from .sharded_jobs import (
    BATCH,
    CHILD_STEPS,
    GROWTH,
    OPTIMIZER,
    PARENT_STEPS,
    WEIGHTS,
    continue_training,
    load_grown_from,
    optimizer_of,
    wrong_model,
)

NOISE = 1e-5  # of losses near 4 in float32, summed in another order


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The parent's run and its children's, on two ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    parent, grown = str(folder / "parent"), str(folder / "grown-2")
    jobs: list[Any] = [
        ("train_parent", 2, {"folder": parent}),
        ("grow_on_ranks", 2, {"parent": parent, "grown": grown}),
        ("continue_grown", 2, {"grown": grown, "report": str(folder / "grown on 2")}),
        ("continue_parent", 2, {"parent": parent, "report": str(folder / "parent on 2")}),
        (
            "resume_by_our_trainer",
            2,
            {"grown": grown, "again": str(folder / "again"), "report": str(folder / "ours on 2")},
        ),
    ]
    run_on_ranks(folder, jobs)
    return folder


@pytest.fixture(scope="module")
def runs_on_three(runs) -> Path:
    """The same children on three ranks, from what two ranks wrote."""
    parent, grown = str(runs / "parent"), str(runs / "grown-2")
    jobs: list[Any] = [
        ("grow_on_ranks", 3, {"parent": parent, "grown": str(runs / "grown-3")}),
        ("continue_grown", 3, {"grown": grown, "report": str(runs / "grown on 3")}),
        ("continue_parent", 3, {"parent": parent, "report": str(runs / "parent on 3")}),
    ]
    run_on_ranks(runs / "three", jobs)
    return runs


@pytest.fixture(scope="module")
def alone(runs) -> list[float]:
    """The losses of the child on one process, grown from the parent's shards."""
    plan = plan_growth(runs / "parent", **GROWTH)
    model = wrong_model(plan.target_config)
    optimizer = optimizer_of(model, named=True)
    load_grown_from(runs / "parent", model, optimizer, plan)
    return continue_training(model, optimizer, runs / "parent")


def _whole_parent(folder: Path) -> LlamaForCausalLM:
    """A parent, put together from its shards by torch's own reader."""
    model = LlamaForCausalLM(LlamaForCausalLM.config_class.from_pretrained(folder))
    weights = ShardedFolder(folder / WEIGHTS).weights()
    model.load_state_dict(dict(weights))
    return model


def _contents(folder: Path) -> dict[str, Any]:
    shards = ShardedFolder(folder)
    return {key: shards.read(key) for key in shards.keys}


def _assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert set(a) == set(b)
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


# -- growth -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown_alone(runs) -> Path:
    """The parent's checkpoint grown by one process."""
    grow_checkpoint(runs / "parent", runs / "grown-1", **GROWTH)
    return runs / "grown-1"


def _assert_grown_as_alone(grown_alone: Path, grown: Path, ranks: int) -> None:
    for part in (WEIGHTS, OPTIMIZER):
        _assert_same(_contents(grown_alone / part), _contents(grown / part))
        # Every rank wrote its rows of every tensor.
        tensors = [t for t in ShardedFolder(grown / part).index.state_dict_metadata.values() if hasattr(t, "chunks")]
        assert {len(tensor.chunks) for tensor in tensors if len(tensor.size)} == {ranks}
        assert len(list((grown / part).glob("*.distcp"))) == ranks


def test_growth_on_two_ranks_is_that_on_one_process_bit_for_bit(runs, grown_alone):
    _assert_grown_as_alone(grown_alone, runs / "grown-2", 2)


@pytest.mark.slow
def test_growth_on_three_ranks_of_what_two_wrote_is_the_same_bit_for_bit(runs_on_three, grown_alone):
    _assert_grown_as_alone(grown_alone, runs_on_three / "grown-3", 3)


def test_sharded_growth_is_the_growth_of_the_whole_state(runs):
    plan = plan_growth(runs / "parent", **GROWTH)
    child = grow(_whole_parent(runs / "parent"), **GROWTH)
    weights = ShardedFolder(runs / "grown-2" / WEIGHTS).weights()
    for name, value in child.state_dict().items():
        assert torch.equal(value, weights[name]), name
    parent, grown = (ShardedFolder(runs / name / OPTIMIZER).optimizer() for name in ("parent", "grown-2"))
    whole = {"state": dict(parent["state"]), "param_groups": parent["param_groups"]}
    expected = grow_optimizer_state(whole, plan)
    assert set(expected["state"]) == set(grown["state"]) == set(plan.names)
    for name, entry in expected["state"].items():
        assert float(entry["step"]) == PARENT_STEPS
        for key, value in entry.items():
            assert torch.equal(value, grown["state"][name][key]), (name, key)
    assert expected["param_groups"] == grown["param_groups"]


# -- training goes on -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["grown", "parent"])
def test_the_child_continues_on_two_ranks_as_on_one_process(runs, alone, source):
    """Resumed from the grown checkpoint by accelerate's own loaders, and grown straight into the sharded child."""
    assert json.loads((runs / f"{source} on 2").read_text()) == pytest.approx(alone, abs=NOISE)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["grown", "parent"])
def test_the_child_continues_on_three_ranks_as_on_one_process(runs_on_three, alone, source):
    assert json.loads((runs_on_three / f"{source} on 3").read_text()) == pytest.approx(alone, abs=NOISE)


def test_the_carried_state_is_what_makes_them_agree(runs, alone):
    """Weights alone lead elsewhere by far more than noise; so would any part of the state that was lost."""
    plan = plan_growth(runs / "parent", **GROWTH)
    model = wrong_model(plan.target_config)
    optimizer = optimizer_of(model, named=True)
    load_grown_from(runs / "parent", model, optimizer, plan)
    optimizer.state.clear()
    found = continue_training(model, optimizer, runs / "parent")
    assert found[0] == alone[0]
    assert max(abs(a - b) for a, b in zip(found, alone, strict=True)) > 1000 * NOISE


def test_the_parents_losses_go_on_falling_in_the_child(runs, alone):
    parent = json.loads((runs / "parent" / "losses.json").read_text())
    assert alone[0] < parent[0] - 0.5 and alone[-1] < parent[-1]


def test_our_trainer_resumes_sharded_checkpoints_and_writes_those_that_a_stock_one_reads(runs, alone):
    found = json.loads((runs / "ours on 2").read_text())
    assert found == pytest.approx(alone, abs=NOISE)
    _assert_same(_contents(runs / "grown-2" / OPTIMIZER), _contents(runs / "again" / OPTIMIZER))


def test_warmstart_trainer_on_one_process_starts_from_the_parents_shards(runs, alone, tmp_path):
    ids = [some_tokens(BATCH, 16, seed=100 + step % 2) for step in range(PARENT_STEPS, PARENT_STEPS + CHILD_STEPS)]
    data = Dataset.from_dict({"input_ids": (rows := torch.cat(ids).tolist()), "labels": rows})
    trainer = warmstart_trainer(
        grow(_whole_parent(runs / "parent"), **GROWTH),
        tmp_path,
        CHILD_STEPS,
        data,
        warmstart_from=runs / "parent",
        state_policy="carry",
        per_device_train_batch_size=BATCH,
        learning_rate=1e-2,
        warmup_steps=2,
        optim="adamw_torch",
        save_strategy="no",
    )
    trainer.train()
    assert losses(trainer) == pytest.approx(alone, abs=NOISE)


def test_merged_weights_make_the_checkpoint_one_that_from_pretrained_loads(runs, tmp_path):
    """`accelerate merge-weights`, which the example names for a parent whose weights are sharded."""
    shutil.copytree(runs / "parent", tmp_path / "parent")
    merge_fsdp_weights(str(tmp_path / "parent" / WEIGHTS), str(tmp_path / "parent"))
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "parent")
    for name, value in _whole_parent(runs / "parent").state_dict().items():
        assert torch.equal(value, merged.state_dict()[name]), name


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_rank_holds_one_tensor_where_it_grows_and_its_share_where_it_loads(tmp_path):
    """By the allocator's record on a rank of two, while the whole checkpoint is grown and while a state is loaded.

    A state is loaded by pieces and rows: what is not kept yet is the parent's rows and the arithmetic on them. A checkpoint
    is grown without keeping anything: weights are grown whole, with up to four times a tensor. DCP's ranks exchange their
    plans, some kB for each tensor whatever its size.
    """
    arguments = {
        "parent": str(tmp_path / "deep"),
        "grown": str(tmp_path / "grown"),
        "report": str(tmp_path / "report"),
    }
    run_on_ranks(tmp_path, [("train_deep_parent", 2, {"folder": str(tmp_path / "deep")}), ("measure", 2, arguments)])
    found = json.loads((tmp_path / "report").read_text())
    share, tensor, state = found["share"], found["tensor"], found["share of state"]
    assert share == pytest.approx(found["whole"] / 2, rel=0.01)
    assert state == pytest.approx(2 * share, rel=0.01)
    assert share > 20 * tensor
    plans = 4000 * found["tensors"]
    assert found["peaks"]["loading weights"] < 4 * tensor
    assert state < found["peaks"]["loading state"] < state + tensor
    assert found["peaks"]["growing"] < 4 * tensor + plans
    assert 4 * tensor + plans < 0.2 * state


# -- nothing is executed ----------------------------------------------------------------------------------------------


class _Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _copy_of(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_an_index_that_would_execute_something_is_refused(runs, tmp_path):
    folder = _copy_of(runs / "parent", tmp_path / "parent")
    trap = tmp_path / "trap"
    (folder / OPTIMIZER / ".metadata").write_bytes(pickle.dumps(_Payload(str(trap))))
    with pytest.raises(StateError, match="mkdir"):
        ShardedFolder(folder / OPTIMIZER)
    with pytest.raises(StateError, match="Do not trust"):
        grow_checkpoint(folder, tmp_path / "grown", **GROWTH)
    assert not trap.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]
    pickle.loads((folder / OPTIMIZER / ".metadata").read_bytes())  # the trap does work
    assert trap.exists()


def _payload_by_way_of_a_record_module(path: Path) -> bytes:
    """A call of `os.mkdir`, found as an attribute of the module of DCP's records (STACK_GLOBAL of protocol 4)."""
    module, name = b"torch.distributed.checkpoint.metadata", b"os.mkdir"
    strings = [b"\x8c" + bytes([len(text)]) + text for text in (module, name, os.fsencode(path))]
    return b"\x80\x04" + strings[0] + strings[1] + b"\x93" + strings[2] + b"\x85R."


@pytest.mark.parametrize("name", ["os.mkdir", "os", "Enum", "Metadata.__init__", "float32.__class__"])
def test_what_a_record_module_imports_is_not_to_be_had_from_an_index(name, tmp_path):
    trap = tmp_path / "trap"
    payload = _payload_by_way_of_a_record_module(trap)
    pickle.loads(payload)  # the trap does work
    trap.rmdir()
    module = b"torch" if name.startswith("float32") else b"torch.distributed.checkpoint.metadata"
    payload = payload.replace(b"\x25torch.distributed.checkpoint.metadata", bytes([len(module)]) + module)
    (tmp_path / ".metadata").write_bytes(payload.replace(b"\x08os.mkdir", bytes([len(name)]) + name.encode()))
    with pytest.raises(StateError, match="Do not trust"):
        ShardedFolder(tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize("content", [pickle.dumps({"a": 1}), pickle.dumps([]), b"", b"junk", b"\x80\x04R."])
def test_an_index_that_is_none_is_refused(content, tmp_path):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(StateError, match="no readable sharded checkpoint"):
        ShardedFolder(tmp_path)


def test_an_object_that_would_execute_something_is_refused(runs, tmp_path):
    """Learning rates and names are objects in a rank's file, found there by offset and length."""
    folder = _copy_of(runs / "parent" / OPTIMIZER, tmp_path / "optimizer")
    shards = ShardedFolder(folder)
    trap = tmp_path / "trap"
    torch.save(_Payload(str(trap)), folder / "trap.distcp")
    key = next(key for key in shards.keys if key.endswith("betas"))
    with open(folder / ".metadata", "rb") as file:
        index = pickle.load(file)
    for place, info in index.storage_data.items():
        if place.fqn == key:
            info.relative_path, info.offset, info.length = "trap.distcp", 0, (folder / "trap.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(StateError, match="(?s)betas.*mkdir"):
        ShardedFolder(folder).optimizer()
    assert not trap.exists()
