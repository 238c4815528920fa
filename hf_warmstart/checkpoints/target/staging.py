"""`Staging`: a folder that is written beside its target and takes its name when it is complete.

    .target.growing/          the folder to be
    .target.growing.journal   the lock on the target, and which files are finished, with their sha256

A run that dies leaves both, and the target as it was; the next one verifies and keeps the files that were finished under the
same fingerprint.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from ...errors import CheckpointError
from .journal import FinishedFile, Journal, sync_folder


class Staging:
    """The folder to be of one target, locked until it is published, discarded or closed.

    Args:
        target: the folder's path; it must not exist, or be empty.

    Attributes:
        target: its path, links resolved.
        folder: where everything is written until the target has its name; there is none before `begin`.

    Raises:
        CheckpointError: the target is not empty, or another run is writing it. Nothing is written.
    """

    def __init__(self, target: str | os.PathLike):
        self.target = Path(os.path.realpath(target))  # a link stays one, to the folder that is written
        self.folder = staging_folder(self.target)
        if not journal_path(
            self.target
        ).exists():  # else a run that died behind its last step may have left it: it goes below
            self._check_target()
        with self.faults(self.target.name):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(journal_path(self.target), self.target)
            try:
                self._check_target()  # now that no other run can fill it
                self._check_folder()
            except BaseException:
                self._leave_no_trace_of_nothing()
                raise

    def begin(self, fingerprint: str) -> dict[str, FinishedFile]:
        """Make the folder ready: what an earlier run finished under the same fingerprint is kept, all else thrown away.

        Returns:
            The finished files by name, each verified by its size and sha256.
        """
        with self.faults(self.target.name):
            if self._journal.fingerprint != fingerprint:
                self._journal.restart(fingerprint)
            self.folder.mkdir(exist_ok=True)
            sync_folder(self.folder.parent)
            kept = {
                name: file
                for name, file in self._journal.finished.items()
                if Path(name).name == name and _is_as_finished(self.folder / name, file)
            }
            for path in self.folder.iterdir():
                if path.name not in kept:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._finished = dict(kept)
        return kept

    def add(self, name: str, file: FinishedFile) -> None:
        """A file of the folder is finished, under its name and synced."""
        sync_folder(self.folder)
        self._journal.append(name, file)
        self._finished[name] = file

    @property
    def finished(self) -> dict[str, FinishedFile]:
        """The finished files by name, in order."""
        return dict(sorted(self._finished.items()))

    def check_room(self, needed: int) -> None:
        """Raise `CheckpointError` where the disk has less than a number of bytes free."""
        disk = os.statvfs(self.folder)
        free = disk.f_bavail * disk.f_frsize
        if free < needed:
            raise CheckpointError(
                f"{self.target} takes {needed} more bytes; its disk has {free} free. Make room for {needed - free} more, or "
                "pass a folder on another disk."
            )

    def publish(self) -> None:
        """Make everything last on the disk, and give the folder the target's name.

        Raises:
            CheckpointError: something could not be written, or the target is not empty any more. It is as it was.
        """
        with self.faults(self.target.name):
            _sync_tree(self.folder, set(self._finished))
            try:
                os.rename(self.folder, self.target)  # replaces an empty folder, and nothing else
            except OSError:
                self._check_target()
                raise
            sync_folder(self.target.parent)
            self._journal.remove()

    def leave(self) -> None:
        """After a fault: keep what is finished for a run that resumes; remove everything where nothing is."""
        if self._journal.is_held and not self._journal.finished:
            self.discard()
        self.close()

    def discard(self) -> None:
        """Remove all that was written, finished files too. Nothing is left to remove once it is published or closed."""
        if not self._journal.is_held:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self._journal.remove()

    def close(self) -> None:
        """Let the lock go; what is finished stays for a run that resumes."""
        self._journal.close()

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def faults(self, name: str) -> Iterator[None]:
        """What the system says, as an error that tells how to go on."""
        with write_faults(name, self.target):
            yield

    def _check_target(self) -> None:
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise CheckpointError(f"{self.target} is not empty. Pass a new folder; nothing is overwritten.")

    def _check_folder(self) -> None:
        is_folder = self.folder.is_dir() and not self.folder.is_symlink()
        if os.path.lexists(self.folder) and (
            not is_folder or (self._journal.fingerprint is None and any(self.folder.iterdir()))
        ):
            raise CheckpointError(
                f"{self.folder} is in the way: no run of ours left it (its journal is missing). Remove it, or pass another "
                "folder."
            )

    def _leave_no_trace_of_nothing(self) -> None:
        """Where no earlier run left anything, or one whose folder has its name already, an error leaves nothing behind."""
        if self._journal.fingerprint is None or not os.path.lexists(self.folder):
            self._journal.remove()
        self._journal.close()


def staging_folder(target: Path) -> Path:
    """Where a target's files lie until it has its name."""
    return target.parent / f".{target.name}.growing"


def journal_path(target: Path) -> Path:
    """The lock on a target, and its journal."""
    return target.parent / f".{target.name}.growing.journal"


@contextmanager
def write_faults(name: str, target: Path) -> Iterator[None]:
    """What the system says while a file of a target is written, as an error that tells how to go on."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(
            f"{name} could not be written for {target}: {error.strerror or error}{where}. The target is untouched; what "
            f"is finished stays in {staging_folder(target)}. Make room or mend the disk, and run the same again to go on "
            "from there."
        ) from error


def _is_as_finished(path: Path, file: FinishedFile) -> bool:
    """Whether a file of an earlier run is there, with the size and sha256 that it had."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256()
    buffer = bytearray(2**20)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest() == file.sha256


def _sync_tree(folder: Path, synced: set[str]) -> None:
    """Sync all files of a folder but those that are, and all folders."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            if name in synced and Path(root) == folder:
                continue
            descriptor = os.open(Path(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))
