"""Selection reports on the Hub: a repository with the report's files and a card, and the way back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..checkpoints.fetch import hub_faults
from ..errors import WarmstartError
from ..hub.commit import commit_folder
from ..hub.save import CARD_NAME

if TYPE_CHECKING:
    from .report import SelectionReport

TAGS = ["hf_warmstart", "warm-start-selection"]


def report_card(report: SelectionReport, *, repo_id: str | None = None, license: str | None = None) -> ModelCard:
    """The card of a report: the report itself, and how to load it."""
    from .report import PLOT_NAME

    data = ModelCardData(library_name="hf_warmstart", tags=TAGS, license=license)
    where = repr(repo_id) if repo_id else "'this-repository'"
    code = (
        f"from hf_warmstart import SelectionReport\n\nreport = SelectionReport.from_pretrained({where})\nreport.best"
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        report.to_markdown(),
        f"![Curves, rank over lag, metrics against the outcome]({PLOT_NAME})",
        f"## How to load it\n\n```python\n{code}\n```",
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def push_report(
    report: SelectionReport,
    repo_id: str,
    *,
    license: str | None = None,
    commit_message: str | None = None,
    **options: Any,
) -> CommitInfo:
    """One commit with a report's files and card; arguments as for `SelectionReport.push_to_hub`."""
    with tempfile.TemporaryDirectory() as folder:
        report.save(folder)
        report_card(report, repo_id=repo_id, license=license).save(Path(folder, CARD_NAME))
        message = commit_message or "Upload choice of the warm start"
        return commit_folder(folder, repo_id, commit_message=message, **options)


def fetched_report(source: str, **options: Any) -> Path:
    """The folder, in the Hub's cache, of a report.

    Raises:
        WarmstartError: the Hub does not give it. CheckpointError: the connection broke, or the disk is full.
    """
    from .report import JSON_NAME

    try:
        with hub_faults(source):
            return Path(hf_hub_download(source, JSON_NAME, **options)).parent
    except WarmstartError as error:
        cause = error.__cause__
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            raise WarmstartError(
                f"{os.fspath(source)!r} holds no {JSON_NAME}, so that it is no selection's report."
            ) from error
        raise
