"""What plans say of memory, against the process that grows: anonymous memory, watched from outside every 3 ms."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ..training.ranks import REPOSITORY, environment
from .grown import add_training_state

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
}
LAYERS = {24: 1, 150: 5, 600: 24}  # by the parent's megabytes, about


@dataclass
class Watched:
    """Anonymous memory in bytes: what the process had, the most that it said it would have, the most that it had."""

    has: int
    predicted: int
    peak: int


def watched(*arguments: str) -> Watched:
    """Run a job to its end."""
    command = [sys.executable, "-m", "tests.checkpoints.memory_job", *arguments]
    peak, done = 0, threading.Event()
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True) as process:

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.003):
                peak = max(peak, anonymous(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        done.set()
        watcher.join()
    assert process.returncode == 0
    return Watched(**json.loads(lines[-1]), peak=peak)


def anonymous(process: int) -> int:
    """Anonymous memory of a process in bytes; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def make_parent(folder: Path, layers: int, sizes: dict, with_state: bool = False) -> Path:
    """A Llama with random bfloat16 weights, a file for each layer, and AdamW's moments in float32 if asked for."""
    config = LlamaConfig(**sizes, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.save_pretrained(folder)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = (torch.randn(tensor.shape) * 0.02).bfloat16()
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if with_state:
        add_training_state(folder, model)
    return folder


def check_stream(tmp_path: Path, parent: Path, options: dict) -> Watched:
    found = watched("stream", str(parent), str(tmp_path / "made"), json.dumps(options))
    assert 0.8 <= found.peak / found.predicted <= 1.2, found
    return found


@pytest.mark.slow
def test_a_promise_of_memory_is_kept_and_foretold(tmp_path):
    small = SIZES | {"hidden_size": 512, "intermediate_size": 1408}
    parent = make_parent(tmp_path / "parent", 2, small)
    found = check_stream(tmp_path, parent, {"width": 2, "max_memory": "500MB"})
    assert found.peak <= found.predicted <= 500_000_000, found


@pytest.mark.slow
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("max_memory", [None, "480MB", "800MB"])
def test_memory_is_foretold_kept_and_flat_in_the_size_of_the_model(max_memory, with_state, tmp_path):
    options = {"width": 1.5, "width_operator": "reference_slice", "max_memory": max_memory}
    peaks = []
    for megabytes in (150, 600):
        folder = tmp_path / str(megabytes)
        parent = make_parent(folder / "parent", LAYERS[megabytes], SIZES, with_state)
        found = check_stream(folder, parent, options)
        if max_memory is not None:
            assert found.peak <= int(max_memory[:-2]) * 1_000_000, found
        peaks.append(found.peak)
    assert peaks[1] <= 1.15 * peaks[0], peaks


@pytest.mark.slow
@pytest.mark.parametrize(
    "growth",
    [
        {"width": 2, "width_operator": "perturbed_copy"},
        {"width": 2, "width_operator": "exact_copy"},
        {"width": 1.5, "width_operator": "reference_slice"},
        {"depth": 2},
    ],
)
def test_what_grow_takes_beside_the_parent_is_foretold(growth, tmp_path):
    found = watched("memory", json.dumps(SIZES | {"num_hidden_layers": 3}), json.dumps(growth))
    assert 0.8 <= (found.peak - found.has) / (found.predicted - found.has) <= 1.2, found
