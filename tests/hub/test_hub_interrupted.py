"""Uploads that break on the way: what is repeated does no damage, and nothing is half there."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

from hf_warmstart import push_to_hub
from hf_warmstart.errors import CheckpointError, HubError, WarmstartError
from hf_warmstart.hub.commit import commit_folder

from .minihub import MiniHub
from .test_hub_push import FILES, logits

# huggingface_hub 2.4 uploads LFS files with an argument that its own HTTP client calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
REPO = "user/big"


@pytest.fixture
def large(use_hub):
    """A Hub that takes weights by Git LFS, for a client without `hf_xet`."""
    with MiniHub(lfs=True) as server:
        yield use_hub(server, "absent")


def puts(hub: MiniHub) -> int:
    return sum(method == "PUT" for method, _ in hub.requests)


@pytest.mark.parametrize("cut", ["body", "answer"])
def test_an_upload_that_is_cut_once_is_repeated_by_the_client(cut, large, grown, certificate):
    large.fail("PUT", "^/lfs/", cut=cut)
    push_to_hub(grown, REPO, certificate=certificate)
    (commit,) = large.commits(REPO)
    assert commit.changed == FILES
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(REPO)), logits(grown))


def test_an_upload_that_breaks_leaves_nothing_and_the_next_one_sends_what_is_missing(large, grown, certificate):
    # Two files of weights: one arrives, the other does not, however often the client tries.
    options = {"certificate": certificate, "max_shard_size": "100KB"}
    fault = large.fail("PUT", "^/lfs/", times=10**6, cut="body")
    with pytest.raises(HubError, match="connection to the Hub broke.*Run the same again"):
        push_to_hub(grown, REPO, **options)
    assert large.commits(REPO) == [] and large.large == {}
    fault.times = 0
    large.fail("POST", "/commit/main$", cut="body")
    with pytest.raises(HubError, match="connection to the Hub broke"):
        push_to_hub(grown, REPO, **options)
    assert large.commits(REPO) == [] and len(large.large) > 1
    sent = puts(large)
    push_to_hub(grown, REPO, **options)
    assert puts(large) == sent, "what had arrived was sent again"
    (commit,) = large.commits(REPO)
    assert {"README.md", "growth.json", "model.safetensors.index.json"} < set(commit.changed)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(REPO)), logits(grown))


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, grown, certificate):
    hub.fail("POST", "/commit/main$", cut="answer")
    with pytest.raises(HubError, match="connection"):
        push_to_hub(grown, REPO, certificate=certificate)
    (made,) = hub.commits(REPO)
    again = push_to_hub(grown, REPO, certificate=certificate)
    assert hub.commits(REPO) == [made] and again.oid == made.oid


def test_an_overloaded_hub_is_asked_again_and_a_slow_one_waited_for(large, grown, certificate):
    large.fail("POST", "/preupload/", status=503, message="busy")
    large.fail("POST", "/commit/", seconds=0.3)
    push_to_hub(grown, REPO, certificate=certificate)
    assert len(large.commits(REPO)) == 1


def test_large_files_go_in_parts_where_the_hub_wants_it(large, grown, certificate):
    large.part_bytes = 20_000
    large.fail("PUT", "^/lfs-part/", cut="body")
    push_to_hub(grown, REPO, certificate=certificate)
    assert len(large.parts) > 2 and not large.leaked
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(REPO)), logits(grown))


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "^/api/repos/create$", 401, "token is missing or not known. Log in with `hf auth login`"),
        ("POST", "/commit/", 403, "token may not write there"),
        ("POST", "/preupload/", 404, "no such repository or revision"),
        ("POST", "/commit/", 409, "something else changed it meanwhile"),
        ("POST", "/commit/", 412, "something else changed it meanwhile"),
        ("POST", "/commit/", 422, "run the same again later"),
    ],
)
def test_a_refusal_is_said_with_what_to_do(hub, grown, certificate, method, path, status, words):
    hub.fail(method, path, status=status, message="The Hub's own words.")
    with pytest.raises(HubError, match="refused the push to 'user/big'") as caught:
        push_to_hub(grown, REPO, certificate=certificate)
    assert f"({status})" in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)
    assert hub.commits(REPO) == []


def test_tokens_that_may_only_read_or_are_unknown_are_refused_by_the_hub_itself(hub, grown, certificate):
    hub.readers.add("hf_reads")
    for token, status in [("hf_reads", 403), ("hf_nobody", 401)]:
        with pytest.raises(HubError, match=rf"\({status}\): the token .*Log in with `hf auth login`") as caught:
            push_to_hub(grown, REPO, certificate=certificate, token=token)
        assert caught.value.__cause__.response.status_code == status
    assert HfApi().whoami()["name"] == "user" and hub.repos == {}


def test_a_private_push_to_a_public_repository_sends_nothing(hub, grown, certificate):
    hub.create(REPO)
    with pytest.raises(WarmstartError, match="exists and is public. Nothing was sent"):
        push_to_hub(grown, REPO, certificate=certificate, private=True)
    assert hub.commits(REPO) == []
    hub.create("user/hidden", private=True)
    push_to_hub(grown, "user/hidden", certificate=certificate, private=True)
    assert len(hub.commits("user/hidden")) == 1


def test_a_download_that_breaks_is_taken_up_where_it_was(large, grown, certificate):
    push_to_hub(grown, REPO, certificate=certificate)
    large.broken.add("model.safetensors")

    def mend(path: str, nbytes: int) -> None:
        if len([name for name, _ in large.served if name == path]) == 2:
            large.broken.clear()

    large.on_serve = mend
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(REPO)), logits(grown))


def test_what_was_never_sent_is_no_broken_connection(hub, grown, certificate, monkeypatch, tmp_path):
    with pytest.raises(WarmstartError, match="'no id' is no id of a repository"):
        push_to_hub(grown, "no id", certificate=certificate)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(HubError, match="Nothing was pushed .* token is missing"):
        push_to_hub(grown, REPO, certificate=certificate, token=True)
    assert {method for method, _ in hub.requests} <= {"HEAD", "GET"}  # the parent's licence was asked for
    monkeypatch.setenv("HF_TOKEN", hub.token)
    with pytest.raises(CheckpointError, match=r"has no files \['gone.txt'\].*Nothing was sent"):
        commit_folder(tmp_path, REPO, commit_message="", files=["gone.txt"])
