"""`WorkerPool`: jobs in processes of one thread each; whichever is free takes the next, none is begun after a deadline.

Runs of a sweep differ in length by an order of magnitude, so that dividing them beforehand leaves processes idle. Several
threads may bring jobs at once: those of the smallest `priority` go first, so that a narrow round of one piece of work is
filled up by what another has to do. The pool keeps no state: what is finished is in files, and a killed run is begun anew.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from ...errors import WarmstartError
from ...processes import THREADS, end_with_parent

ATTEMPTS = 2  # a process that dies under a job (killed for memory, say) is replaced once
ONE_THREAD = {**dict.fromkeys(THREADS, "1"), "TOKENIZERS_PARALLELISM": "false"}
Function = Callable[[Any, Any], Any]


class OutOfTimeError(WarmstartError):
    """Jobs that were not begun, since the time that was allowed is up. What is finished is kept."""


class WorkerPool:
    """Processes that call `function(shared, job)`.

    Args:
        workers: how many processes; 0 calls the function here, one job at a time.
        function: importable by name in a fresh process. shared: its first argument, sent to each process once.
        seconds: from now, after which no job is begun; None for no end.

    Example:

        >>> with WorkerPool(0, max, 3) as pool:
        ...     pool.run([1, 5])
        [3, 5]
    """

    def __init__(self, workers: int, function: Function, shared: Any, seconds: float | None = None):
        self.function, self.shared = function, shared
        self.end = None if seconds is None else time.monotonic() + seconds
        self._waiting: queue.PriorityQueue = queue.PriorityQueue()
        self._serial = itertools.count()
        self._here = threading.Lock()
        self._closed = False
        self._alive: set[_Process] = set()
        # Plain pickle: tensors are copied, since shared memory is scarce in containers.
        self._setup = pickle.dumps((function, shared)) if workers else b""
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def run(
        self, jobs: Sequence[Any], priority: float = 0, done: Callable[[Any, Any], None] = lambda job, result: None
    ) -> list[Any]:
        """Results of all jobs, in their order. Any number of threads may call this at once.

        Args:
            priority: of these jobs; the smallest goes first, then the oldest. done: called with each job and its result as
                it comes, in the caller's thread.

        Raises:
            OutOfTimeError: some were not begun in time; those under way were finished, and `done` called for them.
            RuntimeError: a job failed, with its process's traceback, or its process died twice.
        """
        if not self._threads:
            return [self._call_here(job, done) for job in jobs]
        if self._closed:
            raise RuntimeError("The pool is closed.")
        answers: queue.SimpleQueue = queue.SimpleQueue()
        for index, job in enumerate(jobs):
            self._waiting.put((priority, next(self._serial), (job, index, answers)))
        results: dict[int, Any] = {}
        late, failures = 0, []
        for _ in jobs:
            index, result = answers.get()
            if isinstance(result, OutOfTimeError):
                late += 1
            elif isinstance(result, Exception):
                failures.append(result)
            else:
                results[index] = result
                done(jobs[index], result)
        if failures:
            raise failures[0]
        if late:
            raise _late(late)
        return [results[index] for index in range(len(jobs))]

    def close(self) -> None:
        """End the processes at once, with what they are doing; jobs that wait are dropped."""
        self._closed = True
        for _ in self._threads:
            self._waiting.put((float("-inf"), next(self._serial), None))
        for process in list(self._alive):
            process.kill()
        for thread in self._threads:
            thread.join()
        while not self._waiting.empty():
            if (item := self._waiting.get()[2]) is not None:
                job, index, answers = item
                answers.put((index, RuntimeError(f"The pool was closed before {_short(job)}.")))

    def _is_late(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end

    def _call_here(self, job: Any, done: Callable[[Any, Any], None]) -> Any:
        with self._here:
            if self._is_late():
                raise _late(1)
            result = self.function(self.shared, job)
        done(job, result)
        return result

    def _serve(self) -> None:
        """A thread's life: one process, and the next job whenever that is free."""
        process: _Process | None = None
        while not self._closed and (item := self._waiting.get()[2]) is not None:
            job, index, answers = item
            result: Any = _late(1) if self._is_late() else RuntimeError(f"The pool was closed before {_short(job)}.")
            for _ in range(0 if self._is_late() else ATTEMPTS):
                try:
                    if process is None:
                        process = _Process(self._setup)
                        self._alive.add(process)
                    succeeded, value = process.call(job)
                except (EOFError, OSError):
                    code = process.kill() if process is not None else None
                    result = RuntimeError(f"The process of {_short(job)} ended with exit code {code}.")
                    self._alive.discard(process)  # type: ignore[arg-type]
                    process = None
                    if self._closed:
                        break
                else:
                    result = value if succeeded else RuntimeError(f"{_short(job)} failed:\n{value}")
                    break
            answers.put((index, result))
        if process is not None:
            process.kill()


class _Process:
    """A process that answers one call after the other."""

    def __init__(self, setup: bytes):
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.process = context.Process(target=_work, args=(there,), daemon=True)
        with _one_thread():
            self.process.start()
        there.close()
        self.connection.send_bytes(setup)

    def call(self, job: Any) -> tuple[bool, Any]:
        """Whether the function returned, and what it did or how it failed. EOFError or OSError: the process is gone."""
        self.connection.send(job)
        return self.connection.recv()

    def kill(self) -> int | None:
        """End it; its exit code."""
        self.process.kill()
        self.process.join()
        return self.process.exitcode


def _work(connection: Connection) -> None:
    """A worker's life: one thread of arithmetic, one job after the other."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    function, shared = pickle.loads(connection.recv_bytes())
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = True, function(shared, job)
        except Exception:  # raised again by the pool, in the process that asked
            answer = False, traceback.format_exc()
        connection.send(answer)


_starting = threading.Lock()


@contextmanager
def _one_thread() -> Iterator[None]:
    """A child inherits an environment that says one thread; libraries read it when they are imported."""
    with _starting:
        before = {name: os.environ.get(name) for name in ONE_THREAD}
        os.environ.update(ONE_THREAD)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _late(count: int) -> OutOfTimeError:
    return OutOfTimeError(
        f"{count} jobs were not begun in the time that was allowed. The same call goes on with them."
    )


def _short(job: Any) -> str:
    words = repr(job)
    return words if len(words) <= 120 else words[:117] + "..."
