"""LoRA adapters grow with their base: one function before and after, the same ranks, the same config."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from hf_warmstart import GrowthConfig, GrowthRecord, WarmstartError, certify, grow, grow_checkpoint, plan_growth
from hf_warmstart.growth.layouts.probe import probe_config
from hf_warmstart.growth.plan import make_plan
from hf_warmstart.growth.precision import true_float64
from hf_warmstart.growth.zoo import source_of

from ..models import some_tokens, tiny_model

# peft 0.21 still calls names that transformers 5.23 has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),  # what peft says of adapted tied tables
]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(family: str = "llama", config: LoraConfig | None = None, dtype=torch.float64, **changes) -> PeftModel:
    """A tiny model with adapters that are not zero."""
    config = config or LoraConfig(r=3, lora_alpha=7, target_modules=list(ALL), task_type="CAUSAL_LM")
    base = tiny_model(family, **changes).to(dtype)
    base.config.dtype = dtype  # what Gemma rounds its multiplier of embeddings to
    return filled(get_peft_model(base, config, autocast_adapter_dtype=False))


def filled(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=some_tokens()).logits


def grown(parent: PeftModel, **growth) -> PeftModel:
    """The child, its tables of angles in float64 as the parent's are."""
    with true_float64():
        return grow(parent, **growth)


def difference(parent, child) -> float:
    with true_float64():
        before, after = logits(parent), logits(child)
    return float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize(
    ("family", "targets", "growth"),
    [
        ("llama", ALL, {"width": 2, "depth": 2}),
        ("llama", ALL, {"width": 1.5, "depth": 1.5, "width_operator": "uneven_copy"}),
        ("llama", ALL, {"width": 1.5, "width_operator": "reference_slice"}),
        ("llama", [*ALL, "embed_tokens", "lm_head"], {"width": 2, "width_operator": "exact_copy"}),
        ("gpt2", ["c_attn", "c_proj", "c_fc", "wte"], {"width": 2, "depth": 1.5}),
        ("gpt2", ["c_attn", "c_proj", "c_fc"], {"width": 1.5}),
        pytest.param(
            "gemma2", ["q_proj", "v_proj", "o_proj", "down_proj"], {"width": 2, "depth": 2}, marks=pytest.mark.slow
        ),
        pytest.param(
            "phi3", ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"], {"width": 1.5}, marks=pytest.mark.slow
        ),
        ("llama", ALL, {"num_key_value_heads": 4}),
        ("llama", ALL, {"head_dim": 32}),
    ],
    ids=str,
)
def test_parent_and_child_compute_one_function_with_and_without_adapters(family, targets, growth):
    with true_float64():
        config = LoraConfig(r=3, lora_alpha=7, target_modules=list(targets), fan_in_fan_out=family == "gpt2")
        parent = adapted(family, config)
    child = grown(parent, **growth)
    assert difference(parent, child) < 1e-10
    with parent.disable_adapter():
        without = logits(parent)
        assert not torch.allclose(without, logits(child))  # the adapters do something
        with child.disable_adapter():
            assert difference(parent, child) < 1e-10


def test_a_factor_that_a_layer_takes_back_goes_into_one_of_an_adapters_two():
    """Gemma 4 scales this projection by the width, so that its weight grows with a factor: B takes it, A must not too."""
    name = "model.per_layer_model_projection"
    model_class, config = source_of("causal-lm", "gemma4_text")
    config = probe_config(config)
    config.vocab_size = config.vocab_size_per_layer_input = 97
    config.dtype = torch.float64
    plan = make_plan(model_class, config, GrowthConfig(width=2))
    assert plan.tensor(f"{name}.weight").factor == pytest.approx(2**0.5)
    with true_float64():
        torch.manual_seed(0)
        base = model_class(config).double()
        parent = filled(get_peft_model(base, LoraConfig(r=3, target_modules=[name]), autocast_adapter_dtype=False))
    child = grown(parent, width=2)
    with parent.disable_adapter():
        without = logits(parent)
    assert not torch.allclose(without, logits(parent)) and difference(parent, child) < 1e-10


def test_the_base_grows_to_the_bits_that_it_would_have_alone_and_the_parent_stays():
    parent = adapted()
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    trained = {name for name, tensor in parent.named_parameters() if tensor.requires_grad}
    child = grow(parent, width=1.5, depth=2)
    alone = grow(tiny_model("llama").double(), width=1.5, depth=2)
    base = child.unload().state_dict()
    assert base.keys() == alone.state_dict().keys()
    assert all(torch.equal(base[name], tensor) for name, tensor in alone.state_dict().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in parent.state_dict().items())
    assert trained == {name for name, tensor in parent.named_parameters() if tensor.requires_grad}


def test_config_rank_scaling_names_and_what_trains_are_kept():
    parent = adapted(
        config=LoraConfig(r=3, lora_alpha=7, lora_dropout=0.1, target_modules=["q_proj"], use_rslora=True)
    )
    child = grow(parent, width=2, depth=2)
    given, kept = (model.peft_config["default"].to_dict() for model in (parent, child))
    differing = {name for name in given if given[name] != kept[name]}
    assert differing <= {"base_model_name_or_path", "revision"}
    assert type(child) is type(parent) and child.active_adapters == ["default"]
    assert {name for name, tensor in child.named_parameters() if tensor.requires_grad} == {
        f"base_model.model.model.layers.{k}.self_attn.q_proj.lora_{side}.default.weight"
        for k in range(4)
        for side in "AB"
    }
    layer = child.base_model.model.model.layers[3].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (3, 128) and layer.scaling["default"] == pytest.approx(7 / 3**0.5)
    assert GrowthRecord.all_of(child.config)[0].operators == ["reference_slice", "identity_blocks"]


def test_a_grown_adapter_is_saved_and_loaded_onto_the_grown_base(tmp_path):
    parent = adapted()
    child = grow(parent, width=2, depth=2)
    child.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], sorted(saved["target_modules"])) == (3, 7, sorted(ALL))
    base = grow(tiny_model("llama").double(), width=2, depth=2)
    again = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False).eval()
    assert torch.equal(logits(again), logits(child))


@pytest.mark.parametrize(
    "own",
    [
        {"layers_to_transform": [1]},
        {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"target_modules": r".*layers\.0\.self_attn\.[qk]_proj"},
    ],
    ids=str,
)
def test_configs_that_count_layers_follow_them_to_their_new_places(own, tmp_path):
    config = LoraConfig(**({"r": 3, "target_modules": list(ALL)} | own))
    with true_float64():
        parent = adapted(config=config)
    child = grown(parent, depth=2, width=1.5)
    assert difference(parent, child) < 1e-10
    ranks = {
        name: module.r["default"]
        for name, module in parent.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }
    for name, module in child.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            layer = name.split(".")[2]
            source = name.replace(f"layers.{layer}.", f"layers.{int(layer) // 2}.")  # blocks follow what they copy
            assert module.r["default"] == ranks[source]
    child.save_pretrained(tmp_path)
    with true_float64():
        base = grow(tiny_model("llama").double(), depth=2, width=1.5)
    again = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False).eval()
    assert torch.equal(logits(again), logits(child))


def test_several_adapters_and_modules_to_save_grow():
    with true_float64():
        parent = adapted(config=LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        parent.add_adapter("other", LoraConfig(r=5, target_modules=["down_proj"], lora_bias=False))
        filled(parent)
    child = grown(parent, width=1.5, depth=2)
    assert list(child.peft_config) == ["default", "other"]
    for name in ("default", "other"):
        parent.set_adapter(name)
        child.set_adapter(name)
        assert difference(parent, child) < 1e-10
    head = child.get_base_model().lm_head
    assert head.modules_to_save["default"].weight.shape == (97, 96)
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)


def test_dtypes_and_modes_are_the_parents():
    parent = adapted(dtype=torch.bfloat16)
    for name, tensor in parent.named_parameters():
        if "lora_" in name:
            tensor.data = tensor.data.float()
    parent.train()
    child = grow(parent, width=2)
    layer = child.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.dtype == torch.float32 and layer.base_layer.weight.dtype == torch.bfloat16
    assert child.training and child.get_base_model().training


def test_new_entries_of_a_grown_adapter_learn():
    child = grow(adapted(dtype=torch.float32), width=1.5, width_operator="reference_slice").train()
    ids = some_tokens()
    child(input_ids=ids, labels=ids).loss.backward()
    layer = child.get_base_model().model.layers[1].self_attn.o_proj
    assert layer.lora_B["default"].weight[64:].abs().max() == 0  # new entries of the residual stream
    assert layer.lora_B["default"].weight.grad[64:].abs().max() > 0


def test_merging_on_request_gives_the_class_that_was_wrapped():
    with true_float64():
        parent = adapted()
    child = grown(parent, width=2, merge_adapter=True)
    assert type(child) is type(parent.get_base_model()) and not any("lora" in name for name in child.state_dict())
    assert difference(parent, child) < 1e-10
    assert any("lora" in name for name in parent.state_dict())
    assert GrowthRecord.all_of(child.config)[0].parent == ""
    assert grow(tiny_model("llama"), width=2, merge_adapter=True).config.hidden_size == 128


def test_a_plan_and_a_certificate_are_the_bases():
    parent = adapted()
    assert str(plan_growth(parent, width=2)) == str(plan_growth(parent.get_base_model().config, width=2))
    assert certify(parent, width=2).exact


def test_adapters_that_are_no_sum_are_refused_and_can_be_merged():
    dora = adapted(config=LoraConfig(r=3, target_modules=["q_proj", "v_proj"], use_dora=True))
    with pytest.raises(
        WarmstartError, match=r"layers\.0\.self_attn\.q_proj is adapted by Dora.*v_proj.*merge_adapter=True"
    ):
        grow(dora, width=2)
    ia3 = get_peft_model(tiny_model("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(WarmstartError, match="'default' is of kind IA3.*merge_adapter=True"):
        grow(ia3, width=2)
    assert grow(ia3, width=2, merge_adapter=True).config.hidden_size == 128
    prompt = get_peft_model(
        tiny_model("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", num_layers=2)
    )
    with pytest.raises(WarmstartError, match="PROMPT_TUNING"):
        grow(prompt, width=2)
    with pytest.raises(WarmstartError, match="PROMPT_TUNING.*cannot be merged"):
        grow(prompt, width=2, merge_adapter=True)


def test_an_adapter_that_is_merged_in_is_refused():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(WarmstartError, match=r"merged in \(call unmerge_adapter\(\)\)"):
        grow(model, width=2)
    model.unmerge_adapter()
    assert grow(model, width=2).config.hidden_size == 128


def test_adapters_that_change_the_base_when_they_are_made_do_not_change_it_again():
    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa")
    parent = get_peft_model(tiny_model("llama"), config).eval()
    child = grow(parent, width=2)
    assert float((logits(child) - logits(parent)).abs().max()) < 1e-4
    assert child.peft_config["default"].init_lora_weights is True


def test_a_folder_with_an_adapter_alone_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    with pytest.raises(WarmstartError, match="holds an adapter, and not the base.*merge_and_unload"):
        grow_checkpoint(tmp_path / "adapter", tmp_path / "grown", width=2)
    assert not (tmp_path / "grown").exists()


def test_a_quantised_base_is_refused():
    parent = adapted()
    parent.get_base_model().config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(WarmstartError, match="quantised"):
        grow(parent, width=2)


def test_growing_twice_is_growing_the_grown():
    with true_float64():
        parent = adapted()
    child = grown(grown(parent, width=2), depth=2)
    assert difference(parent, child) < 1e-10
    assert len(GrowthRecord.all_of(child.config)) == 2


def test_a_tied_head_with_an_adapter_of_its_own_grows():
    with true_float64():
        config = LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])
        parent = adapted(config=config, tie_word_embeddings=True)
    assert difference(parent, grown(copy.deepcopy(parent), width=2)) < 1e-10
