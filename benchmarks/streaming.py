"""Growing a checkpoint from files to files, against `cp` of what it wrote and against what else can be done.

    python -m benchmarks.streaming FOLDER                           # width 2, depth 1.5 of a 4 GB parent; 60 GB of disk
    python -m benchmarks.streaming FOLDER --gigabytes 0.25 1 4      # is the memory flat?
    python -m benchmarks.streaming FOLDER --mergekit PYTHON         # the interpreter of an environment with mergekit

The parent is Llama-shaped with random bf16 weights. Every arm is a process of its own, imports included, that ends when
its files are on the disk; arms take turns, and ratios are of neighbours in one round. `cp` copies what the growth wrote
(or, for a depth, what mergekit wrote) and forces it to the disk. Peak memory is anonymous memory (`RssAnon`), sampled every
20 ms: pages that are mapped or cached from files can be dropped, and are not counted.

mergekit runs beside transformers 5.23 when it is installed with `--no-deps`, pydantic 2.10.6 and what else it imports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, UNITS, HEADS, WORDS = 2048, 5632, 16, 32000
SYNC = "cp -r {0} {1} && find {1} -type f -exec sync {{}} + && sync {1}"
IN_MEMORY = """
import os, sys, torch
from transformers import AutoModelForCausalLM
from hf_warmstart import grow
torch.set_num_threads(os.cpu_count())
source, target, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
grow(AutoModelForCausalLM.from_pretrained(source), **options).save_pretrained(target)
for name in os.listdir(target):
    with open(os.path.join(target, name), "rb") as file:
        os.fsync(file.fileno())
"""


@dataclass
class Run:
    """One process: seconds on the clock and of processors, and the most anonymous memory it had, in bytes.

    `started`: seconds of them before the growth began, where the process tells: torch and transformers are imported.
    """

    seconds: float
    processor: float
    memory: int
    started: float = 0.0


def measured(command: list[str], log: Path) -> Run:
    """Run a command to its end.

    Raises:
        SystemExit: it failed; its last words are shown.
    """
    start, peak = time.perf_counter(), 0
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02):
                peak = max(peak, anonymous(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:300]}\n{log.read_text()[-2000:]}")
    told = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"event": "done"')]
    started = max(0.0, seconds - told[0]["seconds"]) if told else 0.0
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak, started)


def anonymous(process: int) -> int:
    """Anonymous memory of a process and of those that it started, in bytes; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
    own = int(lines[0].split()[1]) * 1024 if lines else 0
    return own + sum(anonymous(int(child)) for child in children)


def make_parent(folder: Path, gigabytes: float) -> int:
    """Write a Llama-shaped parent of about a size; its bytes."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=UNITS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        vocab_size=WORDS,
        num_hidden_layers=1,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
    layer = {name: shape for name, shape in shapes.items() if ".layers.0." in name}
    rest = {name: shape for name, shape in shapes.items() if name not in layer}
    size = lambda found: 2 * sum(torch.Size(shape).numel() for shape in found.values())  # noqa: E731
    config.num_hidden_layers = max(2, 2 * round((gigabytes * 1e9 - size(rest)) / size(layer) / 2))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    parts = [
        rest,
        *({n.replace(".0.", f".{k}."): s for n, s in layer.items()} for k in range(config.num_hidden_layers)),
    ]
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {n: (torch.randn(s, generator=generator) * 0.02).bfloat16() for n, s in part.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    total = sum((folder / name).stat().st_size for name in set(places.values()))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def streamed(source: Path, options: dict) -> Callable[[Path], list[str]]:
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return lambda target: [
        sys.executable,
        "-m",
        "hf_warmstart.cli",
        "grow",
        str(source),
        str(target),
        *flags,
        "--json",
    ]


def in_memory(source: Path, options: dict) -> Callable[[Path], list[str]]:
    return lambda target: [sys.executable, "-c", IN_MEMORY, str(source), str(target), repr(options)]


def mergekit(python: str, source: Path, work: Path) -> Callable[[Path], list[str]]:
    """mergekit's passthrough with the layers of a depth of 1.5: the first half of them runs twice."""
    layers = LlamaConfig.from_pretrained(source).num_hidden_layers
    ranges = [(0, layers // 2), (0, layers)]
    slices = "".join(f"  - sources: [{{model: {source}, layer_range: [{a}, {b}]}}]\n" for a, b in ranges)
    recipe = work / "passthrough.yaml"
    recipe.write_text(f"slices:\n{slices}merge_method: passthrough\ndtype: bfloat16\n")
    command = [
        str(Path(python).with_name("mergekit-yaml")),
        str(recipe),
        "{0}",
        "--clone-tensors",
        "--out-shard-size",
        "500M",
    ]
    synced = " ".join(command) + " && find {0} -type f -exec sync {{}} +"
    return lambda target: ["sh", "-c", synced.format(target)]


def compare(arms: dict[str, Callable[[Path], list[str]]], work: Path, rounds: int) -> dict[str, list[Run]]:
    """Run all arms in turns, and `cp` of the first arm's output behind each round."""
    runs: dict[str, list[Run]] = {name: [] for name in (*arms, "cp")}
    for _ in range(rounds):
        for name, command in arms.items():
            target = work / "target"
            os.sync()
            runs[name].append(measured(command(target), work / "log"))
            if name == next(iter(arms)):
                size = size_of(target)
                os.sync()
                copied = ["sh", "-c", SYNC.format(target, work / "copy")]
                runs["cp"].append(measured(copied, work / "log"))
                shutil.rmtree(work / "copy")
            shutil.rmtree(target)
    print(f"  {size / 1e9:.2f} GB written")
    return runs


def show(runs: dict[str, list[Run]]) -> None:
    print(
        f"  {'arm':<22}{'seconds':>9}{'of cp':>8}{'range':>16}{'imports':>9}{'of cp without':>15}{'processor s':>13}"
        f"{'anonymous MB':>14}"
    )
    for name, found in runs.items():
        pairs = list(zip(found, runs["cp"], strict=True))
        ratios = [run.seconds / copy.seconds for run, copy in pairs]
        growing = [(run.seconds - run.started) / copy.seconds for run, copy in pairs]
        middle = lambda values: statistics.median(values)  # noqa: E731
        print(
            f"  {name:<22}{middle([r.seconds for r in found]):>9.1f}{middle(ratios):>8.2f}"
            f"{f'{min(ratios):.2f} to {max(ratios):.2f}':>16}{middle([r.started for r in found]):>9.1f}"
            f"{middle(growing):>15.2f}{middle([r.processor for r in found]):>13.1f}"
            f"{max(r.memory for r in found) / 1e6:>14.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="on the disk that is to be measured")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[4.0], help="of the parent")
    parser.add_argument(
        "--growths", nargs="+", choices=["width", "exact", "depth"], default=["width", "exact", "depth"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-memory", action="store_true", help="also from_pretrained, grow and save_pretrained")
    parser.add_argument("--mergekit", metavar="PYTHON", help="interpreter of an environment that has mergekit")
    given = parser.parse_args()
    growths = {
        "width": {"width": 2.0, "set": "width_operator=perturbed_copy"},
        "exact": {"width": 2.0, "set": "width_operator=exact_copy"},
        "depth": {"depth": 1.5},
    }
    for gigabytes in given.gigabytes:
        needed = (4 + 4 + 1) * gigabytes * 1e9
        if (free := shutil.disk_usage(given.folder).free) < needed:
            raise SystemExit(f"{given.folder} has {free / 1e9:.0f} GB free; {needed / 1e9:.0f} GB are needed.")
        with tempfile.TemporaryDirectory(dir=given.folder) as made:
            work = Path(made)
            source = work / "parent"
            source.mkdir()
            size = make_parent(source, gigabytes)
            for growth in given.growths:
                options = growths[growth]
                print(f"parent {size / 1e9:.2f} GB, {growth}: {options}", flush=True)
                arms = {"streamed": streamed(source, options)}
                if given.in_memory:
                    memory = {k: v for k, v in options.items() if k != "set"}
                    memory |= dict([options["set"].split("=")]) if "set" in options else {}
                    arms["in memory"] = in_memory(source, memory)
                if given.mergekit and growth == "depth":
                    arms["mergekit"] = mergekit(given.mergekit, source, work)
                show(compare(arms, work, given.rounds))


if __name__ == "__main__":
    main()
