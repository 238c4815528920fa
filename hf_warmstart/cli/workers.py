"""Work in fresh processes, each call under a time limit: what hangs or dies takes one result with it, not the run."""

from __future__ import annotations

import enum
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ..processes import THREADS, end_with_parent

Task = tuple[str, ...]


class Ready(enum.Enum):
    """What a process says once it has imported its function."""

    READY = "ready"


READY = Ready.READY


@dataclass(frozen=True)
class Lost:
    """A call that gave no result, and why."""

    reason: str
    seconds: float


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    task: Task | None = None
    since: float = 0.0  # when the task was given, or the process was ready for it

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def results(
    function: Callable[..., Any],
    tasks: Sequence[Task],
    jobs: int,
    limit: float,
    started: Callable[[Task], None] = lambda task: None,
) -> Iterator[tuple[Task, Any]]:
    """`function(*task)` for every task, in `jobs` processes; results, or what is `Lost`, as they come.

    Args:
        function: importable by name in a fresh process.
        limit: seconds for one call, and for a process to start; one that takes longer is ended, and another takes its
            place.
        started: called with each task when a process takes it.
    """
    waiting = list(reversed(tasks))
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.task is not None for worker in workers):
            while waiting and len(workers) < jobs:
                workers.append(_start(function))
            for worker in workers:
                if worker.task is None and waiting:
                    worker.task, worker.since = waiting.pop(), time.monotonic()
                    worker.connection.send(worker.task)
                    started(worker.task)
            busy = {worker.connection: worker for worker in workers if worker.task is not None}
            oldest = min(worker.since for worker in busy.values())
            ready = wait(list(busy), max(0.0, oldest + limit - time.monotonic()))
            for connection, worker in busy.items():
                seconds = time.monotonic() - worker.since
                if connection in ready:
                    result = _received(worker, seconds)
                elif seconds >= limit:
                    result = Lost(f"took more than {limit:.0f} s", seconds)
                else:
                    continue
                if result is READY:
                    worker.since = time.monotonic()
                    continue
                if isinstance(result, Lost):
                    worker.close()
                    workers.remove(worker)
                task, worker.task = worker.task, None
                if task is not None:
                    yield task, result
    finally:
        for worker in workers:
            worker.close()


def _start(function: Callable[..., Any]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there,), daemon=True)
    process.start()
    there.close()
    here.send(function)
    return _Worker(process, here)


def _received(worker: _Worker, seconds: float) -> Any:
    """What a worker sent, or what became of it."""
    try:
        return worker.connection.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
        return Lost(f"its process ended with exit code {worker.process.exitcode}", seconds)


def _work(connection: Connection) -> None:
    """A worker's life: quiet, on one thread, away from the network. The function is imported when it is received."""
    os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", *THREADS), "1")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(null, stream.fileno())
    warnings.simplefilter("ignore")
    threading.Thread(target=end_with_parent, daemon=True).start()
    function = connection.recv()
    connection.send(READY)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(function(*task))
