"""`verify` finds whatever is not the growth that a folder's record tells of, and nothing where all is."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_warmstart import WarmstartError, grow
from hf_warmstart.checkpoints import verify as module
from hf_warmstart.checkpoints.safetensors.source import SafetensorsSource
from hf_warmstart.checkpoints.verify import verify
from hf_warmstart.checkpoints.weights import stream
from hf_warmstart.errors import CheckpointError, UntraceableError

from ..models import FAMILIES, some_tokens, tiny_model
from .folders import write_index
from .grown_folders import (
    change_config,
    change_facts,
    correct_sum,
    facts,
    flip,
    grow_folder,
    save_parent,
    tensors_in,
)

NORM, EMBED, UP = "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks for each matrix."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 2**14)


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    grow_folder(save_parent(folder / "parent"), folder / "grown")
    return folder


@pytest.fixture
def parent(once, tmp_path) -> Path:
    return shutil.copytree(once / "parent", tmp_path / "parent")


@pytest.fixture
def grown(once, tmp_path) -> Path:
    return shutil.copytree(once / "grown", tmp_path / "grown")


# -- what is as it was ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [None, 5, 0])
def test_an_untouched_growth_verifies(once, blocks):
    told = []
    found = verify(once / "grown", once / "parent", blocks=blocks, progress=lambda *bytes: told.append(bytes))
    assert found.ok and found.files == dict.fromkeys(facts(once / "grown")["files"], True) and len(found.files) == 4
    made, there = found.blocks
    assert there > 40 and made == (there if blocks is None else blocks)
    assert found.parent_unchanged is (True if blocks is None else None)
    assert found.reason == f"4 files have their sha256; {made} of {there} blocks made anew are the same, bit for bit"
    assert told[-1][0] == told[-1][1] and len(told) == 4 + made


def test_a_model_that_was_grown_in_memory_and_saved_verifies(parent, tmp_path):
    child = grow(AutoModelForCausalLM.from_pretrained(parent, dtype=torch.bfloat16), width=1.5, depth=2)
    AutoModelForCausalLM.from_pretrained(parent, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    child.save_pretrained(tmp_path / "grown")
    found = verify(tmp_path / "grown", tmp_path / "half", blocks=None)
    assert found.ok and found.parent_unchanged and found.files == {}
    assert found.reason.startswith("growth.json has no checksums; ")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_verifies(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "parent")
    grow_folder(tmp_path / "parent", tmp_path / "grown", width=2, depth=1.5, width_operator="exact_copy")
    found = verify(tmp_path / "grown", tmp_path / "parent", blocks=None)
    assert found.ok, found.reason


@pytest.mark.slow
def test_bits_are_compared_so_that_what_is_no_number_is_equal(tmp_path):
    model = tiny_model("llama")
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "parent")
    grow_folder(tmp_path / "parent", tmp_path / "grown", depth=2)
    assert verify(tmp_path / "grown", tmp_path / "parent", blocks=None).ok
    flip(tmp_path / "grown", NORM, 3)
    (tmp_path / "grown" / "growth.json").unlink()
    assert verify(tmp_path / "grown", tmp_path / "parent", blocks=None).differing == [NORM]


def test_the_parents_hub_id_and_commit_are_the_records(once, grown, monkeypatch):
    asked = []

    def local(source, revision=None, subfolder=""):
        asked.append((str(source), revision, subfolder))
        return once / "parent" if source == "org/tiny" else Path(source)

    monkeypatch.setattr(module, "local_folder", local)
    (record,) = json.loads((grown / "config.json").read_text())["warmstart"]
    change_config(grown, warmstart=[record | {"parent": "org/tiny", "revision": "e" * 40}])
    assert verify(grown).ok
    assert asked[-1] == ("org/tiny", "e" * 40, "")


# -- what is not ------------------------------------------------------------------------------------------------------


def test_one_bit_of_a_file_shows_in_its_sha256(once, grown):
    file = flip(grown, UP, 4321)
    found = verify(grown, once / "parent", blocks=0)
    assert not found.ok and [name for name, same in found.files.items() if not same] == [file]
    assert found.reason == f"1 files are not those of growth.json: '{file}'"


@pytest.mark.parametrize("way", ["removed", "corrected"])
def test_one_bit_shows_among_all_blocks_whatever_growth_json_says(once, grown, way):
    file = flip(grown, UP, 4321)
    (grown / "growth.json").unlink() if way == "removed" else correct_sum(grown, file)
    found = verify(grown, once / "parent", blocks=None)
    assert not found.ok and found.differing == [UP] and found.parent_unchanged is True
    assert all(found.files.values()) and bool(found.files) is (way == "corrected")
    assert found.reason == f"1 tensors are not the growth's: '{UP}'"


def test_a_sample_finds_a_bit_in_the_blocks_that_it_takes(once, grown):
    correct_sum(grown, flip(grown, UP))
    seeds = [verify(grown, once / "parent", blocks=20, seed=seed).ok for seed in range(4)]
    assert True in seeds and False in seeds


@pytest.mark.parametrize("blocks", [None, 64])
def test_a_changed_parent_is_told_from_a_changed_child(once, parent, blocks):
    flip(parent, NORM, 7)
    found = verify(once / "grown", parent, blocks=blocks)
    assert not found.ok and found.differing == [NORM] and found.parent_unchanged is False
    assert found.reason.startswith(
        "the parent's tensors are not those that were grown; 1 tensors are not the growth's"
    )


def test_tensors_that_are_missing_or_too_many_are_named(once, grown):
    index = json.loads((grown / "model.safetensors.index.json").read_text())["weight_map"]
    file = index.pop(NORM)
    tensors = tensors_in(grown / file)
    save_file({n: t for n, t in tensors.items() if n != NORM} | {"more": torch.ones(2)}, grown / file)
    write_index(grown, index | {"more": file})
    correct_sum(grown, file)
    found = verify(grown, once / "parent")
    assert not found.ok and (found.missing, found.unknown, found.differing) == ([NORM], ["more"], [])
    assert found.reason == f"1 tensors are missing: '{NORM}'; 1 tensors are of no growth: 'more'"


@pytest.mark.parametrize("change", [lambda tensor: tensor.double(), lambda tensor: tensor[:-1].clone()])
def test_tensors_of_another_dtype_or_shape_differ(once, grown, change):
    file = flip(grown, EMBED)
    tensors = tensors_in(grown / file)
    save_file(tensors | {EMBED: change(tensors[EMBED])}, grown / file)
    assert verify(grown, once / "parent", blocks=0).differing == [EMBED]


def test_a_folder_that_was_trained_since_differs(once, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(once / "grown")
    ids = some_tokens(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path / "trained")
    found = verify(tmp_path / "trained", once / "parent")
    assert not found.ok and UP in found.differing and found.parent_unchanged is True and found.settings == []


@pytest.mark.parametrize(
    "setting", [{"rms_norm_eps": 1e-3}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}]
)
def test_a_changed_setting_is_no_growth_either(once, grown, setting):
    change_config(grown, **setting, use_cache=False)
    found = verify(grown, once / "parent", blocks=0)
    assert not found.ok and found.settings == list(setting)
    assert found.reason.startswith("1 settings in config.json are not the growth's")


# -- growth.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"files": ["a"]}', '{"files": {"a": "b"}}', '{"files": {"a": {"sha256": 3}}}', "[" * 100000],
)
def test_a_damaged_growth_json_is_an_error(once, grown, text):
    (grown / "growth.json").write_text(text)
    with pytest.raises(CheckpointError, match="growth.json.* is damaged"):
        verify(grown, once / "parent", blocks=0)


def test_no_file_outside_of_the_folder_is_looked_at(once, grown, tmp_path):
    (tmp_path / "x").write_bytes(b"another's")
    shutil.copy(tmp_path / "x", grown / "x")
    correct = facts(grown)["files"]
    for name in ("../x", str(tmp_path / "x"), "x", "..", "\x1b[2J"):
        change_facts(grown, files=correct | {name: {"size": 9, "sha256": "0" * 64}})
        found = verify(grown, once / "parent", blocks=0)
        assert [name for name, same in found.files.items() if not same] == [name]
        assert "\x1b" not in found.reason


def test_a_file_that_growth_json_does_not_list_is_not_what_it_says(once, grown):
    files = facts(grown)["files"]
    name, _ = files.popitem()
    change_facts(grown, files=files)
    found = verify(grown, once / "parent", blocks=0)
    assert not found.ok and found.files == dict.fromkeys(files, True) | {name: False}


# -- what cannot be compared ------------------------------------------------------------------------------------------


def test_without_a_record_there_is_nothing_to_compare(once, grown, tmp_path):
    with pytest.raises(WarmstartError, match="carries no growth record"):
        verify(once / "parent", once / "parent")
    for record, words in (
        ("text", "are a list"),
        ([{"growth_config": {}}], "lacks"),
        ([3], "lacks"),
        ([{"moon": 1}], "has no fields"),
    ):
        change_config(grown, warmstart=record)
        with pytest.raises(WarmstartError, match=words):
            verify(grown, once / "parent")
    with pytest.raises(WarmstartError, match="no config.json"):
        verify(tmp_path, once / "parent")
    with pytest.raises(WarmstartError, match="nowhere/at-all.* is no folder"):
        verify("nowhere/at-all", once / "parent")


def test_a_parent_that_the_record_names_by_a_folder_has_to_be_given(once, grown):
    with pytest.raises(WarmstartError, match="names the parent 'parent', which is no Hub id"):
        verify(grown)
    (record,) = json.loads((grown / "config.json").read_text())["warmstart"]
    change_config(grown, warmstart=[record | {"parent": ""}])
    with pytest.raises(WarmstartError, match="names no parent"):
        verify(grown)
    with pytest.raises(WarmstartError, match="blocks=-1"):
        verify(grown, once / "parent", blocks=-1)


def test_a_parent_of_other_sizes_or_another_class_is_an_error(once, tmp_path):
    save_parent(tmp_path / "wide", hidden_size=128)
    with pytest.raises(WarmstartError, match="not the parent .*: hidden_size is 128, not 64"):
        verify(once / "grown", tmp_path / "wide")
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(WarmstartError, match="it is a GPT2LMHeadModel, not a LlamaForCausalLM"):
        verify(once / "grown", tmp_path / "gpt2")


def test_another_parent_of_the_same_sizes_differs(once, tmp_path):
    found = verify(once / "grown", save_parent(tmp_path / "other", seed=1))
    assert not found.ok and found.parent_unchanged is False


def test_a_chain_that_was_grown_in_memory_says_how_it_is_made_anew(once, tmp_path):
    child = grow(grow(AutoModelForCausalLM.from_pretrained(once / "parent"), depth=2), width=2)
    child.save_pretrained(tmp_path / "grown")
    with pytest.raises(WarmstartError, match="grown 2 times in memory"):
        verify(tmp_path / "grown", once / "parent")


def test_a_class_that_is_grown_in_memory_says_how_it_is_compared(once, monkeypatch):
    def untraceable(*args):
        raise UntraceableError("Why not.")

    monkeypatch.setattr(module, "file_view", untraceable)
    with pytest.raises(
        UntraceableError, match="Why not. Grow it again .hf-warmstart grow .*/parent NEW --record .*/grown"
    ):
        verify(once / "grown", once / "parent")


def test_a_fault_does_not_wait_for_the_parents_digest(once, monkeypatch):
    told = []

    class Slow:
        def update(self, data):
            told.append(len(data))
            time.sleep(0.2)

    def fault(done, total):
        raise KeyboardInterrupt

    with SafetensorsSource(once / "parent") as source:
        specs = source.specs
    monkeypatch.setattr(stream, "hashlib", SimpleNamespace(sha256=Slow))
    with pytest.raises(KeyboardInterrupt):
        verify(once / "grown", once / "parent", blocks=None, progress=fault)
    assert 0 < len(told) < 2 * len(specs)


def test_another_version_is_named_where_something_differs(once, grown):
    flip(grown, UP)
    (record,) = json.loads((grown / "config.json").read_text())["warmstart"]
    change_config(grown, warmstart=[record | {"library_version": "0.0.9"}])
    assert verify(grown, once / "parent").reason.endswith("(grown by version 0.0.9)")
