"""A run with LoRA adapters goes on across a growth: through stock `Trainer` checkpoints, which hold the adapters alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_warmstart import WarmstartError, grow
from hf_warmstart.errors import StateError

from ..models import tiny_model
from .conftest import blocks, losses, stock_trainer, warmstart_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # peft asks the Hub for the config of a base that was made here, to see whether its vocabulary grew.
    pytest.mark.filterwarnings("ignore:.*config file in.*:UserWarning"),
]
BEFORE, AFTER = 4, 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The checkpoint of a parent with adapters, and its losses in the steps that follow."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    steps = BEFORE + AFTER
    trainer = stock_trainer(model, folder, steps, blocks(0, steps), save_steps=BEFORE, save_total_limit=None)
    trainer.train()
    return folder / f"checkpoint-{BEFORE}", losses(trainer)[BEFORE:]


def parent_of(checkpoint) -> PeftModel:
    return PeftModel.from_pretrained(tiny_model("llama"), checkpoint, is_trainable=True)


def test_where_adapters_keep_their_size_the_run_is_its_parents_and_only_with_its_state(run, tmp_path):
    checkpoint, later = run
    found = {}
    for policy in ("carry", "reset"):
        child = grow(parent_of(checkpoint), intermediate_size=192, width_operator="exact_copy")
        options = {"warmstart_from": checkpoint, "state_policy": policy}
        trainer = warmstart_trainer(child, tmp_path / policy, AFTER, blocks(BEFORE, AFTER), **options)
        with pytest.warns(UserWarning, match="exact_copy"):
            trainer.train()
        found[policy] = max(abs(a - b) for a, b in zip(later, losses(trainer), strict=True))
        assert {float(entry["step"]) for entry in trainer.optimizer.state.values()} == {
            AFTER + (BEFORE if policy == "carry" else 0)
        }
    assert found["carry"] < 1e-5 < 1e-4 < found["reset"]


@pytest.mark.parametrize("policy", ["carry", "asymmetric_reset"])
def test_a_wider_and_deeper_run_starts_from_the_state_and_resumes_its_own(run, tmp_path, policy):
    checkpoint, _ = run
    child = grow(parent_of(checkpoint), width=1.5, depth=2)
    options = {"state_policy": policy, "save_steps": 1}
    trainer = warmstart_trainer(child, tmp_path / "run", 2, blocks(BEFORE, 2), checkpoint, **options)
    trainer.train()
    assert trainer.parent_state.step == BEFORE
    assert {float(entry["step"]) for entry in trainer.optimizer.state.values()} == {BEFORE + 2.0}
    again = warmstart_trainer(
        grow(parent_of(checkpoint), width=1.5, depth=2), tmp_path / "run", 2, blocks(BEFORE, 2), checkpoint, **options
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for name, tensor in trainer.model.named_parameters():
        if tensor.requires_grad:
            assert torch.equal(tensor, again.model.get_parameter(name)), name


def test_what_cannot_be_followed_is_refused(run, base, tmp_path):
    checkpoint, _ = run
    child = grow(parent_of(checkpoint), width=2)
    with pytest.raises(StateError, match=r"holds no adapters \['default'\]"):
        warmstart_trainer(child, tmp_path, 1, blocks(0, 1), base).train()
    other = shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
    with pytest.raises(StateError, match="does not fit the parent"):
        warmstart_trainer(child, tmp_path, 1, blocks(0, 1), other).train()
    (other / "adapter_config.json").write_text("{")
    with pytest.raises(StateError, match=r"adapter_config.json in .* cannot be read"):
        warmstart_trainer(child, tmp_path, 1, blocks(0, 1), other).train()
    for option in ({"parent_coordinates": True}, {"learning_rate_transfer": "mup"}, {"train_only": "new"}):
        with pytest.raises(WarmstartError, match="cannot be followed for adapters"):
            warmstart_trainer(child, tmp_path, 1, blocks(0, 1), checkpoint, **option).train()
