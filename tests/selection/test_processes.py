"""A selection that is killed, and one that several processes share, are the selection of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ..training.ranks import REPOSITORY, environment


def run_jobs(folder, *names):
    """What jobs saw."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.selection.jobs", str(folder), *names],
        cwd=REPOSITORY,
        # Where there is a GPU, autograd has a thread for it, and no process with such threads may be forked.
        env={**os.environ, **environment(), "CUDA_VISIBLE_DEVICES": "", "MKL_CBWR": "COMPATIBLE"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return run_jobs(tmp_path_factory.mktemp("jobs"), "locked", "killed")


def test_a_deterministic_exact_copy_never_escapes_in_float64(seen):
    assert seen["locked"] == [0.0, 0.0, 0.0]


def test_a_selection_that_was_killed_goes_on_to_the_same_ranking(seen):
    whole, killed = seen["whole"], seen["killed"]
    assert len(seen["half_done"]) == 1  # an arm with a checkpoint and no result
    assert killed["status"] == 0 and killed["ranking"] == whole["ranking"] and killed["margin"] == whole["margin"]
    assert killed["curves"] == whole["curves"]
    assert 0 < len(killed["arms"]) < len(whole["arms"])  # what was done is not done again


@pytest.mark.distributed
def test_two_processes_share_the_arms_and_rank_as_one_does(tmp_path):
    seen = run_jobs(tmp_path, "shared")
    whole, (one, other) = seen["whole"], seen["shared"]
    assert one["ranking"] == other["ranking"] == whole["ranking"]
    assert one["curves"] == other["curves"] == whole["curves"]
    assert one["arms"] and other["arms"] and one["launched"] and other["launched"]
    assert sorted(one["arms"] + other["arms"]) == sorted(whole["arms"])
