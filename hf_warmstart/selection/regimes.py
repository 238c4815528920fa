"""`Regime`: what is random in a continuation. The order of the data and dropout are two switches, not one.

| name | data | dropout |
|---|---|---|
| `deterministic` | in their order | none |
| `shuffled` | in a random order | none |
| `dropout` | in their order | yes |
| `stochastic` (or `both`) | in a random order | yes |

arXiv 2604.04281 compares the first and the last, so that what it finds cannot be put down to either switch. They are apart
here because they do different things: two copies of a unit see the same data in any order, so that only dropout (or noise
in the weights, or an asymmetric state) can part them.

Dropout is set where the model's class has a rate of its own, in the config: Llama and its like drop attention weights only,
GPT-2 and its like embeddings and branches as well.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from ..errors import WarmstartError

DROPOUT = 0.1  # arXiv 2604.04281, section 3, as a reader of it reports
NAMES = {
    "deterministic": (False, False),
    "shuffled": (True, False),
    "dropout": (False, True),
    "stochastic": (True, True),
    "both": (True, True),
}
# Rates of dropout by their names in configs; layerdrop leaves out whole layers and is none.
RATE = re.compile(r"(?!.*layer_?drop).*(dropout|pdrop)(_rate|_prob|_p)?")


@dataclass(frozen=True)
class Regime:
    """What is random in a continuation.

    Args:
        shuffle (`bool`): whether the data come in a random order, another one in each repeat.
        dropout (`float`): every rate of dropout of the model, 0 for none.

    Example:

        >>> Regime.of("stochastic")
        Regime(shuffle=True, dropout=0.1)
        >>> Regime(shuffle=True).name
        'shuffled'
    """

    shuffle: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.dropout, bool) or not 0 <= self.dropout < 1:
            raise WarmstartError(f"dropout={self.dropout!r} is no rate. Pass at least 0 and less than 1.")

    @classmethod
    def of(cls, regime: str | Regime) -> Regime:
        """The regime of a name.

        Raises:
            WarmstartError: there is none of that name.
        """
        if isinstance(regime, Regime):
            return regime
        if regime not in NAMES:
            raise WarmstartError(
                f"regime={regime!r} is none of {list(NAMES)}. Pass one, or Regime(shuffle=..., dropout=...)."
            )
        shuffle, drops = NAMES[regime]
        return cls(shuffle, DROPOUT if drops else 0.0)

    @property
    def name(self) -> str:
        """The name of its switches."""
        return next(name for name, switches in NAMES.items() if switches == (self.shuffle, self.dropout > 0))

    def configured(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A config with this regime's rate of dropout everywhere; the input is untouched.

        Raises:
            WarmstartError: dropout is asked for, and the class has none.
        """
        config = copy.deepcopy(config)
        rates = [(owner, name) for owner in _configs(config) for name in _rates(owner)]
        if self.dropout and not rates:
            raise WarmstartError(
                f"regime={self.name!r} drops out, and {type(config).__name__} has no rate of dropout. Pass "
                "regime='shuffled' or 'deterministic'."
            )
        for owner, name in rates:
            setattr(owner, name, self.dropout)
        return config

    def order(self, examples: int, needed: int, first: int, seed: int, repeat: int) -> list[int]:
        """The examples of one repeat, by number, the same for every candidate.

        Args:
            examples: how many there are. needed: how many a repeat takes. first: where the first repeat begins.
            seed: of the random orders. repeat: its number. In the data's own order each repeat takes the next part of
            them, since nothing else would differ between repeats.
        """
        if not self.shuffle:
            return [(first + repeat * needed + k) % examples for k in range(needed)]
        random = np.random.default_rng([seed, repeat])
        passes = [random.permutation(examples) for _ in range(-(-needed // examples))]
        return np.concatenate(passes)[:needed].tolist()


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _rates(config: Any) -> list[str]:
    return [
        n
        for n, v in vars(config).items()
        if RATE.fullmatch(n) and isinstance(v, (int, float)) and not isinstance(v, bool)
    ]


def matched_steps(steps: int, prices: dict[str, float]) -> dict[str, int]:
    """Steps of each candidate at an equal price: the cheapest takes all, the others as many as cost the same.

    Args:
        steps: of the cheapest. prices: of one step of each candidate, in FLOPs or in seconds.
    """
    cheapest = min(prices.values())
    return {name: max(1, int(steps * cheapest / price)) for name, price in prices.items()}
