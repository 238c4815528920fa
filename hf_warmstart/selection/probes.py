"""What a short probe measures at a few steps ("lags") of a candidate's own training.

At each lag, on the fixed batches of `metrics` and against what the candidate was at step 0:

    kl, kl_reverse     to the frozen parent
    drift_logits       root mean square of the logits' change since step 0
    drift_hidden       the same of the last hidden states, over their own root mean square at step 0
    drift_parameters   the same of the parameters
    escape             see `escape`
    gradient_noise     the batch size, in examples, at which noise and signal of the gradient are equal

Nothing here draws from the random state that training goes on with.

Gradient noise, over n micro-batches of b examples with gradients G_i and their mean G:

    trace = sum |G_i - G|^2 / (n - 1)        |g|^2 = |G|^2 - trace / n        gradient_noise = b trace / |g|^2

None where the estimate of |g|^2 is not positive. Source: arXiv 1812.06162 ("simple" noise scale), with dropout as the
regime has it, which the paper has not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..growth.plan import GrowthPlan
from .escape import escape
from .metrics import Batch, divergence, outputs_of

# Steps at which probes measure. 16 is the paper's; in an earlier study in miniature, whose code was not kept, the loss at
# step 20 ranked badly (Spearman 0.36 with the loss after 600 steps) and that at 60 and 100 well (0.90): `docs/selection.md`.
LAGS = (16, 64)


@dataclass
class Baseline:
    """What a candidate was at step 0, on the CPU.

    Args:
        tensors: its parameters and buffers by name, tied ones once. logits, hidden: of each batch.
        parent: the parent's logits of each batch.
    """

    tensors: Mapping[str, Tensor]
    logits: list[Tensor]
    hidden: list[Tensor | None]
    parent: list[Tensor]

    @classmethod
    def of(cls, parent: nn.Module, child: nn.Module, batches: Sequence[Batch]) -> Baseline:
        """Measure it; the models are untouched."""
        outputs = [outputs_of(child, batch) for batch in batches]
        return cls(
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in child.state_dict().items()},
            [made.logits.cpu() for made in outputs],
            [made.hidden[-1].cpu() if made.hidden else None for made in outputs],
            [outputs_of(parent, batch).logits.cpu() for batch in batches],
        )


def probe(
    child: nn.Module,
    baseline: Baseline,
    batches: Sequence[Batch],
    training_batches: Sequence[Batch],
    plan: GrowthPlan | None,
) -> dict[str, Any]:
    """Measure a candidate where it is now.

    Args:
        child: in training; nothing of it changes. baseline: of it at step 0. batches: those of the baseline.
        training_batches: equal micro-batches for the gradient's noise, at least two; none for no noise.
        plan: the growth, for the escape; None for a model that grew from none.
    """
    outputs = [outputs_of(child, batch) for batch in batches]
    tensors = child.state_dict()
    hidden = [made.hidden[-1].cpu() for made in outputs if made.hidden]
    return {
        "kl": _mean(divergence(p, made.logits.cpu()) for p, made in zip(baseline.parent, outputs, strict=True)),
        "kl_reverse": _mean(
            divergence(made.logits.cpu(), p) for p, made in zip(baseline.parent, outputs, strict=True)
        ),
        "drift_logits": _rms([made.logits.cpu() - old for made, old in zip(outputs, baseline.logits, strict=True)]),
        "drift_hidden": _relative(hidden, [old for old in baseline.hidden if old is not None]),
        "drift_parameters": _relative(
            [p.detach().cpu() for p in child.parameters()],
            [baseline.tensors[name] for name, _ in child.named_parameters()],
        ),
        "escape": None if plan is None else escape(plan, tensors, baseline.tensors).to_dict(),
        "gradient_noise": gradient_noise(child, training_batches) if len(training_batches) > 1 else None,
    }


def gradient_noise(model: nn.Module, batches: Sequence[Batch]) -> float | None:
    """The simple noise scale in examples, from micro-batches of equal size; the model's gradients are untouched."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    total: list[Tensor] = []
    squares = 0.0
    for batch in batches:
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        found = torch.autograd.grad(model(**inputs).loss, parameters, allow_unused=True)
        gradients = [g if g is not None else torch.zeros_like(p) for g, p in zip(found, parameters, strict=True)]
        squares += sum(float(g.double().square().sum()) for g in gradients)
        total = gradients if not total else [t.add_(g) for t, g in zip(total, gradients, strict=True)]
    count = len(batches)
    mean = sum(float(t.double().square().sum()) for t in total) / count**2
    trace = (squares - count * mean) / (count - 1)
    signal = mean - trace / count
    examples = len(next(value for value in batches[0].values() if isinstance(value, Tensor)))
    return examples * trace / signal if signal > 0 else None


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Context after which Python's, numpy's and torch's random states are what they were before."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _rms(tensors: Sequence[Tensor]) -> float:
    entries = sum(tensor.numel() for tensor in tensors)
    return (sum(float(tensor.double().square().sum()) for tensor in tensors) / max(entries, 1)) ** 0.5


def _relative(now: Sequence[Tensor], start: Sequence[Tensor]) -> float | None:
    """Root mean square of a change over that of the start; None where there is nothing to compare."""
    if not now:
        return None
    return _rms([a - b for a, b in zip(now, start, strict=True)]) / max(_rms(start), 1e-30)
