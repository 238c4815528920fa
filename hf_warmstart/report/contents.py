"""What the folder of a run holds, read without loading a model."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME

from ..checkpoints.state.parent_state import OWN_STATE
from ..errors import CheckpointError, WarmstartError
from ..growth.plan import RECORD_KEY, GrowthRecord
from ..hub.history import Story, story
from ..hub.save import GROWTH_NAME
from ..selection.report import JSON_NAME, SelectionReport

RECOMMENDATION_NAME = "recommendation.json"  # what `hf-warmstart recommend --json` prints
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Contents:
    """A run's folder.

    Args:
        folder: it. checkpoints: step -> folder of a checkpoint, in order. story: curves, None where no trainer logged any.
        records: growths of the model, oldest first. architecture: its class. facts: of `growth.json`. start: how the run
            started, as `WarmstartTrainer` notes it. selection: the choice of its start. recommendation: plain data.
    """

    folder: Path
    checkpoints: dict[int, Path]
    story: Story | None
    records: list[GrowthRecord]
    architecture: str
    facts: dict[str, Any]
    start: dict[str, Any]
    selection: SelectionReport | None
    recommendation: dict[str, Any] | None

    @property
    def models(self) -> list[tuple[str, Path]]:
        """Folders with whole weights: each checkpoint, and the run's own."""
        named = [(f"step {step}", path) for step, path in self.checkpoints.items()]
        return [(name, path) for name, path in [*named, ("end", self.folder)] if _has_weights(path)]


def read_contents(folder: Path) -> Contents:
    """Read the folder of a run, or of one checkpoint of it.

    Raises:
        WarmstartError: it is no folder, or holds nothing to report. CheckpointError: a file in it is damaged.
    """
    if not folder.is_dir():
        raise WarmstartError(f"{str(folder)!r} is no folder. Pass the output_dir of a run, or a grown model's folder.")
    found = sorted(
        (int(m[1]), path) for path in folder.iterdir() if (m := CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    )
    checkpoints = dict(found)
    places = [folder, *(path for _, path in reversed(found))]
    config = _first(places, CONFIG_NAME)
    selection = SelectionReport.load(folder) if (folder / JSON_NAME).is_file() else None
    contents = Contents(
        folder,
        checkpoints,
        story(_first(places, TRAINER_STATE_NAME).get("log_history")),
        GrowthRecord.all_in(config.get(RECORD_KEY)),
        (config.get("architectures") or [""])[0],
        _first([folder], GROWTH_NAME),
        _first(places, OWN_STATE),
        selection,
        _first([folder], RECOMMENDATION_NAME) or None,
    )
    if not (config or contents.story or contents.selection or contents.recommendation):
        raise WarmstartError(
            f"{folder.name} holds none of {CONFIG_NAME}, {TRAINER_STATE_NAME}, {JSON_NAME}, {RECOMMENDATION_NAME}: nothing "
            "to report. "
            "Pass the output_dir of a run."
        )
    return contents


def _first(places: list[Path], name: str) -> dict[str, Any]:
    """The first file of a name, as an object; empty where none of the places has it."""
    path = next((place / name for place in places if (place / name).is_file()), None)
    if path is None:
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path.name} in {path.parent.name} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name} in {path.parent.name} holds no JSON object.")
    return data


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("model*.safetensors")) and (folder / CONFIG_NAME).is_file()
