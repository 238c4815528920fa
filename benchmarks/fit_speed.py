"""How long a fit and a recommendation take.

    python -m benchmarks.fit_speed

Fits 2,000 synthetic runs with 1,000 draws, in a grid (20 budgets of 100 runs) and, for the robust fit alone, as 2,000 single
points of L(N, D); then asks for a recommendation. Seconds are of the wall clock; the threads are whatever numpy takes.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hf_warmstart import HparamPredictor, LossLaw

RUNS, BUDGETS, DRAWS = 2000, 20, 1000
BOWL = np.array([[0.030, -0.012], [-0.012, 0.020]])  # nats, in (ln rate, ln batch)


def grid(rng: np.random.Generator) -> list[dict[str, float]]:
    """Runs round the optima of `lr ~ C^-0.25`, `B ~ C^0.3`, with noise of 0.005 nats."""
    rows = []
    for compute in np.geomspace(1e17, 1e21, BUDGETS):
        params = math.sqrt(compute / 120)
        for u in itertools.product(np.linspace(-2, 2, 10), repeat=2):
            loss = 1.5 + 2 * (compute / 1e17) ** -0.1 + 0.5 * np.array(u) @ BOWL @ np.array(u)
            rows.append(
                {
                    "params": params,
                    "tokens": 20 * params,
                    "learning_rate": 3e-3 * (compute / 1e17) ** -0.25 * math.exp(u[0]),
                    "batch_tokens": 1e5 * (compute / 1e17) ** 0.3 * math.exp(u[1]),
                    "loss": loss + 0.005 * rng.standard_normal(),
                }
            )
    return rows


def timed(name: str, work: Callable[[], Any]) -> Any:
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    print(f"| {name} | {time.perf_counter() - start:.2f} s | {time.process_time() - cpu:.2f} s |")
    return result


def main() -> None:
    rng = np.random.default_rng(0)
    rows = grid(rng)
    assert len(rows) == RUNS
    print("| what | wall clock | processor |\n|---|---:|---:|")
    predictor = timed(
        f"fit of {RUNS} runs at {BUDGETS} budgets, {DRAWS} draws", lambda: HparamPredictor.fit(rows, draws=DRAWS)
    )
    params, tokens = 10 ** rng.uniform(7, 9.5, RUNS), 10 ** rng.uniform(8, 11, RUNS)
    losses = (1.8 + 480 * params**-0.347 + 2100 * tokens**-0.366) * np.exp(0.002 * rng.standard_normal(RUNS))
    timed(
        f"L(N, D) through {RUNS} points, {DRAWS} bootstraps of them",
        lambda: LossLaw.fit(losses, params=params, tokens=tokens, draws=DRAWS),
    )
    run = {"params": 1e9, "tokens": 1e10, "sequence_length": 2048, "eval_loss": 2.6}
    timed("recommendation", lambda: predictor.recommend(**run))
    timed(
        "recommendation, printed and plotted",
        lambda: (str(predictor.recommend(**run)), predictor.recommend(**run).plot()),
    )


if __name__ == "__main__":
    main()
