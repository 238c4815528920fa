"""What the policies of a warm start do: optimizer state, schedule, data, learning rate."""

from __future__ import annotations

import copy
import json
import math
import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, default_data_collator
from transformers.trainer_callback import TrainerCallback, TrainerState

from hf_warmstart import WarmstartError, WarmstartTrainingArguments, grow, grow_checkpoint, plan_growth
from hf_warmstart.checkpoints.state.parent_state import GROWN_NAME, load_file
from hf_warmstart.errors import StateError
from hf_warmstart.growth.state import new_entries
from hf_warmstart.training import GrownAdamW
from hf_warmstart.training.data_position import ContinuedSampler, place_in_data

from ..models import some_tokens, tiny_model
from .conftest import COMMON, blocks, losses, stock_trainer, warmstart_trainer

STEPS = 5  # of the parent


def _parent_run(folder: Path, dataset: Dataset | None = None, steps: int = STEPS, **options) -> Path:
    """A small parent trained by the stock Trainer; its checkpoint."""
    model = tiny_model("llama", randomised=False, num_hidden_layers=1)
    stock_trainer(model, folder, steps, blocks(0, steps) if dataset is None else dataset, **options).train()
    return folder / f"checkpoint-{steps}"


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    """The checkpoint of an AdamW run."""
    return _parent_run(tmp_path_factory.mktemp("parent"))


def _child(parent: Path, width_operator: str = "perturbed_copy"):
    return grow(AutoModelForCausalLM.from_pretrained(parent), width=2, width_operator=width_operator)


def _run(parent: Path, folder: Path, steps: int = 4, **options):
    """A child trained from its parent's checkpoint."""
    trainer = warmstart_trainer(_child(parent), folder, steps, blocks(STEPS, steps), warmstart_from=parent, **options)
    trainer.train()
    return trainer


def _rates(trainer) -> list[float]:
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


def _log(folder: Path, evaluations: dict[int, float]) -> Path:
    """The log of a run with some evaluations."""
    folder.mkdir(parents=True, exist_ok=True)
    history = [{"step": step, "eval_loss": loss} for step, loss in evaluations.items()]
    TrainerState(log_history=history).save_to_json(str(folder / "trainer_state.json"))
    return folder


def _evaluated(parent: Path, folder: Path, loss: float) -> Path:
    """A copy of a checkpoint that has logged an evaluation."""
    folder.mkdir()
    for path in parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = json.loads((folder / "trainer_state.json").read_text())
    state["log_history"] += [{"step": 2, "eval_loss": loss + 1}, {"step": STEPS, "eval_loss": loss}]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


# -- schedule ---------------------------------------------------------------------------------------------------------


def _cosine(step: int, horizon: int, warmup: int = 5) -> float:
    if step < warmup:
        return COMMON["learning_rate"] * step / warmup
    return COMMON["learning_rate"] * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (horizon - warmup)))


def test_equal_loss_starts_at_the_step_that_is_asked_for(parent, tmp_path):
    trainer = _run(parent, tmp_path, schedule_policy="equal_loss", equal_loss_step=12)
    assert _rates(trainer) == pytest.approx([_cosine(12 + k, 16) for k in range(4)])


def test_equal_loss_finds_the_step_in_the_log_of_a_run_from_scratch(parent, tmp_path):
    """Between steps 10 and 40 the loss falls by 1 over the logarithm of 4; half of it falls by step 20. Evaluations
    that did not improve say nothing."""
    run = _log(tmp_path / "scratch" / "checkpoint-40", {10: 4.0, 15: 4.5, 40: 3.0}).parent
    checkpoint = _evaluated(parent, tmp_path / "checkpoint-5", 3.5)
    trainer = _run(checkpoint, tmp_path / "out", schedule_policy="equal_loss", equal_loss_run=str(run))
    assert _rates(trainer) == pytest.approx([_cosine(20 + k, 24) for k in range(4)])


@pytest.mark.parametrize(
    ("loss", "evaluations", "message"),
    [
        (None, {10: 4.0, 40: 3.0}, "logs none"),
        (2.5, {10: 4.0, 40: 3.0}, "lies outside"),
        (4.5, {10: 4.0, 40: 3.0}, "lies outside"),
        (3.5, {}, "give no step"),
        (3.5, None, "holds no trainer_state.json"),
    ],
)
def test_equal_loss_without_an_answer_is_refused(parent, tmp_path, loss, evaluations, message):
    checkpoint = parent if loss is None else _evaluated(parent, tmp_path / "checkpoint-5", loss)
    run = tmp_path / "scratch" if evaluations is None else _log(tmp_path / "scratch", evaluations)
    with pytest.raises(StateError, match=message):
        _run(checkpoint, tmp_path / "out", schedule_policy="equal_loss", equal_loss_run=str(run))


def test_a_ramp_rises_to_the_schedule_and_resumes_inside(parent, tmp_path):
    options = {"schedule_ramp_steps": 4, "save_steps": 2}
    whole = _run(parent, tmp_path / "whole", steps=6, **options)
    expected = [_cosine(STEPS + k, STEPS + 6) * min(1, k / 4) for k in range(6)]
    assert _rates(whole) == pytest.approx(expected)
    resumed = warmstart_trainer(
        _child(parent), tmp_path / "resumed", 6, blocks(STEPS, 6), warmstart_from=parent, **options
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert _rates(resumed) == _rates(whole)
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize(("fraction", "decayed"), [(0.5, 5), (1.0, 10)])
def test_the_decay_takes_its_share_of_this_runs_steps(parent, tmp_path, fraction, decayed):
    trainer = _run(
        parent, tmp_path, steps=10, lr_scheduler_type="warmup_stable_decay", decay_fraction=fraction, max_grad_norm=0.0
    )
    rates = [rate / COMMON["learning_rate"] for rate in _rates(trainer)]
    expected = [0.5 * (1 + math.cos(math.pi * k / decayed)) for k in range(decayed)]
    assert rates == pytest.approx([1.0] * (10 - decayed) + expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_fraction": 0.5}, "warmup_stable_decay"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "no position"),
        (
            {
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "eval_strategy": "steps",
                "schedule_policy": "rewarm",
                "schedule_ramp_steps": 2,
            },
            "cannot be ramped",
        ),
    ],
)
def test_what_a_schedule_cannot_do_is_refused(parent, tmp_path, options, message):
    trainer = warmstart_trainer(
        _child(parent), tmp_path, 2, blocks(STEPS, 2), parent, eval_dataset=blocks(STEPS, 1), **options
    )
    with pytest.raises(WarmstartError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule_policy": "later"}, "schedule_policy='later'"),
        ({"schedule_policy": "equal_loss"}, "neither"),
        ({"schedule_policy": "equal_loss", "equal_loss_step": 3, "equal_loss_run": "runs"}, "one of them"),
        ({"equal_loss_step": 3}, "other policies none"),
        ({"schedule_ramp_steps": -1}, "schedule_ramp_steps"),
        ({"decay_fraction": 0.0}, "decay_fraction"),
        ({"decay_fraction": 1.5}, "decay_fraction"),
        ({"data_policy": "again"}, "data_policy"),
        ({"learning_rate_transfer": "sp"}, "learning_rate_transfer"),
        ({"state_policy": "keep"}, "state_policy"),
        ({"parent_coordinates": True, "learning_rate_transfer": "mup"}, "fixes every rate"),
        ({"parent_coordinates": True, "state_policy": "asymmetric_reset"}, "nothing is new"),
    ],
    ids=str,
)
def test_options_that_say_nothing_or_too_much_are_refused(tmp_path, options, message):
    with pytest.raises(WarmstartError, match=message):
        WarmstartTrainingArguments(str(tmp_path), use_cpu=True, **options)


# -- data -------------------------------------------------------------------------------------------------------------

EXAMPLES = 18  # in batches of 4: each pass of a run ends with one of 2


class Seen(list):
    """A collator that notes what it was given."""

    def __call__(self, features):
        self.append([tuple(feature["input_ids"]) for feature in features])
        return default_data_collator(features)

    def examples(self, number: int) -> list:
        """The first examples, in order: a loader fetches a batch more than a run uses."""
        return list(chain.from_iterable(self))[:number]


def _data(number: int = EXAMPLES) -> Dataset:
    ids = some_tokens(number, 16, seed=11).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("order", ["random", "sequential"])
@pytest.mark.parametrize("steps", [3, 5, 7], ids=["inside the first pass", "between passes", "in the second pass"])
def test_continued_data_are_the_parents_uninterrupted_order(tmp_path, order, steps):
    options = {"train_sampling_strategy": order}
    model = tiny_model("llama", randomised=False, num_hidden_layers=1)
    uninterrupted, continued = Seen(), Seen()
    trainer = stock_trainer(model, tmp_path / "base", 14, _data(), save_steps=steps, **options)
    trainer.data_collator = uninterrupted
    trainer.train()
    base = tmp_path / "base" / f"checkpoint-{steps}"
    child = warmstart_trainer(_child(base), tmp_path / "out", 6, _data(), base, data_policy="continue", **options)
    child.data_collator = continued
    child.train()
    taken = steps // 5 * EXAMPLES + steps % 5 * 4
    assert continued.examples(24) == uninterrupted.examples(taken + 24)[taken:]


def test_restarted_data_are_the_parents_first_ones(parent, tmp_path):
    seen = Seen()
    child = warmstart_trainer(_child(parent), tmp_path, 2, _data(), parent)
    child.data_collator = seen
    child.train()
    assert seen.examples(8) == [tuple(row) for row in _data()["input_ids"][:8]]


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_a_resume_inside_continued_data_equals_the_uninterrupted_run(tmp_path, order):
    base = _parent_run(tmp_path / "base", _data(), steps=3, train_sampling_strategy=order)
    options = {"data_policy": "continue", "train_sampling_strategy": order, "save_steps": 4}
    whole = warmstart_trainer(_child(base), tmp_path / "whole", 7, _data(), base, **options)
    whole.train()
    resumed = warmstart_trainer(_child(base), tmp_path / "resumed", 7, _data(), base, **options)
    seen = Seen()
    resumed.data_collator = seen
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    assert seen


def test_a_stream_goes_on_after_what_the_parent_saw_and_resumes(tmp_path):
    data = _data(80)
    base = _parent_run(tmp_path / "base", data.to_iterable_dataset(), steps=3)
    options = {"data_policy": "continue", "save_steps": 4}
    seen = Seen()
    child = warmstart_trainer(_child(base), tmp_path / "whole", 6, data.to_iterable_dataset(), base, **options)
    child.data_collator = seen
    child.train()
    assert seen.examples(24) == [tuple(row) for row in data["input_ids"][12:36]]
    resumed = warmstart_trainer(_child(base), tmp_path / "resumed", 6, data.to_iterable_dataset(), base, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(resumed) == losses(child)


def _generation(parent: Path, folder: Path, dataset, steps: int, **options) -> list:
    """A child that continues its parent's data; the examples that it took."""
    seen = Seen()
    child = warmstart_trainer(_child(parent), folder, steps, dataset, parent, data_policy="continue", **options)
    child.data_collator = seen
    child.train()
    return seen.examples(4 * steps * options.get("gradient_accumulation_steps", 1))


def test_a_child_of_a_child_goes_on_where_the_child_stopped(tmp_path):
    data = _data(40)
    base = _parent_run(tmp_path / "base", data, steps=2, train_sampling_strategy="sequential")
    first = _generation(base, tmp_path / "first", data, 3, train_sampling_strategy="sequential")
    second = _generation(
        tmp_path / "first" / "checkpoint-3", tmp_path / "second", data, 6, train_sampling_strategy="sequential"
    )
    rows = [tuple(row) for row in data["input_ids"]]
    assert first + second == (rows[8:] + rows)[:36]


def test_a_child_of_a_child_goes_on_in_the_stream_and_a_later_pass_is_whole(tmp_path):
    data = _data(40)
    base = _parent_run(tmp_path / "base", data.to_iterable_dataset(), steps=2)
    first = _generation(base, tmp_path / "first", data.to_iterable_dataset(), 2, gradient_accumulation_steps=2)
    parent = tmp_path / "first" / "checkpoint-2"
    second = _generation(parent, tmp_path / "second", data.to_iterable_dataset(), 6)
    rows = [tuple(row) for row in data["input_ids"]]
    assert first == rows[16:32]  # the parent is taken to have accumulated as this run does
    taken = rows.index(first[-1]) + 1
    assert second == (rows[taken:] + rows)[:24]


def test_a_stream_that_ends_before_the_parents_place_is_refused(tmp_path):
    base = _parent_run(tmp_path / "base", _data(40).to_iterable_dataset(), steps=2)
    with pytest.raises(StateError, match="The stream ends within the 8 examples"):
        _generation(base, tmp_path / "child", _data(8).to_iterable_dataset(), 2)


class _Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(_data(40).to_list())


def test_a_stream_that_cannot_skip_is_refused(parent, tmp_path):
    trainer = warmstart_trainer(_child(parent), tmp_path, 2, _Stream(), parent, data_policy="continue")
    with pytest.raises(WarmstartError, match=r"skips 20 examples, and _Stream has no skip\(\)"):
        trainer.train()


def test_an_order_that_cannot_be_repeated_is_refused(parent, tmp_path):
    trainer = warmstart_trainer(
        _child(parent), tmp_path, 2, _data(), parent, data_policy="continue", train_sampling_strategy="group_by_length"
    )
    with pytest.raises(WarmstartError, match="LengthGroupedSampler"):
        trainer.train()


def test_the_place_in_the_data_is_where_the_last_whole_step_ended():
    assert place_in_data({"epoch": 3 / 5, "train_batch_size": 4}, 18) == (0, 12)
    assert place_in_data({"epoch": 2.0, "train_batch_size": 4}, 18) == (2, 0)
    assert place_in_data({"epoch": 1 + 4 / 5, "train_batch_size": 4}, 18) == (1, 16)
    assert place_in_data({"epoch": 1 / 3, "train_batch_size": 4}, 20, processes=2) == (0, 8)
    assert place_in_data({"epoch": 0.5}, 18) == (0, 9)
    assert place_in_data({"epoch": 4 / 7, "train_batch_size": 4}, 30, drop_last=True) == (0, 16)
    with pytest.raises(StateError, match="has no epoch"):
        place_in_data({}, 18)


def test_passes_of_a_continued_sampler_join_without_a_gap():
    sampler = ContinuedSampler(range(5), passes=0, offset=2)
    assert list(sampler) == [2, 3, 4, 0, 1] and len(sampler) == 5


# -- learning rate ----------------------------------------------------------------------------------------------------


def test_mup_divides_the_rate_of_a_matrix_by_the_growth_of_what_it_reads(parent, tmp_path):
    trainer = _run(parent, tmp_path, steps=2, learning_rate_transfer="mup")
    rate, decay = COMMON["learning_rate"], COMMON["weight_decay"]
    found = {
        name: (group["initial_lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for name in group["param_names"]
    }
    layer = "model.layers.0."
    assert found[layer + "self_attn.q_proj.weight"] == pytest.approx((rate / 2, decay * 2))
    assert found[layer + "mlp.down_proj.weight"] == pytest.approx((rate / 2, decay * 2))
    assert found["lm_head.weight"] == pytest.approx((rate / 2, decay * 2))
    assert found["model.embed_tokens.weight"] == pytest.approx((rate, decay))
    assert found[layer + "input_layernorm.weight"] == pytest.approx((rate, 0.0))
    assert set(found) == {name for name, _ in trainer.model.named_parameters()}
    assert len(trainer.optimizer.param_groups) == 3
    scheduled = {group["lr"] / group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert max(scheduled) == pytest.approx(min(scheduled))


def test_a_run_with_mup_resumes_and_a_stock_trainer_refuses_its_groups(parent, tmp_path):
    options = {"learning_rate_transfer": "mup", "save_steps": 2}
    whole = _run(parent, tmp_path / "whole", **options)
    resumed = warmstart_trainer(_child(parent), tmp_path / "resumed", 4, blocks(STEPS, 4), parent, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    stock = stock_trainer(_child(parent), tmp_path / "stock", 4, blocks(STEPS, 4))
    with pytest.raises(ValueError, match="parameter groups"):
        stock.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_mup_is_a_rule_for_adam(parent, tmp_path):
    with pytest.raises(StateError, match="not for SGD"):
        _run(parent, tmp_path, learning_rate_transfer="mup", optim="sgd", state_policy="reset")


# -- optimizer state --------------------------------------------------------------------------------------------------

ASYMMETRIC = {"state_policy": "asymmetric_reset", "new_lr_peak": 1.3, "new_lr_steps": 3}


class _AtTheStart(TrainerCallback):
    """Keeps the optimizer's state from before the first step."""

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        self.state = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}


def test_asymmetric_reset_keeps_the_first_copies_and_starts_the_rest_anew(parent, tmp_path):
    trainer = warmstart_trainer(_child(parent), tmp_path, 1, blocks(STEPS, 1), parent, **ASYMMETRIC)
    trainer.add_callback(start := _AtTheStart())
    trainer.train()
    assert type(trainer.optimizer.optimizer) is GrownAdamW
    assert trainer.optimizer.param_groups[0]["new_lr_peak"] == 1.3
    name = "model.layers.0.self_attn.q_proj.weight"
    entry, before = start.state[name], trainer.parent_state.optimizer["state"][name]
    assert float(entry["born"]) == float(entry["step"]) == STEPS
    assert entry["new"].shape == (128, 128) and int((~entry["new"]).sum()) == 64 * 64
    for moment in ("exp_avg", "exp_avg_sq"):
        assert not entry[moment][entry["new"]].any()
        factors = entry[moment][~entry["new"]].view(64, 64) / before[moment]
        torch.testing.assert_close(factors, factors[:1, :1].expand_as(factors), rtol=1e-3, atol=0)


def test_a_run_under_asymmetric_reset_resumes_bit_for_bit(parent, tmp_path):
    whole = _run(parent, tmp_path / "whole", steps=5, save_steps=2, **ASYMMETRIC)
    resumed = warmstart_trainer(_child(parent), tmp_path / "resumed", 5, blocks(STEPS, 5), parent, **ASYMMETRIC)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    for a, b in pairs:
        assert torch.equal(a, b)
        for key, value in whole.optimizer.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.optimizer.state[b][key])), key
    carried = _run(parent, tmp_path / "carried", steps=5)
    assert losses(carried) != losses(whole)


def test_only_the_same_policy_of_ours_resumes_asymmetric_reset(parent, tmp_path):
    _run(parent, tmp_path / "run", steps=2, **ASYMMETRIC)
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    stock = stock_trainer(_child(parent), tmp_path / "stock", 4, blocks(STEPS, 4))
    with pytest.raises(Exception, match="OnlyWarmstartTrainerCanResumeAStateWithTwoAges"):
        stock.train(resume_from_checkpoint=checkpoint)
    ours = warmstart_trainer(_child(parent), tmp_path / "ours", 4, blocks(STEPS, 4), parent, state_policy="carry")
    with pytest.raises(StateError, match="written under state_policy='asymmetric_reset'"):
        ours.train(resume_from_checkpoint=checkpoint)


@pytest.fixture(scope="module")
def two_ages(parent, tmp_path_factory) -> Path:
    """The checkpoint of a grown run under asymmetric_reset."""
    folder = tmp_path_factory.mktemp("two_ages")
    _run(parent, folder, steps=2, **ASYMMETRIC)
    return folder / "checkpoint-2"


def _by_name(saved: dict) -> dict:
    return {
        name: saved["state"][number]
        for group in saved["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
    }


def test_a_checkpoint_with_two_ages_is_grown_again_as_one_of_old_entries(two_ages, tmp_path):
    grow_checkpoint(two_ages, tmp_path / "grown", depth=2)
    before = _by_name(torch.load(two_ages / GROWN_NAME, weights_only=True))
    after = _by_name(torch.load(tmp_path / "grown" / "optimizer.pt", weights_only=True))
    assert {frozenset(entry) for entry in after.values()} == {frozenset({"step", "exp_avg", "exp_avg_sq"})}
    name = "model.norm.weight"
    assert torch.equal(after[name]["exp_avg"], before[name]["exp_avg"])
    assert float(after[name]["step"]) == STEPS + 2
    child = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    stock = stock_trainer(child, tmp_path / "stock", 4, blocks(STEPS, 4))
    stock.train(resume_from_checkpoint=str(tmp_path / "grown"))
    assert stock.state.global_step == 4


def test_a_checkpoint_with_two_ages_is_grown_with_two_ages_again(two_ages, parent, tmp_path):
    grow_checkpoint(two_ages, tmp_path / "grown", depth=2, state_policy="asymmetric_reset")
    state = _by_name(torch.load(tmp_path / "grown" / GROWN_NAME, weights_only=True))
    assert not state["model.layers.0.self_attn.q_proj.weight"]["new"].any()
    assert {float(entry["born"]) for entry in state.values()} == {STEPS + 2.0}
    _assert_resumes_under_two_ages(tmp_path / "grown", tmp_path / "ours")


def test_a_stock_checkpoint_that_is_grown_with_two_ages_resumes(parent, tmp_path):
    grow_checkpoint(parent, tmp_path / "grown", width=2, state_policy="asymmetric_reset")
    _assert_resumes_under_two_ages(tmp_path / "grown", tmp_path / "ours")


def _assert_resumes_under_two_ages(grown: Path, folder: Path) -> None:
    child = AutoModelForCausalLM.from_pretrained(grown)
    ours = warmstart_trainer(child, folder, STEPS + 4, blocks(0, STEPS + 4), **ASYMMETRIC)
    ours.train(resume_from_checkpoint=str(grown))
    assert ours.state.global_step == STEPS + 4


@pytest.mark.parametrize("policy", ["carry", "asymmetric_reset"])
def test_a_run_starts_warm_from_a_checkpoint_with_two_ages(two_ages, tmp_path, policy):
    child = grow(AutoModelForCausalLM.from_pretrained(two_ages), depth=2)
    start = _AtTheStart()
    trainer = warmstart_trainer(child, tmp_path, 1, blocks(STEPS + 2, 1), two_ages, state_policy=policy)
    trainer.add_callback(start)
    trainer.train()
    entry = start.state["model.layers.0.self_attn.q_proj.weight"]
    assert float(entry["step"]) == STEPS + 2
    assert ("new" in entry) == (policy == "asymmetric_reset") and not entry.get("new", torch.zeros(1)).any()


def test_a_file_that_holds_more_than_numbers_is_refused_without_advice_to_trust_it(two_ages, tmp_path):
    with pytest.raises(StateError, match="optimizer.pt .* more than plain tensors and numbers") as refused:
        load_file(two_ages / "optimizer.pt")
    assert "weights_only" not in str(refused.value) and "safe_globals" not in str(refused.value)


# -- the policy where none is asked for -------------------------------------------------------------------------------


def _started(parent: Path, folder: Path, width_operator: str = "reference_slice", **options):
    child = _child(parent, width_operator)
    trainer = warmstart_trainer(child, folder, 3, blocks(STEPS, 3), parent, **{"save_steps": 2, **options})
    trainer.train()
    return trainer


def _kind(trainer) -> type:
    return type(trainer.optimizer.optimizer)


@pytest.mark.parametrize(
    ("width_operator", "same_as", "other"),
    [("reference_slice", "asymmetric_reset", "carry"), ("perturbed_copy", "carry", "asymmetric_reset")],
)
def test_fresh_units_start_anew_and_copies_take_the_state_along(parent, tmp_path, width_operator, same_as, other):
    unsaid = _started(parent, tmp_path / "unsaid", width_operator)
    same, different = (
        _started(parent, tmp_path / policy, width_operator, state_policy=policy) for policy in (same_as, other)
    )
    assert losses(unsaid) == losses(same) != losses(different)
    assert _kind(unsaid) is _kind(same) is not _kind(different)
    own = json.loads((tmp_path / "unsaid" / "checkpoint-2" / "warmstart_state.json").read_text())
    assert own["state_policy"] == same_as


@pytest.mark.parametrize(("policy", "low", "high"), [("auto", 0.5, 2.0), ("carry", 0.0, 0.2)])
def test_fresh_units_move_from_the_first_steps_on_as_old_ones_do(parent, tmp_path, policy, low, high):
    """Carried, they have the old ones' second moments beside gradients that are nearly zero at first, and stand still."""
    child = _child(parent, "reference_slice")
    name = "model.layers.0.mlp.gate_proj.weight"
    plan = plan_growth(AutoModelForCausalLM.from_pretrained(parent), width=2, width_operator="reference_slice")
    new = new_entries(plan, plan.tensor(name))
    before = child.get_parameter(name).detach().clone()
    options = {"weight_decay": 0.0, "state_policy": policy}
    warmstart_trainer(child, tmp_path, 3, blocks(STEPS, 3), parent, **options).train()
    moved = (child.get_parameter(name).detach() - before).abs()
    assert low < moved[new].median() / moved[~new].median() < high


@pytest.mark.parametrize("started", ["auto", "carry"])
def test_a_run_goes_on_as_it_was_started_where_nothing_is_said(parent, tmp_path, started):
    whole = _started(parent, tmp_path / "whole", state_policy=started)
    child = _child(parent, "reference_slice")
    resumed = warmstart_trainer(child, tmp_path / "resumed", 3, blocks(STEPS, 3), parent)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert _kind(resumed) is _kind(whole) and losses(resumed) == losses(whole)


def test_a_parent_whose_state_has_two_ages_starts_fresh_units_anew_as_any_other(two_ages, tmp_path):
    child = grow(AutoModelForCausalLM.from_pretrained(two_ages), width=2, width_operator="reference_slice")
    trainer = warmstart_trainer(child, tmp_path, 1, blocks(STEPS + 2, 1), two_ages)
    trainer.train()
    assert _kind(trainer) is GrownAdamW


@pytest.mark.parametrize(
    ("of_parent", "of_child"),
    [
        ({"optim": "sgd", "optim_args": "momentum=0.9"}, {"optim": "sgd", "optim_args": "momentum=0.9"}),
        ({}, {"train_only": "new"}),
    ],
)
def test_what_two_ages_do_not_go_with_is_carried(tmp_path, of_parent, of_child):
    parent = _parent_run(tmp_path / "parent", **of_parent)
    unsaid, carried = (
        _started(parent, tmp_path / policy, state_policy=policy, **of_child) for policy in ("auto", "carry")
    )
    assert losses(unsaid) == losses(carried)
    assert _kind(unsaid) is _kind(carried) is not GrownAdamW


def test_a_parent_that_kept_amsgrads_maximum_is_carried(parent, tmp_path):
    kept = tmp_path / "parent" / parent.name
    shutil.copytree(parent, kept)
    saved = torch.load(kept / "optimizer.pt", weights_only=True)
    for entry in saved["state"].values():
        entry["max_exp_avg_sq"] = entry["exp_avg_sq"].clone()
    torch.save(saved, kept / "optimizer.pt")
    unsaid = _started(kept, tmp_path / "unsaid")
    assert _kind(unsaid) is torch.optim.AdamW
    with pytest.raises(StateError, match="AMSGrad"):
        _started(kept, tmp_path / "asked", state_policy="asymmetric_reset")


def test_an_optimizer_that_is_given_is_used_as_it_is(parent, tmp_path):
    child = _child(parent, "reference_slice")
    trainer = warmstart_trainer(child, tmp_path, 1, blocks(STEPS, 1), parent)
    trainer.optimizer = torch.optim.AdamW(child.parameters(), lr=1e-3)
    trainer.train()
    assert _kind(trainer) is torch.optim.AdamW


def test_a_run_without_a_parent_is_a_stock_run(parent, tmp_path):
    trainer = warmstart_trainer(_child(parent, "reference_slice"), tmp_path, 1, blocks(STEPS, 1))
    trainer.train()
    assert _kind(trainer) is torch.optim.AdamW


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["carry", "reset"])
def test_a_stock_trainer_resumes_a_run_under_carry_and_reset(parent, tmp_path, policy):
    """With a schedule of the run's own: that of a stock trainer lasts as long as its steps."""
    whole = _run(parent, tmp_path / "whole", save_steps=2, state_policy=policy, schedule_policy="rewarm")
    stock = stock_trainer(_child(parent), tmp_path / "stock", 4, blocks(STEPS, 4))
    stock.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(stock) == losses(whole)
    for a, b in zip(whole.model.parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_asymmetric_reset_is_refused_with_an_optimizer_that_keeps_one_count(parent, tmp_path):
    with pytest.raises(WarmstartError, match="optim='sgd' is none"):
        _run(parent, tmp_path / "sgd", optim="sgd", **ASYMMETRIC)
    child = _child(parent)
    given = torch.optim.AdamW(child.parameters())
    trainer = warmstart_trainer(child, tmp_path / "given", 2, blocks(STEPS, 2), parent, **ASYMMETRIC)
    trainer.optimizer = given
    with pytest.raises(StateError, match="AdamW does not keep"):
        trainer.train()


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adafactor", "learning_rate": 3e-4},
        {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 3e-2},
    ],
    ids=["adafactor", "sgd"],
)
def test_other_optimizers_follow_the_parent_through_the_trainer_and_only_with_their_state(tmp_path, options):
    model = tiny_model("llama", randomised=False, num_hidden_layers=1)
    whole = stock_trainer(model, tmp_path / "base", 30, blocks(0, 30), save_steps=10, **options)
    whole.train()
    base = tmp_path / "base" / "checkpoint-10"
    worst = {}
    for policy in ("carry", "reset"):
        child = warmstart_trainer(
            _child(base, "exact_copy"),
            tmp_path / policy,
            20,
            blocks(10, 20),
            base,
            parent_coordinates=True,
            state_policy=policy,
            **options,
        )
        with pytest.warns(UserWarning, match="exact_copy"):
            child.train()
        worst[policy] = max(abs(a - b) for a, b in zip(losses(whole)[10:], losses(child), strict=True))
    assert worst["carry"] < 1e-5 and worst["carry"] < 0.02 * worst["reset"]
