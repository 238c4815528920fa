"""One commit with a folder's files, or none: what every push of this library ends in.

`HfApi.upload_folder` splits large folders into several commits when `hf_xet` is installed (huggingface_hub 2.4), so
that a fault on the way would leave weights without their card; `create_commit` makes one commit or none. A push that broke
can be repeated: large files that arrived are not sent again, files that stand there unchanged are left out of the commit,
and where nothing is left there is no commit.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import CheckpointError, HubError, WarmstartError
from ..redaction import redacted
from ..version import __version__
from .save import files_below, stale_weights

LIBRARY = "hf_warmstart"
LONGEST = 400  # of the Hub's words that are repeated, in characters
LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with the right to write."
REFUSALS = {
    401: f"the token is missing or not known. {LOG_IN}",
    403: f"the token may not write there. {LOG_IN}",
    404: "there is no such repository or revision, or the token may not see it. Check the id and the revision.",
    409: "something else changed it meanwhile. Run the same again.",
    412: "something else changed it meanwhile. Run the same again.",
}


def commit_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    commit_message: str,
    files: Iterable[str] | None = None,
    texts: Mapping[str, str] | None = None,
    subfolder: str = "",
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Commit a folder's files to a model repository, made if missing.

    Weights that the repository holds under other names (shards where one file is pushed, or the reverse) are removed in the
    same commit, since `from_pretrained` could load them instead.

    Args:
        folder: where the files are. files (*optional*): which, relative to it; all by default.
        texts (`dict[str, str]`, *optional*): contents of files that go in place of the folder's, or beside them, by name.
        repo_id (`str`): `"org/name"` or `"name"`. commit_message (`str`): of the commit.
        subfolder (`str`): of the repository, to put them in.
        private, token, revision, create_pr: as for `push_to_hub`.

    Returns:
        The `huggingface_hub.CommitInfo` of the commit, or of the last one where nothing is new.

    Raises:
        CheckpointError: files are missing.
        HubError: the Hub refused, the connection broke, or `private` was asked of what exists and is public. What the client
            raised is its `__cause__`.
    """
    names = list(files_below(folder) if files is None else files)
    if missing := [name for name in names if not Path(folder, name).is_file()]:
        raise CheckpointError(f"{folder} has no files {missing}, which were to be pushed. Nothing was sent.")
    with push_faults(repo_id):
        return _commit(
            Path(folder),
            repo_id,
            names,
            texts or {},
            subfolder.strip("/") + "/" if subfolder.strip("/") else "",
            HfApi(token=token, library_name=LIBRARY, library_version=__version__),
            private,
            {"commit_message": commit_message, "revision": revision, "create_pr": create_pr},
        )


def _commit(
    folder: Path,
    repo_id: str,
    files: Iterable[str],
    texts: Mapping[str, str],
    prefix: str,
    api: HfApi,
    private: bool | None,
    commit: Mapping[str, Any],
) -> CommitInfo:
    """The commit of `commit_folder`; `prefix` is what stands before the files' paths."""
    revision = commit["revision"]
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise HubError(
            f"private=True, but {repo_id!r} exists and is public. Nothing was sent. Make it private in its settings, or pass "
            "another id."
        )
    if revision and not commit["create_pr"] and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    contents: dict[str, Path | bytes] = {name: folder / name for name in files}
    contents |= {name: text.encode() for name, text in texts.items()}
    there = api.list_repo_files(repo_id, revision=revision)
    stale = stale_weights((name.removeprefix(prefix) for name in there if name.startswith(prefix)), contents)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(prefix + name, content) for name, content in sorted(contents.items())),
        *(CommitOperationDelete(path_in_repo=prefix + name) for name in stale),
    ]
    with warnings.catch_warnings():
        # Of tables in a model repository: laws keep their runs in one.
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
        return api.create_commit(repo_id, operations, **commit)


@contextmanager
def push_faults(repo_id: str) -> Iterator[None]:
    """What the Hub, or the connection to it, says of a push, as a `HubError` that tells how to go on."""
    try:
        yield
    except WarmstartError:
        raise
    except LocalTokenNotFoundError as error:
        raise HubError(f"Nothing was pushed to {repo_id!r}: {REFUSALS[401]}") from redacted(error)
    except (HfHubHTTPError, HTTPError, ValueError, RuntimeError, OSError) as error:
        # A thread that uploads wraps what it met.
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error
        words = " ".join(str(cause).split()).removesuffix(".")
        words = words if len(words) <= LONGEST else words[:LONGEST] + " ..."
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code if cause.response is not None else None
            what = REFUSALS.get(status or 0, "run the same again later.")
            raise HubError(
                f"The Hub refused the push to {repo_id!r} ({status}): {what} It says: {words}."
            ) from redacted(error)
        if isinstance(cause, ValueError):
            raise HubError(f"The Hub refused the push to {repo_id!r}: {words}.") from redacted(error)
        if not isinstance(cause, (HTTPError, OSError)) or getattr(cause, "filename", None):
            raise  # of this library, or of a file that is being sent
        raise HubError(
            f"The connection to the Hub broke while {repo_id!r} was pushed: {words}. Run the same again: large files that "
            "arrived are not sent again, and a commit is made whole or not at all."
        ) from redacted(error)


def check_repo_id(repo_id: str) -> None:
    """Raise `WarmstartError` where a text is no id of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise WarmstartError(f"{repo_id!r} is no id of a repository: {error} Pass my-org/my-model.") from error
