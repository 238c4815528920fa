"""Smaller configs of a family: what stays, what follows, what is refused."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from hf_warmstart.growth.configs import get_attribute
from hf_warmstart.growth.smaller import SmallerModels
from hf_warmstart.growth.source import class_and_config
from tests.models import tiny_config

FAMILIES = ("llama", "gemma2", "gpt2", "gpt_neox", "opt", "phi3", "mixtral")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_smaller_models_that_are_built_and_counted(family):
    config = tiny_config(family)
    models = SmallerModels(*class_and_config(config))
    sizes = models.sizes()
    assert sizes[-1].entries == models.entries and sizes[-1].width == 1
    assert len({s.width for s in sizes}) > 1, "no width"
    for size in (sizes[0], sizes[len(sizes) // 2]):
        small = models.config_of(size)
        assert type(small) is type(config) and small.vocab_size == config.vocab_size
        model = AutoModelForCausalLM.from_config(small)
        inside = sum(
            tensor.numel()
            for name, tensor in model.state_dict().items()
            if models.layout.template(name)[1] is not None and name not in model.all_tied_weights_keys
        )
        assert inside == size.entries
        assert get_attribute(small, "hidden_size") == size.width * get_attribute(config, "hidden_size")
        if "head_dim" in config.to_dict() and config.head_dim:
            assert small.head_dim == config.head_dim
        assert small.num_attention_heads % (getattr(small, "num_key_value_heads", None) or 1) == 0


def test_key_value_heads_serve_no_more_queries_than_the_models_own():
    config = tiny_config("llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=128)
    models = SmallerModels(*class_and_config(config))
    found = {s.named.get("num_attention_heads", s.width * 8): models.config_of(s) for s in models.sizes()}
    assert {h: c.num_key_value_heads for h, c in found.items()} == {1: 1, 2: 1, 4: 2, 6: 3, 8: 4}


def test_no_kind_of_layer_is_lost():
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config = tiny_config("qwen3", num_hidden_layers=4, layer_types=kinds, use_sliding_window=True, sliding_window=8)
    models = SmallerModels(*class_and_config(config))
    assert {s.layers["num_hidden_layers"] for s in models.sizes()} == {4}
    period = tiny_config("gemma2", num_hidden_layers=4)
    models = SmallerModels(*class_and_config(period))
    assert {s.layers["num_hidden_layers"] for s in models.sizes()} == {2, 3, 4}
    assert models.config_of(models.sizes()[0]).layer_types == period.layer_types[:2]
