"""The pool of workers: results in order, the urgent first, no job after the deadline, and jobs that fail or kill."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from hf_warmstart.scaling.sweeps.pool import OutOfTimeError, WorkerPool


def work(folder: str, job: str) -> str:
    """Answer, fail, die always, die once or take long."""
    if job == "fail":
        raise ValueError("no such thing")
    if job == "die" or (job == "die once" and not Path(folder, "died").exists()):
        Path(folder, "died").touch()
        os._exit(3)
    if job.startswith("slow"):
        time.sleep(0.5)
    with Path(folder, "log").open("a") as log:
        log.write(job + "\n")
    return job.upper()


def test_without_workers_jobs_are_done_here_one_by_one(tmp_path):
    seen = []
    with WorkerPool(0, work, str(tmp_path)) as pool:
        assert pool.run(["b", "a"], done=lambda job, result: seen.append((job, result))) == ["B", "A"]
    assert seen == [("b", "B"), ("a", "A")]


def test_no_job_is_begun_after_the_deadline(tmp_path):
    with WorkerPool(0, work, str(tmp_path), seconds=0.2) as pool, pytest.raises(OutOfTimeError):
        pool.run(["slow 1", "slow 2", "slow 3"])
    assert (tmp_path / "log").read_text() == "slow 1\n", "the first was begun in time, and ended"


@pytest.mark.distributed
def test_workers_answer_in_order_fail_and_die(tmp_path):
    with WorkerPool(2, work, str(tmp_path)) as pool:
        jobs = [f"job {k}" for k in range(6)]
        assert pool.run(["slow", *jobs]) == ["SLOW", *map(str.upper, jobs)]
        with pytest.raises(RuntimeError, match="no such thing"):
            pool.run(["a", "fail", "b"])
        assert pool.run(["die once"]) == ["DIE ONCE"], "another process takes its place"
        with pytest.raises(RuntimeError, match="exit code 3"):
            pool.run(["die"])
        assert pool.run(["after"]) == ["AFTER"]


@pytest.mark.distributed
def test_the_urgent_go_first_and_time_ends_for_all(tmp_path):
    with WorkerPool(1, work, str(tmp_path)) as pool:
        pool.run(["warm"])
        one = threading.Thread(target=pool.run, args=(["slow", "x", "y"], 2))
        one.start()
        time.sleep(0.2)
        pool.run(["urgent"], priority=1)
        one.join()
        assert (tmp_path / "log").read_text().split() == ["warm", "slow", "urgent", "x", "y"]
        pool.end = time.monotonic()
        with pytest.raises(OutOfTimeError, match="2 jobs"):
            pool.run(["late", "later"])
    with pytest.raises(RuntimeError, match="closed"):
        pool.run(["never"])
