"""New units must be able to learn: every new entry moves, and copies part where the operator says that they do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_warmstart import plan_growth
from hf_warmstart.growth.grow import apply_plan

from ..models import FAMILIES, tiny_model

STEPS = 32


def _train(model, steps: int = STEPS) -> dict[str, Tensor]:
    """Train without dropout, each position with a target; for each parameter, which entries moved at any step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    moved = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for _ in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        ids = torch.stack([torch.randperm(97, generator=generator)[:64] for _ in range(8)])
        optimizer.zero_grad()
        logits = model(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            moved[name] |= parameter.detach() != before[name]
    return moved


def _still(family: str, moved: dict[str, Tensor]) -> dict[str, int]:
    """Parameters with entries that never moved, beside those that no gradient can reach in any model of the class."""
    still = {name: int((~entries).sum()) for name, entries in moved.items() if not entries.all()}
    if family == "opt":
        still.pop("model.decoder.embed_positions.weight", None)  # two rows in front that no position uses
    return still


def _parent(family: str):
    """A parent in which no unit can be dead: OPT's ReLU may be zero for every token of the batch, growth or not."""
    return tiny_model(family, **({"activation_function": "gelu"} if family == "opt" else {}))


def _duplicates(plan, model) -> set[str]:
    """Units of which two copies are bitwise equal along some axis of a parameter."""
    found = set()
    for name, parameter in model.named_parameters():
        for axis, axis_map in enumerate(plan.tensor(name).maps):
            rows = parameter.detach().movedim(axis, 0).reshape(axis_map.m, -1)
            for unit in (axis_map.copies > 1).nonzero().flatten().tolist():
                copies = rows[axis_map.source == unit]
                if len(torch.unique(copies, dim=0)) < len(copies):
                    found.add(f"{name} axis {axis} unit {unit}")
    return found


@pytest.mark.parametrize("operator", ["perturbed_copy", "uneven_copy", "reference_slice", "exact_copy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_after_32_steps_every_entry_moved_and_copies_parted(family, operator):
    parent = _parent(family)
    plan = plan_growth(parent, width=2, width_operator=operator)
    child = apply_plan(parent, plan)
    moved = _train(child)
    assert _still(family, moved) == {}
    duplicates = _duplicates(plan, child)
    if (
        duplicates
    ):  # single numbers (of norms, biases) may meet by chance, as those of one unit do here; clones stay equal
        _train(child, 3)  # Adam's first step has one size for all
        duplicates &= _duplicates(plan, child)
    if operator == "exact_copy":
        assert duplicates, "even copies have equal gradients; if they part, this test or the copy is wrong"
    else:
        assert duplicates == set()


@pytest.mark.parametrize("operator", ["exact_copy", "perturbed_copy", "uneven_copy", "reference_slice"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_broken_factors_leave_nothing_frozen(family, operator):
    parent = tiny_model(family)
    moved = _train(apply_plan(parent, plan_growth(parent, width=1.5, width_operator=operator)))
    assert _still(family, moved) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_blocks_learn(family):
    # ReLU units that no token wakes are dead in the parent's layer and so in its copy; GELU has none.
    parent = _parent(family)
    still = _still(family, _train(apply_plan(parent, plan_growth(parent, depth=2))))
    # A softmax ignores the bias of keys that are not rotated: its gradient is zero in every layer of these classes.
    keys = ("c_attn.bias", "k_proj.bias") if family in ("gpt2", "opt") else ()
    assert {name for name in still if not name.endswith(keys)} == set() if keys else still == {}
