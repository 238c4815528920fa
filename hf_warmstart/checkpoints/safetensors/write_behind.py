"""`WriteBehind`: bytes go to disk, and through sha256, out of the memory that they were made in, while the next are made.

    block of memory: filled by its maker -> thread: pwrite  -> used again
                                         -> thread: sha256 ->
                                            thread: fsync of finished files and what follows it

Few blocks are under way at once, so memory is bounded, and a fault in a thread reaches the caller at one of the next blocks.

Where the system allows, files are written past the page cache (O_DIRECT): a checkpoint is not read back soon, and the copy into
the cache costs more processor time than the rest of writing. That wants whole pages, in memory and on disk: a block's bytes
begin as far behind a page of memory as they do behind one of the file, and what the block before left over of that page is
put in front of them. So nothing is copied but that. Blocks are used again because fresh memory is a page fault for each 4 KiB.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

PAGE = 4096  # what O_DIRECT aligns to, in memory and on disk
SYNC_BYTES = 64 * 2**20  # written between two early syncs, where the page cache is in use


class Block:
    """Memory for bytes that go to one place of a file.

    Args:
        memory: pages, one more than the bytes fill.

    Attributes:
        place: where in the file. nbytes: how many there are.
    """

    def __init__(self, memory: mmap.mmap):
        self.memory = memory
        self.place = self.nbytes = 0

    @property
    def lead(self) -> int:
        """How far behind a page they begin."""
        return self.place % PAGE

    @property
    def data(self) -> memoryview:
        """The bytes."""
        return memoryview(self.memory)[self.lead : self.lead + self.nbytes]

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The same memory as a tensor."""
        flat = torch.frombuffer(self.memory, dtype=torch.uint8, count=self.nbytes, offset=self.lead)
        return flat.view(dtype).view(shape)


class WriteBehind:
    """Blocks of up to `piece` bytes, at most `depth` of them on their way to the disk, and three threads, until `close`."""

    def __init__(self, depth: int = 8, piece: int = 8 * 2**20):
        self.piece = piece
        self._depth = depth
        self._free: deque[Block] = deque()
        self._sent: deque[tuple[Block, list[Future]]] = deque()
        self._writer = ThreadPoolExecutor(1, "checkpoint-writer")
        self._hasher = ThreadPoolExecutor(1, "checkpoint-hasher")
        self._finisher = ThreadPoolExecutor(1, "checkpoint-finisher")
        self._finishing: list[Future] = []

    def block(self, place: int, nbytes: int) -> Block:
        """Memory for bytes of a place in a file, at most `piece`. Any thread may ask."""
        try:
            block = self._free.pop()
        except IndexError:
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            block = Block(mmap.mmap(-1, -(-self.piece // PAGE) * PAGE + PAGE, flags=private))
        block.place, block.nbytes = place, nbytes
        return block

    def send(self, file: WrittenFile, block: Block) -> None:
        """Write a block's bytes, which follow those sent before. The memory is used again: it is no longer the caller's.

        What failed in a thread is raised here; waits until few enough are under way.
        """
        self.check()
        while self._sent and (len(self._sent) >= self._depth or all(future.done() for future in self._sent[0][1])):
            written, futures = self._sent.popleft()
            for future in futures:
                future.result()
            self._free.append(written)
        file.pending = [self._writer.submit(file.write, block), self._hasher.submit(file.sha256.update, block.data)]
        self._sent.append((block, file.pending))
        if not file.is_direct and file.nbytes - file.synced >= SYNC_BYTES:
            file.synced = file.nbytes
            self._finishing.append(self._finisher.submit(os.fdatasync, file.descriptor))

    def finish(self, file: WrittenFile, then: Callable[[WrittenFile], None]) -> None:
        """Sync and close a file once all of it is written, and go on with it, all in a thread."""

        def finish() -> None:
            file.wait()
            file.write_rest()
            os.fsync(file.descriptor)
            file.close()
            then(file)

        self._finishing.append(self._finisher.submit(finish))

    def check(self, wait: bool = False) -> None:
        """Raise what failed in a thread so far; with `wait`, in all that is under way."""
        for future in (*self._finishing, *(future for _, sent in self._sent for future in sent)):
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
        nbytes: written so far, but for `rest`.
        rest: of the last page that was begun, where only whole pages can be written.
        is_direct: whether it is written past the page cache.
        pending: what the threads do with the last piece; all pieces before are done when that is.
    """

    def __init__(self, path: Path):
        self.path = path
        self.sha256 = hashlib.sha256()
        self.nbytes = self.synced = 0
        self.rest = b""
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

    def write(self, block: Block) -> None:
        """Write at the end."""
        view, end = memoryview(block.memory), block.lead + block.nbytes
        begin = block.lead - len(self.rest)
        view[begin : block.lead] = self.rest
        self.rest = b""
        whole = end - end % PAGE if self.is_direct else end
        self._put(view[begin:whole])
        if self.is_direct:
            self.rest = bytes(view[whole:end])
        else:
            self._put(view[whole:end])

    def write_rest(self) -> None:
        """Write what is no whole page, at the end of the file."""
        if self.rest:
            self._go_through_the_cache()
            self._put(memoryview(self.rest))
            self.rest = b""

    def _put(self, view: memoryview) -> None:
        while len(view):
            try:
                count = os.pwrite(self.descriptor, view, self.nbytes)
            except OSError as error:
                if not self.is_direct or error.errno != errno.EINVAL:
                    raise
                self._go_through_the_cache()  # larger pages than ours, or not at one after a short write
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
