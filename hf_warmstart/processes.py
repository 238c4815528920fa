"""What every process that this library starts needs: one thread of arithmetic, and an end when its parent is gone."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import wait

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # torch reads them when it is imported


def end_with_parent() -> None:
    """End this process when the one that started it is gone, however that came; for a thread of its own."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
