"""Growths that are killed again and again, as a program: `python -m tests.checkpoints.killed_growth FOLDER KILLS SEED`.

The imports are paid once: each run is a fork that grows from the beginning. Runs are killed in turn at a random moment
(SIGKILL from outside) and at a random operation on the disk (SIGKILL by itself). After up to three kills the same growth runs
to its end. Prints what happened as JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hf_warmstart.checkpoints.grow_checkpoint import prepare_growth
from hf_warmstart.checkpoints.target.staging import journal_path, staging_folder
from hf_warmstart.errors import CheckpointError

from .growths import GROWTH, bytes_below, do_not_certify, make_checkpoint

CALLS = ("pwrite", "fsync", "fdatasync", "ftruncate")  # of which Python tells no audit hook
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.copyfile"}
PER_GROWTH = 3


def grow(source: Path, target: Path, begun: int | None = None) -> None:
    """What the command does; a byte goes to a pipe when writing begins."""
    growth = prepare_growth(source, target, **GROWTH)
    try:
        if begun is not None:
            os.write(begun, b".")
        growth.run()
    finally:
        growth.close()


def count_operations(then: int | None = None) -> itertools.count:
    """Count, from any thread, what changes the disk; end the process before the operation of a number."""
    numbers = itertools.count(1)

    def one() -> None:
        if next(numbers) == then:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        reads = event == "open" and (
            arguments[1] in ("r", "rb") or (arguments[1] is None and not arguments[2] & (os.O_WRONLY | os.O_RDWR))
        )
        if event in EVENTS and not reads:
            one()

    def counted(real):
        def wrapped(*args, **options):
            one()
            return real(*args, **options)

        return wrapped

    sys.addaudithook(hook)
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    return numbers


def in_child(work) -> int:
    """Do work in a fork; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def measure(source: Path, target: Path) -> tuple[int, float]:
    """Operations and seconds of an undisturbed growth, counted in a process of its own."""
    reading, writing = os.pipe()

    def work() -> None:
        growth = prepare_growth(source, target, **GROWTH)
        numbers, start = count_operations(), time.monotonic()
        growth.run()
        os.write(writing, json.dumps([next(numbers), time.monotonic() - start]).encode())

    os.waitpid(in_child(work), 0)
    operations, seconds = json.loads(os.read(reading, 1000))
    return operations, seconds


def killed(source: Path, target: Path, operation: int | None, moment: float) -> bool:
    """One run that is killed before an operation, or so many seconds after it began to write; whether it was."""
    reading, writing = os.pipe()

    def work() -> None:
        growth = prepare_growth(source, target, **GROWTH)
        if operation is not None:
            count_operations(operation)
        os.write(writing, b".")
        growth.run()

    child = in_child(work)
    os.close(writing)
    if operation is None:
        os.read(reading, 1)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reading)
    return os.WIFSIGNALED(status)


def journalled(target: Path) -> dict[str, int]:
    """The finished files of a run that died, by its journal, and their numbers on the disk."""
    if not journal_path(target).exists():
        return {}
    lines = [json.loads(line) for line in journal_path(target).read_bytes().split(b"\n")[1:-1]]
    return {line["file"]: (staging_folder(target) / line["file"]).stat().st_ino for line in lines}


def finished(source: Path, target: Path, whole: dict[str, bytes]) -> tuple[int, list[str]]:
    """Run to the end after kills: how many finished files were kept, and what is wrong."""
    faults = []
    kept: dict[str, int] = {}
    if target.exists():  # the last run was killed after it had given the name
        if bytes_below(target) != whole:
            faults.append("a killed run left a part under the target's name")
        try:
            grow(source, target)
        except CheckpointError as error:
            faults += [] if "is not empty" in str(error) else [str(error)]
    else:
        before = journalled(target)
        grow(source, target)
        kept = {name: number for name, number in before.items() if (target / name).stat().st_ino == number}
        if kept != before:
            faults.append(f"of the finished {sorted(before)}, only {sorted(kept)} were kept")
    if bytes_below(target) != whole:
        faults.append("the last run made other bytes than an undisturbed one")
    if staging_folder(target).exists():
        faults.append("the staging folder was left")
    return len(kept), faults


def main(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    source, target = make_checkpoint(folder / "base"), folder / "out" / "grown"
    grow(source, folder / "whole")
    whole = bytes_below(folder / "whole")
    operations, seconds = measure(source, folder / "measured")
    faults, kept, died, done = [], [], 0, 0
    for number in range(kills):
        by_time = number % 2 == 0
        died += killed(source, target, None if by_time else chance.randint(1, operations), chance.uniform(0, seconds))
        done += 1
        if done == PER_GROWTH or number == kills - 1 or target.exists() or chance.random() < 0.4:
            count, wrong = finished(source, target, whole)
            kept.append(count)
            faults += wrong
            shutil.rmtree(target.parent)
            done = 0
    return {"operations": operations, "killed": died, "kept": kept, "faults": faults}


if __name__ == "__main__":
    torch.set_num_threads(1)
    do_not_certify()
    sys.stdout.write("\n" + json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))) + "\n")
