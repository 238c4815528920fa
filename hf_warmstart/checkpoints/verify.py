"""`verify`: is a folder what its record says: the growth of that parent, byte for byte?

Four checks, none of which builds a model: the sha256 of every file of weights against `growth.json`, the settings in
`config.json` against those of the growth, blocks of rows made anew from the parent against those in the folder (a sample, or
all of them), and the parent's digest against the record's (with all blocks, or where something differs).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import CheckpointError, UntraceableError, WarmstartError
from ..growth.config import GrowthConfig
from ..growth.plan import RECORD_KEY, GrowthPlan, GrowthRecord, make_plan
from ..growth.source import class_and_config
from ..hub.facts import is_hub_id
from ..version import __version__
from .fetch import local_folder
from .grow_checkpoint import one_thread_each
from .memory import AHEAD, processors
from .records import checksums, last_record, parents_subfolder
from .safetensors.format import nbytes_of, some
from .safetensors.source import SafetensorsSource
from .weights.pieces import Assembled
from .weights.stream import GrownWeights, ParentWeights, ahead, blocks_of, matrix_rows
from .weights.views import file_view, loaded_view

BLOCK_BYTES = 4 * 2**20
READ_BYTES = 2**20
# What a config says of where it came from and how it is used; dtypes are those of the tensors, which are compared.
NOT_COMPARED = {
    *(RECORD_KEY, "_name_or_path", "transformers_version", "architectures"),
    *("dtype", "use_cache", "return_dict"),
}


@dataclass(frozen=True)
class Verification:
    """What was found of a grown folder.

    Args:
        files: each file of weights, in the folder or in `growth.json`: whether both have it, with one sha256. Empty where
            `growth.json` has no checksums.
        settings: the names in `config.json` whose values are not those of the growth.
        parent_unchanged: whether the parent's tensors are those of the record; None where that was not compared.
        blocks: how many blocks of rows were made anew, of how many there are.
        differing: the tensors of another dtype or shape, or in which a block differs. missing: those that a growth would
            write and the folder lacks. unknown: those that it has beside.
        library_version: the version that grew it.
    """

    files: dict[str, bool] = field(default_factory=dict)
    settings: list[str] = field(default_factory=list)
    parent_unchanged: bool | None = None
    blocks: tuple[int, int] = (0, 0)
    differing: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    library_version: str = __version__

    @property
    def ok(self) -> bool:
        """Whether everything that was checked holds."""
        return not self._wrong

    @property
    def reason(self) -> str:
        """What holds, or what does not."""
        if wrong := self._wrong:
            grown_by = f" (grown by version {self.library_version})" if self.library_version != __version__ else ""
            return "; ".join(wrong) + grown_by
        sums = f"{len(self.files)} files have their sha256" if self.files else "growth.json has no checksums"
        return f"{sums}; {self.blocks[0]} of {self.blocks[1]} blocks made anew are the same, bit for bit"

    @property
    def _wrong(self) -> list[str]:
        found = {
            "files are not those of growth.json": [name for name, same in self.files.items() if not same],
            "settings in config.json are not the growth's": self.settings,
            "tensors are not the growth's": self.differing,
            "tensors are missing": self.missing,
            "tensors are of no growth": self.unknown,
        }
        wrong = ["the parent's tensors are not those that were grown"] if self.parent_unchanged is False else []
        return wrong + [f"{len(names)} {words}: {some(names)}" for words, names in found.items() if names]


@dataclass(frozen=True)
class _Check:
    """One thing to look at: a file or a tensor, the bytes that are read for it, and whether it holds."""

    name: str
    nbytes: int
    holds: Callable[[], bool]


def verify(
    folder: str | os.PathLike,
    parent: str | os.PathLike | None = None,
    *,
    blocks: int | None = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Check a grown folder against its record, its checksums and its parent.

    Args:
        folder: written by `grow_checkpoint`, or by `save_pretrained` of a model that was grown on a CPU, and not trained
            since; or its Hub id.
        parent: the folder or Hub id of the parent; by default the Hub id that the record names.
        blocks (`int`, *optional*, defaults to 64): how many blocks of about 4 MiB to make anew, chosen at random; None for
            all, which also reads the whole parent for its digest.
        seed (`int`, defaults to 0): of the choice.
        progress: called with the bytes that are checked, and of how many.

    Returns:
        The `Verification`; nothing is changed.

    Raises:
        WarmstartError: there is no record, no parent to compare with, or another model than the record's parent.
        CheckpointError: files that cannot be read, or change meanwhile.

    Example:

        >>> verify("runs/grown", "runs/base").ok                                                 # doctest: +SKIP
        True
    """
    if blocks is not None and blocks < 0:
        raise WarmstartError(f"blocks={blocks} cannot be made. Pass 0 or more, or None for all.")
    folder = local_folder(folder)
    record = last_record(folder)
    parent_folder = _parent_folder(parent, record)
    config, plan = _growth(folder, parent_folder, record)
    with SafetensorsSource(parent_folder) as source, SafetensorsSource(folder) as child:
        try:
            weights = ParentWeights(source, loaded_view(plan.model_class, plan.source_config, source.specs))
            grown = GrownWeights(plan, weights)
            files = file_view(plan.model_class, plan.target_config, grown.dtypes()).tensors
        except UntraceableError as error:
            raise UntraceableError(
                f"{plan.model_class.__name__} is grown in memory, so no part of it can be made anew alone: {error} Grow it "
                f"again (hf-warmstart grow {parent_folder} NEW --record {folder}) and compare the files."
            ) from error
        expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in files.items()}
        common = [name for name in files if child.specs.get(name) == expected[name]]
        rows = [check for name in common for check in _row_checks(name, files[name], grown, child)]
        chosen = rows
        if blocks is not None:  # in the files' order, so that what is of a whole tensor is taken once
            numbers = random.Random(seed).sample(range(len(rows)), min(blocks, len(rows)))
            chosen = [rows[number] for number in sorted(numbers)]
        listed, present = checksums(folder), {tensor.file for tensor in child.tensors.values()}
        sums = [_file_check(folder, name, listed[name]) for name in sorted(present & set(listed))]
        same = {name: name in present and name in listed for name in sorted(present | set(listed)) if listed}
        differing = {name for name in expected if name in child.tensors} - set(common)
        with ThreadPoolExecutor(1) as beside, weights.needed():
            digested = beside.submit(weights.digest, BLOCK_BYTES) if blocks is None else None
            for check in _failed([*sums, *chosen], progress):
                if check in sums:
                    same[check.name] = False
                else:
                    differing.add(check.name)
            if digested is None and differing:  # whose fault is it?
                digested = beside.submit(weights.digest, BLOCK_BYTES)
            unchanged = None
            if digested is not None and record.parent_digest is not None:
                unchanged = digested.result() == record.parent_digest
        source.check_unchanged()
        child.check_unchanged()
        return Verification(
            same,
            _different(config, plan.target_config),
            unchanged,
            (len(chosen), len(rows)),
            sorted(differing),
            sorted(set(files) - set(child.tensors)),
            sorted(set(child.tensors) - set(files)),
            record.library_version,
        )


def _parent_folder(given: str | os.PathLike | None, record: GrowthRecord) -> Path:
    """Where the parent's files are."""
    if given is not None:
        return local_folder(given, subfolder=parents_subfolder(record, given))
    if not is_hub_id(record):
        named = f"names the parent {record.parent!r}, which is no Hub id" if record.parent else "names no parent"
        raise WarmstartError(f"The record {named}. Pass the folder or Hub id of the parent.")
    return local_folder(record.parent, record.revision, record.subfolder)


def _growth(folder: Path, parent_folder: Path, record: GrowthRecord) -> tuple[PreTrainedConfig, GrowthPlan]:
    """The folder's config, and the plan that its record and its parent give.

    Raises:
        WarmstartError: the parent is none that the record can be of.
    """
    model_class, config = class_and_config(folder)
    parent_class, parent_config = class_and_config(parent_folder)
    settings = _plain(parent_config.to_dict())
    wrong = [
        f"{name} is {settings.get(name)!r}, not {before!r}"
        for name, (before, _) in record.changes.items()
        if name not in NOT_COMPARED and settings.get(name) != _plain(before)
    ]
    if parent_class is not model_class:
        wrong.insert(0, f"it is a {parent_class.__name__}, not a {model_class.__name__}")
    if wrong:
        raise WarmstartError(
            f"{parent_folder} is not the parent that the record of {folder} tells of: {'; '.join(wrong[:5])}. Pass the "
            "folder or Hub id that was grown."
        )
    return config, make_plan(model_class, parent_config, GrowthConfig.from_dict(record.growth_config))


def _different(config: PreTrainedConfig, expected: PreTrainedConfig) -> list[str]:
    """Names of the settings in which a config is not what `save_pretrained` and loading make of another."""
    again = type(expected).from_dict(json.loads(expected.to_json_string()))
    ours, theirs = _plain(config.to_dict()), _plain(again.to_dict())
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))


def _plain(settings: Any) -> Any:
    """Settings as JSON has them, those that are not compared left out at every level."""
    if isinstance(settings, Mapping):
        return {str(name): _plain(value) for name, value in settings.items() if name not in NOT_COMPARED}
    return [_plain(value) for value in settings] if isinstance(settings, (list, tuple)) else settings


def _row_checks(name: str, tensor: Assembled, grown: GrownWeights, child: SafetensorsSource) -> Iterator[_Check]:
    """Checks of a tensor's rows, block by block."""
    for start, stop in blocks_of(tensor, BLOCK_BYTES):
        nbytes = nbytes_of(tensor.dtype, (stop - start, *tensor.shape[-1:]))
        yield _Check(name, nbytes, partial(_same_rows, child, name, tensor, start, stop, grown))


def _same_rows(
    child: SafetensorsSource, name: str, tensor: Assembled, start: int, stop: int, grown: GrownWeights
) -> bool:
    """Whether rows of a tensor's matrix form, made anew, are those in the folder, as bytes, so that NaNs compare too."""
    made = matrix_rows(tensor, start, stop, grown.region)
    there = child.read_entries(name, start * made.shape[1], stop * made.shape[1])
    return torch.equal(there.view(torch.uint8), made.flatten().view(torch.uint8))


def _file_check(folder: Path, name: str, sha256: str) -> _Check:
    return _Check(name, (folder / name).stat().st_size, lambda: _sha256(folder / name) == sha256)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def _failed(checks: list[_Check], progress: Callable[[int, int], None]) -> Iterator[_Check]:
    """The checks that do not hold."""
    done, total = 0, sum(check.nbytes for check in checks)
    threads = processors()
    with one_thread_each(), ahead((check.holds for check in checks), threads, AHEAD * threads) as results:
        for check, holds in zip(checks, results, strict=True):
            progress(done := done + check.nbytes, total)
            if not holds:
                yield check
