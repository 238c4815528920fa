"""Probes of a checkpoint: short runs from it at a few learning rates, which correct what laws of small models say of it.

Three rates a factor of two apart, the middle one the law's; then, while the best of them has no neighbour on one side, one
more there. What they are for, and what is read off them, stands in `hparams.probes`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...errors import WarmstartError
from ...growth.source import is_wrapped
from ..tables.compute import count_parameters, flops_per_token
from .config import SweepConfig
from .design import Point
from .folder import write_atomically
from .plan import causal_class_and_config, check_length, tokenizer_of
from .proxies import Proxy
from .text import check_texts, read_blocks
from .training import Reference, train

STEP = 2.0
MOST = 5  # probes of one checkpoint

Row = dict[str, Any]


def run_probes(
    checkpoint: PreTrainedModel | str | os.PathLike,
    *,
    learning_rate: float,
    batch_tokens: int,
    tokens: float,
    train_dataset: Any,
    eval_dataset: Any,
    sequence_length: int,
    tokenizer: Any = None,
    output: str | os.PathLike | None = None,
    sweep_config: SweepConfig | None = None,
) -> list[Row]:
    """Train a checkpoint for a short while at several learning rates.

    Args:
        checkpoint: a model, a folder or a Hub id. Its weights are not changed.
        learning_rate (`float`), batch_tokens (`int`): where to begin: what `recommend` says of a run of `tokens`.
        tokens (`float`): of each probe, such as 15 % of the planned run's.
        train_dataset, eval_dataset: of the planned run, in the forms that `run_sweep` takes; losses are compared with the
            law's, so that the held-out text should be that of its sweep.
        sequence_length (`int`): T, in tokens. tokenizer: as in `run_sweep`.
        output: a file of JSON lines to which each probe is added as it ends; what lies there is not run again.
        sweep_config (`SweepConfig`, *optional*): of which the optimizer, the schedule and the sizes of batches are taken.

    Returns:
        `list[dict]`: for `recommend(probes=...)`, a row for each probe with `learning_rate`, `batch_tokens`, `tokens`, `loss`
        (nats per token; None where it diverged, or ended above that of guessing) and `params`.

    Raises:
        WarmstartError: what was asked cannot be done; or `output` holds probes of something else.

    Example:

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
        >>> texts = torch.randint(9, (400,)).numpy(), torch.randint(9, (80,)).numpy()
        >>> rows = run_probes(LlamaForCausalLM(config), learning_rate=1e-3, batch_tokens=8, tokens=80, sequence_length=8,
        ...                   train_dataset=texts[0], eval_dataset=texts[1])
        >>> sorted(rows[0]), len(rows) >= 3
        (['batch_tokens', 'learning_rate', 'loss', 'params', 'tokens'], True)
    """
    asked = sweep_config or SweepConfig(stop_ratio=None)
    for name, value, least in (
        ("learning_rate", learning_rate, 0.0),
        ("tokens", tokens, 1.0),
        ("batch_tokens", batch_tokens, 1.0),
    ):
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0 and value >= least):
            raise WarmstartError(f"{name}={value!r} must be a positive number{'' if least == 0 else ', 1 or more'}.")
    if not (isinstance(sequence_length, int) and sequence_length >= 2):
        raise WarmstartError(f"sequence_length={sequence_length!r} must be an integer of at least 2 tokens.")
    if is_wrapped(checkpoint):
        raise WarmstartError("Probes train all weights, and this model is wrapped. Pass model.merge_and_unload().")
    model_class, config = causal_class_and_config(checkpoint)
    check_length(config, sequence_length)
    vocabulary, found = config.get_text_config().vocab_size, tokenizer_of(tokenizer, checkpoint)
    texts = [
        read_blocks(source, name, sequence_length, vocabulary, found)
        for source, name in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset"))
    ]
    texts[1] = texts[1].first(max(1, asked.max_eval_tokens // sequence_length))
    count = count_parameters(config)
    sequences, batch = max(1, round(tokens / sequence_length)), max(1, round(batch_tokens / sequence_length))
    check_texts(texts[0], texts[1], sequences)
    run = Proxy(
        config, count.non_embedding, flops_per_token(config, sequence_length, count), sequence_length, (sequences,)
    )
    shared = {"batch_tokens": batch * sequence_length, "tokens": run.tokens[0], "params": run.params}
    rows = _read(output, shared)
    weights: Mapping[str, torch.Tensor] | None = None
    device = checkpoint.device if isinstance(checkpoint, PreTrainedModel) else torch.device("cpu")
    while rates := next_rates(learning_rate, {row["learning_rate"]: row["loss"] for row in rows}):
        if weights is None:
            own = checkpoint if isinstance(checkpoint, PreTrainedModel) else model_class.from_pretrained(checkpoint)
            weights = own.state_dict()
        for rate in rates:
            [outcome] = train(
                model_class,
                run,
                Point(rate, batch),
                0,
                (texts[0], texts[1]),
                asked,
                Reference(),
                device,
                weights=weights,
            )
            rows.append({"learning_rate": rate, "loss": outcome.loss, **shared})
            if output is not None:
                write_atomically(Path(output), "".join(json.dumps(row) + "\n" for row in rows))
    return sorted(rows, key=lambda row: row["learning_rate"])


def next_rates(first: float, losses: Mapping[float, float | None], most: int = MOST) -> list[float]:
    """The rates to probe next: at first three, then one beyond the best while it lies at an end; none when that is enough.

    Args:
        first: the middle of the first three. losses: of each rate that was probed; None where it diverged.
        most: probes in all.
    """
    wanted = [rate for rate in (first / STEP, first, first * STEP) if not any(_same(rate, done) for done in losses)]
    if wanted:
        return wanted
    there = sorted(losses)
    found = {rate: math.inf if (loss := losses[rate]) is None else loss for rate in there}
    best = min(there, key=found.__getitem__)
    if len(there) >= most or there[0] < best < there[-1]:
        return []
    return [best / STEP if best == there[0] else best * STEP]


def _same(one: float, other: float) -> bool:
    return abs(math.log(one / other)) < 1e-6


def _read(output: str | os.PathLike | None, shared: Mapping[str, float]) -> list[Row]:
    """The probes of an earlier call."""
    if output is None or not Path(output).exists():
        return []
    try:
        rows = [json.loads(line) for line in Path(output).read_text().splitlines()]
        others = sorted(name for name in shared for row in rows if row[name] != shared[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WarmstartError(f"{str(output)!r} cannot be read as probes: {type(error).__name__}: {error}") from error
    if others:
        raise WarmstartError(
            f"{str(output)!r} holds probes whose {' and '.join(dict.fromkeys(others))} differ. Pass another output."
        )
    return rows
