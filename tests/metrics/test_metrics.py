"""Every predicted token counts once, in `evaluate`, inside `Trainer` and for the card."""

from __future__ import annotations

import math

import evaluate
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from hf_warmstart import WarmstartError
from hf_warmstart.metrics import METRIC, compute_metrics, held_out_metrics, load_metric, token_losses

from ..models import tiny_model
from ..scaling.test_evaluation import letters

LENGTHS = (17, 5, 17, 30, 2)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(1, 9, (length,), generator=generator).tolist()} for length in LENGTHS]


@pytest.fixture(scope="module")
def losses(model, rows) -> torch.Tensor:
    """The loss of every predicted token, one row at a time."""
    found = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            found.append(cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    return torch.cat(found).double()


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path))
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_the_metric_is_loaded_from_its_file_without_a_network(losses, rows):
    metric = evaluate.load(str(METRIC))
    assert isinstance(metric, evaluate.Metric) and "bits per byte" in metric.description.replace("\n", " ")
    ends = torch.tensor([len(row["input_ids"]) - 1 for row in rows]).cumsum(0)
    for part in losses.tensor_split(ends[:-1]):
        metric.add(prediction=float(part.sum()), reference=len(part))
    found = metric.compute(bytes=1000)
    assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(float(losses.mean())))
    assert found["bits_per_byte"] == pytest.approx(float(losses.sum()) / math.log(2) / 1000)
    assert found["tokens"] == len(losses)
    assert "bits_per_byte" not in load_metric().compute(predictions=[1.0], references=[1])


def test_held_out_metrics_are_of_tokens_and_of_bytes(model, losses, rows):
    tokenizer = letters(1)
    found = held_out_metrics(model, rows, tokenizer=tokenizer, batch_size=2)
    text = "".join(tokenizer.decode(row["input_ids"]) for row in rows)
    assert found["eval_loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found["eval_tokens"] == len(losses) and found["eval_bytes"] == len(text.encode())
    assert found["eval_bits_per_byte"] == pytest.approx(float(losses.sum()) / math.log(2) / len(text), rel=1e-5)
    assert set(held_out_metrics(model, rows)) == {"eval_loss", "eval_loss_error", "eval_perplexity", "eval_tokens"}


def test_a_trainers_evaluation_of_padded_rows_is_the_mean_over_tokens(model, losses, rows, tmp_path):
    tokenizer = letters(1)
    tokenizer.pad_token = " "
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path / "run"), per_device_eval_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True
        ),
        eval_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        preprocess_logits_for_metrics=token_losses,
        compute_metrics=compute_metrics,
    )
    found = trainer.evaluate()
    assert found["eval_token_loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found["eval_tokens"] == len(losses)
    assert found["eval_loss"] != pytest.approx(found["eval_token_loss"], rel=1e-3)  # a mean over samples


def test_rows_without_a_token_are_refused(model):
    with pytest.raises(WarmstartError, match="No token was predicted"):
        load_metric().compute(predictions=[0.0], references=[0])
    with pytest.raises(WarmstartError, match="No token"):
        held_out_metrics(model, [{"input_ids": [1, 2], "labels": [-100, -100]}])
