"""Which files a folder of safetensors has, and all bytes of them but the tensors', from dtypes and shapes alone.

As `save_pretrained` packs them: `model.safetensors`, or shards in the order of the tensors and an index beside them.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...errors import CheckpointError
from .format import FileTensor, build_header, nbytes_of

TensorSpec = tuple[torch.dtype, tuple[int, ...]]
SINGLE_NAME = SAFE_WEIGHTS_NAME
INDEX_NAME = SAFE_WEIGHTS_INDEX_NAME
FILENAME_PATTERN = SINGLE_NAME.replace(".safetensors", "{suffix}.safetensors")


@dataclass(frozen=True)
class FileLayout:
    """A file: its name, all bytes before the data, and the tensors' places in the order of the file."""

    name: str
    header: bytes = field(repr=False)
    tensors: Mapping[str, FileTensor] = field(repr=False)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(place.nbytes for place in self.tensors.values())


@dataclass(frozen=True)
class FolderLayout:
    """All files, in order; `index` is the text of `model.safetensors.index.json`, None where there is one file."""

    files: tuple[FileLayout, ...]
    index: bytes | None = field(repr=False)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all files and the index."""
        return sum(file.nbytes for file in self.files) + len(self.index or b"")


def folder_layout(
    tensors: Mapping[str, TensorSpec],
    max_shard_size: str | int = "5GB",
    *,
    total_parameters: int | None = None,
    storages: Mapping[str, tuple[Hashable, int]] | None = None,
) -> FolderLayout:
    """The files of a folder, as `save_pretrained` would write it.

    Args:
        tensors: name -> (dtype, shape), in the order of the state dict that would be saved.
        max_shard_size (`str` or `int`, defaults to `"5GB"`): bytes of tensors in one file; a larger tensor has its own.
        total_parameters: what the index gives as such, `model.num_parameters()`; by default the entries of all tensors
            (of a model with tied weights, buffers or fused experts that need not be the same).
        storages: name -> (which storage, its bytes), for tensors that `save_pretrained` would find to be views of a
            common storage: it counts the storage once and keeps the views in one file.

    Raises:
        CheckpointError: no tensors, or a dtype or name that the format does not know.
        WarmstartError: `max_shard_size` cannot be read.
    """
    if not tensors:
        raise CheckpointError("A folder without tensors cannot be written. Pass at least one.")
    shared = storages or {}
    items = {
        name: (name, *shared.get(name, (None, nbytes_of(dtype, tuple(shape)))))
        for name, (dtype, shape) in tensors.items()
    }
    try:
        split = split_state_dict_into_shards_factory(
            items,
            get_storage_size=lambda item: item[2],
            get_storage_id=lambda item: item[1],
            filename_pattern=FILENAME_PATTERN,
            max_shard_size=max_shard_size,
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"max_shard_size {max_shard_size!r} is no size: {error}") from error
    files = []
    for file, names in split.filename_to_tensors.items():
        header, places = build_header({name: (tensors[name][0], tuple(tensors[name][1])) for name in names}, file)
        files.append(FileLayout(file, header, places))
    if not split.is_sharded:
        return FolderLayout(tuple(files), None)
    if total_parameters is None:
        total_parameters = sum(nbytes_of(dtype, tuple(shape)) // dtype.itemsize for dtype, shape in tensors.values())
    index = {
        "metadata": {"total_parameters": total_parameters, **split.metadata},
        "weight_map": split.tensor_to_filename,
    }
    return FolderLayout(tuple(files), (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def folder_bytes(
    tensors: Mapping[str, TensorSpec],
    max_shard_size: str | int = "5GB",
    *,
    total_parameters: int | None = None,
    storages: Mapping[str, tuple[Hashable, int]] | None = None,
) -> int:
    """Exact bytes of all files of a folder, headers and index included; arguments as for `folder_layout`."""
    return folder_layout(tensors, max_shard_size, total_parameters=total_parameters, storages=storages).nbytes
