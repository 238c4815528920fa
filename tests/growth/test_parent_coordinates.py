"""In the parent's coordinates an exact copy follows its parent step for step: the proof that state is carried right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_warmstart import WarmstartError, grow_optimizer_state, plan_growth
from hf_warmstart.growth.coordinates import coordinate_factors, coordinate_groups, parent_gradient_norm
from hf_warmstart.growth.grow import apply_plan
from hf_warmstart.growth.precision import true_float64
from hf_warmstart.growth.twin import build, randomise

from ..models import some_tokens, tiny_config
from ..models import tiny_model as make

LEARNING_RATE, EPSILON, DECAY, MAX_NORM = 3e-3, 1e-8, 0.1, 0.5


def _groups(model: nn.Module) -> list[dict]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    common = {"lr": LEARNING_RATE, "eps": EPSILON}
    return [{"params": decayed, "weight_decay": DECAY, **common}, {"params": others, "weight_decay": 0.0, **common}]


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def _loss(model: nn.Module, step: int) -> torch.Tensor:
    ids = some_tokens(4, 20, seed=1000 + step)
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _step(model, optimizer, step: int, factors=None) -> tuple[float, float]:
    optimizer.zero_grad()
    loss = _loss(model, step)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if factors is None:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
    else:
        norm = parent_gradient_norm(gradients, factors)
    for gradient in gradients.values():
        gradient.mul_(torch.clamp(MAX_NORM / (norm + 1e-6), max=1.0))
    optimizer.step()
    return float(loss.detach()), float(norm)


def _state_by_name(optimizer, names) -> dict:
    return {names[id(p)]: dict(entry) for p, entry in optimizer.state.items()}


def follow(family: str, carry: bool, steps: int, **changes) -> tuple[float, float]:
    """Largest loss difference of parent and child over `steps` steps, and the largest gradient norm before clipping."""
    config = tiny_config(family, **changes)
    config.dtype, config._attn_implementation = torch.float64, "eager"
    plan = plan_growth(config, width=2, width_operator="exact_copy")
    with true_float64():
        parent = build(plan.model_class, config)
        randomise(parent, 3, scale=0.1)
        optimizer = torch.optim.AdamW(_groups(parent))
        for step in range(20):
            _step(parent, optimizer, step)
        child = apply_plan(parent, plan)
        factors = coordinate_factors(plan)
        grown = torch.optim.AdamW(coordinate_groups(_groups(child), _names(child), factors))
        if carry:
            state = grow_optimizer_state(_state_by_name(optimizer, _names(parent)), plan)
            for name, parameter in child.named_parameters():
                grown.state[parameter] = state[name]
        worst, largest_norm = 0.0, 0.0
        for step in range(20, 20 + steps):
            (loss, norm), (child_loss, child_norm) = (
                _step(parent, optimizer, step),
                _step(child, grown, step, factors),
            )
            worst, largest_norm = max(worst, abs(loss - child_loss)), max(largest_norm, norm)
            if carry:
                assert child_norm == pytest.approx(norm, rel=1e-9)
    return worst, largest_norm


CASES = [("llama", {"tie_word_embeddings": False}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {})]


@pytest.mark.parametrize(("family", "changes"), CASES, ids=["llama", "llama-tied", "gpt2"])
def test_100_adamw_steps_of_an_exact_copy_equal_its_parents_in_true_float64(family, changes):
    worst, largest_norm = follow(family, carry=True, steps=100, **changes)
    assert worst < 1e-9
    assert largest_norm > MAX_NORM, "clipping must be active for this test to say anything about it"


@pytest.mark.parametrize(("family", "changes"), CASES, ids=["llama", "llama-tied", "gpt2"])
def test_without_the_carried_state_the_runs_part(family, changes):
    worst, _ = follow(family, carry=False, steps=10, **changes)
    assert worst > 1e-4


@pytest.mark.parametrize(
    "options",
    [{"width_operator": "perturbed_copy", "width": 2}, {"width_operator": "uneven_copy", "width": 2}]
    + [{"width_operator": "reference_slice", "width": 2}, {"width_operator": "exact_copy", "width": 1.5}],
    ids=["perturbed", "uneven", "slice", "non-integer"],
)
def test_growths_whose_factor_varies_inside_a_tensor_are_refused(options):
    plan = plan_growth(make("llama"), **options)
    with pytest.raises(WarmstartError, match="varies in"):
        coordinate_factors(plan)


def test_new_layers_are_refused():
    with pytest.raises(WarmstartError, match="New layers"):
        coordinate_factors(plan_growth(make("llama"), depth=2))
