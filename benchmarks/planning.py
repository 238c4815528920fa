"""What a growth costs before any weight is touched: planning a 32-layer model whose layout is on file, and deriving anew.

    python -m benchmarks.planning

Prints the median of five runs, each in this process, after one run that is not counted. Planning holds two builds of the
class on the meta device; the last column shows what these alone take.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hf_warmstart import plan_growth
from hf_warmstart.growth.layouts import cache
from hf_warmstart.growth.layouts.lookup import derived
from hf_warmstart.growth.twin import meta_shapes

CASES = (
    (LlamaForCausalLM, LlamaConfig(num_key_value_heads=16)),
    (Qwen2ForCausalLM, Qwen2Config(num_hidden_layers=32)),
)
RUNS = 5


def median_seconds(function: Callable[[], object]) -> float:
    """The median time of some runs, after one that is not counted."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    torch.set_num_threads(1)
    print("| class | layers | layout on file | planning width 2, s | deriving anew, s | two builds on meta alone, s |")
    print("|---|--:|---|--:|--:|--:|")
    for model_class, config in CASES:
        on_file = cache.read(model_class, config) is not None
        plan = median_seconds(lambda c=config: plan_growth(c, width=2))  # type: ignore[misc]
        anew = median_seconds(lambda m=model_class, c=config: derived(m, c))  # type: ignore[misc]
        builds = 2 * median_seconds(lambda m=model_class, c=config: meta_shapes(m, c))  # type: ignore[misc]
        print(
            f"| {model_class.__name__} | {config.num_hidden_layers} | {'yes' if on_file else 'no'} | {plan:.2f} | {anew:.2f} "
            f"| {builds:.2f} |"
        )


if __name__ == "__main__":
    main()
