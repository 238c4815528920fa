"""Training grown models: `WarmstartTrainer` starts from the parent's optimizer state and schedule."""

from .arguments import WarmstartTrainingArguments
from .carry import load_grown_state, load_grown_weights
from .grown_adamw import GrownAdamW
from .new_parts import NewParts, freeze_parent
from .trainer import WarmstartTrainer

__all__ = [
    "GrownAdamW",
    "NewParts",
    "WarmstartTrainer",
    "WarmstartTrainingArguments",
    "freeze_parent",
    "load_grown_state",
    "load_grown_weights",
]
