"""The table of runs: every source gives the same runs, names are understood, and what is wrong is said at once."""

from __future__ import annotations

import json
import math

import datasets
import pandas as pd
import pytest

from hf_warmstart import WarmstartError
from hf_warmstart.scaling.tables.compute import count_parameters
from hf_warmstart.scaling.tables.runs import COLUMNS, RunTable, read_runs

from ..models import tiny_config

ROWS = [
    {"params": 1e8, "tokens": 2e9, "learning_rate": lr, "batch_tokens": 2.0**17, "loss": 3.0 + k / 100}
    for k, lr in enumerate((1e-3, 2e-3, 4e-3))
]


def row(**changes) -> dict:
    return ROWS[0] | {"learning_rate": 9e-3} | changes


def as_csv(folder):
    pd.DataFrame(ROWS).to_csv(folder / "runs.csv", index=False)
    return folder / "runs.csv"


def as_jsonl(folder):
    (folder / "runs.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return str(folder / "runs.jsonl")


def as_parquet(folder):
    pd.DataFrame(ROWS).to_parquet(folder / "runs.parquet")
    return folder / "runs.parquet"


def as_json(folder):
    (folder / "runs.json").write_text(json.dumps(ROWS))
    return folder / "runs.json"


def as_tensorboard_hparams(folder):
    table = {"header": list(ROWS[0]), "rows": [list(row.values()) for row in ROWS]}
    (folder / "hparams_table.json").write_text(json.dumps(table))
    return folder / "hparams_table.json"


def as_wandb_runs(folder):
    names = {"learning_rate": "lr", "loss": "eval/loss", "tokens": "train/num_input_tokens_seen", "params": "n_params"}
    table = pd.DataFrame(ROWS).rename(columns=names)
    table.insert(0, "Name", ["brisk-lake-1", "calm-fog-2", "odd-sun-3"])
    table.insert(1, "State", "finished")
    table.to_csv(folder / "wandb.csv", index=False)
    return folder / "wandb.csv"


def as_trackio_history(folder):
    """One row per logged step: the schedule's rate, the tokens so far, and evaluations now and then."""
    steps = []
    for number, run in enumerate(ROWS):
        for step in (1, 2, 3, 4):
            rate = run["learning_rate"] * (0.5, 1.0, 0.6, 0.0)[step - 1]
            loss = {2: 9.0, 4: run["loss"]}.get(step)
            steps.append({"run_name": f"r{number}", "step": step, "train/learning_rate": rate, "eval/loss": loss})
            steps[-1] |= {
                "params": 1e8,
                "batch_tokens": 2.0**17,
                "train/num_input_tokens_seen": run["tokens"] * step / 4,
            }
    pd.DataFrame(steps).sample(frac=1, random_state=0).to_parquet(folder / "trackio.parquet")
    return folder / "trackio.parquet"


SOURCES = {
    "dicts": lambda folder: ROWS,
    "frame": lambda folder: pd.DataFrame(ROWS, index=[7, 8, 9]),
    "dataset": lambda folder: datasets.Dataset.from_list(ROWS),
    "columns": lambda folder: {name: [row[name] for row in ROWS] for name in COLUMNS},
    "csv": as_csv,
    "json": as_json,
    "jsonl": as_jsonl,
    "parquet": as_parquet,
    "tensorboard": as_tensorboard_hparams,
    "wandb": as_wandb_runs,
    "trackio": as_trackio_history,
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_runs(name, tmp_path):
    table = read_runs(SOURCES[name](tmp_path))
    found = table.frame.sort_values("learning_rate")
    assert found[list(COLUMNS)].to_dict("records") == [pytest.approx(row) for row in ROWS]
    assert found["compute"].tolist() == [1.2e18] * 3 and len(table.set_aside) == 0 and table.warnings == []


def trainer_run(folder, *, rate=1e-3, loss=3.2, step=10, of=10, tokens=40960, config=True, evaluated=None):
    folder.mkdir(parents=True)
    logs = [{"step": s, "learning_rate": rate * min(1, s / 3) * (1 - s / of), "loss": 9.0} for s in range(1, step + 1)]
    logs.append({"step": 3, "learning_rate": rate})
    logs += [{"step": 5, "eval_loss": 8.0}, {"step": evaluated or step, "eval_loss": loss}]
    state = {"log_history": logs, "global_step": step, "max_steps": of, "num_input_tokens_seen": tokens}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if config:
        tiny_config("llama").save_pretrained(folder)


def test_a_folder_of_trainer_runs_gives_their_last_states(tmp_path):
    trainer_run(tmp_path / "a" / "checkpoint-5", step=5, loss=5.0)
    trainer_run(tmp_path / "a" / "checkpoint-10")
    trainer_run(tmp_path / "b", rate=2e-3, loss=3.1)
    trainer_run(tmp_path / "b" / "checkpoint-20", rate=5e-3, step=8)
    trainer_run(tmp_path / "stopped", rate=3e-3, step=6)
    trainer_run(tmp_path / "uncounted", tokens=0)
    trainer_run(tmp_path / "unevaluated", evaluated=7)
    trainer_run(tmp_path / "sizeless", config=False)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "trainer_state.json").write_text('{"global_step": ')
    table = read_runs(tmp_path)
    found = table.frame.set_index("name")
    params = count_parameters(tiny_config("llama")).non_embedding
    assert set(found.index) == {"a", "b"}
    assert found.loc["a", list(COLUMNS)].tolist() == [params, 40960, 1e-3, 4096, 3.2]
    assert found.loc["b", "learning_rate"] == 2e-3 and found.loc["b", "loss"] == 3.1
    reasons = dict(zip(table.set_aside["name"], table.set_aside["reason"], strict=True))
    assert "step 6 of 10" in reasons["stopped"] and "include_num_input_tokens_seen" in reasons["uncounted"]
    assert "not evaluated at its end" in reasons["unevaluated"] and "no config.json" in reasons["sizeless"]
    assert "cannot be read" in reasons["damaged"]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (row(loss=math.nan), "diverged"),
        (row(loss=math.inf), "diverged"),
        (row(loss="nan"), "diverged"),
        (row(loss=None), "diverged"),
        (row(params=None), "incomplete: no params"),
        (row(state="crashed"), "incomplete: its state is crashed"),
        (row(complete=False), "incomplete"),
        (row(planned_tokens=4e9), "incomplete: 50% of its tokens"),
        (row(learning_rate=1e-3), "duplicate: settings of run 0"),
        (row(learning_rate=1e-3, loss=3.01), "duplicate: settings of run 0, losses 3.01 and 3"),
    ],
)
def test_runs_that_do_not_count_are_set_aside_with_the_reason(extra, reason):
    table = read_runs([*ROWS, extra])
    assert table.frame["loss"].tolist() == [run["loss"] for run in ROWS]
    (found,) = table.set_aside["reason"]
    assert found.startswith(reason)
    assert reason.split(":")[0] in str(table)


def test_repeats_with_other_seeds_are_kept():
    rows = [run | {"seed": seed} for run in ROWS for seed in (0, 1)]
    assert len(read_runs(rows)) == 6
    assert len(read_runs([*rows, rows[0]])) == 6


@pytest.mark.parametrize(
    ("name", "ours"),
    [("N", "params"), ("D", "tokens"), ("Peak LR", "learning_rate"), ("val_loss", "loss"), ("tokens/batch", None)],
)
def test_usual_names_are_understood_and_others_get_the_nearest(name, ours):
    target = ours or "batch_tokens"
    frame = pd.DataFrame(ROWS).rename(columns={target: name})
    if ours:
        assert len(read_runs(frame)) == 3
    else:
        with pytest.raises(WarmstartError, match=r"batch_tokens.*missing.*nearest.*'tokens/batch'"):
            read_runs(frame)
        assert read_runs(frame, columns={"batch_tokens": name}).frame["batch_tokens"].tolist() == [2.0**17] * 3


def test_all_that_is_wrong_with_the_columns_is_said_at_once():
    frame = pd.DataFrame(ROWS).rename(columns={"params": "width", "tokens": "hours"}).assign(eval_loss=2.0)
    with pytest.raises(WarmstartError, match=r"loss may be any of.*'eval_loss'.*params is missing.*tokens is missing"):
        read_runs(frame)
    with pytest.raises(WarmstartError, match=r"\['size'\].*\['nowhere'\]"):
        read_runs(ROWS, columns={"size": "params", "loss": "nowhere"})


def test_batches_in_sequences_need_the_length_of_one():
    frame = pd.DataFrame(ROWS).rename(columns={"batch_tokens": "batch_size"}).assign(batch_size=64)
    with pytest.raises(WarmstartError, match="'batch_size' counts sequences"):
        read_runs(frame)
    table = read_runs(frame, sequence_length=2048)
    assert table.frame["batch_tokens"].tolist() == [2.0**17] * 3 and table.sequence_length == 2048
    assert read_runs(frame.assign(seq_len=1024)).frame["batch_tokens"].tolist() == [2.0**16] * 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 3.0}, "learning_rate of 1 runs .* above 1"),
        ({"learning_rate": 0.0}, "learning_rate .* must be positive"),
        ({"batch_tokens": 8}, "below one sequence"),
        ({"batch_tokens": 64, "sequence_length": 2048}, "below one sequence"),
        ({"tokens": 20}, "more than the whole run's tokens"),
        ({"params": 0.1}, "millions or billions"),
        ({"loss": 55.0}, "perplexity"),
        ({"loss": "three"}, "must hold numbers: loss has"),
    ],
)
def test_units_that_cannot_be_are_errors(changes, words):
    with pytest.raises(WarmstartError, match=words):
        read_runs([*ROWS, row(**changes)])


def test_all_wrong_units_are_named_together():
    with pytest.raises(WarmstartError, match=r"learning_rate.*params"):
        read_runs([row(params=1.0, learning_rate=2.0)])


@pytest.mark.parametrize(("unit", "flops"), [("PF-days", 8.64e19), ("EFLOPs", 1e18), ("GFLOPs", 1e9)])
def test_budgets_in_another_unit_are_told_by_6_n_d(unit, flops):
    rows = [run | {"compute": 1.3 * 6 * run["params"] * run["tokens"] / flops} for run in ROWS]
    with pytest.raises(WarmstartError, match=f"seems to be in {unit}"):
        read_runs(rows)


def test_compute_that_is_counted_otherwise_is_taken_when_asked_for():
    rows = [run | {"compute": 1.5 * 6 * run["params"] * run["tokens"]} for run in ROWS]
    table = read_runs(rows)
    assert table.frame["compute"].tolist() == [1.2e18] * 3 and "1.5 times" in table.warnings[0]
    table = read_runs(rows, accounting="config")
    assert table.frame["compute"].tolist() == pytest.approx([1.8e18] * 3) and table.warnings == []
    per_token = [run | {"flops_per_token": 9e8} for run in ROWS]
    assert read_runs(per_token, accounting="config").frame["compute"].tolist() == [1.8e18] * 3
    with pytest.raises(WarmstartError, match="compute or flops_per_token is missing"):
        read_runs(ROWS, accounting="config")


def test_odd_ratios_of_tokens_to_parameters_warn():
    assert "Tokens per parameter" in read_runs([row(tokens=2e14)]).warnings[0]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "empty"),
        ("nowhere.csv", "no file or folder"),
        (3, "no table of runs"),
        ([row(loss=math.nan)], "None of 1 runs is usable: diverged"),
    ],
)
def test_what_is_no_table_of_runs_is_refused(source, words):
    with pytest.raises(WarmstartError, match=words):
        read_runs(source)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "Wall time,Step,Value\n1,2,3\n", "one curve"),
        ("a.jsonl", '{"params": 1', "cannot be read as jsonl"),
        ("a.json", '{"params": 1}', "a list with one object"),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
        ("a.xlsx", "", "no known kind"),
    ],
)
def test_files_that_are_no_tables_are_refused(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(WarmstartError, match=words):
        read_runs(tmp_path / name)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(WarmstartError, match="No trainer_state.json"):
        read_runs(tmp_path)


def test_a_table_that_was_read_is_returned_as_it_is():
    table = read_runs(ROWS)
    assert isinstance(table, RunTable) and read_runs(table) is table
