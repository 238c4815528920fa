"""`hf-warmstart push`: what lies in a folder goes to the Hub, whole and without secrets, or nothing is sent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_warmstart import HparamPredictor, SelectionReport
from hf_warmstart.cli import main
from hf_warmstart.hub import save_grown

from ..scaling.planted import Planted
from .minihub import MiniHub
from .test_hub_push import logits
from .test_hub_reports import small_report

REPO = "user/big"


@pytest.fixture(autouse=True)
def _certified(monkeypatch, certificate):
    """A certificate takes longer than a push here, and is not what is tested."""
    for module in ("hf_warmstart.hub.save", "hf_warmstart.hub.card"):
        monkeypatch.setattr(f"{module}.certify_record", lambda config: certificate)


@pytest.fixture
def folder(grown, tmp_path) -> Path:
    """A grown model as `save_grown` leaves it."""
    return save_grown(grown, tmp_path / "grown", license="mit", metrics={"eval_loss": 3.5})


def push(*arguments: object) -> int:
    return main(["push", *map(str, arguments)])


def test_a_grown_folder_goes_as_it_is_and_loads_from_another_cache(hub, use_hub, folder, grown, capsys):
    assert push(folder, REPO, "--private") == 0
    (commit,) = hub.commits(REPO)
    assert hub.repos[REPO].private
    assert {name: content for name, content in commit.files.items() if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    out, err = capsys.readouterr()
    assert (
        out
        == f"{REPO}: 5 files, {sum(map(len, commit.files.values())):,} bytes: {hub.url}/{REPO}/commit/{commit.oid}\n"
    )
    assert err == ""
    use_hub(hub, cache="another")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(REPO)), logits(grown))


def test_a_dry_run_asks_the_hub_nothing_and_says_what_would_go(hub, folder, capsys):
    assert push(folder, REPO, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert (plan["event"], plan["kind"], plan["files"]) == ("plan", "model", sizes)
    assert push(folder, REPO, "--dry-run") == 0
    assert "Nothing was sent" in capsys.readouterr().out and hub.requests == []


def test_branch_pull_request_and_message(hub, folder, capsys):
    assert push(folder, REPO, "--revision", "v1", "--message", "as grown", "--json") == 0
    assert hub.commits(REPO) == [] and hub.commits(REPO, "v1")[0].message == "as grown"
    assert json.loads(capsys.readouterr().out)["commit"] == hub.commits(REPO, "v1")[0].oid
    assert push(folder, REPO, "--create-pr") == 0
    assert hub.commits(REPO) == [] and f"{hub.url}/{REPO}/discussions/" in capsys.readouterr().out
    assert push(folder, REPO, "--create-pr", "--revision", "v1") == 2


def test_the_same_push_again_makes_no_commit(hub, folder):
    assert push(folder, REPO) == 0 and push(folder, REPO) == 0
    assert len(hub.commits(REPO)) == 1


def test_what_is_said_of_the_model_makes_the_card_anew_and_the_rest_is_kept(hub, folder):
    before = ModelCard.load(folder / "README.md").data
    arguments = ["--metric", "eval_loss=3.25", "--metric", "eval_tokens=4096", "--dataset", "org/text"]
    assert push(folder, REPO, *arguments) == 0
    data = ModelCard.load(REPO).data
    assert (data.license, data.base_model) == (before.license, before.base_model) == ("mit", "org/tiny")
    assert (data.eval_results[0].metric_value, data.eval_results[0].dataset_name) == (3.25, "org/text")
    facts_there = json.loads(hub.commits(REPO)[0].files["growth.json"])
    assert facts_there["metrics"] == {"eval_loss": 3.25, "eval_tokens": 4096}
    assert ModelCard.load(folder / "README.md").data.to_dict() == before.to_dict(), "the folder was changed"


@pytest.mark.parametrize("readme", [None, "---\ntags:\n- generated_from_trainer\n- hf_warmstart\n---\n# stock\n"])
def test_a_card_is_made_where_there_is_none_or_trainers_own(hub, grown, tmp_path, readme):
    grown.save_pretrained(tmp_path / "run")
    if readme:
        (tmp_path / "run" / "README.md").write_text(readme)
    assert push(tmp_path / "run", REPO) == 0
    assert "GrowthConfig.from_dict" in ModelCard.load(REPO).text
    assert "growth.json" in hub.commits(REPO)[0].files


def test_a_card_written_by_hand_is_kept(hub, folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    assert push(folder, REPO) == 0
    assert hub.commits(REPO)[0].files["README.md"] == (folder / "README.md").read_bytes()


def test_other_checkpoints_logs_and_pickled_arguments_stay_here(hub, folder, capsys):
    for name in ("checkpoint-4/model.safetensors", "runs/events", ".cache/x", "training_args.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert push(folder, REPO) == 0
    assert set(hub.commits(REPO)[0].changed) == {path.name for path in folder.iterdir() if path.is_file()} - {
        "training_args.bin"
    }
    assert (
        "stays here: .cache/ (1 files), checkpoint-4/ (1 files), runs/ (1 files), training_args.bin\n"
        in capsys.readouterr().err
    )


def test_a_checkpoint_goes_into_a_subfolder_with_its_state(hub, use_hub, grown, tmp_path):
    checkpoint = tmp_path / "checkpoint-4"
    grown.save_pretrained(checkpoint, max_shard_size="100KB")
    (checkpoint / "optimizer.pt").write_bytes(b"state")
    assert push(checkpoint, REPO, "--subfolder", "checkpoint-4") == 0
    files = hub.commits(REPO)[0].files
    assert files["checkpoint-4/optimizer.pt"] == b"state" and "README.md" not in files
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(REPO, subfolder="checkpoint-4")), logits(grown))
    for path in checkpoint.glob("model*"):
        path.unlink()
    grown.save_pretrained(checkpoint)
    assert push(checkpoint, REPO, "--subfolder", "checkpoint-4") == 0
    assert not any("-of-" in name for name in hub.commits(REPO)[-1].files), "shards of the earlier push stayed"


def test_laws_and_reports_are_recognised(hub, use_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(SelectionReport, "plot", lambda self, path: path.write_bytes(b"png"))
    HparamPredictor.fit(Planted().runs(), draws=20, name="tiny law").save_pretrained(tmp_path / "law")
    small_report().save(tmp_path / "choice")
    assert push(tmp_path / "law", "user/law", "--license", "mit") == 0
    assert push(tmp_path / "choice", "user/choice") == 0
    assert HparamPredictor.from_pretrained("user/law").name == "tiny law"
    card = ModelCard.load("user/law")
    assert card.data.license == "mit" and 'from_pretrained("user/law")' in card.text
    assert SelectionReport.from_pretrained("user/choice").best == "copy"
    assert push(tmp_path / "law", "user/law", "--metric", "eval_loss=1") == 2


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
            "lacks ['b.s",
        ),
        (lambda f: (f / "config.json").unlink(), "holds neither config.json nor selection.json"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "without a growth record"),
        (lambda f: (f / "config.json").write_text("{"), "is damaged"),
        (lambda f: (f / "README.md").write_text("---\n- mit\n---\n# A list"), "metadata of"),
        (lambda f: (f / "README.md").write_text("---\na: [\n---\n# No YAML"), "cannot be read"),
        (lambda f: (f / "notes.txt").write_text("my hf_" + "Ab3" * 11), "['notes.txt'] hold a token"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_anything_is_sent(hub, folder, spoil, words, capsys):
    spoil(folder)
    assert push(folder, REPO) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hf-warmstart push: ") and words in err and err.count("\n") == 1
    assert hub.requests == []


@pytest.mark.parametrize(
    "arguments", [["nowhere", REPO], ["FOLDER", "a/b/c"], ["FOLDER", REPO, "--metric", "loss=lots"]]
)
def test_bad_arguments_are_said_before_anything_is_sent(hub, folder, arguments, capsys):
    assert push(*[folder if argument == "FOLDER" else argument for argument in arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and hub.requests == []


def test_a_refusal_is_two_lines_at_most_and_names_the_way_out(hub, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_one")
    assert push(folder, REPO) == 2
    err = capsys.readouterr().err
    assert "(401)" in err and "hf auth login" in err and "hf_wrong_one" not in err and err.count("\n") <= 2
    assert hub.repos == {}


def test_a_card_that_the_hub_does_not_take_is_said(hub, folder, capsys):
    hub.fail("POST", "/api/validate-yaml", status=400, message="no such licence")
    assert push(folder, REPO) == 2
    err = capsys.readouterr().err
    assert "The Hub refused the push" in err and "Invalid metadata in README.md" in err and hub.commits(REPO) == []


@pytest.mark.slow
@pytest.mark.parametrize("xet", ["on", "off", "absent"])
def test_the_console_command_finds_hub_and_token_in_the_environment(xet, folder, grown, tmp_path):
    # No constant is replaced here: all that the client knows comes from its environment.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import importlib.metadata, sys\n"
        "version = importlib.metadata.version\n"
        "def without(name):\n"
        "    if name == 'hf_xet':\n"
        "        raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "importlib.metadata.version = without\n"
        "sys.modules['hf_xet'] = None\n"
        if xet == "absent"
        else ""
    )
    with MiniHub(lfs=xet != "on") as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1" if xet == "off" else "0", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), *sys.path])
        command = [sys.executable, "-m", "hf_warmstart.cli"]
        for arguments in (
            ["push", str(folder), REPO, "--private"],
            ["grow", REPO, str(tmp_path / "again"), "--depth", "2"],
        ):
            run = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
            assert (run.returncode, run.stderr) == (0, ""), run.stderr
        (commit,) = hub.commits(REPO)
        assert bool(hub.large) is hub.lfs
    record = json.loads((tmp_path / "again" / "config.json").read_text())["warmstart"][-1]
    assert (record["parent"], record["revision"]) == (REPO, commit.oid)
