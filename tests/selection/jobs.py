"""What is tested in processes of its own: selections that are killed and shared, and kernels that treat copies alike.

    python -m tests.selection.jobs FOLDER locked killed shared

Everything is imported once; the processes are forked. What was seen is one line of JSON. `MKL_CBWR=COMPATIBLE` must be set
before MKL is first used, which is why the float64 half of a test is here.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_warmstart import SelectionReport
from hf_warmstart.selection import run as running
from hf_warmstart.selection.escape import escape

from ..models import tiny_model
from ..training.conftest import blocks, stock_trainer
from .conftest import PARENT_STEPS, TINY, small_selection
from .test_escape import trained


def fork(job: Callable[[], Any], out: Path) -> int:
    """A process that writes what a job returns."""
    if process := os.fork():
        return process
    try:
        out.write_text(json.dumps(job()))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def select(parent: Path, folder: Path, rank: int | None = None, processes: int = 1, port: int = 0) -> dict[str, Any]:
    """One selection, under what a launcher sets where a rank is given: ranking, curves, and how many arms ran here."""
    if rank is not None:
        own = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in own.items()})
    arms, run_arm = [], running.run_arm

    def counted(study, model, name, repeat, until, *rest):
        arms.append([name, repeat, until])
        return run_arm(study, model, name, repeat, until, *rest)

    running.run_arm = counted
    SelectionReport.plot = lambda self, path: None  # type: ignore[method-assign]  # which takes longer than the arms
    short = {"probe_steps": 2, "continuation_steps": 4, "eval_every": 2, "repeats": 1, "regime": "stochastic"}
    report = small_selection(parent, folder, arguments_={"save_strategy": "steps", "save_steps": 1}, **short)
    launched = torch.distributed.is_initialized()
    ranking = [row["candidate"] for row in report.table]
    return {"ranking": ranking, "curves": report.curves, "margin": report.margin, "arms": arms, "launched": launched}


def killed(parent: Path, folder: Path, results: int) -> tuple[list[str], dict[str, Any]]:
    """A selection that is killed in an arm, once some have ended, and then goes on: what lay half done, and what it says."""
    process = fork(lambda: select(parent, folder), folder.with_suffix(".killed"))
    deadline, half_done = time.monotonic() + 600, []
    while time.monotonic() < deadline and not half_done:
        time.sleep(0.002)
        if len(list(folder.glob("_selection/arms/*/*/result-*.json"))) >= results:
            checkpoints = folder.glob("_selection/arms/*/*/checkpoint-*")
            half_done = [str(p.relative_to(folder)) for p in checkpoints if not list(p.parent.glob("result-*.json"))]
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    out = folder.with_suffix(".json")
    _, status = os.waitpid(fork(lambda: select(parent, folder), out), 0)
    return half_done, {"status": status, **json.loads(out.read_text())}


def shared(parent: Path, folder: Path, processes: int) -> list[dict[str, Any]]:
    """One selection by several processes under a launcher's environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outs = [folder.with_suffix(f".rank{rank}") for rank in range(processes)]
    jobs = [
        fork(lambda rank=rank: select(parent, folder, rank, processes, port), out) for rank, out in enumerate(outs)
    ]
    for job in jobs:
        os.waitpid(job, 0)
    return [json.loads(out.read_text()) for out in outs]


def main() -> None:
    """Run the jobs that are named, and one selection to compare with."""
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    stock_trainer(
        tiny_model("llama", randomised=False, **TINY), root / "base", PARENT_STEPS, blocks(0, PARENT_STEPS)
    ).train()
    parent = root / "base" / f"checkpoint-{PARENT_STEPS}"
    gc.freeze()  # accelerate collects garbage after each arm
    seen: dict[str, Any] = {}
    if "locked" in sys.argv:
        plan, now, start = trained(torch.float64, width=2, width_operator="exact_copy")
        locked = escape(plan, now, start)
        seen["locked"] = [locked.state, locked.update, locked.outside]
    if "killed" in sys.argv:
        seen["half_done"], seen["killed"] = killed(parent, root / "killed", 2)
    if "shared" in sys.argv:
        seen["shared"] = shared(parent, root / "shared", 2)
    seen["whole"] = select(parent, root / "whole")
    sys.stdout.write("\n" + json.dumps(seen) + "\n")


if __name__ == "__main__":
    main()
