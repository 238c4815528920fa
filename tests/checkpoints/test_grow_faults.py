"""Whatever happens, a growth ends finished and right, or with a clear error and the target untouched."""

from __future__ import annotations

import builtins
import errno
import io
import json
import logging
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from hf_warmstart import WarmstartError, grow, grow_checkpoint
from hf_warmstart.checkpoints.grow_checkpoint import prepare_growth
from hf_warmstart.checkpoints.state import training_files
from hf_warmstart.checkpoints.target.staging import Staging, journal_path, staging_folder
from hf_warmstart.checkpoints.torch_files.later import Later, save_sharded
from hf_warmstart.checkpoints.weights import whole as whole_weights
from hf_warmstart.cli import main
from hf_warmstart.errors import CheckpointError, StateError

from .growths import GROWTH, bytes_below, do_not_certify, make_checkpoint

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
SLOW = pytest.mark.slow
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made") / "base")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> dict[str, bytes]:
    """What an undisturbed growth writes."""
    with pytest.MonkeyPatch.context() as patched:
        do_not_certify(patched)
        target = tmp_path_factory.mktemp("whole") / "grown"
        grow_checkpoint(base, target, **GROWTH)
    return bytes_below(target)


@pytest.fixture
def source(base, tmp_path, monkeypatch) -> Path:
    """A copy to damage."""
    do_not_certify(monkeypatch)
    return Path(shutil.copytree(base, tmp_path / "base"))


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "out" / "grown"


def refused(source: Path, target: Path, message: str, kind: type[Exception] = WarmstartError, **options) -> str:
    """The message of a growth that ends with an error; neither target nor source may have changed."""
    before = bytes_below(source) if source.is_dir() else {}
    with pytest.raises(kind, match=message) as raised:
        grow_checkpoint(source, target, **{**GROWTH, **options})
    assert not target.exists() and not any(target.parent.glob("*"))
    assert before == (bytes_below(source) if source.is_dir() else {})
    return str(raised.value)


def edit(name: str, **changes: object) -> Change:
    """Change some entries of a JSON file."""

    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**data, **changes}))

    return change


def write(name: str, data: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


# -- killed -----------------------------------------------------------------------------------------------------------


def run_killed(folder: Path, kills: int, seed: int) -> dict:
    command = [sys.executable, "-m", "tests.checkpoints.killed_growth", str(folder), str(kills), str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@SLOW
def test_growths_that_are_killed_run_again_to_the_same_bytes(tmp_path):
    outcome = run_killed(tmp_path, 2, seed=0)
    assert outcome["faults"] == [] and outcome["killed"] >= 1, outcome
    assert sum(outcome["kept"]) > 0, outcome


@SLOW
def test_growths_that_are_killed_at_fifty_points_run_again_to_the_same_bytes(tmp_path):
    outcome = run_killed(tmp_path, 50, seed=1)
    assert outcome["faults"] == [] and outcome["killed"] >= 35, outcome
    assert sum(kept > 0 for kept in outcome["kept"]) >= 5, outcome


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


def shards_in(whole: dict[str, bytes]) -> set[str]:
    return {name for name in whole if name.endswith(".safetensors")}


def finishes(source: Path, target: Path, whole: dict[str, bytes]) -> set[str]:
    """Run after a fault to the end; the files that were kept from the run before."""
    journal = journal_path(target)
    lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
    before = {
        name: (staging_folder(target) / name).stat().st_ino for name in (json.loads(line)["file"] for line in lines)
    }
    grow_checkpoint(source, target, **GROWTH)
    assert bytes_below(target) == whole
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert all((target / name).stat().st_ino == number for name, number in before.items())
    return set(before)


def test_a_disk_that_fills_up_under_the_state_keeps_the_weights(source, target, whole, monkeypatch):
    """The state's file is larger than any file of weights; of its size nothing is known beforehand."""
    monkeypatch.setattr(training_files.TrainingFiles, "nbytes", 0)
    largest = max(len(whole[name]) for name in shards_in(whole))
    assert len(whole["optimizer.pt"]) > largest
    with (
        largest_file(largest + 1),
        pytest.raises(CheckpointError, match="grown could not be written .*The target is unt"),
    ):
        grow_checkpoint(source, target, **GROWTH)
    assert not target.exists()
    assert finishes(source, target, whole) == shards_in(whole)


def test_a_disk_that_fills_up_under_the_weights_keeps_what_is_finished(source, target, whole, monkeypatch):
    sizes = {name: len(data) for name, data in sorted(whole.items()) if name.endswith(".safetensors")}
    limit = next(size for size in list(sizes.values())[1:] if size > list(sizes.values())[0])
    monkeypatch.setattr(training_files.TrainingFiles, "nbytes", 0)
    with largest_file(limit - 1), pytest.raises(CheckpointError, match="File too large. The target is untouched"):
        grow_checkpoint(source, target, **GROWTH)
    assert not target.exists()
    monkeypatch.undo()
    do_not_certify(monkeypatch)
    assert 0 < len(finishes(source, target, whole)) < len(sizes)


@SLOW
def test_a_small_disk_fills_up_and_with_room_the_growth_goes_on(source, tmp_path, whole, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(len(data) for data in whole.values())
    options = f"size={(size // 2 // 4096) * 4096}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(CheckpointError, match=r"takes \d+ more bytes; its disk has \d+ free"):
            grow_checkpoint(source, disk / "grown", **GROWTH)
        assert not any(disk.iterdir())  # known beforehand
        with monkeypatch.context() as patched:
            patched.setattr(
                Staging, "check_room", lambda self, needed: None
            )  # another process takes the room meanwhile
            with pytest.raises(CheckpointError, match="is the disk full|No space left on device"):
                grow_checkpoint(source, disk / "grown", **GROWTH)
        assert not (disk / "grown").exists()
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert finishes(source, disk / "grown", whole)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_without_room_is_told_before_the_first_byte(source, target, monkeypatch):
    with closing(prepare_growth(source, target, **GROWTH)) as growth:
        needed = growth.output_bytes
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=needed - 1, f_frsize=1, f_namemax=255))
    refused(source, target, f"takes {needed} more bytes; its disk has {needed - 1} free")


@pytest.mark.parametrize(
    "name",
    [
        "growth.json",
        *(
            pytest.param(name, marks=SLOW)
            for name in ("config.json", "generation_config", "trainer_state", "tokenizer")
        ),
    ],
)
def test_small_files_that_cannot_be_written_are_told_too(name, source, target, whole, monkeypatch):
    real = open

    def opens(path, mode="r", *rest, **options):
        writes = "w" in mode and not isinstance(path, int) and staging_folder(target) in Path(path).parents
        if writes and Path(path).name.startswith(name):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, mode, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", opens)
        patched.setattr(io, "open", opens)
        with pytest.raises(CheckpointError, match=f"No space left on device .*{name}.*The target is untouched"):
            grow_checkpoint(source, target, **GROWTH)
    assert not target.exists()
    assert finishes(source, target, whole) == shards_in(whole)


def test_shards_of_a_sharded_checkpoint_that_cannot_be_written_are_told(tmp_path):
    made = Later((1000, 100), torch.float32, lambda rows: torch.zeros(1000, 100))
    with largest_file(10_000), pytest.raises(CheckpointError, match="shards could not be written"):
        save_sharded({"model": {"weight": made}}, tmp_path / "shards", None)


@SLOW
def test_pickled_weights_that_cannot_be_written_are_told(source, target, monkeypatch):
    only_pickled(source, LlamaForCausalLM.from_pretrained(source).state_dict())
    for name in ("optimizer.pt", "trainer_state.json"):
        (source / name).unlink()
    with (
        largest_file(10_000),
        pytest.raises(CheckpointError, match="could not be written for .*The target is untouched"),
    ):
        grow_checkpoint(source, target, **GROWTH)
    assert not any(target.parent.iterdir())


# -- what is read -----------------------------------------------------------------------------------------------------


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def reindex(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    data = json.loads((folder / INDEX).read_text())
    change(data["weight_map"])
    (folder / INDEX).write_text(json.dumps(data))


def resave(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def move_out(name: str) -> Change:
    """Move a file out of the folder and leave a link to it."""

    def change(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return change


def first_shard(change: Callable[[Path], object]) -> Change:
    return lambda folder: change(shards_of(folder)[0])


READ = {
    "truncated shard": (first_shard(lambda path: os.truncate(path, path.stat().st_size - 3)), "a truncated file"),
    "empty shard": (first_shard(lambda path: os.truncate(path, 0)), "0 bytes are too few"),
    "missing shard": (first_shard(Path.unlink), "the file is missing"),
    "no index": (lambda folder: (folder / INDEX).unlink(), "Add the index"),
    "index of another shard": (
        lambda folder: reindex(folder, lambda m: m.update(dict.fromkeys(m, shards_of(folder)[0].name))),
        "tensors that the index names are not in it",
    ),
    "index that leads out": (
        lambda folder: reindex(folder, lambda m: m.update({next(iter(m)): "../x.safetensors"})),
        r"names files that are no safetensors of this folder: '\.\./x",
    ),
    "index with a root": (
        lambda folder: reindex(folder, lambda m: m.update({next(iter(m)): "/etc/x.safetensors"})),
        "names files that are no safetensors of this folder: '/etc",
    ),
    "extra tensor": (
        first_shard(lambda path: resave(path, lambda t: t.update(extra=torch.zeros(2)))),
        "1 tensors in it are not in the index: 'extra'",
    ),
    "shard out of the folder": (lambda folder: move_out(shards_of(folder)[0].name)(folder), "leads out of the folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "Put the model's config.json there"),
    "half a config": (
        write("config.json", '{"model_type": "llama", '),
        "No model config could be read .* line 1 column 25",
    ),
    "config of nothing": (write("config.json", "null"), "holds no JSON object"),
    "deep config": (write("config.json", '{"model_type": "llama", "a": ' + "[" * 500 + "]" * 500 + "}"), "nested"),
    "config of bytes": (write("config.json", b"\xff\xfe\x00"), "No model config could be read"),
    "config with NaN": (edit("config.json", hidden_size=float("nan")), "expected int, got float .value: nan"),
    "config of texts": (
        edit("config.json", hidden_size="16"),
        "(?s)StrictDataclass.*expected int, got str",
    ),
    "no heads": (edit("config.json", num_attention_heads=0), "ZeroDivisionError"),
    "no dtype": (edit("config.json", dtype="float17"), "has no attribute 'float17'"),
    "no such model": (edit("config.json", model_type="elephant"), "does not recognize"),
    "no such activation": (edit("config.json", hidden_act="none"), "cannot be built from this config: KeyError"),
    "other sizes": (
        edit("config.json", vocab_size=96),
        "The files do not fit LlamaForCausalLM: they give lm_head.weight of",
    ),
    "more layers": (edit("config.json", num_hidden_layers=2), "files lack .*model.layers.1.mlp"),
    "many layers": (edit("config.json", num_hidden_layers=90_000), "They do not belong together"),
    "endless layers": (edit("config.json", num_hidden_layers=10**9), "at most 100000 can be"),
    "endless labels": (edit("config.json", num_labels=10**9), "at most 100000 can be"),
    "endless rows": (edit("config.json", vocab_size=10**12), "They do not belong together"),
    "endless units": (edit("config.json", intermediate_size=10**30), "cannot be built from this config"),
    "no records": (edit("config.json", warmstart="x"), "[Rr]ecord"),
    "generation config": (write("generation_config.json", "{"), "generation_config.json in .* cannot be used"),
    "generation list": (write("generation_config.json", "[1]"), "generation_config.json in .* cannot be used"),
    "trainer state": (write("trainer_state.json", "{"), "trainer_state.json in .* is damaged"),
    "trainer state of nothing": (write("trainer_state.json", "[]"), "holds no JSON object"),
    "trainer state of no step": (edit("trainer_state.json", global_step="x"), "must be a whole number"),
    "our state": (write("warmstart_state.json", "{"), "warmstart_state.json in .* is damaged"),
    "half an optimizer": (lambda folder: os.truncate(folder / "optimizer.pt", 3000), "optimizer.pt cannot be read"),
    "text for an optimizer": (write("optimizer.pt", "x"), "optimizer.pt is damaged"),
    "list for an optimizer": (lambda folder: torch.save([1], folder / "optimizer.pt"), "holds no optimizer's state"),
    "optimizer of lists": (
        lambda folder: torch.save({"state": {0: [1]}, "param_groups": []}, folder / "optimizer.pt"),
        "holds no optimizer's state",
    ),
    "optimizer of strangers": (
        lambda folder: torch.save({"state": {7: {}}, "param_groups": [{"params": [0]}]}, folder / "optimizer.pt"),
        "in none of its groups",
    ),
    "list for a schedule": (lambda folder: torch.save([1], folder / "scheduler.pt"), "last_epoch=None"),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("model*")],
        "has neither model.safetensors nor .*index.json. Pass the folder that holds a model's weights",
    ),
}


@pytest.mark.parametrize("case", READ)
def test_damaged_sources_are_refused_with_the_reason(case, source, target):
    change, message = READ[case]
    change(source)
    refused(source, target, message)


def test_all_that_is_wrong_with_the_files_is_told_at_once(source, target):
    first, second, third = shards_of(source)
    resave(first, lambda tensors: tensors.pop(next(iter(tensors))))
    resave(second, lambda tensors: tensors.update(extra=torch.zeros(2)))
    os.truncate(third, third.stat().st_size - 3)
    message = refused(source, target, "cannot be used", CheckpointError)
    assert all(words in message for words in (first.name, second.name, third.name, "'extra'", "truncated"))


def test_all_missing_tensors_and_wrong_shapes_are_told_at_once(source, target):
    """Here files and index agree, and it is the model that they do not fit."""
    gone, wrong = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
    for path in shards_of(source):
        resave(
            path,
            lambda tensors: (tensors.pop(gone, None), wrong in tensors and tensors.update({wrong: torch.ones(3, 16)})),
        )
    reindex(source, lambda weight_map: weight_map.pop(gone))
    message = refused(source, target, "files do not fit LlamaForCausalLM", CheckpointError)
    assert gone in message and f"{wrong} of (3, 16) for (24, 16)" in message


@pytest.mark.parametrize("after", [0, 2, 20, pytest.param(30, marks=SLOW), pytest.param(40, marks=SLOW)])
def test_errors_of_the_disk_that_is_read_are_told(after, source, target, monkeypatch):
    real, calls = os.preadv, [0]

    def fails(*arguments):
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", fails)
    refused(source, target, "Input/output error", max_shard_size="5GB")


@SLOW
def test_an_optimizer_that_cannot_be_read_any_more_leaves_the_weights(source, target, whole, monkeypatch):
    real = os.preadv

    def fails(descriptor, *arguments):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("optimizer.pt"):
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, *arguments)

    write_optimizer = training_files.write_optimizer

    def from_here(*arguments, **options):
        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", fails)
            write_optimizer(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(training_files, "write_optimizer", from_here)
        with pytest.raises(StateError, match="optimizer.pt cannot be read .*Input/output error"):
            grow_checkpoint(source, target, **GROWTH)
    assert not target.exists() and finishes(source, target, whole) == shards_in(whole)


def rewrite(path: Path) -> None:
    data = path.read_bytes()
    time.sleep(0.02)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    "change", [rewrite, lambda path: os.truncate(path, 900), Path.unlink, lambda path: path.touch()]
)
def test_sources_that_change_while_they_are_read_are_told(change, source, target, monkeypatch):
    real = whole_weights.stream_weights

    def meanwhile(*arguments, **options):
        change(shards_of(source)[1])
        real(*arguments, **options)

    monkeypatch.setattr(whole_weights, "stream_weights", meanwhile)
    with pytest.raises(CheckpointError, match="may be a mixture; read it again|changed while it was read"):
        grow_checkpoint(source, target, **GROWTH)
    assert not target.exists()


def test_an_optimizer_that_changes_while_it_is_read_is_told(source, target, monkeypatch):
    real = training_files.write_optimizer

    def meanwhile(*arguments, **options):
        rewrite(source / "optimizer.pt")
        real(*arguments, **options)

    monkeypatch.setattr(training_files, "write_optimizer", meanwhile)
    with pytest.raises(StateError, match="optimizer.pt was written to while it was read"):
        grow_checkpoint(source, target, **GROWTH)
    assert not target.exists()


def test_files_beside_the_weights_that_lead_out_are_not_taken_along(source, target, whole, caplog):
    move_out("tokenizer.json")(source)
    (source / "notes.txt").symlink_to(source / "config.json")
    with caplog.at_level(logging.WARNING):
        grow_checkpoint(source, target, **GROWTH)
    assert f"tokenizer.json is a link out of {source}" in caplog.text
    made = bytes_below(target)
    assert made.pop("notes.txt") == (source / "config.json").read_bytes()
    assert made == {name: data for name, data in whole.items() if name != "tokenizer.json"}


# -- what must not run ------------------------------------------------------------------------------------------------


class Marker:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self._path = str(path)

    def __reduce__(self):
        return os.mkdir, (self._path,)


def only_pickled(folder: Path, content: object) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(content, folder / "pytorch_model.bin")


def test_pickled_weights_that_would_run_something_are_refused(source, target, tmp_path):
    only_pickled(source, {"model.norm.weight": Marker(tmp_path / "ran"), "more": torch.zeros(9999)})
    refused(source, target, "hold more than plain tensors; nothing of them was run", CheckpointError)
    assert not (tmp_path / "ran").exists()


def test_plain_pickled_weights_are_grown_in_memory(source, target, monkeypatch):
    parent = LlamaForCausalLM.from_pretrained(source)
    only_pickled(source, parent.state_dict())
    grow_checkpoint(source, target, **GROWTH)
    expected, found = grow(parent, width=2).state_dict(), LlamaForCausalLM.from_pretrained(target).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda state: {name: t for name, t in state.items() if "up_proj" not in name}, "lack 1 tensors of .*up_proj"),
        (lambda state: {**state, "lm_head.weight": torch.zeros(3, 3)}, "cannot be loaded from .*"),
        (lambda state: [torch.zeros(9999)], "cannot be loaded from"),
    ],
)
def test_pickled_weights_of_another_model_are_refused(content, message, source, target):
    only_pickled(source, content(LlamaForCausalLM.from_pretrained(source).state_dict()))
    refused(source, target, message, CheckpointError)


def test_truncated_pickled_weights_are_refused(source, target):
    only_pickled(source, LlamaForCausalLM.from_pretrained(source).state_dict())
    os.truncate(source / "pytorch_model.bin", 20_000)
    refused(source, target, "cannot be loaded from", CheckpointError)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_states_that_would_run_something_are_refused(name, source, target, tmp_path):
    torch.save({"state": {}, "param_groups": [], "last_epoch": Marker(tmp_path / "ran")}, source / name)
    refused(source, target, f"{name} is damaged, or holds more than plain tensors and numbers", StateError)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_of_no_use_are_never_unpickled(source, target, tmp_path):
    for name in ("training_args.bin", "rng_state.pth", "scaler.pt"):
        (source / name).write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    grow_checkpoint(source, target, **GROWTH)
    assert not (tmp_path / "ran").exists()
    assert not (target / "training_args.bin").exists()  # the parent's, of which the grown run has its own
    assert (target / "scaler.pt").read_bytes() == (source / "scaler.pt").read_bytes()


def test_a_checkpoints_own_code_neither_runs_nor_is_asked_for(source, target, tmp_path, monkeypatch):
    (source / "configuration_own.py").write_text(
        f"import os; os.mkdir({str(tmp_path / 'ran')!r})\nfrom transformers import LlamaConfig as OwnConfig\n"
    )
    code = {"auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}}

    def asked(*_: object) -> str:
        (tmp_path / "asked").touch()
        return "y"

    monkeypatch.setattr(builtins, "input", asked)
    edit("config.json", **code)(source)
    grow_checkpoint(source, target, **GROWTH)  # transformers has a class of that type itself
    shutil.rmtree(target.parent)
    edit("config.json", model_type="own", **code)(source)
    refused(
        source, target, "No code from a checkpoint is run here: load the model as you trust it, and pass it to grow"
    )
    assert not (tmp_path / "ran").exists() and not (tmp_path / "asked").exists()


# -- where it is written ----------------------------------------------------------------------------------------------


def test_two_runs_on_one_target_are_one_run_and_an_error(source, target, whole, monkeypatch):
    """The second comes while the first writes, from another process, and is refused at once."""
    writes, may_go_on = threading.Event(), threading.Event()
    real = whole_weights.stream_weights

    def slowly(*arguments, **options):
        writes.set()
        assert may_go_on.wait(60)
        real(*arguments, **options)

    monkeypatch.setattr(whole_weights, "stream_weights", slowly)
    outcome = []
    first = threading.Thread(target=lambda: outcome.append(grow_checkpoint(source, target, **GROWTH)))
    first.start()
    assert writes.wait(60)
    before = bytes_below(target.parent)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=f"Another run is writing {target}"):
        grow_checkpoint(source, target, **GROWTH)
    assert time.monotonic() - start < 30
    assert bytes_below(target.parent) == before
    may_go_on.set()
    first.join()
    assert outcome and bytes_below(target) == whole and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=SLOW)])
def test_a_target_that_appears_meanwhile_stays_as_it_is(when, source, target, whole, monkeypatch):
    """After everything was checked, or when all is written but the name."""
    growth = prepare_growth(source, target, **GROWTH)

    def appear() -> None:
        target.mkdir(parents=True)
        (target / "mine.txt").write_text("precious")

    if when == "before":
        appear()
    else:
        real = Staging.publish
        monkeypatch.setattr(Staging, "publish", lambda self: (appear(), real(self)))
    with closing(growth), pytest.raises(CheckpointError, match="is not empty"):
        growth.run()
    assert bytes_below(target) == {"mine.txt": b"precious"}
    if when == "after":
        monkeypatch.undo()
        do_not_certify(monkeypatch)
        shutil.rmtree(target)
        assert finishes(source, target, whole) == shards_in(whole)


def test_targets_that_meet_the_source_are_refused(source, target, tmp_path):
    before = bytes_below(tmp_path)
    (tmp_path / "link").symlink_to(source)
    for wrong, message in (
        (source, "is not empty"),
        (tmp_path / "link", "is not empty"),
        (source / "grown", "lies in the source"),
        (source / "deeper" / "grown", "lies in the source"),
        (tmp_path / "link" / "grown", "lies in the source"),
        (tmp_path, "is not empty"),
    ):
        with pytest.raises(CheckpointError, match=message):
            grow_checkpoint(source, wrong, **GROWTH)
    (tmp_path / "link").unlink()
    assert bytes_below(tmp_path) == before


def test_what_an_unfinished_run_left_is_no_source_of_the_same_run(source, target):
    """It would be thrown away while it is read."""
    left = staging_folder(target)
    shutil.copytree(source, left)
    journal_path(target).write_text('{"fingerprint": "1"}\n')
    before = bytes_below(target.parent)
    with pytest.raises(CheckpointError, match="is what an unfinished run to .* left"):
        grow_checkpoint(left, target, **GROWTH)
    assert bytes_below(target.parent) == before


def test_targets_that_cannot_be_are_refused_and_odd_names_are_not(source, target, whole, tmp_path):
    (tmp_path / "file").write_text("mine")
    before = bytes_below(tmp_path)
    for wrong, message in (
        (tmp_path / "file", "is not empty"),
        (tmp_path / "file" / "grown", "is no folder that this process may write to"),
        (f"{tmp_path}/a\0b", "cannot be the target: embedded null"),
        (tmp_path / ("a" * 245), "its name is too long"),
        (tmp_path / ("a" * 300), "cannot be the target: .*too long"),
        ("", "is not empty"),
    ):
        with pytest.raises(CheckpointError, match=message):
            grow_checkpoint(source, wrong, **GROWTH)
    assert bytes_below(tmp_path) == before
    odd = target.parent / " ü\n%[x]{y}'\"$(z);*.\udcff"
    grow_checkpoint(source, odd, **GROWTH)
    made = bytes_below(odd)
    # torch calls the archive in a file otherwise where the path is not ASCII.
    left, right = (torch.load(io.BytesIO(data["optimizer.pt"])) for data in (made, whole))
    assert str(left) == str(right)
    assert {**made, "optimizer.pt": b""} == {**whole, "optimizer.pt": b""}


def test_a_folder_that_may_not_be_written_is_told_before_anything_is(source, target, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode, **options: False)  # tests may run as root, who may all
    refused(source, target, "is no folder that this process may write to", CheckpointError)


def test_a_folder_that_turns_out_to_be_unwritable_is_told(source, target, monkeypatch):
    real = os.mkdir

    def fails(path, *rest, **options) -> None:
        if Path(path) == staging_folder(target):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        real(path, *rest, **options)

    monkeypatch.setattr(os, "mkdir", fails)
    refused(source, target, "could not be written for .*Permission denied", CheckpointError)


# -- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        *(({"threads": wrong}, "Pass a whole number, 1 or more") for wrong in (0, -1, "x", 1.5)),
        *(
            ({"max_shard_size": wrong}, "max_shard_size=.* is no size")
            for wrong in ("5 apples", "", 0, -1, None, 1.5, True, float("nan"), "0GB", "-5GB", [])
        ),
        *(({"max_memory": wrong}, "max_memory=.* is no size") for wrong in ("x", 0, -1, 1.5)),
        ({"max_memory": "1MB"}, "max_memory='1MB' cannot be kept: .* Pass at least"),
        ({"state_policy": "x"}, "state_policy"),
        ({"hidden_size": 33}, "cannot grow"),
        ({"elephants": 3}, "elephants"),
        ({"revision": "main"}, "is a folder"),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_is_written(asked, message, source, target):
    refused(source, target, message, **asked)


def test_the_command_ends_with_a_message_and_no_trace(source, target, capsys):
    os.truncate(shards_of(source)[0], 100)
    arguments = ["grow", str(source), str(target), "--width", "2"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("hf-warmstart grow: The safetensors in") and "Traceback" not in said
    assert not target.parent.exists()
