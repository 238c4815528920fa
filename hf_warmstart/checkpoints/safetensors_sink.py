"""`SafetensorsSink`: a folder of safetensors written piece by piece, that appears under its name when it is complete.

    .target.growing/          the folder to be: finished shards, and unfinished ones as *.part
    .target.growing.journal   the lock on the target, and which shards are finished, with their sha256

All headers are known from dtypes and shapes, so each file is written once, from beginning to end. A run that dies leaves
both beside the target; the next one with the same fingerprint verifies and keeps the finished shards.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from ..errors import CheckpointError
from .journal import FinishedFile, Journal, sync_folder
from .safetensors_format import FileTensor
from .safetensors_layout import INDEX_NAME, FileLayout, TensorSpec, folder_layout
from .write_behind import WriteBehind, WrittenFile, copy_into

PART = ".part"


class Shard:
    """One file of the folder, to be written in the order of `layout`.

    Attributes:
        name: of the file.
        layout: tensor -> `FileTensor`, in the order in which their bytes are written.
        done: whether it was kept from an earlier run, or has been written.
    """

    def __init__(self, sink: SafetensorsSink, file: FileLayout):
        self.name = file.name
        self.layout: Mapping[str, FileTensor] = file.tensors
        self.done = False
        self._sink = sink
        self._file = file
        self._sent = 0

    @contextmanager
    def open(self) -> Iterator[Shard]:
        """Write the shard within the context: all its bytes, or an error. Finished in the background afterwards."""
        if self.done:
            raise CheckpointError(f"{self.name} is done. Open the shards that are not.")
        if self._sink._current is not None:
            raise CheckpointError(
                f"{self.name} cannot be opened while {self._sink._current.name} is. Write one by one."
            )
        with self._sink._write_faults(self.name):
            path = self._sink.folder / (self.name + PART)
            path.unlink(missing_ok=True)
            self._written, self._filled, self._sent = WrittenFile(path), 0, 0
        self._sink._current = self
        try:
            self.write(self._file.header)
            yield self
            if self._sent != self._file.nbytes:
                raise CheckpointError(f"{self.name} has {self._file.nbytes} bytes; {self._sent} were written to it.")
            self._send()
        except BaseException:
            self._sink._abandoned.append(self._written)
            raise
        finally:
            self._sink._current = None
        self._sink._finish(self._written, self)
        self.done = True

    def write(self, data: torch.Tensor | bytes | bytearray | memoryview) -> None:
        """Write the next bytes. They are copied: the memory is the caller's again on return.

        Args:
            data: a contiguous tensor of any dtype on the CPU, or bytes; of any size, across tensors if need be.

        Raises:
            CheckpointError: more than the file holds; or the disk is full or failed, at this or an earlier write.
        """
        flat = _as_bytes(data)
        self._sent += len(flat)
        if self._sent > self._file.nbytes:
            raise CheckpointError(f"{self.name} has {self._file.nbytes} bytes; {self._sent} were written to it.")
        with self._sink._write_faults(self.name):
            while len(flat):
                buffer = self._sink._behind.buffer()
                count = copy_into(buffer, self._filled, flat)
                self._filled += count
                flat = flat[count:]
                if self._filled == len(buffer):
                    self._send()

    def _send(self) -> None:
        if self._filled:
            self._sink._behind.send(self._written, self._filled)
        self._filled = 0


class SafetensorsSink:
    """A folder to be. Write every shard that is not `done`, add other files under `folder`, and `publish`.

    Args:
        target: the folder's path; it must not exist, or be empty.
        tensors: name -> (dtype, shape), in the order of the state dict; `layout` follows from it as `save_pretrained`'s.
        max_shard_size (`str` or `int`, defaults to `"5GB"`): bytes of tensors in one file.
        fingerprint: what the bytes depend on (source, plan, version), as one text: only shards written under the same one
            are kept.
        total_parameters, storages: as for `folder_layout`.
        other_nbytes (`int`, defaults to 0): bytes of other files that will be added, for the check of the disk's room.
        buffer_nbytes (`int`, defaults to 64 MiB): memory for bytes on their way to the disk.

    Attributes:
        shards: all of them, in order.
        folder: where other files go until the target has its name.

    Raises:
        CheckpointError: the target is not empty, another run is writing it, or the disk has no room. Nothing is written.

    Example:

        >>> with SafetensorsSink("runs/grown", tensors, fingerprint="...") as sink:              # doctest: +SKIP
        ...     for shard in sink.shards:
        ...         if not shard.done:
        ...             with shard.open():
        ...                 for name in shard.layout:
        ...                     shard.write(make(name))
        ...     config.save_pretrained(sink.folder)
        ...     sink.publish()
    """

    def __init__(
        self,
        target: str | os.PathLike,
        tensors: Mapping[str, TensorSpec],
        *,
        max_shard_size: str | int = "5GB",
        fingerprint: str,
        total_parameters: int | None = None,
        storages: Mapping[str, tuple[Hashable, int]] | None = None,
        other_nbytes: int = 0,
        buffer_nbytes: int = 64 * 2**20,
    ):
        self.target = Path(os.path.realpath(target))  # a link stays one, to the folder that is written
        self.layout = folder_layout(tensors, max_shard_size, total_parameters=total_parameters, storages=storages)
        self.folder = self.target.parent / f".{self.target.name}.growing"
        self.shards = [Shard(self, file) for file in self.layout.files]
        digest = hashlib.sha256(fingerprint.encode())
        for part in (*(f.name.encode() + f.header for f in self.layout.files), self.layout.index or b""):
            digest.update(len(part).to_bytes(8, "little") + part)
        self._abandoned: list[WrittenFile] = []
        self._current: Shard | None = None
        depth = 4
        self._behind = WriteBehind(depth, max(buffer_nbytes // depth // 4096, 1) * 4096)
        with self._write_faults(self.target.name):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self.folder.with_name(self.folder.name + ".journal"), self.target)
            try:
                self._check_target()
                self._prepare(digest.hexdigest())
                self._check_room(other_nbytes)
            except BaseException:
                self._leave_no_trace_of_nothing()
                self._journal.close()
                raise

    # -- the end ------------------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Write the index, make everything last on the disk, and give the folder the target's name.

        Raises:
            CheckpointError: shards are missing, something could not be written, or the target is not empty any more. The
                target is as it was.
        """
        missing = [shard.name for shard in self.shards if not shard.done]
        if missing:
            raise CheckpointError(
                f"{self.target} is not complete: {len(missing)} shards were not written: {missing[:5]}."
            )
        with self._write_faults(self.target.name):
            self._behind.check(wait=True)
            if self.layout.index is not None:
                (self.folder / INDEX_NAME).write_bytes(self.layout.index)
            for file in self.layout.files:
                size = (self.folder / file.name).stat().st_size
                if size != file.nbytes:
                    raise CheckpointError(f"{self.folder / file.name} has {size} bytes instead of {file.nbytes}.")
            _sync_tree(self.folder, {file.name for file in self.layout.files})
            try:
                os.rename(self.folder, self.target)  # replaces an empty folder, and nothing else
            except OSError:
                self._check_target()
                raise
            sync_folder(self.target.parent)
            self._journal.remove()
        self.close()

    def discard(self) -> None:
        """Remove all that was written, finished shards too. Nothing is left to remove once it is published or closed."""
        self._end_threads()
        if not self._journal.is_held:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self._journal.remove()

    def close(self) -> None:
        """End the threads and let the lock go; what is finished stays for a run that resumes."""
        self._end_threads()
        self._journal.close()

    def __enter__(self) -> SafetensorsSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end_threads(self) -> None:
        self._behind.close()
        for written in self._abandoned:
            written.close()

    # -- writing ------------------------------------------------------------------------------------------------------

    def _finish(self, written: WrittenFile, shard: Shard) -> None:
        def journalise(written: WrittenFile) -> None:
            written.path.rename(self.folder / shard.name)
            sync_folder(self.folder)
            self._journal.append(shard.name, FinishedFile(written.nbytes, written.sha256.hexdigest()))

        self._behind.finish(written, journalise)

    @contextmanager
    def _write_faults(self, name: str) -> Iterator[None]:
        """What the system says, as an error that tells how to go on."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{name} could not be written for {self.target}: {error.strerror or error}. The target is untouched; what "
                f"is finished stays in {self.folder}. Make room or mend the disk, and run the same again to go on from there."
            ) from error

    # -- the beginning ------------------------------------------------------------------------------------------------

    def _check_target(self) -> None:
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise CheckpointError(f"{self.target} is not empty. Pass a new folder; nothing is overwritten.")

    def _prepare(self, fingerprint: str) -> None:
        """Keep what an earlier run finished, and throw away all else."""
        exists = os.path.lexists(self.folder)
        is_folder = self.folder.is_dir() and not self.folder.is_symlink()
        if exists and (not is_folder or (self._journal.fingerprint is None and any(self.folder.iterdir()))):
            raise CheckpointError(
                f"{self.folder} is in the way: no run of ours left it (its journal is missing). Remove it, or pass another "
                "folder."
            )
        if self._journal.fingerprint != fingerprint:
            self._journal.restart(fingerprint)
        self.folder.mkdir(exist_ok=True)
        sync_folder(self.folder.parent)
        for shard in self.shards:
            file = self._journal.finished.get(shard.name)
            shard.done = file is not None and _is_as_finished(self.folder / shard.name, file)
        kept = {shard.name for shard in self.shards if shard.done}
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _check_room(self, other_nbytes: int) -> None:
        kept = sum(file.nbytes for file, shard in zip(self.layout.files, self.shards, strict=True) if shard.done)
        needed = self.layout.nbytes - kept + other_nbytes
        disk = os.statvfs(self.folder)
        free = disk.f_bavail * disk.f_frsize
        if free < needed:
            raise CheckpointError(
                f"{self.target} takes {needed} more bytes; its disk has {free} free. Make room for {needed - free} more, or "
                "pass a folder on another disk."
            )

    def _leave_no_trace_of_nothing(self) -> None:
        """Where nothing was written yet, an error leaves nothing behind."""
        if self._journal.fingerprint is not None:
            try:
                self.folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                return
        self._journal.remove()


def _as_bytes(data: torch.Tensor | bytes | bytearray | memoryview) -> np.ndarray:
    """Data as a flat array of bytes, without a copy."""
    if not isinstance(data, torch.Tensor):
        return np.frombuffer(data, np.uint8)
    if data.device.type != "cpu" or not data.is_contiguous():
        raise CheckpointError(
            f"A tensor on {data.device} with strides {data.stride()} cannot be written. Pass .cpu().contiguous()."
        )
    return data.detach().reshape(-1).view(torch.uint8).numpy()


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
