"""Models pushed with the real client to a Hub in memory, and loaded from it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import hf_warmstart.hub.save
from hf_warmstart import Certificate, WarmstartError, grow, push_to_hub
from hf_warmstart.growth.plan import RECORD_KEY
from hf_warmstart.hub import save_grown

from .minihub import MiniHub

FILES = ["README.md", "config.json", "generation_config.json", "growth.json", "model.safetensors"]
IDS = torch.arange(12).reshape(1, 12)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# huggingface_hub 2.4 uploads LFS files with an argument that its own HTTP client calls deprecated.
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
@pytest.mark.parametrize("xet", ["on", "off", "absent"])
def test_push_makes_one_commit_with_everything(xet, use_hub, grown, certificate):
    off = xet != "on"
    # With hf_xet on, a large file would go to a Xet store, which this Hub lacks: it takes weights inside the commit.
    with MiniHub(lfs=off) as hub:
        use_hub(hub, xet)
        info = push_to_hub(grown, "user/big", certificate=certificate)
        (commit,) = hub.commits("user/big")
        assert commit.changed == FILES
        assert (info.oid, commit.message) == (commit.oid, "Upload grown LlamaForCausalLM")
        assert bool(hub.large) is off
        loaded = AutoModelForCausalLM.from_pretrained("user/big")
    assert torch.equal(logits(loaded), logits(grown))


def test_pushed_model_loads_in_a_process_without_this_library(hub, grown, certificate, tmp_path):
    push_to_hub(grown, "user/big", certificate=certificate)
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('user/big').eval()\n"
        "with torch.no_grad(): torch.save(model(input_ids=torch.arange(12).reshape(1, 12)).logits, sys.argv[1])\n"
        "assert 'hf_warmstart' not in sys.modules\n"
    )
    home = str(tmp_path / "home")
    client = {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    environment = {**os.environ, **client, "HF_HUB_CACHE": f"{home}/hub", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "logits")], env=environment, check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), logits(grown))


def test_metadata_on_the_hub_is_read_back(hub, grown, certificate):
    metrics = {"eval_loss": 3.25, "eval_tokens": 4096}
    push_to_hub(grown, "user/big", certificate=certificate, metrics=metrics, dataset="org/corpus", license="mit")
    data = ModelCard.load("user/big").data
    assert (data.base_model, data.license, data.library_name) == ("org/tiny", "mit", "transformers")
    assert (data.model_name, data.eval_results[0].metric_value) == ("big", 3.25)
    assert ("POST", "/api/validate-yaml") in hub.requests


def test_growth_json_holds_records_certificate_and_metrics(hub, grown, certificate):
    push_to_hub(grown, "user/big", certificate=certificate, metrics={"eval_loss": 3.25})
    facts = json.loads(hub.commits("user/big")[0].files["growth.json"])
    assert facts["records"] == getattr(grown.config, RECORD_KEY)
    assert Certificate(**facts["certificate"]) == certificate
    assert facts["metrics"] == {"eval_loss": 3.25}


def test_certificate_is_measured_when_absent(hub, grown):
    push_to_hub(grown, "user/big")
    certificate = Certificate(**json.loads(hub.commits("user/big")[0].files["growth.json"])["certificate"])
    assert certificate.exact and certificate.reload_ok
    assert 0 < certificate.max_pullback_error < 1e-10


def test_model_without_a_record_raises_and_nothing_is_sent(hub, parent):
    with pytest.raises(WarmstartError, match="no growth record"):
        push_to_hub(parent, "user/big")
    assert hub.requests == []


def test_model_with_adapters_raises_and_nothing_is_sent(hub, grown, certificate):
    # What `add_adapter` sets: from then on `save_pretrained` writes the adapters alone.
    grown._hf_peft_config_loaded = True
    with pytest.raises(WarmstartError, match="with adapters.*merge_and_unload"):
        push_to_hub(grown, "user/big", certificate=certificate)
    assert hub.requests == []


def test_keywords_that_would_send_something_else_raise_and_nothing_is_sent(hub, grown, certificate):
    with pytest.raises(WarmstartError, match="push_to_hub.*state_dict"):
        push_to_hub(grown, "user/big", certificate=certificate, state_dict={}, push_to_hub=True)
    assert hub.requests == []


def test_branch_is_made_and_main_stays(hub, grown, certificate):
    push_to_hub(grown, "user/big", certificate=certificate, revision="step-0", commit_message="grown", private=True)
    assert hub.commits("user/big") == []
    (commit,) = hub.commits("user/big", "step-0")
    assert commit.message == "grown"
    assert hub.repos["user/big"].private
    loaded = AutoModelForCausalLM.from_pretrained("user/big", revision="step-0")
    assert torch.equal(logits(loaded), logits(grown))


def test_pull_request_leaves_the_branch_alone(hub, grown, certificate):
    info = push_to_hub(grown, "user/big", certificate=certificate, create_pr=True)
    assert hub.commits("user/big") == []
    assert info.pr_url is not None
    assert hub.commits("user/big", info.pr_revision)[0].changed == FILES


def test_weights_of_an_earlier_push_do_not_stay_beside_the_new_ones(hub, parent, grown, certificate):
    parent.push_to_hub("user/model")
    push_to_hub(grown, "user/model", certificate=certificate, max_shard_size="100KB")
    commit = hub.commits("user/model")[-1]
    assert commit.deleted == ["model.safetensors"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("user/model")), logits(grown))


def test_plain_push_carries_record_and_tags(hub, grown):
    grown.push_to_hub("user/plain")
    (commit,) = hub.commits("user/plain")
    loaded = AutoModelForCausalLM.from_pretrained("user/plain")
    assert getattr(loaded.config, RECORD_KEY) == getattr(grown.config, RECORD_KEY)
    assert {"hf_warmstart", "reference_slice", "identity_blocks"} <= set(ModelCard.load("user/plain").data.tags)
    assert "growth.json" not in commit.files


def test_code_in_the_card_rebuilds_the_model_bit_for_bit(hub, parent, certificate):
    parent.push_to_hub("org/tiny")
    loaded = AutoModelForCausalLM.from_pretrained("org/tiny")
    grown = grow(grow(loaded, width=1.5, seed=3), depth=2)
    getattr(grown.config, RECORD_KEY)[0]["revision"] = hub.commits("org/tiny")[-1].oid
    push_to_hub(grown, "user/big", certificate=certificate)
    # The parent moves on; the card names the commit that was grown.
    with torch.no_grad():
        parent.lm_head.weight.zero_()
    parent.push_to_hub("org/tiny")
    (code,) = re.findall(r"```python\n(.*?)```", ModelCard.load("user/big").text, flags=re.S)
    names: dict = {}
    exec(code, names)
    rebuilt = names["model"].state_dict()
    assert rebuilt.keys() == grown.state_dict().keys()
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in grown.state_dict().items())


def test_second_growth_from_the_hub_shows_the_chain(hub, grown, certificate):
    push_to_hub(grown, "user/big", certificate=certificate)
    second = grow(AutoModelForCausalLM.from_pretrained("user/big"), depth=1.5)
    push_to_hub(second, "user/bigger")
    card = ModelCard.load("user/bigger")
    assert card.data.base_model == "user/big"
    assert "## Chain of growths" in card.text
    assert len(json.loads(hub.commits("user/bigger")[0].files["growth.json"])["records"]) == 2


def test_saved_folder_loads_and_holds_no_leftovers(grown, parent, certificate, tmp_path):
    parent.save_pretrained(tmp_path)
    assert save_grown(grown, tmp_path, certificate=certificate, max_shard_size="100KB") == tmp_path
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" not in names
    assert {"README.md", "growth.json", "model.safetensors.index.json"} < names
    assert not any(name.startswith(".") for name in names)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(grown))


def test_fault_while_saving_leaves_the_folder_as_it_was(grown, certificate, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("before")

    def fail(data: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(hf_warmstart.hub.save, "to_json", fail)
    with pytest.raises(OSError, match="disk full"):
        save_grown(grown, tmp_path, certificate=certificate)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "before"


def test_folder_that_is_a_file_raises(grown, certificate, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WarmstartError, match="is a file"):
        save_grown(grown, Path(tmp_path, "file"), certificate=certificate)


def test_numbers_that_json_lacks_are_written_as_words(grown, tmp_path):
    save_grown(grown, tmp_path, certificate=Certificate(False, float("inf"), float("nan"), reason="measured"))
    facts = json.loads((tmp_path / "growth.json").read_text(), parse_constant=pytest.fail)
    assert facts["certificate"]["max_relative_error"] == "inf"
