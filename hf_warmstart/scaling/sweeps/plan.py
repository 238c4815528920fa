"""`SweepPlan`: everything about a sweep that is known, and checked, before a step is trained."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...errors import WarmstartError
from ...growth.source import class_and_config
from ..tables.compute import count_parameters, flops_per_token, training_flops
from ..tables.evaluation import Fingerprint, fingerprint
from .config import SweepConfig
from .cost import GRID_POINTS, GRID_SEEDS, BudgetCost, SweepCost, run_flops
from .design import Limits, Point, first_centre, first_points
from .proxies import Proxy, choose_proxies
from .text import Blocks, check_texts, read_blocks

FORMAT = 1
NEIGHBOURS = 8  # most points that one refinement adds for one horizon
# What changes no result: not part of a sweep's identity.
HOW_TO_RUN = ("per_device_batch",)


@dataclass(frozen=True)
class SweepPlan:
    """A sweep, ready to run.

    Args:
        model_class: of target and proxies. target_params: N of the target. tokens: D that is planned for it.
        sequence_length: T. proxies: the smallest first. train, evaluation: the texts. asked: the options.
        cost: in FLOPs, beforehand. target_digest: of the target's config. fingerprint: of the held-out text, for the laws.
    """

    model_class: type[PreTrainedModel]
    target_params: int
    tokens: float
    sequence_length: int
    proxies: tuple[Proxy, ...]
    train: Blocks
    evaluation: Blocks
    asked: SweepConfig
    cost: SweepCost
    target_digest: str = field(repr=False)
    fingerprint: Fingerprint = field(repr=False)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this sweep this sweep: two that agree in it have the same table."""
        options = self.asked.to_dict()
        return {
            "format": FORMAT,
            "target": {
                "model_class": self.model_class.__name__,
                "params": self.target_params,
                "config": self.target_digest,
            },
            "sequence_length": self.sequence_length,
            "train": {"sequences": self.train.count, "sha256": self.train.digest},
            "eval": {"sequences": self.evaluation.count, "sha256": self.evaluation.digest},
            "proxies": [{"params": p.params, "tokens": list(p.tokens)} for p in self.proxies],
            "options": {name: value for name, value in options.items() if name not in HOW_TO_RUN},
        }

    @property
    def recipe(self) -> dict[str, Any]:
        """What the runs have besides learning rate and batch, as `HparamPredictor.fit` takes it; warm-up of the longest."""
        asked, longest = self.asked, self.asked.paths[-1]
        return {
            "schedule": "warmup_stable_decay",
            "decay_fraction": asked.decay,
            "warmup_fraction": asked.warmup * longest[0] / longest[-1],
            "betas": [asked.adam_beta1, asked.adam_beta2],
            "epsilon": asked.adam_epsilon,
            "weight_decay": asked.weight_decay,
            "max_grad_norm": asked.max_grad_norm,
        }

    def limits(self, proxy: Proxy) -> Limits:
        """The batches that a budget admits."""
        return most_batches(proxy, self.asked)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a report."""
        return {
            "target_params": self.target_params,
            "tokens": self.tokens,
            "sequence_length": self.sequence_length,
            "proxies": [
                {"params": p.params, "tokens": list(p.tokens), "config": p.config.to_diff_dict()} for p in self.proxies
            ],
            "cost": self.cost.to_dict(),
        }

    def __str__(self) -> str:
        lines = [f"{'params':>14} {'tokens':>16} {'compute (6ND)':>14} {'runs':>5} {'FLOPs':>10}"]
        for proxy, cost in zip(self.proxies, self.cost.budgets, strict=True):
            for number, tokens in enumerate(proxy.tokens):
                own = f"{cost.runs:>5} {cost.runs * cost.run_flops:>10.2e}" if number == 0 else ""
                lines.append(
                    f"{proxy.params:>14,} {tokens:>16,} {training_flops(proxy.params, tokens):>14.2e} {own}".rstrip()
                )
        total = self.cost
        lines.append(
            f"{total.flops:.2e} FLOPs, {total.share:.1%} of {GRID_POINTS} points and {GRID_SEEDS} seeds on the target "
            f"({total.grid_flops:.2e} FLOPs); {total.most_share:.1%} with every refinement."
        )
        return "\n".join(lines)


def plan_sweep(
    target: PreTrainedModel | PreTrainedConfig | str | os.PathLike,
    *,
    train_dataset: Any,
    eval_dataset: Any,
    tokens: float,
    sequence_length: int,
    tokenizer: Any = None,
    sweep_config: SweepConfig | None = None,
    **options: Any,
) -> SweepPlan:
    """Choose proxies, read the texts, count the cost; see `run_sweep` for the arguments.

    Raises:
        WarmstartError: what was asked cannot be done.
    """
    asked = SweepConfig.of(sweep_config, options)
    if not (isinstance(tokens, (int, float)) and math.isfinite(tokens) and tokens >= 1):
        raise WarmstartError(f"tokens={tokens!r} must be the number of tokens that are planned for the target.")
    if not (isinstance(sequence_length, int) and sequence_length >= 2):
        raise WarmstartError(f"sequence_length={sequence_length!r} must be an integer of at least 2 tokens.")
    model_class, config = causal_class_and_config(target)
    check_length(config, sequence_length)
    proxies = choose_proxies(model_class, config, sequence_length, asked)
    _check_steps(proxies, asked)
    found = tokenizer_of(tokenizer, target)
    vocabulary = config.get_text_config().vocab_size
    train = read_blocks(train_dataset, "train_dataset", sequence_length, vocabulary, found)
    evaluation = read_blocks(eval_dataset, "eval_dataset", sequence_length, vocabulary, found)
    evaluation = evaluation.first(max(1, asked.max_eval_tokens // sequence_length))
    check_texts(train, evaluation, max(p.horizons[-1] for p in proxies))
    count = count_parameters(config)
    grid = GRID_POINTS * GRID_SEEDS * tokens * flops_per_token(config, sequence_length, count)
    budgets = [_budget_cost(proxy, asked, evaluation.tokens.numel()) for proxy in proxies]
    data = json.dumps(config.to_diff_dict(), sort_keys=True, default=str)
    return SweepPlan(
        model_class, count.non_embedding, float(tokens), sequence_length, tuple(proxies), train, evaluation, asked,
        SweepCost(tuple(budgets), grid), hashlib.sha256(data.encode()).hexdigest(),
        fingerprint(evaluation.tokens.long(), tokenizer=found, config=config),
    )  # fmt: skip


def most_batches(proxy: Proxy, asked: SweepConfig) -> Limits:
    """Batches that leave a proxy's shortest run its fewest steps."""
    return Limits(min(proxy.horizons) // asked.min_steps)


def guessed_centre(proxy: Proxy, asked: SweepConfig) -> Point:
    """Where a design would be centred without any run."""
    return first_centre(training_flops(proxy.params, proxy.tokens[-1]), proxy.sequence_length, asked)


def _budget_cost(proxy: Proxy, asked: SweepConfig, eval_tokens: int) -> BudgetCost:
    points = first_points(guessed_centre(proxy, asked), most_batches(proxy, asked), asked)
    each = sum(run_flops(proxy, point, asked, eval_tokens) for point in points) / len(points)
    runs = len(points) * len(asked.seeds)
    more = asked.refinements * NEIGHBOURS * len(proxy.horizons) * len(asked.seeds)
    return BudgetCost(proxy.params, proxy.tokens, runs, each, runs + more)


def _check_steps(proxies: list[Proxy], asked: SweepConfig) -> None:
    short = [p for p in proxies if min(p.horizons) < asked.min_steps]
    if short:
        lines = ", ".join(f"{p.params:,} parameters ({min(p.horizons)} sequences)" for p in short)
        raise WarmstartError(
            f"Runs of min_steps={asked.min_steps} steps need as many sequences, and these proxies see fewer: {lines}. Pass "
            "larger proxies, more tokens_per_parameter, a shorter sequence_length, or fewer min_steps."
        )


def causal_class_and_config(
    source: PreTrainedModel | PreTrainedConfig | str | os.PathLike,
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Class and config of a causal language model; loads no weights."""
    model_class, config = class_and_config(source)
    # By name: asking the mapping for its classes would import every one of them.
    if model_class.__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise WarmstartError(f"{model_class.__name__} is no causal language model, and a sweep trains these alone.")
    return model_class, config


def check_length(config: PreTrainedConfig, sequence_length: int) -> None:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and sequence_length > longest:
        raise WarmstartError(
            f"sequence_length={sequence_length} is longer than the {longest} positions of the target. Pass at most that."
        )


def tokenizer_of(tokenizer: Any, target: Any) -> Any:
    """The tokenizer that was passed, or the one that lies with the target; None where there is none."""
    if tokenizer is None and not isinstance(target, (str, os.PathLike)):
        return None
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    from transformers import AutoTokenizer

    source = tokenizer if tokenizer is not None else target
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if tokenizer is None:
            return None
        words = " ".join(str(error).split())
        raise WarmstartError(f"No tokenizer could be read from {str(source)!r}: {words}") from error
