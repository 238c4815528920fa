"""`GrowthConfig` and the sizes that follow from it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig

from hf_warmstart import GrowthConfig, WarmstartError, __version__, plan_growth
from hf_warmstart.growth.operators import DEPTH_OPERATORS, WIDTH_OPERATORS

from ..models import FAMILIES, tiny_config

configs = st.builds(
    GrowthConfig,
    width=st.none() | st.floats(1, 8),
    depth=st.none() | st.floats(1, 8),
    sizes=st.dictionaries(st.sampled_from(["hidden_size", "n_embd", "num_hidden_layers"]), st.integers(1, 9999)),
    width_operator=st.sampled_from(sorted(WIDTH_OPERATORS)),
    depth_operator=st.sampled_from(sorted(DEPTH_OPERATORS)),
    noise=st.floats(0, 2),
    uneven_ratio=st.floats(0.01, 2),
    shrink=st.floats(0, 2),
    seed=st.integers(0, 2**40),
)


@given(configs)
def test_it_survives_json(config):
    assert GrowthConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_it_survives_a_folder_and_carries_the_version(tmp_path):
    config = GrowthConfig(width=1.5, sizes={"intermediate_size": 400}, width_operator="szp", shrink=0.25)
    config.save_pretrained(tmp_path / "new")
    assert GrowthConfig.from_pretrained(tmp_path / "new") == config
    assert json.loads((tmp_path / "new" / "growth_config.json").read_text())["library_version"] == __version__


def test_unknown_fields_and_missing_files_are_errors(tmp_path):
    with pytest.raises(WarmstartError, match=r"no fields \['tempo'\]"):
        GrowthConfig.from_dict({"width": 2, "tempo": 3})
    with pytest.raises(WarmstartError, match="does not exist"):
        GrowthConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"growth_factor": 2}, {"growth_factor": 3}, {"growth_factor": 4, "depth": 2}])
def test_growth_factor_solves_for_the_true_parameter_count(family, options):
    config = tiny_config(family, num_hidden_layers=4) if family != "gpt2" else tiny_config(family, n_layer=4)
    plan = plan_growth(config, **options)
    assert plan.growth_factor == pytest.approx(options["growth_factor"], rel=0.01)
    ratio = plan.sizes[1]["residual"] / plan.sizes[0]["residual"]
    inner = next(name for name, info in plan.layout.spaces.items() if info.kind == "elementwise")
    assert 0.49 < plan.sizes[1][inner] / plan.sizes[0][inner] / ratio < 2.01


def test_growth_factor_keeps_proportions_where_whole_heads_allow_it():
    plan = plan_growth(LlamaConfig(num_key_value_heads=8, num_hidden_layers=2), growth_factor=2)
    assert plan.growth_factor == pytest.approx(2, rel=0.005)
    grown = {name: plan.sizes[1][name] / plan.sizes[0][name] for name in ("residual", "intermediate_size")}
    assert grown["intermediate_size"] == pytest.approx(grown["residual"], rel=0.15)


@pytest.mark.parametrize(
    ("family", "changes", "options", "expected"),
    [
        ("llama", {}, {"width": 1.5}, {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}),
        ("llama", {"num_key_value_heads": 1}, {"width": 1.5}, {"num_attention_heads": 6, "num_key_value_heads": 1}),
        (
            "llama",
            {},
            {"num_attention_heads": 8},
            {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64},
        ),
        ("gpt2", {}, {"n_embd": 96, "n_head": 6}, {"hidden_size": 96, "num_attention_heads": 6, "n_inner": 256}),
        ("gpt2", {}, {"width": 1.5}, {"hidden_size": 96, "num_attention_heads": 6, "n_inner": None}),
        ("gpt2", {}, {"n_inner": 300}, {"hidden_size": 64, "n_inner": 300}),
        ("opt", {}, {"width": 2}, {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 192}),
        ("mixtral", {}, {"width": 2}, {"num_local_experts": 4, "vocab_size": 97, "intermediate_size": 192}),
        (
            "llama",
            {},
            {"width": 2, "sizes": {"intermediate_size": 100}},
            {"hidden_size": 128, "intermediate_size": 100},
        ),
    ],
)
def test_what_is_asked_is_what_the_config_says(family, changes, options, expected):
    target = plan_growth(tiny_config(family, **changes), **options).target_config
    assert {name: getattr(target, name) for name in expected} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_head_dim_vocabulary_positions_and_eps_stay(family):
    plan = plan_growth(tiny_config(family), width=2, depth=2)
    before, after = plan.source_config.to_dict(), plan.target_config.to_dict()
    grown = {"hidden_size", "n_embd", "word_embed_proj_dim", "intermediate_size", "ffn_dim", "n_inner"}
    grown |= {"num_attention_heads", "n_head", "num_key_value_heads", "num_hidden_layers", "n_layer"}
    grown |= {"layer_types", "no_rope_layers", "max_window_layers"}
    assert set(plan.changes) <= grown
    assert {name for name in before if before[name] != after[name]} == set(plan.changes)


def test_sizes_that_a_class_rounds_are_what_its_tensors_say():
    """1024.1 inner units at width 384, 2048.3 at 768, both cut and rounded up to multiples of 64."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 2, "num_heads": 4, "vocab_size": 97}
    plan = plan_growth(AutoConfig.for_model("xlstm", **sizes), width=2)
    assert plan.shapes["backbone.blocks.0.ffn.proj_down.weight"] == (384, 1024)
    assert plan.target_shapes["backbone.blocks.0.ffn.proj_down.weight"] == (768, 2048)
    assert "ffn_round_up_to_multiple_of" not in plan.changes
