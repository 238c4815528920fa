"""A parent's checkpoint and small selections over it: random tokens, a tiny Llama, few steps."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import default_data_collator

from hf_warmstart import Candidate, SelectionReport, WarmstartTrainingArguments, select_warmstart

from ..models import some_tokens, tiny_model
from ..training.conftest import BATCH, COMMON, blocks, stock_trainer

PARENT_STEPS = 8
TINY = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
WIDE = {"width": 2}


@pytest.fixture(scope="session", autouse=True)
def _little_garbage():
    """accelerate collects garbage after each arm: what was imported need not be looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Plots take longer than arms; one test looks at one, which is drawn before this holds."""
    monkeypatch.setattr(SelectionReport, "plot", lambda self, path: None)


@pytest.fixture(scope="session")
def parent(tmp_path_factory) -> Path:
    """A tiny Llama's checkpoint after some steps."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parent")
    model = tiny_model("llama", randomised=False, **TINY)
    stock_trainer(model, folder, PARENT_STEPS, blocks(0, PARENT_STEPS)).train()
    return folder / f"checkpoint-{PARENT_STEPS}"


def held_out(rows: int = 8) -> Dataset:
    """Evaluation data."""
    ids = some_tokens(rows, 16, seed=77).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def arguments(folder: Path, **options) -> WarmstartTrainingArguments:
    """The planned run."""
    own = {"max_steps": 200, "per_device_eval_batch_size": BATCH, "save_strategy": "no"}
    return WarmstartTrainingArguments(str(folder), **(COMMON | own | options))


def three() -> list[Candidate]:
    """A copy, a slice and a fresh state."""
    return [
        Candidate("copy", **WIDE, width_operator="exact_copy"),
        Candidate("slice", **WIDE, width_operator="reference_slice"),
        Candidate("fresh_state", **WIDE, state_policy="reset", schedule_policy="rewarm"),
    ]


def small_selection(parent: Path, folder: Path, candidates=None, arguments_=None, **options):
    """A selection of a few steps."""
    own = {"probe_steps": (2, 4), "continuation_steps": 8, "eval_every": 4, "repeats": 2}
    return select_warmstart(
        parent,
        three() if candidates is None else candidates,
        train_dataset=blocks(0, 40),
        eval_dataset=held_out(),
        args=arguments(folder, **(arguments_ or {})),
        data_collator=default_data_collator,
        **(own | options),
    )
