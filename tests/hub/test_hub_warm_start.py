"""A parent's checkpoint on the Hub: pushed by a stock `Trainer`, loaded, grown and warm-started on another cache."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from hf_warmstart import (
    Certificate,
    GrowthRecord,
    WarmstartError,
    WarmstartTrainer,
    WarmstartTrainingArguments,
    grow,
    grow_checkpoint,
)
from hf_warmstart.checkpoints.fetch import training_state_folder
from hf_warmstart.checkpoints.records import last_record
from hf_warmstart.checkpoints.verify import verify
from hf_warmstart.checkpoints.weights.whole import StreamedWeights
from hf_warmstart.cli import main
from hf_warmstart.errors import StateError, UntraceableError

from ..models import some_tokens
from .minihub import MiniHub

OPTIONS = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
OPTIONS |= {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
REPO = "user/base"


def rows():
    return [{"input_ids": ids, "labels": ids} for ids in some_tokens(8, 8).tolist()]


@pytest.fixture
def base(use_hub, parent, tmp_path):
    """A Hub with a parent's run on it, weights by Git LFS, and where the run lies."""
    with MiniHub(lfs=True) as server:
        use_hub(server, "absent")
        push = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": "all_checkpoints", "hub_always_push": True}
        arguments = TrainingArguments(str(tmp_path / "run"), **push, **OPTIONS)
        trainer = Trainer(copy.deepcopy(parent), arguments, default_data_collator, rows())
        trainer.train()
        trainer.push_to_hub()
        yield use_hub(server, "absent", cache="another"), tmp_path / "run"


def warm(model, output, **options):
    """The grown model's run after one step: the loss, and the optimizer's first moments."""
    trainer = WarmstartTrainer(
        copy.deepcopy(model), WarmstartTrainingArguments(str(output), **{**OPTIONS, "max_steps": 1, "save_strategy": "no"}),
        default_data_collator, rows(), **options,
    )  # fmt: skip
    trainer.train()
    moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    return trainer.state.log_history[-1]["train_loss"], moments, trainer.parent_state.step


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars", "ignore:Use 'content=<...>':DeprecationWarning")
def test_a_warm_start_from_a_subfolder_of_a_revision_is_that_from_the_folder(base, use_hub, tmp_path):
    hub, run = base
    old = hub.commits(REPO)[-1].oid
    model = AutoModelForCausalLM.from_pretrained(REPO, subfolder="checkpoint-4", revision=old)
    child = grow(model, width=2)
    assert (record := GrowthRecord.all_of(child.config)[-1]).parent == REPO and record.revision == old
    # The parent moves on: what the revision names stays.
    hub.add(REPO, {f"checkpoint-4/{name}": b"spoiled" for name in ("optimizer.pt", "scheduler.pt")})
    hub.served.clear()
    use_hub(hub, "absent", cache="third")  # nothing of it was fetched yet
    remote = warm(
        child, tmp_path / "a", warmstart_from=REPO, warmstart_revision=old, warmstart_subfolder="checkpoint-4"
    )
    local = warm(child, tmp_path / "b", warmstart_from=run / "checkpoint-4")
    assert remote[0] == local[0] and remote[2] == local[2] == 4
    assert len(remote[1]) > 5 and all(torch.equal(a, b) for a, b in zip(remote[1], local[1], strict=True))
    fetched = {path.rpartition("/")[2] for path, _ in hub.served}
    assert "optimizer.pt" in fetched and not {"model.safetensors", "training_args.bin"} & fetched
    assert warm(child, tmp_path / "c", warmstart_from=run, warmstart_subfolder="checkpoint-4")[0] == local[0]
    # The whole repository grows from files to files, and the record keeps its commit.
    grown = grow_checkpoint(REPO, tmp_path / "grown", revision=old, width=2, threads=1)
    assert (grown.parent, grown.revision) == (REPO, old)
    # What has no training state says where there is some.
    with pytest.raises(StateError, match=r"holds no training state.*\['checkpoint-2', 'checkpoint-4'\]"):
        training_state_folder(REPO, old)
    with pytest.raises(StateError, match=r"'checkpoint-9' of 'user/base' holds no training state"):
        training_state_folder(REPO, old, "checkpoint-9")
    with pytest.raises(StateError, match="Revision Not Found|404"):
        training_state_folder(REPO, "v9")
    with pytest.raises(StateError, match="has no subfolder 'checkpoint-9'"):
        training_state_folder(run, subfolder="checkpoint-9")
    with pytest.raises(StateError, match="is of a Hub id"):
        training_state_folder(run, "v1")
    with pytest.raises(WarmstartError, match="are of warmstart_from"):
        WarmstartTrainer(warmstart_subfolder="checkpoint-4")


GROWN_BYTES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")


def contents(folder):
    return {name: (folder / name).read_bytes() for name in GROWN_BYTES}


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars", "ignore:Use 'content=<...>':DeprecationWarning")
def test_a_checkpoint_grows_straight_from_its_subfolder_and_again_from_its_record(
    base, use_hub, tmp_path, monkeypatch, capsys
):
    certificate = Certificate(True, 0.0, 0.0, [], {}, True, "")
    monkeypatch.setattr("hf_warmstart.checkpoints.weights.whole.certify_record", lambda config: certificate)
    hub, run = base
    old = hub.commits(REPO)[-1].oid
    hub.add(
        REPO, {f"checkpoint-4/{name}": b"spoiled" for name in ("config.json", "model.safetensors", "optimizer.pt")}
    )
    options = {"width": 2, "seed": 3, "threads": 1}
    local = grow_checkpoint(run / "checkpoint-4", tmp_path / "local", **options)
    assert grow_checkpoint(run, tmp_path / "below", subfolder="checkpoint-4", **options) == local
    assert "subfolder" not in local.to_dict()
    for cache, low_disk in (("second", False), ("third", True)):
        use_hub(hub, "absent", cache=cache)
        hub.served.clear()
        grown, where = tmp_path / f"grown-{cache}", {"subfolder": "checkpoint-4/", "revision": old}
        record = grow_checkpoint(REPO, grown, low_disk=low_disk, **where, **options)
        assert (record.parent, record.revision, record.subfolder) == (REPO, old, "checkpoint-4")
        assert last_record(grown) == record
        assert contents(grown) == contents(tmp_path / "below") == contents(tmp_path / "local")
        fetched = {path for path, _ in hub.served}
        assert all(path.startswith("checkpoint-4/") for path in fetched)
        assert "checkpoint-4/optimizer.pt" in fetched and "checkpoint-4/training_args.bin" not in fetched
        card = " ".join((grown / "README.md").read_text().split())
        assert f"--revision {old} --subfolder checkpoint-4 --record" in card
        assert f"revision='{old}', subfolder='checkpoint-4')" in card
        assert not list(tmp_path.glob(".*"))
    # The record alone says where the parent lies; of a folder, whether it is given itself or the one above.
    use_hub(hub, "absent", cache="fourth")
    hub.served.clear()
    assert verify(grown, blocks=None).ok
    assert "checkpoint-4/optimizer.pt" not in {path for path, _ in hub.served}
    assert verify(grown, run).ok and verify(grown, run / "checkpoint-4").ok
    assert (
        main(["grow", REPO, str(tmp_path / "again"), "--revision", old, "--record", str(grown), "--threads", "1"]) == 0
    )
    assert "have the sha256" in capsys.readouterr().out
    assert main(["grow", str(run), str(tmp_path / "and"), "--record", str(grown), "--threads", "1"]) == 0
    assert contents(tmp_path / "and") == contents(grown)
    assert not verify(grown, run / "checkpoint-2").ok

    # In memory, where it has to be.
    def untraceable(*arguments):
        raise UntraceableError("because the test says so")

    monkeypatch.setattr(StreamedWeights, "open", untraceable)
    record = grow_checkpoint(REPO, tmp_path / "loaded", **where, **options)
    assert (record.parent, record.revision, record.subfolder) == (REPO, old, "checkpoint-4")
    assert last_record(tmp_path / "loaded") == record


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars", "ignore:Use 'content=<...>':DeprecationWarning")
def test_a_subfolder_that_is_not_there_is_told_with_those_that_are(base, tmp_path):
    _, run = base
    for low_disk in (False, True):
        with pytest.raises(
            WarmstartError, match=r"'checkpoint-9' of 'user/base' holds neither .*\['checkpoint-2', 'che"
        ):
            grow_checkpoint(REPO, tmp_path / "grown", subfolder="checkpoint-9", low_disk=low_disk, width=2)
        with pytest.raises(WarmstartError, match="must lie inside"):
            grow_checkpoint(REPO, tmp_path / "grown", subfolder="../checkpoint-4", low_disk=low_disk, width=2)
    with pytest.raises(WarmstartError, match="has no subfolder 'checkpoint-9'"):
        grow_checkpoint(run, tmp_path / "grown", subfolder="checkpoint-9", width=2)
    assert not (tmp_path / "grown").exists()
