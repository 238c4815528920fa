"""Dividing a study over processes: each takes the first run that is ready, not finished and not under way elsewhere.

A run under way holds a lock that ends with its process, however that ends. Processes of other commands, on the same folder,
share the work by the same locks.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from transformers.utils import logging

from hf_warmstart import WarmstartError

from .jobs import Job
from .running import Study
from .settings import Setting
from .text import read

LOCKS, FAILED = "locks", "failed"
WAIT = 0.5  # seconds until what others are running is looked at again
SLACK = 1.1  # on the time that a run is expected to take


@contextmanager
def held(study: Study, job: Job) -> Iterator[bool]:
    """Whether this process has a run's lock, which it holds meanwhile."""
    (study.folder / LOCKS).mkdir(exist_ok=True)
    with (study.folder / LOCKS / job.name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def expected_seconds(study: Study, job: Job) -> float:
    """What a run will take, by those that are finished; of its own size, where there are any. 0 while nothing is known."""
    records = [r for other in study.jobs if (r := study.record(other.name)) and r["trained_flops"]]
    own = [r for r in records if r["size"] == study.trained_size(job)]
    rates = [r["trained_flops"] / r["seconds"] for r in own or records]
    return SLACK * study.cost(job) / median(rates) if rates else 0.0


def work(study: Study, ends: float | None = None) -> None:
    """Run what is left, until all is finished or nothing more would end in time.

    Args:
        ends: time (of `time.time`) by which everything that is begun is to be over.
    """
    while True:
        busy = False  # somebody else is at a run, after which others may be ready
        for job in study.jobs:
            if study.is_done(job) or _failure(study, job).exists() or not study.is_ready(job):
                continue
            if ends is not None and time.time() + expected_seconds(study, job) > ends:
                continue
            with held(study, job) as mine:
                if mine and not study.is_done(job):
                    _run(study, job)
                    break
                busy = True
        else:
            if not busy:
                return
            time.sleep(WAIT)
        if ends is not None and time.time() > ends:
            return


def _failure(study: Study, job: Job) -> Path:
    return study.folder / FAILED / f"{job.name}.txt"


def _run(study: Study, job: Job) -> None:
    """Do a run and print what came of it; a fault is written down, and the others go on."""
    try:
        made = study.run(job)
    except Exception:  # of whatever kind: `run_all` fails with it when the others are done
        file = _failure(study, job)
        file.parent.mkdir(exist_ok=True)
        file.write_text(traceback.format_exc())
        print(f"{job.name}  failed, see {file}", flush=True)
        return
    losses = " ".join("-" if row["loss"] is None else f"{row['loss']:.4f}" for row in made["rows"])
    print(f"{job.name}  {losses}  {made['seconds']:.0f} s", flush=True)


def run_all(study: Study, workers: int, ends: float | None = None) -> None:
    """Run a study in some processes, or in this one, where it is one.

    Raises:
        WarmstartError: runs failed; the message says which.
    """
    shutil.rmtree(study.folder / FAILED, ignore_errors=True)  # what failed before is tried again
    if workers == 1:
        torch.set_num_threads(_threads(str(study.device)))
        work(study, ends)
    else:
        _in_processes(study, workers, ends)
    failed = sorted(file.stem for file in (study.folder / FAILED).glob("*.txt"))
    if failed:
        raise WarmstartError(f"{len(failed)} runs failed: {', '.join(failed)}. {study.folder / FAILED} says how.")


def _threads(device: str) -> int:
    """One beside other processes; a few where only growing is done on the CPU."""
    return 1 if device == "cpu" else 4


def _in_processes(study: Study, workers: int, ends: float | None) -> None:
    context = multiprocessing.get_context("spawn")
    seeds = tuple(dict.fromkeys(j.seed for j in study.jobs if j.seed != study.setting.tuning_seed))
    given = (study.folder, study.setting, str(study.device), study.states, seeds, ends)
    processes = [context.Process(target=_worker, args=given, daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if codes := [process.exitcode for process in processes if process.exitcode]:
        raise WarmstartError(f"{len(codes)} of {workers} processes ended early, with exit codes {codes}.")


def _worker(
    folder: Path, setting: Setting, device: str, states: Path, seeds: tuple[int, ...], ends: float | None
) -> None:
    """What a process does."""
    torch.set_num_threads(_threads(device))
    logging.set_verbosity_error()
    work(Study(folder, setting, read(folder), device, states, seeds), ends)
