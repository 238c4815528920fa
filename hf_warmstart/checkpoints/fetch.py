"""Where a source's files are: a folder as it is, a Hub id through the Hub's cache; or a subfolder of either."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

from ..errors import CheckpointError, StateError, WarmstartError
from ..growth.source import ADAPTER_ALONE, holds_adapter_alone
from ..redaction import redacted
from .safetensors.layout import INDEX_NAME, SINGLE_NAME
from .state.trainer_files import TRAINER_STATE_NAME

# Weights in other forms than safetensors, logs, other checkpoints, and a pickle that nothing loads, are never fetched.
OTHERS = (
    *("*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.tflite", "*.ot", "*pytorch_model*", "*training_args.bin"),
    *("onnx/*", "original/*", "consolidated*", "checkpoint-*/*", "last-checkpoint/*", "runs/*", "global_step*/*"),
)
# What training left behind is fetched from the subfolder of a checkpoint, where it is asked for.
STATE = ("*.bin", "*.pt", "*.pth", "*.pkl", "trainer_state.json", "optimizer_0/*")
# Of a checkpoint whose training state is wanted alone: its weights, logs, and a pickle that nothing loads.
NOT_STATE = ("*.safetensors", "*pytorch_model*", "*.msgpack", "*.h5", "*.gguf", "*training_args.bin", "*runs/*")
CHECKPOINTS = ("checkpoint-*/*", "last-checkpoint/*")


class HubPlace(NamedTuple):
    """Where a parent lies on the Hub, beside its id: the commit, and the subfolder of it; nothing of both for a folder."""

    commit: str | None = None
    subfolder: str = ""


def local_folder(
    source: str | os.PathLike, revision: str | None = None, subfolder: str = "", *, state: bool = False
) -> Path:
    """The folder of a source.

    Args:
        source: a folder, or a Hub id. revision: branch, tag or commit of a Hub id. subfolder: of either.
        state (`bool`): fetch a training state too.

    Raises:
        WarmstartError: it is neither, or the Hub does not give it, or there is no such subfolder.
        CheckpointError: the connection broke, or the disk is full.
    """
    subfolder = checked_subfolder(subfolder)
    if Path(source).is_dir():
        if revision is not None:
            raise WarmstartError(f"revision={revision!r} is of a Hub id; {str(source)!r} is a folder.")
        if not Path(source, subfolder).is_dir():
            raise WarmstartError(f"The folder {str(source)!r} has no subfolder {subfolder!r}.")
        return Path(source, subfolder)
    repo_id = str(source)
    with hub_faults(repo_id):
        folder = fetched_folder(repo_id, revision, subfolder, state)
        if any((folder / name).exists() for name in (SINGLE_NAME, INDEX_NAME)):
            return folder
        there = HfApi().list_repo_files(repo_id, revision=revision)
    if holds_adapter_alone(folder):
        raise WarmstartError(f"{described(repo_id, subfolder)} cannot be grown from its files. {ADAPTER_ALONE}")
    raise WarmstartError(no_safetensors(repo_id, subfolder, there))


def checked_subfolder(subfolder: str) -> str:
    """A subfolder with single slashes between its parts.

    Raises:
        WarmstartError: it leads out of what it is of.
    """
    parts = PurePosixPath(subfolder.strip("/")).parts
    if ".." in parts or "\\" in subfolder:
        raise WarmstartError(f"subfolder={subfolder!r} must lie inside. Pass a path such as 'checkpoint-500'.")
    return "/".join(parts)


def commit_of(folder: Path, subfolder: str) -> str:
    """The commit whose subfolder a folder of the Hub's cache is."""
    return (folder, *folder.parents)[len(PurePosixPath(subfolder).parts)].name


def fetched_folder(repo_id: str, revision: str | None, subfolder: str, state: bool, *left_out: str) -> Path:
    """The folder in the Hub's cache for a subfolder of a repository; patterns say what else is left out."""
    prefix = glob.escape(f"{subfolder}/") if subfolder else ""
    ignored = [prefix + pattern for pattern in (*OTHERS, *(() if state else STATE), *left_out)]
    root = snapshot_download(repo_id, revision=revision, allow_patterns=f"{prefix}*", ignore_patterns=ignored)
    return Path(root, subfolder)


def described(repo_id: str, subfolder: str) -> str:
    """A repository, or a subfolder of it, in words."""
    return f"{subfolder!r} of {repo_id!r}" if subfolder else repr(repo_id)


def folders_with(there: Iterable[str], *names: str) -> list[str]:
    """The folders of a repository in which a file of one of these names lies, sorted; its top is empty."""
    parts = (path.rpartition("/") for path in there)
    return sorted({folder for folder, _, name in parts if name in names})


def no_safetensors(repo_id: str, subfolder: str, there: Iterable[str]) -> str:
    """Why nothing can be grown, and where something could be: `there` are all files of the repository."""
    found = [folder for folder in folders_with(there, SINGLE_NAME, INDEX_NAME) if folder]
    advice = (
        f"It has some in {found}: pass one as the subfolder."
        if found
        else "Load it with from_pretrained, save_pretrained it to a folder, and pass that."
    )
    return (
        f"{described(repo_id, subfolder)} holds neither {SINGLE_NAME} nor {INDEX_NAME}, and weights in another form are not "
        f"fetched. {advice}"
    )


def training_state_folder(source: str | os.PathLike, revision: str | None = None, subfolder: str = "") -> Path:
    """The folder of a checkpoint's training state; of a Hub id everything but the weights is fetched.

    Args:
        source: a checkpoint's folder, or a Hub id. revision: branch, tag or commit of a Hub id.
        subfolder: in which the checkpoint lies, such as `"checkpoint-500"` where `hub_strategy="all_checkpoints"` put it, or
            `"last-checkpoint"`.

    Raises:
        StateError: it is neither, or there is no training state; where the repository has some elsewhere, that is said.
        CheckpointError: the connection broke, or the disk is full.
    """
    source, subfolder = os.fspath(source), checked_subfolder(subfolder)
    if Path(source).is_dir():
        if revision is not None:
            raise StateError(f"revision={revision!r} is of a Hub id; {source!r} is a folder.")
        if not Path(source, subfolder).is_dir():
            raise StateError(f"The folder {source!r} has no subfolder {subfolder!r}.")
        return Path(source, subfolder)
    prefix = f"{subfolder}/" if subfolder else ""
    ignored = [prefix + pattern for pattern in NOT_STATE] + ([] if subfolder else list(CHECKPOINTS))
    try:
        with hub_faults(source):
            fetched = snapshot_download(
                source, revision=revision, allow_patterns=f"{prefix}*", ignore_patterns=ignored
            )
            folder = Path(fetched, subfolder)
            if (folder / TRAINER_STATE_NAME).is_file() or any(folder.glob("random_states_*.pkl")):
                return folder
            there = HfApi().list_repo_files(source, revision=revision)
    except CheckpointError:
        raise
    except WarmstartError as error:
        raise StateError(str(error)) from redacted(error)
    found = folders_with(there, TRAINER_STATE_NAME)
    advice = f" It has some in {found}: pass one as the subfolder." if found else ""
    raise StateError(f"{described(source, subfolder)} holds no training state ({TRAINER_STATE_NAME}).{advice}")


@contextmanager
def hub_faults(repo_id: str) -> Iterator[None]:
    """What the Hub, the connection to it or the disk says, as an error that tells how to go on, without token or signature."""
    try:
        yield
    except (HFValidationError, HTTPError, OSError) as error:
        words = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno is not None:
            raise CheckpointError(
                f"{repo_id!r} could not be kept on the disk: {words}. Make room and run the same again (the "
                "Hub's cache lies where HF_HOME says)."
            ) from redacted(error)
        if isinstance(error, HTTPError) and not isinstance(error, OSError):
            raise CheckpointError(
                f"The connection to the Hub broke while {repo_id!r} was fetched: {words}. Run the same again: what came whole "
                "is kept."
            ) from redacted(error)
        raise WarmstartError(f"{repo_id!r} is no folder, and the Hub does not give it: {words}") from redacted(error)
