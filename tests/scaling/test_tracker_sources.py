"""Runs from files as trackers write them; the layouts are those of trackio 0.43, wandb's documentation and TensorBoard 2."""

from __future__ import annotations

import json
import math
import sqlite3

import pandas as pd
import pytest

from hf_warmstart import WarmstartError
from hf_warmstart.scaling.tables.compute import count_parameters
from hf_warmstart.scaling.tables.runs import COLUMNS, read_runs

from ..models import tiny_config
from .test_runs import ROWS

STEPS = (1, 2, 3, 4)


def history(run: dict) -> list[dict]:
    """What `Trainer` logs of a run: a rate that rises and falls, tokens so far, an evaluation now and then."""
    logged = []
    for step in STEPS:
        rate = run["learning_rate"] * (0.5, 0.9, 0.6, 0.0)[step - 1]
        tokens = run["tokens"] * step / STEPS[-1]
        logged.append({"train/learning_rate": rate, "train/num_input_tokens_seen": tokens, "train/loss": 9.0})
        if step % 2 == 0:
            logged[-1]["eval/loss"] = 8.0 if step == 2 else run["loss"]
    return logged


def config(run: dict) -> dict:
    """What `Trainer` tells a tracker, and what a person adds; the curve never comes to the peak."""
    said = {"learning_rate": run["learning_rate"], "params": run["params"], "batch_tokens": run["batch_tokens"]}
    return said | {"model/num_parameters": 2e8, "run_name": "mine", "optim": "adamw_torch", "lr_scheduler_kwargs": {}}


def trackio_database(path, same_name=False):
    """trackio's tables: metrics and configs as JSON. Two runs may have one name."""
    connection = sqlite3.connect(path)
    connection.execute(
        "CREATE TABLE metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, timestamp TEXT NOT NULL, "
        "run_name TEXT NOT NULL, step INTEGER NOT NULL, metrics TEXT NOT NULL, log_id TEXT, space_id TEXT)"
    )
    connection.execute(
        "CREATE TABLE configs (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, run_name TEXT NOT NULL, "
        "config TEXT NOT NULL, created_at TEXT NOT NULL, UNIQUE(run_id))"
    )
    for number, run in enumerate(ROWS):
        names = f"id{number}", "same" if same_name else f"brisk-{number}"
        connection.execute(
            "INSERT INTO configs (run_id, run_name, config, created_at) VALUES (?, ?, ?, '')",
            (*names, json.dumps(config(run))),
        )
        for step, logged in zip(STEPS, history(run), strict=True):
            connection.execute(
                "INSERT INTO metrics (run_id, run_name, timestamp, step, metrics) VALUES (?, ?, '', ?, ?)",
                (*names, step, json.dumps(logged)),
            )
    connection.commit()
    connection.close()
    return path


def found(source) -> list[dict]:
    table = read_runs(source)
    assert len(table.set_aside) == 0
    return table.frame.sort_values("learning_rate")[list(COLUMNS)].to_dict("records")


WANTED = [pytest.approx(row) for row in ROWS]


@pytest.mark.parametrize("same_name", [False, True])
def test_trackios_database_gives_each_run_with_its_config(tmp_path, same_name):
    assert found(trackio_database(tmp_path / "project.db", same_name)) == WANTED


def test_trackios_parquet_is_read_with_the_configs_beside_it(tmp_path):
    database = sqlite3.connect(trackio_database(tmp_path / "project.db"))
    for table, column, name in (("metrics", "metrics", "project"), ("configs", "config", "project_configs")):
        flat = [
            row | json.loads(row.pop(column))
            for row in pd.read_sql(f"SELECT * FROM {table}", database).to_dict("records")
        ]
        pd.DataFrame(flat).drop(columns="lr_scheduler_kwargs", errors="ignore").to_parquet(
            tmp_path / f"{name}.parquet"
        )
    database.close()
    assert found(tmp_path / "project.parquet") == WANTED
    (tmp_path / "project_configs.parquet").unlink()
    with pytest.raises(WarmstartError, match="params is missing"):
        read_runs(tmp_path / "project.parquet")


def test_a_loss_that_is_no_number_is_a_diverged_run_also_as_trackio_spells_it(tmp_path):
    path = trackio_database(tmp_path / "project.db")
    connection = sqlite3.connect(path)
    broken = json.dumps(history(ROWS[0])[-1] | {"eval/loss": "Infinity"})
    connection.execute("UPDATE metrics SET metrics = ? WHERE run_id = 'id0' AND step = 4", (broken,))
    connection.commit()
    connection.close()
    table = read_runs(path)
    assert len(table) == 2 and table.set_aside["reason"].tolist() == ["diverged: loss inf"]


def test_another_database_and_a_damaged_one_are_named(tmp_path):
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE notes (words TEXT)").connection.close()
    with pytest.raises(WarmstartError, match="other.db has no table of metrics"):
        read_runs(tmp_path / "other.db")
    (tmp_path / "damaged.db").write_bytes(b"SQLite format 3\x00" + b"x" * 200)
    with pytest.raises(WarmstartError, match="damaged.db cannot be read"):
        read_runs(tmp_path / "damaged.db")


def wandb_project() -> pd.DataFrame:
    """The table that wandb's documentation makes of `Api().runs()`."""
    summaries = [history(run)[-1] | {"_step": 4, "_timestamp": 1.7e9, "_wandb": {"runtime": 3}} for run in ROWS]
    return pd.DataFrame({"summary": summaries, "config": [config(run) for run in ROWS], "name": ["a", "b", "c"]})


def test_wandbs_documented_export_is_read_in_memory_and_from_csv(tmp_path):
    table = wandb_project()
    assert found(table) == WANTED
    table.loc[0, "summary"]["eval/loss"] = math.nan
    table.to_csv(tmp_path / "project.csv")
    read = read_runs(tmp_path / "project.csv")
    assert read.frame["loss"].tolist() == [row["loss"] for row in ROWS[1:]]
    assert read.set_aside["reason"].tolist() == ["diverged: loss nan"]
    (tmp_path / "broken.csv").write_text("summary,config,name\n{'a': ,{},x\n")
    with pytest.raises(WarmstartError, match="summary of row 0 is no dict"):
        read_runs(tmp_path / "broken.csv")


def test_event_files_need_tensorboard_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    (tmp_path / "events.out.tfevents.1.host").touch()
    with pytest.raises(WarmstartError, match="the tensorboard package reads"):
        read_runs(tmp_path)


def test_event_files_give_settings_from_text_and_hparams_and_the_rest_from_curves(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    trainers = tiny_config("llama")
    params = count_parameters(trainers).non_embedding
    for number, run in enumerate(ROWS):
        with SummaryWriter(tmp_path / f"trainer-{number}") as writer:  # as Trainer's callback does
            writer.add_text("args", json.dumps({"learning_rate": run["learning_rate"], "seed": 3}))
            writer.add_text("model_config", trainers.to_json_string())
            steps = round(run["tokens"] / run["batch_tokens"])
            for step, logged in zip(STEPS, history(run), strict=True):
                for name, value in logged.items():
                    writer.add_scalar(name, value, steps * step // STEPS[-1])
        with SummaryWriter(tmp_path / f"hparams-{number}") as writer:
            settings = {name: run[name] for name in COLUMNS[:4]} | {"learning_rate": run["learning_rate"] * 10}
            writer.add_hparams(settings, {"eval/loss": run["loss"]}, run_name="run")
    table = read_runs(tmp_path)
    assert len(table) == 6 and len(table.set_aside) == 0
    by_trainer = table.frame[table.frame["name"].str.startswith("trainer")].sort_values("learning_rate")
    wanted = [pytest.approx(row | {"params": params}, rel=1e-4) for row in ROWS]
    assert by_trainer[list(COLUMNS)].to_dict("records") == wanted and set(by_trainer["seed"]) == {3}
    by_hparams = table.frame[table.frame["name"].str.startswith("hparams")].sort_values("learning_rate")
    wanted = [pytest.approx(row | {"learning_rate": 10 * row["learning_rate"]}, rel=1e-6) for row in ROWS]
    assert by_hparams[list(COLUMNS)].to_dict("records") == wanted


@pytest.mark.parametrize(("column", "steps"), [("State", (100, 200, 300)), ("Created", (100, 100, 100))])
def test_runs_of_one_name_in_a_table_of_runs_are_not_taken_for_a_history(column, steps):
    """wandb's runs table with Trainer's own columns: `run_name` and the last step are there too."""
    named = {"Name": "mine", column: "finished", "run_name": "mine"}
    rows = [named | {"train/global_step": step} | run for step, run in zip(steps, ROWS, strict=True)]
    assert found(pd.DataFrame(rows)) == WANTED
