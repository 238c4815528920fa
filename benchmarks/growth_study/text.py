"""The study's text: a tokenizer of it, blocks of one length, and what the study is, so that nothing else is mixed in.

study.json   setting, and text by digest; a folder of another study is refused
text.pt      blocks to train on and held-out ones
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.quickstart_text import train_tokenizer
from hf_warmstart import WarmstartError
from hf_warmstart.scaling.sweeps.folder import write_atomically
from hf_warmstart.scaling.sweeps.text import Blocks, read_blocks

from .settings import Setting

STUDY, TEXT = "study.json", "text.pt"


@dataclass(frozen=True)
class Text:
    """Blocks to train on, and held-out ones."""

    train: Blocks
    held_out: Blocks

    @property
    def tokens(self) -> int:
        """Of the training text."""
        return self.train.tokens.numel()


def prepare(folder: Path, setting: Setting, train: Sequence[Path], held_out: Sequence[Path]) -> Text:
    """Read, or make, a study's text.

    Raises:
        WarmstartError: no text where there is none yet, text that cannot be used, or a folder of another study.
    """
    said = json.loads(json.dumps(dataclasses.asdict(setting)))
    if (folder / STUDY).is_file():
        found = json.loads((folder / STUDY).read_text())["setting"]
        unsaid = {f.name: f.default for f in dataclasses.fields(setting) if f.name not in found}  # by an older version
        before = found | json.loads(json.dumps(unsaid))
        different = sorted(name for name in said if before[name] != said[name] and name != "seeds")
        if different:
            raise WarmstartError(
                f"{folder} holds another study, which differs in {', '.join(different)}. Pass another folder."
            )
        return read(folder)
    if not train or not held_out:
        raise WarmstartError(f"{folder} holds no study yet. Pass --text and --eval-text, files of text.")
    if missing := sorted(str(path) for path in [*train, *held_out] if not path.is_file()):
        raise WarmstartError(f"No such files: {', '.join(missing)}.")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([path.read_text(encoding="utf-8") for path in train], setting.vocabulary)
    blocks = {
        name: read_blocks([str(path) for path in paths], name, setting.length, setting.vocabulary, tokenizer)
        for name, paths in (("train", train), ("held_out", held_out))
    }
    kept = blocks["held_out"].tokens
    most = max(1, setting.eval_tokens // setting.length)
    if len(kept) > most:  # evenly, so that every file counts
        kept = kept[torch.linspace(0, len(kept) - 1, most).round().long()].contiguous()
    beside = folder / f".{TEXT}.{os.getpid()}"
    short = torch.int16 if setting.vocabulary < 2**15 else torch.int32
    torch.save({"train": blocks["train"].tokens.to(short), "held_out": kept.to(short)}, beside)
    os.replace(beside, folder / TEXT)
    texts: dict[str, Any] = {
        "text": [path.name for path in train],
        "digest": blocks["train"].digest[:16],
        "train_tokens": blocks["train"].tokens.numel(),
        "held_out_tokens": kept.numel(),
    }
    write_atomically(folder / STUDY, json.dumps({"setting": said, **texts}, indent=1) + "\n")
    return read(folder)


def read(folder: Path) -> Text:
    """The text that `prepare` made."""
    found = torch.load(folder / TEXT)
    return Text(Blocks(found["train"], "train"), Blocks(found["held_out"], "held_out"))
