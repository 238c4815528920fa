"""`SafetensorsSource`: a folder of safetensors, read row by row, without a model and without trust.

Everything that can be checked without reading data is checked when the folder is opened. Data are read into fresh memory
rather than mapped: a mapped file that another process truncates kills the reader, a read one raises.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType

import torch

from ...errors import CheckpointError
from .format import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    FileTensor,
    parse_header,
    read_json,
    short,
    some,
)
from .layout import INDEX_NAME, SINGLE_NAME

PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "consolidated*.bin")
NO_WEIGHTS = ("optimizer", "grown_optimizer", "scheduler", "scaler", "rng_state")  # what training leaves beside them


class SafetensorsSource:
    """The tensors of a folder: `model.safetensors`, or else `model.safetensors.index.json` and its shards.

    Files are opened once and kept open; reading is thread-safe. Links are followed within the folder and, in a snapshot of
    the Hub's cache, to that repository's blobs. Use as a context manager, or call `close`.

    Args:
        folder: a model's folder.

    Attributes:
        folder: its path, links resolved.
        tensors: name -> `FileTensor` (dtype, shape, file, offset in bytes, bytes), file by file, in each by offset.
        fingerprint: text that changes when a file's header, size or time of writing changes.

    Raises:
        CheckpointError: with everything that is wrong in `problems`.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(os.path.realpath(folder))
        self.tensors: Mapping[str, FileTensor] = {}
        self._files: dict[str, OpenFile] = {}
        with ExitStack() as opened:
            self._open(opened)
            self._stack = opened.pop_all()

    def _open(self, opened: ExitStack) -> None:
        digest = hashlib.sha256()
        tensors: dict[str, FileTensor] = {}
        problems: list[str] = []
        index = self._read_index(opened)
        for file in sorted(set(index.values())) if index is not None else [SINGLE_NAME]:
            try:
                size, stamp, header = self._header(file, opened)
            except Fault as fault:
                problems.append(f"{short(file)}: {fault}.")
                continue
            digest.update(repr((file, size, stamp, header)).encode())
            data_nbytes = size - LENGTH_BYTES - len(header)
            places, faults = parse_header(header, file, data_nbytes)
            problems += [f"{short(file)}: {fault}." for fault in faults]
            if not faults:
                problems += _against_index(file, places, index)
                problems += [
                    f"Tensor {short(name)} is in {short(tensors[name].file)} and in {short(file)}."
                    for name in places
                    if name in tensors
                ]
            tensors |= dict(sorted(places.items(), key=lambda item: item[1].offset))
        if problems:
            raise CheckpointError(f"The safetensors in {self.folder} cannot be used:", problems)
        self.tensors = tensors
        self.fingerprint = digest.hexdigest()

    @property
    def specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor."""
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}

    # -- reading ------------------------------------------------------------------------------------------------------

    def read_rows(
        self, name: str, start: int = 0, stop: int | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, or all of it.

        Args:
            name: of the tensor.
            start, stop: rows along the first dimension, `0 <= start <= stop <= shape[0]`. A scalar is read whole.
            out: contiguous memory of the result's dtype and size to read into, instead of fresh memory.

        Returns:
            A tensor on the CPU, `(stop - start, *shape[1:])`, in the file's dtype.

        Raises:
            CheckpointError: no such tensor, rows that it does not have, or a file that cannot be read (any more).
        """
        place = self._place(name)
        if not place.shape:
            return self._read(name, place, 0, 1, (), out)
        rows = place.shape[0]
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise CheckpointError(f"Tensor {short(name)} has rows 0 to {rows}, not {start} to {stop}.")
        width = place.nbytes // place.dtype.itemsize // rows if rows else 0
        return self._read(name, place, start * width, stop * width, (stop - start, *place.shape[1:]), out)

    def read_entries(self, name: str, start: int, stop: int, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Entries `start` to `stop` of a tensor laid flat, `(stop - start,)`; otherwise as `read_rows`."""
        place = self._place(name)
        entries = place.nbytes // place.dtype.itemsize
        if not 0 <= start <= stop <= entries:
            raise CheckpointError(f"Tensor {short(name)} has entries 0 to {entries}, not {start} to {stop}.")
        return self._read(name, place, start, stop, (stop - start,), out)

    def will_need(self, name: str) -> None:
        """Have the system read a tensor ahead, while something else is computed: a hint, without which nothing fails."""
        place = self._place(name)
        if hasattr(os, "posix_fadvise") and place.nbytes:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._file(place.file).descriptor, place.offset, place.nbytes, os.POSIX_FADV_WILLNEED)

    def _place(self, name: str) -> FileTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {short(name)}. It has {some(sorted(self.tensors))}.")
        return self.tensors[name]

    def _read(
        self, name: str, place: FileTensor, start: int, stop: int, shape: tuple[int, ...], out: torch.Tensor | None
    ) -> torch.Tensor:
        made = torch.empty(shape, dtype=place.dtype) if out is None else out
        if made.dtype != place.dtype or made.numel() != stop - start or not made.is_contiguous():
            raise CheckpointError(
                f"Tensor {short(name)} cannot be read into {made.dtype} of shape {tuple(made.shape)}. Pass contiguous "
                f"memory for {stop - start} entries of {place.dtype}."
            )
        view = memoryview(made.detach().reshape(-1).view(torch.uint8).numpy())
        at = place.offset + start * place.dtype.itemsize
        try:
            _read_into(self._file(place.file), view, at)
        except Fault as fault:
            raise CheckpointError(
                f"Tensor {short(name)} could not be read from {self.folder / place.file}: {fault}."
            ) from fault
        return made.view(shape)

    # -- the end ------------------------------------------------------------------------------------------------------

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` unless every file is as it was when it was opened: the same one, its size and time."""
        problems = [
            f"{short(name)} changed while it was read."
            for name, file in self._files.items()
            if not file.is_unchanged()
        ]
        if problems:
            raise CheckpointError(f"What was read from {self.folder} may be a mixture; read it again.", problems)

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- opening ------------------------------------------------------------------------------------------------------

    def _header(self, file: str, opened: ExitStack) -> tuple[int, object, bytes]:
        """Open a file of weights: its size, what changes when it is written, and the JSON at its beginning."""
        found = self._files[file] = open_file(self.folder, file, opened)
        return found.size, found.modified, header_of(found)

    def _file(self, name: str) -> OpenFile:
        """A file of weights, to be read."""
        return self._files[name]

    def _has(self, name: str) -> bool:
        """Whether there is a file of a name, or something in its place."""
        return os.path.lexists(self.folder / name)

    def _read_index(self, opened: ExitStack) -> dict[str, str] | None:
        """Tensor -> file, from the index; None where there is one file, which goes first, as for `from_pretrained`."""
        if self._has(SINGLE_NAME):
            return None
        if not self._has(INDEX_NAME):
            raise CheckpointError(_why_nothing(self.folder))
        try:
            file = self._files[INDEX_NAME] = open_file(self.folder, INDEX_NAME, opened)
            if file.size > MAX_HEADER_BYTES:
                raise Fault(f"{file.size} bytes are more than an index has")
            text = bytearray(file.size)
            _read_into(file, memoryview(text), 0)
            weight_map = read_json(bytes(text).strip()).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise Fault("it has no weight_map")
            odd = sorted({short(name) for name in weight_map.values() if not _is_inside(name)})
            if odd:
                raise Fault(f"it names files that are no safetensors of this folder: {', '.join(odd[:5])}")
        except ValueError as fault:
            raise CheckpointError(
                f"The index {self.folder / INDEX_NAME} cannot be used:", [f"{INDEX_NAME}: {fault}."]
            ) from fault
        return weight_map


class Fault(ValueError):
    """What is wrong with one file."""


@contextmanager
def _faults() -> Iterator[None]:
    """What the system says, as a fault of the file."""
    try:
        yield
    except OSError as error:
        raise Fault(error.strerror or str(error)) from error


@dataclass(frozen=True)
class OpenFile:
    """A file that is read, and what it was when it was opened."""

    path: Path
    descriptor: int
    status: os.stat_result

    @property
    def size(self) -> int:
        return self.status.st_size

    @property
    def modified(self) -> int:
        return self.status.st_mtime_ns

    def is_unchanged(self) -> bool:
        try:
            now = (os.fstat(self.descriptor), os.stat(self.path))
        except OSError:
            return False
        return all(_identity(status) == _identity(self.status) for status in now)


def open_file(folder: Path, name: str, opened: ExitStack) -> OpenFile:
    """Open a file of a folder, which `opened` closes; a Fault where it is none, or a link that leads out."""
    path = folder / name
    with _faults():
        if not os.path.lexists(path):
            raise Fault("the file is missing")
        real = Path(os.path.realpath(path))
        if not real.exists():
            raise Fault(f"a link to {real}, which is not there")
        if leads_out(folder, path):
            raise Fault(f"a link that leads out of the folder, to {real}")
        if not real.is_file():
            raise Fault("not a file")
        # Should it have become a pipe by now, opening does not wait for a writer.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        opened.callback(os.close, descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Fault("not a file")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return OpenFile(path, descriptor, status)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_into(file: OpenFile, view: memoryview, at: int) -> None:
    """Fill memory with a file's bytes from `at` on."""
    done = 0
    with _faults():
        while done < len(view):
            count = os.preadv(file.descriptor, [view[done:]], at + done)
            if count == 0:
                raise Fault(f"the file ends {len(view) - done} bytes too early; it changed while it was read")
            done += count


def header_of(file: OpenFile) -> bytes:
    """The JSON at a file's beginning."""

    def read(start: int, stop: int) -> bytes:
        found = bytearray(stop - start)
        _read_into(file, memoryview(found), start)
        return bytes(found)

    return header_text(file.size, read)


def header_text(nbytes: int, read: Callable[[int, int], bytes]) -> bytes:
    """The JSON at the beginning of a file of some bytes, of which `read` gives a range.

    Raises:
        Fault: there cannot be one.
    """
    if nbytes < LENGTH_BYTES:
        raise Fault(f"{nbytes} bytes are too few for a safetensors file (truncated?)")
    size = int.from_bytes(read(0, LENGTH_BYTES), "little")
    if size > MAX_HEADER_BYTES:
        raise Fault(f"a header of {size} bytes is absurd; this is no safetensors file")
    if size > nbytes - LENGTH_BYTES:
        raise Fault(f"a header of {size} bytes does not fit into the file of {nbytes} (truncated?)")
    return read(LENGTH_BYTES, LENGTH_BYTES + size)


def _against_index(file: str, places: Mapping[str, FileTensor], index: Mapping[str, str] | None) -> list[str]:
    """What a file has and its index lacks, and the other way round."""
    if index is None:
        return []
    here = {name for name, where in index.items() if where == file}
    problems = []
    if missing := sorted(here - set(places)):
        problems.append(f"{short(file)}: {len(missing)} tensors that the index names are not in it: {some(missing)}.")
    if unknown := sorted(set(places) - set(index)):
        problems.append(f"{short(file)}: {len(unknown)} tensors in it are not in the index: {some(unknown)}.")
    if elsewhere := sorted(name for name in places if index.get(name, file) != file):
        problems.append(
            f"{short(file)}: {len(elsewhere)} tensors in it belong elsewhere by the index: {some(elsewhere)}."
        )
    return problems


def _is_inside(name: object) -> bool:
    """Whether a name in an index is that of a safetensors file of the folder."""
    if not isinstance(name, str) or "\0" in name or not name.endswith(".safetensors"):
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name


def leads_out(folder: Path, path: Path) -> bool:
    """Whether a path of a folder is a link to something outside of it that is no blob of its repository in the Hub's cache."""
    folder, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    return not (real.is_relative_to(folder) or _is_blob(folder, real))


def _is_blob(folder: Path, real: Path) -> bool:
    """Whether a link's end is a blob of the repository in the Hub's cache whose snapshot the folder is (in)."""
    for inner in (folder, *folder.parents):
        snapshots = inner.parent
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith(("models--", "datasets--", "spaces--")):
            return real.parent == snapshots.parent / "blobs"
    return False


def _why_nothing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder."
    what = f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}"
    if shards := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"{what}, but {some(shards)}. Add the index, or rename a single file to {SINGLE_NAME}."
    found = {path.name for pattern in PICKLES for path in folder.glob(pattern)}
    if pickles := sorted(name for name in found if not name.startswith(NO_WEIGHTS)):
        return (
            f"{what}, but pickled weights: {some(pickles)}. They are not read here, since a pickle can run code. Convert "
            "them first: load the model from a source that you trust and call save_pretrained."
        )
    return f"{what}. Pass the folder that holds a model's weights."
