"""A Hub in memory on the loopback interface, spoken to by the real client.

Repositories with branches, tags, commits and pull requests, public and private; uploads inside the commit (`regular`) or by
Git LFS, in one part or several; downloads whole or by ranges, of LFS files from a second host with a signed address; tokens
that may write, and tokens that may only read; a log of all requests. It answers what `huggingface_hub` 2.4 and
`transformers` 5.23 ask when models are pushed and loaded, and 404 to everything else. Connections break, answers come late
or never, requests are refused and files are swapped, where a test wants it. Xet is not spoken: files are never marked as
stored there.

This module holds the state; `minihub_requests.py` answers.
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer


@dataclass(frozen=True)
class Commit:
    """All files after a commit, path -> content; `changed` and `deleted` are what it did itself."""

    oid: str
    message: str
    files: dict[str, bytes]
    changed: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)


@dataclass
class Repo:
    """Branches and pull requests: name -> commits, oldest first; tags: name -> commit's id."""

    branches: dict[str, list[Commit]]
    private: bool = False
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or a commit's id names."""
        revision = self.tags.get(revision, revision)
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


@dataclass
class Fault:
    """What goes wrong with requests of a method whose path matches, so many times.

    Args:
        method, path: which; the path is a regular expression that is searched for. times: how often.
        status, message: refuse it so. cut: where the connection breaks: in the middle of the request's `"body"`, or before
            the `"answer"`, when all that was asked has been done. seconds: before anything else.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    message: str = ""
    cut: str | None = None
    seconds: float = 0.0

    def matches(self, method: str, path: str) -> bool:
        """Whether it is about a request, and not used up."""
        return self.times > 0 and method == self.method and re.search(self.path, path) is not None


class _Server(ThreadingHTTPServer):
    """A server that says nothing of connections that the other side, or a fault, has closed."""

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class MiniHub:
    """The server: a context manager; `url` is the endpoint, `repos` the state, `requests` the log.

    Args:
        lfs: whether weights go by Git LFS rather than inside the commit.

    Attributes:
        token: what may write, and what private repositories ask for. readers: tokens that may only read.
        part_bytes: larger files come in parts of so many bytes.
        served: of each transfer of a file to its end, the path and the number of bytes. on_serve: called before each.
        faults: what goes wrong, see `fail`.
        broken: paths whose transfers break, first after half of the bytes, then at once; ranges with an end do not.
        forbidden: whether the second host refuses all.
        swapped: path -> content that is given instead of the commit's.
        leaked: whether the second host was sent a token.
    """

    def __init__(self, lfs: bool = False) -> None:
        from .minihub_requests import Handler

        self.lfs = lfs
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.token = "hf_test"
        self.readers: set[str] = set()
        self.part_bytes: int | None = None
        self.served: list[tuple[str, int]] = []
        self.on_serve: Callable[[str, int], None] = lambda path, nbytes: None
        self.faults: list[Fault] = []
        self.broken: set[str] = set()
        self.swapped: dict[str, bytes] = {}
        self.forbidden = self.leaked = False
        self.lock = threading.Lock()
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> MiniHub:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Commits of a branch after the first, empty one that comes with a repository; none for an unknown one."""
        repo = self.repos.get(repo_id)
        return repo.branches[revision][1:] if repo else []

    def create(self, repo_id: str, private: bool = False) -> None:
        """A new repository, holding `.gitattributes` as the Hub's do."""
        self.repos[repo_id] = Repo(
            {"main": [make_commit("initial commit", {".gitattributes": b""}, repo_id)]}, private
        )

    def add(self, repo_id: str, files: dict[str, bytes], branch: str = "main", private: bool = False) -> Commit:
        """A commit that adds files to a branch, made with its repository where there is none."""
        if repo_id not in self.repos:
            self.create(repo_id, private)
        repo = self.repos[repo_id]
        commits = repo.branches.setdefault(branch, list(repo.branches["main"]))
        number = sum(map(len, repo.branches.values()))
        commits.append(make_commit("add", {**commits[-1].files, **files}, f"{repo_id} {number}", sorted(files)))
        return commits[-1]

    def fail(self, method: str, path: str, **what) -> Fault:
        """Let something go wrong: arguments of `Fault`."""
        self.faults.append(Fault(method, path, **what))
        return self.faults[-1]

    def next_fault(self, method: str, path: str) -> Fault | None:
        """What goes wrong with a request; counted."""
        with self.lock:
            found = next((fault for fault in self.faults if fault.matches(method, path)), None)
            if found is not None:
                found.times -= 1
            return found

    def is_large(self, path: str, content: bytes | None = None) -> bool:
        """Whether a file goes by Git LFS."""
        return self.lfs and path.endswith(".safetensors") and content != b""


def make_commit(message: str, files: dict[str, bytes], salt: str, *changes: list[str]) -> Commit:
    """A commit whose id depends on message and salt."""
    return Commit(hashlib.sha1(f"{salt} {message}".encode()).hexdigest(), message, files, *changes)


def sha256(content: bytes) -> str:
    """Git LFS's id of a file."""
    return hashlib.sha256(content).hexdigest()


def blob(content: bytes) -> str:
    """Git's id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
