"""`WriteBehind`: bytes go to disk, and through sha256, while the next ones are computed.

    caller: copy -> ring of buffers -> thread: pwrite
                                    -> thread: sha256
                                    -> thread: fsync of finished files and what follows it

A buffer is used again when both threads are done with it: memory is bounded, and a fault in a thread reaches the caller
when its turn in the ring comes, at the latest. Where the system allows, files are written past the page cache (O_DIRECT):
a checkpoint is not read back soon, and the copy into the cache costs more processor time than all else here.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

BLOCK = 4096  # what O_DIRECT aligns to, in memory and on disk
SYNC_BYTES = 64 * 2**20  # written between two early syncs, where the page cache is in use


class WriteBehind:
    """A ring of `depth` buffers of `piece` bytes (a multiple of 4096), and three threads, until `close`."""

    def __init__(self, depth: int = 4, piece: int = 16 * 2**20):
        # Anonymous maps begin at a page.
        self._buffers = [mmap.mmap(-1, piece) for _ in range(depth)]
        self._busy: list[list[Future]] = [[] for _ in self._buffers]
        self._turn = 0
        self._writer = ThreadPoolExecutor(1, "checkpoint-writer")
        self._hasher = ThreadPoolExecutor(1, "checkpoint-hasher")
        self._finisher = ThreadPoolExecutor(1, "checkpoint-finisher")
        self._finishing: list[Future] = []

    def buffer(self) -> mmap.mmap:
        """The next free buffer; waits for it. What failed in a thread is raised here."""
        self.check()
        for future in self._busy[self._turn]:
            future.result()
        self._busy[self._turn] = []
        return self._buffers[self._turn]

    def send(self, file: WrittenFile, nbytes: int) -> None:
        """Write the first bytes of the buffer given last to the end of a file."""
        view = memoryview(self._buffers[self._turn])[:nbytes]
        self._busy[self._turn] = [self._writer.submit(file.write, view), self._hasher.submit(file.sha256.update, view)]
        file.pending = self._busy[self._turn]
        self._turn = (self._turn + 1) % len(self._buffers)
        if not file.is_direct and file.nbytes - file.synced >= SYNC_BYTES:
            file.synced = file.nbytes
            self._finishing.append(self._finisher.submit(os.fdatasync, file.descriptor))

    def finish(self, file: WrittenFile, then: Callable[[WrittenFile], None]) -> None:
        """Sync and close a file once all of it is written, and go on with it, all in a thread."""

        def finish() -> None:
            file.wait()
            os.fsync(file.descriptor)
            file.close()
            then(file)

        self._finishing.append(self._finisher.submit(finish))

    def check(self, wait: bool = False) -> None:
        """Raise what failed in a thread so far; with `wait`, in all that is under way."""
        for future in (*self._finishing, *(future for busy in self._busy for future in busy)):
            if wait or future.done():
                future.result()
        self._finishing = [future for future in self._finishing if not future.done()]

    def close(self) -> None:
        """End the threads when they are done with what they have."""
        for executor in (self._writer, self._hasher, self._finisher):
            executor.shutdown(wait=True)


class WrittenFile:
    """A new file that is written from beginning to end.

    Attributes:
        sha256: of what was sent to it.
        nbytes: written so far.
        is_direct: whether it is written past the page cache.
        pending: what the threads do with the last piece; all pieces before are done when that is.
    """

    def __init__(self, path: Path):
        self.path = path
        self.sha256 = hashlib.sha256()
        self.nbytes = self.synced = 0
        self.pending: list[Future] = []
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        direct = getattr(os, "O_DIRECT", 0)
        self.is_direct = bool(direct)
        try:
            self.descriptor = os.open(path, flags | direct, 0o666)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)
            self.is_direct = False
            self.descriptor = os.open(path, flags, 0o666)

    def write(self, view: memoryview) -> None:
        """Write at the end."""
        while len(view):
            if self.is_direct and len(view) < BLOCK:
                self._go_through_the_cache()
            take = len(view) - len(view) % BLOCK if self.is_direct else len(view)
            try:
                count = os.pwrite(self.descriptor, view[:take], self.nbytes)
            except OSError as error:
                if not self.is_direct or error.errno != errno.EINVAL:
                    raise
                self._go_through_the_cache()  # larger blocks than ours, or not at one after a short write
                continue
            self.nbytes += count
            view = view[count:]

    def _go_through_the_cache(self) -> None:
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, fcntl.fcntl(self.descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
        self.is_direct = False

    def wait(self) -> None:
        """Wait until all that was sent is written and hashed."""
        for future in self.pending:
            future.result()

    def close(self) -> None:
        """Close it, whatever was written."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def copy_into(buffer: mmap.mmap, at: int, data: np.ndarray) -> int:
    """Copy as many bytes of a flat uint8 array as fit behind `at`; returns how many."""
    count = min(len(buffer) - at, len(data))
    np.copyto(np.frombuffer(buffer, np.uint8, count, at), data[:count])
    return count
