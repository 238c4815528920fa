"""A Hub id as the source of a growth: through the cache, or file by file with little disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, file_download
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_warmstart import Certificate, WarmstartError, grow_checkpoint
from hf_warmstart.checkpoints.fetch import local_folder
from hf_warmstart.checkpoints.grow_checkpoint import prepare_growth
from hf_warmstart.checkpoints.low_disk import HubRepository, HubShards
from hf_warmstart.checkpoints.safetensors.source import SafetensorsSource
from hf_warmstart.checkpoints.target.staging import Staging
from hf_warmstart.cli import main
from hf_warmstart.errors import CheckpointError

from ..hub.minihub import MiniHub
from ..models import tiny_model
from .folders import bytes_of

REPO = "org/tiny"
GROWTH = {"width": 2, "seed": 3, "max_shard_size": "80KB", "threads": 1}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """Two trained states of one model, in six files each, with a tokenizer."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("parents") / str(seed)
        model = tiny_model("llama", seed, num_hidden_layers=6, hidden_size=32, head_dim=8, intermediate_size=48)
        model.save_pretrained(folder, max_shard_size="40KB")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=_tokenizer())
        tokenizer.save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]


def _tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))


@pytest.fixture
def hub(use_hub, models, monkeypatch) -> Iterator[MiniHub]:
    """A Hub that holds the two states as two commits, weights by Git LFS."""
    with MiniHub(lfs=True) as server:
        old, _ = (server.add(REPO, bytes_of(folder)) for folder in models)
        server.repos[REPO].tags["v1"] = old.oid
        server.repos[REPO].branches["old"] = server.repos[REPO].branches["main"][:2]
        monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
        yield use_hub(server)


@pytest.fixture(autouse=True)
def _certified(monkeypatch):
    """A certificate takes longer than the growth here, and is not what is tested."""
    certificate = Certificate(True, 0.0, 0.0, [], {}, True, "")
    monkeypatch.setattr("hf_warmstart.checkpoints.weights.whole.certify_record", lambda config: certificate)


@pytest.fixture(scope="module")
def local(models, tmp_path_factory) -> list[Path]:
    """What the two states' folders grow into."""
    made = tmp_path_factory.mktemp("local")
    for k, folder in enumerate(models):
        grow_checkpoint(folder, made / str(k), **GROWTH)
    return [made / str(k) for k in range(2)]


def weights_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in bytes_of(folder).items() if "safetensors" in name}


def whole_files(hub: MiniHub) -> list[str]:
    """Files of weights that were served whole, in order."""
    return [path for path, _ in hub.served if path.endswith(".safetensors")]


# -- through the cache ------------------------------------------------------------------------------------------------


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    old, new = (commit.oid for commit in hub.commits(REPO))
    for revision, commit in [(None, new), ("main", new), ("old", old), ("v1", old), (old, old)]:
        assert local_folder(REPO, revision).name == commit
        assert HubRepository.find(REPO, revision).commit == commit


def test_a_hub_id_grows_as_its_folder_does_and_the_record_keeps_the_commit(hub, local, tmp_path):
    record = grow_checkpoint(REPO, tmp_path / "grown", revision="v1", **GROWTH)
    assert weights_of(tmp_path / "grown") == weights_of(local[0]) != weights_of(local[1])
    assert (record.parent, record.revision) == (REPO, hub.commits(REPO)[0].oid)
    assert AutoTokenizer.from_pretrained(tmp_path / "grown").get_vocab() == {"a": 0, "b": 1}
    assert not hub.leaked


def test_what_training_left_in_a_repository_is_not_fetched(hub, tmp_path):
    left = ("trainer_state.json", "optimizer.pt", "random_states_0.pkl", "checkpoint-5/model.safetensors")
    hub.add(REPO, dict.fromkeys(left, b"{}"))
    growth = prepare_growth(REPO, tmp_path / "grown", **GROWTH)
    growth.close()
    assert growth.training is None
    assert not {path for path, _ in hub.served}.intersection(left)


@pytest.mark.parametrize("low_disk", [False, True])
def test_what_the_hub_does_not_give_is_said_without_the_token(hub, tmp_path, monkeypatch, low_disk):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    hub.add("org/private", {"config.json": b"{}"}, private=True)
    hub.add("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b""})
    for repo, revision, words in [
        ("org/private", None, "private or gated"),
        ("org/none", None, "404"),
        (REPO, "v9", "Revision Not Found"),
        ("no id", None, "no folder, and the Hub does not give it"),
        ("org/pickled", None, "neither model.safetensors nor"),
    ]:
        with pytest.raises(WarmstartError, match=words) as caught:
            grow_checkpoint(repo, tmp_path / "grown", revision=revision, low_disk=low_disk, width=2)
        assert repo in str(caught.value)
        assert "hf_wrong" not in str(caught.value)
    assert not any(tmp_path.glob("*grown*"))


def test_a_private_repository_is_read_with_its_token(hub, models, tmp_path):
    hub.add("org/private", bytes_of(models[0]), private=True)
    with HubShards(HubRepository.find("org/private"), tmp_path / "store") as remote:
        name = next(iter(remote.tensors))
        with SafetensorsSource(local_folder("org/private")) as here:
            assert torch.equal(remote.read_rows(name), here.read_rows(name))
    assert not hub.leaked


def test_a_broken_connection_is_said_and_the_next_run_fetches_the_rest(hub, tmp_path):
    hub.broken.add("model-00006-of-00006.safetensors")
    with pytest.raises(CheckpointError, match="connection to the Hub broke"):
        grow_checkpoint(REPO, tmp_path / "grown", **GROWTH)
    assert not any(tmp_path.glob("*grown*"))
    hub.broken.clear()
    hub.served.clear()
    assert (local_folder(REPO) / "model-00006-of-00006.safetensors").is_file()
    assert whole_files(hub) == ["model-00006-of-00006.safetensors"]


def test_a_signed_address_stays_out_of_messages(hub, tmp_path):
    hub.forbidden = True
    with pytest.raises(WarmstartError) as caught:
        grow_checkpoint(REPO, tmp_path / "grown", **GROWTH)
    assert "403" in str(caught.value)
    assert "second-host" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_what_is_cached_is_grown_offline(hub, local, tmp_path, monkeypatch):
    commit = local_folder(REPO).name
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    record = grow_checkpoint(REPO, tmp_path / "offline", **GROWTH)
    assert weights_of(tmp_path / "offline") == weights_of(local[1])
    assert record.revision == commit
    assert not hub.requests
    with pytest.raises(WarmstartError, match=r"(?i)offline"):
        grow_checkpoint(REPO, tmp_path / "low", low_disk=True, **GROWTH)
    with pytest.raises(WarmstartError, match=r"(?i)offline|outgoing traffic"):
        grow_checkpoint("org/other", tmp_path / "other", **GROWTH)


# -- with little disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("growth", "at_most", "fetches"),
    [
        ({}, 3, 6),
        ({"depth": 2, "depth_operator": "stack"}, 4, 12),
        pytest.param({"depth": 2}, 3, 6, marks=pytest.mark.slow),
        pytest.param({"threads": 2, "max_shard_size": "30KB"}, 3, 6, marks=pytest.mark.slow),
    ],
)
def test_low_disk_gives_the_same_bytes_and_keeps_few_files(hub, models, local, tmp_path, growth, at_most, fetches):
    store = tmp_path / ".grown.fetched"
    growth = {**GROWTH, **growth}
    seen = []

    def there(path: str, nbytes: int) -> None:
        if path in whole:
            lying = [file for pattern in ("*.safetensors", "*.incomplete") for file in store.rglob(pattern)]
            seen.append(nbytes + sum(file.stat().st_size for file in lying))

    whole = {name: len(content) for name, content in hub.commits(REPO)[1].files.items() if name.endswith("tensors")}
    prepared = prepare_growth(REPO, tmp_path / "grown", low_disk=True, **growth)
    traffic, at_once = prepared.fetched_bytes
    hub.on_serve = there
    hub.served.clear()
    record = prepared.run()
    prepared.close()
    if growth == GROWTH:
        by_folder = local[1]
    else:
        grow_checkpoint(models[1], by_folder := tmp_path / "local", **growth)
    assert weights_of(tmp_path / "grown") == weights_of(by_folder)
    assert len(whole_files(hub)) == fetches
    assert traffic == sum(whole[name] for name in whole_files(hub))
    assert max(seen) <= at_once <= at_most * max(whole.values()) < sum(whole.values())
    assert not any(tmp_path.glob(".grown*"))
    assert not any(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    assert not hub.leaked
    # The commit says which parent it was.
    assert (record.parent, record.revision, record.parent_digest) == (REPO, hub.commits(REPO)[1].oid, None)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "grown", by_folder)]
    for config in configs:
        config["warmstart"][-1] |= {"parent": None, "revision": None, "parent_digest": None}
    assert configs[0] == configs[1]


def test_output_that_is_finished_is_not_fetched_for_again_after_a_broken_connection(hub, local, tmp_path):
    store = tmp_path / ".grown.fetched"
    hub.broken.add("model-00005-of-00006.safetensors")
    with pytest.raises(CheckpointError, match="connection to the Hub broke"):
        grow_checkpoint(REPO, tmp_path / "grown", low_disk=True, **GROWTH)
    assert any((tmp_path / ".grown.growing").glob("*.safetensors"))
    assert not (tmp_path / "grown").exists()
    assert not store.exists()
    # What a killed run left would be in the way.
    store.mkdir()
    (store / "model-00005-of-00006.safetensors").write_bytes(b"half a file")
    hub.broken.clear()
    hub.served.clear()
    grow_checkpoint(REPO, tmp_path / "grown", low_disk=True, **GROWTH)
    assert weights_of(tmp_path / "grown") == weights_of(local[1])
    assert "model-00005-of-00006.safetensors" in whole_files(hub)
    assert "model-00001-of-00006.safetensors" not in whole_files(hub)
    assert not any(tmp_path.glob(".grown*"))


def test_a_file_with_another_checksum_is_refused(hub, tmp_path):
    name = "model-00003-of-00006.safetensors"
    content = bytearray(hub.commits(REPO)[1].files[name])
    content[-1] ^= 1
    hub.swapped[name] = bytes(content)
    with HubShards(HubRepository.find(REPO), tmp_path / "store") as remote:
        tensor = next(tensor for tensor, place in remote.tensors.items() if place.file == name)
        with pytest.raises(CheckpointError, match=f"{name} .*another checksum"):
            remote.read_rows(tensor)
    assert whole_files(hub).count(name) == 2


def test_headers_are_checked_before_anything_is_fetched(hub, tmp_path):
    name = "model-00002-of-00006.safetensors"
    hub.swapped[name] = (10**9).to_bytes(8, "little") + hub.commits(REPO)[1].files[name][8:]
    with pytest.raises(CheckpointError, match=f"'{name}': a header of 1000000000 bytes"):
        HubShards(HubRepository.find(REPO), tmp_path / "store")
    assert not whole_files(hub)


def test_headers_are_those_of_the_files_however_long_they_are(hub, models, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_warmstart.checkpoints.low_disk.FIRST_BYTES", 9)
    with (
        HubShards(HubRepository.find(REPO), tmp_path / "store") as remote,
        SafetensorsSource(models[1]) as local,
    ):
        assert remote.tensors == local.tensors
        assert not whole_files(hub)
        name = next(iter(local.tensors))
        assert torch.equal(remote.read_rows(name, 1, 3), local.read_rows(name, 1, 3))
    assert not (tmp_path / "store").exists()


def test_a_file_without_the_header_that_was_read_is_refused(hub, tmp_path):
    with HubShards(HubRepository.find(REPO), tmp_path / "store") as remote:
        name = next(iter(remote.tensors))
        remote.repository.headers[remote.tensors[name].file] = b"{}"
        with pytest.raises(CheckpointError, match="another checksum"):
            remote.read_rows(name)


def test_a_fetched_file_that_changes_is_noticed(hub, tmp_path):
    def change(path: str, nbytes: int) -> None:
        if path == "model-00004-of-00006.safetensors":
            with (tmp_path / ".grown.fetched" / "model-00003-of-00006.safetensors").open("ab") as file:
                file.write(b"more")

    hub.on_serve = change
    with pytest.raises(CheckpointError, match=r"model-00003-of-00006.safetensors' changed while it was read"):
        grow_checkpoint(REPO, tmp_path / "grown", low_disk=True, **GROWTH)
    assert not (tmp_path / "grown").exists()


def test_a_run_that_finds_another_at_work_leaves_its_files_alone(hub, tmp_path):
    store = tmp_path / ".grown.fetched"
    store.mkdir()
    with Staging(tmp_path / "grown"), pytest.raises(CheckpointError, match="Another run is writing"):
        grow_checkpoint(REPO, tmp_path / "grown", low_disk=True, **GROWTH)
    assert store.exists()


def test_a_transfer_ends_when_nobody_waits_for_it(hub, tmp_path):
    stopped = Event()
    stopped.set()
    with HubShards(HubRepository.find(REPO), tmp_path / "store") as remote:
        file = remote.tensors[next(iter(remote.tensors))].file
        with pytest.raises(CheckpointError, match="stopped"):
            remote.repository.fetch(file, tmp_path / "store", stopped)


def test_small_files_are_checked_by_gits_own_sum(use_hub, models, tmp_path):
    with MiniHub(lfs=False) as server:
        use_hub(server)
        server.add(REPO, bytes_of(models[0]))
        with HubShards(HubRepository.find(REPO), tmp_path / "store") as remote, SafetensorsSource(models[0]) as here:
            first, *_, last = here.tensors
            assert torch.equal(remote.read_rows(first), here.read_rows(first))
            server.swapped[here.tensors[last].file] = models[1].joinpath(here.tensors[last].file).read_bytes()
            with pytest.raises(CheckpointError, match="another checksum"):
                remote.read_rows(last)


def test_room_and_traffic_follow_from_what_each_output_file_needs(hub, tmp_path):
    with HubShards(HubRepository.find(REPO), tmp_path / "store") as remote:
        sizes = {name: file.size for name, file in remote.repository.files.items()}
        a, b, c, *_ = sizes
        for needs, fetched in [([a, b, a], [a, b]), ([a, b, c, a], [a, b, c, a]), ([], [])]:
            each = [frozenset({name}) for name in needs]
            assert remote.traffic(each) == sum(sizes[name] for name in fetched)
            pairs = zip(needs, needs[1:], strict=False)
            assert remote.room(each) == max((sizes[one] + sizes[two] for one, two in pairs), default=0)


def test_room_is_asked_for_the_files_that_are_fetched(hub, tmp_path, monkeypatch):
    growth = prepare_growth(REPO, tmp_path / "grown", low_disk=True, **GROWTH)
    needed = growth.output_bytes + growth.fetched_bytes[1]
    hub.served.clear()
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=needed - 1, f_frsize=1))
    with pytest.raises(CheckpointError, match=f"takes {needed} more bytes"):
        growth.run()
    growth.close()
    assert not hub.served
    assert not any(tmp_path.glob("*grown*"))


def test_a_folder_has_its_files_already(models, tmp_path):
    with pytest.raises(WarmstartError, match=r"low_disk=True .* is a folder"):
        grow_checkpoint(models[0], tmp_path / "grown", low_disk=True, width=2)


def test_the_command_says_what_would_be_fetched(hub, tmp_path, capsys):
    command = ["grow", REPO, str(tmp_path / "grown"), "--width", "2", "--max-shard-size", "80KB", "--low-disk"]
    assert main([*command, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    weights = sum(len(c) for name, c in hub.commits(REPO)[1].files.items() if name.endswith(".safetensors"))
    assert said["fetched_bytes"] == weights
    assert 0 < said["fetched_bytes_at_once"] < weights
    assert not (tmp_path / "grown").exists()
