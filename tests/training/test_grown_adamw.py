"""`GrownAdamW`: new entries step as those of a fresh AdamW do, old ones as those of the carried one."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_warmstart import WarmstartError
from hf_warmstart.training.grown_adamw import GrownAdamW

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.999)}


def _gradient(step: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def _run(optimizer, parameter, steps) -> torch.Tensor:
    for step in steps:
        parameter.grad = _gradient(step)
        optimizer.step()
    return parameter.detach()


@pytest.fixture
def aged():
    """A parameter and AdamW after 50 steps."""
    parameter = torch.nn.Parameter(torch.ones(4, 6, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], **OPTIONS)
    _run(optimizer, parameter, range(50))
    return parameter, optimizer.state[parameter]


def _grown(parameter, entry, **options):
    new = torch.zeros(4, 6, dtype=torch.bool)
    new[:, 3:] = True
    ours = torch.nn.Parameter(parameter.detach().clone())
    optimizer = GrownAdamW([ours], **OPTIONS, **options)
    optimizer.state[ours] = {
        "step": entry["step"].clone(),
        "exp_avg": entry["exp_avg"].masked_fill(new, 0),
        "exp_avg_sq": entry["exp_avg_sq"].masked_fill(new, 0),
        "new": new,
        "born": int(entry["step"]),
    }
    return ours, optimizer


def test_each_entry_steps_by_its_own_count(aged):
    parameter, entry = aged
    ours, optimizer = _grown(parameter, entry)
    fresh = torch.nn.Parameter(parameter.detach().clone())
    fresh_steps = _run(torch.optim.AdamW([fresh], **OPTIONS), fresh, range(50, 80))
    carried = torch.nn.Parameter(parameter.detach().clone())
    keeper = torch.optim.AdamW([carried], **OPTIONS)
    keeper.state[carried] = {key: value.clone() for key, value in entry.items()}
    carried_steps = _run(keeper, carried, range(50, 80))
    both = _run(optimizer, ours, range(50, 80))
    torch.testing.assert_close(both[:, 3:], fresh_steps[:, 3:], rtol=0, atol=1e-12)
    torch.testing.assert_close(both[:, :3], carried_steps[:, :3], rtol=0, atol=1e-12)


def test_the_old_count_would_move_new_entries_several_times_too_far(aged):
    """What the class exists for: under the kept count, the first step of a zeroed moment is 3 rates long."""
    parameter, entry = aged
    new = torch.ones(4, 6, dtype=torch.bool)
    ours = torch.nn.Parameter(parameter.detach().clone())
    optimizer = torch.optim.AdamW([ours], **(OPTIONS | {"weight_decay": 0.0}))
    state = {key: value.clone() for key, value in entry.items()}
    state["step"] += 5000
    optimizer.state[ours] = state | {"exp_avg": state["exp_avg"] * 0, "exp_avg_sq": state["exp_avg_sq"] * 0}
    moved = (_run(optimizer, ours, [50]) - parameter.detach()).abs() / OPTIONS["lr"]
    assert float(moved.median()) == pytest.approx(0.1 / 0.001**0.5, rel=1e-2)
    ours, optimizer = _grown(parameter, entry)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.state[ours]["new"] = new
    optimizer.state[ours]["exp_avg"].zero_()
    optimizer.state[ours]["exp_avg_sq"].zero_()
    moved = (_run(optimizer, ours, [50]) - parameter.detach()).abs() / OPTIONS["lr"]
    assert float(moved.median()) == pytest.approx(1.0, rel=1e-2)


def test_new_entries_are_warmed_up_alone(aged):
    parameter, entry = aged
    plain, optimizer = _grown(parameter, entry)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    warmed, warm = _grown(parameter, entry, new_lr_peak=1.3, new_lr_steps=2)
    warm.param_groups[0]["weight_decay"] = 0.0
    for step, factor in ((50, 1.15), (51, 1.3), (52, 1.3)):
        before = plain.detach().clone(), warmed.detach().clone()
        plain_step = _run(optimizer, plain, [step]) - before[0]
        warm_step = _run(warm, warmed, [step]) - before[1]
        torch.testing.assert_close(warm_step[:, 3:], factor * plain_step[:, 3:], rtol=1e-9, atol=0)
        torch.testing.assert_close(warm_step[:, :3], plain_step[:, :3], rtol=1e-9, atol=0)


def test_parameters_without_new_entries_take_torchs_own_step(aged):
    parameter, entry = aged
    one, other = (torch.nn.Parameter(parameter.detach().clone()) for _ in range(2))
    ours, theirs = GrownAdamW([one], **OPTIONS), torch.optim.AdamW([other], **OPTIONS)
    assert torch.equal(_run(ours, one, range(5)), _run(theirs, other, range(5)))


def test_a_saved_state_continues_bit_for_bit(aged):
    parameter, entry = aged
    ours, optimizer = _grown(parameter, entry, new_lr_peak=1.3, new_lr_steps=10)
    _run(optimizer, ours, range(50, 55))
    again = torch.nn.Parameter(ours.detach().clone())
    loaded = GrownAdamW([again], **OPTIONS)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert loaded.state[again]["new"].dtype == torch.bool
    assert torch.equal(_run(loaded, again, range(55, 60)), _run(optimizer, ours, range(55, 60)))


@pytest.mark.parametrize("step", [301, 999, 70001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_step_of_birth_survives_loading_in_any_dtype(dtype, step):
    parameter = torch.nn.Parameter(torch.ones(4, 6, dtype=dtype))
    new = torch.zeros(4, 6, dtype=torch.bool)
    new[:, 3:] = True
    zeros = torch.zeros(4, 6, dtype=dtype)
    entry = {
        "step": torch.tensor(float(step)),
        "exp_avg": zeros,
        "exp_avg_sq": zeros.clone(),
        "new": new,
        "born": step,
    }
    optimizer = GrownAdamW([parameter], lr=1e-2, weight_decay=0.0)
    optimizer.load_state_dict({"state": {0: entry}, "param_groups": optimizer.state_dict()["param_groups"]})
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = (1 - parameter.detach().float())[:, 3:]
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=0.2, atol=0)  # a first step: one rate


def test_a_step_that_overflowed_is_left_out_under_a_gradient_scaler():
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    optimizer = GrownAdamW([parameter], lr=1e-2, fused=True)
    zeros = torch.zeros(4, 6)
    optimizer.state[parameter] = {
        "step": torch.tensor(5.0),
        "exp_avg": zeros,
        "exp_avg_sq": zeros.clone(),
        "new": torch.ones(4, 6, dtype=torch.bool),
        "born": 5,
    }
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(parameter.sum()).backward()
    parameter.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    assert torch.equal(parameter.detach(), torch.ones(4, 6))


def test_hooks_of_a_step_run_once():
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # makes torch hook AdamW's step
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer, calls = GrownAdamW([parameter]), []
    optimizer.register_step_post_hook(lambda *args: calls.append(1))
    optimizer.step()
    assert calls == [1]


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"new_lr_peak": 0.0}, {"new_lr_steps": -1}], ids=str)
def test_options_without_a_meaning_are_refused(options):
    with pytest.raises(WarmstartError, match=next(iter(options))):
        GrownAdamW([torch.nn.Parameter(torch.ones(2))], **options)
