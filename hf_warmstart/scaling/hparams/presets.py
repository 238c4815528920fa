"""Published laws of learning rate and batch, as data with source, unit, schedule and range: `presets.json`.

| key | meaning |
|---|---|
| `coefficient`, `exponents`, `unit` | `coefficient * product of (x / unit)^exponent` |
| `intercept`, `slopes` | `intercept + sum of slope * ln x` |
| `range` | where it was fitted; nothing where its source does not say |

Batches are in tokens, learning rates are peaks. A law over `loss` needs a loss of the text that its source used. None of them
relates loss to compute on *your* text, so that a checkpoint counts by the compute that was spent on it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from numpy.typing import ArrayLike

from ...errors import WarmstartError
from ..fits.laws import PowerLaw, quantities
from .recipe import Recipe


@dataclass(frozen=True)
class LogLaw:
    """`y = intercept + sum of slope * ln x`. Positive up to some size only.

    Args:
        intercept (`float`). slopes (`dict[str, float]`): of the logarithm of each quantity.
    """

    intercept: float
    slopes: Mapping[str, float]
    draws: None = None

    @property
    def exponents(self) -> Mapping[str, float]:
        """The quantities that the law is over, as of a `PowerLaw`."""
        return self.slopes

    def __call__(self, **at: ArrayLike) -> Any:
        """The law's value at one point.

        Raises:
            WarmstartError: it is not positive there.
        """
        values = quantities(self.slopes, at)
        value = self.intercept + sum(slope * math.log(values[name]) for name, slope in self.slopes.items())
        if value <= 0:
            where = ", ".join(f"{name}={float(v):.3g}" for name, v in values.items())
            raise WarmstartError(f"The law gives {value:.3g} at {where}: it ends before that size. Use another law.")
        return float(value)

    def to_dict(self) -> dict[str, Any]:
        return {"intercept": self.intercept, "slopes": dict(self.slopes)}


def law_from_dict(data: Mapping[str, Any]) -> PowerLaw | LogLaw:
    """A law from plain data."""
    if "intercept" in data:
        return LogLaw(data["intercept"], dict(data["slopes"]))
    exponents, unit = dict(data["exponents"]), data.get("unit", {})
    scale = math.prod(unit.get(name, 1.0) ** -power for name, power in exponents.items())
    return PowerLaw(data["coefficient"] * scale, exponents)


@cache
def preset_data() -> dict[str, dict[str, Any]]:
    """All presets by name, as in `presets.json`."""
    return json.loads(files(__package__).joinpath("presets.json").read_text())


def preset_names() -> list[str]:
    """Names that `HparamPredictor.from_pretrained` takes for published laws."""
    return list(preset_data())


def preset_recipe(name: str) -> Recipe:
    """Schedule and optimizer of a preset, as far as its source says; the rest as for any run."""
    data = preset_data()[name]
    own = {key: value for key, value in data["optimizer"].items() if not key.startswith("betas_")}
    schedule = dict(data["schedule"])
    own |= {"schedule": schedule.pop("name"), **schedule}
    if "warmup_fraction" in data:
        own["warmup_fraction"] = data["warmup_fraction"]
    return Recipe().with_values(own, data["source"])


def tuned_recipe(
    name: str, recipe: Recipe, *, params: float, tokens: float, batch_tokens: float, sequences: float
) -> Recipe:
    """A preset's recipe where its source has it follow the size of the run: betas by batch, warm-up by parameters."""
    data = preset_data()[name]
    own: dict[str, Any] = {}
    by_batch = data["optimizer"].get("betas_by_batch")
    if by_batch:
        own["betas"] = by_batch["at_or_above"] if batch_tokens >= by_batch["from"] else by_batch["below"]
    rule = data["optimizer"].get("betas_rule")
    if rule:
        own["betas"] = (rule["beta1"], rule["beta2_base"] ** (sequences / rule["batch_sequences"]))
    if "warmup_tokens_per_param" in data:
        own["warmup_fraction"] = min(0.5, data["warmup_tokens_per_param"] * params / tokens)
    return recipe.with_values(own, data["source"])
