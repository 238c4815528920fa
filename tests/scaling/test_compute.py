"""Compute accounting: parameters and FLOPs against counts by hand and against models with weights."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, LlamaConfig

from hf_warmstart import WarmstartError
from hf_warmstart.scaling.tables.compute import attention_spans, count_parameters, flops_per_token, training_flops

from ..models import FAMILIES, tiny_config, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_a_model_with_weights(family):
    count, model = count_parameters(tiny_config(family)), tiny_model(family, randomised=False)
    assert count.total == model.num_parameters()
    head = model.get_output_embeddings().weight
    assert count.head == head.numel() and count.tied == (head is model.get_input_embeddings().weight)
    assert count.non_embedding + count.embedding + (0 if count.tied else count.head) == count.active
    assert (count.active < count.total) == (family == "mixtral")


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_visit():
    config = tiny_config("mixtral", num_local_experts=4, num_experts_per_tok=2)
    hidden, inner, layers = 64, 96, 2
    assert (count := count_parameters(config)).total - count.active == 2 * layers * (3 * hidden * inner + hidden)


def test_published_sizes_of_mixtures_are_met():
    """DeepSeek-V3: 671B parameters, 37B active (arXiv 2412.19437)."""
    count = count_parameters(AutoConfig.for_model("deepseek_v3"))
    assert round(count.total / 1e9) == 671 and round(count.active / 1e9) == 37


def test_flops_of_a_token_count_matrix_products_and_attention():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=8, vocab_size=97
    )
    count = count_parameters(config)
    per_layer = 2 * 64 * 32 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    assert count.non_embedding == 2 * per_layer + 64
    assert flops_per_token(config, 128) == 6 * (count.non_embedding + 97 * 64) + 12 * 2 * (4 * 8) * 128
    assert training_flops(count.non_embedding, 10) == 60 * count.non_embedding


def test_latent_attention_counts_the_widths_of_keys_and_values():
    config = AutoConfig.for_model("deepseek_v3")
    count = count_parameters(config)
    attention = flops_per_token(config, 4096, count) - 6 * count.in_matmuls
    assert attention == 6 * 128 * ((128 + 64) + 128) * 4096 * 61


def test_windows_and_layers_without_attention_shorten_the_spans():
    sliding = AutoConfig.for_model("gemma3_text", num_hidden_layers=6, sliding_window=32)
    assert attention_spans(sliding, 100) == [32] * 5 + [100] and attention_spans(sliding, 16) == [16] * 6
    assert attention_spans(AutoConfig.for_model("qwen3_next", num_hidden_layers=4), 100) == [100]
    assert attention_spans(AutoConfig.for_model("mamba"), 100) == []
    assert attention_spans(tiny_config("mistral", sliding_window=10), 100) == [10, 10]


def test_what_cannot_be_built_or_counted_is_refused(monkeypatch):
    with pytest.raises(WarmstartError, match="Pass params="):
        count_parameters(LlamaConfig(vocab_size=97, pad_token_id=98))
    with pytest.raises(WarmstartError, match="at least one token"):
        flops_per_token(tiny_config("llama"), 0)
    monkeypatch.setattr("hf_warmstart.growth.sizes.active_experts", lambda config: [])
    with pytest.raises(WarmstartError, match="no number of experts for each token"):
        count_parameters(tiny_config("mixtral"))
