"""`Journal`: one file that is both the lock on a target and the list of what is already written for it.

It lies beside the target, so that the folder that takes the target's name holds nothing of ours. The lock is the kernel's
(`flock`): it goes with the process, however that ends. One JSON line each, synced before it counts:

    {"fingerprint": "..."}
    {"file": "model-00001-of-00002.safetensors", "size": 4999999488, "sha256": "..."}
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError


@dataclass(frozen=True)
class FinishedFile:
    """What a file was when it was finished: its size in bytes and its sha256 in hexadecimal digits."""

    size: int
    sha256: str


class Journal:
    """The journal of a target; made where there is none, and locked until it is closed or removed.

    Args:
        path: of the journal.
        target: for messages.

    Attributes:
        fingerprint: of the run that began it; None in a new journal.
        finished: name -> `FinishedFile`, of that run and those that went on from it.

    Raises:
        CheckpointError: another run holds it, or the file system has no locks.
    """

    def __init__(self, path: Path, target: Path):
        self.path = path
        while True:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(self._descriptor)
                raise CheckpointError(
                    f"Another run is writing {target} (it holds {path.name}). Wait for it, or pass another folder."
                ) from error
            except OSError as error:
                os.close(self._descriptor)
                raise CheckpointError(
                    f"{path} cannot be locked: {error.strerror}. Pass a folder on a file system with locks (flock)."
                ) from error
            # The run that held the lock may have removed the file since it was opened here: then it locks nothing.
            if _is_at(self._descriptor, path):
                break
            os.close(self._descriptor)
        self._read()

    def _read(self) -> None:
        """Take what is valid, and cut off what a dying run left of a line."""
        whole = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        self.fingerprint: str | None = None
        self.finished: dict[str, FinishedFile] = {}
        valid = 0
        for line in whole.split(b"\n")[:-1]:
            try:
                entry = json.loads(line)
                if self.fingerprint is None:
                    self.fingerprint = str(entry["fingerprint"])
                else:
                    self.finished[entry["file"]] = FinishedFile(entry["size"], entry["sha256"])
            except (ValueError, KeyError, TypeError):
                break
            valid += len(line) + 1
        os.ftruncate(self._descriptor, valid)

    def restart(self, fingerprint: str) -> None:
        """Forget the run before, and begin that of a fingerprint."""
        os.ftruncate(self._descriptor, 0)
        self._write({"fingerprint": fingerprint})
        sync_folder(self.path.parent)
        self.fingerprint, self.finished = fingerprint, {}

    def append(self, name: str, file: FinishedFile) -> None:
        """Add a finished file, itself already synced."""
        self._write({"file": name, "size": file.size, "sha256": file.sha256})
        self.finished[name] = file

    def _write(self, entry: dict[str, str | int]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        end = os.fstat(self._descriptor).st_size
        if os.pwrite(self._descriptor, line, end) != len(line):
            raise OSError(f"{self.path.name} could not be written whole.")
        os.fsync(self._descriptor)

    def remove(self) -> None:
        """Unlink the file and let the lock go."""
        if self.is_held and _is_at(self._descriptor, self.path):
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Let the lock go and keep the file."""
        if self.is_held:
            os.close(self._descriptor)
        self._descriptor = -1

    @property
    def is_held(self) -> bool:
        """Whether the lock is held."""
        return self._descriptor >= 0


def sync_folder(folder: Path) -> None:
    """Make a folder's names last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
