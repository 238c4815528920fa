"""Files of `torch.save` read piece by piece, by offset and without mapping them: nothing of them stays in memory.

torch describes a file's tensors when it loads it among fake ones; their numbers are read from the file's own place when
they are asked for. Reads by offset fail with an error where a file was cut or written to in the meantime; a mapped file
would end the process (SIGBUS).
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import sys
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import StateError
from ...growth.twin import FAULTS

# Of a zip's local header: its bytes, and where it has the lengths of what follows (APPNOTE.TXT 4.3.7).
LOCAL, LOCAL_LENGTHS = 30, 26


def read_state_file(path: Path) -> dict[str, Any]:
    """An optimizer's file, its tensors on disk until they are asked for.

    Args:
        path: as `torch.save` wrote `{"state": {number or name: {...}}, "param_groups": [...]}`.

    Returns:
        The same, each entry a `FileEntry`; tensors elsewhere (a learning rate) are read.

    Raises:
        StateError: the file is damaged, holds more than tensors and numbers, or is no optimizer's.
    """
    tree = _described(OpenFile(path))
    if not isinstance(tree, dict) or not _is_state(tree.get("state")) or not _are_groups(tree.get("param_groups")):
        raise StateError(f"{path.name} holds no optimizer's state. Pass the file that the parent's run wrote.")
    state = {key: FileEntry(entry) for key, entry in tree["state"].items()}
    return {key: state if key == "state" else _all_read(value) for key, value in tree.items()}


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values())


def _are_groups(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(group, dict) and isinstance(group.get("params", []), list) for group in value
    )


def stored_tensor(file: OpenFile, begin: int, size: int) -> StoredTensor:
    """The tensor that `torch.save` wrote into a part of a file.

    Raises:
        StateError: the part is damaged, or holds anything else.
    """
    tensor = _described(file, begin, size)
    if not isinstance(tensor, StoredTensor):
        raise StateError(
            f"{file.path.name} cannot be read as plain tensors and numbers: no tensor is at byte {begin}."
        )
    return tensor


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Name the file in whatever torch says of one that it cannot load."""
    try:
        yield
    except pickle.UnpicklingError as fault:
        # torch's own message advises to load it all the same, and so to run whatever the file says.
        raise StateError(f"{path.name} is damaged, or holds more than plain tensors and numbers.") from fault
    except StateError:
        raise
    except (*FAULTS, EOFError, struct.error, zipfile.BadZipFile) as fault:
        # A damaged pickle fails in any way.
        raise StateError(f"{path.name} cannot be read as plain tensors and numbers: {fault}") from fault


class FileEntry(Mapping[str, Any]):
    """The state of one parameter; a tensor is read whenever it is asked for."""

    def __init__(self, pieces: Mapping[str, Any]):
        self._pieces = pieces

    def __getitem__(self, key: str) -> Any:
        piece = self._pieces[key]
        return piece.read() if isinstance(piece, StoredTensor) else piece

    def __contains__(self, key: object) -> bool:
        return key in self._pieces  # Mapping's own would read it

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Some rows of one piece."""
        return self._pieces[key].read((start, stop))

    def described(self) -> dict[str, Tensor | None]:
        """Its tensors without their numbers."""
        return {
            key: piece.described if isinstance(piece, StoredTensor) else None for key, piece in self._pieces.items()
        }

    def without(self, *keys: str) -> FileEntry:
        """The entry less some of its pieces."""
        return FileEntry({key: piece for key, piece in self._pieces.items() if key not in keys})

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


class OpenFile:
    """An open file that must stay as it is.

    Raises:
        StateError: it cannot be opened.
    """

    def __init__(self, path: Path):
        self.path = path
        with readable(path):
            self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._stamp = self._now()

    @property
    def size(self) -> int:
        """Its bytes."""
        return self._stamp[0]

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Read bytes from an offset.

        Raises:
            StateError: the file cannot be read, is shorter, or not the one that was opened any more.
        """
        while buffer:
            with readable(self.path):
                count = os.preadv(self._descriptor, [buffer], offset)
            if count == 0:
                break
            buffer, offset = buffer[count:], offset + count
        if self._now() != self._stamp:
            raise StateError(
                f"{self.path.name} was written to while it was read. Grow a checkpoint that no run writes to any more."
            )
        if buffer:
            raise StateError(f"{self.path.name} ends before byte {offset + len(buffer)}; it is damaged.")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape, strides and dtype (on the meta device), and the byte of its first entry."""

    file: OpenFile
    described: Tensor
    offset: int

    def read(self, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor, or its rows from one number to another, in memory of their own."""
        part = self.described if rows is None else self.described[slice(*rows)]
        if part.numel() == 0:
            return torch.empty(part.shape, dtype=part.dtype)
        values = torch.empty(_span(part), dtype=part.dtype)
        self.file.fill(
            memoryview(values.view(torch.uint8).numpy()), self.offset + part.storage_offset() * part.itemsize
        )
        return values.as_strided(part.shape, part.stride())


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: OpenFile, begin: int, size: int):
        self._file, self._begin, self._size, self._at = file, begin, size, 0
        self.fault: StateError | None = None  # torch's reader keeps the words of none that is raised in it

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        try:
            self._file.fill(memoryview(buffer)[:count], self._begin + self._at)
        except StateError as fault:
            self.fault = fault
            raise
        self._at += count
        return count


def _described(file: OpenFile, begin: int = 0, size: int | None = None) -> Any:
    """What `torch.save` wrote into a file, or a part of one, with a `StoredTensor` for each tensor."""
    part = _Part(file, begin, file.size if size is None else size)
    try:
        with readable(file.path), io.BufferedReader(part) as opened:
            with FakeTensorMode():
                tree = torch.load(opened, map_location="cpu", weights_only=True)
            records = _records(file, opened)
    except StateError as fault:
        if part.fault is None:
            raise
        raise part.fault from fault
    return _placed(file, tree, records, begin)


def _records(file: OpenFile, opened: IO[bytes]) -> dict[int, int]:
    """Where each record of a zip begins, and its bytes."""
    records = {}
    with zipfile.ZipFile(opened) as archive:
        for record in archive.infolist():
            if record.filename.endswith("/byteorder") and archive.read(record).decode() != sys.byteorder:
                raise StateError(
                    f"{file.path.name} was written on a machine of another byte order. Load and save it once with torch."
                )
            opened.seek(record.header_offset + LOCAL_LENGTHS)
            begin = record.header_offset + LOCAL + sum(struct.unpack("<HH", opened.read(4)))
            if record.compress_type == zipfile.ZIP_STORED:
                records[begin] = record.file_size
    return records


def _placed(file: OpenFile, value: Any, records: Mapping[int, int], begin: int) -> Any:
    """A value of a file, each tensor with its place.

    Raises:
        StateError: a tensor has other bytes than its record, or none.
    """
    if isinstance(value, dict):
        return type(value)((key, _placed(file, item, records, begin)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_placed(file, item, records, begin) for item in value)
    if not isinstance(value, Tensor):
        return value
    place = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    offset = value.storage_offset() * value.itemsize
    if value.numel() and offset + _span(value) * value.itemsize > records.get(-1 if place is None else place, -1):
        raise StateError(
            f"{file.path.name} cannot be read as plain tensors and numbers: the bytes of a tensor of shape "
            f"{tuple(value.shape)} are not where it says."
        )
    described = torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype, device="meta")
    return StoredTensor(file, described, begin + (place or 0) + offset)


def _span(tensor: Tensor) -> int:
    """From a tensor's first entry to its last, in entries of its storage."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _all_read(value: Any) -> Any:
    """A value with all its tensors read."""
    if isinstance(value, dict):
        return type(value)((key, _all_read(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_all_read(item) for item in value)
    return value.read() if isinstance(value, StoredTensor) else value
