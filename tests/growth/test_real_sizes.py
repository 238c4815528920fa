"""Layouts at real sizes: what is derived from a tiny probe fits the sizes that a user's config has."""

from __future__ import annotations

import pytest
import torch
from transformers import MinistralConfig, MinistralForCausalLM

from hf_warmstart import GrowthConfig, WarmstartError
from hf_warmstart.growth.axes import Concat, Fixed, Product, Space
from hf_warmstart.growth.certify import compare
from hf_warmstart.growth.configs import get_attribute, resize_config
from hf_warmstart.growth.layout import Layout, Move, SpaceInfo, TensorLayout
from hf_warmstart.growth.layouts.probe import probe_config, set_dtype
from hf_warmstart.growth.plan import GrowthPlan, make_plan
from hf_warmstart.growth.precision import true_float64
from hf_warmstart.growth.twin import meta_shapes
from hf_warmstart.growth.zoo import TOLERANCE, source_of

POPULAR = [
    "llama", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "bloom",
    "falcon", "mamba2", "jamba", "deepseek_v3", "glm4_moe", "granite", "olmo2", "cohere2", "starcoder2", "mllama",
]  # fmt: skip
# Sizes that no probe has: lengths that no attribute moves, groups of other sizes, heads of an odd width.
UNLIKE_PROBES = [
    ("minimax", {"block_size": 8, "num_attention_heads": 8, "head_dim": 16}),
    ("glm4_moe", {"hidden_size": 88}),
    ("mimo_v2_flash", {"num_attention_heads": 24, "num_key_value_heads": 4}),
    ("deepseek_v4", {"num_attention_heads": 8, "o_groups": 4}),
    ("got_ocr2", {"vision_config.window_size": 6}),
]


def layout_of_axes(*axes, spaces=(), moves=(), probe=None) -> Layout:
    tensors = {f"t{k}": TensorLayout((axis,), ("write",)) for k, axis in enumerate(axes)}
    return Layout("own", dict(spaces), tensors, moves=tuple(moves), probe=probe or {})


def plan_of(model_type: str, config, **options) -> GrowthPlan:
    return make_plan(source_of("causal-lm", model_type)[0], config, GrowthConfig(**options))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"width": 2}, {"depth": 2}], ids=["width", "depth"])
@pytest.mark.parametrize("model_type", POPULAR)
def test_default_configs_of_popular_families_are_planned_as_exact(model_type, options):
    model_class, config = source_of("causal-lm", model_type)
    plan = plan_of(model_type, config, **options)
    assert plan.exact
    built = meta_shapes(model_class, plan.target_config)
    planned = {name: tuple(axis.size(plan.sizes[1]) for axis in tensor.axes) for name, tensor in plan.placed.items()}
    assert planned == built


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "sizes"), UNLIKE_PROBES, ids=[name for name, _ in UNLIKE_PROBES])
def test_growths_at_sizes_unlike_the_probe_s_are_exact(model_type, sizes):
    config = resize_config(probe_config(source_of("causal-lm", model_type)[1]), sizes)
    set_dtype(config, torch.float64)
    with true_float64():
        plan = plan_of(model_type, config, width=2)
        measured = compare(plan)
    assert plan.exact
    assert measured.max_relative_error < TOLERANCE and measured.max_pullback_error < TOLERANCE


def test_a_constant_length_is_that_of_the_model_s_tensors():
    units = SpaceInfo("elementwise", size=24)
    layout = layout_of_axes(Concat("units", Fixed(8)), Product("units", Fixed(2)), spaces={"units": units})
    fitted = [
        layout.fitted(t, (n,), {"units": 100}) for t, n in zip(layout.tensors.values(), (164, 1600), strict=True)
    ]
    assert [str(t.axes[0]) for t in fitted] == ["Concat(units, 64)", "Product(units, 16)"]


@pytest.mark.parametrize(
    ("axis", "length"),
    [
        (Concat(Fixed(8), "units", Fixed(8)), 120),  # where the units begin is not told
        (Product("units", Fixed(2)), 150),
        (Concat("units", Fixed(8)), 90),
        (Concat("units", "units"), 150),
    ],
)
def test_lengths_that_a_tensor_does_not_tell_are_refused(axis, length):
    layout = layout_of_axes(Space("units"), axis, spaces={"units": SpaceInfo("elementwise", size=24)})
    with pytest.raises(WarmstartError, match="do not have the shape"):
        layout.sizes(MinistralConfig(), {"t0": (100,), "t1": (length,)})


def test_axes_without_constants_tell_sizes_first():
    layout = layout_of_axes(
        Concat("units", Fixed(8)), Space("units"), spaces={"units": SpaceInfo("elementwise", size=24)}
    )
    assert layout.sizes(MinistralConfig(), {"t0": (164,), "t1": (100,)}) == {"units": 100}


def test_a_space_that_changes_just_as_an_attribute_is_as_large():
    spaces = {"heads": SpaceInfo("heads", size=4), "inside": SpaceInfo("contracted", size=16)}
    probe = {"num_attention_heads": 4, "head_dim": 16}
    move = Move({"num_attention_heads": 1.0, "head_dim": -1.0}, {"heads": 1.0, "inside": -1.0})
    layout = layout_of_axes(Product("heads", "inside"), spaces=spaces, moves=[move], probe=probe)
    config = MinistralConfig(num_attention_heads=12, head_dim=40)  # no step of the one move leads there
    assert layout.sizes(config, {"t0": (480,)}) == {"heads": 12, "inside": 40}


def test_parts_of_heads_that_are_told_in_sum_only_stay_or_are_refused():
    config = resize_config(probe_config(source_of("causal-lm", "glm4_moe")[1]), {"hidden_size": 76})
    assert get_attribute(config, "num_attention_heads") == 4  # heads of 19, half of them rotated
    assert plan_of("glm4_moe", config, width=2).exact
    with pytest.raises(WarmstartError, match="could not be told one by one"):
        plan_of("glm4_moe", config, sizes={"hidden_size": 152})


def test_rotated_parts_that_are_no_whole_number_of_pairs_do_not_grow():
    config = resize_config(probe_config(source_of("causal-lm", "glm4_moe")[1]), {"hidden_size": 88})
    with pytest.raises(WarmstartError, match="which of its 11 entries are rotated could not be told"):
        plan_of("glm4_moe", config, sizes={"hidden_size": 176})


def test_a_class_that_cannot_be_built_from_its_config_says_so_in_its_own_words():
    config = MinistralConfig()  # leaves head_dim unset, which the model needs
    with pytest.raises(
        WarmstartError, match="MinistralForCausalLM cannot be built from this config: TypeError"
    ) as info:
        make_plan(MinistralForCausalLM, config, GrowthConfig(width=2))
    assert isinstance(info.value.__cause__, TypeError)
