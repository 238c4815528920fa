"""What `grow` promises of its result, for real models in their own dtype."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_warmstart import GrowthConfig, GrowthRecord, grow, plan_growth
from hf_warmstart.growth import grow as grow_module
from hf_warmstart.growth.plan import make_plan
from hf_warmstart.growth.source import digest

from ..models import FAMILIES, some_tokens, tiny_config, tiny_model


def _logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=some_tokens() if ids is None else ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_is_the_same_class_and_function_and_the_parent_is_untouched(family):
    parent = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    config = copy.deepcopy(parent.config.to_dict())
    child = grow(parent, width=1.5, depth=2)
    assert type(child) is type(parent)
    assert child.config.hidden_size == 96 and child.config.num_hidden_layers == 2 * parent.config.num_hidden_layers
    expected = _logits(parent)
    assert (_logits(child) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert parent.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in parent.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_give_the_same_logits_with_an_empty_report(family, tmp_path):
    child = grow(tiny_model(family), width=1.5, depth=1.5)
    child.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(_logits(loaded.eval()), _logits(child))
    assert type(loaded) is type(child)
    assert GrowthRecord.all_of(loaded.config) == GrowthRecord.all_of(child.config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_kept(dtype):
    parent = tiny_model("llama").to(dtype)
    child = grow(parent, width=2)
    assert {p.dtype for p in child.parameters()} == {dtype}
    assert child.dtype == dtype and _logits(child).dtype == dtype


def test_whole_factors_are_exact_copies_in_bfloat16():
    """Factors of an even copy are powers of two, so that no bit is lost."""
    parent = tiny_model("llama").to(torch.bfloat16)
    child = grow(parent, width=2, width_operator="exact_copy")
    weight, grown = parent.model.layers[0].mlp.up_proj.weight, child.model.layers[0].mlp.up_proj.weight
    assert torch.equal(grown[: weight.shape[0], : weight.shape[1]].float() * 2, weight.float())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training):
    assert grow(tiny_model("gpt2").train(training), width=2).training is training


@pytest.mark.parametrize(("family", "tied"), [("gpt2", True), ("smollm3", True), ("gemma2", True), ("llama", False)])
def test_ties_are_kept(family, tied):
    child = grow(tiny_model(family), width=2)
    head, table = child.get_output_embeddings().weight, child.get_input_embeddings().weight
    assert (head.data_ptr() == table.data_ptr()) is tied


def test_frozen_parameters_stay_frozen():
    parent = tiny_model("llama")
    parent.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    child = grow(parent, width=2, depth=2)
    frozen = {name for name, p in child.named_parameters() if not p.requires_grad}
    assert frozen == {f"model.layers.{k}.mlp.up_proj.weight" for k in (2, 3)}


@pytest.mark.parametrize("operator", ["perturbed_copy", "reference_slice", "szp"])
def test_the_seed_decides_every_bit_and_global_randomness_nothing(operator):
    parent = tiny_model("llama")
    torch.manual_seed(1)
    first = grow(parent, width=1.5, width_operator=operator).state_dict()
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = grow(parent, width=1.5, width_operator=operator).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    other = grow(parent, width=1.5, width_operator=operator, seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], other["model.layers.0.mlp.up_proj.weight"])


def test_a_tensor_can_be_made_alone():
    parent = tiny_model("llama")
    plan = plan_growth(parent, width=1.5, width_operator="reference_slice")
    child = grow(parent, width=1.5, width_operator="reference_slice")
    name = "model.layers.1.self_attn.q_proj.weight"
    alone = plan.tensor(name).weight(parent.state_dict()[plan.source_name(name)])
    assert torch.equal(alone, child.state_dict()[name])


def test_the_record_rebuilds_the_model_bit_for_bit(tmp_path):
    parent = tiny_model("qwen3")
    child = grow(parent, growth_factor=2, depth=1.5)
    child.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["warmstart"][-1]
    assert record["parent_digest"] == digest(parent)
    assert record["exact"] and record["parameters"][1] == sum(p.numel() for p in child.parameters())
    again = grow(parent, GrowthConfig.from_dict(record["growth_config"]))
    assert digest(again) == digest(child)


def test_a_plan_is_rebuilt_from_the_record_alone():
    parent = tiny_model("gpt2")
    child = grow(parent, width=1.5, depth=2)
    record = GrowthRecord.all_of(child.config)[-1]
    config = record.parent_config(child.config)
    assert config.to_dict() == parent.config.to_dict() | {"warmstart": [], "architectures": ["GPT2LMHeadModel"]}
    plan = make_plan(type(child), config, GrowthConfig.from_dict(record.growth_config))
    assert plan.target_config.hidden_size == child.config.hidden_size
    assert plan.changes == record.changes


def test_growths_follow_each_other():
    parent = tiny_model("llama")
    child = grow(grow(parent, width=2), depth=2)
    records = GrowthRecord.all_of(child.config)
    assert [set(r.changes) >= {"hidden_size"} for r in records] == [True, False]
    expected = _logits(parent)
    assert (_logits(child) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_tags_and_generation_config_come_along():
    parent = tiny_model("llama")
    parent.generation_config.max_new_tokens = 7
    child = grow(parent, width=2, depth=2)
    assert child.generation_config.max_new_tokens == 7
    assert set(child.model_tags) >= {"hf_warmstart", "reference_slice", "identity_blocks"}


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
def test_a_grown_model_generates_with_its_cache_what_its_parent_generates(family):
    parent = tiny_model(family)
    child = grow(parent, width=2)
    prompt = some_tokens(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    assert torch.equal(parent.generate(prompt, **options), child.generate(prompt, **options))


def test_per_layer_lists_follow_the_layers():
    parent = tiny_model("gemma2", num_hidden_layers=4)
    child = grow(parent, depth=1.5)
    kinds = parent.config.layer_types
    source = plan_growth(parent, depth=1.5).layer_map.source
    assert child.config.layer_types == [kinds[k] for k in source]
    child = grow(tiny_model("smollm3"), depth=2)
    assert len(child.config.no_rope_layers) == len(child.config.layer_types) == 8


def test_a_function_that_moved_is_refused(monkeypatch):
    """The spot check on the real model, in its own dtype."""
    parent = tiny_model("llama")
    whole = grow_module.apply_plan

    def broken(model, plan):
        child = whole(model, plan)
        child.model.norm.weight.mul_(1.5)
        return child

    monkeypatch.setattr(grow_module, "apply_plan", torch.no_grad()(broken))
    with pytest.raises(grow_module.ExactnessError, match="differs from its parent"):
        grow(parent, width=2)


def test_the_plan_prints_as_a_table_and_counts_truly():
    parent = tiny_model("llama")
    plan = plan_growth(parent, width=2, depth=1.5)
    child = grow(parent, width=2, depth=1.5)
    assert plan.parameters_before == parent.num_parameters()
    assert plan.parameters_after == child.num_parameters()
    assert plan.tensor_bytes == 4 * child.num_parameters()
    assert plan.peak_memory_bytes > plan.tensor_bytes
    text = str(plan)
    assert "hidden_size" in text and "64 -> 128" in text and "exact" in text


def test_planning_a_large_model_allocates_no_weights():
    plan = plan_growth(LlamaConfig(num_key_value_heads=8), width=2)
    assert plan.parameters_after > 20e9


def test_a_target_config_gives_the_sizes():
    parent = tiny_model("llama")
    target = tiny_config("llama", hidden_size=128, num_attention_heads=8, num_key_value_heads=4, intermediate_size=200)
    child = grow(parent, target)
    assert child.config.intermediate_size == 200 and child.config.num_attention_heads == 8
    child = grow(parent, target, width_operator="exact_copy", seed=3)
    assert GrowthRecord.all_of(child.config)[-1].growth_config["width_operator"] == "exact_copy"


def test_the_parents_commit_is_recorded_where_the_cache_holds_only_one(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    parent = tiny_model("llama")
    parent.config._name_or_path = "org/tiny"
    snapshots = tmp_path / "models--org--tiny" / "snapshots"
    assert GrowthRecord.all_of(grow(parent, width=2).config)[-1].revision is None
    (snapshots / ("a" * 40)).mkdir(parents=True)
    assert GrowthRecord.all_of(grow(parent, width=2).config)[-1].revision == "a" * 40
    (snapshots / ("b" * 40)).mkdir()
    assert GrowthRecord.all_of(grow(parent, width=2).config)[-1].revision is None


def test_records_hold_no_path(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "runs" / "base")
    parent = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "base")
    child = grow(parent, parent.config.__class__(**(parent.config.to_dict() | {"intermediate_size": 200})))
    record = json.dumps(GrowthRecord.all_of(child.config)[-1].to_dict())
    assert str(tmp_path) not in record and '"parent": "base"' in record
