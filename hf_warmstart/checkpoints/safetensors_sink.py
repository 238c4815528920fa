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

from ..errors import CheckpointError
from .journal import FinishedFile
from .safetensors_format import FileTensor
from .safetensors_layout import INDEX_NAME, FileLayout, TensorSpec, folder_layout
from .staging import Staging
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
        with self._sink.staging.faults(self.name):
            path = self._sink.staging.folder / (self.name + PART)
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
        with self._sink.staging.faults(self.name):
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
        depth = 4
        self._behind = WriteBehind(depth, max(buffer_nbytes // depth // 4096, 1) * 4096)

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
