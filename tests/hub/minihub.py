"""A Hub in memory on the loopback interface, spoken to by the real client.

Repositories with branches, tags, commits and pull requests; uploads inside the commit (`regular`) or by Git LFS; downloads
whole or by ranges, of LFS files from a second host with a signed address; a log of all requests. It answers what
`huggingface_hub` 2.4 and `transformers` 5.23 ask when models are pushed and loaded, and 404 to everything else. Connections
break, and files are swapped, where a test wants it. Xet is not spoken: files are never marked as stored there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


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


class MiniHub:
    """The server: a context manager; `url` is the endpoint, `repos` the state, `requests` the log.

    Args:
        lfs: whether weights go by Git LFS rather than inside the commit.

    Attributes:
        token: what private repositories ask for.
        served: of each transfer of a file to its end, the path and the number of bytes. on_serve: called before each.
        broken: paths whose transfers break, first after half of the bytes, then at once; ranges with an end do not.
        forbidden: whether the second host refuses all.
        swapped: path -> content that is given instead of the commit's.
        leaked: whether the second host was sent a token.
    """

    def __init__(self, lfs: bool = False) -> None:
        self.lfs = lfs
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.token = "hf_test"
        self.served: list[tuple[str, int]] = []
        self.on_serve: Callable[[str, int], None] = lambda path, nbytes: None
        self.broken: set[str] = set()
        self.swapped: dict[str, bytes] = {}
        self.forbidden = self.leaked = False
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
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
        self.repos[repo_id] = Repo({"main": [_commit("initial commit", {".gitattributes": b""}, repo_id)]}, private)

    def add(self, repo_id: str, files: dict[str, bytes], branch: str = "main", private: bool = False) -> Commit:
        """A commit that adds files to a branch, made with its repository where there is none."""
        if repo_id not in self.repos:
            self.create(repo_id, private)
        repo = self.repos[repo_id]
        commits = repo.branches.setdefault(branch, list(repo.branches["main"]))
        number = sum(map(len, repo.branches.values()))
        commits.append(_commit("add", {**commits[-1].files, **files}, f"{repo_id} {number}", sorted(files)))
        return commits[-1]


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: MiniHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def _route(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        path = [unquote(part) for part in parts.path.strip("/").split("/")]
        with self.hub.lock:
            self.hub.requests.append((method, parts.path))
            match (method, *path):
                case ("POST", "api", "repos", "create"):
                    self._create(json.loads(body))
                case ("POST", "api", "validate-yaml"):
                    self._json({"warnings": [], "errors": []})
                case ("PUT", "lfs", oid):
                    self.hub.large[oid] = body
                    self._json({})
                case ("POST", organisation, name, "info", "lfs", "objects", "batch"):
                    self._lfs_batch(json.loads(body))
                case (_, "api", "models", organisation, name, *rest):
                    self._api(f"{organisation}/{name}", method, rest, body, parse_qs(parts.query))
                case ("GET", "second-host", *file):
                    self._second_host("/".join(file))
                case ("GET" | "HEAD", organisation, name, "resolve", revision, *file):
                    self._resolve(f"{organisation}/{name}", revision, "/".join(file))
                case _:
                    self._error(404, "RepoNotFound")

    def _create(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            self._json({"error": "You already created this model repo", **answer}, status=409)
        else:
            self.hub.create(repo_id, asked.get("visibility") == "private")
            self._json(answer)

    def _api(self, repo_id: str, method: str, rest: list[str], body: bytes, query: dict[str, list[str]]) -> None:
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return self._error(404, "RepoNotFound")
        if not self._may_see(repo):
            return self._error(401, "RepoNotFound")
        match (method, *rest):
            case ("GET",) | ("GET", "revision", _):
                commit = repo.find(rest[1] if rest else "main")
                with_files = "blobs" in query
                return (
                    self._info(repo_id, repo, commit, with_files) if commit else self._error(404, "RevisionNotFound")
                )
            case ("GET", "tree", revision):
                commit = repo.find(revision)
                return self._tree(commit) if commit else self._error(404, "RevisionNotFound")
            case ("POST", "branch", branch):
                if branch in repo.branches:
                    return self._json({"error": "Reference already exists"}, status=409)
                repo.branches[branch] = [repo.branches["main"][-1]]
                return self._json({})
            case ("POST", "preupload", revision) if revision in repo.branches:
                mode = {True: "lfs", False: "regular"}
                files = [
                    {"path": f["path"], "uploadMode": mode[self._is_large(f["path"])], "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self._json({"files": files})
            case ("POST", "commit", revision) if revision in repo.branches:
                return self._commit(repo_id, repo, revision, body, "create_pr" in query)
        return self._error(404, "RevisionNotFound")

    def _commit(self, repo_id: str, repo: Repo, revision: str, body: bytes, create_pr: bool) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repo.branches[revision][-1].files)
        changed, deleted = [], []
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "deletedFile":
                del files[path]
                deleted.append(path)
                continue
            large = line["key"] == "lfsFile"
            files[path] = self.hub.large[line["value"]["oid"]] if large else base64.b64decode(line["value"]["content"])
            changed.append(path)
        message = lines[0]["value"]["summary"]
        number = sum(map(len, repo.branches.values()))
        commit = _commit(message, files, f"{repo_id} {number}", sorted(changed), sorted(deleted))
        target = f"refs/pr/{number}" if create_pr else revision
        repo.branches.setdefault(target, [repo.branches[revision][-1]]).append(commit)
        url = f"{self.hub.url}/{repo_id}"
        pull = {"pullRequestUrl": f"{url}/discussions/{number}"} if create_pr else {}
        self._json({"commitUrl": f"{url}/commit/{commit.oid}", "commitOid": commit.oid, **pull})

    def _lfs_batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
            for o in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _may_see(self, repo: Repo) -> bool:
        return not repo.private or self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _info(self, repo_id: str, repo: Repo, commit: Commit, with_files: bool) -> None:
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        for entry in siblings if with_files else ():
            content = commit.files[entry["rfilename"]]
            entry |= {"size": len(content), "blobId": _blob(content)}
            if self._is_large(entry["rfilename"]):
                entry["lfs"] = {"size": len(content), "sha256": _sha256(content), "pointerSize": 134}
        self._json({"id": repo_id, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": siblings})

    def _tree(self, commit: Commit) -> None:
        entries: list[dict[str, Any]] = [
            {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
            for path, content in sorted(commit.files.items())
        ]
        for entry in entries:
            if self._is_large(entry["path"]):
                content = commit.files[entry["path"]]
                entry["lfs"] = {"size": len(content), "oid": _sha256(content), "pointerSize": 134}
        self._json(entries)

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.hub.repos.get(repo_id)
        if repo and not self._may_see(repo):
            return self._error(401, "RepoNotFound")
        commit = repo.find(revision) if repo else None
        if commit is None:
            return self._error(404, "RevisionNotFound" if repo else "RepoNotFound")
        content = commit.files.get(path)
        if content is None:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": commit.oid})
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if self._is_large(path):
            digest = _sha256(content)
            self.hub.large[digest] = content
            port = self.hub.url.rpartition(":")[2]
            headers["Location"] = f"http://localhost:{port}/second-host/{digest}/{path}?Signature=secret"
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            return self._send(302, b"", headers)
        return self._file(path, content, {**headers, "ETag": f'"{_blob(content)}"'})

    def _second_host(self, path: str) -> None:
        """Where files of Git LFS lie."""
        self.hub.leaked |= "Authorization" in self.headers
        digest, _, path = path.partition("/")
        if self.hub.forbidden:
            return self._send(403, b"", {})
        return self._file(path, self.hub.large[digest], {"Accept-Ranges": "bytes"})

    def _file(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        """A file, or a range of it."""
        content = self.hub.swapped.get(path, content)
        headers["Content-Type"] = "application/octet-stream"
        status, last = 200, ""
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            status, whole = 206, len(content)
            content = content[int(first) : int(last) + 1 if last else whole]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(content) - 1}/{whole}"
        if self.command == "GET" and not last:
            self.hub.on_serve(path, len(content))
            self.hub.served.append((path, len(content)))
        breaks = path in self.hub.broken and self.command == "GET" and not last
        self._send(status, content, headers, breaks)

    def _is_large(self, path: str) -> bool:
        return self.hub.lfs and path.endswith(".safetensors")

    def _json(self, data: Any, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str], breaks: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if breaks:
            self.wfile.write(content[: len(content) // 2] if status == 200 else b"")
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(content)


def _commit(message: str, files: dict[str, bytes], salt: str, *changes: list[str]) -> Commit:
    return Commit(hashlib.sha1(f"{salt} {message}".encode()).hexdigest(), message, files, *changes)


def _sha256(content: bytes) -> str:
    """Git LFS's id of a file."""
    return hashlib.sha256(content).hexdigest()


def _blob(content: bytes) -> str:
    """Git's id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
