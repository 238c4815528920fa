"""`HubShards`: the safetensors of a Hub repository, of which only those in use are on the disk.

    headers, by ranges of bytes  ->  checked as a folder's are  ->  the plan
    a file, when the output needs it  ->  its checksum compared with the Hub's  ->  read by rows  ->  dropped

What is there at a time is what the output file that is being written needs, and the next one, which is fetched meanwhile.
A growth whose output comes back to a file (`depth_operator="stack"`) fetches it again.
"""

from __future__ import annotations

import hashlib
import shutil
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any, Protocol

from huggingface_hub import hf_hub_download, hf_hub_url, model_info
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff, tqdm

from ..errors import CheckpointError, WarmstartError
from .fetch import checked_subfolder, fetched_folder, hub_faults, no_safetensors
from .safetensors.format import short
from .safetensors.layout import INDEX_NAME, SINGLE_NAME
from .safetensors.source import Fault, OpenFile, SafetensorsSource, header_of, header_text, open_file

FIRST_BYTES = 100_000  # hold the headers of nearly all files, as huggingface_hub found over 1000 models
TIMEOUT = 60  # seconds without an answer
AT_ONCE = 8  # headers
SHA1_DIGITS = 40
READ_BYTES = 2**20


class Output(Protocol):
    """A file that is written; `done` turns true when it is."""

    done: bool


Need = tuple[Output, frozenset[str]]


@dataclass(frozen=True)
class HubFile:
    """A file's size in bytes and its checksum: of Git LFS the sha256, otherwise Git's id of the blob."""

    size: int
    checksum: str


@dataclass(frozen=True)
class HubRepository:
    """A commit of a repository: its small files in a folder of the Hub's cache, its safetensors on the Hub.

    Args:
        repo_id, commit, subfolder: which. folder: holds config, tokenizer and index, and a training state.
        files: the safetensors, by name. headers: those that came already.
    """

    repo_id: str
    commit: str
    folder: Path
    files: dict[str, HubFile]
    headers: dict[str, bytes] = field(default_factory=dict)
    subfolder: str = ""

    @classmethod
    def find(
        cls, repo_id: str, revision: str | None = None, subfolder: str = "", *, state: bool = False
    ) -> HubRepository:
        """Ask the Hub what a revision is, and fetch all but the weights; arguments as for `local_folder`.

        Raises:
            WarmstartError: it is a folder, or the Hub does not give it, or has no safetensors there.
        """
        if Path(repo_id).is_dir():
            raise WarmstartError(
                f"low_disk=True fetches a Hub id file by file; {repo_id!r} is a folder, whose files are here. Leave it out."
            )
        subfolder = checked_subfolder(subfolder)
        with hub_faults(repo_id):
            info = model_info(repo_id, revision=revision, files_metadata=True)
            commit, siblings = str(info.sha), info.siblings or ()
            folder = fetched_folder(repo_id, commit, subfolder, state, "*.safetensors")
        prefix = f"{subfolder}/" if subfolder else ""
        files = {
            entry.rfilename.removeprefix(prefix): HubFile(
                entry.size or 0, str(entry.lfs.sha256 if entry.lfs else entry.blob_id)
            )
            for entry in siblings
            if entry.rfilename.startswith(prefix) and entry.rfilename.endswith(".safetensors")
        }
        if SINGLE_NAME not in files and not (folder / INDEX_NAME).exists():
            raise WarmstartError(no_safetensors(repo_id, subfolder, (entry.rfilename for entry in siblings)))
        return cls(repo_id, commit, folder, files, subfolder=subfolder)

    def header(self, file: str) -> bytes:
        """The JSON at a file's beginning, by ranges of bytes."""
        if file not in self.files:
            raise Fault("the file is missing")
        if file not in self.headers:
            nbytes = self.files[file].size
            first = self._range(file, 0, min(FIRST_BYTES, nbytes)) if nbytes else b""

            def read(start: int, stop: int) -> bytes:
                return first[start:stop] if stop <= len(first) else self._range(file, start, stop)

            self.headers[file] = header_text(nbytes, read)
        return self.headers[file]

    def _range(self, file: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file."""
        url = hf_hub_url(self.repo_id, file, subfolder=self.subfolder, revision=self.commit)
        headers = build_hf_headers(headers={"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"})
        found = bytearray()
        with hub_faults(self.repo_id), http_stream_backoff("GET", url, headers=headers, timeout=TIMEOUT) as response:
            hf_raise_for_status(response)
            first = start if response.status_code == 206 else 0  # else the whole file is on its way
            for piece in response.iter_bytes():
                found += piece
                if first + len(found) >= stop:
                    break
        if first + len(found) < stop:
            raise Fault(f"the Hub gives {len(found)} bytes of its beginning, {stop - first} were asked for")
        return bytes(found[start - first : stop - first])

    def fetch(self, file: str, folder: Path, stopped: Event) -> OpenFile:
        """Fetch a file into a folder, checked against the Hub's checksum and its header; closed when nobody has it any more.

        Args:
            stopped: set when nobody waits for it any more.

        Raises:
            CheckpointError: it could not be fetched, or came twice as something else.
        """
        for _ in range(2):
            with hub_faults(self.repo_id):
                hf_hub_download(
                    self.repo_id,
                    file,
                    subfolder=self.subfolder,
                    revision=self.commit,
                    local_dir=folder,
                    tqdm_class=_watch(stopped),
                )
            with ExitStack() as opened:
                found = open_file(folder / self.subfolder, file, opened)
                if _checksum(found, self.files[file].checksum) and header_of(found) == self.headers[file]:
                    weakref.finalize(found, opened.pop_all().close)
                    return found
            (folder / self.subfolder / file).unlink()
        raise CheckpointError(
            f"{file} of {self.repo_id!r} came twice with another checksum than the Hub gives. Run the same again, or check "
            "the connection and the disk."
        )


class HubShards(SafetensorsSource):
    """A `SafetensorsSource` whose files are fetched and dropped. Tell it what will be read with `expect`.

    Args:
        repository: the files. store: a folder for those that are here; removed by `close` where there is one of ours.
    """

    def __init__(self, repository: HubRepository, store: Path):
        self.repository, self._store = repository, store
        self._needs: list[Need] = []
        self._here: dict[str, Future[OpenFile]] = {}
        self._lock = Lock()
        self._changed: set[str] = set()
        self._stopped = Event()
        self._began = False
        super().__init__(repository.folder)
        self._worker = ThreadPoolExecutor(1)  # fetches and drops, in the order in which they are asked for

    def room(self, needs: Sequence[frozenset[str]]) -> int:
        """The most bytes on the disk at once, for output files that need these."""
        after = [*needs, frozenset()][1:]
        return max((self._nbytes(now | then) for now, then in zip(needs, after, strict=True)), default=0)

    def traffic(self, needs: Sequence[frozenset[str]]) -> int:
        """Bytes that are fetched, for output files that need these."""
        before: list[frozenset[str]] = [frozenset(), frozenset(), *needs]
        return sum(self._nbytes(now.difference(*before[k : k + 2])) for k, now in enumerate(needs))

    def expect(self, needs: Sequence[Need]) -> None:
        """What is about to be read: output files in order, and the files that each needs.

        What a run that died left in the folder is removed: only the run that holds the target's lock may call this.
        """
        with self._lock:
            self._began = True
            shutil.rmtree(self._store, ignore_errors=True)
            self._needs = list(needs)
            self._go_on()

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` unless every file that is here is as it was: a commit does not change on the Hub."""
        with self._lock:
            for name, fetched in self._here.items():
                if fetched.done():
                    self._check(name, fetched)
        if self._changed:
            problems = [f"{short(name)} changed while it was read." for name in sorted(self._changed)]
            raise CheckpointError(f"What was read from {self._store} may be a mixture; read it again.", problems)
        super().check_unchanged()

    def close(self) -> None:
        """Stop fetching, and drop everything."""
        self._stopped.set()
        self._worker.shutdown(cancel_futures=True)
        self._here.clear()
        super().close()
        if self._began:
            shutil.rmtree(self._store, ignore_errors=True)

    def _nbytes(self, files: frozenset[str]) -> int:
        return sum(self.repository.files[file].size for file in files)

    # -- fetching -----------------------------------------------------------------------------------------------------

    def will_need(self, name: str) -> None:
        """Nothing: whole files are fetched ahead."""

    def _file(self, name: str) -> OpenFile:
        with self._lock:
            if self._needs and self._needs[0][0].done:
                self._needs = [need for need in self._needs if not need[0].done]
                self._go_on()
            fetched = self._here.get(name) or self._fetch(name)
        return fetched.result()

    def _go_on(self) -> None:
        """Drop what neither this output file nor the next one needs, and fetch what they lack."""
        soon = [files for _, files in self._needs[:2]]
        for name in set(self._here).difference(*soon):
            self._worker.submit(self._drop, name, self._here.pop(name))
        for files in soon:
            for name in sorted(files - set(self._here)):
                self._fetch(name)

    def _fetch(self, name: str) -> Future[OpenFile]:
        self._began = True
        fetched = self._here[name] = self._worker.submit(self.repository.fetch, name, self._store, self._stopped)
        return fetched

    def _drop(self, name: str, fetched: Future[OpenFile]) -> None:
        self._check(name, fetched)
        (self._store / self.repository.subfolder / name).unlink(missing_ok=True)

    def _check(self, name: str, fetched: Future[OpenFile]) -> None:
        if fetched.exception() is None and not fetched.result().is_unchanged():
            self._changed.add(name)

    # -- opening ------------------------------------------------------------------------------------------------------

    def _has(self, name: str) -> bool:
        return name in self.repository.files or super()._has(name)

    def _read_index(self, opened: ExitStack) -> dict[str, str] | None:
        index = super()._read_index(opened)
        files = sorted(set((index or {}).values()) & set(self.repository.files))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for header in [pool.submit(self.repository.header, file) for file in files]:
                error = header.exception()
                if error is not None and not isinstance(error, Fault):  # which comes again, with the file's name
                    raise error
        return index

    def _header(self, file: str, opened: ExitStack) -> tuple[int, object, bytes]:
        header = self.repository.header(file)
        return self.repository.files[file].size, self.repository.files[file].checksum, header


def _watch(stopped: Event) -> type[tqdm]:
    """A bar that is not shown, and ends the transfer that it is told of."""

    class Watch(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if stopped.is_set():
                raise CheckpointError("The growth was stopped.")

    return Watch


def _checksum(file: OpenFile, expected: str) -> bool:
    """Whether a file has a checksum."""
    if len(expected) == SHA1_DIGITS:
        total = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    else:
        total = hashlib.sha256()
    with file.path.open("rb") as stream:
        while piece := stream.read(READ_BYTES):
            total.update(piece)
    return total.hexdigest() == expected
