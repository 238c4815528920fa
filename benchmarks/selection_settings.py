"""The settings of the check of selections: parents, data, regimes, rates; and the pool of candidates.

`development` is what the procedure was chosen on: three settings, and the ten that an earlier procedure was judged by
(201 to 210), which are spent. `held-out` is what it is judged by: ten others, drawn (`drawn`), with other parents, seeds and
starts in the texts, measured on the other half of the held-out texts. Their parts of the texts overlap with those of the ten
where they begin after 0.06. Settings, pool and `Scale` were written before any held-out setting was run.
"""

from __future__ import annotations

import random
from dataclasses import astuple, dataclass
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_warmstart import Candidate

HEAD = 8  # width of a head
PARENT_PART, PART = 0.1, 0.2  # shares of a text that a parent, and a setting, takes


@dataclass(frozen=True)
class Case:
    """A setting.

    Args:
        family: `"gpt2"` or `"llama"`. width, layers: of the parent; it grows to twice the width.
        text, parent_text: what is gone on with, and what the parent learnt. start: where in the texts both begin, as a
            share: first the parent's part, then the setting's.
        parent_steps: of the parent. learning_rate: of the planned run; parents learn with 2e-3.
        regime, schedule: of the planned run. seed: of parent and selection.
    """

    family: str
    width: int
    layers: int
    text: str
    parent_text: str
    start: float
    parent_steps: int
    learning_rate: float
    regime: str
    schedule: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.seed}-{self.family}-{self.width}-{self.text}-{self.regime}"

    def model(self, vocabulary: int, length: int) -> PreTrainedModel:
        """A parent before its training."""
        torch.manual_seed(self.seed)
        heads = self.width // HEAD
        shared: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0}
        if self.family == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    n_embd=self.width, n_layer=self.layers, n_head=heads, n_positions=length, resid_pdrop=0.0,
                    embd_pdrop=0.0, attn_pdrop=0.0, **shared,
                )
            )  # fmt: skip
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=self.width, intermediate_size=5 * self.width // 2, num_hidden_layers=self.layers,
                num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=length, **shared,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much is run in each setting.

    Args:
        steps: of the planned run. repeats: of the truth. batch: blocks of a step. length: tokens of a block.
        eval_blocks: held out. half: of the held-out text, 0 or 1. eval_every: steps between evaluations of the truth.
        probe_steps, continuation_steps, selector_eval_every, selector_repeats, schedule, objective: of the selection.
        share: its budget, of running every candidate to the end once. longer: steps of races without a budget, in which it
            chooses again. candidates: names; all where empty. documents: of each file, None for all.
    """

    steps: int = 1280
    repeats: int = 5
    batch: int = 8
    length: int = 32
    vocabulary: int = 512
    eval_blocks: int = 96
    half: int = 1
    eval_every: int = 1280
    probe_steps: tuple[int, ...] = (32,)
    continuation_steps: int = 512
    selector_eval_every: int = 16
    selector_repeats: int = 1
    schedule: str = "planned"
    objective: str = "extrapolated"
    share: float = 0.10
    longer: tuple[int, ...] = ()
    candidates: tuple[str, ...] = ()
    documents: int | None = None


DEVELOPMENT = (
    Case("gpt2", 16, 2, "stories", "stories", 0.00, 600, 3e-3, "deterministic", "linear", 101),
    Case("gpt2", 24, 2, "stories", "stories", 0.03, 1000, 1e-3, "stochastic", "linear", 102),
    Case("llama", 16, 2, "mathematics", "stories", 0.05, 800, 2e-3, "shuffled", "warmup_stable_decay", 103),
)
SPENT = (
    Case("gpt2", 16, 2, "stories", "stories", 0.36, 800, 2e-3, "deterministic", "linear", 201),
    Case("llama", 16, 2, "mathematics", "mathematics", 0.38, 1500, 3e-3, "shuffled", "linear", 202),
    Case("gpt2", 24, 1, "mathematics", "stories", 0.42, 800, 1e-3, "stochastic", "warmup_stable_decay", 203),
    Case("llama", 24, 1, "stories", "stories", 0.46, 2000, 1e-3, "deterministic", "warmup_stable_decay", 204),
    Case("gpt2", 16, 2, "stories", "stories", 0.50, 1500, 3e-3, "dropout", "cosine", 205),
    Case("llama", 16, 1, "stories", "mathematics", 0.54, 1000, 2e-3, "stochastic", "linear", 206),
    Case("gpt2", 24, 2, "stories", "stories", 0.58, 2000, 5e-4, "shuffled", "cosine", 207),
    Case("llama", 16, 2, "mathematics", "stories", 0.62, 800, 5e-4, "deterministic", "linear", 208),
    Case("gpt2", 16, 1, "mathematics", "mathematics", 0.66, 2000, 2e-3, "stochastic", "warmup_stable_decay", 209),
    Case("llama", 16, 2, "stories", "stories", 0.70, 2000, 3e-4, "dropout", "linear", 210),
)


def drawn(cases: tuple[Case, ...], starts: tuple[float, ...], first_seed: int) -> tuple[Case, ...]:
    """Settings of the kinds of others, mixed anew: each column of their table is shuffled by one seeded draw.

    Texts of parent and continuation stay together, families, widths and all else are drawn apart.
    """
    rows = [astuple(case) for case in cases]
    columns = [[row[k] for row in rows] for k in (0, 1, 2, 6, 7, 8, 9)]
    columns.insert(3, [row[3:5] for row in rows])
    draw = random.Random(first_seed)
    for column in columns:
        draw.shuffle(column)
    return tuple(
        Case(family, width, layers, *texts, start, steps, rate, regime, schedule, first_seed + k)
        for k, (family, width, layers, texts, steps, rate, regime, schedule, start) in enumerate(
            zip(*columns, starts, strict=True)
        )
    )


HELD_OUT = drawn(SPENT, tuple(round(0.03 * k, 2) for k in range(10)), 301)
QUICK = (
    Case("gpt2", 16, 1, "stories", "stories", 0.0, 8, 3e-3, "deterministic", "linear", 1),
    Case("llama", 16, 1, "mathematics", "stories", 0.3, 8, 3e-3, "shuffled", "warmup_stable_decay", 2),
)
SETS: dict[str, tuple[Scale, tuple[Case, ...]]] = {
    "development": (Scale(), DEVELOPMENT + SPENT),
    "held-out": (Scale(half=0, longer=(256, 512)), HELD_OUT),
    "quick": (
        Scale(
            steps=40, repeats=2, eval_blocks=8, eval_every=8, probe_steps=(2,), continuation_steps=4, selector_eval_every=1,
            share=0.5, longer=(16,),
            candidates=("exact_copy", "reference_slice"), documents=200,
        ),
        QUICK,
    ),
}  # fmt: skip


def candidates(scale: Scale) -> list[Candidate]:
    """The pool: families of growths and states, all twice as wide and at the parent's place in the schedule."""
    wide: dict[str, Any] = {"width": 2}
    pool = [
        Candidate("exact_copy", width_operator="exact_copy", **wide),
        Candidate("perturbed_copy", width_operator="perturbed_copy", noise=0.2, **wide),
        Candidate("asymmetric_reset", width_operator="exact_copy", state_policy="asymmetric_reset", **wide),
        Candidate("reference_slice", width_operator="reference_slice", **wide),
        Candidate("uneven_copy", width_operator="uneven_copy", **wide),
        Candidate("szp_0.4", width_operator="szp", shrink=0.4, **wide),
    ]
    return [candidate for candidate in pool if not scale.candidates or candidate.name in scale.candidates]
