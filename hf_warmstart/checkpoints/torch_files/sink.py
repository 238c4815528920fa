"""A file of `torch.save` written header first: its tensors follow in blocks of rows, and are never held together.

torch writes the file with space for the bytes of its tensors (`torch.serialization.skip_data`). They are written at
their places afterwards, and what the zip says of them, their checksums, is put right at the end. The file has the bytes
that `torch.save` of the whole would have written.
"""

from __future__ import annotations

import errno
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import StateError, WarmstartError
from .source import LOCAL, LOCAL_LENGTHS

PiecePath = tuple[Any, ...]
# Of a zip's other headers: their bytes, and where they have the checksum and the lengths (APPNOTE.TXT 4.3.9, 4.3.12).
_DESCRIPTOR_CHECKSUM = 4
_CENTRAL, _CENTRAL_CHECKSUM, _CENTRAL_LENGTHS = 46, 16, 28
_ID = "/.data/serialization_id"


class TorchFileSink:
    """A file that `torch.load` reads, written piece by piece.

    Args:
        path: the file; its stem is the name of the archive within, as torch has it.
        skeleton: dicts, lists and tuples of what the file is to hold. Tensors on the meta device stand for pieces, whose
            rows are written later; others are written at once.

    Attributes:
        pieces: each piece's keys from the skeleton's root and what stands for it, in the order of the file.
        size: the file's bytes, which do not change any more.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike, skeleton: Any):
        self.path = Path(path)
        tensors = _save_skeleton(self.path, skeleton)
        self._file = os.open(self.path, os.O_RDWR)
        try:
            self._records = _records(self.path)
            self._at = {keys: f"/data/{number}" for number, (keys, _) in enumerate(tensors)}
            self._written = dict.fromkeys(self._at, 0)
            self._checksums = dict.fromkeys(self._at, 0)
            self._tensors = dict(tensors)
            self.pieces = [(keys, tensor) for keys, tensor in tensors if tensor.is_meta]
            self.size = os.fstat(self._file).st_size
            for keys, tensor in tensors:
                if not tensor.is_meta:
                    self.write(keys, 0, tensor)
        except BaseException:
            self.close()
            raise

    def write(self, piece: PiecePath, start_row: int, rows: Tensor) -> None:
        """Write rows of a piece, which come one after the other.

        Args:
            piece: its keys. start_row: how many of its rows came before (0 for a tensor without axes).

        Raises:
            WarmstartError: the rows are of another dtype or shape, or not the next ones.
            OSError: they cannot be written.
        """
        whole = self._tensors[piece]
        row_bytes = whole.itemsize * whole.shape[1:].numel()
        length = rows.shape[0] if rows.ndim else 1
        done = self._written[piece]
        if (
            (rows.dtype, rows.shape[1:], rows.ndim) != (whole.dtype, whole.shape[1:], whole.ndim)
            or start_row * row_bytes != done
            or start_row + length > (whole.shape[0] if whole.ndim else 1)
        ):
            raise WarmstartError(
                f"{piece}: rows of {rows.dtype} and shape {tuple(rows.shape)} at {start_row} do not follow the "
                f"{done // max(row_bytes, 1)} that were written of {whole.dtype} and shape {tuple(whole.shape)}. Pass the "
                "next rows, in the piece's dtype."
            )
        data = memoryview(rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        _write_all(self._file, data, self._records[self._at[piece]].begin + done)
        self._checksums[piece] = zlib.crc32(data, self._checksums[piece])
        self._written[piece] = done + len(data)

    def finish(self) -> None:
        """Put the checksums right, and have the file on the disk.

        Raises:
            WarmstartError: a piece is not complete.
            OSError: it cannot be written.
        """
        short = [keys for keys, done in self._written.items() if done != self._records[self._at[keys]].size]
        if short:
            raise WarmstartError(f"{self.path.name} lacks rows of {len(short)} pieces, such as {short[0]}.")
        counted = [record for name, record in self._records.items() if name != _ID and record.size]
        before = [record.checksum for record in counted]
        for keys, checksum in self._checksums.items():
            if (record := self._records[self._at[keys]]).size:
                self._set_checksum(record, checksum)
        self._renew_id(before, [record.checksum for record in counted])
        os.fsync(self._file)
        self.close()

    def close(self) -> None:
        """Let the file go, as it is."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> TorchFileSink:
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()

    def _set_checksum(self, record: _Record, checksum: int) -> None:
        record.checksum = checksum
        for place in record.checksum_places:
            _write_all(self._file, memoryview(struct.pack("<I", checksum)), place)

    def _renew_id(self, before: Sequence[int], after: Sequence[int]) -> None:
        """The number by which torch tells one file's contents from another's, from their checksums as torch takes it.

        Where the skeleton's is taken in another way (by another torch), it stays."""
        record = self._records[_ID]
        names = os.pread(self._file, record.size, record.begin)
        if names[20:] == _combined(before):
            renewed = names[:20] + _combined(after)
            _write_all(self._file, memoryview(renewed), record.begin)
            self._set_checksum(record, zlib.crc32(renewed))


def torch_file_bytes(path: str | os.PathLike, skeleton: Any) -> int:
    """The exact size of the file that `TorchFileSink` writes to a path; nothing is left on the disk.

    Raises:
        WarmstartError: there is no room for it in the folder for temporary files, where it takes next to none.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder, Path(path).name)
            _save_skeleton(place, skeleton)
            return place.stat().st_size
    except OSError as error:
        raise WarmstartError(
            f"The size of {Path(path).name} could not be told in the folder for temporary files: {error}. Make room there, or "
            "set TMPDIR to another."
        ) from error


# -- the skeleton -----------------------------------------------------------------------------------------------------


class _Blank:
    """Pickles as the contiguous CPU tensor of a shape and dtype, whose bytes are not there yet."""

    def __init__(self, keys: PiecePath, tensor: Tensor, pickled: list[tuple[PiecePath, Tensor]]):
        self._keys, self._tensor, self._pickled = keys, tensor, pickled
        self._fake = torch.empty(tensor.shape, dtype=tensor.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._pickled.append((self._keys, self._tensor))
        rebuild, (storage, *rest) = self._fake.__reduce_ex__(protocol)
        storage._fake_device = "cpu"  # always the same object, which pickle then writes once, as for real tensors
        return rebuild, (storage, *rest)


def _save_skeleton(path: Path, skeleton: Any) -> list[tuple[PiecePath, Tensor]]:
    """Write the file without its tensors' bytes; the tensors in the order that they have in it."""
    pickled: list[tuple[PiecePath, Tensor]] = []

    def blank(value: Any, keys: PiecePath) -> Any:
        if isinstance(value, Tensor):
            return _Blank(keys, value, pickled)
        if isinstance(value, Mapping):
            return {key: blank(item, (*keys, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(blank(item, (*keys, number)) for number, item in enumerate(value))
        return value

    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True), write_errors(path):
        torch.save(blank(skeleton, ()), path)
    return pickled


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """What torch's writer says of a disk that takes no more, as the error that it is."""
    try:
        yield
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(errno.EIO, f"torch could not write it whole (is the disk full?): {error}", str(path)) from error


# -- the zip ----------------------------------------------------------------------------------------------------------


class _Record:
    """One file of the zip: where its bytes begin, how many there are, their checksum and the places that hold it."""

    def __init__(self, begin: int, size: int, checksum: int, checksum_places: tuple[int, int]):
        self.begin, self.size, self.checksum, self.checksum_places = begin, size, checksum, checksum_places


def _records(path: Path) -> dict[str, _Record]:
    """The records of torch's zip by name (less that of the archive), in the order of the file."""
    records = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        central = archive.start_dir
        for record in archive.infolist():
            name_bytes = len(record.orig_filename.encode())
            begin = record.header_offset + LOCAL + sum(_lengths(file, record.header_offset + LOCAL_LENGTHS, 2))
            places = (begin + record.file_size + _DESCRIPTOR_CHECKSUM, central + _CENTRAL_CHECKSUM)
            records["/" + record.filename.partition("/")[2]] = _Record(begin, record.file_size, record.CRC, places)
            lengths = _lengths(file, central + _CENTRAL_LENGTHS, 3)
            if lengths[0] != name_bytes or record.file_size and not record.flag_bits & 8:
                raise StateError(f"This torch writes {path.name} in a way that is not known. Upgrade this library.")
            central += _CENTRAL + sum(lengths)
    return records


def _lengths(file: Any, place: int, count: int) -> tuple[int, ...]:
    file.seek(place)
    return struct.unpack(f"<{count}H", file.read(2 * count))


def _combined(checksums: Sequence[int]) -> bytes:
    """Checksums in one number of twenty digits: boost's `hash_combine`, in 64 bits (caffe2/serialize/inline_container)."""
    bits, combined = 2**64 - 1, 0
    for checksum in checksums:
        combined ^= (checksum + 0x9E3779B9 + (combined << 6 & bits) + (combined >> 2)) & bits
    return b"%020d" % combined


def _write_all(file: int, data: memoryview, place: int) -> None:
    while data:
        count = os.pwrite(file, data, place)
        data, place = data[count:], place + count
