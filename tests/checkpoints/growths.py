"""A small checkpoint to grow, with weights in several files and a training state; growing it takes a fraction of a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hf_warmstart.checkpoints.weights import whole as whole_weights
from hf_warmstart.growth.certify import Certificate
from hf_warmstart.hub import save

from ..models import some_tokens, tiny_model

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
GROWTH = {"width": 2, "threads": 1, "max_shard_size": 20_000}


def certify_nothing(config: object) -> Certificate:
    """Stands for the certificate, which takes longer than all else."""
    return Certificate(exact=True, max_relative_error=0.0, max_pullback_error=0.0)


def do_not_certify(monkeypatch=None) -> None:
    """Take every growth for exact, in a test or in the whole process."""
    for module in (whole_weights, save):
        if monkeypatch is None:
            module.certify_record = certify_nothing
        else:
            monkeypatch.setattr(module, "certify_record", certify_nothing)


def make_checkpoint(folder: Path) -> Path:
    """A Llama of 16 units in three files, one step of AdamW, a schedule and a tokenizer's file."""
    model = tiny_model("llama", **TINY)
    model.save_pretrained(folder, max_shard_size="10KB")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    ids = some_tokens(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    scheduler.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(scheduler.state_dict(), folder / "scheduler.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": []}))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return folder


def bytes_below(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
