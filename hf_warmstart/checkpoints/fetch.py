"""Where a source's files are: a folder as it is, a Hub id through the Hub's cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

from ..errors import CheckpointError, StateError, WarmstartError
from ..growth.source import ADAPTER_ALONE, holds_adapter_alone
from .safetensors.layout import INDEX_NAME, SINGLE_NAME
from .state.trainer_files import TRAINER_STATE_NAME

# Weights in other forms than safetensors, and what training left behind, are not fetched.
NOT_FETCHED = [
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.tflite", "*.ot", "*.pkl"),
    *("onnx/*", "original/*", "consolidated*", "checkpoint-*/*", "runs/*", "trainer_state.json"),
]
# Of a checkpoint whose training state is wanted alone: its weights, logs, and a pickle that nothing loads.
NOT_STATE = ("*.safetensors", "*pytorch_model*", "*.msgpack", "*.h5", "*.gguf", "*training_args.bin", "*runs/*")
CHECKPOINTS = ("checkpoint-*/*", "last-checkpoint/*")
NO_SAFETENSORS = (
    "{!r} holds neither "
    + SINGLE_NAME
    + " nor "
    + INDEX_NAME
    + ", and weights in another form are not fetched. Load it with "
    "from_pretrained, save_pretrained it to a folder, and pass that."
)


def local_folder(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder of a source.

    Args:
        source: a folder, or a Hub id. revision: branch, tag or commit of a Hub id.

    Raises:
        WarmstartError: it is neither, or the Hub does not give it. CheckpointError: the connection broke, or the disk is full.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise WarmstartError(f"revision={revision!r} is of a Hub id; {str(source)!r} is a folder.")
        return Path(source)
    with hub_faults(str(source)):
        folder = Path(snapshot_download(str(source), revision=revision, ignore_patterns=NOT_FETCHED))
    if not any((folder / name).exists() for name in (SINGLE_NAME, INDEX_NAME)):
        if holds_adapter_alone(folder):
            raise WarmstartError(f"{str(source)!r} cannot be grown from its files. {ADAPTER_ALONE}")
        raise WarmstartError(NO_SAFETENSORS.format(str(source)))
    return folder


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
    source, subfolder = os.fspath(source), subfolder.strip("/")
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
        raise StateError(str(error)) from error
    found = sorted({path.rpartition("/")[0] for path in there if path.rpartition("/")[2] == TRAINER_STATE_NAME})
    where = f"{subfolder!r} of {source!r}" if subfolder else f"{source!r}"
    advice = f" It has some in {found}: pass one as the subfolder." if found else ""
    raise StateError(f"{where} holds no training state ({TRAINER_STATE_NAME}).{advice}")


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
            ) from error
        if isinstance(error, HTTPError) and not isinstance(error, OSError):
            raise CheckpointError(
                f"The connection to the Hub broke while {repo_id!r} was fetched: {words}. Run the same again: what came whole "
                "is kept."
            ) from error
        raise WarmstartError(f"{repo_id!r} is no folder, and the Hub does not give it: {words}") from error
