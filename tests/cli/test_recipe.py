"""`hf-warmstart run`: a recipe is checked as a whole, runs every step, goes on where it was stopped, and goes into the card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from hf_warmstart import GrowthRecord
from hf_warmstart.cli import main, recipe_steps
from hf_warmstart.cli.recipe_file import read_recipe
from hf_warmstart.errors import WarmstartError
from hf_warmstart.scaling.tables.compute import count_parameters

from ..checkpoints.folders import bytes_of
from ..checkpoints.grown_folders import certify_once
from ..hub.minihub import MiniHub
from .world import PARENT, make_world

REPO = "user/grown"
ARGUMENTS = {"schedule_policy": "rewarm", "save_steps": 2, "max_steps": 4, "use_cpu": True, "learning_rate": "1e-3"}
RECIPE = {
    "parent": PARENT,
    "grow": {"output": "runs/grown", "width": 1.5, "threads": 1},
    "recommend": {"law": "steplaw", "tokens": "1M", "tokens_seen": "2M", "sequence_length": 32},
    "train": {"output_dir": "runs/continued", "train": "corpus.txt", "eval": ["held-out.txt"], "arguments": ARGUMENTS},
    "push": {"repo_id": REPO, "license": "mit", "dataset": "user/words"},
}
RECIPE["train"]["arguments"] |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def _world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, words=1500)
    return folder


@pytest.fixture(autouse=True)
def _certified_once(monkeypatch):
    certify_once(monkeypatch)


@pytest.fixture
def world(_world, tmp_path, monkeypatch) -> Path:
    """A copy of the world, where the command runs."""
    folder = tmp_path / "world"
    shutil.copytree(_world, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def hub(use_hub):
    with MiniHub() as server:
        yield use_hub(server)


def write(**changes) -> str:
    """A recipe with other entries (a dict is merged into the step's; None takes it out); its file."""
    data = {name: dict(value) if isinstance(value, dict) else value for name, value in RECIPE.items()}
    for name, value in changes.items():
        data[name] = data[name] | value if isinstance(value, dict) else value
    Path("recipe.yaml").write_text(yaml.safe_dump({n: v for n, v in data.items() if v is not None}, sort_keys=False))
    return "recipe.yaml"


def events(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_recipe_grows_trains_and_pushes_and_runs_again_without_doing_anything_twice(world, hub, capsys, monkeypatch):
    assert main(["run", write()]) == 0
    out, err = capsys.readouterr()
    assert err == "" and [line.split()[0] for line in out.splitlines() if line.split()[0] in RECIPE] == [
        "grow", "recommend", "train", "push",
    ]  # fmt: skip
    (commit,) = hub.commits(REPO)
    loaded = AutoModelForCausalLM.from_pretrained(REPO)
    trained = AutoModelForCausalLM.from_pretrained("runs/continued")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trained.parameters(), strict=True))
    assert GrowthRecord.all_of(loaded.config)[-1].growth_config["width"] == 1.5
    state = json.loads(Path("runs/continued/trainer_state.json").read_text())
    assert state["global_step"] == 4 and "carried" not in err
    card = ModelCard.load(REPO)
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["loss"] == json.loads(Path("runs/continued/eval_results.json").read_text())["eval_loss"]
    assert card.data.license == "mit"
    text = Path("recipe.yaml").read_text()
    assert f"```yaml\n{text.rstrip()}\n```" in card.text and commit.files["recipe.yaml"].decode() == text
    assert not {"training_args.bin", "checkpoint-4/optimizer.pt"} & set(commit.files)
    # Everything is there.
    monkeypatch.setattr(Trainer, "train", pytest.fail)
    monkeypatch.setattr("hf_warmstart.checkpoints.grow_checkpoint.grow_checkpoint", pytest.fail)
    assert main(["run", "recipe.yaml", "--json"]) == 0
    done = {event["step"]: event for event in events(capsys.readouterr().out) if event["event"] == "step"}
    assert (done["grow"]["was_done"], done["train"]["was_done"]) == (True, True)
    assert done["push"]["commit"] == commit.oid and hub.commits(REPO) == [commit]


def test_a_run_that_was_stopped_in_training_goes_on_from_its_checkpoint(world, hub, monkeypatch, capsys):
    whole = write(push=None, train={"output_dir": "runs/whole"})
    assert main(["run", whole]) == 0
    stopped = write(push=None)
    step = Trainer.training_step

    steps = []

    def counted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return step(self, *args, **kwargs)

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        assert main(["run", stopped]) == 130
    assert "The same command goes on where it was." in capsys.readouterr().err
    assert Path("runs/continued/checkpoint-2").is_dir() and not Path("runs/continued/model.safetensors").exists()
    monkeypatch.setattr(Trainer, "training_step", counted)
    assert main(["run", stopped]) == 0
    assert steps == [2, 3]
    assert Path("runs/continued/model.safetensors").read_bytes() == Path("runs/whole/model.safetensors").read_bytes()


def test_a_recipe_of_growth_and_push_alone(world, hub, capsys):
    assert main(["run", write(recommend=None, train=None, push={"private": True}), "--json"]) == 0
    lines = events(capsys.readouterr().out)
    assert lines[0]["event"] == "plan" and {line["event"] for line in lines[1:]} == {"progress", "step"}
    assert hub.repos[REPO].private and "model.safetensors" in hub.commits(REPO)[0].files
    assert "hf-warmstart run recipe.yaml" in ModelCard.load(REPO).text


def test_a_parent_in_a_folder_of_a_hub_repository_brings_its_training_state(world, hub, capsys):
    """The same run as from the folder: losses, and what the law was told of the parent."""
    state = json.loads((world / PARENT / "trainer_state.json").read_text())
    state["num_input_tokens_seen"] = 2_000_000
    (world / PARENT / "trainer_state.json").write_text(json.dumps(state))
    hub.add("my-org/base", {f"checkpoint-500/{name}": content for name, content in bytes_of(world / PARENT).items()})
    said = {}
    parents = {"hub": {"parent": "my-org/base", "subfolder": "checkpoint-500"}}
    parents = {"folder": {}, "below": {"parent": "runs/base", "subfolder": "checkpoint-500//"}, **parents}
    for name, parent in parents.items():
        places = {"grow": {"output": f"runs/{name}"}, "train": {"output_dir": f"runs/{name}-on"}, "push": None}
        file = write(**parent, **places, recommend={"tokens_seen": None})
        assert read_recipe(file).parent_files.name == "checkpoint-500"
        assert main(["run", file, "--json"]) == 0
        done = {event["step"]: event for event in events(capsys.readouterr().out) if event["event"] == "step"}
        said[name] = done["train"]["metrics"]["eval_loss"], done["recommend"]["recommendation"]
        record = GrowthRecord.all_of(AutoModelForCausalLM.from_pretrained(f"runs/{name}").config)[-1]
        assert record.subfolder == ("checkpoint-500" if name == "hub" else "")
        assert main(["run", file]) == 0 and "grow (was there)" in capsys.readouterr().out
    assert said["hub"] == said["folder"] == said["below"]
    seen = count_parameters(AutoConfig.from_pretrained(PARENT)).non_embedding, 2_000_000
    assert said["hub"][1]["equivalent_compute"] == 6 * seen[0] * seen[1]
    # Without the optimizer there is none to carry, and the losses are others.
    files = {n: c for n, c in bytes_of(world / PARENT).items() if n != "optimizer.pt"}
    hub.add("my-org/bare", {f"checkpoint-500/{name}": content for name, content in files.items()})
    write(parent="my-org/bare", subfolder="checkpoint-500", **places, recommend={"tokens_seen": None})
    assert recipe_steps.parent_state(read_recipe("recipe.yaml")) is None
    assert main(["run", "recipe.yaml"]) == 2
    assert "holds another growth: parent differ from the recipe" in capsys.readouterr().err
    assert main(["run", write(**{**parent, "subfolder": "checkpoint-9"}, **places)]) == 2
    err = capsys.readouterr().err
    assert "parent: 'checkpoint-9' of 'my-org/base' holds no config.json. Models lie in ['checkpoint-500']" in err


def test_a_dry_run_checks_everything_and_writes_and_asks_nothing(world, hub, capsys):
    before = sorted(world.rglob("*"))
    assert main(["run", write(), "--dry-run"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "reference_slice" in words and f"push runs/continued to {REPO}. Nothing was run." in words
    assert sorted(world.rglob("*")) == sorted([*before, world / "recipe.yaml"]) and hub.requests == []


def test_all_offending_names_are_said_at_once_and_nothing_runs(world, hub, capsys):
    Path("recipe.yaml").write_text(
        """
parnt: x
parent: runs/base/checkpoint-500
grow: {output: runs/grown, widht: 1.5, threads: many, state_policy: keep}
recommend: {law: nowhere/law, tokens: lots, cautious: 1}
train:
  output_dir: runs/continued
  train: nothing.txt
  evaluate: held-out.txt
  arguments: {learning: 1, hub_token: null, lr_scheduler_type: cosine}
push: {repo: x, private: perhaps}
"""
    )
    assert main(["run", "recipe.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hf-warmstart run: recipe.yaml cannot run, nothing was begun:\n  - ")
    for words in (
        "parnt is unknown; the nearest is 'parent'",
        "grow.threads: 'many' is no whole number",
        "grow: state_policy='keep'",
        "grow: LlamaConfig has no attribute 'widht'",
        "recommend.tokens: 'lots' is no count",
        "recommend.cautious: 1 is neither true nor false",
        "recommend.sequence_length is missing",
        "train.evaluate is unknown; the nearest is 'eval'",
        "train.eval is missing",
        "train.train: there are no files ['nothing.txt']",
        "train.arguments.learning is no training argument here; the nearest is 'learning_rate'",
        "train.arguments.hub_token is no training argument here",
        "push.repo is unknown; the nearest is 'repo_id'",
        "push.repo_id is missing",
        "push.private: 'perhaps' is neither true nor false",
    ):
        assert words in err, words
    assert not Path("runs/grown").exists() and hub.requests == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grow": {"width": 1.37}}, "grow: "),
        ({"parent": "runs/none/here"}, "parent: 'runs/none/here' is no folder, and the Hub does not give it"),
        ({"recommend": {"law": "steplow"}}, "recommend: 'steplow' is no law"),
        ({"recommend": None, "train": {"arguments": {}}}, "train.sequence_length is missing"),
        (
            {"recommend": None, "train": {"arguments": {}, "sequence_length": 8}},
            "neither max_steps nor num_train_epochs",
        ),
        ({"train": {"arguments": {"schedule_policy": "sometimes"}}}, "train.arguments: schedule_policy='sometimes'"),
        ({"push": {"repo_id": "a/b/c"}}, "push: 'a/b/c' is no id of a repository"),
        ({"push": {"create_pr": True, "revision": "v1"}}, "push.revision cannot be given with it"),
        ({"grow": None}, "grow is missing"),
        ({"push": {"message": "hf_" + "Ab3" * 11}}, "holds a token in push.message"),
        ({"train": {"arguments": {"hub_token": "x"}}}, "holds a token in train.arguments.hub_token"),
    ],
)
def test_what_a_step_would_meet_is_said_before_the_first(world, changes, words):
    with pytest.raises(WarmstartError) as caught:
        read_recipe(write(**changes))
    assert words in str(caught.value) and "Ab3Ab3" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("- a\n", "holds no table"), ("a: [", "is no YAML"), (None, "cannot be read")]
)
def test_what_is_no_recipe_is_said(tmp_path, text, words):
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(WarmstartError, match=words):
        read_recipe(tmp_path / "recipe.yaml")


def test_an_output_of_another_growth_is_not_taken_for_this_ones(world, capsys):
    only = {"recommend": None, "train": None, "push": None}
    assert main(["run", write(**only)]) == 0
    assert main(["run", write(**only, grow={"width": 2})]) == 2
    assert "holds another growth: width differ from the recipe" in capsys.readouterr().err
    Path("runs/other").mkdir()
    Path("runs/other/file").touch()
    assert main(["run", write(**only, grow={"output": "runs/other"})]) == 2
    assert "is not empty, and holds no growth" in capsys.readouterr().err


def test_numbers_are_read_as_people_write_them(world):
    recipe = read_recipe(write(recommend={"tokens": "1.5M"}))
    assert recipe.recommend["tokens"] == 1.5e6 and recipe.train["arguments"]["learning_rate"] == 1e-3
    assert recipe.train["train"] == ["corpus.txt"] and recipe.sequence_length == 32
