"""Growth from files to files: bit for bit what `from_pretrained`, `grow` and `save_pretrained` give."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_warmstart import grow, grow_checkpoint, grow_optimizer_state, plan_growth
from hf_warmstart.checkpoints.grow_checkpoint import prepare_growth
from hf_warmstart.checkpoints.memory import Pieces
from hf_warmstart.checkpoints.safetensors import sink as safetensors_sink
from hf_warmstart.checkpoints.safetensors.sink import Shard
from hf_warmstart.checkpoints.state import training_files
from hf_warmstart.checkpoints.state.state_stream import number_optimizer_state
from hf_warmstart.checkpoints.weights import whole as whole_weights
from hf_warmstart.checkpoints.weights.whole import LoadedWeights, StreamedWeights
from hf_warmstart.errors import UntraceableError
from hf_warmstart.growth.source import class_and_config
from hf_warmstart.hub import save

from ..models import FAMILIES
from .grown import CERTIFICATE, CHILD_SHARDS, add_training_state, differing, grown_in_memory, save_parent
from .test_views import zoo_model

WIDTH = ("exact_copy", "perturbed_copy", "uneven_copy", "reference_slice", "szp")
DEPTH = ("identity_blocks", "stack", "interleave", "overlap")
OPERATORS = (*WIDTH, *DEPTH)
DTYPES = (torch.bfloat16, torch.float32)
# Every family once, every operator at least once.
SUBSET = [(family, OPERATORS[number % len(OPERATORS)]) for number, family in enumerate(FAMILIES)]


def growths(operator: str) -> list[dict]:
    """The growths by an operator."""
    if operator in WIDTH:
        return [{"width": width, "width_operator": operator, "seed": 5} for width in (2, 1.5)]
    return [{"depth": depth, "depth_operator": operator} for depth in (2, 1.5)]


@pytest.fixture(autouse=True)
def written_where_they_are_made(monkeypatch):
    """Tensors as small as those of tiny models are copied to the disk's buffers; here they go as large ones do."""
    monkeypatch.setattr(safetensors_sink, "WORTHWHILE", 1)


@pytest.fixture
def no_certificate(monkeypatch):
    """Certificates take a second each, and are the same whichever way weights go."""
    for module in (whole_weights, save):
        monkeypatch.setattr(module, "certify_record", lambda config: CERTIFICATE)


def check_same(tmp_path, parent, state=None, **options) -> None:
    """Grow a parent both ways and compare all files."""
    expected = grown_in_memory(parent, tmp_path / "expected", **options)
    (expected / "tokenizer.json").write_bytes((parent / "tokenizer.json").read_bytes())
    growth = prepare_growth(parent, tmp_path / "made", max_shard_size=CHILD_SHARDS, **options)
    assert isinstance(growth.weights, StreamedWeights)
    record = growth.run()
    growth.close()
    made = tmp_path / "made"
    assert len(list(made.glob("*.safetensors"))) > 1
    state_files = ["optimizer.pt", "scheduler.pt", "trainer_state.json"] if state else []
    assert differing(made, expected) == state_files
    assert json.loads((made / "config.json").read_text())["warmstart"][-1] == record.to_dict()
    if state:
        check_same_state(made, number_optimizer_state(grow_optimizer_state(state, plan_growth(parent, **options))))


def check_same_state(made, expected) -> None:
    """The optimizer's file holds what is expected, entry by entry and in its order."""
    found = torch.load(made / "optimizer.pt", weights_only=True)
    assert found["param_groups"] == expected["param_groups"]
    assert list(found["state"]) == list(expected["state"])
    for number, entry in expected["state"].items():
        assert list(found["state"][number]) == list(entry)
        for key, value in entry.items():
            assert value.dtype == found["state"][number][key].dtype
            assert torch.equal(value, found["state"][number][key]), (number, key)


@pytest.mark.parametrize(("family", "operator"), SUBSET)
def test_every_family_and_every_operator_give_the_same_files(family, operator, no_certificate, tmp_path):
    number = FAMILIES.index(family)
    parent = save_parent(tmp_path / "parent", family, DTYPES[number % 2])
    state = add_training_state(parent, AutoModelForCausalLM.from_pretrained(parent)) if number > 8 else None
    check_same(tmp_path, parent, state, **growths(operator)[number // 2 % 2])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "operator"), list(product(FAMILIES, OPERATORS)))
def test_the_whole_table_of_families_and_operators_gives_the_same_files(family, operator, no_certificate, tmp_path):
    for number, (dtype, options) in enumerate(product(DTYPES, growths(operator))):
        folder = tmp_path / str(number)
        parent = save_parent(folder / "parent", family, dtype)
        state = add_training_state(parent, AutoModelForCausalLM.from_pretrained(parent), dtype)
        check_same(folder, parent, state, **options)


@pytest.mark.parametrize(
    ("kind", "model_type", "dtype"),
    [
        pytest.param("seq2seq-lm", "t5", torch.float16, marks=pytest.mark.slow),
        ("causal-lm", "deepseek_v3", torch.bfloat16),
    ],
)
def test_tensors_that_a_class_keeps_in_float32_stay_so(kind, model_type, dtype, no_certificate, tmp_path):
    zoo_model(kind, model_type, dtype).save_pretrained(tmp_path / "parent", max_shard_size="3KB")
    parent = zoo_class(tmp_path / "parent").from_pretrained(tmp_path / "parent")
    child = grow(parent, depth=2)
    child.save_pretrained(tmp_path / "expected", max_shard_size="6KB")
    grow_checkpoint(tmp_path / "parent", tmp_path / "made", depth=2, max_shard_size="6KB")
    assert differing(tmp_path / "made", tmp_path / "expected") == ["README.md", "growth.json"]
    dtypes = {t.dtype for path in (tmp_path / "made").glob("*.safetensors") for t in load_file(path).values()}
    assert dtypes == {dtype, torch.float32}


def zoo_class(folder):
    """The class that a folder's config names."""
    return class_and_config(folder)[0]


@pytest.mark.slow
def test_card_and_certificate_are_those_of_save_grown(tmp_path):
    parent = save_parent(tmp_path / "parent", "llama")
    grow_checkpoint(parent, tmp_path / "made", width=2, max_shard_size=CHILD_SHARDS)
    expected = grown_in_memory(parent, tmp_path / "expected", None, width=2)
    assert differing(tmp_path / "made", expected) == ["tokenizer.json"]
    files = json.loads((tmp_path / "made" / "growth.json").read_text())["files"]
    assert {name: facts["sha256"] for name, facts in files.items()} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "made").glob("*.safetensors")
    }


@pytest.mark.slow
def test_a_growth_of_a_growth_has_both_records(no_certificate, tmp_path):
    save_parent(tmp_path / "first", "gpt2", torch.bfloat16)
    grow_checkpoint(tmp_path / "first", tmp_path / "parent", depth=2)
    check_same(tmp_path, tmp_path / "parent", width=2, width_operator="uneven_copy")
    assert len(json.loads((tmp_path / "made" / "config.json").read_text())["warmstart"]) == 2


# -- however it is done -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "operator", "threads", "block"),
    [
        ("gpt_neox", "reference_slice", 3, 3000),
        *(
            pytest.param(*growth, *how, marks=pytest.mark.slow)
            for growth in [("gpt_neox", "reference_slice"), ("mixtral", "perturbed_copy"), ("opt", "uneven_copy")]
            for how in [(1, 1), (3, 1), (1, 1000)]
        ),
    ],
)
def test_bytes_do_not_depend_on_threads_or_on_the_size_of_blocks(
    family, operator, threads, block, no_certificate, tmp_path
):
    parent = save_parent(tmp_path / "parent", family, torch.bfloat16)
    options = {"width": 1.5, "width_operator": operator, "max_shard_size": CHILD_SHARDS}
    grow_checkpoint(parent, tmp_path / "expected", **options)
    growth = prepare_growth(parent, tmp_path / "made", **options)
    replace(growth, pieces=Pieces(threads, block, 2**16, block)).run()
    growth.close()
    assert differing(tmp_path / "made", tmp_path / "expected") == []


@pytest.mark.parametrize("failing", ["second shard", pytest.param("optimizer", marks=pytest.mark.slow)])
def test_a_growth_that_died_goes_on_to_the_same_bytes(failing, no_certificate, monkeypatch, tmp_path):
    parent = save_parent(tmp_path / "parent", "llama", torch.bfloat16)
    add_training_state(parent, AutoModelForCausalLM.from_pretrained(parent))
    options = {"width": 2, "width_operator": "perturbed_copy", "max_shard_size": CHILD_SHARDS}
    grow_checkpoint(parent, tmp_path / "expected", **options)
    written = []
    write = Shard.write

    def noted(shard, data):
        if shard.name not in written:
            written.append(shard.name)
            if len(written) == 2 and failing == "second shard":
                raise Stopped
        write(shard, data)

    def stop(*given, **options):
        raise Stopped

    monkeypatch.setattr(Shard, "write", noted)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        if failing == "optimizer":
            patched.setattr(training_files, "write_optimizer", stop)
        grow_checkpoint(parent, tmp_path / "made", **options)
    assert not (tmp_path / "made").exists()
    first = list(written)
    written.clear()
    monkeypatch.setattr(Shard, "write", lambda shard, data: (written.append(shard.name), write(shard, data)))
    grow_checkpoint(parent, tmp_path / "made", **options)
    assert differing(tmp_path / "made", tmp_path / "expected") == []
    shards = {path.name for path in (tmp_path / "made").glob("*.safetensors")}
    finished = first[:1] if failing == "second shard" else first
    assert set(written) == shards - set(finished)  # what was finished is not written again


class Stopped(Exception):
    """Ends a growth half-way."""


def test_a_class_that_cannot_be_followed_is_grown_in_memory_to_the_same_files(
    no_certificate, monkeypatch, caplog, tmp_path
):
    def refuse(*given):
        raise UntraceableError("It cannot be followed.")

    parent = save_parent(tmp_path / "parent", "qwen2", torch.bfloat16)
    monkeypatch.setattr(whole_weights, "loaded_view", refuse)
    growth = prepare_growth(parent, tmp_path / "made", max_shard_size=CHILD_SHARDS, width=2)
    assert isinstance(growth.weights, LoadedWeights)
    assert "Qwen2ForCausalLM is grown in memory: It cannot be followed." in caplog.text
    growth.run()
    growth.close()
    expected = grown_in_memory(parent, tmp_path / "expected", width=2)
    assert differing(tmp_path / "made", expected) == ["tokenizer.json"]
