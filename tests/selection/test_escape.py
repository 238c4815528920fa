"""Escape from the cloned subspace: exactly zero for locked copies, not zero once anything parts them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_warmstart import grow, plan_growth
from hf_warmstart.selection.escape import escape, family
from hf_warmstart.selection.regimes import Regime

from ..models import some_tokens, tiny_config, tiny_model
from .conftest import TINY

STEPS = 128


def trained(dtype=torch.float32, dropout=0.0, steps=STEPS, **growth):
    """A grown model before and after some AdamW steps, and its plan."""
    config = Regime(dropout=dropout).configured(tiny_config("llama", dtype=dtype, num_hidden_layers=1, **TINY))
    torch.manual_seed(0)
    parent = AutoModelForCausalLM.from_config(config).to(dtype)
    parent.config.dtype = dtype
    plan, model = plan_growth(parent, **growth), grow(parent, **growth).train()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for step in range(steps):
        ids = some_tokens(2, 12, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return plan, model.state_dict(), start


def test_a_deterministic_exact_copy_never_escapes():
    """In float32; for float64 see `test_processes`."""
    plan, now, start = trained(width=2, width_operator="exact_copy")
    found = escape(plan, now, start)
    assert found.copies
    assert found.state == 0.0 and found.update == 0.0 and found.outside == 0.0
    assert all(values["update"] in (0.0, None) for values in found.families.values())
    assert any(not torch.equal(now[name], start[name]) for name in now)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_alone_lets_an_exact_copy_escape(dtype):
    plan, now, start = trained(dtype, dropout=0.1, steps=8, width=2, width_operator="exact_copy")
    found = escape(plan, now, start)
    assert found.update > 1e-3 and found.state > 1e-6
    assert found.families["self_attn.q_proj"]["update"] > 1e-3


def test_three_copies_are_as_exactly_locked_as_two():
    plan, now, start = trained(steps=8, width=3, width_operator="exact_copy")
    assert escape(plan, now, start).update == 0.0


@pytest.mark.parametrize("operator", ["perturbed_copy", "uneven_copy"])
def test_noise_and_uneven_copies_escape_without_dropout(operator):
    plan, now, start = trained(steps=4, width=2, width_operator=operator)
    found = escape(plan, now, start)
    assert found.copies and found.update > 1e-3
    before = escape(plan, start, start)
    assert before.update is None and before.outside is None
    assert before.state == pytest.approx(0, abs=1e-6) if operator == "uneven_copy" else before.state > 1e-3


def test_what_copies_nothing_has_no_cloned_subspace():
    plan, now, start = trained(steps=4, width=2, width_operator="reference_slice")
    found = escape(plan, now, start)
    assert not found.copies and found.state is None and found.update is None
    inside = beside = 0.0
    for name, tensor in now.items():
        update = (tensor - start[name]).double().square()
        beside += float(update[plan.tensor(name).new_entries()].sum())
        inside += float(update.sum())
    assert found.outside == pytest.approx(beside / inside)


def test_new_layers_lie_outside_and_stacked_layers_are_copies():
    plan, now, start = trained(steps=4, depth=2)
    found = escape(plan, now, start)
    assert not found.copies and 0.0 < found.outside < 1.0
    plan, now, start = trained(steps=4, depth=2, depth_operator="stack")
    found = escape(plan, now, start)
    assert found.copies and found.update > 1e-3 and found.outside == 0.0
    assert escape(plan, start, start).state == 0.0


def test_escape_is_the_part_of_an_update_that_differs_between_copies():
    parent = tiny_model("llama", **TINY)
    options = {"width": 2, "width_operator": "exact_copy"}
    plan, start = plan_growth(parent, **options), grow(parent, **options).state_dict()
    name = "model.norm.weight"
    now = {key: tensor.clone() for key, tensor in start.items()}
    common, apart = torch.randn(32), torch.randn(32)
    now[name] += torch.cat([common + apart, common - apart])
    expected = float(apart.norm() / (common.square() + apart.square()).sum().sqrt())
    found = escape(plan, now, start)
    assert found.update == pytest.approx(expected, rel=1e-4)
    assert found.families["model.norm"]["update"] == pytest.approx(expected, rel=1e-4)
    assert found.families["mlp.up_proj"]["update"] is None


def test_families_are_named_by_their_place_in_a_layer():
    plan = plan_growth(tiny_config("gpt2"), width=2)
    assert family(plan, "transformer.h.1.attn.c_attn.bias") == "attn.c_attn"
    assert family(plan, "transformer.wte.weight") == "transformer.wte"
