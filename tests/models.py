"""Tiny configs and models of every family under test, made from their classes; nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_warmstart.growth.twin import randomise

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "olmo2",
    "smollm3",
    "phi3",
    "gpt_neox",
    "gpt2",
    "opt",
    "mixtral",
)

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OWN: dict[str, dict] = {
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 16},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "olmo2": {"pad_token_id": None},
    "smollm3": {"pad_token_id": None, "num_hidden_layers": 4},
    "phi3": {"pad_token_id": None},
    "mixtral": {"num_local_experts": 4},
}


def tiny_config(family: str, **changes) -> PreTrainedConfig:
    """A small config of a family, without dropout."""
    if family == "gpt2":
        own = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 97}
        own |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    elif family == "opt":
        own = {k: v for k, v in _COMMON.items() if k not in ("intermediate_size", "num_key_value_heads")}
        own |= {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}
    else:
        own = _COMMON | _OWN.get(family, {})
        if family == "gpt_neox":
            own = {k: v for k, v in own.items() if k != "num_key_value_heads"}
    return AutoConfig.for_model(family, **(own | changes))


def tiny_model(family: str, seed: int = 0, randomised: bool = True, **changes) -> PreTrainedModel:
    """A small model of a family; with `randomised`, norms and biases are random too."""
    config = tiny_config(family, **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    if randomised:
        randomise(model, seed, scale=0.1)
    return model.eval()


def some_tokens(rows: int = 3, length: int = 17, vocabulary: int = 97, seed: int = 5) -> torch.Tensor:
    """Random token ids (rows, length)."""
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
