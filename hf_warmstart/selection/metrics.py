"""What can be said of a grown model without training it, or against its frozen parent at any step of its training.

All in eval mode, on a few fixed batches. Over the positions that the attention mask keeps:

    loss_change       L(child) - L(parent), nats per token
    kl                mean KL(parent || child), nats per token      kl_reverse   mean KL(child || parent)
    max_logit_change  the largest |difference| of a logit
    rms_ratio         of each layer's output, child over parent (the parent's layer that it grew from)
    effective_rank    exp(entropy of the normalised singular values) of the last hidden states (tokens x width)

The direction of the divergence in arXiv 2604.04281 is not known: both are measured. Effective rank: Roy and Vetterli, 2007.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WarmstartError
from ..growth.plan import GrowthPlan

Batch = Mapping[str, Any]
MOST_ROWS = 1024  # of hidden states that singular values are taken of


@dataclass(frozen=True)
class Outputs:
    """What a model says of one batch.

    Args:
        loss: nats per token. logits: (tokens, vocabulary), float32 or wider, kept positions only. hidden: of each layer, and
            of the embeddings before them, (tokens, width).
    """

    loss: float
    logits: Tensor
    hidden: tuple[Tensor, ...]


@torch.no_grad()
def outputs_of(model: nn.Module, batch: Batch) -> Outputs:
    """A model's outputs for one batch, in eval mode; its mode is put back.

    Raises:
        WarmstartError: the model gives no loss, since there are no labels.
    """
    training, device = model.training, next(model.parameters()).device
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    try:
        made = model.eval()(**batch, output_hidden_states=True)
    finally:
        model.train(training)
    if made.loss is None:
        raise WarmstartError(
            f"{type(model).__name__} gave no loss for a batch of {sorted(batch)}. Pass data with labels, or a collator "
            "that makes them."
        )
    logits = made.logits.reshape(-1, made.logits.shape[-1])
    states = getattr(made, "hidden_states", None) or getattr(made, "decoder_hidden_states", None) or ()
    mask = batch.get("attention_mask")
    keep = slice(None) if mask is None or mask.numel() != len(logits) else mask.reshape(-1).bool()
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = [state.reshape(-1, state.shape[-1]) for state in states]
    return Outputs(
        float(made.loss),
        logits[keep].to(wide),
        tuple(row[keep].to(wide) if len(row) == len(logits) else row.to(wide) for row in rows),
    )


def divergence(of: Tensor, to: Tensor) -> float:
    """Mean KL(of || to) over rows of logits (tokens, vocabulary), nats; over the columns that both have."""
    columns = min(of.shape[-1], to.shape[-1])
    first = torch.log_softmax(of[:, :columns].double(), -1)
    second = torch.log_softmax(to[:, :columns].double(), -1)
    return float((first.exp() * (first - second)).sum(-1).mean())


def effective_rank(states: Tensor) -> float:
    """exp of the entropy of the normalised singular values of a matrix (tokens, width)."""
    values = torch.linalg.svdvals(states[:MOST_ROWS].double())
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def zero_step_metrics(
    parent: nn.Module, child: nn.Module, batches: Sequence[Batch], plan: GrowthPlan | None
) -> dict[str, Any]:
    """What a growth did to the function, before any step.

    Args:
        parent, child: the models. batches: with labels. plan: the growth, which says which layer grew from which; None for
            a model that grew from none, whose layers are not compared.

    Returns:
        The metrics of this module's docstring by name; `rms_ratio` is a list, empty where layers cannot be told apart.
    """
    before = [outputs_of(parent, batch) for batch in batches]
    after = [outputs_of(child, batch) for batch in batches]
    columns = min(before[0].logits.shape[-1], after[0].logits.shape[-1])
    count = len(batches)
    return {
        "loss_change": sum(b.loss - a.loss for a, b in zip(before, after, strict=True)) / count,
        "kl": sum(divergence(a.logits, b.logits) for a, b in zip(before, after, strict=True)) / count,
        "kl_reverse": sum(divergence(b.logits, a.logits) for a, b in zip(before, after, strict=True)) / count,
        "max_logit_change": max(
            float((b.logits[:, :columns] - a.logits[:, :columns]).abs().max())
            for a, b in zip(before, after, strict=True)
        ),
        "rms_ratio": _rms_ratios(before, after, plan),
        "effective_rank": _rank(after),
        "effective_rank_parent": _rank(before),
    }


def _rms_ratios(before: list[Outputs], after: list[Outputs], plan: GrowthPlan | None) -> list[float]:
    if plan is None:
        return []
    layers = plan.layer_map
    if len(before[0].hidden) != layers.before + 1 or len(after[0].hidden) != layers.after + 1:
        return []
    pairs = [(0, 0), *((new + 1, old + 1) for new, old in enumerate(layers.source))]
    return [
        _rms([a.hidden[new] for a in after]) / max(_rms([b.hidden[old] for b in before]), 1e-30) for new, old in pairs
    ]


def _rms(states: list[Tensor]) -> float:
    return float(torch.cat(states).double().square().mean().sqrt())


def _rank(outputs: list[Outputs]) -> float | None:
    if not outputs[0].hidden:
        return None
    return effective_rank(torch.cat([made.hidden[-1] for made in outputs]))
