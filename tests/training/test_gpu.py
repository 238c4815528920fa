"""What must hold on a GPU as on a CPU: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_warmstart import grow, grow_optimizer_state, plan_growth
from hf_warmstart.training.grown_adamw import GrownAdamW

from ..growth.test_parent_coordinates import EXACT, MAX_NORM, follow
from ..models import FAMILIES, tiny_model
from .conftest import blocks, losses, stock_trainer, warmstart_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
GPU = "cuda"
WIDTHS = ("exact_copy", "perturbed_copy", "uneven_copy", "reference_slice")
STEPS = 10


def _far(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest entry."""
    a, b = a.cpu().double(), b.cpu().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


# -- growing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_the_gpu_grows_there_as_on_the_cpu(family, operator, dtype, record_property):
    """Bit for bit but for noise and for channels that hold a mean: a GPU sums in another order."""
    parent = tiny_model(family).to(dtype)
    options = {"width": 2, "depth": 2, "width_operator": operator, "seed": 3}
    on_cpu = grow(parent, **options).state_dict()
    child = grow(parent.to(GPU), **options)
    assert {p.device.type for p in child.state_dict().values()} == {GPU}
    assert child.dtype == dtype
    unequal = {n: _far(t, on_cpu[n]) for n, t in child.state_dict().items() if not torch.equal(t.cpu(), on_cpu[n])}
    record_property("unequal", f"{len(unequal)} of {len(on_cpu)}, {max(unequal.values(), default=0):.1e}")
    if operator in ("perturbed_copy", "reference_slice"):
        assert max(unequal.values(), default=0) < (1e-6 if dtype == torch.float32 else 1e-2)
    else:
        assert not unequal


def test_optimizer_state_on_the_gpu_grows_there(record_property):
    parent = tiny_model("llama")
    generator = torch.Generator().manual_seed(1)
    state = {
        name: {
            "step": torch.tensor(20.0),
            "exp_avg": torch.randn(p.shape, generator=generator),
            "exp_avg_sq": torch.rand(p.shape, generator=generator),
        }
        for name, p in parent.named_parameters()
    }
    there = {name: {key: value.to(GPU) for key, value in entry.items()} for name, entry in state.items()}
    plan = plan_growth(parent, width=1.5, depth=2, width_operator="reference_slice")
    for policy in ("carry", "asymmetric_reset"):
        on_cpu = grow_optimizer_state(state, plan, state_policy=policy)
        on_gpu = grow_optimizer_state(there, plan, state_policy=policy)
        assert set(on_cpu) == set(on_gpu)
        worst = 0.0
        for name, entry in on_cpu.items():
            for key in ("exp_avg", "exp_avg_sq"):
                assert on_gpu[name][key].device.type == GPU
                worst = max(worst, _far(on_gpu[name][key], entry[key]))
        record_property(policy, worst)
        assert worst < 1e-6


# -- training ---------------------------------------------------------------------------------------------------------


# The fused AdamW takes its step count in float32 alone, and inside `true_float64` there is none.
@pytest.mark.parametrize("optimizer", [name for name in EXACT if name != "adamw fused"])
def test_100_steps_in_the_parents_coordinates_equal_the_parents_in_float64(optimizer, record_property):
    worst, largest_norm = follow("llama", carry=True, steps=100, optimizer=optimizer, device=GPU)
    record_property("difference", worst)
    assert worst < 1e-9
    assert largest_norm > MAX_NORM


def test_without_the_carried_state_the_runs_part():
    assert follow("llama", carry=False, steps=10, device=GPU)[0] > 1e-4


def _child(base, folder, **options):
    child = grow(AutoModelForCausalLM.from_pretrained(base), width=2, depth=2, seed=5)
    options = {"save_steps": STEPS // 2} | options
    return warmstart_trainer(child, folder, STEPS, blocks(20, STEPS), warmstart_from=base, **options)


@pytest.mark.parametrize("policy", ["carry", "asymmetric_reset"])
@pytest.mark.parametrize(("precision", "noise"), [({}, 1e-4), ({"bf16": True}, 3e-2)], ids=["float32", "bf16"])
def test_a_warm_start_on_the_gpu_goes_as_on_the_cpu_and_resumes(
    base, tmp_path, precision, noise, policy, record_property
):
    """With the fused AdamW that is Trainer's default."""
    on_cpu = _child(base, tmp_path / "cpu", state_policy=policy)
    on_cpu.train()
    on_gpu = _child(base, tmp_path / "gpu", state_policy=policy, use_cpu=False, **precision)
    on_gpu.train()
    assert on_gpu.model.device.type == GPU
    assert isinstance(on_gpu.optimizer.optimizer, GrownAdamW) is (policy == "asymmetric_reset")
    assert on_gpu.optimizer.param_groups[0]["fused"]
    worst = max(abs(a - b) for a, b in zip(losses(on_gpu), losses(on_cpu), strict=True))
    record_property("difference", worst)
    assert worst < noise
    assert {float(entry["step"]) for entry in on_gpu.optimizer.state.values()} == {20.0 + STEPS}
    again = _child(base, tmp_path / "again", state_policy=policy, use_cpu=False, **precision)
    again.train(resume_from_checkpoint=str(tmp_path / "gpu" / f"checkpoint-{STEPS // 2}"))
    assert losses(again) == pytest.approx(losses(on_gpu), abs=1e-5)


def test_100_steps_through_trainer_in_the_parents_coordinates_follow_the_parent(base, tmp_path, record_property):
    """In float32, with the fused AdamW."""
    parent = AutoModelForCausalLM.from_pretrained(base)
    parent_run = stock_trainer(parent, tmp_path / "parent", 120, blocks(0, 120), use_cpu=False)
    parent_run.train(resume_from_checkpoint=str(base))
    child = grow(AutoModelForCausalLM.from_pretrained(base), width=2, width_operator="exact_copy")
    trainer = warmstart_trainer(
        child,
        tmp_path / "child",
        100,
        blocks(20, 100),
        warmstart_from=base,
        parent_coordinates=True,
        use_cpu=False,
    )
    with pytest.warns(UserWarning, match="exact_copy"):
        trainer.train()
    worst = max(abs(a - b) for a, b in zip(losses(parent_run)[-100:], losses(trainer), strict=True))
    record_property("difference", worst)
    assert worst < 1e-4


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_each_entry_steps_by_its_own_count(fused):
    """Old entries as under torch's AdamW with the carried count, new ones as under a fresh one."""
    options = {"lr": 1e-2, "weight_decay": 0.1, "fused": fused}
    new = torch.zeros(64, 96, dtype=torch.bool, device=GPU)
    new[:, 48:] = True

    def run(optimizer, parameter, steps) -> torch.Tensor:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            parameter.grad = torch.randn(64, 96, generator=generator, dtype=torch.float64).to(GPU)
            optimizer.step()
        return parameter.detach()

    carried = torch.nn.Parameter(torch.ones(64, 96, dtype=torch.float64, device=GPU))
    keeper = torch.optim.AdamW([carried], **options)
    run(keeper, carried, range(50))
    entry = {key: value.clone() for key, value in keeper.state[carried].items()}
    ours, young = (torch.nn.Parameter(carried.detach().clone()) for _ in range(2))
    optimizer = GrownAdamW([ours], **options)
    moments = {key: entry[key].masked_fill(new, 0) for key in ("exp_avg", "exp_avg_sq")}
    optimizer.state[ours] = {"step": entry["step"].clone(), **moments, "new": new, "born": int(entry["step"])}
    steps = range(50, 80)
    found, old, fresh = (
        run(optimizer, ours, steps),
        run(keeper, carried, steps),
        run(torch.optim.AdamW([young], **options), young, steps),
    )
    torch.testing.assert_close(found[:, :48], old[:, :48], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[:, 48:], fresh[:, 48:], rtol=0, atol=1e-12)
