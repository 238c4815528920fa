"""Progress of long work: a bar with bytes, rate and time left for people, JSON lines for machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .options import console, plain

Report = Callable[[int, int], None]
EVERY = 0.5  # seconds between two lines


@contextmanager
def bar(words: str) -> Iterator[Report]:
    """A bar on stderr; where nobody looks (a pipe, a file), nothing."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    out = console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as shown:
        task = shown.add_task(words, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


@contextmanager
def json_lines() -> Iterator[Report]:
    """`{"event": "progress", "bytes": ..., "of": ..., "bytes_per_second": ..., "seconds_left": ...}` on stdout.

    The first line stands before the first byte; nobody knows yet how many seconds are left (null).
    """
    begun: tuple[float, int] | None = None  # seconds, and the bytes that an earlier run left
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal begun, last
        now = time.monotonic()
        if begun is None:
            begun = now, done
        elif now - last < EVERY and done < total:
            return
        last = now
        start, first = begun
        rate = (done - first) / (now - start) if now > start else 0.0
        left = 0.0 if done >= total else (total - done) / rate if rate else None
        write_line({"event": "progress", "bytes": done, "of": total, "bytes_per_second": rate, "seconds_left": left})

    yield report


def write_line(data: Any) -> None:
    """One JSON object on one line of stdout, at once."""
    sys.stdout.write(json.dumps(plain(data), allow_nan=False) + "\n")
    sys.stdout.flush()
