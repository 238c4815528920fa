"""A folder with all that the pages speak of, at small size, and the names that their code uses without making them."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

from hf_warmstart import WarmstartTrainingArguments

from ..hub.conftest import hub, use_hub  # noqa: F401
from ..models import some_tokens, tiny_model
from ..scaling.planted import Planted
from ..scaling.test_evaluation import letters
from ..training.conftest import COMMON, blocks, stock_trainer

TINY = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
STEPS = 4
WORDS = "bad feed cab hag face dab gag bead fad hag ace ebb deaf cafe fade beef"  # of the letters that there are


@pytest.fixture(scope="session")
def _made(tmp_path_factory) -> Path:
    """The parent's checkpoint, runs of a study, and text."""
    folder = tmp_path_factory.mktemp("docs")
    model = tiny_model("llama", randomised=False, **TINY)
    stock_trainer(model, folder / "base", STEPS, blocks(0, STEPS)).train()
    checkpoint = folder / "base" / f"checkpoint-{STEPS}"
    letters(1).save_pretrained(checkpoint)
    for steps in (500, 2000):
        shutil.copytree(checkpoint, folder / "runs" / "base" / f"checkpoint-{steps}")
    shutil.rmtree(folder / "base")
    Planted(noise=0.002).runs(12, budgets=4, decades=2.0).to_csv(folder / "runs.csv", index=False)
    words = WORDS.split()
    for name, count, seed in (("corpus", 6000, 0), ("held-out", 800, 1)):
        (folder / f"{name}.txt").write_text(" ".join(random.Random(seed).choices(words, k=count)))
    return folder


@pytest.fixture
def workplace(_made, tmp_path, monkeypatch) -> SimpleNamespace:
    """A copy of that folder to work in, and the names of the namespace."""
    place = tmp_path / "place"
    shutil.copytree(_made, place)
    monkeypatch.chdir(place)
    ids = some_tokens(8, 16, seed=77).tolist()
    held_out = Dataset.from_dict({"input_ids": ids, "labels": ids})
    names = {"train_dataset": blocks(STEPS, 40), "train": blocks(STEPS, 40), "held_out": held_out}
    own = {"max_steps": 200, "per_device_eval_batch_size": 4, "save_strategy": "no"}
    names["args"] = WarmstartTrainingArguments(str(place / "runs" / "planned"), **(COMMON | own))
    return SimpleNamespace(folder=place, names=names)
