"""A run that stops and resumes is the uninterrupted run, bit for bit, for renamed and fused weights too."""

from __future__ import annotations

import pytest
import torch

from hf_warmstart import grow

from ..models import tiny_model
from .conftest import blocks, losses, stock_trainer, warmstart_trainer


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "llama"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(family, tmp_path):
    stock_trainer(tiny_model(family), tmp_path / "base", 4, blocks(0, 4)).train()
    base = tmp_path / "base" / "checkpoint-4"

    def child():
        return grow(type(tiny_model(family)).from_pretrained(base), width=2)

    whole = warmstart_trainer(child(), tmp_path / "whole", 8, blocks(4, 8), warmstart_from=base, save_steps=5)
    whole.train()
    # A fresh model with other weights: everything must come from the checkpoint.
    other = child()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    resumed = warmstart_trainer(other, tmp_path / "resumed", 8, blocks(4, 8), warmstart_from=base)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))

    assert losses(resumed)[-3:] == losses(whole)[-3:]
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(whole.optimizer.state[p][key], resumed.optimizer.state[q][key]), (name, key)


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral"])
def test_the_best_model_comes_back_whole(family, tmp_path):
    model = grow(tiny_model(family), width=2)
    trainer = warmstart_trainer(
        model,
        tmp_path,
        6,
        blocks(0, 6),
        eval_dataset=blocks(6, 2),
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.5,  # diverges at once, so that the first checkpoint is the best
    )
    trainer.train()
    assert trainer.state.best_global_step == 2
    best = type(model).from_pretrained(trainer.state.best_model_checkpoint)
    for (name, a), b in zip(trainer.model.state_dict().items(), best.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_resuming_does_not_warm_start_again(tmp_path):
    stock_trainer(tiny_model("llama"), tmp_path / "base", 4, blocks(0, 4)).train()
    base = tmp_path / "base" / "checkpoint-4"
    model = grow(type(tiny_model("llama")).from_pretrained(base), width=2)
    warmstart_trainer(model, tmp_path / "run", 2, blocks(4, 2), warmstart_from=base).train()
    again = warmstart_trainer(model, tmp_path / "run", 4, blocks(4, 4), warmstart_from=base)
    again.train(resume_from_checkpoint=True)
    assert {float(entry["step"]) for entry in again.optimizer.state.values()} == {8.0}
    assert again.parent_state is None
