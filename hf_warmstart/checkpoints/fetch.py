"""Where a source's files are: a folder as it is, a Hub id through the Hub's cache."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..errors import WarmstartError

# Weights in other forms than safetensors, and what training left behind, are not fetched.
NOT_FETCHED = [
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.tflite", "*.ot"),
    *("onnx/*", "original/*", "consolidated*"),
]


def local_folder(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder of a source.

    Args:
        source: a folder, or a Hub id. revision: branch, tag or commit of a Hub id.

    Raises:
        WarmstartError: it is neither, or the Hub does not give it.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise WarmstartError(f"revision={revision!r} is of a Hub id; {str(source)!r} is a folder.")
        return Path(source)
    try:
        return Path(snapshot_download(str(source), revision=revision, ignore_patterns=NOT_FETCHED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise WarmstartError(
            f"{str(source)!r} is no folder, and the Hub does not give it: {' '.join(str(error).split())}"
        ) from error
