"""What plans say of bytes on disk, against the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_warmstart import grow, plan_growth
from hf_warmstart.checkpoints.grow_checkpoint import prepare_growth
from hf_warmstart.checkpoints.safetensors import layout as safetensors_layout
from hf_warmstart.checkpoints.weights import whole as whole_weights
from hf_warmstart.errors import UntraceableError
from hf_warmstart.growth.source import class_and_config

from ..models import tiny_model
from .grown import CERTIFICATE, add_training_state, save_parent
from .test_views import zoo_model

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "optimizer.*")


def on_disk(folder: Path) -> int:
    """Bytes of weights, their index and the optimizer's file."""
    return sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern))


GROWTHS = {
    "llama": (torch.float32, "5GB", {"width": 2}),
    "gemma2": (torch.bfloat16, "30KB", {"width": 1.5}),  # tied
    "mixtral": (torch.bfloat16, "50KB", {"width": 1.5, "depth": 2}),  # experts apart in the files
    "gpt2": (torch.float16, "1KB", {"depth": 2}),  # tied, each tensor a file
}
FAST = {("gemma2", None), ("mixtral", torch.float32)}


@pytest.mark.parametrize(
    ("family", "state_dtype"),
    [
        pytest.param(family, dtype, marks=() if (family, dtype) in FAST else pytest.mark.slow)
        for family in GROWTHS
        for dtype in (None, torch.float32, torch.bfloat16)
    ],
)
def test_a_growth_knows_its_bytes(family, state_dtype, monkeypatch, tmp_path):
    dtype, shards, growth = GROWTHS[family]
    monkeypatch.setattr(whole_weights, "certify_record", lambda config: CERTIFICATE)
    parent = save_parent(tmp_path / "parent", family, dtype)
    if state_dtype is not None:
        add_training_state(parent, AutoModelForCausalLM.from_pretrained(parent), state_dtype)
    prepared = prepare_growth(parent, tmp_path / "made", max_shard_size=shards, **growth)
    expected = prepared.output_bytes
    reports: list[tuple[int, int]] = []
    prepared.run(lambda *report: reports.append(report))
    prepared.close()
    assert expected == on_disk(tmp_path / "made")
    assert {total for _, total in reports} == {expected}
    done = [done for done, _ in reports]
    assert done == sorted(done) and done[-1] <= expected


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gemma2", torch.bfloat16),
        ("mixtral", torch.float32),
        pytest.param("llama", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("mixtral", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_a_plan_knows_the_bytes_that_save_pretrained_writes(family, dtype, tmp_path):
    model = tiny_model(family, dtype=dtype).to(dtype)
    child = grow(model, width=1.5, depth=2)
    child.save_pretrained(tmp_path)
    plan = plan_growth(model, width=1.5, depth=2)
    assert plan.output_bytes == on_disk(tmp_path) > plan.tensor_bytes
    assert plan.tensor_bytes == sum(p.nbytes for p in child.parameters())


@pytest.mark.parametrize(
    ("kind", "model_type", "dtype"),
    [
        pytest.param("seq2seq-lm", "t5", torch.float16, marks=pytest.mark.slow),
        ("causal-lm", "deepseek_v3", torch.bfloat16),
    ],
)
def test_a_plan_knows_which_tensors_a_class_keeps_in_float32(kind, model_type, dtype, tmp_path):
    zoo_model(kind, model_type, dtype).save_pretrained(tmp_path / "parent")
    parent = class_and_config(tmp_path / "parent")[0].from_pretrained(tmp_path / "parent")
    grow(parent, depth=2).save_pretrained(tmp_path / "made")
    assert plan_growth(tmp_path / "parent", depth=2).output_bytes == on_disk(tmp_path / "made")


@pytest.mark.slow
def test_a_plan_counts_shards_and_their_index(monkeypatch, tmp_path):
    model = tiny_model("mixtral")
    grow(model, width=2).save_pretrained(tmp_path, max_shard_size="50KB")
    layout = safetensors_layout.folder_layout
    monkeypatch.setattr(
        safetensors_layout, "folder_layout", lambda tensors, size, **options: layout(tensors, "50KB", **options)
    )
    assert plan_growth(model, width=2).output_bytes == on_disk(tmp_path)


def test_of_a_class_that_cannot_be_followed_a_plan_counts_the_tensors(monkeypatch):
    def refuse(*given):
        raise UntraceableError("It cannot be followed.")

    model = tiny_model("llama")
    monkeypatch.setattr("hf_warmstart.checkpoints.weights.saved_bytes.file_view", refuse)
    plan = plan_growth(model, width=2)
    assert plan.output_bytes == plan.tensor_bytes == 4 * plan.parameters_after
