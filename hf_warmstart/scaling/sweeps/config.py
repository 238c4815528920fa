"""`SweepConfig`: what a person asks of a sweep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import WarmstartError

DESIGNS = ("grid", "space_filling")


@dataclass(frozen=True)
class SweepConfig:
    """How proxies are chosen and trained.

    Args:
        budgets (`int`, defaults to 4): how many proxy sizes, and so budgets on each tokens-per-parameter path.
        proxies (`list[int]`, *optional*): the sizes that are wanted, as numbers of non-embedding parameters (active ones of
            a mixture of experts); the nearest that the family has are taken. By default `budgets` sizes from a 24th to a
            quarter of the target, which spans 1.5 decades of compute.
        tokens_per_parameter (`float` or list, defaults to 20): each value is one path. With several, every run is a trunk
            from which one decay branches off for each: (10, 20) costs about a tenth more than 20 alone. A list of lists,
            one for each of `proxies` as they are given, lets them differ: short runs of large proxies and long ones of small
            proxies tell a law in parameters and tokens more than runs of equal ratio, at the same compute.
        design (`str`, defaults to `"grid"`): `"grid"`, or `"space_filling"` (scrambled Sobol points over the same region).
        learning_rates (`int`, defaults to 5), batch_sizes (`int`, defaults to 4): the grid's sides; a space-filling design
            takes as many points as the grid has.
        learning_rate_step (`float`, defaults to 2), batch_step (`float`, defaults to 2): factor between neighbours.
        learning_rate (`float`, *optional*), batch_tokens (`int`, *optional*): where the smallest budget's design is centred;
            by default DeepSeek's laws. Larger budgets are centred on the optimum before, moved along these laws.
        refinements (`int`, defaults to 3): how many times at most points are added round an optimum.
        stop_ratio (`float`, *optional*, defaults to 1.25): a run is stopped where, at a quarter or at half of its tokens, its
            held-out loss is above this times the best that a run of an earlier round had there; None never stops.
        min_steps (`int`, defaults to 40): fewest optimizer steps of a run, which bounds the batch.
        seeds (`list[int]`, defaults to [0]): every point is trained once with each: initial weights and order of data.
        warmup (`float`, defaults to 0.05): share of the shortest horizon. decay (`float`, defaults to 0.2): share of each
            horizon in which the rate falls linearly to 0.
        weight_decay, adam_beta1, adam_beta2, adam_epsilon, max_grad_norm: of AdamW, as in `TrainingArguments`.
        bf16 (`bool`, defaults to False): forward and backward under bfloat16 autocast; weights, moments and losses stay in
            float32.
        per_device_batch (`int`, defaults to 32): sequences of one forward; larger batches are accumulated.
        max_eval_tokens (`int`, defaults to 262144): of the held-out text; the same ones for every run.

    Raises:
        WarmstartError: values that cannot be; all of them named.

    Source: 0.2 of the tokens in decay as in Marin (arXiv 2404.06395 finds 0.1 to suffice and 0.025 to be short); betas,
    weight decay and clipping of DeepSeek LLM (arXiv 2401.02954).
    """

    budgets: int = 4
    proxies: Sequence[int] | None = None
    tokens_per_parameter: float | Sequence[float] | Sequence[Sequence[float]] = 20.0
    design: str = "grid"
    learning_rates: int = 5
    batch_sizes: int = 4
    learning_rate_step: float = 2.0
    batch_step: float = 2.0
    learning_rate: float | None = None
    batch_tokens: int | None = None
    refinements: int = 3
    stop_ratio: float | None = 1.25
    min_steps: int = 40
    seeds: Sequence[int] = (0,)
    warmup: float = 0.05
    decay: float = 0.2
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    bf16: bool = False
    per_device_batch: int = 32
    max_eval_tokens: int = 2**18

    def __post_init__(self) -> None:
        ratios = self.tokens_per_parameter
        if isinstance(ratios, (int, float)) and not isinstance(ratios, bool):
            object.__setattr__(self, "tokens_per_parameter", (float(ratios),))
        elif isinstance(ratios, (list, tuple)):
            nested = tuple(tuple(r) if isinstance(r, list) else r for r in ratios)
            object.__setattr__(self, "tokens_per_parameter", nested)
        for name in ("seeds", "proxies"):
            if isinstance(value := getattr(self, name), (list, tuple)):
                object.__setattr__(self, name, tuple(value))
        if problems := sorted(self._problems()):
            raise WarmstartError("SweepConfig: " + "; ".join(problems) + ".")

    @property
    def paths(self) -> tuple[tuple[float, ...], ...]:
        """Tokens per parameter of each path, rising: of each proxy, the smallest first; or once, where they all share them."""
        ratios = self._listed("tokens_per_parameter")
        if not any(isinstance(own, tuple) for own in ratios):
            return (tuple(sorted(float(ratio) for ratio in ratios)),)
        sizes = self._listed("proxies")
        rising = sorted(range(len(sizes)), key=lambda k: sizes[k])
        return tuple(tuple(sorted(float(ratio) for ratio in ratios[k])) for k in rising)

    @property
    def points(self) -> int:
        """Points of one budget's design."""
        return self.learning_rates * self.batch_sizes

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {k: _plain(v) for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def of(cls, config: SweepConfig | None, options: Mapping[str, Any]) -> SweepConfig:
        """A config from itself or from its fields as keywords.

        Raises:
            WarmstartError: both were given, or names that are no fields.
        """
        unknown = sorted(set(options) - {item.name for item in dataclasses.fields(cls)})
        if unknown:
            names = sorted(item.name for item in dataclasses.fields(cls))
            raise WarmstartError(f"A sweep has no options {unknown}. It has {names}.")
        if config is not None and options:
            raise WarmstartError(
                f"Pass a SweepConfig or its fields as keywords, not both: {sorted(options)} were given beside."
            )
        return config if config is not None else cls(**options)

    def _problems(self) -> list[str]:
        found = [
            f"{name}={value!r} must be an integer of at least {least}"
            for name, least in (
                ("budgets", 1), ("learning_rates", 1), ("batch_sizes", 1), ("refinements", 0), ("min_steps", 2),
                ("per_device_batch", 1), ("max_eval_tokens", 1),
            )
            if not (_is_whole(value := getattr(self, name)) and value >= least)
        ]  # fmt: skip
        found += [
            f"{name}={value!r} must be {words}"
            for name, words, holds in (
                ("learning_rate_step", "above 1", lambda x: x > 1),
                ("batch_step", "above 1", lambda x: x > 1),
                ("warmup", "a share of the tokens, from 0 to below 1", lambda x: 0 <= x < 1),
                ("decay", "a share of the tokens, above 0 and below 1", lambda x: 0 < x < 1),
                ("weight_decay", "at least 0", lambda x: x >= 0),
                ("adam_beta1", "at least 0 and below 1", lambda x: 0 <= x < 1),
                ("adam_beta2", "at least 0 and below 1", lambda x: 0 <= x < 1),
                ("adam_epsilon", "above 0", lambda x: x > 0),
                ("max_grad_norm", "above 0", lambda x: x > 0),
            )
            if not (_is_number(value := getattr(self, name)) and holds(value))
        ]
        found += self._path_problems()
        seeds = self._listed("seeds")
        if not seeds or not all(_is_whole(s) and s >= 0 for s in seeds) or len(set(seeds)) < len(seeds):
            found.append(f"seeds={self.seeds!r} must be different integers of at least 0")
        if self.proxies is not None and not (
            self._listed("proxies") and all(_is_number(n) and n >= 1 for n in self.proxies)
        ):
            found.append(f"proxies={self.proxies!r} must be numbers of parameters")
        if self.design not in DESIGNS:
            found.append(f"design={self.design!r} is none of {list(DESIGNS)}")
        if self.stop_ratio is not None and not (_is_number(self.stop_ratio) and self.stop_ratio > 1):
            found.append(f"stop_ratio={self.stop_ratio!r} must be above 1, or None")
        if self.learning_rate is not None and not (_is_number(self.learning_rate) and 0 < self.learning_rate <= 1):
            found.append(f"learning_rate={self.learning_rate!r} must be above 0 and at most 1")
        if self.batch_tokens is not None and not (_is_number(self.batch_tokens) and self.batch_tokens >= 1):
            found.append(f"batch_tokens={self.batch_tokens!r} must be a positive number of tokens")
        return found

    def _path_problems(self) -> list[str]:
        ratios, said = self._listed("tokens_per_parameter"), f"tokens_per_parameter={self.tokens_per_parameter!r}"
        if not any(isinstance(own, tuple) for own in ratios):
            ratios = (tuple(ratios),)
        elif self.proxies is None or len(ratios) != len(self._listed("proxies")):
            return [f"{said} has a list of its own for {len(ratios)} proxies: pass as many proxies=[...]"]
        if not all(isinstance(own, tuple) and own and all(_is_number(r) and r > 0 for r in own) for own in ratios):
            return [f"{said} must be positive numbers"]
        if any(len(set(map(float, own))) < len(own) for own in ratios):
            return [f"{said} names a path twice"]
        return []

    def _listed(self, name: str) -> Sequence[Any]:
        value = getattr(self, name)
        return value if isinstance(value, (list, tuple)) else ()


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
