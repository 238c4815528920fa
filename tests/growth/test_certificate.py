"""The certificate: every family, every exact operator, whole and broken factors; and what is not exact says why."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_warmstart import WarmstartError, certify, plan_growth
from hf_warmstart.growth.axes import Gain, Postnorm, Space
from hf_warmstart.growth.certify import LOGITS_TOLERANCE, PULLBACK_TOLERANCE, twin_plan
from hf_warmstart.growth.configs import model_class_of
from hf_warmstart.growth.layout import TensorLayout
from hf_warmstart.growth.layouts import layout_of
from hf_warmstart.growth.operators import WIDTH_OPERATORS
from hf_warmstart.growth.precision import true_float64
from hf_warmstart.growth.transform import TensorGrowth

from ..models import FAMILIES, tiny_config

EXACT = sorted(name for name, operator in WIDTH_OPERATORS.items() if operator.exact)


def _holds(certificate) -> None:
    assert certificate.exact, certificate
    assert certificate.max_relative_error < 1e-10 and LOGITS_TOLERANCE <= 1e-10
    assert certificate.max_pullback_error < 1e-10 and PULLBACK_TOLERANCE <= 1e-10
    assert certificate.unreached == []
    assert certificate.reload_ok


@pytest.mark.parametrize("width", [2, 1.5, 3])
@pytest.mark.parametrize("operator", EXACT)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_width_operators_are_exact_on_every_family(family, operator, width):
    certificate = certify(tiny_config(family), width=width, width_operator=operator)
    _holds(certificate)
    assert certificate.frozen == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_blocks_are_exact_on_every_family(family):
    for depth in (1.5, 2, 2.5):
        certificate = certify(tiny_config(family), depth=depth)
        _holds(certificate)
        assert certificate.frozen == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_width_and_depth_in_one_call_are_exact(family):
    _holds(certify(tiny_config(family), width=1.5, depth=1.5, width_operator="reference_slice"))
    _holds(certify(tiny_config(family), width=2, depth=1.5))


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}])
def test_switches_of_the_config_are_followed(changes):
    _holds(certify(tiny_config("llama", **changes), width=1.5, width_operator="uneven_copy"))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 4}),
        ("gpt_neox", {"tie_word_embeddings": True}),
        ("gpt2", {"n_inner": 80}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("mistral", {"sliding_window": 4}),
        ("phi3", {"num_key_value_heads": 4}),
        ("opt", {"enable_bias": False}),
    ],
)
def test_variants_of_a_family_are_exact(family, changes):
    _holds(certify(tiny_config(family, **changes), width=2, width_operator="uneven_copy"))


@pytest.mark.parametrize("depth_operator", ["stack", "interleave", "overlap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_depth_operators_that_repeat_layers_are_not_called_exact(family, depth_operator):
    certificate = certify(tiny_config(family), depth=1.5, depth_operator=depth_operator)
    assert not certificate.exact
    assert certificate.max_relative_error > 1e-3
    assert "more than once" in certificate.reason
    assert certificate.reload_ok


@pytest.mark.parametrize("family", FAMILIES)
def test_szp_is_not_called_exact(family):
    certificate = certify(tiny_config(family), width=1.5, width_operator="szp")
    assert not certificate.exact
    assert certificate.max_relative_error > 1e-3
    assert "shrinks the parent" in certificate.reason
    assert certificate.reload_ok


def test_a_wrong_layout_is_refuted_with_the_measured_difference():
    config = tiny_config("llama")
    layout = layout_of(model_class_of(config), config)
    wrong = layout.with_tensor("model.norm.weight", TensorLayout((Gain("residual", "residual"),), ("write",), 1.0))
    certificate = certify(config, width=1.5, width_operator="uneven_copy", layout=wrong)
    assert certificate.exact  # t = u: an offset changes nothing here
    wrong = layout.with_tensor("model.norm.weight", TensorLayout((Postnorm(Space("residual")),), ("write",)))
    certificate = certify(config, width=1.5, width_operator="uneven_copy", layout=wrong)
    assert not certificate.exact
    assert certificate.max_relative_error > 1e-6
    assert "differ by" in certificate.reason


def test_a_wrong_gradient_alone_is_refuted_by_name(monkeypatch):
    right = TensorGrowth.pull_gradient
    wrong = lambda growth, gradient: right(growth, gradient) * (1 + 1e-8 * growth.name.endswith("up_proj.weight"))  # noqa: E731
    monkeypatch.setattr(TensorGrowth, "pull_gradient", wrong)
    certificate = certify(tiny_config("llama"), width=2)
    assert not certificate.exact
    assert certificate.max_relative_error < 1e-10
    assert "pulled-back gradient of model.layers" in certificate.reason
    assert certificate.worst_pullback.endswith("up_proj.weight")


def test_where_a_class_computes_from_a_layers_number_new_layers_follow_all_others():
    """GPT-2's `scale_attn_by_inverse_layer_idx` would shift with every inserted layer."""
    config = tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert plan_growth(config, depth=2).layer_map.gated == (False, False, True, True)
    _holds(certify(config, depth=2))


def test_inserted_layers_that_shift_a_layers_number_are_refuted_with_the_measured_difference():
    config = tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True)
    layout = layout_of(model_class_of(config), config)
    inserted = dataclasses.replace(layout, stacks=tuple(dataclasses.replace(s, append=False) for s in layout.stacks))
    certificate = certify(config, depth=2, layout=inserted)
    assert not certificate.exact
    assert "logits differ" in certificate.reason


def test_the_twin_keeps_ratios_grouping_pattern_and_ties():
    from transformers import Gemma2Config

    plan = plan_growth(
        Gemma2Config(num_hidden_layers=26, bos_token_id=1, eos_token_id=1, pad_token_id=0), width=1.5, depth=26 / 13
    )
    twin = twin_plan(plan)
    before, after = twin.source_config, twin.target_config
    assert after.hidden_size / before.hidden_size == 1.5
    assert after.num_key_value_heads / before.num_key_value_heads == 1.5
    assert after.intermediate_size / before.intermediate_size == 1.5
    assert before.num_attention_heads // before.num_key_value_heads == 2
    assert after.num_hidden_layers == 2 * before.num_hidden_layers
    assert before.layer_types[:2] == plan.source_config.layer_types[:2]
    assert before.tie_word_embeddings
    assert twin.parameters_after < 400_000


def test_inside_true_float64_hard_coded_upcasts_are_lifted():
    x = torch.randn(4, dtype=torch.float64)
    with true_float64():
        assert x.to(torch.float32).dtype == torch.float64
        assert x.float().dtype == torch.float64
        assert torch.softmax(x, 0, dtype=torch.float32).dtype == torch.float64
        assert torch.zeros(2, dtype=torch.float32).dtype == torch.float64
        assert torch.full((), torch.finfo(x.dtype).min).dtype == torch.float64
    assert x.float().dtype == torch.float32
    assert torch.zeros(2).dtype == torch.float32


def test_a_source_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(WarmstartError, match="No model config"):
        certify(tmp_path, width=2)
