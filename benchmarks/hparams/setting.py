"""Sizes of the benchmark, and what follows from them without any text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers import LlamaConfig

from hf_warmstart.scaling.sweeps import SweepConfig
from hf_warmstart.scaling.sweeps.design import Point, first_centre
from hf_warmstart.scaling.sweeps.proxies import Proxy
from hf_warmstart.scaling.tables.compute import count_parameters, flops_per_token, training_flops

PROBE = 0.15  # of the continued training: the short runs that tell what a parent knows, and which rates it prefers


@dataclass(frozen=True)
class Setting:
    """Sizes of the benchmark.

    Args:
        model: of the target, beside vocabulary and positions. vocabulary, length: of tokens and sequences.
        tokens_per_parameter: of the continued training. parents: tokens per parameter of each parent's own training.
        sweep: fields of `SweepConfig`; `proxies` as shares of the target. side: of the grid, in points. grid_seeds,
        fresh_seeds: of the grid, and of the comparison with its best. extensions: of a grid whose best lies on an edge.
        eval_tokens: of the held-out text, at most. shared: how the target's runs are trained.
    """

    model: dict[str, int]
    vocabulary: int
    length: int
    tokens_per_parameter: float
    parents: dict[str, float]
    sweep: dict[str, Any]
    side: int = 5
    grid_seeds: tuple[int, ...] = (0, 1)
    fresh_seeds: tuple[int, ...] = (2, 3, 4)
    extensions: int = 2
    eval_tokens: int = 2**18
    shared: SweepConfig = field(default_factory=lambda: SweepConfig(stop_ratio=None))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self) | {"shared": self.shared.to_dict()}


def sizes(hidden: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    """Sizes of a Llama."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
    }


SETTINGS = {
    # Minutes: fewer points and seeds than the claim asks for, so that it shows the way and no more.
    "quick": Setting(
        sizes(48, 128, 2, 6), 512, 64, 1.0, {"stories": 1.5, "both": 4.0},
        {"proxies": (0.09, 0.16, 0.25, 0.34), "tokens_per_parameter": 3, "learning_rates": 4, "batch_sizes": 3,
         "refinements": 1, "min_steps": 20},
        side=3, grid_seeds=(0,), fresh_seeds=(1, 2), extensions=1, eval_tokens=2**14,
    ),
    # Very short sequences, since the best batch of the smallest proxies is some sixty tokens. Four layers, so that proxies have
    # two. Small proxies see many tokens and large ones few: nothing is carried further than a factor of 2.2 in parameters, or,
    # from the smallest, 3 in tokens of a fresh run; no proxy comes near the target in both, which is what is dear. Budgets of
    # fewer tokens were tried, and their best batch was a single sequence.
    "full": Setting(
        sizes(48, 128, 4, 6), 512, 32, 3.0, {"stories": 4.0, "both": 8.0},
        {"proxies": (0.1256, 0.2274, 0.4545), "tokens_per_parameter": ((2, 4, 8), (1.3, 2.6), (0.7,)),
         "learning_rates": 4, "batch_sizes": 3, "refinements": 1, "min_steps": 20, "learning_rate": 2.0**-8,
         "batch_tokens": 64},
        fresh_seeds=(2, 3, 4, 5, 6), extensions=3, eval_tokens=2**14,
    ),
    # One path of tokens per parameter, twice, carried over a factor of five in parameters: what was run before "full".
    "path": Setting(
        sizes(64, 168, 4, 8), 512, 32, 3.0, {"stories": 4.0, "both": 8.0},
        {"proxies": (0.072, 0.122, 0.195), "tokens_per_parameter": (3.5, 7), "learning_rates": 4, "batch_sizes": 3,
         "refinements": 2, "min_steps": 20, "learning_rate": 2.0**-8, "batch_tokens": 64},
        eval_tokens=2**14,
    ),
}  # fmt: skip


class Target:
    """The model that is trained on, as something that `train` takes."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.config = LlamaConfig(
            **setting.model, vocab_size=setting.vocabulary, max_position_embeddings=setting.length,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        self.params = count_parameters(self.config).non_embedding
        self.flops_per_token = flops_per_token(self.config, setting.length)
        self.tokens = self.run_of(setting.tokens_per_parameter).tokens[0]

    def run_of(self, tokens_per_parameter: float) -> Proxy:
        """A run of so many tokens."""
        length = self.setting.length
        sequences = max(1, round(tokens_per_parameter * self.params / length))
        return Proxy(self.config, self.params, self.flops_per_token, length, (sequences,))

    def usual(self, tokens: float) -> Point:
        """Settings for a run of so many tokens without any law of our own: DeepSeek's, at its compute."""
        return first_centre(training_flops(self.params, tokens), self.setting.length, SweepConfig())

    @property
    def sweep_options(self) -> dict[str, Any]:
        """Of `run_sweep`, with proxies as numbers of parameters."""
        options = dict(self.setting.sweep)
        return options | {"proxies": [round(share * self.params) for share in options["proxies"]]}
