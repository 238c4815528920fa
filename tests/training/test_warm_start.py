"""`WarmstartTrainer` starts from the parent's state, through the stock Trainer's own files."""

from __future__ import annotations

import math
import shutil
import warnings

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_warmstart import WarmstartError, grow
from hf_warmstart.errors import StateError

from ..hub.card_rules import broken_rules
from ..models import tiny_model
from .conftest import blocks, losses, stock_trainer, train_base, warmstart_trainer

STEPS = 100


def _child_losses(base, folder, **options) -> list[float]:
    parent = AutoModelForCausalLM.from_pretrained(base)
    trainer = warmstart_trainer(
        grow(parent, width=2, width_operator="exact_copy"),
        folder,
        STEPS,
        blocks(20, STEPS),
        warmstart_from=base,
        parent_coordinates=True,
        **options,
    )
    with pytest.warns(UserWarning, match="exact_copy"):
        trainer.train()
    return losses(trainer)


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {})], ids=str
)
def test_100_steps_through_trainer_follow_the_parent_in_float32_and_only_with_its_state(family, changes, tmp_path):
    base = train_base(tmp_path / "base", family, **changes)
    child = _child_losses(base.checkpoint, tmp_path / "carried")
    worst = max(abs(a - b) for a, b in zip(base.later_losses, child, strict=True))
    assert worst < 1e-5
    child = _child_losses(base.checkpoint, tmp_path / "reset", state_policy="reset")
    worst = max(abs(a - b) for a, b in zip(base.later_losses, child, strict=True))
    assert worst > 1e-3


@pytest.mark.parametrize(
    ("family", "changes", "locked"),
    [
        ("gpt2", {}, True),  # its config names a dropout of a head that it does not have
        ("gpt2", {"resid_pdrop": 0.1}, False),
        ("llama", {}, True),
        ("llama", {"attention_dropout": 0.1}, False),
        ("opt", {"dropout": 0.1}, False),
    ],
)
def test_locked_copies_are_warned_of_unless_dropout_parts_them(family, changes, locked, tmp_path):
    child = grow(tiny_model(family, **changes), width=2, width_operator="exact_copy")
    trainer = warmstart_trainer(child, tmp_path, 1, blocks(0, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert any("exact_copy" in str(w.message) for w in caught) is locked


def test_the_carried_step_and_moments_arrive_in_the_optimizer(base, tmp_path):
    parent = AutoModelForCausalLM.from_pretrained(base)
    trainer = warmstart_trainer(
        grow(parent, width=2), tmp_path, 1, blocks(20, 1), warmstart_from=base, learning_rate=0.0
    )
    trainer.train()
    steps = {float(entry["step"]) for entry in trainer.optimizer.state.values()}
    assert steps == {21.0}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("continue", 20), ("rewind", 5), ("rewarm", 0)],
)
def test_schedule_policies_place_the_learning_rate(base, tmp_path, policy, expected):
    parent = AutoModelForCausalLM.from_pretrained(base)
    horizon = {"continue": 20 + 10, "rewind": 5 + 10, "rewarm": 10}[policy]
    trainer = warmstart_trainer(
        grow(parent, width=2), tmp_path, 10, blocks(20, 10), warmstart_from=base, schedule_policy=policy
    )
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]

    def cosine(step: int) -> float:
        if step < 5:
            return 3e-3 * step / 5
        return 3e-3 * 0.5 * (1 + math.cos(math.pi * (step - 5) / (horizon - 5)))

    assert rates == pytest.approx([cosine(expected + k) for k in range(10)], rel=1e-6, abs=1e-12)


def test_rewind_with_a_share_as_warm_up_starts_at_the_peak(base, tmp_path):
    parent = AutoModelForCausalLM.from_pretrained(base)
    trainer = warmstart_trainer(
        grow(parent, width=2),
        tmp_path,
        10,
        blocks(20, 10),
        warmstart_from=base,
        schedule_policy="rewind",
        warmup_steps=0.2,
    )
    trainer.train()
    first = next(row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row)
    assert first == pytest.approx(3e-3, rel=0.02)


def test_frozen_parameters_of_the_parent_have_no_state_and_stay_frozen(base, tmp_path):
    parent = AutoModelForCausalLM.from_pretrained(base)
    parent.model.embed_tokens.weight.requires_grad_(False)
    folder = tmp_path / "frozen"
    stock_trainer(parent, folder, 3, blocks(0, 3)).train()
    child = grow(parent, width=2)
    before = child.model.embed_tokens.weight.clone()
    trainer = warmstart_trainer(child, tmp_path / "child", 2, blocks(3, 2), warmstart_from=folder / "checkpoint-3")
    with pytest.warns(UserWarning, match="has no names and is of 20 of 21 parameters"):
        trainer.train()
    assert torch.equal(before, child.model.embed_tokens.weight)
    assert {float(entry["step"]) for entry in trainer.optimizer.state.values()} == {5.0}


def test_what_the_child_freezes_leaves_its_state_behind(base, tmp_path):
    """The parent trained everything, in a file without names."""
    child = grow(AutoModelForCausalLM.from_pretrained(base), width=2)
    child.model.embed_tokens.weight.requires_grad_(False)
    trainer = warmstart_trainer(child, tmp_path, 2, blocks(20, 2), warmstart_from=base)
    trainer.train()
    assert {float(entry["step"]) for entry in trainer.optimizer.state.values()} == {22.0}
    assert len(trainer.optimizer.state) == len(list(child.parameters())) - 1


def test_what_the_child_unfreezes_starts_fresh_beside_what_was_carried(base, tmp_path):
    """The parent's file must have names: without them nothing says which of its parameters were frozen."""
    parent = AutoModelForCausalLM.from_pretrained(base)
    parent.model.embed_tokens.weight.requires_grad_(False)
    named = warmstart_trainer(parent, tmp_path / "named", 3, blocks(0, 3))
    named.train()
    child = grow(parent, width=2)
    child.model.embed_tokens.weight.requires_grad_(True)
    checkpoint = tmp_path / "named" / "checkpoint-3"
    trainer = warmstart_trainer(child, tmp_path / "child", 2, blocks(3, 2), warmstart_from=checkpoint)
    trainer.train()
    steps = {name: float(trainer.optimizer.state[p]["step"]) for name, p in child.named_parameters()}
    assert steps.pop("model.embed_tokens.weight") == 2.0
    assert set(steps.values()) == {5.0}


# -- bad input ----------------------------------------------------------------------------------------------------


def _broken(base, tmp_path, *without: str):
    folder = tmp_path / "checkpoint-20"
    shutil.copytree(base, folder)
    for name in without:
        (folder / name).unlink()
    return folder


def _start(base, checkpoint, folder, **options):
    parent = AutoModelForCausalLM.from_pretrained(base)
    trainer = warmstart_trainer(grow(parent, width=2), folder, 2, blocks(20, 2), warmstart_from=checkpoint, **options)
    trainer.train()


def _nothing_written(folder) -> bool:
    return not folder.exists() or not any(folder.iterdir())


@pytest.mark.parametrize(
    ("file", "way_out"), [("scheduler.pt", "schedule_policy="), ("optimizer.pt", "state_policy='reset'")]
)
def test_a_missing_file_is_named_with_the_way_out(base, tmp_path, file, way_out):
    checkpoint = _broken(base, tmp_path, file)
    with pytest.raises(WarmstartError, match=file) as error:
        _start(base, checkpoint, tmp_path / "out")
    assert way_out in str(error.value)
    assert _nothing_written(tmp_path / "out")


def test_the_ways_out_work(base, tmp_path):
    checkpoint = _broken(base, tmp_path, "scheduler.pt", "optimizer.pt")
    _start(base, checkpoint, tmp_path / "out", state_policy="reset", schedule_policy="rewarm")


def test_an_optimizer_file_of_another_model_is_refused_by_shape(base, tmp_path):
    other = tmp_path / "other"
    stock_trainer(tiny_model("llama", intermediate_size=104), other, 2, blocks(0, 2)).train()
    checkpoint = _broken(base, tmp_path)
    shutil.copy(other / "checkpoint-2" / "optimizer.pt", checkpoint / "optimizer.pt")
    with pytest.raises(
        StateError, match=r"mlp.up_proj.weight: exp_avg has shape \(104, 64\), the parent's is \(96, 64\)"
    ):
        _start(base, checkpoint, tmp_path / "out")
    assert _nothing_written(tmp_path / "out")


def test_an_optimizer_file_of_another_class_is_refused_by_count(base, tmp_path):
    other = tmp_path / "other"
    stock_trainer(tiny_model("gpt2"), other, 2, blocks(0, 2)).train()
    checkpoint = _broken(base, tmp_path)
    shutil.copy(other / "checkpoint-2" / "optimizer.pt", checkpoint / "optimizer.pt")
    with pytest.raises(StateError, match="belongs to another model"):
        _start(base, checkpoint, tmp_path / "out")


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"hidden_size": 32}], ids=str)
def test_a_checkpoint_of_another_size_is_refused(changes, base, tmp_path):
    other = tmp_path / "other"
    stock_trainer(tiny_model("llama", **changes), other, 2, blocks(0, 2)).train()
    with pytest.raises(StateError, match="is not of this model's parent"):
        _start(base, other / "checkpoint-2", tmp_path / "out")


def test_a_model_that_was_not_grown_is_refused(base, tmp_path):
    with pytest.raises(WarmstartError, match="no record of a growth"):
        warmstart_trainer(tiny_model("llama"), tmp_path / "out", 2, blocks(0, 2), warmstart_from=base)


def test_a_folder_that_is_none_is_refused(base, tmp_path):
    parent = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(WarmstartError, match="is no folder"):
        warmstart_trainer(grow(parent, width=2), tmp_path / "out", 2, blocks(0, 2), warmstart_from=tmp_path / "none")


def test_an_optimizer_that_cannot_use_adams_moments_is_refused(base, tmp_path):
    with pytest.raises(StateError, match="SGD cannot use"):
        _start(base, base, tmp_path / "out", optim="sgd")


def test_the_trainers_card_tells_of_the_growth_and_of_the_last_evaluation(base, tmp_path):
    parent = AutoModelForCausalLM.from_pretrained(base)
    trainer = warmstart_trainer(
        grow(parent, width=2),
        tmp_path,
        2,
        blocks(20, 2),
        warmstart_from=base,
        eval_dataset=blocks(22, 1),
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    trainer.create_model_card(license="mit")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and "reference_slice" in card.data.tags
    loss = trainer.state.log_history[-2]["eval_loss"]
    assert "eval_loss" in card.text and f"{loss:.4g}"[:4] in card.text
    assert "2 optimizer steps" in card.text and (tmp_path / "curves.png").exists() == ("](curves.png)" in card.text)
    trainer.create_model_card(license="mit", dataset="some held-out text", model_name="big")
    card = ModelCard.load(tmp_path / "README.md")
    (found,) = [result for result in card.data.eval_results if result.metric_type == "loss"]
    assert found.metric_value == loss and broken_rules(yaml.safe_load(card.data.to_yaml())) == []


def test_a_deepspeed_checkpoint_is_refused_for_its_state_and_the_named_way_out_works(base, tmp_path):
    checkpoint = _broken(base, tmp_path, "optimizer.pt")
    (checkpoint / "latest").write_text("global_step20")
    with pytest.raises(StateError, match=r"DeepSpeed.*state_policy='reset'"):
        _start(base, checkpoint, tmp_path / "refused")
    assert _nothing_written(tmp_path / "refused")
    _start(base, checkpoint, tmp_path / "out", state_policy="reset")
