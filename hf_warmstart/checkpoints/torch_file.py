"""Files of `torch.save` read piece by piece, by offset and without mapping them: nothing of them stays in memory.

torch describes a file's tensors when it loads it among fake ones; their numbers are read from the file's own place when
they are asked for. Reads by offset fail with an error where a file was cut or written to in the meantime; a mapped file
would end the process (SIGBUS).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import sys
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..errors import StateError


def read_state_file(path: Path) -> dict[str, Any]:
    """An optimizer's file, its tensors on disk until they are asked for.

    Args:
        path: as `torch.save` wrote `{"state": {number or name: {...}}, "param_groups": [...]}`.

    Returns:
        The same, each entry a `FileEntry`; tensors elsewhere (a learning rate) are read.

    Raises:
        StateError: the file is damaged, holds more than tensors and numbers, or is no optimizer's.
    """
    file = _File(path)
    with readable(path), os.fdopen(os.dup(file.descriptor), "rb") as opened, FakeTensorMode():
        tree = torch.load(opened, map_location="cpu", weights_only=True)
    if not isinstance(tree, dict) or not isinstance(tree.get("state"), dict) or "param_groups" not in tree:
        raise StateError(f"{path.name} holds no optimizer's state. Pass the file that the parent's run wrote.")
    records = _records(file)
    state = {
        key: FileEntry(file, {k: _piece(file, v, records) for k, v in entry.items()})
        for key, entry in tree["state"].items()
    }
    others = {key: _read_all(file, value, records) for key, value in tree.items() if key != "state"}
    return {key: state if key == "state" else others[key] for key in tree}


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Name the file in whatever torch says of one that it cannot load."""
    try:
        yield
    except pickle.UnpicklingError as fault:
        # torch's own message advises to load it all the same, and so to run whatever the file says.
        raise StateError(f"{path.name} is damaged, or holds more than plain tensors and numbers.") from fault
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile) as fault:
        raise StateError(f"{path.name} cannot be read as plain tensors and numbers: {fault}") from fault


class FileEntry(Mapping[str, Any]):
    """The state of one parameter; a tensor is read whenever it is asked for."""

    def __init__(self, file: _File, pieces: Mapping[str, Any]):
        self._file, self._pieces = file, pieces

    def __getitem__(self, key: str) -> Any:
        piece = self._pieces[key]
        return self._file.read(piece, piece.described) if isinstance(piece, _Piece) else piece

    def __contains__(self, key: object) -> bool:
        return key in self._pieces  # Mapping's own would read it

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Some rows of one piece."""
        piece = self._pieces[key]
        return self._file.read(piece, piece.described[start:stop])

    def described(self) -> dict[str, Tensor | None]:
        """Its tensors without their numbers."""
        return {key: piece.described if isinstance(piece, _Piece) else None for key, piece in self._pieces.items()}

    def without(self, *keys: str) -> FileEntry:
        """The entry less some of its pieces."""
        return FileEntry(self._file, {key: piece for key, piece in self._pieces.items() if key not in keys})

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


@dataclass(frozen=True)
class _Piece:
    """A tensor in a file: its shape, strides and dtype (on the meta device), and the byte of its first entry."""

    described: Tensor
    offset: int


class _File:
    """An open file that must stay as it is."""

    def __init__(self, path: Path):
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self._stamp = self._now()

    @property
    def size(self) -> int:
        return self._stamp[0]

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns

    def read(self, piece: _Piece, part: Tensor) -> Tensor:
        """The numbers of a part of a piece, in the part's strides."""
        if part.numel() == 0:
            return torch.empty(part.shape, dtype=part.dtype)
        values = torch.empty(_span(part), dtype=part.dtype)
        self.fill(memoryview(values.view(torch.uint8).numpy()), piece.offset + part.storage_offset() * part.itemsize)
        return values.as_strided(part.shape, part.stride())

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Read bytes from an offset.

        Raises:
            StateError: the file is not the one that was opened any more.
        """
        while buffer:
            count = os.preadv(self.descriptor, [buffer], offset)
            if count == 0:
                break
            buffer, offset = buffer[count:], offset + count
        if buffer or self._now() != self._stamp:
            raise StateError(
                f"{self.path.name} was written to while it was read. Grow a checkpoint that no run writes to any more."
            )


def _span(tensor: Tensor) -> int:
    """From a tensor's first entry to its last, in entries of its storage."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _records(file: _File) -> dict[int, int]:
    """Where each record of the zip begins, and its bytes."""
    records = {}
    with readable(file.path), os.fdopen(os.dup(file.descriptor), "rb") as opened, zipfile.ZipFile(opened) as archive:
        for record in archive.infolist():
            if record.filename.endswith("/byteorder") and archive.read(record).decode() != sys.byteorder:
                raise StateError(
                    f"{file.path.name} was written on a machine of another byte order. Load and save it once with torch."
                )
            header = bytearray(30)
            file.fill(memoryview(header), record.header_offset)
            begin = record.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
            if record.compress_type == zipfile.ZIP_STORED and begin + record.file_size <= file.size:
                records[begin] = record.file_size
    return records


def _piece(file: _File, value: Any, records: Mapping[int, int]) -> Any:
    """What stands for a value of a file: a place where it is a tensor, else itself."""
    if not isinstance(value, FakeTensor):
        return value
    begin = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    offset = value.storage_offset() * value.itemsize
    room = records.get(begin, -1) if begin is not None else -1
    if value.layout != torch.strided or (value.numel() and offset + _span(value) * value.itemsize > room):
        raise StateError(
            f"{file.path.name} cannot be read as plain tensors and numbers: the bytes of a tensor of shape "
            f"{tuple(value.shape)} are not where it says."
        )
    described = torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype, device="meta")
    return _Piece(described, (begin or 0) + offset)


def _read_all(file: _File, value: Any, records: Mapping[int, int]) -> Any:
    """A value with all its tensors read."""
    if isinstance(value, dict):
        return type(value)((key, _read_all(file, item, records)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_read_all(file, item, records) for item in value)
    piece = _piece(file, value, records)
    return file.read(piece, piece.described) if isinstance(piece, _Piece) else piece
