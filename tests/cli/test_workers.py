"""Worker processes: results as they come, and what hangs or dies."""

from __future__ import annotations

import os
import time

from hf_warmstart.cli import workers


def either(how: str) -> str:
    """A task that answers, hangs or dies."""
    if how == "hang":
        time.sleep(60)
    if how == "die":
        os._exit(3)
    return how.upper()


def test_only_what_hangs_or_dies_is_lost():
    started: list[workers.Task] = []
    tasks = [("one",), ("die",), ("two",), ("hang",), ("three",)]
    found = dict(workers.results(either, tasks, 1, limit=10, started=started.append))
    assert started == tasks
    assert [found[task] for task in (("one",), ("two",), ("three",))] == ["ONE", "TWO", "THREE"]
    assert found["die",].reason == "its process ended with exit code 3"
    assert found["hang",].reason == "took more than 10 s"


def test_all_tasks_are_done_by_several_processes():
    tasks = [(str(number),) for number in range(7)]
    assert dict(workers.results(either, tasks, 2, limit=60)) == {task: task[0] for task in tasks}
