"""Training grown models: `WarmstartTrainer` starts from the parent's optimizer state and schedule."""

from .arguments import WarmstartTrainingArguments
from .carry import load_grown_state, load_grown_weights
from .grown_adamw import GrownAdamW
from .trainer import WarmstartTrainer

__all__ = ["GrownAdamW", "WarmstartTrainer", "WarmstartTrainingArguments", "load_grown_state", "load_grown_weights"]
