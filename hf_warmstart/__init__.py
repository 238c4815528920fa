"""hf_warmstart: grow a trained transformers model, carry its training state, keep training.

Public names are imported when first used, so that `import hf_warmstart` and the command line start fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .checkpoints.grow_checkpoint import grow_checkpoint
    from .errors import WarmstartError
    from .growth.certify import Certificate, certify
    from .growth.config import GrowthConfig
    from .growth.grow import grow, plan_growth
    from .growth.plan import GrowthPlan, GrowthRecord
    from .growth.state import grow_optimizer_state
    from .growth.upcycle import upcycle
    from .hub import push_to_hub
    from .scaling.fits.laws import LossLaw
    from .scaling.growing.advise import GrowthAdvice, advise_growth
    from .scaling.hparams.predictor import HparamPredictor
    from .scaling.hparams.recommendation import HparamRecommendation
    from .scaling.sweeps import run_sweep
    from .selection.candidates import Candidate
    from .selection.report import SelectionReport
    from .selection.select import select_warmstart
    from .training import WarmstartTrainer, WarmstartTrainingArguments, freeze_parent

_HOMES = {
    "Candidate": ".selection.candidates",
    "Certificate": ".growth.certify",
    "GrowthAdvice": ".scaling.growing.advise",
    "GrowthConfig": ".growth.config",
    "GrowthPlan": ".growth.plan",
    "GrowthRecord": ".growth.plan",
    "HparamPredictor": ".scaling.hparams.predictor",
    "HparamRecommendation": ".scaling.hparams.recommendation",
    "LossLaw": ".scaling.fits.laws",
    "SelectionReport": ".selection.report",
    "WarmstartError": ".errors",
    "WarmstartTrainer": ".training",
    "WarmstartTrainingArguments": ".training",
    "advise_growth": ".scaling.growing.advise",
    "certify": ".growth.certify",
    "freeze_parent": ".training",
    "grow": ".growth.grow",
    "grow_checkpoint": ".checkpoints.grow_checkpoint",
    "grow_optimizer_state": ".growth.state",
    "plan_growth": ".growth.grow",
    "push_to_hub": ".hub",
    "run_sweep": ".scaling.sweeps",
    "select_warmstart": ".selection.select",
    "upcycle": ".growth.upcycle",
}

__all__ = [
    "Candidate",
    "Certificate",
    "GrowthAdvice",
    "GrowthConfig",
    "GrowthPlan",
    "GrowthRecord",
    "HparamPredictor",
    "HparamRecommendation",
    "LossLaw",
    "SelectionReport",
    "WarmstartError",
    "WarmstartTrainer",
    "WarmstartTrainingArguments",
    "__version__",
    "advise_growth",
    "certify",
    "freeze_parent",
    "grow",
    "grow_checkpoint",
    "grow_optimizer_state",
    "plan_growth",
    "push_to_hub",
    "run_sweep",
    "select_warmstart",
    "upcycle",
]


def __getattr__(name: str):
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
