"""A token is planted wherever one can stand, and everything that is printed, written or sent is searched for it."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import traceback
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments, default_data_collator
from transformers.trainer import TRAINING_ARGS_NAME

from hf_warmstart import (
    GrowthRecord,
    HparamPredictor,
    SelectionReport,
    WarmstartError,
    WarmstartTrainer,
    WarmstartTrainingArguments,
    grow,
    grow_checkpoint,
    push_to_hub,
)
from hf_warmstart.cli import main
from hf_warmstart.errors import HubError
from hf_warmstart.redaction import HIDDEN, UnsavedToken, redact, token_places

from ..models import some_tokens
from .minihub import MiniHub

TOKEN = "hf_" + "PlantedToken" * 3
OPTIONS = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
OPTIONS |= {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2}


@pytest.fixture
def hub(use_hub, monkeypatch) -> MiniHub:
    """A Hub that asks for the planted token, and repeats it in its own messages."""
    with MiniHub() as server:
        server.token = TOKEN
        yield use_hub(server)


@pytest.fixture(autouse=True)
def _certified(monkeypatch, certificate):
    for module in ("hf_warmstart.hub.save", "hf_warmstart.hub.card", "hf_warmstart.checkpoints.weights.whole"):
        monkeypatch.setattr(f"{module}.certify_record", lambda config: certificate)


def holders(hub: MiniHub, folder: Path) -> list[str]:
    """Where the token stands: files on the Hub (any commit), large files, and files on the disk."""
    found = [f"{repo}/{path}" for repo in hub.repos for branch in hub.repos[repo].branches.values() for commit in branch
             for path, content in commit.files.items() if TOKEN.encode() in content]  # fmt: skip
    found += [oid for oid, content in hub.large.items() if TOKEN.encode() in content]
    return found + [str(path) for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
@pytest.mark.parametrize("arguments_class", [TrainingArguments, WarmstartTrainingArguments])
def test_what_a_trainer_saves_and_pushes_holds_no_token(arguments_class, hub, grown, tmp_path, capfd, caplog):
    # The token is passed, and no other is there: a push that comes through used it.
    rows = [{"input_ids": ids, "labels": ids} for ids in some_tokens(4, 8).tolist()]
    own = {"push_to_hub": True, "hub_model_id": "user/run", "hub_strategy": "all_checkpoints", "hub_always_push": True}
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.DEBUG):
        patch.delenv("HF_TOKEN")
        patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        arguments = arguments_class(str(tmp_path / "run"), hub_token=TOKEN, **own, **OPTIONS)
        trainer = WarmstartTrainer(copy.deepcopy(grown), arguments, default_data_collator, rows)
        trainer.train()
        trainer.push_to_hub()
    files = hub.repos["user/run"].find("main").files
    assert {TRAINING_ARGS_NAME, f"checkpoint-2/{TRAINING_ARGS_NAME}", "checkpoint-1/optimizer.pt", "README.md"} <= set(
        files
    )
    assert holders(hub, tmp_path) == []
    assert trainer.args.hub_token == TOKEN, "the trainer lost it"
    saved = torch.load(tmp_path / "run" / TRAINING_ARGS_NAME, weights_only=False)
    assert saved.hub_token is None and saved.hub_model_id == "user/run"
    out, err = capfd.readouterr()
    assert TOKEN not in out + err + caplog.text


def test_what_is_pushed_otherwise_holds_no_token(hub, parent, tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.setattr(SelectionReport, "plot", lambda self, path: path.write_bytes(b"png"))
    from ..scaling.planted import Planted
    from .test_hub_reports import small_report

    with caplog.at_level(logging.DEBUG):
        parent.push_to_hub("org/tiny", token=TOKEN)
        made = grow(parent, width=1.5)
        push_to_hub(made, "user/big", token=TOKEN)
        made.push_to_hub("user/plain", token=TOKEN)
        HparamPredictor.fit(Planted().runs(), draws=20).push_to_hub("user/law", token=TOKEN)
        small_report().push_to_hub("user/choice", token=TOKEN)
        record = grow_checkpoint("org/tiny", tmp_path / "grown", width=2, threads=1)
        assert main(["push", str(tmp_path / "grown"), "user/folder", "--debug"]) == 0
        assert main(["verify", str(tmp_path / "grown"), "--parent", "org/tiny", "--blocks", "1"]) == 0
    assert len(hub.repos) == 6 and record.revision == hub.commits("org/tiny")[-1].oid
    assert holders(hub, tmp_path) == [] and not hub.leaked
    assert TOKEN not in json.dumps(GrowthRecord.all_of(made.config)[0].to_dict())
    out, err = capfd.readouterr()
    assert TOKEN not in out + err + caplog.text


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_no_message_holds_a_token_whatever_the_hub_or_the_user_says(hub, grown, tmp_path, capfd, caplog, debug):
    from hf_warmstart.hub import save_grown

    folder = str(save_grown(grown, tmp_path / "grown"))
    echo = f"Your token {TOKEN} is refused; see https://x:{TOKEN}@host/y?Signature=abc"
    address = f"https://user:{TOKEN}@huggingface.co/org/model"
    with caplog.at_level(logging.INFO):
        for method, path in [("POST", "/repos/create"), ("POST", "/commit/"), ("GET", "^/api/models/")]:
            hub.fail(method, path, status=403, message=echo)
            assert main(["push", folder, "user/big", *debug]) in (0, 2)
        hub.fail("GET", "^/api/models/", times=10**6, status=403, message=echo)
        hub.fail("HEAD", "/resolve/", times=10**6, status=403, message=echo)
        for command in (
            ["push", folder, address],
            ["grow", "org/tiny", str(tmp_path / "out"), "--width", "2"],
            ["grow", address, str(tmp_path / "out"), "--width", "2"],
            ["grow", "org/tiny", str(tmp_path / "out"), "--width", "2", "--low-disk"],
            ["verify", "org/tiny"],
            ["plan", address, "--width", "2"],
            ["plan", folder, "--set", f"hiden_size={TOKEN}"],
            ["recommend", "--law", address, "--tokens", "1B", "--params", "1B"],
        ):
            assert main([*command, *debug]) == 2, command
    out, err = capfd.readouterr()
    assert TOKEN not in out + err + caplog.text and "Signature=abc" not in err
    assert HIDDEN in err and ("Traceback" in err) is bool(debug)


def test_errors_of_the_library_itself_hold_no_token(hub, grown, tmp_path):
    echo = f"Your token {TOKEN} is refused; see https://host/y?Signature=abc"
    for path, status in [
        ("/repos/create", 401), ("/preupload/", 404), ("/commit/", 403), ("/commit/", 409),
        ("/api/validate-yaml", 400),  # which the client raises as a ValueError, without the number
    ]:  # fmt: skip
        hub.fail("POST", path, status=status, message=echo)
        with pytest.raises(HubError, match="Invalid metadata" if status == 400 else str(status)) as caught:
            push_to_hub(grown, "user/big", token=TOKEN)
        shown = "".join(traceback.format_exception(caught.value))
        assert TOKEN not in shown and "Signature=abc" not in shown and HIDDEN in shown
    hub.fail("GET", "^/api/models/", times=10**6, status=403, message=echo)
    hub.fail("HEAD", "/resolve/", times=10**6, status=403, message=echo)
    for call in (
        lambda: grow_checkpoint("org/tiny", tmp_path / "out", width=2),
        lambda: grow_checkpoint("org/tiny", tmp_path / "out", width=2, low_disk=True),
        lambda: HparamPredictor.from_pretrained("org/tiny"),
        lambda: SelectionReport.from_pretrained("org/tiny"),
        lambda: WarmstartTrainer(warmstart_from="org/tiny"),
    ):
        with pytest.raises(WarmstartError) as caught:
            call()
        assert "org/tiny" in str(caught.value)
        assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_words_are_redacted_by_form_and_by_what_is_in_use(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-no-form")
    words = f"{TOKEN} api_org_{'a' * 30} a-token-of-no-form https://me:pass@host/f?X-Amz-Signature=1&b=2 hf_warmstart"
    assert redact(words) == f"{HIDDEN} {HIDDEN} {HIDDEN} https://host/f hf_warmstart"
    assert redact(ValueError(TOKEN)) == HIDDEN
    monkeypatch.setenv("HF_TOKEN", "short")
    assert redact("a short word") == "a short word"


def test_places_of_tokens_in_plain_data_are_named():
    data = {
        "a": [{"hub_token": "x"}, TOKEN],
        "tokens": 5,
        "tokenizer": "t",
        "b": {"note": f"use {TOKEN}"},
        "token": None,
    }
    assert token_places(data) == ["a[0].hub_token", "a[1]", "b.note"]


def test_an_unsaved_token_is_one_and_is_not_saved():
    token = UnsavedToken(TOKEN)
    assert token == TOKEN and f"{token}" == TOKEN and TOKEN not in repr(token)
    assert pickle.loads(pickle.dumps(token)) is None and TOKEN.encode() not in pickle.dumps({"a": token})
    assert copy.deepcopy({"a": token})["a"] == copy.copy(token) == TOKEN
