"""`verify`: is a folder what its record says: the growth of that parent, byte for byte?

Three checks, each without a model: the sha256 of every file of weights against `growth.json`, the parent's digest against
the record, and blocks of rows made anew from the parent and compared with those in the folder; a sample, or all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import CheckpointError, WarmstartError
from ..growth.config import GrowthConfig
from ..growth.plan import make_plan
from ..growth.source import class_and_config
from ..growth.transform import matrix_shape
from ..hub.facts import records_of
from ..hub.save import GROWTH_NAME
from ..version import __version__
from .safetensors_source import SafetensorsSource
from .stream import GrownWeights, ParentWeights, blocks_of, matrix_rows
from .views import file_view, loaded_view

BLOCK_BYTES = 4 * 2**20
READ_BYTES = 2**20


@dataclass(frozen=True)
class Verification:
    """What was found of a grown folder.

    Args:
        files: each file of weights: whether its sha256 is that of `growth.json`; empty where that holds none.
        parent_unchanged: whether the parent's tensors are those of the record; None where the record has no digest of them.
        blocks: how many blocks of rows were made anew, of how many there are.
        differing: the tensors in which a block differs; missing: those that a growth would write and the folder lacks;
            unknown: those that it has beside.
        library_version: the version that grew it.
    """

    files: dict[str, bool] = field(default_factory=dict)
    parent_unchanged: bool | None = None
    blocks: tuple[int, int] = (0, 0)
    differing: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    library_version: str = __version__

    @property
    def ok(self) -> bool:
        """Whether everything that was checked holds."""
        wrong = self.differing or self.missing or self.unknown or self.parent_unchanged is False
        return not wrong and all(self.files.values())

    @property
    def reason(self) -> str:
        """What holds, or what does not."""
        wrong = [f"{name} has another sha256 than growth.json says" for name, same in self.files.items() if not same]
        if self.parent_unchanged is False:
            wrong.append("the parent's tensors are not those that were grown")
        for names, words in (
            (self.differing, "differ from the growth"),
            (self.missing, "are missing"),
            (self.unknown, "are of no growth"),
        ):
            if names:
                wrong.append(f"{len(names)} tensors {words}: {', '.join(names[:5])}")
        if wrong:
            grown_by = f" (grown by version {self.library_version})" if self.library_version != __version__ else ""
            return "; ".join(wrong) + grown_by
        sums = f"{len(self.files)} files have their sha256" if self.files else "growth.json has no checksums"
        return f"{sums}; {self.blocks[0]} of {self.blocks[1]} blocks made anew are the same, bit for bit"


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
        folder: written by `grow_checkpoint` or `save_pretrained` of a grown model, and not trained since.
        parent: the folder or Hub id of the parent; by default the Hub id that the record names.
        blocks (`int`, *optional*, defaults to 64): how many blocks of about 4 MiB to make anew, chosen at random; None for
            all, which also reads the whole parent for its digest.
        seed (`int`, defaults to 0): of the choice.
        progress: called with the bytes that are checked, and of how many.

    Raises:
        WarmstartError: there is no record, or no parent to compare with. CheckpointError: files that cannot be read.

    Example:

        >>> verify("runs/grown", "runs/base").ok                                                 # doctest: +SKIP
        True
    """
    folder = Path(folder)
    model_class, config = class_and_config(folder)
    record = records_of(config)[-1]
    parent_folder = _parent_folder(parent, record.parent, record.revision)
    _, parent_config = class_and_config(parent_folder)
    plan = make_plan(model_class, parent_config, GrowthConfig.from_dict(record.growth_config))
    with SafetensorsSource(parent_folder) as source, SafetensorsSource(folder) as child:
        view = loaded_view(model_class, parent_config, source.specs)
        weights = ParentWeights(source, view)
        grown = GrownWeights(plan, weights)
        files = file_view(model_class, plan.target_config, grown.dtypes()).tensors
        common = [name for name in files if name in child.tensors]
        every = [(name, rows) for name in common for rows in blocks_of(files[name], BLOCK_BYTES)]
        chosen = every if blocks is None else random.Random(seed).sample(every, min(blocks, len(every)))
        checksums = _checksums(folder)
        total = len(chosen) * BLOCK_BYTES + sum((folder / name).stat().st_size for name in checksums)
        done = 0
        same = {}
        for name, expected in checksums.items():
            same[name] = _sha256(folder / name) == expected
            progress(done := done + (folder / name).stat().st_size, total)
        differing: list[str] = []
        for name, (start, stop) in sorted(chosen):
            if not _same_bits(child, name, matrix_rows(files[name], start, stop, grown.region), start):
                differing += [name] if name not in differing else []
            progress(done := done + BLOCK_BYTES, total)
        unchanged = None
        if blocks is None and record.parent_digest is not None:
            unchanged = weights.digest(BLOCK_BYTES) == record.parent_digest
        source.check_unchanged()
        child.check_unchanged()
        return Verification(
            same,
            unchanged,
            (len(chosen), len(every)),
            differing,
            sorted(set(files) - set(child.tensors)),
            sorted(set(child.tensors) - set(files)),
            record.library_version,
        )


def _parent_folder(given: str | os.PathLike | None, name: str, revision: str | None) -> Path:
    """Where the parent's files are."""
    from .fetch import local_folder

    if given is None and not name:
        raise WarmstartError("The record names no parent. Pass the folder or Hub id of the parent.")
    if given is None and "/" not in name:
        raise WarmstartError(f"The record names the parent {name!r}, a folder. Pass where it is.")
    return local_folder(given if given is not None else name, revision if given is None else None)


def _checksums(folder: Path) -> dict[str, str]:
    """sha256 by file, from `growth.json`.

    Raises:
        CheckpointError: a file is missing, or what there is cannot be read.
    """
    path = folder / GROWTH_NAME
    if not path.is_file():
        return {}
    try:
        files = json.loads(path.read_text(encoding="utf-8")).get("files") or {}
        found = {str(name): str(file["sha256"]) for name, file in files.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if odd := sorted(name for name in found if Path(name).name != name or not (folder / name).is_file()):
        raise CheckpointError(f"{GROWTH_NAME} names files that {folder} does not hold: {', '.join(odd[:5])}.")
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _same_bits(child: SafetensorsSource, name: str, made: torch.Tensor, start: int) -> bool:
    """Whether rows of a tensor's matrix form are those in the folder, as bytes, so that NaNs compare too."""
    tensor, columns = child.tensors[name], made.shape[1]
    if tensor.dtype != made.dtype or columns != matrix_shape(tensor.shape)[1]:
        return False
    there = child.read_entries(name, start * columns, (start + len(made)) * columns)
    return torch.equal(there.view(torch.uint8), made.flatten().view(torch.uint8))
