"""What growing costs on a GPU: a Llama of one billion parameters in bfloat16, grown there and on the CPU.

    python -m benchmarks.on_gpu                 # prints a table; --output figures.json keeps the figures

The parent has random weights. Times are the best of three runs, on the GPU to the end of its work, with `grow`'s digest of the
parent and its check of the logits in them; the peak is of the GPU's allocator over what the parent takes. Then AdamW's step
on the child in float32 against that of `GrownAdamW` with a mask for each parameter, the median of ten.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from hf_warmstart import grow
from hf_warmstart.training import GrownAdamW

SIZES = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}
GROWTHS: dict[str, dict[str, Any]] = {
    "depth 1.5": {"depth": 1.5},
    "width 1.5, exact_copy": {"width": 1.5, "width_operator": "exact_copy"},
    "width 1.5, perturbed_copy": {"width": 1.5, "width_operator": "perturbed_copy"},
}


def make_parent(size: str, device: str) -> LlamaForCausalLM:
    """A Llama with random weights, in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**SIZES[size])).to(torch.bfloat16).eval()


def bytes_of(model: torch.nn.Module) -> int:
    """What a model's parameters take, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def synchronise(device: str) -> None:
    """Wait for what a GPU still has to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: str) -> float:
    """The time that something takes, to the end of a GPU's work."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def growing(size: str, device: str, growths: Sequence[str], runs: int) -> dict[str, dict[str, float]]:
    """Seconds, and on a GPU bytes, of each growth."""
    grow(make_parent("tiny", device), width=2)  # what a process does once
    parent, found = make_parent(size, device), {}
    for name in growths:
        options, times, held = GROWTHS[name], [], []
        for _ in range(runs):
            if device == "cuda":
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            kept: list[Any] = []
            times.append(seconds(lambda options=options, kept=kept: kept.append(grow(parent, **options)), device))
            held = [bytes_of(parent), bytes_of(kept[0])]
            if device == "cuda":
                held.append(torch.cuda.max_memory_allocated() - before)
            del kept
        row = {"seconds": min(times), "parent_bytes": held[0], "child_bytes": held[1]}
        found[name] = row | ({"peak_bytes_over_parent": held[2]} if len(held) > 2 else {})
        print(device, name, found[name], flush=True)
    return found


def stepping(size: str, device: str) -> dict[str, float]:
    """Seconds of a step of AdamW, fused and not, and of GrownAdamW, on the child of a growth in float32."""
    child = grow(make_parent(size, device), depth=1.5).float()
    for p in child.parameters():
        p.grad = torch.full_like(p, 1e-3)
    found = {}
    for name, kind, fused in (
        ("AdamW, fused", torch.optim.AdamW, True),
        ("AdamW", torch.optim.AdamW, False),
        ("GrownAdamW", GrownAdamW, True),
    ):
        optimizer = kind(child.parameters(), lr=1e-5, fused=fused)
        optimizer.step()
        if kind is GrownAdamW:
            for p, entry in optimizer.state.items():
                entry["new"], entry["born"] = torch.rand_like(p) < 0.5, 0
        times = [seconds(optimizer.step, device) for _ in range(10)]
        found[name] = statistics.median(times)
        print(device, name, found[name], flush=True)
        del optimizer
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="1B")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--growths", nargs="+", choices=sorted(GROWTHS), default=list(GROWTHS))
    parser.add_argument("--output", type=Path, help="A file for the figures.")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if gpu else "CPU alone",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    for device in ["cuda", "cpu"] if gpu else ["cpu"]:
        figures[device] = growing(options.size, device, options.growths, options.runs)
    figures["step"] = stepping(options.size, "cuda" if gpu else "cpu")
    print(json.dumps(figures, indent=1))
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
