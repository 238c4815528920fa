"""Sweeps: small proxies of a target, trained over learning rates and batches, as data for laws."""

from .config import SweepConfig
from .plan import SweepPlan
from .run import Optimum, Progress, Sweep, run_sweep

__all__ = ["Optimum", "Progress", "Sweep", "SweepConfig", "SweepPlan", "run_sweep"]
