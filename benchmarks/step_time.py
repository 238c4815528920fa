"""Step time of `WarmstartTrainer` over that of a stock `Trainer` on the same grown model.

    python -m benchmarks.step_time

Both train in one process and take turns, a step each: what else the machine does slows them alike. A turn lasts from the
end of a step to the end of the next, so that data, hooks and logging are in it. A run's first turns are not counted; its
ratio is the median over the turns of one trainer's time over the other's. Shown are the median over the runs, with the
range that holds the true median with at least 95 % (from the order of the runs, no distribution assumed), for processor
time and wall time. The last row is a stock trainer against another: what the method adds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging

from hf_warmstart import WarmstartTrainer, WarmstartTrainingArguments, grow

STEPS, FIRST, BATCH, LENGTH, WORDS = 40, 8, 8, 64, 512
PATIENCE = 600.0
Times = tuple[float, float]


class Turns(TrainerCallback):
    """Lets a trainer, in a thread of its own, take a step whenever the other has taken one.

    Args:
        mine, other: whose turn it is: one of the two is free.
    """

    def __init__(self, mine: Semaphore, other: Semaphore):
        self.mine, self.other = mine, other
        self.times: list[Times] = []
        self._start = (0.0, 0.0)

    def wait(self) -> None:
        """Wait for a turn."""
        if not self.mine.acquire(timeout=PATIENCE):
            raise TimeoutError("The other trainer does not go on.")
        self._start = time.thread_time(), time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.other.release()
        self.wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append((time.thread_time() - self._start[0], time.perf_counter() - self._start[1]))
        self.other.release()
        self.wait()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.other.release()


def make(model: Any, folder: Path, data: Dataset, parent: Path | None, steps: int = STEPS, **options: Any) -> Trainer:
    """A trainer of a copy of a model; with a parent's checkpoint a `WarmstartTrainer`, else a `Trainer`."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    arguments = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    common: dict[str, Any] = {"model": copy, "train_dataset": data, "data_collator": default_data_collator}
    trainer: Trainer
    if parent is None:
        trainer = Trainer(args=TrainingArguments(**(arguments | options)), **common)
    else:
        ours = WarmstartTrainingArguments(**(arguments | options))
        trainer = WarmstartTrainer(args=ours, warmstart_from=parent, **common)
    trainer.remove_callback(PrinterCallback)
    return trainer


def side_by_side(trainers: Sequence[Trainer]) -> list[list[Times]]:
    """The times of two trainers' turns; the first takes the first."""
    turn = Semaphore(1), Semaphore(0)
    clocks = [Turns(turn[k], turn[1 - k]) for k in (0, 1)]

    def train(trainer: Trainer, clock: Turns) -> None:
        clock.wait()
        trainer.add_callback(clock)
        trainer.train()

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(train, *both) for both in zip(trainers, clocks, strict=True)]:
            done.result()
    return [clock.times[FIRST:] for clock in clocks]


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the two ordered values between which the true median lies with at least 95 %."""
    ordered, n = sorted(ratios), len(ratios)
    below, outside = 0, 0.0
    while (outside := outside + math.comb(n, below) / 2**n) <= 0.025:
        below += 1
    below = max(below - 1, 0)
    return statistics.median(ordered), ordered[below], ordered[n - 1 - below]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=6)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    ids = torch.randint(WORDS, (STEPS * BATCH, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    config = LlamaConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, vocab_size=WORDS
    )
    with tempfile.TemporaryDirectory() as root:
        base = Path(root, "base")
        parent = LlamaForCausalLM(config)
        make(parent, base, data, None, steps=2, save_strategy="steps", save_steps=2).train()
        checkpoint = base / "checkpoint-2"
        child = grow(LlamaForCausalLM.from_pretrained(checkpoint), width=2, width_operator="perturbed_copy")
        kinds: dict[str, tuple[Path | None, dict[str, Any]]] = {
            "`carry`": (checkpoint, {}),
            "`asymmetric_reset`": (checkpoint, {"state_policy": "asymmetric_reset"}),
            "stock `Trainer` again": (None, {}),
        }
        print(f"{sum(p.numel() for p in child.parameters()):,} parameters, {runs} runs of {STEPS} steps each\n")
        print("| against a stock `Trainer` | ms per step | ratio, processor time | ratio, wall time |")
        print("|---|--:|--:|--:|")
        for name, (start, options) in kinds.items():
            ratios: list[Times] = []
            steps: list[float] = []
            for run in range(runs):
                pair = [
                    make(child, Path(root, "run"), data, start, **options),
                    make(child, Path(root, "run"), data, None),
                ]
                turned = run % 2 == 1
                times = side_by_side(pair[::-1] if turned else pair)
                ours, stock = times[::-1] if turned else times
                both = list(zip(ours, stock, strict=True))
                ratios.append((_ratio(both, 0), _ratio(both, 1)))
                steps.append(statistics.median(turn[0] for turn in ours))
            cells = []
            for clock in (0, 1):
                median, low, high = interval([ratio[clock] for ratio in ratios])
                cells.append(f"{median:.3f} ({low:.3f} to {high:.3f})")
            print(f"| {name} | {statistics.median(steps) * 1000:.0f} | {' | '.join(cells)} |", flush=True)


def _ratio(turns: Sequence[tuple[Times, Times]], clock: int) -> float:
    return statistics.median(ours[clock] / stock[clock] for ours, stock in turns)


if __name__ == "__main__":
    main()
