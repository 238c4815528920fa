"""What a growth added can be trained alone: everything old keeps its bits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_warmstart import WarmstartError, WarmstartTrainingArguments, freeze_parent, grow, plan_growth

from ..models import some_tokens, tiny_model
from .conftest import blocks, warmstart_trainer

GROWTHS = [
    {"depth": 2},
    {"width": 2, "width_operator": "perturbed_copy"},
    {"width": 1.5, "width_operator": "reference_slice", "depth": 1.5},
    {"vocab_size": 120},
]


def _old_entries(parent, child, options) -> dict[str, torch.Tensor]:
    """For each parameter of the child, the entries that are not new."""
    plan = plan_growth(parent, **options)
    named = dict(child.named_parameters())
    return {
        name: torch.zeros(p.shape, dtype=torch.bool) if plan.is_added(name) else ~plan.tensor(name).new_entries()
        for name, p in named.items()
    }


@pytest.mark.parametrize("options", GROWTHS, ids=str)
def test_old_entries_keep_their_bits_and_new_ones_move(options):
    parent = tiny_model("llama")
    child = grow(parent, **options).train()
    old = _old_entries(parent, child, options)
    before = {name: p.detach().clone() for name, p in child.named_parameters()}
    new = freeze_parent(child)
    optimizer = torch.optim.AdamW([p for p in child.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    new.hold(optimizer)
    ids = some_tokens()
    for _ in range(3):
        child(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = 0
    for name, p in child.named_parameters():
        assert torch.equal(p[old[name]], before[name][old[name]]), name
        moved += int((p[~old[name]] != before[name][~old[name]]).sum())
    assert new.entries == sum(int((~mask).sum()) for mask in old.values())
    assert moved > 0.7 * new.entries  # a few have no gradient: rows of tokens that are not in the text


def test_without_hold_weight_decay_would_move_old_entries():
    """What `hold` is for."""
    child = grow(tiny_model("llama"), width=2).train()
    new = freeze_parent(child)
    name = next(iter(new.masks))
    parameter = dict(child.named_parameters())[name]
    before = parameter.detach().clone()
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.5)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not torch.equal(parameter[~new.masks[name]], before[~new.masks[name]])


def test_whole_layers_alone_on_request_and_release_gives_all_back():
    child = grow(tiny_model("llama"), width=2, depth=2)
    new = freeze_parent(child, entries=False)
    trained = {name for name, p in child.named_parameters() if p.requires_grad}
    assert trained == set(new.tensors) and not new.masks
    assert {name.split(".")[2] for name in trained} == {"1", "3"}
    new.release()
    assert all(p.requires_grad for p in child.parameters())


def test_what_was_frozen_stays_frozen():
    parent = tiny_model("llama")
    parent.model.embed_tokens.weight.requires_grad_(False)
    new = freeze_parent(grow(parent, width=2))
    assert "model.embed_tokens.weight" not in new.masks and new.masks


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: (tiny_model("llama"), {}), "no record of a growth"),
        (lambda: (grow(tiny_model("llama"), width=2), {"entries": False}), "added no layer.*entries=True"),
        (lambda: (grow(tiny_model("llama").requires_grad_(False), width=2), {}), "frozen already"),
        (lambda: (torch.nn.Linear(2, 2), {}), "no record of a growth"),
    ],
)
def test_what_has_nothing_new_is_refused(make, words):
    model, options = make()
    with pytest.raises(WarmstartError, match=words):
        freeze_parent(model, **options)


@pytest.mark.parametrize("policy", ["carry", pytest.param("asymmetric_reset", marks=pytest.mark.slow)])
def test_the_trainer_trains_what_is_new_alone_from_the_parents_state(base, tmp_path, policy):
    parent = AutoModelForCausalLM.from_pretrained(base)
    options = {"width": 2, "depth": 2}
    child = grow(parent, **options)
    old = _old_entries(parent, child, options)
    before = {name: p.detach().clone() for name, p in child.named_parameters()}
    trainer = warmstart_trainer(
        child, tmp_path, 4, blocks(20, 4), warmstart_from=base, train_only="new", state_policy=policy, save_steps=2
    )
    trainer.train()
    for name, p in child.named_parameters():
        assert torch.equal(p[old[name]], before[name][old[name]]), name
    end = {name: p.detach().clone() for name, p in child.named_parameters()}
    assert any(not torch.equal(end[name], before[name]) for name in end)

    again = grow(parent, **options)
    resumed = warmstart_trainer(
        again, tmp_path, 4, blocks(20, 4), warmstart_from=base, train_only="new", state_policy=policy, save_steps=2
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, end[name]) for name, p in again.named_parameters())


def test_an_optimizer_that_was_made_before_is_refused(tmp_path):
    child = grow(tiny_model("llama"), width=2)
    trainer = warmstart_trainer(child, tmp_path, 2, blocks(0, 2), train_only="new")
    trainer.optimizer = torch.optim.AdamW(child.parameters())
    with pytest.raises(WarmstartError, match="train_only='new'.*pass no optimizer"):
        trainer.train()


def test_arguments_that_exclude_one_another_are_refused(tmp_path):
    with pytest.raises(WarmstartError, match="train_only='old' is none of"):
        WarmstartTrainingArguments(str(tmp_path), train_only="old")
    with pytest.raises(WarmstartError, match="nothing is new"):
        WarmstartTrainingArguments(str(tmp_path), train_only="new", parent_coordinates=True)
