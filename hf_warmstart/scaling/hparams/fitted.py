"""`FittedLaws`: all that a predictor knows, as one record that can be written to files and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..fits.laws import LossLaw, PowerLaw
from ..fits.robust_fit import Array
from ..tables.evaluation import Fingerprint
from ..tables.runs import RunTable
from .presets import LogLaw, law_from_dict
from .recipe import Recipe

SQUARE_ROOT_RULE = 0.5  # Adam: learning rate follows the square root of the batch (Malladi et al., arXiv 2205.10287)
RIDGE_RULE = "Adam's square root rule, arXiv 2205.10287"


@dataclass(frozen=True)
class FittedLaws:
    """Laws with what they were fitted to.

    Args:
        name (`str`). form (`str`): `"compute"`, `"params_tokens"` or `"preset"`.
        learning_rate, batch_tokens: the laws of the settings; a preset may have no law of the batch.
        loss (`LossLaw`, *optional*): of compute. loss_params_tokens (`LossLaw`, *optional*): of parameters and tokens, or of
            tokens alone where more parameters were no better.
        ridge (`float`): `d ln rate / d ln batch` where the batch is not the optimum. ridge_source (`str`).
        range (`dict[str, tuple[float, float]]`): of compute, params and tokens. lowest_loss (`float`, *optional*):
            that was fitted.
        accounting (`str`): of compute. sequence_length (`int`, *optional*): of the runs.
        recipe (`Recipe`): of the runs. fingerprint (`Fingerprint`, *optional*): of their evaluation.
        noise (`float`, *optional*): between seeds, nats. forms (`dict`): how each form of law did.
        optima (`list[dict]`): of the budgets. warnings (`list[str]`). source (`str`): of a preset.
        runs (`RunTable`, *optional*).
    """

    name: str
    form: str
    learning_rate: PowerLaw | LogLaw
    batch_tokens: PowerLaw | LogLaw | None
    recipe: Recipe
    loss: LossLaw | None = None
    loss_params_tokens: LossLaw | None = None
    ridge: float = SQUARE_ROOT_RULE
    ridge_source: str = RIDGE_RULE
    range: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    lowest_loss: float | None = None
    accounting: str = "6ND"
    sequence_length: int | None = None
    fingerprint: Fingerprint | None = None
    noise: float | None = None
    forms: Mapping[str, Any] = field(default_factory=dict)
    optima: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    source: str = ""
    runs: RunTable | None = field(default=None, repr=False)

    @property
    def is_preset(self) -> bool:
        """Whether these are published laws, which know compute only."""
        return self.form == "preset"

    def describe(self) -> str:
        """One line on the data."""
        return self.source if self.is_preset else f"{len(self.optima)} budgets, {self.runs}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without draws and runs."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {
            **plain,
            "range": {name: list(ends) for name, ends in self.range.items()},
            "recipe": self.recipe.to_dict(),
            "fingerprint": self.fingerprint.to_dict() if self.fingerprint else None,
            "laws": {name: law.to_dict() for name in _LAWS if (law := getattr(self, name)) is not None},
        }

    def draws(self) -> dict[str, Array]:
        """Draws of each law that has any, (draws, parameters)."""
        found = {name: getattr(self, name) for name in _LAWS}
        return {name: law.draws for name, law in found.items() if law is not None and law.draws is not None}

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], draws: Mapping[str, Array] | None = None, runs: RunTable | None = None
    ) -> FittedLaws:
        """The record from `to_dict` and `draws`."""
        laws: dict[str, Any] = {}
        for name, own in data["laws"].items():
            drawn = None if draws is None or name not in draws else np.asarray(draws[name], dtype=float)
            if "floor" in own:
                laws[name] = LossLaw(own["floor"], own["amplitudes"], own["exponents"], drawn)
            else:
                law = law_from_dict(own)
                laws[name] = PowerLaw(law.coefficient, law.exponents, drawn) if isinstance(law, PowerLaw) else law
        return cls(
            **{name: data[name] for name in _PLAIN},
            **{"batch_tokens": None, **laws},
            range={name: (ends[0], ends[1]) for name, ends in data["range"].items()},
            recipe=Recipe.from_dict(data["recipe"]),
            fingerprint=Fingerprint.from_dict(data["fingerprint"]) if data.get("fingerprint") else None,
            runs=runs,
        )


_LAWS = ("learning_rate", "batch_tokens", "loss", "loss_params_tokens")
_PLAIN = (
    *(
        "name",
        "form",
        "ridge",
        "ridge_source",
        "lowest_loss",
        "accounting",
        "sequence_length",
        "noise",
        "forms",
        "optima",
    ),
    *("warnings", "source"),
)
