"""Held-out loss as laws need it: the mean over tokens, and a fingerprint of what it was measured on.

`Trainer.evaluate()` averages batches by their samples, so that padded or uneven rows weigh too much; a law's inverse would turn
such a difference into compute. Here every predicted token counts once.

A loss law holds on one text under one tokenizer, and its inverse for one family of models. The fingerprint says which. Between
tokenizers the loss of the same text is mapped by bits per byte: `loss * tokens / bytes` is the same for both.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import WarmstartError

IGNORED = -100  # label of tokens that are not predicted, as in transformers


@dataclass(frozen=True)
class Fingerprint:
    """What a loss was measured on.

    Args:
        text (`str`, *optional*): sha256 of the text, where a tokenizer could decode it or rows have `text`.
        tokens_digest (`str`): sha256 of the token ids. tokens (`int`): how many are predicted. bytes (`int`,
            *optional*): of the
            text, in UTF-8.
        tokenizer (`str`, *optional*): sha256 of its vocabulary. vocab_size (`int`, *optional*): of the model.
        family (`str`, *optional*): the kind of model, as its config names it.
    """

    tokens_digest: str
    tokens: int
    text: str | None = None
    bytes: int | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    family: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fingerprint:
        known: dict[str, Any] = {name: data.get(name) for name in cls.__dataclass_fields__}
        return cls(**known)


@dataclass(frozen=True)
class Evaluation:
    """A loss, in nats per token, with what it was measured on. error (`float`): its standard error over rows."""

    loss: float
    error: float
    fingerprint: Fingerprint


def fingerprint(eval_dataset: Any, *, tokenizer: Any = None, config: PreTrainedConfig | None = None) -> Fingerprint:
    """The fingerprint of an evaluation set, for the law that runs evaluated on it are to give.

    Args:
        eval_dataset: as for `evaluate`. tokenizer: a transformers tokenizer; without it losses of other tokenizers cannot be
            mapped. config (`PreTrainedConfig`, *optional*): of the runs' models.

    Raises:
        WarmstartError: rows hold neither `input_ids` nor text with a tokenizer.
    """
    return _fingerprint(_rows(eval_dataset, tokenizer, None), tokenizer, config)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    eval_dataset: Any,
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    max_rows: int | None = None,
) -> Evaluation:
    """The mean loss over all predicted tokens of a data set.

    Args:
        model (`PreTrainedModel`): a causal language model; it is left in the mode that it was in.
        eval_dataset: rows with `input_ids` (and `labels`, with -100 for tokens that do not count, or
        `attention_mask`), rows with
            `text`, or a tensor of ids (rows, length).
        tokenizer (*optional*): for rows of text, and to know the text of ids.
        batch_size (`int`, defaults to 8): rows at a time; rows of one length go together, so that nothing is padded.
        max_rows (`int`, *optional*): of the data set; all by default.

    Returns:
        `Evaluation`: nats per token.

    Raises:
        WarmstartError: rows hold neither `input_ids` nor text with a tokenizer, or no token is predicted.
    """
    rows = list(_rows(eval_dataset, tokenizer, max_rows))
    training, sums, counts = model.training, [], []
    model.eval()
    try:
        for batch in _batches(rows, batch_size):
            ids = torch.tensor(np.stack([row[0] for row in batch]), device=model.device)
            labels = torch.tensor(np.stack([row[1] for row in batch]), device=model.device)[:, 1:]
            logits = model(input_ids=ids).logits[:, :-1].float()
            losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
            sums += losses.view(len(batch), -1).double().sum(1).tolist()
            counts += (labels != IGNORED).sum(1).tolist()
    finally:
        model.train(training)
    total = sum(counts)
    if not total:
        raise WarmstartError(
            "No token of the evaluation set is predicted. Pass rows of two tokens or more that are not masked."
        )
    loss = sum(sums) / total
    spread = sum((s - loss * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return Evaluation(loss, math.sqrt(spread) / total, _fingerprint(rows, tokenizer, model.config))


def mapped_loss(loss: float, measured: Fingerprint, law: Fingerprint) -> float | None:
    """A loss in the law's unit: as it is on the law's own tokens, by bits per byte on its text under another tokenizer.

        L_law = L * (tokens / bytes) / (tokens_law / bytes_law)

    Returns:
        Nats per token of the law's tokenizer; None where the loss is of other text, which nothing maps.
    """
    if measured.tokens_digest == law.tokens_digest:
        return loss
    known = measured.text is not None and measured.text == law.text and measured.bytes and law.bytes
    return loss * (measured.tokens / measured.bytes) * (law.bytes / law.tokens) if known else None  # type: ignore[operator]


def _rows(dataset: Any, tokenizer: Any, max_rows: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels of each row."""
    if isinstance(dataset, torch.Tensor):
        dataset = [{"input_ids": row} for row in dataset]
    if not isinstance(dataset, Iterable) and not hasattr(dataset, "__getitem__"):
        raise WarmstartError(
            f"{type(dataset).__name__} is no evaluation set. Pass a Dataset, a list of rows or a tensor of ids."
        )
    for row in islice(iter(dataset), max_rows):
        if isinstance(row, Mapping) and "input_ids" in row:
            ids = _ids(row["input_ids"])
        elif isinstance(row, Mapping) and "text" in row and tokenizer is not None:
            ids = _ids(tokenizer(row["text"])["input_ids"])
        else:
            found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise WarmstartError(
                f"Rows of an evaluation set need 'input_ids', or 'text' with tokenizer=; this one has {found}."
            )
        labels = _ids(row["labels"]).copy() if row.get("labels") is not None else ids.copy()
        if row.get("attention_mask") is not None:
            labels[_ids(row["attention_mask"]) == 0] = IGNORED
        if len(ids) > 1:
            yield ids, labels


def _ids(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.int64).reshape(-1)


def _batches(rows: list[tuple[np.ndarray, np.ndarray]], size: int) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Rows of one length together."""
    by_length: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for row in rows:
        by_length.setdefault(len(row[0]), []).append(row)
    for same in by_length.values():
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _fingerprint(
    rows: Iterable[tuple[np.ndarray, np.ndarray]], tokenizer: Any, config: PreTrainedConfig | None
) -> Fingerprint:
    ids_hash, text_hash = hashlib.sha256(), hashlib.sha256()
    tokens = size = 0
    for ids, labels in rows:
        predicted = labels[1:] != IGNORED
        ids_hash.update(ids.tobytes() + labels.tobytes())
        tokens += int(predicted.sum())
        if tokenizer is not None:
            text = tokenizer.decode(ids.tolist(), skip_special_tokens=True).encode()
            text_hash.update(text)
            size += len(text)
    words = json.dumps(sorted(tokenizer.get_vocab().items())).encode() if tokenizer is not None else b""
    text_config = config.get_text_config() if config is not None else None
    return Fingerprint(
        ids_hash.hexdigest(),
        tokens,
        text_hash.hexdigest() if tokenizer is not None else None,
        size or None,
        hashlib.sha256(words).hexdigest() if tokenizer is not None else None,
        getattr(text_config, "vocab_size", None),
        getattr(text_config, "model_type", None),
    )
