"""`hf-warmstart fit` and `recommend`: what they print for people and machines, what they write, and their exit codes."""

from __future__ import annotations

import argparse
import json

import pandas as pd
import pytest
import yaml
from transformers import AutoModelForCausalLM

from hf_warmstart import HparamPredictor
from hf_warmstart.cli import main
from hf_warmstart.cli.recommend import count
from hf_warmstart.scaling.hparams.presets import preset_names
from hf_warmstart.scaling.tables.evaluation import evaluate, fingerprint

from ..models import some_tokens, tiny_config, tiny_model
from ..scaling.planted import Planted


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> str:
    """Runs of planted laws, two of which do not count."""
    frame = Planted(noise=0.005).runs().rename(columns={"loss": "eval/loss"})
    extra = frame.head(2).assign(**{"eval/loss": float("nan")})
    path = tmp_path_factory.mktemp("runs") / "runs.csv"
    pd.concat([frame, extra]).to_csv(path, index=False)
    return str(path)


@pytest.fixture(scope="module")
def law(runs, tmp_path_factory) -> str:
    """A folder with laws."""
    folder = str(tmp_path_factory.mktemp("law") / "law")
    assert main(["fit", runs, "--output", folder, "--draws", "50", "--name", "tiny law"]) == 0
    return folder


def test_fit_shows_laws_budgets_and_what_was_set_aside(runs, tmp_path, capsys):
    assert main(["fit", runs, "--draws", "50", "--plot", str(tmp_path / "laws.png")]) == 0
    words = capsys.readouterr().out
    assert "150 runs; set aside: 2 diverged" in words and "learning_rate" in words and "quadratic" in words
    assert words.count("set aside: diverged: loss nan") == 2 and (tmp_path / "laws.png").stat().st_size > 1000


def test_fit_as_json_says_what_the_predictor_says(runs, capsys):
    arguments = [
        "--form",
        "compute",
        "--method",
        "near_optimal",
        "--recipe",
        "weight_decay=0.05",
        "--draws",
        "20",
        "--seed",
        "3",
    ]
    assert main(["fit", runs, *arguments, "--draws", "20", "--seed", "3", "--column", "loss=eval/loss", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    same = HparamPredictor.fit(runs, "compute", method="near_optimal", recipe={"weight_decay": 0.05}, draws=20, seed=3)
    assert data["laws"] == same.laws.to_dict()["laws"] and data["recipe"]["weight_decay"] == 0.05
    assert len(data["set_aside"]) == 2


def test_a_table_that_cannot_be_fitted_is_one_message(runs, tmp_path, capsys):
    frame = pd.read_csv(runs).drop(columns=["tokens"])
    frame.to_csv(tmp_path / "x.csv", index=False)
    assert main(["fit", str(tmp_path / "x.csv")]) == 2
    assert main(["fit", runs, "--column", "loss"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "tokens is missing" in err[0] and "--column 'loss' is not NAME=VALUE" in err[1]


def test_recommend_shows_writes_and_tells_the_same(law, tmp_path, capsys):
    run = {"params": 1e8, "tokens": 2e9, "sequence_length": 128, "eval_loss": 3.0, "world_size": 2}
    wanted = HparamPredictor.from_pretrained(law).recommend(**run)
    arguments = ["recommend", "--law", law, "--params", "100M", "--tokens", "2B", "--sequence-length", "128"]
    arguments += ["--eval-loss", "3.0", "--world-size", "2"]
    files = {name: tmp_path / name for name in ("yaml", "accelerate", "plot")}
    assert (
        main([*arguments, *(part for name, path in files.items() for part in (f"--{name}", str(path) + ".png"))]) == 0
    )
    words = capsys.readouterr().out
    assert "tiny law" in words and f"{wanted.learning_rate:.3g}" in words and "Retention" in words
    texts = {name: (tmp_path / f"{name}.png").read_bytes() for name in files}
    assert yaml.safe_load(texts["yaml"])["learning_rate"] == wanted.learning_rate
    assert yaml.safe_load(texts["accelerate"])["num_processes"] == 2 and texts["plot"].startswith(b"\x89PNG")
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(wanted.to_dict()))


def test_recommend_measures_the_checkpoint_on_the_laws_text(tmp_path, capsys):
    model, rows = tiny_model("llama"), some_tokens(6, 33)
    model.save_pretrained(tmp_path / "m")
    pd.DataFrame({"input_ids": rows.tolist()}).to_parquet(tmp_path / "held-out.parquet")
    own = fingerprint(rows, config=model.config)
    HparamPredictor.fit(Planted().runs(), draws=20, fingerprint=own).save_pretrained(tmp_path / "law")
    arguments = ["recommend", str(tmp_path / "m"), "--law", str(tmp_path / "law"), "--tokens", "1B", "--json"]
    assert main([*arguments, "--eval-data", str(tmp_path / "held-out.parquet")]) == 0
    data = json.loads(capsys.readouterr().out)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert data["eval_loss"] == pytest.approx(evaluate(loaded, rows).loss) and data["params"] > 1000
    pd.DataFrame({"input_ids": rows[:2].tolist()}).to_parquet(tmp_path / "other.parquet")
    assert main([*arguments, "--eval-data", str(tmp_path / "other.parquet")]) == 2
    assert "not the law's" in capsys.readouterr().err
    assert main([*arguments, "--eval-data", str(tmp_path / "nothing.txt")]) == 2
    assert "no .jsonl or .parquet" in capsys.readouterr().err


def test_all_laws_make_a_table_for_one_checkpoint(tmp_path, law, capsys):
    tiny_config("llama", hidden_size=512).save_pretrained(tmp_path / "m")
    arguments = [
        "recommend",
        str(tmp_path / "m"),
        "--tokens",
        "6B",
        "--tokens-seen",
        "2B",
        "--law",
        "all",
        "--law",
        law,
    ]
    assert main([*arguments, "--eval-loss", "3.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in preset_names():
        assert any(line.split()[:1] == [name] for line in lines), name
    assert any("marin" in line and " - " in line for line in lines) and any("Retention" in line for line in lines)
    assert main([*arguments, "--batch-tokens", "512k", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data) == {*preset_names(), law} and data["marin"]["batch_tokens"] == pytest.approx(512e3, rel=0.01)
    assert "held-out loss" in data[law]["error"] and data["deepseek"]["equivalent_compute"] > 0


def test_what_cannot_be_recommended_has_exit_code_2(law, capsys):
    assert main(["recommend", "--law", "minicpm", "--params", "1B", "--tokens", "2B"]) == 2
    assert main(["recommend", "--law", "deepsek", "--params", "1B", "--tokens", "2B"]) == 2
    assert main(["recommend", "--law", "all", "--tokens", "2B", "--params", "1B", "--yaml", "x.yaml"]) == 2
    assert main(["recommend", "--law", law, "--law", "minicpm", "--tokens", "2B", "--params", "1"]) == 2
    err = capsys.readouterr().err
    for words in ("eval_loss=", "Published laws are", "--yaml take one law"):
        assert words in err


def test_counts_have_units():
    found = [count(text) for text in ("20B", "1.5T", "300M", "4k", "2e9", "1_000", "7")]
    assert found == [20e9, 1.5e12, 300e6, 4000, 2e9, 1000, 7]
    for text in ("", "x", "20 BB", "-3", "1.2.3"):
        with pytest.raises(argparse.ArgumentTypeError):
            count(text)
