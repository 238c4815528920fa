"""`grow_checkpoint`: a checkpoint in, a grown one out, weights and training state in the form that they came in.

| source | weights | optimizer |
|---|---|---|
| a model's folder, a Hub id | safetensors | |
| `Trainer`, `Accelerator.save_state` | safetensors | `optimizer.pt` / `.bin`, numbered |
| FSDP, full state | safetensors, `pytorch_model_fsdp.bin` | `optimizer.bin`, named |
| FSDP2, sharded | `pytorch_model_fsdp_0/` | `optimizer_0/` |

Weights and state go from files to files, some rows at a time. Under `torch.distributed` every rank takes part in growing a
sharded checkpoint.

Everything is checked before the first byte is written, and written to a folder beside the target, which takes its name when
it is complete and on the disk. A run that dies leaves the target as it was, and running it again goes on behind the last
complete file of weights. Files beside weights and state (tokenizer, chat template, processor,
code, random states) are copied as they are, folders are not.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import CheckpointError, WarmstartError
from ..growth.config import GrowthConfig
from ..growth.plan import RECORD_KEY, GrowthPlan, GrowthRecord, make_plan
from ..growth.source import class_and_config
from ..growth.state import check_state_policy
from ..hub.save import CARD_NAME, GROWTH_NAME
from .fetch import HubPlace, checked_subfolder, commit_of, local_folder
from .low_disk import HubRepository, HubShards
from .memory import Pieces, anonymous_memory, bytes_of, give_back, pieces
from .ranks import barrier, on_main
from .safetensors.source import leads_out
from .state.parent_state import GROWN_NAME, SCHEDULER_NAMES
from .state.trainer_files import OPTIMIZER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from .state.training_files import TrainingFiles
from .target.staging import Staging, journal_path, staging_folder, write_faults
from .torch_files.sharded import is_sharded
from .weights.plausible import check_size
from .weights.sharded import SHARDED_MODEL, ShardedWeights
from .weights.whole import LoadedWeights, StreamedWeights, check_weights, refuse_quantised, whole_weights

logger = logging.getLogger(__name__)
# What a growth writes anew or leaves out; every other file is taken along as it is.
WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "tf_model*", "flax_model*", "rust_model*"),
    *("*.gguf", "*.onnx", "consolidated*", "adapter_*"),
)
DESCRIPTION = ("config.json", "generation_config.json", CARD_NAME, GROWTH_NAME, TRAINING_ARGS_NAME)
STATE = (
    *(OPTIMIZER_NAME, "optimizer*.bin", GROWN_NAME, *SCHEDULER_NAMES, TRAINER_STATE_NAME),
    *("latest", "zero_to_fp32.py"),  # DeepSpeed's
)


def _no_report(done: int, total: int) -> None:
    """Where nobody looks."""


@dataclass(frozen=True)
class CheckpointGrowth:
    """A growth of a checkpoint that was checked and not begun; `prepare_growth` makes it, `close` ends it.

    Args:
        plan: of the weights. folder: the source's files. target: the folder to be.
        weights, training: what writes them. pieces: what is held at once.
    """

    plan: GrowthPlan
    folder: Path
    target: Path
    weights: StreamedWeights | LoadedWeights | ShardedWeights
    training: TrainingFiles | None
    pieces: Pieces

    @property
    def output_bytes(self) -> int:
        """Bytes of weights, their index and the optimizer's file: exact where they are safetensors and one file."""
        weights = self.plan.output_bytes if isinstance(self.weights, ShardedWeights) else self.weights.nbytes
        return weights + self._state_bytes

    @property
    def fetched_bytes(self) -> tuple[int, int]:
        """Bytes that `low_disk` fetches, in all and the most on the disk at once; zeros without it."""
        return self.weights.fetched_nbytes if isinstance(self.weights, StreamedWeights) else (0, 0)

    @property
    def _state_bytes(self) -> int:
        return 0 if self.training is None else self.training.nbytes

    @property
    def peak_memory_bytes(self) -> int:
        """The most anonymous memory that this process will have, in bytes: what it has now, and the pieces."""
        return anonymous_memory() + self.pieces.peak

    def check_parent(self, record: GrowthRecord) -> None:
        """Compare the parent with a record of its growth: its tensors, which are all read, or else its commit.

        Raises:
            CheckpointError: it is not what was grown.
        """
        weights = self.weights
        at_hand = isinstance(weights, LoadedWeights) or (
            isinstance(weights, StreamedWeights) and not isinstance(weights.source, HubShards)
        )
        commit = None if isinstance(weights, ShardedWeights) else weights.place.commit
        if at_hand and record.parent_digest is not None:
            found, expected, what = weights.digest(self.pieces), record.parent_digest, "tensors have the sha256"  # type: ignore[union-attr]
        elif commit is not None and record.revision is not None:
            found, expected, what = commit, record.revision, "commit is"
        else:
            logger.warning(
                "Whether this is the record's parent is not known: there is no digest or commit to compare."
            )
            return
        if found != expected:
            raise CheckpointError(
                f"{self.folder} is not the parent that the record tells of: its {what} {found}, not {expected}. Pass the "
                "parent as it was when it was grown"
                + (f": {record.parent}, revision {record.revision}" if record.revision else "")
                + (f", subfolder {record.subfolder}." if record.subfolder else ".")
            )

    def run(self, progress: Callable[[int, int], None] = _no_report) -> GrowthRecord:
        """Grow; every rank takes part.

        Raises:
            CheckpointError: something could not be read or written, or changed meanwhile; the target is as it was.
        """
        staging = on_main_alone(lambda: Staging(self.target))
        try:
            with write_faults(self.target.name, self.target), one_thread_each():
                record = self._written(staging, progress)
        except BaseException:
            if staging is not None:
                staging.leave()
            raise
        return record

    def _written(self, staging: Staging | None, progress: Callable[[int, int], None]) -> GrowthRecord:
        made = staging_folder(self.target)
        state_bytes = self._state_bytes
        if isinstance(self.weights, ShardedWeights):
            on_main(lambda: staging.begin("sharded") and None)  # type: ignore[union-attr]
            record = self.weights.write(made, self.pieces)
        else:
            weights = self.weights
            record = on_main(lambda: weights.write(staging, self.pieces, progress, state_bytes))  # type: ignore[arg-type]
        if self.training is not None:
            give_back()
            done, total = self.output_bytes - state_bytes, self.output_bytes

            def written(nbytes: int) -> None:
                nonlocal done
                progress(done := min(done + nbytes, total), total)

            self.training.write(made, self.pieces, written)
        barrier()

        def finish() -> None:
            _copy_other_files(self.folder, made)
            staging.publish()  # type: ignore[union-attr]

        on_main(finish)
        return record

    def close(self) -> None:
        """Close the source's files."""
        if not isinstance(self.weights, ShardedWeights):
            self.weights.close()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Context in which torch's operations run on the thread that calls them: blocks are what is shared out here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def on_main_alone(work: Callable[[], Staging]) -> Staging | None:
    """What the main rank's work gives, there; None on the others, which fail with it."""
    made: list[Staging] = []
    on_main(lambda: made.append(work()))
    return made[0] if made else None


def prepare_growth(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    growth_config: GrowthConfig | PreTrainedConfig | None = None,
    *,
    state_policy: str = "carry",
    max_shard_size: str | int = "5GB",
    max_memory: str | int | None = None,
    threads: int | None = None,
    revision: str | None = None,
    subfolder: str = "",
    low_disk: bool = False,
    **options: Any,
) -> CheckpointGrowth:
    """Check everything that can be checked of a growth, and say what it will take; nothing is written.

    Args, Raises: as for `grow_checkpoint`.
    """
    check_state_policy(state_policy)
    shard_bytes = bytes_of(max_shard_size, "max_shard_size")
    pieces(max_memory, threads)  # what cannot be is told before anything is read
    target = _checked_target(output_dir)
    asked = GrowthConfig.of(growth_config, options)
    subfolder = checked_subfolder(subfolder)
    where: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "state": bool(subfolder)}
    repository = HubRepository.find(str(source), **where) if low_disk else None
    folder = repository.folder if repository else local_folder(source, **where)
    shards = partial(HubShards, repository, target.parent / f".{target.name}.fetched") if repository else None
    _check_apart(target, folder)
    model_class, config = class_and_config(folder)
    _check_records(config)
    place = HubPlace()
    if not Path(source).is_dir():
        config._name_or_path, place = str(source), HubPlace(commit_of(folder, subfolder), subfolder)
    refuse_quantised(config, folder, shards)
    sharded = is_sharded(folder / SHARDED_MODEL)
    if shards is None:
        if not sharded:
            check_weights(folder)
        check_size(model_class, config, folder)
    plan = make_plan(model_class, config, asked)
    with ExitStack() as opened:
        weights: StreamedWeights | LoadedWeights | ShardedWeights
        if sharded:
            weights = ShardedWeights(plan, folder)
        else:
            weights = whole_weights(plan, folder, place, shard_bytes, shards)
            opened.callback(weights.close)
        training = TrainingFiles.of(folder, plan, state_policy)
        # Last, since the promise is of all that the process has, and reading a state takes its share.
        if isinstance(weights, ShardedWeights):
            sizes = pieces(None, threads, with_state=training is not None)
        else:
            sizes = pieces(max_memory, threads, weights.floor, with_state=training is not None)
        opened.pop_all()
    return CheckpointGrowth(plan, folder, target, weights, training, sizes)


def _checked_target(output_dir: str | os.PathLike) -> Path:
    """The folder to be, links resolved: new or empty, and one that can be made."""
    try:
        target = Path(os.path.realpath(output_dir))  # a link stays one, to the folder that is written
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{target} is not empty. Pass a new folder; nothing is overwritten.")
        above = next(folder for folder in target.parents if folder.exists())
        longest = os.statvfs(above).f_namemax
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{str(output_dir)!r} cannot be the target: {error}. Pass the path of a folder."
        ) from error
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise CheckpointError(f"{target} cannot be made: {above} is no folder that this process may write to.")
    if len(os.fsencode(journal_path(target).name)) > longest:
        raise CheckpointError(f"{target} cannot be written: its name is too long for what lies beside it meanwhile.")
    return target


def _check_records(config: PreTrainedConfig) -> None:
    """What the source's own growths left in its config can be carried on."""
    try:
        GrowthRecord.all_of(config)
    except TypeError as error:
        raise WarmstartError(f"{RECORD_KEY} in the source's config.json holds no growth records: {error}") from error


def _check_apart(target: Path, folder: Path) -> None:
    """Source and target do not lie in each other: nothing of the source may change, nor what is unfinished be read."""
    real = Path(os.path.realpath(folder))
    if target.is_relative_to(real):
        raise CheckpointError(
            f"{target} lies in the source, {real}. Pass a folder outside of it; the source stays as it is."
        )
    if real.is_relative_to(staging_folder(target)):
        raise CheckpointError(f"{real} is what an unfinished run to {target} left. Pass the source of that run.")


def grow_checkpoint(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    growth_config: GrowthConfig | PreTrainedConfig | None = None,
    *,
    state_policy: str = "carry",
    max_shard_size: str | int = "5GB",
    max_memory: str | int | None = None,
    threads: int | None = None,
    revision: str | None = None,
    subfolder: str = "",
    low_disk: bool = False,
    progress: Callable[[int, int], None] = _no_report,
    **options: Any,
) -> GrowthRecord:
    """Grow a checkpoint on disk or on the Hub, with the training state that it holds.

    Args:
        source: a model's folder, a checkpoint of `Trainer` (one device, DDP, FSDP), a folder of `Accelerator.save_state`
            with the model's `config.json` in it, or a Hub id.
        output_dir: the new folder; it must not exist, or be empty. `from_pretrained` loads it, and where the source held
            training state, training resumes from it (`train(resume_from_checkpoint=output_dir)`).
        growth_config: what to grow; or its fields as keywords; or the target's config.
        state_policy (`str`, defaults to `"carry"`): as for `grow_optimizer_state`. Under `"reset"` the optimizer's file
            keeps the settings of its groups and no state, so that the schedule goes on; of an FSDP model neither is written.
        max_shard_size (`str` or `int`, defaults to `"5GB"`): of the safetensors files.
        max_memory (`str` or `int`, *optional*): the most anonymous memory that the process may take, such as `"2GB"`, what it
            has already included. By default pieces of some megabytes, whatever the model's size.
        threads (`int`, *optional*): that compute; by default one for each processor but one, which hashes and writes, at most
            eight. No byte depends on it.
        revision (`str`, *optional*): branch, tag or commit of a Hub id; the record keeps the commit.
        subfolder (`str`, *optional*): of the source, such as `"checkpoint-500"` where `hub_strategy="all_checkpoints"` put it;
            of a Hub id its training state is fetched too, and the record keeps it.
        low_disk (`bool`, defaults to `False`): of a Hub id, fetch a file of weights when it is needed and drop it again, rather
            than keep all in the Hub's cache: beside the new folder lie the few files that two of its own are made of. The
            record then names the parent by its commit alone, without a digest of its tensors.
        progress: called with the bytes that are written, and of how many.
        **options: fields of `GrowthConfig`, or sizes by their transformers names.

    Returns:
        The `GrowthRecord`.

    Raises:
        WarmstartError: the growth cannot be done, the source is incomplete, or the target is not empty. Nothing is written.
        CheckpointError: files that are damaged, lie about themselves or change while they are read, a disk that is full, or
            another run on the same target. The target is as it was; what is finished stays beside it for the next run.

    Example:

        >>> record = grow_checkpoint("runs/base/checkpoint-500", "runs/grown", width=2)          # doctest: +SKIP
    """
    growth = prepare_growth(
        source,
        output_dir,
        growth_config,
        state_policy=state_policy,
        max_shard_size=max_shard_size,
        max_memory=max_memory,
        threads=threads,
        revision=revision,
        subfolder=subfolder,
        low_disk=low_disk,
        **options,
    )
    try:
        return growth.run(progress)
    finally:
        growth.close()


def _copy_other_files(folder: Path, made: Path) -> None:
    """Tokenizer, processor, code, random states, our own notes: what is neither weights nor written anew."""
    for path in folder.iterdir():
        known = any(fnmatchcase(path.name, pattern) for pattern in (*WEIGHTS, *DESCRIPTION, *STATE))
        if path.is_file() and not known and not (made / path.name).exists():
            if leads_out(folder, path):
                logger.warning("%s is a link out of %s, and was not taken along.", path.name, folder)
                continue
            shutil.copy2(path, made / path.name)
