"""Probes of a checkpoint: which rates are run, that they start from it, go on where they were, and refuse what cannot be."""

from __future__ import annotations

import json
import math

import pytest
import torch

from hf_warmstart import HparamPredictor, WarmstartError
from hf_warmstart.scaling.sweeps import SweepConfig, run_probes
from hf_warmstart.scaling.sweeps import probes as module
from hf_warmstart.scaling.sweeps.probes import next_rates
from hf_warmstart.scaling.sweeps.training import held_out_loss
from hf_warmstart.scaling.tables.compute import count_parameters

from ..models import tiny_model
from .planted import Planted

LENGTH = 8


@pytest.fixture
def model(given):
    """A checkpoint that knows some of the text: its loss lies below that of guessing."""
    made = tiny_model("llama", randomised=False)
    rows = torch.from_numpy(given["train_dataset"])[:8]
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for _ in range(5):
        made(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(9, (size, LENGTH), generator=generator).numpy() for size in (60, 12)]
    return {
        "learning_rate": 1e-3, "batch_tokens": 32, "tokens": 320, "sequence_length": LENGTH,
        "train_dataset": texts[0], "eval_dataset": texts[1],
    }  # fmt: skip


def test_rates_go_on_towards_the_best_until_it_has_neighbours_on_both_sides():
    def asked(losses, most=5):
        return next_rates(1.0, losses, most)

    assert asked({}) == [0.5, 1.0, 2.0] and asked({1.0: 3.0}) == [0.5, 2.0]
    assert asked({0.5: 3.0, 1.0: 2.0, 2.0: 3.0}) == []
    assert asked({0.5: 1.0, 1.0: 2.0, 2.0: 3.0}) == [0.25]
    assert asked({0.5: 3.0, 1.0: 2.0, 2.0: 1.0}) == [4.0]
    assert asked({0.5: 3.0, 1.0: 2.0, 2.0: None}) == []  # what diverged closes its side
    assert asked({0.5: None, 1.0: None, 2.0: None}) == [0.25]
    assert asked({0.5: 3.0, 1.0: 2.0, 2.0: 1.0}, most=3) == []


def test_probes_start_from_the_checkpoint_and_feed_the_law(given, model, tmp_path):
    before = [parameter.clone() for parameter in model.parameters()]
    rows = run_probes(model, **given, output=tmp_path / "probes.jsonl")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [row["learning_rate"] for row in rows] == sorted(row["learning_rate"] for row in rows)
    assert {0.5e-3, 1e-3, 2e-3} <= {row["learning_rate"] for row in rows} and len(rows) <= 5
    for row in rows:
        assert (row["batch_tokens"], row["tokens"]) == (32, 320)
        assert row["params"] == count_parameters(model.config).non_embedding
    # From a folder the same; at a rate of next to nothing the loss is the checkpoint's own.
    model.save_pretrained(tmp_path / "model")
    assert run_probes(str(tmp_path / "model"), **given) == rows
    evaluation = torch.from_numpy(given["eval_dataset"])
    still = run_probes(model, **{**given, "learning_rate": 1e-12})
    blocks = module.read_blocks(evaluation.numpy(), "eval", LENGTH, 97, None)
    assert still[0]["loss"] == pytest.approx(held_out_loss(model, blocks, SweepConfig()), abs=1e-5)
    # The file is a table that `recommend` takes.
    law = HparamPredictor.fit(Planted().runs(), draws=20)
    run = {"params": rows[0]["params"], "tokens": 1e4, "sequence_length": LENGTH}
    by_file = law.recommend(**run, probes=tmp_path / "probes.jsonl")
    assert by_file.learning_rate == law.recommend(**run, probes=rows).learning_rate
    assert f"by {len(rows)} probes" in by_file.sources["learning_rate"]


def test_probes_go_on_where_they_were(given, model, tmp_path, monkeypatch):
    file = tmp_path / "probes.jsonl"
    whole = run_probes(model, **given, output=file)
    lines = file.read_text().splitlines()
    file.write_text("".join(f"{line}\n" for line in lines[:2]))
    trained, own = [], module.train
    monkeypatch.setattr(module, "train", lambda *a, **k: trained.append(a[2].learning_rate) or own(*a, **k))
    assert run_probes(model, **given, output=file) == whole and len(trained) == len(lines) - 2
    assert run_probes(model, **given, output=file) == whole and len(trained) == len(lines) - 2
    with pytest.raises(WarmstartError, match="holds probes whose batch_tokens differ"):
        run_probes(model, **{**given, "batch_tokens": 64}, output=file)
    file.write_text("{")
    with pytest.raises(WarmstartError, match="cannot be read as probes"):
        run_probes(model, **given, output=file)


def test_a_probe_that_diverges_is_none_and_closes_its_side(given, model, tmp_path, monkeypatch):
    own = module.train

    def diverging(model_class, run, point, *rest, **options):
        [outcome] = own(model_class, run, point, *rest, **options)
        return [outcome if point.learning_rate < 2e-3 else type(outcome)(**{**outcome.__dict__, "loss": None})]

    monkeypatch.setattr(module, "train", diverging)
    rows = run_probes(model, **given, output=tmp_path / "probes.jsonl")
    assert rows[-1]["loss"] is None and rows[-1]["learning_rate"] == 2e-3
    assert json.loads((tmp_path / "probes.jsonl").read_text().splitlines()[2])["loss"] is None
    law = HparamPredictor.fit(Planted().runs(), draws=20)
    run = {"params": rows[0]["params"], "tokens": 1e4, "sequence_length": LENGTH}
    for table in (rows, tmp_path / "probes.jsonl"):
        assert not any("best probe" in words for words in law.recommend(**run, probes=table).warnings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a positive number"),
        ({"tokens": math.nan}, "tokens=nan must be"),
        ({"batch_tokens": "32"}, "batch_tokens='32' must be"),
        ({"sequence_length": 1}, "sequence_length=1 must be"),
        ({"sequence_length": 4096}, "longer than the"),
        ({"train_dataset": torch.full((60, LENGTH), 500).numpy()}, "500"),
    ],
)
def test_what_cannot_be_probed_is_said(given, changes, words):
    with pytest.raises(WarmstartError, match=words):
        run_probes(tiny_model("llama"), **{**given, **changes})


# peft 0.21 still calls names that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
def test_models_that_are_not_trained_so_are_refused(given, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertModel

    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(WarmstartError, match="is wrapped"):
        run_probes(wrapped, **given)
    bert = BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=97)
    )
    with pytest.raises(WarmstartError, match="no causal language model"):
        run_probes(bert, **given)
    with pytest.raises(WarmstartError):
        run_probes(str(tmp_path / "none"), **given)
