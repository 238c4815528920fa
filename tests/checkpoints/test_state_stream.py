"""An optimizer's state, grown from one file into another in blocks of rows, and what can be wrong with either."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_warmstart import grow_optimizer_state, plan_growth
from hf_warmstart.checkpoints.state.state_stream import number_optimizer_state, optimizer_bytes, write_optimizer
from hf_warmstart.checkpoints.torch_files.later import Later, save_sharded
from hf_warmstart.checkpoints.torch_files.sharded import ShardedFolder
from hf_warmstart.checkpoints.torch_files.sink import TorchFileSink, torch_file_bytes
from hf_warmstart.checkpoints.torch_files.source import read_state_file
from hf_warmstart.errors import StateError, WarmstartError
from hf_warmstart.growth import transform

from ..models import tiny_model
from ..training.ranks import REPOSITORY, environment

GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "tensor": torch.tensor(0.5)}
GROWTHS = {
    "copies": {"width": 2, "depth": 2, "width_operator": "perturbed_copy"},
    "slice": {"width": 1.5, "width_operator": "reference_slice"},
}


def _moments(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def _adam(shape: torch.Size, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "step": torch.tensor(7.0),
        "exp_avg": _moments(*shape, dtype=dtype),
        "exp_avg_sq": _moments(*shape, dtype=dtype),
    }


def _adafactor(shape: torch.Size, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    means = {"row_var": _moments(*shape[:-1], 1), "col_var": _moments(*shape[:-2], 1, shape[-1])}
    return {"step": torch.tensor(7.0), **(means if len(shape) > 1 else {"variance": _moments(*shape)})}


def _saved(path: Path, plan: Any, entry: Any = _adam, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Write a state of the plan's parent by name, and read it as it is read from a checkpoint."""
    state = {name: entry(shape, dtype) for name, shape in plan.shapes.items()}
    torch.save({"state": state, "param_groups": [{**GROUP, "params": list(state)}]}, path)
    return read_state_file(path)


# -- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_policy", ["carry", "asymmetric_reset", "reset"])
@pytest.mark.parametrize("growth", GROWTHS)
def test_the_file_is_that_of_the_whole_state_byte_for_byte_whatever_the_block(growth, state_policy, tmp_path):
    plan = plan_growth(tiny_model("llama"), **GROWTHS[growth])
    state = _saved(tmp_path / "parent.pt", plan)
    whole = number_optimizer_state(grow_optimizer_state(state, plan, state_policy=state_policy))
    if state_policy == "asymmetric_reset":
        whole["param_groups"] = [{"new_lr_peak": 1.0, "new_lr_steps": 0, **group} for group in whole["param_groups"]]
    (tmp_path / "whole").mkdir()
    torch.save(whole, tmp_path / "whole" / "optimizer.pt")
    expected = (tmp_path / "whole" / "optimizer.pt").read_bytes()
    for max_block_bytes in (9000, 2**24):
        path = tmp_path / "optimizer.pt"
        sizes = []
        arguments = (state, plan, path, state_policy, False)
        write_optimizer(*arguments, max_block_bytes=max_block_bytes, progress=sizes.append)
        assert path.read_bytes() == expected
        assert optimizer_bytes(*arguments).file == len(expected)
        assert zipfile.ZipFile(path).testzip() is None
        moments = [v for entry in whole["state"].values() for v in entry.values() if torch.is_tensor(v) and v.ndim]
        assert sum(sizes) == sum(moment.nbytes for moment in moments)
    for mmap in (True, False):
        again = torch.load(path, weights_only=True, mmap=mmap)
        assert again["param_groups"] == whole["param_groups"]


@pytest.mark.parametrize("entry", [_adam, _adafactor])
def test_named_half_precision_and_factored_states_are_those_of_the_whole(entry, tmp_path):
    plan = plan_growth(tiny_model("gpt2"), **GROWTHS["slice"])
    state = _saved(tmp_path / "parent.bin", plan, entry, torch.bfloat16)
    write_optimizer(state, plan, tmp_path / "optimizer.bin", "carry", True, max_block_bytes=5000)
    found = torch.load(tmp_path / "optimizer.bin", weights_only=True)
    expected = grow_optimizer_state(state, plan)
    assert list(found["state"]) == list(expected["state"])
    for name, pieces in expected["state"].items():
        for key, value in pieces.items():
            assert torch.equal(value, found["state"][name][key]) and value.dtype == found["state"][name][key].dtype


def test_what_is_no_number_is_carried_and_fills_what_has_no_source(tmp_path):
    plan = plan_growth(tiny_model("llama"), **GROWTHS["slice"])
    state = _saved(tmp_path / "parent.pt", plan)
    name = "model.layers.0.mlp.up_proj.weight"
    whole = torch.load(tmp_path / "parent.pt", weights_only=True)
    whole["state"][name]["exp_avg_sq"][0, 0] = torch.nan
    torch.save(whole, tmp_path / "parent.pt")
    state = read_state_file(tmp_path / "parent.pt")
    write_optimizer(state, plan, tmp_path / "optimizer.pt", "carry", True, max_block_bytes=1)
    found = torch.load(tmp_path / "optimizer.pt", weights_only=True)["state"][name]["exp_avg_sq"]
    unsourced = plan.tensor(name)._unsourced()
    assert torch.equal(found.isnan(), unsourced | (torch.arange(found.numel()) == 0).view_as(found))


# -- rows of moments --------------------------------------------------------------------------------------------------


def test_the_mean_that_fills_is_taken_once_and_has_the_same_bits_in_any_blocks(monkeypatch, tmp_path):
    plan = plan_growth(tiny_model("llama"), **GROWTHS["slice"])
    monkeypatch.setattr(transform, "AVERAGED", 100)  # less than two rows
    state = _saved(tmp_path / "parent.pt", plan)
    taken = []
    mean_square = transform.TensorGrowth._mean_square
    monkeypatch.setattr(
        transform.TensorGrowth,
        "_mean_square",
        lambda self, read: taken.append(self.name) or mean_square(self, read),
    )
    write_optimizer(state, plan, tmp_path / "optimizer.pt", "carry", True, max_block_bytes=1)
    assert len(taken) == len(set(taken)) > 0
    found = torch.load(tmp_path / "optimizer.pt", weights_only=True)["state"]
    for name, entry in grow_optimizer_state(state, plan)["state"].items():
        assert torch.equal(entry["exp_avg_sq"], found[name]["exp_avg_sq"]), name


def test_a_block_across_two_copies_reads_the_rows_of_each_and_nothing_between():
    plan = plan_growth(tiny_model("llama"), width=2, width_operator="exact_copy")
    tensor = plan.tensor("model.layers.0.mlp.up_proj.weight")
    parent = _moments(*(axis.n for axis in tensor.maps))
    n, read = len(parent), []
    assert tensor.maps[0].source.tolist() == [*range(n), *range(n)]

    def rows(start: int, stop: int) -> torch.Tensor:
        read.append((start, stop))
        return parent[start:stop]

    found = tensor.moment_rows(rows, "first_moment", n - 2, n + 3)
    assert read == [(0, 3), (n - 2, n)]
    assert torch.equal(found, tensor.first_moment(parent)[n - 2 : n + 3])


# -- memory -----------------------------------------------------------------------------------------------------------

_IN_LITTLE_MEMORY = """
import resource, sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from hf_warmstart.checkpoints.state.state_stream import optimizer_bytes, write_optimizer
from hf_warmstart.checkpoints.torch_files.source import read_state_file
from hf_warmstart.growth.config import GrowthConfig
from hf_warmstart.growth.plan import make_plan

folder, room = Path(sys.argv[1]), int(sys.argv[2])
sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1, "vocab_size": 4000}
config = LlamaConfig(num_attention_heads=8, num_key_value_heads=8, architectures=["LlamaForCausalLM"], **sizes)
plan = make_plan(LlamaForCausalLM, config, GrowthConfig(width=1.5, width_operator="reference_slice"))
state = {n: {"step": torch.tensor(1.0), "exp_avg": torch.ones(s), "exp_avg_sq": torch.ones(s)} for n, s in plan.shapes.items()}
torch.save({"state": state, "param_groups": [{"lr": 1.0, "params": list(state)}]}, folder / "parent.pt")
del state
state = read_state_file(folder / "parent.pt")
arguments = (state, plan, folder / "optimizer.pt", "carry", True)
def anonymous():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(lines["VmData"].split()[0])
write_optimizer({"state": {}, "param_groups": []}, *arguments[1:])  # what is imported at first use is here now
resource.setrlimit(resource.RLIMIT_DATA, (anonymous() + room, resource.RLIM_INFINITY))
expected = optimizer_bytes(*arguments, max_block_bytes=2**21)
write_optimizer(*arguments, max_block_bytes=2**21)
print(expected.file, expected.memory)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_state_is_grown_in_a_fraction_of_its_size(tmp_path):
    room = 32 * 2**20
    done = subprocess.run(
        [sys.executable, "-c", _IN_LITTLE_MEMORY, str(tmp_path), str(room)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    file, memory = map(int, done.stdout.split())
    assert file == (tmp_path / "optimizer.pt").stat().st_size > 2 * room
    assert memory < room


def test_of_a_sharded_checkpoint_one_tensor_is_held_at_a_time(tmp_path):
    made: list[torch.Tensor] = []
    held = []

    def make(rows: Any) -> torch.Tensor:
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in made))
        made.append(torch.full((100, 10), float(len(made))))
        return made[-1]

    state = {"optimizer": {"state": {f"p{n}": {"exp_avg": Later((100, 10), torch.float32, make)} for n in range(5)}}}
    save_sharded(state, tmp_path / "optimizer_0", None)
    assert held == [0] * 5
    shards = ShardedFolder(tmp_path / "optimizer_0")
    found = [shards.read(f"optimizer.state.p{n}.exp_avg") for n in range(5)]
    assert [set(value.flatten().tolist()) for value in found] == [{0.0}, {1.0}, {2.0}, {3.0}, {4.0}]


def test_what_goes_wrong_while_a_sharded_checkpoint_is_made_is_said_as_it_is(tmp_path):
    def make(rows: Any) -> torch.Tensor:
        raise StateError("the parent's file was cut")

    with pytest.raises(StateError, match="^the parent's file was cut$"):
        save_sharded({"a": Later((2,), torch.float32, make)}, tmp_path / "optimizer_0", None)


# -- files that are not what they should be ---------------------------------------------------------------------------


def test_rows_that_are_not_the_next_and_files_that_are_not_complete_are_refused(tmp_path):
    skeleton = {"a": torch.empty(4, 2, device="meta"), "b": torch.tensor(1.0)}
    with TorchFileSink(tmp_path / "file.pt", skeleton) as sink:
        assert [keys for keys, _ in sink.pieces] == [("a",)]
        assert sink.size == torch_file_bytes(tmp_path / "file.pt", skeleton) == (tmp_path / "file.pt").stat().st_size
        for start, rows in [
            (1, torch.ones(1, 2)),
            (0, torch.ones(2)),
            (0, torch.ones(5, 2)),
            (0, torch.ones(1, 2).int()),
        ]:
            with pytest.raises(WarmstartError, match="do not follow"):
                sink.write(("a",), start, rows)
        sink.write(("a",), 0, torch.ones(3, 2))
        with pytest.raises(WarmstartError, match="lacks rows of 1 pieces"):
            sink.finish()
        sink.write(("a",), 3, torch.ones(1, 2))
        sink.finish()
    found = torch.load(tmp_path / "file.pt", weights_only=True)
    assert found["a"].tolist() == [[1.0, 1.0]] * 4 and float(found["b"]) == 1.0


@pytest.mark.parametrize("kept", [0.3, 0.99])
def test_a_file_that_was_cut_is_refused(kept, tmp_path):
    plan = plan_growth(tiny_model("llama"), width=2)
    _saved(tmp_path / "optimizer.pt", plan)
    os.truncate(tmp_path / "optimizer.pt", int(kept * (tmp_path / "optimizer.pt").stat().st_size))
    with pytest.raises(StateError, match="cannot be read as plain tensors"):
        read_state_file(tmp_path / "optimizer.pt")


@pytest.mark.parametrize("change", ["cut", "written to"])
def test_a_file_that_changes_while_it_is_read_is_told(change, tmp_path):
    plan = plan_growth(tiny_model("llama"), width=2)
    path = tmp_path / "parent.pt"
    state = _saved(path, plan)
    os.utime(path, ns=(0, 0))
    state = read_state_file(path)
    if change == "cut":
        os.truncate(path, 1000)
    else:
        with open(path, "r+b") as file:
            file.seek(5000)
            file.write(b"other")
    with pytest.raises(StateError, match=r"parent\.pt was written to while it was read"):
        write_optimizer(state, plan, tmp_path / "optimizer.pt", "carry", True)


def test_a_directory_that_says_less_of_a_tensor_than_the_file_is_refused(tmp_path):
    """The records of two tensors are swapped, so that one tensor would reach beyond its bytes."""
    path = tmp_path / "parent.pt"
    torch.save({"state": {0: {"a": torch.ones(100), "b": torch.ones(1)}}, "param_groups": []}, path)
    content = path.read_bytes()
    first, second = b"parent/data/0", b"parent/data/1"
    path.write_bytes(content.replace(first, b"parent/data/x").replace(second, first).replace(b"parent/data/x", second))
    with pytest.raises(StateError, match="cannot be read as plain tensors"):
        read_state_file(path)


def test_strided_tensors_and_those_of_other_devices_are_read_as_torch_reads_them(tmp_path):
    base = _moments(6, 5)
    pieces = {"turned": base.t(), "part": base[2:4, 1:], "repeated": base[:1].expand(3, 5), "none": torch.ones(0, 3)}
    torch.save({"state": {0: pieces}, "param_groups": []}, tmp_path / "parent.pt")
    content = zipfile.ZipFile(tmp_path / "parent.pt").read("parent/data.pkl")
    on_cpu, on_other = (b"\x03\x00\x00\x00" + device for device in (b"cpu", b"xpu"))
    assert content.count(on_cpu) == 1
    elsewhere = (tmp_path / "parent.pt").read_bytes().replace(content, content.replace(on_cpu, on_other))
    for name, file in (("here", (tmp_path / "parent.pt").read_bytes()), ("elsewhere", elsewhere)):
        (tmp_path / name).write_bytes(file)
        entry = read_state_file(tmp_path / name)["state"][0]
        for key, value in pieces.items():
            assert torch.equal(entry[key], value), key
            assert torch.equal(entry.rows(key, 1, 3), value[1:3]), key


def test_a_pickle_that_would_execute_something_is_refused(tmp_path):
    torch.save({"state": {0: {"step": _Payload()}}, "param_groups": []}, tmp_path / "parent.pt")
    with pytest.raises(StateError, match="holds more than plain tensors"):
        read_state_file(tmp_path / "parent.pt")


class _Payload:
    def __reduce__(self) -> Any:
        return os.getpid, ()


@pytest.mark.parametrize("content", [{"a": 1}, [], {"state": []}])
def test_a_file_of_something_else_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "parent.pt")
    with pytest.raises(StateError, match="holds no optimizer's state"):
        read_state_file(tmp_path / "parent.pt")


def test_shards_are_read_by_rows_and_their_gaps_and_ways_out_of_the_folder_are_refused(tmp_path):
    value = _moments(7, 3)
    save_sharded(
        {"a": Later(value.shape, value.dtype, lambda rows: value.clone()), "b": torch.tensor(2.0)}, tmp_path, None
    )
    shards = ShardedFolder(tmp_path)
    assert torch.equal(shards.read("a"), value) and torch.equal(shards.read("a", (2, 5)), value[2:5])
    assert shards.read("a", (4, 4)).shape == (0, 3) and float(shards.read("b")) == 2.0
    index = pickle.loads((tmp_path / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = f"../{tmp_path.name}/{info.relative_path}"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(StateError, match="names no file"):
        ShardedFolder(tmp_path).read("a")
    index.state_dict_metadata["a"].chunks.clear()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(StateError, match="not all of it"):
        ShardedFolder(tmp_path).read("a")
