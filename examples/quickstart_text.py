"""Text for the quickstart: what every machine with Python has, or what the user passes.

The source domain is the standard library's own Python files. Which file is training text is decided by a hash of its
name: one in ten is held out whole, one in ten gives only its docstrings to the second domain, documentation, beside
Python's help topics. So nothing that is evaluated stands in the training text.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_warmstart import WarmstartError

END = "<|endoftext|>"
TOPICS = "pydoc_data/topics.py"
# Other people's packages, tests and tables of characters are no Python source that one would learn from.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "encodings", "lib2to3", "pydoc_data"}
SUFFIXES = {".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".csv", ".html", ".tex"}


@dataclass(frozen=True)
class Corpus:
    """Training text and two held-out domains.

    Args:
        name: what the text is. train: documents to learn from. source: held-out documents of the same kind.
        docs: documents of another kind.
    """

    name: str
    train: list[str]
    source: list[str]
    docs: list[str]

    @property
    def digest(self) -> str:
        """A hash of all text, so that two reports can be told to be about the same."""
        return hashlib.sha256("\0".join([*self.train, *self.source, *self.docs]).encode()).hexdigest()[:16]


def load_corpus(
    train_text: str | None = None, dataset: str | None = None, text_column: str = "text", eval_text: str | None = None
) -> Corpus:
    """The built-in text, or the user's.

    Args:
        train_text: a file or folder of text. dataset: a Hub id, or a folder of `datasets`. text_column: its column.
        eval_text: a file or folder, the second held-out domain; by default Python's documentation.

    Raises:
        WarmstartError: text is missing or too short.
    """
    python = _standard_library()
    if train_text:
        name, (train, source) = Path(train_text).name, _split(_read(train_text))
    elif dataset:
        name, (train, source) = dataset, _split(_rows(dataset, text_column))
    else:
        name, train, source = f"Python {platform.python_version()} standard library", python.train, python.source
    return Corpus(name, train, source, _read(eval_text) if eval_text else python.docs)


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[str]] = {"train": [], "source": [], "docs": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if LEFT_OUT.isdisjoint(name.split("/")) and (text := _decoded(path)):
            part = _part(name)
            parts[part].append(_docstrings(text) if part == "docs" else text)
    topics = root / TOPICS
    if not parts["train"] or not parts["docs"] or not topics.is_file():
        raise WarmstartError(
            f"This Python has its standard library without source files below {root}. Pass --train-text and --eval-text."
        )
    docs = [text for text in parts["docs"] if text] + list(_topics(topics))
    return Corpus("", parts["train"], parts["source"], docs)


def _part(name: str) -> str:
    """Where a document belongs, by its name alone: the same on every machine."""
    return {0: "source", 1: "docs"}.get(hashlib.sha256(name.encode()).digest()[0] % 10, "train")


def _docstrings(source: str) -> str:
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, nodes))
    return "\n\n".join(text for text in found if text)


def _topics(path: Path) -> Iterable[str]:
    """Python's help topics, without importing the file under its own name."""
    spec = importlib.util.spec_from_file_location("quickstart_topics", path)
    if spec is None or spec.loader is None:
        raise WarmstartError(f"{path} cannot be read. Pass --eval-text.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return (text for _, text in sorted(module.topics.items()))


def _decoded(path: Path) -> str:
    """A file's text; empty where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _read(where: str) -> list[str]:
    """The documents of a file or a folder."""
    path = Path(where)
    if not path.exists():
        raise WarmstartError(f"{where!r} does not exist. Pass a text file or a folder of text files.")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    found = [text for file in files if (text := _decoded(file)).strip()]
    if not found:
        raise WarmstartError(f"{where!r} holds no UTF-8 text in files of the kinds {sorted(SUFFIXES)}.")
    return found


def _rows(name: str, column: str) -> list[str]:
    """The documents of a dataset's training split."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    try:
        saved = Path(name).is_dir() and any(Path(name).glob("*.json"))
        data = load_from_disk(name) if saved else load_dataset(name, split="train")
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise WarmstartError(f"--dataset {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    data = data.get("train") if isinstance(data, DatasetDict) else data
    if data is None or column not in data.column_names:
        has = data.column_names if data is not None else "no training split"
        raise WarmstartError(f"--dataset {name!r} has no column {column!r} (it has {has}). Pass --text-column.")
    return [str(text) for text in data[column] if text]


def _split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents: one in twenty, or the last twentieth where there are few."""
    if len(documents) >= 40:
        return [d for i, d in enumerate(documents) if i % 20], documents[::20]
    cuts = [len(document) * 19 // 20 for document in documents]
    parts = [(d[:cut], d[cut:]) for d, cut in zip(documents, cuts, strict=True)]
    return [head for head, _ in parts], [tail for _, tail in parts]


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the training text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def blocks(tokenizer: PreTrainedTokenizerBase, documents: list[str], length: int) -> Tensor:
    """Documents joined by the end token and cut: token ids (blocks, length)."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor([token for piece in pieces for token in (*piece, *end)], dtype=torch.int32)
    return ids[: len(ids) // length * length].view(-1, length)


def spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` rows, evenly spread over all."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()]


class BlockStream(Dataset):
    """Blocks in a fixed random order: pass after pass over all blocks, each pass a new permutation.

    Block k of a stream depends on the seed and on k alone, so runs of different lengths and starts see the same data.

    Args:
        rows: token ids (blocks, length). seed: of the order. start: blocks to skip. count: blocks to give.
    """

    def __init__(self, rows: Tensor, seed: int, start: int, count: int):
        passes = range((start + count - 1) // len(rows) + 1)
        order = [torch.randperm(len(rows), generator=torch.Generator().manual_seed(1000 * seed + k)) for k in passes]
        self.rows, self.order = rows, torch.cat(order)[start : start + count]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.rows[self.order[index]].long()
        return {"input_ids": ids, "labels": ids}
