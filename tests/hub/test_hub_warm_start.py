"""A parent's checkpoint on the Hub: pushed by a stock `Trainer`, loaded, grown and warm-started on another cache."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from hf_warmstart import (
    GrowthRecord,
    WarmstartError,
    WarmstartTrainer,
    WarmstartTrainingArguments,
    grow,
    grow_checkpoint,
)
from hf_warmstart.checkpoints.fetch import training_state_folder
from hf_warmstart.errors import StateError

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
