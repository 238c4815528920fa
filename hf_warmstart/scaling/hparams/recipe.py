"""The settings of a run besides learning rate and batch: optimizer, warm-up and schedule, each with where it is from.

Laws hold for the recipe that their runs were trained with, so that a fitted predictor keeps the runs' own where it is told;
what nobody said takes the values below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ...errors import WarmstartError

# Schedules of transformers that a recipe may name.
SCHEDULES = ("warmup_stable_decay", "cosine", "cosine_with_min_lr", "linear", "constant_with_warmup")
DEFAULT_SOURCES = {
    "schedule": "warm-up, constant, decay: one run serves several horizons (MiniCPM, arXiv 2404.06395, section 4)",
    "decay_fraction": "10 % of the tokens suffice, 2.5 % are short (MiniCPM, arXiv 2404.06395, section 4)",
    "min_lr_ratio": "decay to zero",
    "warmup_fraction": "its length, 0 to 2 %, does not matter (arXiv 2308.04014)",
    "betas": "DeepSeek LLM, arXiv 2401.02954, section 2.3",
    "epsilon": "torch's default",
    "weight_decay": "DeepSeek LLM, arXiv 2401.02954, section 2.3",
    "max_grad_norm": "DeepSeek LLM, arXiv 2401.02954, section 2.3",
}


@dataclass(frozen=True)
class Recipe:
    """Optimizer and schedule.

    Args:
        schedule (`str`): of transformers, one of `SCHEDULES`. decay_fraction (`float`): of a schedule that ends in a decay.
        min_lr_ratio (`float`): where it ends, of the peak. min_lr (`float`, *optional*): the same as a learning rate.
        warmup_fraction (`float`): of all steps, below 1.
        betas (`tuple[float, float]`), epsilon, weight_decay, max_grad_norm (`float`): of AdamW.
        sources (`dict[str, str]`): where each is from.

    Raises:
        WarmstartError: values that cannot be.
    """

    schedule: str = "warmup_stable_decay"
    decay_fraction: float = 0.1
    min_lr_ratio: float = 0.0
    min_lr: float | None = None
    warmup_fraction: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    sources: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_SOURCES))

    def __post_init__(self) -> None:
        wrong = []
        if self.schedule not in SCHEDULES:
            wrong.append(f"schedule={self.schedule!r} (one of {list(SCHEDULES)})")
        shares = ("decay_fraction", "min_lr_ratio", "warmup_fraction")
        wrong += [f"{n}={getattr(self, n)!r} (0 or more, below 1)" for n in shares if not 0 <= getattr(self, n) < 1]
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            wrong.append(f"betas={self.betas!r} (two numbers, 0 or more, below 1)")
        wrong += [
            f"{n}={getattr(self, n)!r} (0 or more)"
            for n in ("epsilon", "weight_decay", "max_grad_norm")
            if not 0 <= getattr(self, n) < math.inf
        ]
        if wrong:
            raise WarmstartError(f"No recipe has {', '.join(wrong)}.")

    def with_values(self, values: Mapping[str, Any], source: str) -> Recipe:
        """The recipe with some values of a source.

        Raises:
            WarmstartError: names that no recipe has, or values that cannot be.
        """
        known = {f.name for f in fields(self)} - {"sources"}
        if unknown := sorted(set(values) - known):
            raise WarmstartError(f"A recipe has no {unknown}; it has {sorted(known)}.")
        given: dict[str, Any] = {name: tuple(value) if name == "betas" else value for name, value in values.items()}
        return replace(self, **given, sources={**self.sources, **dict.fromkeys(values, source)})

    def scheduler_kwargs(self, steps: int) -> dict[str, Any]:
        """`lr_scheduler_kwargs` of transformers for a run of some steps."""
        if self.schedule == "warmup_stable_decay":
            return {
                "num_decay_steps": max(1, round(self.decay_fraction * steps)),
                "decay_type": "linear",
                "min_lr_ratio": self.min_lr_ratio,
            }
        if self.schedule == "cosine_with_min_lr":
            return {"min_lr": self.min_lr} if self.min_lr is not None else {"min_lr_rate": self.min_lr_ratio}
        return {}

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        return cls(**{**data, "betas": tuple(data["betas"])})
