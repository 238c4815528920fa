"""What a sweep tells a predictor beside its table: the evaluation's fingerprint and the recipe of its runs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import WarmstartError
from ..tables.evaluation import Fingerprint
from .folder import SWEEP_NAME, TABLE_NAME


@dataclass(frozen=True)
class DescribedRuns:
    """Runs with what they were trained with and evaluated on.

    Args:
        runs: a source of runs for `read_runs`. recipe: of `Recipe`. fingerprint: of the evaluation set.
    """

    runs: Any
    recipe: dict[str, Any]
    fingerprint: Fingerprint


def described(source: Any) -> DescribedRuns | None:
    """A `Sweep`, the folder of one or the table in it; None for any other source of runs.

    Raises:
        WarmstartError: the folder's `sweep.json` is damaged, or the sweep has no table yet.
    """
    if hasattr(source, "plan") and hasattr(source, "runs"):
        if not source.runs:
            raise WarmstartError("This sweep was only planned (dry_run): it has no runs to fit laws to.")
        return DescribedRuns(source.runs, source.plan.recipe, source.plan.fingerprint)
    if not isinstance(source, (str, os.PathLike)):
        return None
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    if folder == Path(source).parent and Path(source).name != TABLE_NAME or not (folder / SWEEP_NAME).is_file():
        return None
    if not (folder / TABLE_NAME).is_file():
        raise WarmstartError(f"The sweep in {str(folder)!r} has no {TABLE_NAME} yet. Run it first.")
    try:
        said = json.loads((folder / SWEEP_NAME).read_text())
        return DescribedRuns(folder / TABLE_NAME, said["recipe"], Fingerprint.from_dict(said["fingerprint"]))
    except (ValueError, KeyError, TypeError) as error:
        raise WarmstartError(
            f"{SWEEP_NAME} in {str(folder)!r} is damaged: {type(error).__name__}: {error}."
        ) from error
