"""Runs from what experiment trackers keep on a disk or export, as it lies there.

| tracker | what |
|---|---|
| trackio | the project's SQLite file, or the Parquet that it exports with `_configs.parquet` beside it: a row per logged step |
| wandb | the CSV that its documentation makes of its API, a row per run with `summary` and `config` as dicts |
| TensorBoard | folders of event files, read by the `tensorboard` package, which is no dependency of this library |

`Trainer` writes its arguments and the model's config into event files as text beside the curves, so that such a folder says all
that a run needs.
"""

from __future__ import annotations

import ast
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WarmstartError

if TYPE_CHECKING:
    import pandas as pd

EVENTS = "events.out.tfevents.*"
# Of Trainer's curves: the peak of a rate is its run's, of everything else the last value is.
RATE_TAGS = ("train/learning_rate", "learning_rate")
TOKEN_TAGS = ("train/num_input_tokens_seen", "num_input_tokens_seen")
ARGUMENTS, MODEL_CONFIG = "args/text_summary", "model_config/text_summary"
KEPT_ARGUMENTS = ("learning_rate", "seed", "per_device_train_batch_size", "gradient_accumulation_steps")


def from_trackio(path: Path) -> pd.DataFrame:
    """A row for each logged step of each run, with its config's entries beside the metrics.

    Raises:
        WarmstartError: it is no database of trackio.
    """
    import pandas as pd

    try:
        # Read only: the database may be in use.
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "metrics" not in tables:
                raise WarmstartError(f"{path.name} has no table of metrics, so that it is no database of trackio.")
            configs = _rows(connection, "configs", "config") if "configs" in tables else []
            return with_configs(pd.DataFrame(_rows(connection, "metrics", "metrics")), pd.DataFrame(configs))
    except (sqlite3.Error, KeyError) as error:
        raise WarmstartError(f"{path.name} cannot be read as a database of trackio: {error}") from error


def _rows(connection: sqlite3.Connection, table: str, column: str) -> list[dict[str, Any]]:
    """The rows of a table, the JSON in one column beside its other columns."""
    found = []
    for row in map(dict, connection.execute(f"SELECT * FROM {table} ORDER BY id")):
        said = json.loads(row.pop(column))
        found.append({k: row[k] for k in ("run_id", "run_name", "step") if k in row} | said)
    return found


def from_parquet(path: Path) -> pd.DataFrame:
    """A table; of trackio's metrics with the configs that it exports beside them."""
    import pandas as pd

    table = pd.read_parquet(path)
    beside = [path.with_name(f"{path.stem}_configs.parquet"), path.parent / "aux" / "configs.parquet"]
    config = next((file for file in beside if file.is_file()), None)
    if config is None or "run_name" not in table:
        return table
    return with_configs(table, pd.read_parquet(config))


def with_configs(metrics: pd.DataFrame, configs: pd.DataFrame) -> pd.DataFrame:
    """trackio's metrics, a row for each logged step, with what each run's config says in columns that they lack."""
    key = "run_id" if "run_id" in metrics and "run_id" in configs else "run_name"
    if not len(configs) or key not in configs:
        return metrics
    own = [c for c in configs if c not in {*metrics.columns, "id", "created_at", "run_name", "run_id"}]
    return metrics.merge(configs[[key, *own]].drop_duplicates(key, keep="last"), how="left", on=key)


def unnested(table: pd.DataFrame) -> pd.DataFrame:
    """The table that wandb's documentation makes of its API, with `summary`, `config` and `name`, as one column for each entry.

    What both say is the config's: the summary has the last rate, the config the peak. Read back from CSV the two are text.

    Raises:
        WarmstartError: such text is no dict.
    """
    import pandas as pd

    rows = []
    for number, row in enumerate(table.to_dict("records")):
        summary, config = (_as_dict(row.pop(name), name, number) for name in ("summary", "config"))
        rows.append({**row, **summary, **config})
    return pd.DataFrame(rows)


def _as_dict(value: Any, column: str, number: int) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            # Losses that are no numbers are written as such, and are no literals of Python.
            value = ast.literal_eval(re.sub(r"(?<=[:\[,] )(-?)(nan|inf)\b", r"'\1\2'", value))
        except (ValueError, SyntaxError) as error:
            raise WarmstartError(
                f"{column} of row {number} is no dict, as wandb's export has it: {value[:60]!r}."
            ) from error
    if not isinstance(value, dict):
        raise WarmstartError(f"{column} of row {number} is a {type(value).__name__}, and a dict is needed.")
    return {name: entry for name, entry in value.items() if isinstance(entry, (int, float, str, bool))}


def from_event_files(folder: Path) -> pd.DataFrame:
    """A row for each folder below this one that holds event files.

    Raises:
        WarmstartError: `tensorboard` is not installed.
    """
    import pandas as pd

    try:
        import tensorboard.backend.event_processing.event_accumulator as events
    except ImportError as error:
        raise WarmstartError(
            f"{folder.name!r} holds TensorBoard's event files, which the tensorboard package reads. Install it, or pass the "
            "HParams table that TensorBoard exports as CSV or JSON."
        ) from error
    rows = []
    for run in sorted({file.parent for file in folder.rglob(EVENTS)}):
        read = events.EventAccumulator(str(run), size_guidance={events.SCALARS: 0, events.TENSORS: 0})
        read.Reload()
        if entries := dict(_entries(read)):  # a writer that was opened leaves a file, with or without anything in it
            rows.append({"name": str(run.relative_to(folder)), **entries})
    return pd.DataFrame(rows)


def _entries(read: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of one run."""
    said: dict[str, Any] = {}
    curves = {tag: read.Scalars(tag) for tag in read.Tags()["scalars"]}
    for tag, points in curves.items():
        values = [point.value for point in points]
        said[tag] = max(values) if tag in RATE_TAGS else values[-1]
    said |= _hyper_parameters(read)
    arguments, config = (_text(read, tag) for tag in (ARGUMENTS, MODEL_CONFIG))
    # The arguments say the peak; a curve that is logged now and then may miss it.
    said |= {name: arguments[name] for name in KEPT_ARGUMENTS if name in arguments}
    if "learning_rate" in said:
        said.pop("train/learning_rate", None)
    if config:
        said.setdefault("params", _params_of(config))
    for tag in TOKEN_TAGS:
        if tag in curves:
            last = curves[tag][-1]
            said.setdefault("tokens", said.pop(tag))
            if not {"batch_tokens", "batch_size"} & set(said):
                said["batch_tokens"] = last.value / max(1, last.step)
    yield from said.items()


def _hyper_parameters(read: Any) -> dict[str, Any]:
    """What `SummaryWriter.add_hparams` wrote."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found: dict[str, Any] = {}
    try:
        contents = read.PluginTagToContent("hparams")
    except KeyError:  # none were written
        return found
    for content in contents.values():
        for name, value in HParamsPluginData.FromString(content).session_start_info.hparams.items():
            found[name] = getattr(value, value.WhichOneof("kind")) if value.WhichOneof("kind") else None
    return found


def _text(read: Any, tag: str) -> Mapping[str, Any]:
    """JSON that was logged as text; empty where there is none."""
    if tag not in read.Tags()["tensors"]:
        return {}
    try:
        return json.loads(read.Tensors(tag)[-1].tensor_proto.string_val[0])
    except ValueError:
        return {}


def _params_of(config: Mapping[str, Any]) -> int | None:
    from transformers import CONFIG_MAPPING

    from .tables.compute import count_parameters

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return None
    return count_parameters(CONFIG_MAPPING[kind].from_dict(dict(config))).non_embedding
