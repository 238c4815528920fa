"""Metrics of a language model on held-out text, for cards, for `evaluate` and inside `Trainer`.

With `l_i` the loss of token i in nats, N the number of predicted tokens and B the number of bytes of the text:

    loss = sum_i l_i / N,   perplexity = exp(loss),   bits_per_byte = sum_i l_i / (B ln 2)

`Trainer.evaluate()` averages batches by their samples, so that padded rows weigh too much; and `evaluate`'s own perplexity is
a mean of the perplexities of sequences. Here every predicted token counts once. Bits per byte are comparable between models
of different vocabularies.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction, PreTrainedModel

from ..errors import WarmstartError
from ..scaling.tables.evaluation import IGNORED, evaluate

if TYPE_CHECKING:
    from evaluate import Metric

METRIC = Path(__file__).with_name("language_modeling.py")


def load_metric(**options: Any) -> Metric:
    """The metric as one of `evaluate`'s, loaded from this package: `evaluate.load(str(METRIC))`.

    Args:
        **options: as for `evaluate.load`, such as `experiment_id`.

    Returns:
        An `evaluate.Metric` with `add_batch` and `compute`; its `inputs_description` says of what.

    Example:

        >>> metric = load_metric()
        >>> metric.add_batch(predictions=[6.0, 3.0], references=[2, 1])     # nats of two rows, and their tokens
        >>> metric.compute()["loss"]
        3.0
    """
    import evaluate as evaluate_library

    return evaluate_library.load(str(METRIC), **{"keep_in_memory": True, **options})


def summary(nats: float, tokens: int, size: int | None = None) -> dict[str, float]:
    """Loss, perplexity, bits per byte and tokens.

    Args:
        nats (`float`): loss of all predicted tokens together. tokens (`int`): how many. size (`int`, *optional*): of the
            text, in bytes of UTF-8; without it there are no bits per byte.

    Raises:
        WarmstartError: no token was predicted.
    """
    if tokens <= 0:
        raise WarmstartError("No token was predicted. Pass rows of two tokens or more that are not masked.")
    loss = nats / tokens
    found = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": int(tokens)}
    return found | ({"bits_per_byte": nats / size / math.log(2), "bytes": int(size)} if size else {})


def held_out_metrics(
    model: PreTrainedModel,
    eval_dataset: Any,
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    max_rows: int | None = None,
) -> dict[str, float]:
    """Metrics of a causal language model, under the names of `Trainer.evaluate()`: what a card shows.

    Args:
        model (`PreTrainedModel`): it is left in the mode that it was in.
        eval_dataset: rows with `input_ids` (and `labels` or `attention_mask`), rows with `text`, or a tensor of ids (rows,
            length). tokenizer (*optional*): for rows of text, and for bits per byte.
        batch_size (`int`, defaults to 8): rows at a time. max_rows (`int`, *optional*): of the data set; all by default.

    Returns:
        `eval_loss` in nats per token, its standard error over rows `eval_loss_error`, `eval_perplexity`, `eval_tokens`; with a
        tokenizer `eval_bits_per_byte` and `eval_bytes`. `push_to_hub(child, ..., metrics=..., parent_metrics=...)` takes them.

    Raises:
        WarmstartError: rows hold neither `input_ids` nor text with a tokenizer, or no token is predicted.
    """
    found = evaluate(model, eval_dataset, tokenizer=tokenizer, batch_size=batch_size, max_rows=max_rows)
    measured = found.fingerprint
    numbers = summary(found.loss * measured.tokens, measured.tokens, measured.bytes)
    return {f"eval_{name}": value for name, value in numbers.items()} | {"eval_loss_error": found.error}


def token_losses(logits: Tensor | tuple, labels: Tensor) -> Tensor:
    """Loss and number of the predicted tokens of each row: for `Trainer(preprocess_logits_for_metrics=token_losses)`.

    Args:
        logits: (rows, length, vocabulary), of a causal model. labels: (rows, length), -100 where nothing is predicted.

    Returns:
        float64 (rows, 2): nats, and tokens. So an evaluation keeps two numbers of a row, not its logits.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    losses = cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    nats = losses.view(targets.shape).double().sum(1)
    return torch.stack([nats, (targets != IGNORED).sum(1).double()], 1)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Token-mean loss and perplexity of a `Trainer`'s evaluation: for `Trainer(compute_metrics=compute_metrics)`.

    Args:
        prediction: whose `predictions` are what `token_losses` made of each batch, (rows, 2).

    Returns:
        `token_loss` in nats, `perplexity`, `tokens`; `Trainer` puts `eval_` before each. (Its own `eval_loss`, a mean over
        samples, stays beside them.)
    """
    nats, tokens = prediction.predictions.sum(0)  # type: ignore[union-attr]
    found = summary(float(nats), int(tokens))
    return {"token_loss": found["loss"], "perplexity": found["perplexity"], "tokens": found["tokens"]}
