"""Proxies: small models of the target's own family, on paths of tokens per parameter.

With D = r N, a budget is C = 6 N D = 6 r N^2: sizes whose ratio is 6 span 1.5 decades of compute. Over proxies whose r
differs, compute alone explains almost nothing of the best learning rate, so that a law in compute needs one path. A law in
N and D needs both to vary, and not together: there r may differ from proxy to proxy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import SizeError, WarmstartError
from ...growth.smaller import SmallerModels, SmallerSize
from ..tables.compute import count_parameters, flops_per_token
from .config import SweepConfig

LARGEST, SMALLEST = 1 / 4, 1 / 24  # of the target's parameters, by default
# A size this far from the one that was wanted (as the logarithm of a factor) is not what was asked for.
FARTHEST = math.log(1.5)
DISTORTION = 0.3  # what a factor in width over depth counts, beside one in the number of parameters
FEWEST_BUDGETS = 3  # a law has two numbers


@dataclass(frozen=True)
class Proxy:
    """One proxy.

    Args:
        config: its config. params: N, non-embedding and active. flops_per_token: of training, by the config.
        sequence_length: T. horizons: for each path, how many sequences a run of that length sees.
    """

    config: PreTrainedConfig = field(repr=False)
    params: int
    flops_per_token: float
    sequence_length: int
    horizons: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """D of each horizon."""
        return tuple(sequences * self.sequence_length for sequences in self.horizons)


def choose_proxies(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, sequence_length: int, asked: SweepConfig
) -> list[Proxy]:
    """Proxies for a target, the smallest first.

    Args:
        config: the target's. sequence_length: T, in tokens. asked: the sweep.

    Raises:
        SizeError: a size that the family does not have, one that is not below the target, or fewer different sizes than
            were asked for.
        WarmstartError: too few budgets for a law.
    """
    wanted_budgets = len(asked.proxies) if asked.proxies is not None else asked.budgets
    if wanted_budgets < FEWEST_BUDGETS:
        raise WarmstartError(
            f"{wanted_budgets} proxy sizes are too few: two numbers of a law go through any two budgets. Pass at least "
            f"{FEWEST_BUDGETS}; 4 or more over 1.5 decades of compute are usual."
        )
    target = count_parameters(config).non_embedding
    wanted = _wanted(target, asked)
    models = SmallerModels(model_class, config)
    sizes = models.sizes()
    # Entries of layers stand for the parameters of a law: all that is not in layers is embeddings, head and final norm.
    share = target / models.entries
    found: list[Proxy] = []
    problems = []
    paths = asked.paths if len(asked.paths) > 1 else asked.paths * len(wanted)
    for number, own in zip(wanted, paths, strict=True):
        proxy = _nearest(models, sizes, number, share, sequence_length, own, found)
        if proxy is not None:
            found.append(proxy)
        else:
            near = sorted({round(s.entries * share) for s in sizes}, key=lambda n: abs(math.log(n / number)))[:3]
            problems.append(f"{round(number):,} (the nearest are {', '.join(f'{n:,}' for n in sorted(near))})")
    if problems:
        widths, depths = len({s.width for s in sizes}), len({tuple(s.layers.items()) for s in sizes})
        raise SizeError(
            f"{type(config).__name__} of {target:,} parameters has no proxies near {'; '.join(problems)}. Heads and "
            f"layers set the sizes: {widths} widths, {depths} depths. Pass proxies=[...] from among them, or fewer budgets."
        )
    return sorted(found, key=lambda proxy: proxy.params)


def _wanted(target: int, asked: SweepConfig) -> list[float]:
    """The numbers of parameters that are asked for, rising."""
    if asked.proxies is None:
        low, high = SMALLEST * target, LARGEST * target
        return [low * (high / low) ** (k / (asked.budgets - 1)) for k in range(asked.budgets)]
    if large := sorted(n for n in asked.proxies if n >= target):
        raise SizeError(
            f"Proxies are to be smaller than the target, which has {target:,} non-embedding parameters; got "
            f"{', '.join(f'{n:,}' for n in large)}. Pass smaller ones: the law is what carries them to the target."
        )
    if len(set(asked.proxies)) < len(asked.proxies):
        raise SizeError(f"proxies={list(asked.proxies)} names a size twice.")
    return sorted(asked.proxies)


def _nearest(
    models: SmallerModels,
    sizes: list[SmallerSize],
    number: float,
    share: float,
    sequence_length: int,
    paths: tuple[float, ...],
    found: list[Proxy],
) -> Proxy | None:
    """The best proportioned admissible size near a number of parameters that is not found yet; None where there is none."""
    taken = {proxy.params for proxy in found}

    def distance(size: SmallerSize) -> float:
        return abs(math.log(size.entries * share / number)) + DISTORTION * size.shape_distortion(models.deepest)

    near = (s for s in sizes if abs(math.log(s.entries * share / number)) <= FARTHEST and s.entries < models.entries)
    for size in sorted(near, key=distance):
        try:
            config = models.config_of(size)
        except SizeError:
            continue
        count = count_parameters(config)
        if count.non_embedding in taken:
            continue
        horizons = tuple(max(1, round(r * count.non_embedding / sequence_length)) for r in paths)
        flops = flops_per_token(config, sequence_length, count)
        return Proxy(config, count.non_embedding, flops, sequence_length, horizons)
    return None
