"""Where a source's files are: a folder as it is, a Hub id through the Hub's cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

from ..errors import CheckpointError, WarmstartError
from ..growth.source import ADAPTER_ALONE, holds_adapter_alone
from .safetensors.layout import INDEX_NAME, SINGLE_NAME

# Weights in other forms than safetensors, and what training left behind, are not fetched.
NOT_FETCHED = [
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.tflite", "*.ot", "*.pkl"),
    *("onnx/*", "original/*", "consolidated*", "checkpoint-*/*", "runs/*", "trainer_state.json"),
]
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


@contextmanager
def hub_faults(repo_id: str) -> Iterator[None]:
    """What the Hub, the connection to it or the disk says, as an error that tells how to go on."""
    try:
        yield
    except (HFValidationError, HTTPError, OSError) as error:
        # A signed address is as good as a token to whoever reads the message.
        words = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", " ".join(str(error).split()))
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
