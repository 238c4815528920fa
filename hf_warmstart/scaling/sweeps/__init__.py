"""Sweeps: small proxies of a target, trained over learning rates and batches, as data for laws."""

from .config import SweepConfig
from .plan import SweepPlan, plan_sweep
from .probes import run_probes
from .run import Optimum, Progress, Sweep, run_sweep, train_sweep

__all__ = [
    "Optimum",
    "Progress",
    "Sweep",
    "SweepConfig",
    "SweepPlan",
    "plan_sweep",
    "run_probes",
    "run_sweep",
    "train_sweep",
]
