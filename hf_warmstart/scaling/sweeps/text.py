"""Text of a sweep: token blocks of one length, the same for every run, and a digest that says which."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...errors import WarmstartError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Fewer blocks are no held-out text: the noise of single documents would hide every optimum.
FEWEST_EVAL_BLOCKS = 8
MANY_PASSES = 4  # over the text; more cost loss (arXiv 2305.16264)
LINES = 1000  # tokenised at once
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blocks:
    """Tokens in blocks of one length.

    Args:
        tokens: (blocks, sequence_length), integers. digest: sha256 of them. text_bytes: bytes of text that they stand for;
            None where tokens were given.
    """

    tokens: Tensor = field(repr=False)
    digest: str
    text_bytes: int | None = None

    @property
    def count(self) -> int:
        """How many blocks."""
        return self.tokens.shape[0]

    def first(self, blocks: int) -> Blocks:
        """The first so many blocks, all of them where there are fewer."""
        if blocks >= self.count:
            return self
        kept = self.tokens[:blocks].contiguous()
        size = None if self.text_bytes is None else round(self.text_bytes * blocks / self.count)
        return Blocks(kept, hashlib.sha256(kept.numpy().tobytes()).hexdigest(), size)

    def rows(self, start: int, stop: int, seed: int) -> Tensor:
        """Rows `start` to `stop` of an endless stream that takes the blocks in a new order in each pass; int64."""
        found = [_order(self.count, seed, number)[a:b] for number, a, b in self._passes(start, stop)]
        return self.tokens[torch.cat(found)].long()

    def _passes(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(number of the pass, from, to) of the parts of an interval of the stream."""
        while start < stop:
            number, a = divmod(start, self.count)
            b = min(self.count, a + stop - start)
            yield number, a, b
            start += b - a


@lru_cache(maxsize=2)
def _order(blocks: int, seed: int, number: int) -> Tensor:
    """The order of the blocks in one pass; kept, since every step of a run asks for it."""
    return torch.randperm(blocks, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))


def read_blocks(
    source: Any, what: str, sequence_length: int, vocabulary: int, tokenizer: PreTrainedTokenizerBase | None
) -> Blocks:
    """Cut text or tokens into blocks; what is left at the end is dropped.

    Args:
        source: files of text (a path or several), a `Dataset` with a column `text` or `input_ids`, or token ids (an integer
            tensor or array of any shape). what: the argument's name, for messages.
        sequence_length: tokens of a block. vocabulary: number of embeddings.
        tokenizer: for text.

    Raises:
        WarmstartError: no text, none that could be read, tokens outside the vocabulary, or less than one block.
    """
    tokens, size = _read(source, what, tokenizer)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocabulary):
        raise WarmstartError(
            f"{what} holds the token {int(tokens.max() if tokens.max() >= vocabulary else tokens.min())}, and the target has "
            f"{vocabulary} embeddings. Pass the target's own tokenizer."
        )
    blocks = tokens.size // sequence_length
    if not blocks:
        raise WarmstartError(
            f"{what} has {tokens.size} tokens, less than one sequence of {sequence_length}. Pass more text, or a shorter "
            "sequence_length."
        )
    kept = np.ascontiguousarray(tokens[: blocks * sequence_length].reshape(blocks, sequence_length), dtype=np.int32)
    share = blocks * sequence_length / tokens.size
    return Blocks(
        torch.from_numpy(kept),
        hashlib.sha256(kept.tobytes()).hexdigest(),
        None if size is None else round(size * share),
    )


def check_texts(train: Blocks, evaluation: Blocks, needed: int) -> None:
    """Refuse held-out text that is too short or not held out; say how often the training text is passed through.

    Args:
        needed: sequences of the longest run.

    Raises:
        WarmstartError: as said.
    """
    if evaluation.count < FEWEST_EVAL_BLOCKS:
        raise WarmstartError(
            f"eval_dataset has {evaluation.count} sequences, and fewer than {FEWEST_EVAL_BLOCKS} cannot tell runs apart. Pass "
            "more held-out text, or a shorter sequence_length."
        )
    seen = set(map(bytes, train.tokens.numpy()))
    same = sum(bytes(row) in seen for row in evaluation.tokens.numpy())
    if same > evaluation.count // 2:
        raise WarmstartError(
            f"{same} of the {evaluation.count} sequences of eval_dataset stand in train_dataset as they are: this is no "
            "held-out text. Pass text that no run sees."
        )
    if (passes := needed / train.count) > MANY_PASSES:
        logger.warning(
            "The longest run passes %.1f times over train_dataset (%d sequences); beyond about %d passes loss falls less than "
            "on new text. Pass more text, or fewer tokens per parameter.", passes, train.count, MANY_PASSES,
        )  # fmt: skip


def _read(source: Any, what: str, tokenizer: PreTrainedTokenizerBase | None) -> tuple[np.ndarray, int | None]:
    """All tokens in a row, and the bytes of text behind them."""
    if isinstance(source, (Tensor, np.ndarray)):
        return _token_ids(np.asarray(source), what), None
    if hasattr(source, "column_names"):
        return _rows(source, what, tokenizer)
    paths = [source] if isinstance(source, (str, os.PathLike)) else source
    if not isinstance(paths, Sequence) or not paths or not all(isinstance(p, (str, os.PathLike)) for p in paths):
        raise WarmstartError(
            f"{what} must be files of text, a Dataset with a column text or input_ids, or token ids; got "
            f"{type(source).__name__}."
        )
    if missing := sorted(str(p) for p in paths if not Path(p).is_file()):
        raise WarmstartError(f"{what}: no such files: {', '.join(missing)}.")
    checked = _tokenizer(tokenizer, what)
    found, size = [], 0
    for path in paths:
        raw = Path(path).read_bytes()
        try:
            lines = raw.decode("utf-8").splitlines(keepends=True)
        except UnicodeDecodeError as error:
            raise WarmstartError(f"{what}: {path} is not text in UTF-8: {error}.") from error
        size += len(raw)
        found.append(_encoded(lines, checked, end=None))
    return np.concatenate(found), size


def _rows(source: Any, what: str, tokenizer: PreTrainedTokenizerBase | None) -> tuple[np.ndarray, int | None]:
    names = list(source.column_names)
    if "input_ids" in names:
        rows = [np.asarray(row, dtype=np.int64) for row in source["input_ids"]]
        return (np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)), None
    if "text" not in names:
        raise WarmstartError(f"{what} has the columns {sorted(names)}; one named text or input_ids is needed.")
    checked = _tokenizer(tokenizer, what)
    texts = list(source["text"])
    return _encoded(texts, checked, checked.eos_token_id), sum(len(text.encode()) for text in texts)


def _encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase, end: int | None) -> np.ndarray:
    """Tokens of texts in a row, without special tokens but for the end of each text."""
    ids: list[int] = []
    for start in range(0, len(texts), LINES):
        encoded = tokenizer(texts[start : start + LINES], add_special_tokens=False, verbose=False)["input_ids"]
        for row in encoded:
            ids += [*row, end] if end is not None else row
    return np.asarray(ids, dtype=np.int64)


def _token_ids(array: np.ndarray, what: str) -> np.ndarray:
    if array.dtype.kind not in "iu":
        raise WarmstartError(f"{what} holds {array.dtype} numbers, and token ids are integers.")
    return array.reshape(-1).astype(np.int64)


def _tokenizer(tokenizer: PreTrainedTokenizerBase | None, what: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise WarmstartError(f"{what} is text, and the target brings no tokenizer. Pass tokenizer=, or token ids.")
    return tokenizer
