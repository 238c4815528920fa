"""Running arms: one process after another's leavings, or several processes side by side, with the same results.

Whoever wants arms done names them all; each process takes those that have no result and that nobody holds, one at a time,
and waits for the rest. What holds an arm is the kernel's lock on a file in its folder, which goes with the process however
that ends. So nothing has to be sent between processes: they may come from one `accelerate launch`, be started by hand on
several devices (`CUDA_VISIBLE_DEVICES`), or share a folder over a network that has locks. All decisions are made from the
results on disk, by every process alike.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .arms import read_result, run_arm
from .study import Study

Task = tuple[str, int, int, bool]  # candidate, repeat, steps, whether it may go on later
LOCK = "lock"
PAUSE = 0.2  # seconds between two looks for what others finish


class Runner:
    """Runs arms of a study, shared with whoever else runs them.

    Args:
        study: what to run. progress: called with the number of steps that were made here.
    """

    def __init__(self, study: Study, progress: Callable[[int], None]):
        self.study, self.progress = study, progress
        self._parent: PreTrainedModel | None = None

    def run(self, tasks: Sequence[Task]) -> list[dict[str, Any]]:
        """The results of some arms, in their order; run here what is neither done nor held elsewhere."""
        while missing := [task for task in tasks if read_result(self.study, *task[:3]) is None]:
            if not sum(self.run_if_free(task) for task in missing):
                time.sleep(PAUSE)
        found = [read_result(self.study, *task[:3]) for task in tasks]
        return [result for result in found if result is not None]

    def run_if_free(self, task: Task) -> bool:
        """Run an arm unless it is held or done; whether it was run here."""
        name, repeat, until, goes_on = task
        with held(self.study.arm_folder(name, repeat) / LOCK) as mine:
            if not mine or read_result(self.study, name, repeat, until) is not None:
                return False
            run_arm(self.study, self.parent, name, repeat, until, goes_on, self.progress)
            return True

    @property
    def parent(self) -> PreTrainedModel:
        """The parent, loaded by the processes that run an arm."""
        if self._parent is None:
            self._parent = self.study.load_parent()
        return self._parent

    def drop(self, names: Sequence[str]) -> None:
        """Remove the checkpoints of arms that will not go on."""
        for name in names:
            for repeat in (self.study.folder / "arms" / name).glob("repeat-*"):
                with held(repeat / LOCK) as mine:
                    if mine:
                        for checkpoint in repeat.glob("checkpoint-*"):
                            shutil.rmtree(checkpoint, ignore_errors=True)


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Context that holds a file's lock, if nobody else does; whether it is held here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        mine = False
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        yield mine
    finally:
        os.close(descriptor)
