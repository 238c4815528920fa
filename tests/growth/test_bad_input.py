"""Bad input: a `WarmstartError` that names the values and the way out."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hf_warmstart import GrowthConfig, WarmstartError, certify, grow, plan_growth
from hf_warmstart.errors import SizeError

from ..models import tiny_config, tiny_model


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"width": 1.3},
            [r"width=1.3 does not divide", r"64 -> 83.2", r"Admissible widths near it: 1 \(1\), 1.5 \(3/2\)"],
        ),
        ({"width": 0.5}, ["width=0.5 must be a number of at least 1"]),
        ({"depth": 1.3}, ["depth=1.3 of 2 layers", "3/2"]),
        ({"width_operator": "net2net", "width": 2}, ["net2net", "exact_copy"]),
        ({"depth_operator": "copy", "depth": 2}, ["'copy'", "identity_blocks"]),
        ({"hidden_sizes": 128}, ["no attribute 'hidden_sizes'", "nearest is 'hidden_size'"]),
        ({"vocab_size": 50}, ["vocab_size would shrink from 97 to 50"]),
        ({"rms_norm_eps": 1}, ["rms_norm_eps", "cannot be grown"]),
        ({"num_attention_heads": 7}, ["num_attention_heads=7 is no multiple of num_key_value_heads=2"]),
        ({"intermediate_size": 50}, ["intermediate_size would shrink from 96 to 50"]),
        ({"num_hidden_layers": 1}, ["num_hidden_layers would shrink from 2 to 1"]),
        ({"hidden_size": 128.5}, ["positive integers", "hidden_size=128.5"]),
        ({"hidden_size": 64}, ["Nothing would grow"]),
        ({}, ["Nothing to grow"]),
        ({"growth_factor": 2, "width": 2}, ["growth_factor solves"]),
        ({"depth": 3, "depth_operator": "overlap"}, ["overlap joins two copies of 2 layers and cannot make 6"]),
        ({"width": 2, "uneven_ratio": 0, "width_operator": "uneven_copy"}, ["uneven_ratio=0"]),
        ({"width": 2, "seed": "one"}, ["seed='one'"]),
    ],
)
def test_sizes_and_operators_that_cannot_be_are_named_with_the_way_out(options, words):
    with pytest.raises(WarmstartError) as error:
        grow(tiny_model("llama"), **options)
    for word in words:
        assert re.search(word, str(error.value)), str(error.value)


def test_a_width_that_breaks_the_angles_of_rotated_heads_is_refused_and_goes_with_more_heads():
    """Phi-3's heads are `hidden_size / num_attention_heads` wide."""
    with pytest.raises(SizeError, match=r"inside of rotated heads .*whole factors.* 16 -> 24"):
        plan_growth(tiny_config("phi3"), hidden_size=96)
    assert certify(tiny_config("phi3"), hidden_size=96, num_attention_heads=6).exact


def test_a_width_that_changes_the_size_of_plain_heads_grows_them_exactly():
    """Nothing but scores sees the inside of GPT-2's heads, and scores take back their own scale."""
    plan = plan_growth(tiny_config("gpt2"), hidden_size=96)
    assert plan.target_config.n_head == 4
    assert plan.sizes[1]["head_dim"] == 24
    assert certify(tiny_config("gpt2"), hidden_size=96, width_operator="uneven_copy").exact


def test_the_configs_own_validator_is_quoted():
    class Picky(LlamaConfig):
        model_type = "llama"

        def __post_init__(self, **kwargs):
            super().__post_init__(**kwargs)
            if self.hidden_size > 100:
                raise ValueError("this config is at most 100 wide")

    model = LlamaForCausalLM(Picky(**{k: v for k, v in tiny_config("llama").to_dict().items() if k != "model_type"}))
    with pytest.raises(SizeError, match=r"Picky refuses the sizes.*128.*at most 100 wide"):
        grow(model, width=2)


# peft 0.21 still calls names that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_model_with_attached_adapters_is_refused():
    from peft import LoraConfig

    model = tiny_model("llama")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(WarmstartError, match="adapters attached"):
        grow(model, width=2)


def test_a_quantised_model_is_refused():
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(WarmstartError, match="quantised.*dequantize"):
        grow(model, width=2)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = type(tiny_model("llama"))(tiny_config("llama"))
    with pytest.raises(WarmstartError, match="not plain tensors in memory"):
        grow(model, width=2)


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), None, 3])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(WarmstartError, match="PreTrainedModel is needed"):
        grow(thing, width=2)


def test_a_config_of_another_class_is_refused():
    with pytest.raises(SizeError, match="config is for 'gpt2', the model is 'llama'"):
        grow(tiny_model("llama"), tiny_config("gpt2"))


def test_a_config_and_options_together_are_refused():
    with pytest.raises(WarmstartError, match="both given"):
        plan_growth(tiny_config("llama"), GrowthConfig(width=2), depth=2)


class OddConfig(PreTrainedConfig):
    """A user's own config, with heads that size no tensor."""

    model_type = "odd"

    def __init__(self, hidden_size=48, num_attention_heads=6, vocab_size=61, tied=True, **kwargs):
        self.hidden_size, self.num_attention_heads, self.vocab_size = hidden_size, num_attention_heads, vocab_size
        self.tied = tied
        super().__init__(**kwargs)


class OddModel(PreTrainedModel):
    """A user's own model with a bare parameter of rank four, and a head that may read its table as it is."""

    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.mystery = torch.nn.Parameter(torch.zeros(2, 2, 2, config.hidden_size))
        self.head = None if config.tied else torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, **kwargs):
        hidden = self.embed(input_ids) + self.mystery.sum((0, 1, 2))
        return CausalLMOutput(logits=hidden @ self.embed.weight.T if self.head is None else self.head(hidden))


def test_a_parameter_of_rank_four_is_followed():
    assert certify(OddModel(OddConfig(tied=False)), width=2, width_operator="uneven_copy").exact


def test_a_tied_head_that_reads_its_table_with_nothing_between_is_refused():
    """The same numbers cannot both write and read copies."""
    with pytest.raises(SizeError, match="the input of the tied head"):
        certify(OddModel(OddConfig()), width=2, width_operator="uneven_copy")


def test_an_attribute_that_sizes_nothing_is_refused_by_name():
    with pytest.raises(SizeError, match=r"num_attention_heads.*cannot be grown.*odd grows by name: \['hidden_size'"):
        grow(OddModel(OddConfig(tied=False)), hidden_size=96, num_attention_heads=12)


@pytest.mark.parametrize("family", ["gptj", "mamba", "bloom"])
@pytest.mark.parametrize(
    "options", [{"width": 2}, {"width": 2, "width_operator": "uneven_copy"}, {"width": 2, "depth": 2}]
)
def test_gptj_mamba_and_bloom_are_certified_at_their_true_sizes(family, options):
    config = AutoConfig.for_model(family, vocab_size=97, pad_token_id=None, bos_token_id=1, eos_token_id=2)
    assert certify(config, **options).exact


def test_a_broken_factor_of_a_stream_that_meets_its_own_norm_is_refused_with_the_reason():
    """BLOOM norms its embeddings into the stream."""
    config = AutoConfig.for_model("bloom", vocab_size=97, pad_token_id=None, bos_token_id=1, eos_token_id=2)
    with pytest.raises(SizeError, match="whole factors .*LayerNorm meets the raw stream.*64"):
        certify(config, width=1.5)


@pytest.mark.parametrize("family", ["granite", "starcoder2", "cohere", "gemma", "gemma3_text", "phi", "helium"])
def test_families_that_nobody_declared_derive_and_are_certified(family):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64}
    own = {"head_dim": 16} if family in ("gemma3_text", "helium") else {}
    config = AutoConfig.for_model(family, **sizes, **own, pad_token_id=None, bos_token_id=1, eos_token_id=2)
    assert certify(config, width=2, width_operator="uneven_copy").exact


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "relu"}, {"rms_norm_eps": 1e-3}, {"attention_bias": True}, {"bos_token_id": 7}]
)
def test_a_target_config_that_asks_for_more_than_sizes_is_refused_by_name(changes):
    target = tiny_config("llama", hidden_size=128, num_attention_heads=8, num_key_value_heads=4, **changes)
    with pytest.raises(SizeError, match=next(iter(changes))):
        grow(tiny_model("llama"), target)
