"""A class's own initialisation, tensor by tensor.

transformers initialises a whole model with one running random stream. Growth needs a fresh value for single tensors,
alone and reproducibly. So the class initialises itself once on the meta device while every in-place operation on a
parameter is written down; a tensor is then made by replaying its operations on numbers from `random`. The
distribution is the class's own (scaled residual projections, zeroed padding rows, ones and zeros of norms included);
nothing about it is known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel

from . import random

_DRAWS = {"normal_", "uniform_"}
_CONSTANTS = {"zero_", "fill_", "ones", "zeros", "full", "empty", "new_ones", "new_zeros", "ones_like", "zeros_like"}
_FOLLOWED = (
    _DRAWS
    | _CONSTANTS
    | {"mul_", "div_", "add_", "sub_", "clamp_", "neg_", "abs_", "exp_", "sqrt_", "erfinv_", "log_"}
)
GROUP = 4096  # entries; part of the definition of what is computed from draws
_CREATES = _CONSTANTS - {"zero_", "fill_"}


@dataclass(frozen=True)
class Step:
    """One recorded operation: its name, its arguments, and the part of the storage that it wrote (None: all)."""

    name: str
    args: tuple[Any, ...]
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None = None

    def span(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The entries of a tensor of this shape that it writes, from one number to another; None if they are scattered."""
        if self.view is None:
            return 0, math.prod(shape)
        size, stride, offset = self.view
        expected = 1
        for length, step in zip(reversed(size), reversed(stride), strict=True):
            if length != 1 and step != expected:
                return None
            expected *= length
        return offset, offset + expected

    def apply(self, target: Tensor, seed: int, stream: str, name: str, whole: int, part: tuple[int, int]) -> None:
        """Do it to some entries (a vector): `part`, of the `whole` number that it writes."""
        if self.name == "normal_":
            mean, std = (*self.args, 0.0, 1.0)[:2] if self.args else (0.0, 1.0)
            target.copy_(random.normal((whole,), seed, stream, name, part)).mul_(std).add_(mean)
        elif self.name == "uniform_":
            low, high = self.args[:2] if len(self.args) >= 2 else (0.0, 1.0)
            target.copy_(random.uniform((whole,), seed, stream, name, part)).mul_(high - low).add_(low)
        elif self.name == "fill_" or self.name == "full":
            target.fill_(self.args[0])
        elif "ones" in self.name:
            target.fill_(1.0)
        elif self.name in _CONSTANTS:
            target.zero_()
        else:
            getattr(target, self.name)(*self.args)


@dataclass
class Recipe:
    """The operations that make one tensor from nothing."""

    shape: tuple[int, ...]
    steps: list[Step] = field(default_factory=list)
    computed: Callable[[], Tensor] | None = None

    def make(self, seed: int, name: str) -> Tensor:
        """The tensor (float32, `shape`) for a seed; equal recipes, seeds and names give equal bits."""
        return self._entries(seed, name, 0, math.prod(self.shape)).reshape(self.shape)

    def rows(self, seed: int, name: str, start: int, stop: int) -> Tensor:
        """Rows of `make`'s matrix form: the last axis are the columns, all others together the rows; a vector is a column."""
        columns = self.shape[-1] if len(self.shape) > 1 else 1
        return self._entries(seed, name, start * columns, stop * columns).view(stop - start, columns)

    @property
    def by_rows(self) -> bool:
        """Whether `rows` makes no more than it is asked for; else it makes the whole tensor, or even the whole model."""
        return self.computed is None and all(step.span(self.shape) is not None for step in self.steps)

    def _entries(self, seed: int, name: str, low: int, high: int) -> Tensor:
        """Some of the entries, counted along the flattened tensor."""
        if self.computed is not None:
            return self.computed().detach().float().flatten()[low:high].clone()
        if not self.by_rows:
            return self._strided(seed, name).flatten()[low:high]
        # Whole groups, so that an entry has the same place in a vector unit whatever is asked for.
        first, last = low - low % GROUP, min(high + -high % GROUP, math.prod(self.shape))
        out = torch.zeros(max(0, last - first), dtype=torch.float32)
        for number, step in enumerate(self.steps):
            begin, end = step.span(self.shape) or (0, 0)
            part = max(begin, first), min(end, last)
            if part[0] < part[1]:
                target = out[part[0] - first : part[1] - first]
                step.apply(target, seed, f"fresh{number}", name, end - begin, (part[0] - begin, part[1] - begin))
        return out[low - first : high - first]

    def _strided(self, seed: int, name: str) -> Tensor:
        out = torch.zeros(self.shape, dtype=torch.float32)
        for number, step in enumerate(self.steps):
            target = out if step.view is None else out.as_strided(*step.view)
            values = target.flatten()
            step.apply(values, seed, f"fresh{number}", name, values.numel(), (0, values.numel()))
            target.copy_(values.view(target.shape))
        return out


class _Recorder(TorchDispatchMode):
    """Writes down what is done in place to each storage."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, list[Step]] = {}
        self.numel: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(result, Tensor) and (name in _CREATES or name.endswith("_")):
            if name in _CREATES:
                numbers: tuple = (args[1],) if name == "full" else ()
                target = result
            else:
                numbers = tuple(a for a in args[1:] if isinstance(a, (int, float)))
                numbers += tuple(v for v in (kwargs or {}).values() if isinstance(v, (int, float)))
                target = args[0]
            self._record(target, name, numbers)
        return result

    def _record(self, target: Tensor, name: str, numbers: tuple) -> None:
        key = target.untyped_storage()._cdata
        if name in _CREATES:
            self.numel[key] = target.numel()
            self._alive.append(target)
        whole = target.numel() == self.numel.get(key, target.numel())
        view = None if whole else (tuple(target.shape), tuple(target.stride()), target.storage_offset())
        step = Step(name, numbers, view)
        if whole and name in _DRAWS | _CONSTANTS:
            self.steps[key] = [step]
        else:
            self.steps.setdefault(key, []).append(step)


def recipes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Mapping[str, Recipe]:
    """How `model_class(config)` initialises each of its parameters and persistent buffers.

    Runs the class on the meta device: no weights are allocated, whatever the size.
    """
    recorder = _Recorder()
    with recorder, torch.device("meta"):
        model = model_class(config)
        # Classes initialise first and tie afterwards; a model on the meta device is tied already.
        for name in model.all_tied_weights_keys:
            module_name, _, leaf = name.rpartition(".")
            setattr(
                model.get_submodule(module_name), leaf, torch.nn.Parameter(torch.empty_like(model.get_parameter(name)))
            )
        model.initialize_weights()
    made: dict[str, Recipe] = {}
    build = cache(lambda: _as_built(model_class, config))
    for name, tensor in model.state_dict(keep_vars=True).items():
        steps = recorder.steps.get(tensor.untyped_storage()._cdata)
        if steps is None or not {step.name for step in steps} <= _FOLLOWED:
            # Computed from other numbers (a state-space model's decays): as the class makes it.
            made[name] = Recipe(tuple(tensor.shape), computed=lambda name=name: build()[name])  # type: ignore[misc]
        else:
            made[name] = Recipe(tuple(tensor.shape), steps)
    return made


def _as_built(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Mapping[str, Tensor]:
    """The tensors of a model as its class makes them, under a fixed seed; the global random state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).state_dict()
