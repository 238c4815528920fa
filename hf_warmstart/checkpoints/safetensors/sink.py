"""`SafetensorsSink`: the safetensors of a folder, written piece by piece, from beginning to end.

All headers are known from dtypes and shapes, so no file is held or written twice. Finished shards are noted in the staging's
journal; a run that resumes writes the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

import numpy as np
import torch

from ...errors import CheckpointError
from ..target.journal import FinishedFile
from ..target.staging import Staging
from .format import FileTensor
from .layout import INDEX_NAME, FileLayout, TensorSpec, folder_layout
from .write_behind import Block, WriteBehind, WrittenFile

PART = ".part"
WORTHWHILE = 2**18  # bytes below which a block of their own costs more than a copy


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
        self._filling: Block | None = None

    @contextmanager
    def open(self) -> Iterator[Shard]:
        """Write the shard within the context: all its bytes, or an error. Finished in the background afterwards."""
        if self.done:
            raise CheckpointError(f"{self.name} is done. Open the shards that are not.")
        if self._sink._current is not None:
            raise CheckpointError(
                f"{self.name} cannot be opened while {self._sink._current.name} is. Write one by one."
            )
        with self._sink.staging.faults(self.name):
            path = self._sink.staging.folder / (self.name + PART)
            path.unlink(missing_ok=True)
            self._written, self._sent, self._filling = WrittenFile(path), 0, None
        self._sink._current = self
        try:
            self.write(self._file.header)
            yield self
            if self._sent != self._file.nbytes:
                raise CheckpointError(f"{self.name} has {self._file.nbytes} bytes; {self._sent} were written to it.")
            with self._sink.staging.faults(self.name):
                self._send_filling()
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
        flat, behind = _as_bytes(data), self._sink._behind
        self._check_room(len(flat))
        with self._sink.staging.faults(self.name):
            behind.check()
            while len(flat):
                block = self._filling = self._filling or behind.block(self._sent, 0)
                count = min(behind.piece - block.nbytes, len(flat))
                block.nbytes += count
                np.copyto(np.frombuffer(block.data, np.uint8)[-count:], flat[:count])
                self._sent += count
                flat = flat[count:]
                if block.nbytes == behind.piece:
                    self._send_filling()

    def block(self, name: str, start: int, nbytes: int) -> Block | None:
        """Memory for some of a tensor's bytes, to be filled and passed to `send`; None where `write` is as good.

        Any thread may ask, at any time.

        Args:
            name: of the tensor. start: of its first byte that is meant. nbytes: how many.
        """
        if not WORTHWHILE <= nbytes <= self._sink._behind.piece:
            return None
        place = self.layout[name]
        block = self._sink._behind.block(place.offset + start, nbytes)
        return block if block.lead % place.dtype.itemsize == 0 else None

    def send(self, block: Block) -> None:
        """Write the next bytes, which are in a block of `block`'s. No copy is made: the memory is no longer the caller's.

        Raises:
            CheckpointError: they are not the next ones; or as for `write`.
        """
        if block.place != self._sent:
            raise CheckpointError(f"{self.name}: byte {self._sent} is the next to be written, not {block.place}.")
        self._check_room(block.nbytes)
        with self._sink.staging.faults(self.name):
            self._send_filling()
            self._sink._behind.send(self._written, block)
        self._sent += block.nbytes

    def _send_filling(self) -> None:
        if self._filling is not None:
            self._sink._behind.send(self._written, self._filling)
        self._filling = None

    def _check_room(self, nbytes: int) -> None:
        if self._sent + nbytes > self._file.nbytes:
            raise CheckpointError(
                f"{self.name} has {self._file.nbytes} bytes; {self._sent + nbytes} were written to it."
            )


class SafetensorsSink:
    """The weights of a folder to be: write every shard that is not `done`, then `finish`.

    Args:
        staging: of the folder; other files go there too, and its caller publishes it.
        tensors: name -> (dtype, shape), in the order of the state dict; `layout` follows from it as `save_pretrained`'s.
        max_shard_size (`str` or `int`, defaults to `"5GB"`): bytes of tensors in one file.
        fingerprint: what the bytes depend on (source, plan, version), as one text: only shards written under the same one
            are kept.
        total_parameters, storages: as for `folder_layout`.
        other_nbytes (`int`, defaults to 0): bytes of other files that will be added, for the check of the disk's room.
        buffer_nbytes (`int`, defaults to 64 MiB): memory for bytes on their way to the disk.
        block_nbytes (`int`, defaults to 8 MiB): the most that one block holds.

    Attributes:
        shards: all of them, in order.

    Raises:
        CheckpointError: the disk has no room, or cannot be written.

    Example:

        >>> with Staging("runs/grown") as staging:                                               # doctest: +SKIP
        ...     with SafetensorsSink(staging, tensors, fingerprint="...") as sink:
        ...         for shard in sink.shards:
        ...             if not shard.done:
        ...                 with shard.open():
        ...                     for name in shard.layout:
        ...                         shard.write(make(name))
        ...         sink.finish()
        ...     config.save_pretrained(staging.folder)
        ...     staging.publish()
    """

    def __init__(
        self,
        staging: Staging,
        tensors: Mapping[str, TensorSpec],
        *,
        max_shard_size: str | int = "5GB",
        fingerprint: str,
        total_parameters: int | None = None,
        storages: Mapping[str, tuple[Hashable, int]] | None = None,
        other_nbytes: int = 0,
        buffer_nbytes: int = 64 * 2**20,
        block_nbytes: int = 8 * 2**20,
    ):
        self.staging = staging
        self.layout = folder_layout(tensors, max_shard_size, total_parameters=total_parameters, storages=storages)
        self.shards = [Shard(self, file) for file in self.layout.files]
        digest = hashlib.sha256(fingerprint.encode())
        for part in (*(f.name.encode() + f.header for f in self.layout.files), self.layout.index or b""):
            digest.update(len(part).to_bytes(8, "little") + part)
        finished = staging.begin(digest.hexdigest())
        missing = 0
        for file, shard in zip(self.layout.files, self.shards, strict=True):
            shard.done = file.name in finished and finished[file.name].size == file.nbytes
            missing += 0 if shard.done else file.nbytes
        staging.check_room(missing + len(self.layout.index or b"") + other_nbytes)
        self._abandoned: list[WrittenFile] = []
        self._current: Shard | None = None
        piece = max(min(block_nbytes, buffer_nbytes // 2), 1)
        self._behind = WriteBehind(buffer_nbytes // piece, piece)

    def finish(self) -> None:
        """Wait until all shards are on the disk, and write the index.

        Raises:
            CheckpointError: shards are missing, or something could not be written.
        """
        missing = [shard.name for shard in self.shards if not shard.done]
        if missing:
            raise CheckpointError(
                f"{self.staging.target} is not complete: {len(missing)} shards were not written: {missing[:5]}."
            )
        with self.staging.faults(self.staging.target.name):
            self._behind.check(wait=True)
            if self.layout.index is not None:
                (self.staging.folder / INDEX_NAME).write_bytes(self.layout.index)
            for file in self.layout.files:
                size = (self.staging.folder / file.name).stat().st_size
                if size != file.nbytes:
                    raise CheckpointError(
                        f"{self.staging.folder / file.name} has {size} bytes instead of {file.nbytes}."
                    )

    def close(self) -> None:
        """End the threads; what is finished stays."""
        self._behind.close()
        for written in self._abandoned:
            written.close()

    def __enter__(self) -> SafetensorsSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- writing ------------------------------------------------------------------------------------------------------

    def _finish(self, written: WrittenFile, shard: Shard) -> None:
        def journalise(written: WrittenFile) -> None:
            written.path.rename(self.staging.folder / shard.name)
            self.staging.add(shard.name, FinishedFile(written.nbytes, written.sha256.hexdigest()))

        self._behind.finish(written, journalise)


def _as_bytes(data: torch.Tensor | bytes | bytearray | memoryview) -> np.ndarray:
    """Data as a flat array of bytes, without a copy."""
    if not isinstance(data, torch.Tensor):
        return np.frombuffer(data, np.uint8)
    if data.device.type != "cpu" or not data.is_contiguous():
        raise CheckpointError(
            f"A tensor on {data.device} with strides {data.stride()} cannot be written. Pass .cpu().contiguous()."
        )
    return data.detach().reshape(-1).view(torch.uint8).numpy()
