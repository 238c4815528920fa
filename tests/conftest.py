"""Shared fixtures: one thread per process, no progress bars, no reporting."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from transformers.utils import logging  # noqa: E402

from .browser import Browser, browser, command  # noqa: E402

torch.set_num_threads(1)
logging.disable_progress_bar()
# A busy machine is no fault of what is tested.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Each test starts from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory) -> Iterator[Browser]:
    """A headless Chromium; a test that needs one is skipped where there is none."""
    if command() is None:
        pytest.skip("no Chromium was found: install one, or let CHROMIUM name the command that starts it")
    with browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found
