"""Folders are written byte for byte as `save_pretrained` writes them, appear whole or not at all, and are resumed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hf_warmstart.checkpoints.safetensors import sink as safetensors_sink
from hf_warmstart.checkpoints.safetensors.layout import folder_bytes, folder_layout
from hf_warmstart.checkpoints.safetensors.source import SafetensorsSource
from hf_warmstart.errors import CheckpointError
from tests.models import tiny_model

from . import killed_writer
from .folders import WholeSink, bytes_of, some_tensors, specs_of, write_tensors

ROOT = Path(__file__).parents[2]


def beside(target: Path) -> list[str]:
    """What lies beside a target."""
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def big_tensors() -> dict[str, torch.Tensor]:
    """Four shards' worth at 400,000 bytes each, none a multiple of a disk's block."""
    return {f"layers.{i}.weight": torch.randn(333, 301) + i for i in range(4)}


def sink_of(target: Path, tensors: dict[str, torch.Tensor], fingerprint: str = "1", **options) -> WholeSink:
    options = {"max_shard_size": 450_000, "buffer_nbytes": 2**17, **options}
    return WholeSink(target, specs_of(tensors), fingerprint=fingerprint, **options)


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_all(target: Path, tensors: dict[str, torch.Tensor], **options) -> list[str]:
    with sink_of(target, tensors, **options) as sink:
        written = write_tensors(sink, tensors)
        sink.publish()
    return written


# -- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
def test_blocks_and_copies_may_take_turns(tmp_path, monkeypatch, direct):
    """Blocks begin at any place of a page and end at any; what they leave of it goes before the next one's, or a copy's."""
    monkeypatch.setattr(safetensors_sink, "WORTHWHILE", 1000)
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT")
    order = random.Random(0)
    tensors = {f"t{k}": torch.randint(256, (order.choice([1, 900, 4096, 5000, 40_000]),)).byte() for k in range(60)}
    tensors |= {f"h{k}": torch.randn(order.choice([1, 7000, 20_000])).half() for k in range(20)}
    blocks = 0
    with sink_of(tmp_path / "ours", tensors) as sink:
        for shard in sink.shards:
            with shard.open():
                for name in shard.layout:
                    flat = tensors[name].view(torch.uint8)
                    for start in range(0, len(flat), 17_004):
                        part = flat[start : start + 17_004]
                        if (block := shard.block(name, start, len(part))) is None:
                            shard.write(part)
                        else:
                            block.tensor(torch.uint8, (len(part),)).copy_(part)
                            shard.send(block)
                            blocks += 1
        sink.publish()
    write_all(tmp_path / "copied", tensors)
    assert blocks > 40
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "copied")
    assert all(torch.equal(tensor, load_folder(tmp_path / "ours")[name]) for name, tensor in tensors.items())


def test_a_block_out_of_turn_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_sink, "WORTHWHILE", 1000)
    with sink_of(tmp_path / "ours", big_tensors()) as sink:
        refused = pytest.raises(CheckpointError, match="is the next")
        with refused, sink.shards[0].open() as shard:
            shard.send(shard.block("layers.0.weight", 1204, 1204))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB", 10_000])
def test_folders_are_those_of_save_pretrained(tmp_path, family, dtype, max_shard_size):
    model = tiny_model(family).to(dtype)
    model.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    saved = {name: data for name, data in bytes_of(tmp_path / "saved").items() if "config" not in name}
    tied = model.all_tied_weights_keys
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    options = {"max_shard_size": max_shard_size, "total_parameters": model.num_parameters()}
    write_all(tmp_path / "ours", tensors, **options)
    assert bytes_of(tmp_path / "ours") == saved
    assert folder_bytes(specs_of(tensors), **options) == sum(map(len, saved.values()))
    assert beside(tmp_path / "ours") == ["saved"]


def test_tensors_of_every_dtype_come_back(tmp_path):
    write_all(tmp_path / "ours", some_tensors(), max_shard_size=100)
    with SafetensorsSource(tmp_path / "ours") as source:
        assert all(torch.equal(source.read_rows(name), tensor) for name, tensor in some_tensors().items())


def test_views_of_one_storage_stay_together_as_save_pretrained_keeps_them(tmp_path):
    from huggingface_hub import split_torch_state_dict_into_shards

    fused = torch.randn(30, 10)
    tensors = {"q": fused[:10], "other": torch.randn(25, 10), "k": fused[10:20], "v": fused[20:]}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=1500)
    layout = folder_layout(specs_of(tensors), 1500, storages=dict.fromkeys(("q", "k", "v"), ("fused", fused.nbytes)))
    assert {file.name: set(file.tensors) for file in layout.files} == {
        file: set(names) for file, names in split.filename_to_tensors.items()
    }
    assert len(layout.files) == 2 and json.loads(layout.index)["metadata"]["total_size"] == 2200


def test_bytes_may_come_in_pieces_of_any_size(tmp_path):
    tensors = big_tensors()
    with sink_of(tmp_path / "ours", tensors) as sink:
        for shard in sink.shards:
            data = b"".join(tensors[name].numpy().tobytes() for name in shard.layout)
            with shard.open():
                for start in range(0, len(data), 70_001):
                    shard.write(bytearray(data[start : start + 70_001]))
                    shard.write(b"")
        sink.publish()
    write_all(tmp_path / "whole", tensors)
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "whole")


def test_memory_is_the_callers_again_after_a_write(tmp_path):
    tensors = big_tensors()
    rows = torch.empty(333, 301)
    with sink_of(tmp_path / "ours", tensors) as sink:
        for shard in sink.shards:
            with shard.open():
                for name in shard.layout:
                    rows.copy_(tensors[name])
                    shard.write(rows)
                    rows.fill_(7)
        sink.publish()
    with SafetensorsSource(tmp_path / "ours") as source:
        assert all(torch.equal(source.read_rows(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("refused", ["open", "write"])
def test_file_systems_that_know_only_the_page_cache_are_written_through_it(tmp_path, monkeypatch, refused):
    real = getattr(os, "open" if refused == "open" else "pwrite")

    def fake(first, second, *rest):
        flags = second if refused == "open" else fcntl.fcntl(first, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(first, second, *rest)

    write_all(tmp_path / "direct", big_tensors_once := big_tensors())
    monkeypatch.setattr(os, real.__name__, fake)
    write_all(tmp_path / "cached", big_tensors_once)
    assert bytes_of(tmp_path / "cached") == bytes_of(tmp_path / "direct")


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({}, {}, "without tensors cannot be written"),
        ({"a": (torch.quint8, (2,))}, {}, "cannot hold torch.quint8"),
        ({"__metadata__": (torch.int8, (2,))}, {}, "cannot be named '__metadata__'"),
        ({"\ud800": (torch.int8, (2,))}, {}, "not Unicode text"),
        ({"a": (torch.int8, (2,))}, {"max_shard_size": "5 apples"}, "'5 apples' is no size"),
        ({"a": (torch.int8, (2,))}, {"max_shard_size": None}, "None is no size"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is(tmp_path, tensors, options, message):
    with pytest.raises(CheckpointError, match=message):
        WholeSink(tmp_path / "ours", tensors, fingerprint="1", **options)
    assert not any(tmp_path.iterdir())


# -- whole or not at all ----------------------------------------------------------------------------------------------


def test_an_incomplete_folder_is_not_published(tmp_path):
    with (
        sink_of(tmp_path / "ours", big_tensors()) as sink,
        pytest.raises(CheckpointError, match="4 shards were not wr"),
    ):
        sink.publish()
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("nbytes", "message"), [(5, r"has \d+ bytes; \d+ were written"), (10**6, "were written to it")]
)
def test_a_shard_takes_exactly_its_bytes(tmp_path, nbytes, message):
    with sink_of(tmp_path / "ours", big_tensors()) as sink:
        with pytest.raises(CheckpointError, match=message), sink.shards[0].open():
            sink.shards[0].write(bytes(nbytes))
        assert not sink.shards[0].done
        write_tensors(sink, big_tensors())  # and may be written again
        sink.publish()


def test_shards_are_written_one_by_one_and_once(tmp_path):
    tensors = big_tensors()
    with sink_of(tmp_path / "ours", tensors) as sink:
        with (
            pytest.raises(CheckpointError, match="cannot be opened while"),
            sink.shards[0].open(),
            sink.shards[1].open(),
        ):
            pass
        write_tensors(sink, tensors)
        with pytest.raises(CheckpointError, match="is done"), sink.shards[0].open():
            pass


def test_tensors_elsewhere_or_with_gaps_are_refused(tmp_path):
    with sink_of(tmp_path / "ours", big_tensors()) as sink:
        for tensor in (torch.zeros(4, 4).T[1:], torch.zeros(3, device="meta")):
            with pytest.raises(CheckpointError, match="cannot be written. Pass .cpu"), sink.shards[0].open():
                sink.shards[0].write(tensor)


def test_an_empty_folder_is_replaced_and_a_full_one_never(tmp_path):
    target = tmp_path / "ours"
    target.mkdir()
    tensors = big_tensors()
    with sink_of(target, tensors) as sink:
        write_tensors(sink, tensors)
        (target / "precious").write_text("1")  # meanwhile
        with pytest.raises(CheckpointError, match="is not empty"):
            sink.publish()
    assert bytes_of(target) == {"precious": b"1"}
    with pytest.raises(CheckpointError, match="is not empty"):
        sink_of(target, tensors)
    (target / "precious").unlink()
    assert write_all(target, tensors) == []  # all shards were kept
    assert beside(target) == [] and len(bytes_of(target)) == 5


def test_a_file_that_changed_size_is_not_published(tmp_path):
    tensors = big_tensors()
    with sink_of(tmp_path / "ours", tensors) as sink:
        write_tensors(sink, tensors)
        sink._behind.check(wait=True)
        os.truncate(sink.folder / sink.shards[1].name, 9)
        with pytest.raises(CheckpointError, match="has 9 bytes instead of"):
            sink.publish()


def test_other_files_are_published_too(tmp_path):
    tensors = big_tensors()
    with sink_of(tmp_path / "ours", tensors) as sink:
        write_tensors(sink, tensors)
        (sink.folder / "deeper").mkdir()
        (sink.folder / "deeper" / "config.json").write_text("{}")
        sink.publish()
    assert (tmp_path / "ours" / "deeper" / "config.json").read_text() == "{}"


def test_a_discarded_folder_leaves_nothing(tmp_path):
    with sink_of(tmp_path / "ours", big_tensors()) as sink:
        write_tensors(sink, big_tensors())
        sink.discard()
    assert not any(tmp_path.iterdir())


# -- two runs ---------------------------------------------------------------------------------------------------------


def test_a_second_run_on_the_same_target_is_refused_at_once(tmp_path):
    tensors = big_tensors()
    with sink_of(tmp_path / "ours", tensors) as sink:
        write_tensors(sink, tensors)
        with pytest.raises(CheckpointError, match="Another run is writing .*ours"):
            sink_of(tmp_path / "ours", tensors)
        sink.publish()
    with pytest.raises(CheckpointError, match="is not empty"):
        sink_of(tmp_path / "ours", tensors)
    assert beside(tmp_path / "ours") == []


def test_a_run_that_waited_at_the_lock_of_one_that_published_sees_the_target(tmp_path, monkeypatch):
    tensors = big_tensors()
    real = fcntl.flock
    first = sink_of(tmp_path / "ours", tensors)
    write_tensors(first, tensors)

    def publish_in_between(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        first.publish()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", publish_in_between)
    with pytest.raises(CheckpointError, match="is not empty"):
        sink_of(tmp_path / "ours", tensors)
    assert beside(tmp_path / "ours") == [] and len(bytes_of(tmp_path / "ours")) == 5


def test_a_lock_on_a_journal_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    tensors = big_tensors()
    real = fcntl.flock
    first = sink_of(tmp_path / "ours", tensors)

    def discard_in_between(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        first.discard()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", discard_in_between)
    with sink_of(tmp_path / "ours", tensors), pytest.raises(CheckpointError, match="Another run is writing"):
        sink_of(tmp_path / "ours", tensors)


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    other = tmp_path / ".ours.growing"
    other.mkdir()
    (other / "thesis.tex").write_text("1")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="is in the way"):
            sink_of(tmp_path / "ours", big_tensors())
        assert bytes_of(other) == {"thesis.tex": b"1"} and beside(tmp_path / "ours") == [".ours.growing"]


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(CheckpointError, match="cannot be locked: No locks available"):
        sink_of(tmp_path / "ours", big_tensors())


# -- interrupted ------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """What interrupts a run."""


def interrupted(target: Path, tensors: dict[str, torch.Tensor], shards: int, **options) -> WholeSink:
    """A run that stops in the middle of a shard."""
    with pytest.raises(Stop), sink_of(target, tensors, **options) as sink:
        for shard in sink.shards[: shards + 1]:
            with shard.open():
                for name in shard.layout:
                    if shard is sink.shards[shards]:
                        shard.write(tensors[name][:50])
                        raise Stop
                    shard.write(tensors[name])
    assert not target.exists()
    return sink


def test_finished_shards_are_kept_and_all_else_is_not(tmp_path):
    tensors = big_tensors()
    write_all(tmp_path / "whole", tensors)
    sink = interrupted(tmp_path / "ours", tensors, 2)
    (sink.folder / "config.json").write_text("of the old run")
    assert write_all(tmp_path / "ours", tensors) == [shard.name for shard in sink.shards[2:]]
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "whole")
    assert beside(tmp_path / "ours") == ["whole"]


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def journal_of(path: Path) -> Path:
    return path.parent.with_name(path.parent.name + ".journal")


@pytest.mark.parametrize(
    "harm",
    [
        flip_last_byte,
        lambda path: os.truncate(path, 100),
        Path.unlink,
        lambda path: journal_of(path).write_bytes(journal_of(path).read_bytes()[:-1]),
        lambda path: journal_of(path).write_bytes(journal_of(path).read_bytes()[:-80] + b"\n"),
    ],
)
def test_a_shard_that_was_harmed_is_written_again(tmp_path, harm):
    tensors = big_tensors()
    write_all(tmp_path / "whole", tensors)
    sink = interrupted(tmp_path / "ours", tensors, 2)
    harm(sink.folder / sink.shards[1].name)
    with sink_of(tmp_path / "ours", tensors) as again:
        assert [shard.done for shard in again.shards] == [True, False, False, False]
        write_tensors(again, tensors)
    assert write_all(tmp_path / "ours", tensors) == []
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("change", ["fingerprint", "shape", "max_shard_size"])
def test_another_growth_begins_anew(tmp_path, change):
    tensors = big_tensors()
    interrupted(tmp_path / "ours", tensors, 2)
    options = {"fingerprint": {"fingerprint": "2"}, "max_shard_size": {"max_shard_size": 900_000}}.get(change, {})
    if change == "shape":
        tensors["layers.3.weight"] = torch.zeros(333, 300)
    write_all(tmp_path / "whole", tensors, **options)
    with sink_of(tmp_path / "ours", tensors, **options) as sink:
        assert not any(shard.done for shard in sink.shards)
        write_tensors(sink, tensors)
        sink.publish()
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "whole")


def run_killed(target: Path, *calls: int) -> dict[str, int]:
    """Let runs be killed at these calls, one after the other, and check what the last one makes."""
    command = [sys.executable, "-m", "tests.checkpoints.killed_writer", str(target), *map(str, calls)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check_killed(target)
    return json.loads(done.stdout)


def check_killed(target: Path) -> None:
    assert {path.name: path.stat().st_size for path in target.iterdir()} == killed_sizes()
    tensors: dict[str, torch.Tensor] = {}
    for path in target.glob("*.safetensors"):
        tensors |= load_file(path)
    assert set(tensors) == set(killed_writer.NAMES)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, killed_writer.rows_of(name, 0, killed_writer.ROWS))


def killed_sizes() -> dict[str, int]:
    """Files of the folder that the killed writer writes, and their bytes."""
    specs = dict.fromkeys(killed_writer.NAMES, (torch.int32, (killed_writer.ROWS, killed_writer.COLUMNS)))
    layout = folder_layout(specs, 2 * killed_writer.ROWS * killed_writer.COLUMNS * 4)
    sizes = {file.name: file.nbytes for file in layout.files}
    return {**sizes, "model.safetensors.index.json": len(layout.index), "config.json": 2}


def test_killed_runs_are_resumed_to_the_same_bytes(tmp_path):
    outcome = run_killed(tmp_path / "ours", 1, 12, 33, 5, 20)
    assert outcome == {"killed": 5, "found": outcome["found"]} and outcome["found"] >= 1
    assert beside(tmp_path / "ours") == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_runs_killed_at_any_call_are_resumed_to_the_same_bytes(tmp_path, seed):
    rng = random.Random(seed)
    for trial in range(4):
        run_killed(tmp_path / f"ours{trial}", *(rng.randrange(1, 60) for _ in range(rng.randrange(1, 8))))
    # A run that dies between taking the name and removing its journal leaves that; the next one at the target removes it.
    for name in beside(tmp_path / "ours0"):
        if name.endswith(".journal"):
            with pytest.raises(CheckpointError, match="is not empty"):
                sink_of(tmp_path / name.removeprefix(".").removesuffix(".growing.journal"), big_tensors())
    assert [name for name in beside(tmp_path / "ours0") if not name.startswith("ours")] == []


# -- full disks -------------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """The kernel refuses to write files beyond a size, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_leaves_what_is_finished(tmp_path):
    tensors = big_tensors()
    tensors["layers.2.weight"] = torch.randn(700, 301)  # more than a shard has: it goes before the shard that is open
    write_all(tmp_path / "whole", tensors)
    with largest_file(500_000), sink_of(tmp_path / "ours", tensors) as sink:
        with pytest.raises(
            CheckpointError, match="could not be written for .*ours: File too large. The target is unt"
        ) as r:
            write_tensors(sink, tensors)
            sink.publish()
        assert isinstance(r.value.__cause__, OSError)
        assert not (tmp_path / "ours").exists()
    assert write_all(tmp_path / "ours", tensors) == [shard.name for shard in sink.shards[1:]]
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
@pytest.mark.parametrize("after", [0, 3, 7])
def test_any_call_that_fails_is_told_and_harms_nothing(tmp_path, monkeypatch, call, after):
    tensors = big_tensors()
    write_all(tmp_path / "whole", tensors)
    real, calls = getattr(os, call), [0]

    def fails(*args):
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fails)
        with (
            pytest.raises(CheckpointError, match="No space left on device"),
            sink_of(tmp_path / "ours", tensors) as sink,
        ):
            write_tensors(sink, tensors)
            sink.publish()
            raise CheckpointError("No space left on device")  # fewer calls than that
    if not (tmp_path / "ours").exists():
        write_all(tmp_path / "ours", tensors)
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "whole")
    assert beside(tmp_path / "ours") == ["whole"]


def test_a_full_disk_reaches_the_caller_before_all_is_computed(tmp_path, monkeypatch):
    tensors = {f"layers.{i}.weight": torch.zeros(50, 1000) for i in range(200)}
    written = 0

    def fails(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with sink_of(tmp_path / "ours", tensors, max_shard_size="5GB") as sink:
        monkeypatch.setattr(os, "pwrite", fails)
        with pytest.raises(CheckpointError, match="No space left"), sink.shards[0].open():
            for name in sink.shards[0].layout:
                sink.shards[0].write(tensors[name])
                written += tensors[name].nbytes
    assert written <= 2 * 2**17


def test_a_failure_in_finishing_a_shard_reaches_the_next_write(tmp_path, monkeypatch):
    tensors = big_tensors()

    def fails(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with sink_of(tmp_path / "ours", tensors) as sink:
        monkeypatch.setattr(os, "fsync", fails)
        with sink.shards[0].open():
            sink.shards[0].write(tensors["layers.0.weight"])
        assert isinstance(sink._behind._finishing[0].exception(timeout=60), OSError)
        with pytest.raises(CheckpointError, match="Input/output error"), sink.shards[1].open():
            pass


def test_a_disk_without_room_is_told_before_the_first_byte(tmp_path, monkeypatch):
    tensors = big_tensors()
    needed = folder_bytes(specs_of(tensors), 450_000)
    free = [needed - 1 + 50]
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free[0], f_frsize=1))
    with pytest.raises(CheckpointError, match=f"takes {needed + 50} more bytes; its disk has {free[0]} free.* 1 more"):
        sink_of(tmp_path / "ours", tensors, other_nbytes=50)
    assert not any(tmp_path.iterdir())
    interrupted(tmp_path / "ours", tensors, 2)
    free[0] = sum(file.nbytes for file in folder_layout(specs_of(tensors), 450_000).files[2:]) + 10_000
    assert len(write_all(tmp_path / "ours", tensors)) == 2  # what is there takes no more room
