"""Checkpoints that exist whole or not at all, for a process that may be killed at any point.

`Trainer` writes a checkpoint file by file into the folder that readers look for, and deletes old ones file by file, so
that a kill leaves a folder that `get_last_checkpoint` takes for the last checkpoint. Here a checkpoint is written below
`_saving` beside its place and renamed into it, and an old one is renamed out of its place before its files go. The name
begins with an underscore, and so is never pushed to the Hub; what lies below it is of no use to anybody.

A rename is one step for every other process, not for the power supply: nothing is forced to the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

STAGING = "_saving"


def clear_staging(run_dir: str | os.PathLike) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    shutil.rmtree(Path(run_dir, STAGING), ignore_errors=True)


def publish(run_dir: str | os.PathLike, name: str) -> None:
    """Move a complete checkpoint from the staging folder to its place, in the stead of one that is there.

    Where nothing is staged nothing is touched: on a disk that several nodes see, one of them moves it.
    """
    staged, place = Path(run_dir, STAGING, name), Path(run_dir, name)
    claimed, replaced = staged.with_name(f"{name}.claimed"), staged.with_name(f"{name}.replaced")
    try:
        staged.rename(claimed)  # of several nodes one succeeds
    except FileNotFoundError:
        with contextlib.suppress(OSError):  # there is none, or the node that moves it still works there
            staged.parent.rmdir()
        return
    with contextlib.suppress(FileNotFoundError):
        place.rename(replaced)
    try:
        claimed.rename(place)
    except OSError:
        with contextlib.suppress(OSError):
            replaced.rename(place)
        raise
    clear_staging(run_dir)


def discard(checkpoint: str | os.PathLike) -> None:
    """Delete a checkpoint: first its name, then its files."""
    checkpoint = Path(checkpoint)
    doomed = checkpoint.parent / STAGING / checkpoint.name
    doomed.parent.mkdir(exist_ok=True)
    checkpoint.rename(doomed)
    clear_staging(checkpoint.parent)


def rotate(run_dir: str, limit: int | None, best: str | None) -> None:
    """Keep at most `limit` checkpoints, the newest and the best among them: `Trainer`'s rule, with `discard`."""
    if limit is None or limit <= 0:
        return
    checkpoints = sort_checkpoints(run_dir, use_mtime=True)
    if len(checkpoints) <= limit:
        return
    kept = {checkpoints[-1]} | ({str(Path(best))} if best is not None else set())
    others = [checkpoint for checkpoint in checkpoints if checkpoint not in kept]
    for checkpoint in others[: len(checkpoints) - max(limit, len(kept))]:
        discard(checkpoint)


def last_whole_checkpoint(run_dir: str | os.PathLike) -> str | None:
    """The last checkpoint of a run that is complete; a warning names later ones that are not.

    Such are left by a stock `Trainer` that was killed while it saved: `trainer_state.json` is the last file it writes.
    """
    checkpoints = sorted(
        (int(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")), path)
        for path in Path(run_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdecimal()
    )
    for _, path in reversed(checkpoints):
        if _is_whole(path):
            return os.path.join(run_dir, path.name)
        warnings.warn(
            f"{path.name} has no readable {TRAINER_STATE_NAME}: it was not written to its end, and is skipped.",
            stacklevel=3,
        )
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
