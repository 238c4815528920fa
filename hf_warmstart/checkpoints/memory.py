"""How much memory a growth from files to files takes, and how large its pieces are for a promise to hold.

Beside what the process has already, anonymous memory holds: the sink's buffers, blocks of grown rows that wait or are being
made, the parent's rows that they are made of, and the numbers that are worked on in float32. Files are read, not mapped.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import WarmstartError
from ..growth.matrix import CHUNK
from ..growth.transform import AVERAGED

MIB = 2**20
BLOCK, SMALLEST_BLOCK = 8 * MIB, MIB // 4
BUFFERS, SMALLEST_BUFFERS = 64 * MIB, 4 * MIB
WORK = 4 * 4 * CHUNK  # of a thread: carried, noise, what is drawn, in float32
STATE_BLOCKS = 6  # a moment's block, what it is made of, and both in float32
STATE_WORK = 4 * 8 * AVERAGED  # entries of a moment that are averaged at once, in float64, and what they are made of
LIBRARIES = 32 * MIB  # what torch, a certificate and the allocator take on the way, and do not give back
STATE_LIBRARIES = 32 * MIB  # the same of an optimizer's state beside the weights
AHEAD = 2  # blocks begun per thread
MOST_THREADS = 8  # unless more are asked for: a disk is not faster than that
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Pieces:
    """Sizes of what is held at once.

    Args:
        threads: that make blocks. block: bytes of a block of grown rows. buffers: of the sink. state_block: of a moment.
        floor: of one block at least, where a row is larger or a tensor cannot be made by rows.
        with_state: whether an optimizer's state is grown too.
    """

    threads: int
    block: int = BLOCK
    buffers: int = BUFFERS
    state_block: int = BLOCK
    floor: int = 0
    with_state: bool = False

    @property
    def peak(self) -> int:
        """The most anonymous memory beside what the process has, in bytes."""
        block = max(self.block, self.floor)
        weights = self.buffers + (1 + AHEAD * self.threads) * block + self.threads * (block + WORK)
        if not self.with_state:
            return LIBRARIES + weights
        return LIBRARIES + STATE_LIBRARIES + max(weights, STATE_WORK + STATE_BLOCKS * self.state_block)


def pieces(max_memory: str | int | None, threads: int | None, floor: int = 0, with_state: bool = False) -> Pieces:
    """Pieces that keep a promise.

    Args:
        max_memory: the most anonymous memory that the process may take, all it has included; None for pieces that are as
            fast as larger ones.
        threads: None for one for each processor but one, which hashes and writes; at most `MOST_THREADS`.
        floor: bytes of the largest block that cannot be made smaller. with_state: whether an optimizer's state is grown too.

    Raises:
        WarmstartError: the promise cannot be kept, or the numbers are none.
    """
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise WarmstartError(f"threads={threads!r} compute nothing. Pass a whole number, 1 or more.")
    threads = threads or min(max(1, processors() - 1), MOST_THREADS)
    made = Pieces(threads, floor=floor, with_state=with_state)
    if max_memory is None:
        return made
    has = anonymous_memory()
    budget = bytes_of(max_memory, "max_memory") - has
    while made.peak > budget:
        smaller = Pieces(
            made.threads,
            max(made.block // 2, SMALLEST_BLOCK),
            max(made.buffers // 2, SMALLEST_BUFFERS),
            max(made.state_block // 2, SMALLEST_BLOCK),
            floor,
            with_state,
        )
        if smaller == made and made.threads > 1:
            smaller = replace(made, threads=made.threads - 1)
        if smaller == made:
            raise WarmstartError(
                f"max_memory={max_memory!r} cannot be kept: the process has {has / 1e6:.0f} MB by now and needs "
                f"{made.peak / 1e6:.0f} MB beside. Pass at least {(has + made.peak) / 1e6:.0f}MB."
            )
        made = smaller
    return made


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def anonymous_memory() -> int:
    """Bytes of this process that no file holds, where the system tells (Linux); else the most that was resident."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back() -> None:
    """Give the system what was freed and the allocator keeps, where it is glibc's: weights leave it 40 to 60 MB in pieces
    that nothing uses, which would lie beside all that an optimizer's state takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def bytes_of(size: str | int, name: str) -> int:
    """Bytes of a size such as `"2GB"` (10^9 each), `"500 MiB"` (2^20 each) or a number.

    Raises:
        WarmstartError: it is no size.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    if isinstance(size, str) and (found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", size.upper())):
        number, unit = found.groups()
        if unit in UNITS and (made := int(float(number) * UNITS[unit])) > 0:
            return made
    raise WarmstartError(f"{name}={size!r} is no size. Pass bytes, or a size such as '2GB' or '500MB'.")
