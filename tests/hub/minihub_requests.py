"""How `MiniHub` answers: one method for each thing that the client asks."""

from __future__ import annotations

import base64
import json
import socket
import time
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .minihub import Commit, MiniHub, Repo, blob, make_commit, sha256


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: MiniHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle("GET")

    def do_HEAD(self) -> None:
        self._handle("HEAD")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def do_DELETE(self) -> None:
        self._handle("DELETE")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    # -- what goes wrong --------------------------------------------------------------------------------------------

    def _handle(self, method: str) -> None:
        parts = urlsplit(self.path)
        fault = self.hub.next_fault(method, parts.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None:
            time.sleep(fault.seconds)
            if fault.cut == "body":
                self.rfile.read(length // 2)
                return self._hang_up()
        body = self.rfile.read(length)
        self._mute = fault is not None and fault.cut == "answer"
        with self.hub.lock:
            self.hub.requests.append((method, parts.path))
            if fault is not None and fault.status is not None:
                return self._error(fault.status, message=fault.message)
            self._route(
                method, [unquote(part) for part in parts.path.strip("/").split("/")], parse_qs(parts.query), body
            )
        if self._mute:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # -- what is asked ------------------------------------------------------------------------------------------------

    def _route(self, method: str, path: list[str], query: dict[str, list[str]], body: bytes) -> None:
        match (method, *path):
            case ("GET", "api", "whoami-v2"):
                self._whoami()
            case ("POST", "api", "repos", "create"):
                self._create(json.loads(body))
            case ("POST", "api", "validate-yaml"):
                self._validate(json.loads(body)["content"])
            case ("PUT", "lfs", oid):
                self._store(oid, body)
            case ("PUT", "lfs-part", oid, number):
                self.hub.leaked |= "Authorization" in self.headers
                self.hub.parts[oid, int(number)] = body
                self._send(200, b"", {"ETag": f'"{sha256(body)[:8]}"'})
            case ("POST", "lfs-complete", oid):
                numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
                self._store(oid, b"".join(self.hub.parts[oid, number] for number in numbers))
            case ("POST", organisation, name, "info", "lfs", "objects", "batch"):
                self._lfs_batch(f"{organisation}/{name.removesuffix('.git')}", json.loads(body))
            case (_, "api", "models", organisation, name, *rest):
                self._api(f"{organisation}/{name}", method, rest, body, query)
            case ("GET", "second-host", *file):
                self._second_host("/".join(file))
            case ("GET" | "HEAD", organisation, name, "resolve", revision, *file):
                self._resolve(f"{organisation}/{name}", revision, "/".join(file))
            case _:
                self._error(404, "RepoNotFound")

    @property
    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may_see(self, repo: Repo) -> bool:
        return not repo.private or self._token in {self.hub.token, *self.hub.readers}

    def _may_write(self) -> bool:
        """Whether the token may write; if not, that is the answer."""
        if self._token in self.hub.readers:
            self._error(403, message="Your token has no right to write here.")
        elif self._token != self.hub.token:
            self._error(401, message="Invalid username or password.")
        return self._token == self.hub.token

    def _whoami(self) -> None:
        if self._token not in {self.hub.token, *self.hub.readers}:
            return self._error(401, message="Invalid username or password.")
        role = "write" if self._token == self.hub.token else "read"
        return self._json(
            {
                "type": "user",
                "name": "user",
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"role": role}},
            }
        )

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._may_write():
            return
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            self._json({"error": "You already created this model repo", **answer}, status=409)
        else:
            self.hub.create(repo_id, asked.get("visibility") == "private")
            self._json(answer)

    def _validate(self, card: str) -> None:
        try:
            metadata = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
            errors = [] if isinstance(metadata, dict) else [{"message": "The metadata is no mapping."}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self._json({"warnings": [], "errors": errors}, status=400 if errors else 200)

    def _api(self, repo_id: str, method: str, rest: list[str], body: bytes, query: dict[str, list[str]]) -> None:
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return self._error(404, "RepoNotFound")
        if not self._may_see(repo):
            return self._error(401, "RepoNotFound")
        reads = method == "GET" or (rest and rest[0] == "paths-info")
        if not reads and not self._may_write():
            return None
        match (method, *rest):
            case ("GET",) | ("GET", "revision", _):
                commit = repo.find(rest[1] if rest else "main")
                with_files = "blobs" in query
                return (
                    self._info(repo_id, repo, commit, with_files) if commit else self._error(404, "RevisionNotFound")
                )
            case ("GET", "refs"):
                return self._refs(repo)
            case ("GET", "tree", revision, *folder):
                commit = repo.find(revision)
                return self._tree(commit, "/".join(folder)) if commit else self._error(404, "RevisionNotFound")
            case ("POST", "paths-info", revision):
                commit = repo.find(revision)
                if commit is None:
                    return self._error(404, "RevisionNotFound")
                asked = parse_qs(body.decode()) if not body.startswith(b"{") else json.loads(body)
                wanted = set(asked["paths"])
                return self._json([entry for entry in self._entries(commit) if entry["path"] in wanted])
            case ("POST", "branch", branch):
                if branch in repo.branches:
                    return self._json({"error": "Reference already exists"}, status=409)
                repo.branches[branch] = [repo.branches["main"][-1]]
                return self._json({})
            case ("POST", "preupload", revision) if revision in repo.branches:
                return self._preupload(repo.branches[revision][-1], json.loads(body)["files"])
            case ("POST", "commit", revision) if revision in repo.branches:
                return self._commit(repo_id, repo, revision, body, "create_pr" in query)
        return self._error(404, "RevisionNotFound")

    # -- uploads ------------------------------------------------------------------------------------------------------

    def _preupload(self, head: Commit, asked: list[dict[str, Any]]) -> None:
        """How each file goes, and what stands there already."""
        files = []
        for path in (file["path"] for file in asked):
            large = self.hub.is_large(path)
            found: dict[str, Any] = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in head.files:
                found["oid"] = (sha256 if large else blob)(head.files[path])
            files.append(found)
        self._json({"files": files})

    def _lfs_batch(self, repo_id: str, asked: dict[str, Any]) -> None:
        if not self._may_write():
            return
        if repo_id not in self.hub.repos:
            return self._error(404, "RepoNotFound")
        objects = []
        for oid, size in ((o["oid"], o["size"]) for o in asked["objects"]):
            entry: dict[str, Any] = {"oid": oid, "size": size}
            step = self.hub.part_bytes
            if oid in self.hub.large:
                pass  # nothing to do: it is here
            elif step and size > step:
                parts = {str(k + 1): f"{self.hub.url}/lfs-part/{oid}/{k + 1}" for k in range(-(-size // step))}
                href = f"{self.hub.url}/lfs-complete/{oid}"
                entry["actions"] = {"upload": {"href": href, "header": {"chunk_size": str(step), **parts}}}
            else:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{oid}?Signature=secret"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str, content: bytes) -> None:
        """Where files of Git LFS are put: what is not whole is refused."""
        self.hub.leaked |= self.command == "PUT" and "Authorization" in self.headers
        if sha256(content) != oid:
            return self._error(400, message="The content is not what was announced.")
        self.hub.large[oid] = content
        return self._json({})

    def _commit(self, repo_id: str, repo: Repo, revision: str, body: bytes, create_pr: bool) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        head = repo.branches[revision][-1]
        if header.get("parentCommit", head.oid) != head.oid:
            return self._error(412, message="The branch has moved on.")
        files, changed, deleted = dict(head.files), [], []
        for key, value in ((line["key"], line["value"]) for line in lines[1:]):
            path = value["path"]
            if key == "lfsFile" and value["oid"] not in self.hub.large:
                return self._error(400, message=f"{path} points to a file that was not uploaded.")
            if key.startswith("deleted"):
                gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
                for name in gone:
                    del files[name]
                deleted += gone
                continue
            files[path] = self.hub.large[value["oid"]] if key == "lfsFile" else base64.b64decode(value["content"])
            changed.append(path)
        number = sum(map(len, repo.branches.values()))
        commit = make_commit(header["summary"], files, f"{repo_id} {number}", sorted(changed), sorted(deleted))
        target = f"refs/pr/{number}" if create_pr else revision
        repo.branches.setdefault(target, [head]).append(commit)
        url = f"{self.hub.url}/{repo_id}"
        pull = {"pullRequestUrl": f"{url}/discussions/{number}"} if create_pr else {}
        return self._json({"commitUrl": f"{url}/commit/{commit.oid}", "commitOid": commit.oid, **pull})

    # -- what is there ------------------------------------------------------------------------------------------------

    def _info(self, repo_id: str, repo: Repo, commit: Commit, with_files: bool) -> None:
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        for entry in siblings if with_files else ():
            content = commit.files[entry["rfilename"]]
            entry |= {"size": len(content), "blobId": blob(content)}
            if self.hub.is_large(entry["rfilename"]):
                entry["lfs"] = {"size": len(content), "sha256": sha256(content), "pointerSize": 134}
        self._json({"id": repo_id, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": siblings})

    def _refs(self, repo: Repo) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].oid}
            for name, commits in repo.branches.items()
            if not name.startswith("refs/")
        ]
        tags = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid} for name, oid in repo.tags.items()]
        self._json({"branches": branches, "tags": tags, "converts": []})

    def _entries(self, commit: Commit) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = [
            {"type": "file", "path": path, "size": len(content), "oid": blob(content)}
            for path, content in sorted(commit.files.items())
        ]
        for entry in entries:
            if self.hub.is_large(entry["path"]):
                content = commit.files[entry["path"]]
                entry["lfs"] = {"size": len(content), "oid": sha256(content), "pointerSize": 134}
        return entries

    def _tree(self, commit: Commit, folder: str) -> None:
        self._json([entry for entry in self._entries(commit) if not folder or entry["path"].startswith(folder + "/")])

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.hub.repos.get(repo_id)
        if repo and not self._may_see(repo):
            return self._error(401, "RepoNotFound")
        commit = repo.find(revision) if repo else None
        if commit is None:
            return self._error(404, "RevisionNotFound" if repo else "RepoNotFound")
        content = commit.files.get(path)
        if content is None:
            return self._error(404, "EntryNotFound", headers={"X-Repo-Commit": commit.oid})
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if self.hub.is_large(path):
            digest = sha256(content)
            self.hub.large[digest] = content
            port = self.hub.url.rpartition(":")[2]
            headers["Location"] = f"http://localhost:{port}/second-host/{digest}/{path}?Signature=secret"
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            return self._send(302, b"", headers)
        return self._file(path, content, {**headers, "ETag": f'"{blob(content)}"'})

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

    # -- answers ------------------------------------------------------------------------------------------------------

    def _json(self, data: Any, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None) -> None:
        words = json.dumps({"error": message} if message else {}).encode()
        own = {"X-Error-Code": code} if code else {}
        self._send(status, words, {**own, "Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str], breaks: bool = False) -> None:
        if self._mute:
            return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if breaks:
            self.wfile.write(content[: len(content) // 2] if status == 200 else b"")
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(content)
