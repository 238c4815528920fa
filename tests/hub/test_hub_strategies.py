"""Each `hub_strategy` pushes what the stock `Trainer` pushes, and a pushed checkpoint is whole."""

from __future__ import annotations

import copy

import pytest
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_warmstart import WarmstartTrainer, WarmstartTrainingArguments
from hf_warmstart.checkpoints.state.parent_state import OWN_STATE
from hf_warmstart.checkpoints.target.complete import STAGING

from ..models import some_tokens

OPTIONS = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
OPTIONS |= {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
@pytest.mark.parametrize("strategy", ["all_checkpoints", "checkpoint", "every_save", "end"])
def test_a_strategy_pushes_the_stock_trainers_files(strategy, grown, hub, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in some_tokens(8, 8).tolist()]
    for repo, trainer_class, arguments_class in (
        ("stock", Trainer, TrainingArguments),
        ("ours", WarmstartTrainer, WarmstartTrainingArguments),
    ):
        arguments = arguments_class(
            str(tmp_path / repo),
            push_to_hub=True,
            hub_model_id=f"user/{repo}",
            hub_strategy=strategy,
            hub_always_push=True,
            **OPTIONS,
        )
        trainer = trainer_class(copy.deepcopy(grown), arguments, default_data_collator, rows)
        trainer.train()
        left = tmp_path / repo / STAGING / "checkpoint-9" / "model.safetensors"
        left.parent.mkdir(parents=True)
        left.touch()  # by a process that was killed
        trainer.push_to_hub()
    stock, ours = (hub.repos[f"user/{repo}"].find("main").files for repo in ("stock", "ours"))
    assert {name for name in ours if not name.endswith(OWN_STATE)} == {*stock}
    assert not any("checkpoint-9" in name for name in ours)
    assert ours["model.safetensors"] == stock["model.safetensors"]
    if strategy in ("all_checkpoints", "checkpoint"):
        folder = "checkpoint-4" if strategy == "all_checkpoints" else "last-checkpoint"
        assert {name for name in ours if name.startswith(folder)} >= {
            f"{folder}/{name}" for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", OWN_STATE)
        }
        for name in ("model.safetensors", "scheduler.pt"):
            assert ours[f"{folder}/{name}"] == stock[f"{folder}/{name}"]
