"""Folders of `torch.distributed.checkpoint` (DCP), read tensor by tensor and without executing anything.

DCP keeps an index, `.metadata`, and one file per rank. torch reads the index, and small objects such as learning rates,
by plain unpickling; here only DCP's own record classes may come out of the index, and objects load with
`weights_only=True`. A tensor is assembled from its shards when it is asked for, so that whoever reads a checkpoint of any
number of ranks holds one tensor at a time.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from ...errors import StateError
from .source import OpenFile, StoredTensor, stored_tensor

INDEX = ".metadata"
OPEN_FILES = 64
# What DCP's index consists of, beside builtin containers.
_RECORDS = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}


class _IndexUnpickler(pickle.Unpickler):
    """Reads DCP's index; anything but its own records is refused."""

    def find_class(self, module: str, name: str) -> Any:
        # A dotted name would lead from a record's module to whatever that module imports.
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if "." not in name and ((module, name) in _RECORDS or is_dtype):
            return super().find_class(module, name)
        raise StateError(
            f"The index {INDEX} of a sharded checkpoint asks for {module}.{name}, which no such index needs. Do not trust it."
        )


class _SafeReader(dcp.FileSystemReader):
    """A reader that unpickles its index under restraint, once."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        try:
            with open(folder / INDEX, "rb") as file:
                index = _IndexUnpickler(file).load()
        except StateError:
            raise
        except Exception as fault:  # a damaged pickle fails in any way
            raise StateError(f"{folder.name} is no readable sharded checkpoint: {fault}") from fault
        if not isinstance(index, Metadata):
            raise StateError(
                f"{folder.name} is no readable sharded checkpoint: its {INDEX} is a {type(index).__name__}."
            )
        self.index = index
        if getattr(self.index, "storage_meta", None) is None:
            self.index.storage_meta = StorageMeta()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index


class _SafePlanner(DefaultLoadPlanner):
    """Loads objects with `weights_only=True`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn]

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


class ShardedFolder:
    """One DCP folder.

    Args:
        folder: holds `.metadata`.

    Raises:
        StateError: there is no readable index.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder)
        self._reader = _SafeReader(self._folder)
        self._files: dict[str, OpenFile] = {}
        self._shards: dict[MetadataIndex, StoredTensor] = {}
        self.index = self._reader.index
        paths = self.index.planner_data or {}
        self.keys = {key: _flat(paths.get(key, (key,))) for key in self.index.state_dict_metadata}

    def read(self, key: str, rows: tuple[int, int] | None = None) -> Any:
        """One tensor, whole or from one row to another, or one object.

        Raises:
            StateError: its file is missing or damaged, or holds more than tensors and numbers.
        """
        record = self.index.state_dict_metadata[key]
        if isinstance(record, TensorStorageMetadata):
            return self._tensor(key, record, rows)
        state = {key: None}
        with warnings.catch_warnings():
            # This is what no_dist asks for.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                dcp.load(state, storage_reader=self._reader, planner=_SafePlanner(), no_dist=True)
            except CheckpointException as fault:
                causes = "; ".join(str(cause) for cause, _ in fault.failures.values())
                raise StateError(f"{key} cannot be read from the sharded checkpoint: {causes}") from fault
        return state[key]

    def _tensor(self, key: str, record: TensorStorageMetadata, rows: tuple[int, int] | None) -> torch.Tensor:
        """A tensor or its rows, of each shard only what is in them (torch would read every shard whole)."""
        if not record.size:
            return self._shard(key, record.chunks[0].offsets).read()
        start, stop, _ = slice(*rows or (None,)).indices(record.size[0])
        made = torch.empty((max(0, stop - start), *record.size[1:]), dtype=record.properties.dtype)
        filled = 0
        for chunk in record.chunks:
            low, *columns = chunk.offsets
            first, last = max(start, low), min(stop, low + chunk.sizes[0])
            if first < last and chunk.sizes.numel():
                place = [slice(at, at + size) for at, size in zip(columns, chunk.sizes[1:], strict=True)]
                part = self._shard(key, chunk.offsets).read((first - low, last - low))
                made[(slice(first - start, last - start), *place)] = part
                filled += part.numel()
        if filled != made.numel():
            raise StateError(f"{key} cannot be read from the sharded checkpoint: its shards are not all of it.")
        return made

    def _shard(self, key: str, offsets: torch.Size) -> StoredTensor:
        """One shard of a tensor, in the file of the rank that wrote it."""
        place = MetadataIndex(key, offsets)
        if place not in self._shards:
            info = self.index.storage_data.get(place)
            if info is None or Path(info.relative_path).name != info.relative_path:
                raise StateError(f"{key} cannot be read from the sharded checkpoint: the index names no file for it.")
            if getattr(info, "transform_descriptors", None):
                raise StateError(
                    f"{key} is stored as {info.transform_descriptors}, which is not read here. Save the checkpoint without "
                    "extensions of torch.distributed.checkpoint."
                )
            if info.relative_path not in self._files:
                if len(self._files) >= OPEN_FILES:  # a run of many ranks has more than a process may open
                    self._files.clear()
                    self._shards.clear()
                self._files[info.relative_path] = OpenFile(self._folder / info.relative_path)
            self._shards[place] = stored_tensor(self._files[info.relative_path], info.offset, info.length)
        return self._shards[place]

    def described(self, key: str) -> torch.Tensor | None:
        """A tensor of the saved shape and dtype without numbers; None for an object."""
        record = self.index.state_dict_metadata[key]
        if not isinstance(record, TensorStorageMetadata):
            return None
        return torch.empty(record.size, dtype=record.properties.dtype, device="meta")

    def weights(self) -> Weights:
        """The tensors saved under `model`, by parameter name."""
        return Weights(
            self, {path[len("model.") :]: key for key, path in self.keys.items() if path.startswith("model.")}
        )

    def optimizer(self) -> dict[str, Any]:
        """`{"state": {name: {...}}, "param_groups": [...]}`, the state read when it is asked for.

        Raises:
            StateError: the folder holds no optimizer.
        """
        entries: dict[str, dict[str, str]] = {}
        groups: dict[int, dict[str, Any]] = {}
        for key, path in self.keys.items():
            rest = path.removeprefix("optimizer.")
            if rest.startswith("state."):
                name, _, piece = rest.removeprefix("state.").rpartition(".")
                entries.setdefault(name, {})[piece] = key
            elif rest.startswith("param_groups."):
                number, _, option = rest.removeprefix("param_groups.").partition(".")
                value = self.read(key)
                group = groups.setdefault(int(number), {})
                if option.startswith("params."):
                    group.setdefault("params", []).append(value)
                else:
                    group[option] = value
        if not entries:
            raise StateError("The sharded checkpoint holds no optimizer state.")
        return {"state": Entries(self, entries), "param_groups": [groups[number] for number in sorted(groups)]}


class Weights(Mapping[str, torch.Tensor]):
    """Tensors of a sharded folder by name, each read when it is asked for."""

    def __init__(self, folder: ShardedFolder, keys: Mapping[str, str]):
        self._folder, self._keys = folder, keys

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._folder.read(self._keys[name])

    def described(self, name: str) -> torch.Tensor:
        """A tensor without its numbers."""
        described = self._folder.described(self._keys[name])
        if described is None:
            raise StateError(f"{name} is no tensor in the sharded checkpoint, which is not that of a model.")
        return described

    def __contains__(self, name: object) -> bool:
        return name in self._keys  # Mapping's own would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Entries(Mapping[str, "Entry"]):
    """Optimizer entries of a sharded folder by parameter name."""

    def __init__(self, folder: ShardedFolder, keys: Mapping[str, Mapping[str, str]]):
        self._folder, self._keys = folder, keys

    def __getitem__(self, name: str) -> Entry:
        return Entry(self._folder, self._keys[name])

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Entry(Mapping[str, Any]):
    """The state of one parameter, each piece read when it is asked for."""

    def __init__(self, folder: ShardedFolder, keys: Mapping[str, str]):
        self._folder, self._keys = folder, keys

    def __getitem__(self, piece: str) -> Any:
        return self._folder.read(self._keys[piece])

    def rows(self, piece: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of one piece."""
        return self._folder.read(self._keys[piece], (start, stop))

    def described(self) -> dict[str, torch.Tensor | None]:
        """Its tensors without their numbers."""
        return {piece: self._folder.described(key) for piece, key in self._keys.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def is_sharded(folder: Path) -> bool:
    """Whether a folder is one of DCP's."""
    return (folder / INDEX).is_file()


def _flat(path: Any) -> str:
    return ".".join(str(part) for part in path)
