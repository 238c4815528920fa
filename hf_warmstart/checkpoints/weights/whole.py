"""The weights of a model's folder, grown into another: from files to files, or in memory where that cannot be.

Two kinds, chosen by what the folder holds. `StreamedWeights` never has more than a few blocks of rows in memory.
`LoadedWeights` is for what has no other way: pickled weights, an FSDP run's `pytorch_model_fsdp.bin`, and the few classes
whose loading or saving cannot be followed.
"""

from __future__ import annotations

import copy
import errno
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ...errors import CheckpointError, ExactnessError, UntraceableError
from ...growth.grow import grow
from ...growth.plan import RECORD_KEY, GrowthPlan, GrowthRecord
from ...growth.source import UNQUANTISED, digest, parent_name, quantisation
from ...growth.twin import FAULTS, build
from ...hub.facts import certify_record
from ...hub.save import description, save_grown
from ...version import __version__
from ..fetch import HubPlace
from ..low_disk import HubShards
from ..memory import AHEAD, Pieces
from ..safetensors.layout import INDEX_NAME, SINGLE_NAME, FolderLayout, folder_layout
from ..safetensors.sink import SafetensorsSink
from ..safetensors.source import SafetensorsSource
from ..target.staging import Staging
from ..torch_files.sink import write_errors
from .pieces import Assembled
from .stream import GrownWeights, ParentWeights, stream_weights
from .views import FileView, file_view, loaded_view

FULL_MODEL = "pytorch_model_fsdp.bin"
PICKLED = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
Report = Callable[[int, int], None]
logger = logging.getLogger(__name__)


@dataclass
class StreamedWeights:
    """Weights that are grown from files to files. Nothing is written before `write`; `close` closes the parent's files."""

    plan: GrowthPlan
    folder: Path
    place: HubPlace
    max_shard_size: str | int
    source: SafetensorsSource
    loaded: Mapping[str, Assembled]
    parent: ParentWeights
    grown: GrownWeights
    view: FileView
    generation: GenerationConfig | None
    _digest: str | None = field(default=None, init=False)

    @classmethod
    def open(
        cls,
        plan: GrowthPlan,
        folder: Path,
        place: HubPlace,
        max_shard_size: str | int,
        open_source: Callable[[], SafetensorsSource],
    ) -> StreamedWeights:
        """Check the parent's files, and follow how they are loaded and saved.

        Raises:
            CheckpointError: the files are not what they should be. UntraceableError: they cannot be followed.
        """
        source = open_source()
        try:
            loaded = loaded_view(plan.model_class, plan.source_config, source.specs)
            parent = ParentWeights(source, loaded)
            grown = GrownWeights(plan, parent)
            view = file_view(plan.model_class, plan.target_config, grown.dtypes())
            generation = _generation_config(plan, folder)
        except BaseException:
            source.close()
            raise
        return cls(plan, folder, place, max_shard_size, source, loaded, parent, grown, view, generation)

    @property
    def _tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.view.tensors.items()}

    @cached_property
    def _layout_options(self) -> dict[str, Any]:
        child = build(self.plan.model_class, self.plan.target_config, "meta")
        return {"total_parameters": child.num_parameters(), "storages": self.view.storages}

    @cached_property
    def layout(self) -> FolderLayout:
        """The files that will be written."""
        return folder_layout(self._tensors, self.max_shard_size, **self._layout_options)

    @property
    def nbytes(self) -> int:
        """Bytes of all files of weights and their index, exactly."""
        return self.layout.nbytes

    @property
    def floor(self) -> int:
        """Bytes of the largest piece that cannot be made smaller."""
        return self.grown.largest_piece()

    @property
    def fetched_nbytes(self) -> tuple[int, int]:
        """Bytes that come from the Hub meanwhile: in all, and the most at once; zeros where the files are here."""
        if not isinstance(self.source, HubShards):
            return 0, 0
        needs = [self._needs(file.tensors) for file in self.layout.files]
        return self.source.traffic(needs), self.source.room(needs)

    def _needs(self, names: Iterable[str]) -> frozenset[str]:
        """The parent's files that tensors of the child's files are made of."""
        of_child = {source for name in names for source in self.view.tensors[name].sources}
        of_parent = {source for name in of_child for source in self.loaded[self.plan.source_name(name)].sources}
        return frozenset(self.source.tensors[name].file for name in of_parent)

    def digest(self, pieces: Pieces) -> str:
        """sha256 over the parent's tensors, which is read whole the first time."""
        if self._digest is None:
            self._digest = self.parent.digest(pieces.block)
        return self._digest

    def write(self, staging: Staging, pieces: Pieces, progress: Report, other_nbytes: int) -> GrowthRecord:
        """Write weights, config and card; the record of the growth.

        Args:
            progress: called with bytes that are written, and of how many. other_nbytes: that others will write.

        Raises:
            ExactnessError: a growth that was planned as exact is not. Nothing is written.
            CheckpointError: something could not be read or written, or changed meanwhile.
        """
        config = self._config()
        certificate = certify_record(config)
        if self.plan.exact and not certificate.exact:
            raise ExactnessError(
                f"This growth of {self.plan.model_class.__name__} was planned as exact and is not: {certificate.reason}. Run "
                "certify(source, ...) and report its reason."
            )
        fingerprint = repr((self.source.fingerprint, self.plan.growth_config.to_dict(), __version__))
        sink = SafetensorsSink(
            staging,
            self._tensors,
            max_shard_size=self.max_shard_size,
            fingerprint=fingerprint,
            other_nbytes=other_nbytes,
            buffer_nbytes=pieces.buffers,
            block_nbytes=pieces.block,
            **self._layout_options,
        )
        done = sum(file.nbytes for file, shard in zip(self.layout.files, sink.shards, strict=True) if shard.done)
        total = self.nbytes + other_nbytes
        if kept := sum(shard.done for shard in sink.shards):
            logger.info("Going on after %d of %d files, which an earlier run finished.", kept, len(sink.shards))
        progress(done, total)

        def written(nbytes: int) -> None:
            nonlocal done
            progress(done := done + nbytes, total)

        shards = self.source if isinstance(self.source, HubShards) else None
        if shards is not None:
            todo = [(shard, self._needs(shard.layout)) for shard in sink.shards if not shard.done]
            staging.check_room(total - done + shards.room([files for _, files in todo]))
            shards.expect(todo)
        with sink, ThreadPoolExecutor(1) as beside, self.parent.needed():
            # It reads all tensors by their names: of files that come one by one, the commit in the record says as much.
            digested = None if shards is not None else beside.submit(self.digest, pieces)
            stream_weights(
                self.grown,
                self.view.tensors,
                sink,
                threads=pieces.threads,
                block_bytes=pieces.block,
                window=AHEAD * pieces.threads,
                progress=written,
            )
            sink.finish()
            progress(self.nbytes, total)  # headers and index too
            config = self._config(digested.result() if digested else None)
        self.source.check_unchanged()
        config.save_pretrained(staging.folder)
        if self.generation is not None:
            self.generation.save_pretrained(staging.folder)
        files: dict[str, dict[str, str | int]] = {
            name: {"size": file.size, "sha256": file.sha256} for name, file in staging.finished.items()
        }
        for name, text in description(config, certificate=certificate, files=files).items():
            (staging.folder / name).write_text(text, encoding="utf-8")
        return GrowthRecord.all_of(config)[-1]

    def _config(self, digest: str | None = None) -> PreTrainedConfig:
        """The child's config with its record, as `save_pretrained` writes it."""
        plan = self.plan
        config = copy.deepcopy(plan.target_config)
        record = plan.record(parent_name(plan.source_config), self.place.commit, digest, self.place.subfolder)
        setattr(config, RECORD_KEY, [*(getattr(plan.source_config, RECORD_KEY, None) or []), record.to_dict()])
        config._name_or_path = ""
        config.architectures = [plan.model_class.__name__]
        dtype = next((dtype for dtype in self.grown.dtypes().values() if dtype.is_floating_point), torch.float32)
        config.dtype = str(dtype).removeprefix("torch.")
        return config

    def close(self) -> None:
        """Close the parent's files."""
        self.source.close()


@dataclass
class LoadedWeights:
    """Weights that are grown in memory, parent and child together.

    Args:
        computed: whether the class may compute tensors that its files lack.
    """

    plan: GrowthPlan
    folder: Path
    place: HubPlace
    max_shard_size: str | int
    computed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all files of weights, about: headers are not counted."""
        return self.plan.output_bytes

    @property
    def floor(self) -> int:
        """Bytes that are in memory together."""
        tensors = self.plan.tensor_bytes
        return tensors + tensors * self.plan.parameters_before // self.plan.parameters_after

    def digest(self, pieces: Pieces) -> str:
        """sha256 over the parent's tensors, which is loaded."""
        return digest(self.plan.model_class.from_pretrained(self.folder))

    def write(self, staging: Staging, pieces: Pieces, progress: Report, other_nbytes: int) -> GrowthRecord:
        """Write weights, config and card; the record of the growth."""
        staging.begin("loaded whole")
        staging.check_room(self.nbytes + other_nbytes)
        parent = self._parent()
        parent.config._name_or_path = self.plan.source_config._name_or_path
        child = grow(parent, self.plan.growth_config)
        del parent
        self._tell_place(child)
        try:
            save_grown(child, staging.folder, max_shard_size=self.max_shard_size)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), SINGLE_NAME) from error
        if (self.folder / FULL_MODEL).is_file():
            with write_errors(staging.folder / FULL_MODEL):
                torch.save(child.state_dict(), staging.folder / FULL_MODEL)
        progress(self.nbytes, self.nbytes + other_nbytes)
        return GrowthRecord.all_of(child.config)[-1]

    def _tell_place(self, child: PreTrainedModel) -> None:
        """In the record of the growth, where on the Hub the parent lies: a model in memory does not know."""
        if self.place.commit is not None:
            *before, last = GrowthRecord.all_of(child.config)
            last = replace(last, revision=self.place.commit, subfolder=self.place.subfolder)
            setattr(child.config, RECORD_KEY, [record.to_dict() for record in (*before, last)])

    def _parent(self) -> PreTrainedModel:
        model_class = self.plan.model_class
        try:
            parent, report = model_class.from_pretrained(self.folder, output_loading_info=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"The pickled weights in {self.folder} are damaged, or hold more than plain tensors; nothing of them was run."
            ) from error
        except (*FAULTS, EOFError) as error:
            words = " ".join(str(error).split())
            raise CheckpointError(
                f"{model_class.__name__} cannot be loaded from {self.folder}: {type(error).__name__}: {words}"
            ) from error
        lacking = sorted(set(report["missing_keys"]) & {name for name, _ in parent.named_parameters()})
        if lacking and not self.computed:
            raise CheckpointError(f"The files lack {len(lacking)} tensors of {model_class.__name__}: {lacking}.")
        return parent

    def close(self) -> None:
        """Nothing is open."""


def whole_weights(
    plan: GrowthPlan,
    folder: Path,
    place: HubPlace,
    max_shard_size: str | int,
    shards: Callable[[], HubShards] | None = None,
) -> StreamedWeights | LoadedWeights:
    """The weights of a source, checked; a warning says where they have to be loaded.

    Args:
        place: of the folder on the Hub. shards: opens those that are not in the folder.

    Raises:
        CheckpointError: the files are not what they should be. UntraceableError: they must be loaded, and are not there.
    """
    loaded = LoadedWeights(plan, folder, place, max_shard_size)
    if shards is None and ((folder / FULL_MODEL).is_file() or not has_safetensors(folder)):
        return loaded
    try:
        open_source = shards or partial(SafetensorsSource, folder)
        return StreamedWeights.open(plan, folder, place, max_shard_size, open_source)
    except UntraceableError as error:
        if shards is not None:
            raise UntraceableError(f"{error} So it is grown in memory: leave low_disk out.") from error
        logger.warning("%s is grown in memory: %s", plan.model_class.__name__, error)
        return replace(loaded, computed=True)


def check_weights(folder: Path) -> None:
    """Raise `CheckpointError` where a folder has no weights of any kind that is read."""
    if not any(os.path.lexists(folder / name) for name in (SINGLE_NAME, INDEX_NAME, FULL_MODEL, *PICKLED)):
        SafetensorsSource(folder)


def _generation_config(plan: GrowthPlan, folder: Path) -> GenerationConfig | None:
    """What a loaded parent would hand on.

    Raises:
        CheckpointError: it is damaged, or transformers would not save it.
    """
    if not plan.model_class.can_generate():
        return None
    if not (folder / GENERATION_CONFIG_NAME).is_file():
        return build(plan.model_class, plan.source_config, "meta").generation_config
    try:
        generation = GenerationConfig.from_pretrained(folder)
        with tempfile.TemporaryDirectory() as nowhere:
            generation.save_pretrained(nowhere)
    except FAULTS as error:
        raise CheckpointError(
            f"{GENERATION_CONFIG_NAME} in {folder} cannot be used: {type(error).__name__}: {error}"
        ) from error
    return generation


def has_safetensors(folder: Path) -> bool:
    """Whether weights of a folder are read by rows."""
    return any((folder / name).exists() for name in (SINGLE_NAME, INDEX_NAME))


def refuse_quantised(config: PreTrainedConfig, folder: Path, shards: Callable[[], HubShards] | None = None) -> None:
    """Raise where weights are not plain numbers; arguments as for `whole_weights`.

    Raises:
        CheckpointError: the config says so, or the files hold eight-bit floats.
    """
    if (method := quantisation(config)) is not None:
        raise CheckpointError(f"The weights are quantised ({method}), and no map follows that. {UNQUANTISED}")
    if shards is None and not has_safetensors(folder):
        return
    with (shards or partial(SafetensorsSource, folder))() as source:
        odd = sorted(n for n, t in source.tensors.items() if t.dtype.is_floating_point and t.dtype.itemsize == 1)
    if odd:
        raise CheckpointError(
            f"{len(odd)} tensors are FP8 ({', '.join(odd[:3])}), and no map follows their scales. {UNQUANTISED}"
        )
