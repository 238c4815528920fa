"""Folders with random damage end, within seconds, as a plan or as an error of ours; nothing is written."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hf_warmstart import WarmstartError
from hf_warmstart.checkpoints.grow_checkpoint import prepare_growth

from .growths import GROWTH, make_checkpoint

INDEX = "model.safetensors.index.json"
SECONDS = 10  # for one folder, on a busy machine
NUMBERS = (0, 1, -1, 2, 3, 7, 16, 17, 97, 255, 4096, 10**5, 10**6, 2**31, 2**32, 2**63 - 1, 2**63, 10**18, 10**30)
VALUES = (
    *NUMBERS,
    *(0.5, -0.0, 1e-30, 1e308, float("nan"), float("inf"), -float("inf")),
    *(None, True, False, "", "x", "16", "float32", "silu", "../x", "\0", "\ud800", "llama", "gpt2", "a" * 5000),
    *([], [1], ["full_attention"], [[]] * 3, {}, {"a": 1}, {"rope_type": "default"}, {"quant_method": "gptq"}),
)
NAMES = (
    *(
        "model_type",
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "warmstart",
        "quantization_config",
        "layer_types",
    ),
    *(
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "partial_rotary_factor",
        "id2label",
        "num_labels",
        "text_config",
    ),
    *(
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
    ),
    *("vocab_size", "max_position_embeddings", "pad_token_id", "eos_token_id", "tie_word_embeddings", "hidden_act"),
    *("_name_or_path", "transformers_version", "is_encoder_decoder", "attribute_map", "problem_type", "to_dict"),
)


class TooLong(BaseException):
    """A folder took more than `SECONDS`."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def nested(chance: random.Random) -> Any:
    """Lists or objects in each other, up to deeper than any parser goes."""
    value: Any = 1
    for _ in range(chance.choice((5, 50, 150, 400))):
        value = [value] if chance.random() < 0.5 else {"a": value}
    return value


def some_value(chance: random.Random) -> Any:
    return nested(chance) if chance.random() < 0.05 else chance.choice(VALUES)


def harm_json(data: dict[str, Any], chance: random.Random, names: tuple[str, ...]) -> None:
    """Set, remove, rename or wrap entries, at any depth."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        inner = data
        while (deeper := [value for value in inner.values() if isinstance(value, dict)]) and chance.random() < 0.3:
            inner = chance.choice(deeper)
        name = chance.choice([*inner, *names] if inner is data else [*inner, "a"])
        kind = chance.random()
        if kind < 0.7:
            inner[name] = some_value(chance)
        elif kind < 0.85:
            inner.pop(name, None)
        elif name in inner:
            inner[chance.choice(names)] = inner.pop(name) if chance.random() < 0.5 else [inner[name]]


def harm_text(path: Path, chance: random.Random) -> None:
    """Flip, cut or insert bytes."""
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 2, 5))):
        at = chance.randrange(len(data) + 1)
        kind = chance.random()
        if kind < 0.4 and at < len(data):
            data[at] = chance.randrange(256)
        elif kind < 0.6:
            del data[at : at + chance.choice((1, 10, 1000))]
        elif kind < 0.8:
            data[at:at] = chance.choice((b"\0", b"9" * 30, b"[" * 2000, b"\xff", b'{"a":1}', b","))
        else:
            data[at:at] = data[: chance.randrange(200)]
    path.write_bytes(data)


def harm_header(path: Path, chance: random.Random) -> None:
    """Change a shard's header, and its length with it."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = chance.choice(sorted(set(header) - {"__metadata__"}))
    kind = chance.choice(("shape", "dtype", "offsets", "rename", "remove", "any"))
    if kind == "shape":
        header[name]["shape"] = chance.choice(
            ([1], [], [16, 97], [97, 17], list(reversed(header[name]["shape"])), [10**9, 10**9])
        )
    elif kind == "dtype":
        header[name]["dtype"] = chance.choice(("F16", "BF16", "I32", "F64", "F8_E4M3", "U8", "x"))
    elif kind == "offsets":
        header[name]["data_offsets"] = [chance.choice(NUMBERS), chance.choice(NUMBERS)]
    elif kind == "rename":
        header[chance.choice(("a", name + "x", "model.norm.weight", "lm_head.weight", ""))] = header.pop(name)
    elif kind == "remove":
        header.pop(name)
    else:
        harm_json(header, chance, ("a", "__metadata__", "model.norm.weight"))
    text = json.dumps(header).encode(errors="surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def harm(folder: Path, chance: random.Random) -> None:
    """One random fault, most often in the config."""
    kind = chance.random()
    if kind < 0.5:
        name, names = ("config.json", NAMES) if kind < 0.45 else ("generation_config.json", ("max_length", "a"))
        data = json.loads((folder / name).read_text())
        harm_json(data, chance, names)
        (folder / name).write_text(json.dumps(data))
    elif kind < 0.6:
        harm_text(folder / chance.choice(("config.json", INDEX, "trainer_state.json")), chance)
    elif kind < 0.7:
        data = json.loads((folder / INDEX).read_text())
        files = (
            "model-00001-of-00003.safetensors",
            "../x.safetensors",
            "/x.safetensors",
            "x.safetensors",
            INDEX,
            "config.json",
        )
        if chance.random() < 0.5:
            data["weight_map"][chance.choice(sorted(data["weight_map"]))] = chance.choice((*files, *VALUES))
        else:
            harm_json(data, chance, ("weight_map", "metadata"))
        (folder / INDEX).write_text(json.dumps(data))
    elif kind < 0.85:
        harm_header(chance.choice(sorted(folder.glob("*.safetensors"))), chance)
    else:
        harm_text(chance.choice(sorted(path for path in folder.iterdir() if path.suffix != ".json")), chance)


def outcome_of(folder: Path, target: Path) -> str:
    """`plan` or `error`; anything else is raised."""
    try:
        with at_most(SECONDS):
            growth = prepare_growth(folder, target, **GROWTH)
            growth.close()
    except WarmstartError as error:
        assert str(error).strip()
        return "error"
    return "plan"


def fuzz(tmp_path: Path, number: int, seed: int, harm: Callable[[Path, random.Random], None]) -> dict[str, int]:
    """Outcomes of many damaged folders."""
    base = make_checkpoint(tmp_path / "made")
    outcomes = {"plan": 0, "error": 0}
    for case in range(number):
        chance = random.Random(f"{seed} {case}")
        folder = Path(shutil.copytree(base, tmp_path / "base"))
        harm(folder, chance)
        before = sorted(tmp_path.rglob("*"))
        start = time.process_time()
        try:
            outcomes[outcome_of(folder, tmp_path / "out" / "grown")] += 1
        except BaseException as error:
            raise AssertionError(f"case {case} of seed {seed} ended with {type(error).__name__}: {error}") from error
        assert time.process_time() - start < SECONDS / 2, f"case {case} of seed {seed}"
        assert sorted(tmp_path.rglob("*")) == before, f"case {case} of seed {seed}"
        shutil.rmtree(folder)
    return outcomes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("number", "seed"), [(8, 0), pytest.param(1000, 1, marks=pytest.mark.slow)])
def test_damaged_folders_are_planned_or_refused(number, seed, tmp_path, capsys):
    outcomes = fuzz(tmp_path, number, seed, harm)
    assert outcomes["error"] > number / 3 and outcomes["plan"] > number / 10, outcomes
