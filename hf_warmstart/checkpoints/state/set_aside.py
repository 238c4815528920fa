"""An optimizer's file that a stock `Trainer` must not read: kept under a name of our own, with a refusal in its place."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .parent_state import GROWN_NAME
from .trainer_files import OPTIMIZER_NAME


class OnlyWarmstartTrainerCanResumeAStateWithTwoAges:
    """What a stock `Trainer` finds where it looks for an optimizer: loading refuses it, and says its name."""


def set_aside_for_us(checkpoint: str | os.PathLike) -> None:
    """Move a checkpoint's optimizer to a file of our own. A stock `Trainer` would load it, drop the masks and go on with
    one count for all entries; now it stops at the file's one object."""
    stock = Path(checkpoint, OPTIMIZER_NAME)
    os.replace(stock, Path(checkpoint, GROWN_NAME))
    torch.save({"refused": OnlyWarmstartTrainerCanResumeAStateWithTwoAges()}, stock)
