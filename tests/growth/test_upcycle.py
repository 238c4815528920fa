"""`upcycle`: dense models as mixtures of experts that compute the same."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3Config, Qwen3ForCausalLM

from hf_warmstart import WarmstartError, upcycle
from hf_warmstart.errors import ExactnessError
from hf_warmstart.growth.twin import randomise

from ..models import some_tokens, tiny_model


def _qwen3():
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=2,
        vocab_size=97,
    )
    model = Qwen3ForCausalLM(config).eval()
    randomise(model, 1)
    return model


CASES = {"llama": ("mixtral", lambda: tiny_model("llama")), "qwen3": ("qwen3_moe", _qwen3)}


@pytest.mark.parametrize("case", CASES)
def test_the_mixture_computes_the_dense_function_and_its_experts_learn_apart(case):
    kind, make = CASES[case]
    dense = make().eval()
    mixture = upcycle(dense, kind, num_experts=4, num_experts_per_tok=2, seed=3)
    ids = some_tokens(4, 12, seed=5)
    before, after = (m(input_ids=ids).logits.detach() for m in (dense, mixture))
    assert float((before - after).abs().max() / before.abs().max()) < 1e-5
    optimizer = torch.optim.SGD(mixture.parameters(), lr=0.1)
    mixture(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    experts = next(p for name, p in mixture.named_parameters() if name.endswith("experts.down_proj"))
    assert not any(torch.equal(experts[0], other) for other in experts[1:])


def test_it_is_saved_and_loaded_like_any_other(tmp_path):
    mixture = upcycle(tiny_model("llama"), "mixtral", num_experts=4)
    mixture.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = some_tokens(2, 12, seed=5)
    assert torch.equal(loaded.eval()(input_ids=ids).logits, mixture.eval()(input_ids=ids).logits)


def test_seeds_make_routers():
    one, same, other = (upcycle(tiny_model("llama"), "mixtral", num_experts=4, seed=seed) for seed in (1, 1, 2))
    router = "model.layers.0.mlp.gate.weight"
    assert torch.equal(one.state_dict()[router], same.state_dict()[router])
    assert not torch.equal(one.state_dict()[router], other.state_dict()[router])


def test_gates_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ExactnessError, match="norm_topk_prob"):
        upcycle(_qwen3(), "qwen3_moe", num_experts=4, norm_topk_prob=False)


@pytest.mark.parametrize(
    ("target", "options", "match"),
    [
        ("qwen3_moe", {}, "q_norm.weight"),
        ("gpt2", {}, "no number of experts"),
        ("mixtrel", {}, "no model type"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        (GptOssConfig(), {"num_hidden_layers": 2}, "whole config"),
    ],
    ids=["other family", "no mixture", "typo", "too many", "config and changes"],
)
def test_what_does_not_go_together_is_refused_by_name(target, options, match):
    with pytest.raises(WarmstartError, match=match):
        upcycle(tiny_model("llama"), target, **options)
