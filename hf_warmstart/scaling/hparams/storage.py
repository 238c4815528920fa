"""A predictor's files: what it knows as JSON, its draws and runs as Parquet.

| file | holds |
|---|---|
| `config.json` | laws, ranges, recipe, fingerprint, optima, how each form did |
| `draws.parquet` | draws of the laws, one row each |
| `runs.parquet`, `set_aside.parquet` | the runs themselves |
| `laws.png` | laws with data and intervals |
| `README.md` | the card |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ...errors import CheckpointError, WarmstartError
from ...hub.facts import to_json
from ...redaction import redacted
from ...version import __version__
from ..tables.runs import RunTable
from .fitted import FittedLaws
from .presets import preset_names

CONFIG, DRAWS, RUNS, SET_ASIDE, PLOT = "config.json", "draws.parquet", "runs.parquet", "set_aside.parquet", "laws.png"
KIND = "hparam_predictor"


def write(laws: FittedLaws, folder: Path) -> None:
    """Write a predictor's files into a folder that exists."""
    import pandas as pd

    (folder / "README.md").unlink(missing_ok=True)  # the mixin keeps a card that is there, of whatever it speaks
    draws = laws.draws()
    columns = {name: list(table.shape) for name, table in draws.items()}
    data = {"kind": KIND, "library_version": __version__, "draws": columns, **laws.to_dict()}
    # The mixin would hand an entry named as the predictor's own argument to whoever loads it.
    data["parameters"] = data.pop("laws")
    if laws.runs is not None:
        data["runs"] = {
            "accounting": laws.runs.accounting,
            "sequence_length": laws.runs.sequence_length,
            "warnings": laws.runs.warnings,
        }
        laws.runs.frame.to_parquet(folder / RUNS, index=False)
        laws.runs.set_aside.to_parquet(folder / SET_ASIDE, index=False)
    if draws:
        rows = max(len(table) for table in draws.values())
        named = {f"{name}.{k}": pd.Series(table[:, k]) for name, table in draws.items() for k in range(table.shape[1])}
        pd.DataFrame(named).reindex(range(rows)).to_parquet(folder / DRAWS, index=False)
    from .plots import plot_laws

    plot_laws(laws).savefig(folder / PLOT, dpi=120)
    (folder / CONFIG).write_text(to_json(data) + "\n")


def read(source: str, **hub_options: Any) -> FittedLaws:
    """The laws from a folder or a Hub id.

    Raises:
        CheckpointError: the files are damaged, or no predictor's.
    """
    import pandas as pd

    def path(name: str) -> Path:
        return Path(source, name) if Path(source).is_dir() else Path(hf_hub_download(source, name, **hub_options))

    try:
        data = json.loads(path(CONFIG).read_text())
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise CheckpointError(f"{source!r} holds no predictor: its {CONFIG} is of something else.")
        runs = data.pop("runs", None)
        table = None
        if runs is not None:
            table = RunTable(pd.read_parquet(path(RUNS)), pd.read_parquet(path(SET_ASIDE)), **runs)
        draws: dict[str, Any] = {}
        if shapes := data.pop("draws"):
            frame = pd.read_parquet(path(DRAWS))
            for name, (rows, width) in shapes.items():
                draws[name] = frame[[f"{name}.{k}" for k in range(width)]].to_numpy(dtype=float)[:rows]
        return FittedLaws.from_dict({**data, "laws": data["parameters"]}, draws, table)
    except (KeyError, TypeError, ValueError, FileNotFoundError, EntryNotFoundError) as error:
        if isinstance(error, WarmstartError):
            raise
        words = " ".join(str(error).split())
        raise CheckpointError(
            f"The predictor {source!r} is damaged or incomplete: {type(error).__name__}: {words}"
        ) from error


def fetched(load: Callable, source: str, options: dict[str, Any]) -> Any:
    """What a loader gives for a folder or Hub id; what the Hub says of one that is neither, as our error."""
    presets = f"Published laws are {preset_names()}."
    if Path(source).is_dir() and not Path(source, CONFIG).is_file():
        raise CheckpointError(f"The folder {source!r} has no {CONFIG}, so that it holds no predictor. {presets}")
    try:
        return load(source, **options)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        words = " ".join(str(error).split())
        raise WarmstartError(f"{source!r} is no law that could be loaded: {words} {presets}") from redacted(error)
