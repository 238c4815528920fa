"""What a grown folder says of its growth: the record in its `config.json`, the checksums in its `growth.json`.

Nothing else is read, and of a Hub id nothing else is fetched.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers.utils import CONFIG_NAME

from ..errors import CheckpointError, WarmstartError
from ..growth.plan import RECORD_KEY, GrowthRecord
from ..hub.facts import origin
from ..hub.save import GROWTH_NAME
from ..redaction import redacted


def last_record(source: str | os.PathLike) -> GrowthRecord:
    """The record of the growth that made a folder, or a Hub id's repository, out of its parent.

    Raises:
        WarmstartError: there is none; or its parent was never saved, so that nothing on disk can be compared or grown anew.
    """
    config = _read(source, CONFIG_NAME)
    if config is None:
        raise WarmstartError(f"{source} has no {CONFIG_NAME}. Pass a folder or Hub id that was grown.")
    records = GrowthRecord.all_in(config.get(RECORD_KEY))
    if not records:
        raise WarmstartError(
            f"{source} carries no growth record ({RECORD_KEY} in its {CONFIG_NAME}). Pass a folder or Hub id that was grown."
        )
    if (steps := len(origin(records))) > 1:
        raise WarmstartError(
            f"{source} was grown {steps} times in memory, and the models between were not saved. The model card's Python code "
            "makes it anew from the parent."
        )
    return records[-1]


def parents_subfolder(record: GrowthRecord, source: str | os.PathLike) -> str:
    """The subfolder of a source in which a record's parent lies; of a folder without it, the folder is the parent."""
    return "" if Path(source).is_dir() and not Path(source, record.subfolder).is_dir() else record.subfolder


def checksums(source: str | os.PathLike) -> dict[str, str]:
    """sha256 of each file of weights, from a folder's or Hub id's `growth.json`; empty where it has none.

    Raises:
        CheckpointError: what there is cannot be read.
    """
    facts = _read(source, GROWTH_NAME) or {}
    files = facts.get("files") or {}
    if not isinstance(files, dict) or not all(
        isinstance(file, dict) and isinstance(file.get("sha256"), str) for file in files.values()
    ):
        raise CheckpointError(f"{GROWTH_NAME} of {source} is damaged: its files have no sha256 each.")
    return {name: file["sha256"] for name, file in files.items()}


def _read(source: str | os.PathLike, name: str) -> dict[str, Any] | None:
    """A JSON object in a file of a folder or Hub id; None where there is no such file."""
    path = Path(source) / name if Path(source).is_dir() else _fetched(str(source), name)
    if path is None or not path.is_file():
        return None
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is damaged, or cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object.")
    return data


def _fetched(source: str, name: str) -> Path | None:
    try:
        return Path(hf_hub_download(source, name))
    except LocalEntryNotFoundError as error:
        raise WarmstartError(f"{source!r} is no folder, and the Hub cannot be reached: {error}") from redacted(error)
    except EntryNotFoundError:
        return None
    except (HFValidationError, HfHubHTTPError) as error:
        raise WarmstartError(
            f"{source!r} is no folder, and the Hub does not give it: {' '.join(str(error).split())}"
        ) from redacted(error)
