"""In the parent's coordinates an exact copy follows its parent step for step: the proof that state is carried right."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from hf_warmstart import WarmstartError, grow_optimizer_state, plan_growth
from hf_warmstart.growth.coordinates import coordinate_factors, coordinate_groups, parent_gradient_norm
from hf_warmstart.growth.grow import apply_plan
from hf_warmstart.growth.precision import true_float64
from hf_warmstart.growth.twin import build, randomise

from ..models import some_tokens, tiny_config
from ..models import tiny_model as make

LEARNING_RATE, DECAY, MAX_NORM = 3e-3, 0.1, 0.5
FIRST_STEPS = 20
MakeOptimizers = Callable[[list[dict]], list[torch.optim.Optimizer]]


class Lion(torch.optim.Optimizer):
    """The optimizer of arXiv 2302.06675, whose published packages all keep `exp_avg`."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.sign(average.lerp(p.grad, 1 - first)))
                average.lerp_(p.grad, 1 - second)


OPTIMIZERS = {
    "adamw": lambda groups: [torch.optim.AdamW(groups, lr=LEARNING_RATE)],
    "adamw fused": lambda groups: [torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)],
    "amsgrad": lambda groups: [torch.optim.AdamW(groups, lr=LEARNING_RATE, amsgrad=True)],
    "adam, coupled decay": lambda groups: [torch.optim.Adam(groups, lr=LEARNING_RATE, eps=1e-4)],
    "sgd": lambda groups: [torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)],
    "lion": lambda groups: [Lion(groups, lr=3e-4)],
    "adafactor, relative": lambda groups: [Adafactor(groups, lr=1e-2, relative_step=False, beta1=0.9)],
    "adafactor, its own rate": lambda groups: [Adafactor(groups)],
    "adafactor, absolute": lambda groups: [
        Adafactor(groups, lr=1e-3, relative_step=False, scale_parameter=False, beta1=0.9)
    ],
    "torch adafactor": lambda groups: [torch.optim.Adafactor(groups, lr=1e-2)],
    "muon": lambda groups: _muon_and_adamw(groups, None),
    "muon, rms": lambda groups: _muon_and_adamw(groups, "match_rms_adamw"),
}


def _muon_and_adamw(groups, adjust: str | None) -> list[torch.optim.Optimizer]:
    """Muon for the decayed matrices, AdamW for the rest."""
    rate = 3e-3 if adjust else 1e-2
    return [
        torch.optim.Muon([groups[0]], lr=rate, adjust_lr_fn=adjust),
        torch.optim.AdamW([groups[1]], lr=LEARNING_RATE),
    ]


def _groups(model: nn.Module) -> list[dict]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def _loss(model: nn.Module, step: int) -> torch.Tensor:
    ids = some_tokens(4, 20, seed=1000 + step).to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def take_step(model, optimizers, step: int, factors=None) -> tuple[float, float]:
    """One step of training on the batch of that number; the loss and the gradient norm that was clipped by.

    Args:
        factors: of a child in its parent's coordinates.
    """
    model.zero_grad()
    loss = _loss(model, step)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if factors is None:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
    else:
        norm = parent_gradient_norm(gradients, factors)
    for gradient in gradients.values():
        gradient.mul_(torch.clamp(MAX_NORM / (norm + 1e-6), max=1.0))
    for optimizer in optimizers:
        optimizer.step()
    return float(loss.detach()), float(norm)


def train_parent(family: str, make_optimizers: MakeOptimizers, device: str = "cpu", **changes):
    """A plan for width 2, and the parent with its optimizers after `FIRST_STEPS` steps; in true float64."""
    config = tiny_config(family, **changes)
    config.dtype, config._attn_implementation = torch.float64, "eager"
    plan = plan_growth(config, width=2, width_operator="exact_copy")
    parent = build(plan.model_class, config)
    randomise(parent, 3, scale=0.1)
    parent = parent.to(device)
    optimizers = make_optimizers(_groups(parent))
    for step in range(FIRST_STEPS):
        take_step(parent, optimizers, step)
    return plan, parent, optimizers


def start_child(plan, parent, make_optimizers: MakeOptimizers):
    """The child of a parent, with fresh optimizers in the parent's coordinates, and its factors."""
    child = apply_plan(parent, plan)
    factors = coordinate_factors(plan)
    optimizers = make_optimizers(_groups(child))
    names = _names(child)
    for optimizer in optimizers:
        optimizer.param_groups[:] = coordinate_groups(optimizer, names, factors)
        name_groups(child, optimizer)
    return child, optimizers, factors


def name_groups(model: nn.Module, optimizer) -> None:
    """Write the parameters' names into an optimizer's groups, as `WarmstartTrainer` does."""
    names = _names(model)
    for group in optimizer.param_groups:
        group["param_names"] = [names[id(parameter)] for parameter in group["params"]]


def named_state(model: nn.Module, optimizers) -> dict[str, dict]:
    """The state of optimizers by parameter name."""
    names = _names(model)
    return {names[id(p)]: dict(entry) for optimizer in optimizers for p, entry in optimizer.state.items()}


def follow(
    family: str, carry: bool, steps: int, optimizer: str = "adamw", device: str = "cpu", **changes
) -> tuple[float, float]:
    """Largest loss difference of parent and child over `steps` steps, and the largest gradient norm before clipping."""
    with true_float64():
        plan, parent, optimizers = train_parent(family, OPTIMIZERS[optimizer], device, **changes)
        child, grown, factors = start_child(plan, parent, OPTIMIZERS[optimizer])
        if carry:
            carried = grow_optimizer_state(named_state(parent, optimizers), plan)
            names = _names(child)
            for each in grown:
                for group in each.param_groups:
                    for parameter in group["params"]:
                        each.state[parameter] = carried[names[id(parameter)]]
        worst, largest_norm = 0.0, 0.0
        for step in range(FIRST_STEPS, FIRST_STEPS + steps):
            loss, norm = take_step(parent, optimizers, step)
            child_loss, child_norm = take_step(child, grown, step, factors)
            worst, largest_norm = max(worst, abs(loss - child_loss)), max(largest_norm, norm)
            if carry and "muon" not in optimizer:
                assert child_norm == pytest.approx(norm, rel=1e-9)
    return worst, largest_norm


CASES = [("llama", {"tie_word_embeddings": False}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {})]
EXACT = [name for name in OPTIMIZERS if "muon" not in name]


@pytest.mark.parametrize(("family", "changes"), CASES, ids=["llama", "llama-tied", "gpt2"])
def test_100_adamw_steps_of_an_exact_copy_equal_its_parents_in_true_float64(family, changes):
    worst, largest_norm = follow(family, carry=True, steps=100, **changes)
    assert worst < 1e-9
    assert largest_norm > MAX_NORM, "clipping must be active for this test to say anything about it"


@pytest.mark.parametrize("optimizer", [name for name in EXACT if name != "adamw"])
def test_100_steps_of_every_optimizer_with_an_exact_rule_equal_the_parents(optimizer):
    worst, largest_norm = follow("llama", carry=True, steps=100, optimizer=optimizer)
    assert worst < 1e-9
    assert largest_norm > MAX_NORM


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("muon, rms", marks=pytest.mark.slow)])
def test_muon_follows_to_the_rounding_of_its_bfloat16_iteration_and_only_with_its_state(optimizer):
    """Its Newton-Schulz iteration runs in bfloat16, so it is not called exact."""
    worst, _ = follow("llama", carry=True, steps=20, optimizer=optimizer)
    without, _ = follow("llama", carry=False, steps=20, optimizer=optimizer)
    assert worst < 0.1 * without


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("muon, rms", marks=pytest.mark.slow)])
def test_muon_without_its_rounding_is_exact(monkeypatch, optimizer):
    """With the same iteration in float64 the child follows: what parts them is the rounding alone."""
    module = sys.modules["torch.optim._muon"]
    source = inspect.getsource(module._zeropower_via_newtonschulz).replace(".bfloat16()", ".double()")
    exec(source, scope := dict(vars(module)))
    monkeypatch.setattr(module, "_zeropower_via_newtonschulz", scope["_zeropower_via_newtonschulz"])
    worst, _ = follow("llama", carry=True, steps=100, optimizer=optimizer)
    assert worst < 1e-9


@pytest.mark.parametrize(("family", "changes"), CASES, ids=["llama", "llama-tied", "gpt2"])
def test_without_the_carried_state_the_runs_part(family, changes):
    worst, _ = follow(family, carry=False, steps=10, **changes)
    assert worst > 1e-4


@pytest.mark.parametrize("optimizer", [name for name in EXACT if name != "adamw"])
def test_without_its_state_no_optimizer_follows(optimizer):
    worst, _ = follow("llama", carry=False, steps=10, optimizer=optimizer)
    assert worst > 1e-6


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
