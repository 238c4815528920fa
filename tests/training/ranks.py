"""Jobs on several ranks: processes that talk gloo over the loopback, forked from one that has imported everything.

A job is a function of `sharded_jobs`, the number of ranks that it runs on, and its arguments; the jobs of one call run one
after the other, each in a process group of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
Job = tuple[str, int, dict[str, Any]]


def run_on_ranks(folder: Path, jobs: list[Job], timeout: int = 300) -> None:
    """Run jobs; their output is shown when one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.ranks", str(folder)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def environment() -> dict[str, str]:
    """For processes that use this package, one thread each, with nothing but the loopback."""
    own = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    path = os.pathsep.join(part for part in (str(REPOSITORY), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, **own, "PYTHONPATH": path}


def _run(rank: int, name: str, world: int, arguments: dict[str, Any], store: str) -> None:
    import torch
    import torch.distributed as dist

    from . import sharded_jobs

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        getattr(sharded_jobs, name)(**arguments)
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Run the jobs of a folder."""
    from torch.multiprocessing import start_processes

    from . import sharded_jobs  # noqa: F401  imported once, before the ranks are forked

    folder = Path(sys.argv[1])
    warnings.filterwarnings("ignore")
    for number, (name, world, arguments) in enumerate(json.loads((folder / "jobs.json").read_text())):
        store = str(folder / f"store-{number}")
        start_processes(_run, (name, world, arguments, store), nprocs=world, start_method="fork")


if __name__ == "__main__":
    main()
