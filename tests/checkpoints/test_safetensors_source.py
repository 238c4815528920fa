"""Folders of safetensors are read as the safetensors library reads them, and refused with the reason where they lie."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from hf_warmstart.checkpoints.safetensors.format import DTYPES, build_header
from hf_warmstart.checkpoints.safetensors.source import SafetensorsSource
from hf_warmstart.errors import CheckpointError

from .folders import make_sharded, make_single, some_tensors, specs_of, write_index, write_raw

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*flat)


# -- the format -------------------------------------------------------------------------------------------------------


def test_headers_are_those_of_the_library():
    tensors = {f"t.{name}": torch.zeros(3, dtype=dtype) for name, dtype in DTYPES.items()}
    tensors |= {'a"b\\\n\x01\x7fé\u2028😀/': torch.zeros(2), "Z": torch.zeros(()), "e": torch.zeros(0, 3)}
    for part in (tensors, {"x": torch.zeros(5)}, {"xy": torch.zeros(5)}, some_tensors()):
        header, places = build_header(specs_of(part), "f")
        whole = save(part, {"format": "pt"})
        assert whole.startswith(header)
        assert len(header) + sum(place.nbytes for place in places.values()) == len(whole)


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_single, make_sharded])
def test_rows_and_entries_are_those_of_the_tensor(tmp_path, make):
    with SafetensorsSource(make(tmp_path)) as source:
        assert set(source.tensors) == set(some_tensors())
        for name, tensor in some_tensors().items():
            assert source.tensors[name].dtype == tensor.dtype and source.tensors[name].shape == tuple(tensor.shape)
            assert same(source.read_rows(name), tensor)
            if tensor.ndim and len(tensor) > 2:
                assert same(source.read_rows(name, 1, 3), tensor[1:3])
                assert same(source.read_rows(name, 2, 2), tensor[2:2])
                assert same(source.read_entries(name, 1, 3), tensor.reshape(-1)[1:3])
                out = torch.empty_like(tensor[1:])
                assert source.read_rows(name, 1, out=out).data_ptr() == out.data_ptr() and same(out, tensor[1:])
        source.check_unchanged()


def test_many_threads_read_at_once(tmp_path):
    tensor = torch.arange(200_000).reshape(1000, 200)
    wrong = []
    with SafetensorsSource(make_single(tmp_path, {"w": tensor})) as source:

        def read(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(50):
                start = rng.randrange(900)
                if not same(source.read_rows("w", start, start + 90), tensor[start : start + 90]):
                    wrong.append(start)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda source: source.read_rows("nothing"), "has no tensor 'nothing'"),
        (lambda source: source.read_rows("embed.weight", 3, 13), "has rows 0 to 12, not 3 to 13"),
        (lambda source: source.read_rows("embed.weight", -1, 3), "not -1 to 3"),
        (lambda source: source.read_entries("embed.weight", 0, 97), "has entries 0 to 96, not 0 to 97"),
        (lambda source: source.read_rows("embed.weight", out=torch.empty(12, 8)), "cannot be read into torch.float32"),
    ],
)
def test_what_a_tensor_does_not_have_is_not_read(tmp_path, ask, message):
    with SafetensorsSource(make_single(tmp_path)) as source, pytest.raises(CheckpointError, match=message):
        ask(source)


def test_a_file_cut_off_while_it_is_open_raises(tmp_path):
    with SafetensorsSource(make_single(tmp_path)) as source:
        os.truncate(tmp_path / SINGLE, source.tensors["embed.weight"].offset + 5)
        with pytest.raises(
            CheckpointError, match="'embed.weight' could not be read from .*model.safetensors: the file ends"
        ):
            source.read_rows("embed.weight")


def test_an_error_of_the_disk_names_file_and_tensor(tmp_path, monkeypatch):
    def fails(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with SafetensorsSource(make_single(tmp_path)) as source:
        monkeypatch.setattr(os, "preadv", fails)
        with pytest.raises(CheckpointError, match=r"'scale' could not be read from .*model.safetensors: Input/output"):
            source.read_rows("scale")


def rewrite(path: Path) -> None:
    data = path.read_bytes()
    time.sleep(0.02)
    path.write_bytes(data)


def replace(path: Path) -> None:
    times = path.stat()
    shutil.copy2(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", [rewrite, replace, Path.unlink, lambda path: os.truncate(path, 100)])
@pytest.mark.parametrize("file", ["b.safetensors", INDEX])
def test_a_file_that_changes_meanwhile_is_told(tmp_path, change, file):
    with SafetensorsSource(make_sharded(tmp_path)) as source:
        source.check_unchanged()
        change(tmp_path / file)
        with pytest.raises(CheckpointError, match=f"'{file}' changed while it was read"):
            source.check_unchanged()


def test_the_fingerprint_follows_the_files(tmp_path):
    def fingerprint() -> str:
        with SafetensorsSource(tmp_path) as source:
            return source.fingerprint

    make_sharded(tmp_path)
    before = fingerprint()
    assert fingerprint() == before
    rewrite(tmp_path / "a.safetensors")
    assert fingerprint() != before


# -- faults -----------------------------------------------------------------------------------------------------------

HEADERS = {
    "overlap": ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, 12, "'a' and 'b' overlap by 4 bytes"),
    "twice": ({"a": F32, "b": F32}, 8, "'a' and 'b' overlap by 8 bytes"),
    "gap": ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, 20, "4 bytes before tensor 'b' belong to none"),
    "late": ({"a": {**F32, "data_offsets": [4, 12]}}, 12, "4 bytes before tensor 'a' belong to none"),
    "out of range": ({"a": F32}, 7, "'a': its data end at byte 8, 7 are there"),
    "trailing": ({"a": F32}, 9, "1 trailing bytes belong to no tensor"),
    "size": ({"a": {**F32, "shape": [3]}}, 8, r"F32 of shape \[3\] takes 12 bytes, data_offsets \[0, 8\] span 8"),
    "backwards": ({"a": {**F32, "data_offsets": [8, 0]}}, 8, "are not a begin and an end"),
    "negative": ({"a": {**F32, "data_offsets": [-8, 0]}}, 8, "are not a begin and an end"),
    "one offset": ({"a": {**F32, "data_offsets": [8]}}, 8, "are not a begin and an end"),
    "negative size": ({"a": {**F32, "shape": [-2]}}, 8, "is not a list of at most 64 sizes"),
    "boolean size": ({"a": {**F32, "shape": [2, True]}}, 8, "is not a list of at most 64 sizes"),
    "fraction": ({"a": {**F32, "shape": [2.0]}}, 8, "is not a list of at most 64 sizes"),
    "dimensions": ({"a": {**F32, "shape": [2, *[1] * 64]}}, 8, "is not a list of at most 64 sizes"),
    "overflow": ({"a": {**F32, "shape": [2**32, 2**32, 0]}}, 8, "more entries than a tensor can have"),
    "dtype": ({"a": {**F32, "dtype": "F4"}}, 8, "'a': unknown dtype 'F4'"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "no dtype, shape and data_offsets"),
    "no table": ({"a": [1]}, 8, "no dtype, shape and data_offsets"),
    "metadata": ({"__metadata__": {"format": 1}, "a": F32}, 8, "__metadata__ is not a table of texts"),
    "list": ([F32], 8, r"does not begin with '\{'"),
    "not JSON": (b'{"a": }', 8, "its header is not JSON: Expecting value"),
    "duplicates": (b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', 8, "'shape' appears twice"),
    "not UTF-8": (b'{"\xff":1}', 8, "not UTF-8 at byte 2"),
    "surrogate": (b'{"\\ud800":1}', 8, "is not Unicode text"),
    "NaN": (b'{"a":NaN}', 8, "NaN is not JSON"),
    "nesting": (b'{"a":' + b"[" * 200_000, 8, "nested too deeply"),
    "digits": (b'{"a":' + b"9" * 100_000 + b"}", 8, "is not JSON"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie_are_refused(tmp_path, case):
    header, nbytes, message = HEADERS[case]
    write_raw(tmp_path / SINGLE, header, bytes(nbytes))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (2**63, "absurd"),
        (100_000_001, "absurd"),
        (10_000, r"does not fit into the file of \d+ \(truncated\?\)"),
        (0, "does not begin with"),
    ],
)
def test_absurd_lengths_of_headers_are_refused(tmp_path, length, message):
    write_raw(tmp_path / SINGLE, {"a": F32}, bytes(8), length)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsSource(tmp_path)


def move_tensor(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, {**weight_map, "scale": "a.safetensors"})


def edit_index(**changes: object):
    def edit(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        write_index(folder, {key: value for key, value in {**weight_map, **changes}.items() if value is not None})

    return edit


def link_out(folder: Path) -> None:
    shutil.move(folder / "a.safetensors", folder.parent / "outside.safetensors")
    (folder / "a.safetensors").symlink_to("../outside.safetensors")


def pipe(folder: Path) -> None:
    (folder / "a.safetensors").unlink()
    os.mkfifo(folder / "a.safetensors")


FOLDERS = {
    "missing": (lambda f: (f / "a.safetensors").unlink(), "'a.safetensors': the file is missing"),
    "broken link": (
        lambda f: [(f / "a.safetensors").unlink(), (f / "a.safetensors").symlink_to("nowhere")],
        "'a.safetensors': a link to .*nowhere, which is not there",
    ),
    "link out": (link_out, "'a.safetensors': a link that leads out of the folder"),
    "pipe": (pipe, "'a.safetensors': not a file"),
    "empty": (lambda f: (f / "a.safetensors").write_bytes(b""), "0 bytes are too few"),
    "cut": (lambda f: os.truncate(f / "a.safetensors", 400), "'a.safetensors': tensor .* its data end at byte"),
    "both": (
        lambda f: shutil.copy(f / "a.safetensors", f / "b.safetensors"),
        "Tensor 'embed.weight' is in 'a.safetensors' and in 'b.safetensors'",
    ),
    "elsewhere": (move_tensor, "'b.safetensors': 1 tensors in it belong elsewhere by the index: 'scale'"),
    "not there": (move_tensor, "'a.safetensors': 1 tensors that the index names are not in it: 'scale'"),
    "more in the index": (edit_index(more="a.safetensors"), "1 tensors that the index names are not in it: 'more'"),
    "less in the index": (edit_index(scale=None), "'b.safetensors': 1 tensors in it are not in the index: 'scale'"),
    "absolute": (edit_index(more="/etc/a.safetensors"), "names files that are no safetensors of this folder: '/etc"),
    "parent": (edit_index(more="x/../../a.safetensors"), "names files that are no safetensors of this folder"),
    "zero byte": (edit_index(more="a\0.safetensors"), "names files that are no safetensors of this folder"),
    "pickle": (edit_index(more="pytorch_model.bin"), "names files that are no safetensors of this folder: 'pytorch_m"),
    "number": (edit_index(more=3), "names files that are no safetensors of this folder: 3"),
    "long name": (edit_index(more="a" * 5000 + ".safetensors"), r"\(5014 characters\): the file is missing|too long"),
    "no map": (lambda f: write_index(f, []), "index.json: it has no weight_map"),
    "no JSON": (lambda f: (f / INDEX).write_text("{"), "index.json cannot be used"),
    "deep": (lambda f: (f / INDEX).write_text('{"a":' * 100_000), "nested too deeply"),
    "index twice": (lambda f: (f / INDEX).write_text('{"weight_map":{"a":"b","a":"c"}}'), "'a' appears twice"),
    "no index": (lambda f: (f / INDEX).unlink(), "but 'a.safetensors', 'b.safetensors'. Add the index"),
    "only pickles": (
        lambda f: [shutil.rmtree(f), f.mkdir(), (f / "pytorch_model.bin").write_bytes(b"\x80")],
        "but pickled weights: 'pytorch_model.bin'. They are not read here",
    ),
    "nothing": (lambda f: [shutil.rmtree(f), f.mkdir()], "neither .* nor .* Pass the folder that holds"),
    "no folder": (shutil.rmtree, "is not a folder"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_lie_are_refused(tmp_path, case):
    break_it, message = FOLDERS[case]
    folder = make_sharded(tmp_path / "model")
    break_it(folder)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsSource(folder)


def test_all_that_is_wrong_is_told_at_once_and_nothing_stays_open(tmp_path):
    make_sharded(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    write_raw(tmp_path / "b.safetensors", {"x": {**F32, "dtype": "Q4"}, "y": {**F32, "shape": [9]}}, bytes(8))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match="(?s)missing.*'Q4'.*takes 36 bytes") as raised:
        SafetensorsSource(tmp_path)
    assert len(raised.value.problems) == 3
    assert len(os.listdir("/proc/self/fd")) == before


def hub_cache(root: Path) -> Path:
    """A repository in the Hub's cache; returns its snapshot."""
    repository = root / "models--org--name"
    snapshot = make_sharded(repository / "snapshots" / "c0ffee")
    (repository / "blobs").mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(repository / "blobs" / f"sha-{path.name}")
        path.symlink_to(f"../../blobs/sha-{path.name}")
    return snapshot


def test_snapshots_of_the_hubs_cache_are_read(tmp_path):
    with SafetensorsSource(hub_cache(tmp_path)) as source:
        assert same(source.read_rows("scale"), some_tensors()["scale"])


@pytest.mark.parametrize("end", ["../../refs/a", "../../../models--other/blobs/a", "../../blobs/deeper/a"])
def test_other_links_in_the_hubs_cache_are_not_followed(tmp_path, end):
    snapshot = hub_cache(tmp_path)
    elsewhere = Path(os.path.normpath(snapshot / end))
    elsewhere.parent.mkdir(parents=True)
    shutil.copy(snapshot / "a.safetensors", elsewhere)
    (snapshot / "a.safetensors").unlink()
    (snapshot / "a.safetensors").symlink_to(end)
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        SafetensorsSource(snapshot)


# -- random damage ----------------------------------------------------------------------------------------------------


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Bytes with a few of them changed, taken away, doubled, or replaced by ones that JSON cares about."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(5)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.choice((1, 2, 8, 50))]
        elif kind == 2:
            data[at:at] = data[at : at + rng.choice((1, 8, 60))]
        elif kind == 3:
            data[at : at + 1] = rng.choice(
                [
                    b"0",
                    b"1",
                    b"9",
                    b"-",
                    b'"',
                    b"{",
                    b"}",
                    b"[",
                    b"]",
                    b",",
                    b":",
                    b"\\",
                    b" ",
                    b"null",
                    b"1e3",
                    b"[[",
                    b"true",
                ]
            )
        else:
            data = data[:at]
    return bytes(data)


def odd_value(rng: random.Random) -> object:
    return rng.choice(
        [
            None,
            -1,
            0,
            1,
            2,
            8,
            12,
            96,
            2**31,
            2**63,
            2**64,
            10**30,
            1.5,
            True,
            "F32",
            "I64",
            "BOOL",
            "X",
            "",
            [],
            [0],
            {},
        ]
    )


def mutate_json(rng: random.Random, value: object) -> object:
    """A JSON value with one thing in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        new_key = rng.choice([key, key, key, key, rng.choice(list(value)), "", "__metadata__", "\u2028", "é"])
        return {**{k: v for k, v in value.items() if k != key}, new_key: mutate_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return rng.choice(
            [[*value[:at], mutate_json(rng, value[at]), *value[at + 1 :]], value[:at], value[::-1], [*value, 1]]
        )
    return odd_value(rng)


def damage(rng: random.Random, folder: Path) -> None:
    """Break one thing of a folder, or nothing that matters."""
    files = sorted(path for path in folder.iterdir())
    path = rng.choice(files)
    data = path.read_bytes()
    kind = rng.randrange(6)
    if path.name == INDEX:
        text = mutate(rng, data) if kind < 3 else json.dumps(mutate_json(rng, json.loads(data))).encode()
        path.write_bytes(text)
        return
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    if kind == 0:
        path.write_bytes(mutate(rng, data))
    elif kind == 1:
        write_raw(path, mutate(rng, header), rest)
    elif kind in (2, 3):
        write_raw(path, mutate_json(rng, json.loads(header)), rest)
    elif kind == 4:
        write_raw(path, header, rest, rng.choice([0, size - 1, size + 1, size + len(rest), 2**31, 2**40, 2**64 - 1]))
    else:
        rng.choice([Path.unlink, lambda p: p.rename(p.with_name("c.safetensors")), lambda p: p.write_bytes(data * 2)])(
            path
        )


def as_the_library_reads(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / SINGLE).exists():
        return load_file(folder / SINGLE)
    files = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


@pytest.mark.parametrize("make", [make_single, make_sharded])
def test_random_damage_ends_in_the_right_tensors_or_an_error(tmp_path, make):
    rng = random.Random(20)
    whole = make(tmp_path / "whole")
    outcomes = {"right": 0, "refused": 0}
    for trial in range(550):
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        damage(rng, folder)
        began = time.process_time()
        try:
            with SafetensorsSource(folder) as source:
                read = {name: source.read_rows(name) for name in source.tensors}
        except CheckpointError:
            outcomes["refused"] += 1
        else:
            expected = as_the_library_reads(folder)
            assert set(read) == set(expected), trial
            assert all(same(read[name], expected[name]) for name in read), trial
            outcomes["right"] += 1
        assert time.process_time() - began < 1.0, trial
        shutil.rmtree(folder)
    assert min(outcomes.values()) > 20, outcomes
