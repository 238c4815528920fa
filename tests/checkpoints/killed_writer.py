"""Writes a folder over and over, each time in a process that is killed at a chosen call to the system; then to the end.

    python -m tests.checkpoints.killed_writer FOLDER CALL CALL ...

Prints, as JSON, how many processes were killed and how many shards the last one found finished.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import torch

from .folders import WholeSink

NAMES = [f"layers.{i}.weight" for i in range(8)]
ROWS, COLUMNS = 64, 1021


def rows_of(name: str, start: int, stop: int) -> torch.Tensor:
    """What a tensor's rows hold: whole numbers that tell tensors and rows apart."""
    first = NAMES.index(name) * ROWS * COLUMNS
    return torch.arange(first + start * COLUMNS, first + stop * COLUMNS, dtype=torch.int32).view(-1, COLUMNS)


def write(target: Path) -> int:
    """Write the folder; returns how many shards were found finished."""
    specs = dict.fromkeys(NAMES, (torch.int32, (ROWS, COLUMNS)))
    size = 2 * ROWS * COLUMNS * 4
    with WholeSink(target, specs, max_shard_size=size, fingerprint="1", buffer_nbytes=2**19) as sink:
        found = sum(shard.done for shard in sink.shards)
        for shard in sink.shards:
            if not shard.done:
                with shard.open():
                    for name in shard.layout:
                        for start in range(0, ROWS, 8):
                            shard.write(rows_of(name, start, start + 8))
        (sink.folder / "config.json").write_text("{}")
        sink.publish()
    return found


def die_at(call: int) -> None:
    """Kill this process at the n-th call, from any thread, that changes what is on the disk."""
    calls = itertools.count(1)

    def counted(real):
        def wrapped(*args, **options):
            if next(calls) >= call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return wrapped

    for name in ("pwrite", "fsync", "rename", "mkdir", "unlink", "ftruncate"):
        setattr(os, name, counted(getattr(os, name)))


def main(target: Path, calls: list[int]) -> dict[str, int]:
    killed = 0
    for call in calls:
        child = os.fork()
        if child == 0:
            die_at(call)
            write(target)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if target.exists():  # whole or not at all
            return {"killed": killed, "found": -1}
    return {"killed": killed, "found": write(target)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), [int(text) for text in sys.argv[2:]])))  # noqa: T201
