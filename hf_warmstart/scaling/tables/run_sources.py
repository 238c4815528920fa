"""Where runs come from: tables in memory, files, exports of experiment trackers, and folders of Trainer runs.

Every reader gives a `DataFrame` with one row per run, its columns named as the source has them; `runs.py` knows what they
mean. What is read of the trackers is what they export, not their stores:

| source | read | not read |
|---|---|---|
| Trainer | folders with `trainer_state.json`, `config.json` beside it | `training_args.bin` (a pickle) |
| wandb | the runs table as CSV, run histories as CSV, JSON lines or Parquet | its binary logs |
| trackio | the metrics table as Parquet, CSV or JSON lines (a row per step) | its SQLite file |
| TensorBoard | the HParams table as CSV or JSON | event files; the CSV of one curve, which holds no settings |
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import WarmstartError

if TYPE_CHECKING:
    import pandas as pd

STATE_NAME = "trainer_state.json"
CURVE_COLUMNS = {"wall_time", "step", "value"}
# Names of the column that says which run a row of a history belongs to, and of the one that counts its steps.
RUN_NAMES = ("run", "run_name", "run_id", "name", "id", "trial_id")
STEP_NAMES = ("step", "global_step", "train_global_step")
KINDS = "a path to .csv, .tsv, .json, .jsonl, .parquet or a folder of Trainer runs, a DataFrame, a Dataset or a list of dicts"


def read_table(source: Any) -> pd.DataFrame:
    """The rows of any source of runs, one per run.

    Raises:
        WarmstartError: it is no source of runs, holds none, or cannot be read.
    """
    import pandas as pd

    if isinstance(source, pd.DataFrame):
        table = source.reset_index(drop=True)
    elif isinstance(source, (str, os.PathLike)):
        table = _from_path(Path(source))
    elif hasattr(source, "to_pandas"):  # datasets.Dataset, pyarrow.Table
        table = source.to_pandas()
    elif isinstance(source, Sequence) and all(isinstance(row, Mapping) for row in source):
        table = pd.DataFrame([dict(row) for row in source])
    elif isinstance(source, Mapping) and source and all(isinstance(v, Sequence) for v in source.values()):
        table = pd.DataFrame(dict(source))
    else:
        raise WarmstartError(f"{type(source).__name__} is no table of runs. Pass {KINDS}.")
    if table.empty:
        raise WarmstartError(f"The table of runs is empty. Pass {KINDS}, with one row for each run.")
    return _last_of_histories(table)


def plain_name(column: Any) -> str:
    """A column's name without case, spaces and separators: `eval/loss` and `Eval Loss` are `eval_loss`."""
    words = re.sub(r"[^a-z0-9]+", "_", str(column).strip().lower())
    return words.strip("_") or str(column)


def _from_path(path: Path) -> pd.DataFrame:
    import pandas as pd

    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise WarmstartError(f"There is no file or folder {str(path)!r} to read runs from. Pass {KINDS}.")
    readers = {
        ".csv": pd.read_csv,
        ".tsv": lambda p: pd.read_csv(p, sep="\t"),
        ".json": lambda p: pd.DataFrame(_rows_of_json(p)),
        ".jsonl": lambda p: pd.DataFrame([json.loads(line) for line in p.read_text().splitlines() if line.strip()]),
        ".parquet": pd.read_parquet,
    }
    readers[".ndjson"] = readers[".jsonl"]
    if path.suffix.lower() not in readers:
        raise WarmstartError(f"{path.name} is of no known kind. Pass {KINDS}.")
    try:
        return readers[path.suffix.lower()](path)
    except (ValueError, OSError, TypeError) as error:  # pandas and pyarrow raise subclasses of these
        words = " ".join(str(error).split())
        raise WarmstartError(f"{path.name} cannot be read as {path.suffix[1:]}: {words}") from error


def _rows_of_json(path: Path) -> list:
    """The rows of a JSON file: a list, or TensorBoard's object with a header and rows."""
    data = json.loads(path.read_text())
    if isinstance(data, dict) and {"header", "rows"} <= set(data):
        return [dict(zip(data["header"], row, strict=True)) for row in data["rows"]]
    if not isinstance(data, list):
        raise ValueError("a list with one object for each run is needed")
    return data


def _last_of_histories(table: pd.DataFrame) -> pd.DataFrame:
    """Of a table with a row per logged step, one row per run.

    The learning rate is the largest that was logged (the peak), everything else the last that was; tokens counted on the way
    are thereby the run's.
    """
    import pandas as pd

    names = {plain_name(column): column for column in table.columns}
    if set(names) == CURVE_COLUMNS:
        raise WarmstartError(
            "This is one curve, as TensorBoard exports it (wall time, step, value): it does not say with which settings it was "
            "run. Export the HParams table, or pass a table with one row for each run."
        )
    run = next((names[name] for name in RUN_NAMES if name in names), None)
    step = next((names[name] for name in STEP_NAMES if name in names), None)
    if run is None or step is None or not table[run].duplicated().any():
        return table
    rows = []
    for _, history in table.sort_values(step, kind="stable").groupby(run, sort=False):
        row = {column: _last(history[column]) for column in table.columns}
        for name in ("learning_rate", "train_learning_rate", "lr"):
            if name in names:
                row[names[name]] = history[names[name]].max()
        rows.append(row)
    return pd.DataFrame(rows)


def _last(column: pd.Series) -> Any:
    known = column.dropna()
    return known.iloc[-1] if len(known) else None


def _from_folder(folder: Path) -> pd.DataFrame:
    """The runs below a folder, each by its last `trainer_state.json`."""
    import pandas as pd

    states: dict[Path, tuple[int, Path]] = {}
    for path in sorted(folder.rglob(STATE_NAME)):
        number = re.fullmatch(r"checkpoint-(\d+)", path.parent.name)
        run = path.parent.parent if number else path.parent
        # A state that was saved beside the checkpoints is the end of training.
        rank = int(number[1]) if number else 2**62
        states[run] = max(states.get(run, (-1, path)), (rank, path))
    if not states:
        raise WarmstartError(f"No {STATE_NAME} lies below {folder.name!r}. Pass {KINDS}.")
    return pd.DataFrame([_from_trainer_state(path, str(run.relative_to(folder))) for run, (_, path) in states.items()])


def _from_trainer_state(path: Path, name: str) -> dict[str, Any]:
    """One run, from its `trainer_state.json` and the `config.json` beside or above it."""
    try:
        state = json.loads(path.read_text())
        logs = state["log_history"]
        step, last = int(state["global_step"]), int(state["max_steps"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        return {"name": name, "problem": f"its {STATE_NAME} cannot be read: {type(error).__name__}: {error}"}
    rates = [log["learning_rate"] for log in logs if "learning_rate" in log]
    evaluations = [log for log in logs if "eval_loss" in log]
    tokens = int(state.get("num_input_tokens_seen") or 0)
    row: dict[str, Any] = {
        "name": name,
        "learning_rate": max(rates, default=None),
        "tokens": tokens or None,
        "batch_tokens": tokens / step if tokens and step else None,
        "loss": evaluations[-1]["eval_loss"] if evaluations else None,
        "params": None,
        "problem": None,
    }
    if step < last:
        row["problem"] = f"it stopped at step {step} of {last}"
    elif not tokens:
        row["problem"] = "its tokens were not counted; train with include_num_input_tokens_seen='all'"
    elif not evaluations or evaluations[-1].get("step", step) < step:
        row["problem"] = "it was not evaluated at its end"
    config = next((p for p in (path.parent / "config.json", path.parent.parent / "config.json") if p.is_file()), None)
    if config is None:
        row["problem"] = row["problem"] or "it has no config.json, so that its parameters are not known"
    else:
        row["params"] = _params_of(config.parent)
    return row


def _params_of(folder: Path) -> int:
    from transformers import AutoConfig

    from .compute import count_parameters

    return count_parameters(AutoConfig.from_pretrained(folder)).non_embedding
