"""Training grown models: `WarmstartTrainer` starts from the parent's optimizer state and schedule."""

from .arguments import WarmstartTrainingArguments
from .trainer import WarmstartTrainer

__all__ = ["WarmstartTrainer", "WarmstartTrainingArguments"]
