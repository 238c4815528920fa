"""The folder of a sweep: what was asked, what is finished, and the table that `HparamPredictor.fit` reads.

    sweep.json        what was asked, with digests of config and texts; a sweep of anything else is refused. Beside that, what
                      a predictor keeps of it: the evaluation's fingerprint and the recipe of the runs
    finished/*.jsonl  one file for each run, one line for each of its horizons; it takes its name when it is complete
    runs.jsonl        the table: all lines of finished/, in a fixed order
    eval.parquet      the held-out tokens, for the loss of a checkpoint that is to be put through the laws

A sweep that was killed leaves whole files or none, so that it goes on with what is missing. Ranks share the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from ...errors import CheckpointError, WarmstartError

if TYPE_CHECKING:
    from torch import Tensor

SWEEP_NAME, TABLE_NAME, EVAL_NAME, FINISHED_NAME, LOCK_NAME = (
    "sweep.json", "runs.jsonl", "eval.parquet", "finished", ".lock",
)  # fmt: skip
NOT_COMPARED = ("made_with", "fingerprint", "recipe")
Row = dict[str, Any]
ORDER = ("params", "tokens", "batch_tokens", "learning_rate", "seed")


class SweepFolder:
    """A folder, opened for one sweep.

    Args:
        path: made where it does not exist. asked: what makes this sweep this sweep, as plain data. beside: what else
            `sweep.json` is to say, under the names in `NOT_COMPARED`. evaluation: the held-out tokens (sequences, tokens).
        writes: whether this process locks the folder and writes the table; the others add finished runs alone.

    Raises:
        WarmstartError: the folder holds another sweep (what differs is named), or something else.
        CheckpointError: another process runs this sweep.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        asked: Mapping[str, Any],
        beside: Mapping[str, Any] = MappingProxyType({}),
        evaluation: Tensor | None = None,
        writes: bool = True,
    ):
        self.path, self.writes = Path(path), writes
        self.rows: dict[str, list[Row]] = {}
        self._lock: IO | None = None
        check_folder(self.path, asked)
        if writes:
            (self.path / FINISHED_NAME).mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK_NAME).open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._lock.close()
                raise CheckpointError(
                    f"Another process runs the sweep in {path}. Wait for it, or pass another."
                ) from error
            if not (self.path / SWEEP_NAME).exists():
                if evaluation is not None:
                    _write_tokens(self.path / EVAL_NAME, evaluation)
                said = {**asked, **beside}
                write_atomically(self.path / SWEEP_NAME, json.dumps(said, indent=2) + "\n")
            for left in (self.path / FINISHED_NAME).glob(".*"):  # by a process that was killed
                left.unlink()
        self.refresh()

    def refresh(self) -> None:
        """Read what all ranks have finished; write the table."""
        for file in sorted((self.path / FINISHED_NAME).glob("*.jsonl")):
            if file.stem not in self.rows:
                self.rows[file.stem] = [json.loads(line) for line in file.read_text().splitlines()]
        if self.writes:
            write_atomically(self.path / TABLE_NAME, "".join(_line(row) for row in self.table()))

    def add(self, run: str, rows: Iterable[Row]) -> None:
        """Record a run, all its horizons at once."""
        self.rows[run] = list(rows)
        write_atomically(self.path / FINISHED_NAME / f"{run}.jsonl", "".join(map(_line, self.rows[run])))
        if self.writes:
            self.refresh()

    def table(self) -> list[Row]:
        """All rows, by params, tokens, batch, learning rate and seed."""
        rows = [row for run in self.rows.values() for row in run]
        return sorted(rows, key=lambda row: tuple(row[name] for name in ORDER))

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()


def check_folder(path: str | os.PathLike, asked: Mapping[str, Any]) -> None:
    """Raise unless a folder is new, empty, or holds this very sweep; nothing is written."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise WarmstartError(f"output_dir={str(path)!r} is a file. Pass a folder.")
    file = path / SWEEP_NAME
    if not file.is_file():
        if path.is_dir() and any(entry.name not in (FINISHED_NAME, LOCK_NAME, EVAL_NAME) for entry in path.iterdir()):
            raise WarmstartError(
                f"output_dir={str(path)!r} holds files, and none of a sweep. Pass a new or empty folder."
            )
        return
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}. Remove the folder, or pass another.") from error
    if isinstance(found, dict):
        found = {name: value for name, value in found.items() if name not in NOT_COMPARED}
    different = sorted(_different(found, json.loads(json.dumps(asked))))
    if different:
        raise WarmstartError(
            f"output_dir={str(path)!r} holds another sweep, which differs in {'; '.join(different[:8])}. Pass "
            "another folder, or what that sweep was started with."
        )


def _different(found: Any, asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Entries that differ, each with both values."""
    if not isinstance(found, dict):
        return ["all of it"]
    lines = []
    for name in sorted({*found, *asked}):
        old, new = found.get(name), asked.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _different(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name} ({_short(old)} there, {_short(new)} here)")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _write_tokens(path: Path, tokens: Tensor) -> None:
    """Rows of `input_ids` as Parquet."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"input_ids": tokens.tolist()}), path)


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all, however the process ends."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
