"""A target, text and options that make a sweep of seconds: a Markov chain of tokens, Llamas of a thousand parameters."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

VOCABULARY, LENGTH = 16, 16
OPTIONS = {
    "proxies": [1300, 2400, 4500],
    "tokens_per_parameter": 1.5,
    "learning_rates": 3,
    "batch_sizes": 2,
    "learning_rate_step": 4,
    "learning_rate": 0.03,
    "batch_tokens": 128,
    "refinements": 0,
    "min_steps": 5,
}


def target(**changes) -> PreTrainedConfig:
    """A Llama with four heads."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    sizes |= {"num_key_value_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
    return LlamaConfig(**(sizes | {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True} | changes))


def text(rows: int, seed: int) -> Tensor:
    """Tokens (rows, LENGTH) of one Markov chain whose next token is nearly sure."""
    chances = torch.softmax(4 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)), -1)
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(VOCABULARY, (rows,), generator=generator)]
    for _ in range(LENGTH - 1):
        tokens.append(torch.multinomial(chances[tokens[-1]], 1, generator=generator).squeeze(-1))
    return torch.stack(tokens, dim=1)


def arguments(output_dir, **changes) -> dict:
    """Keywords of `run_sweep` beside the target."""
    given = {"train_dataset": text(300, 1), "eval_dataset": text(24, 2), "output_dir": output_dir}
    return {**given, "tokens": 200_000, "sequence_length": LENGTH, **OPTIONS, **changes}
