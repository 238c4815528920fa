"""A class's own initialisation, tensor by tensor.

transformers initialises a whole model with one running random stream. Growth needs a fresh value for single tensors,
alone and reproducibly. So the class initialises itself once on the meta device while every in-place operation on a
parameter is written down; a tensor is then made by replaying its operations on numbers from `random`. The
distribution is the class's own (scaled residual projections, zeroed padding rows, ones and zeros of norms included);
nothing about it is known here.
"""

from __future__ import annotations

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
_CREATES = _CONSTANTS - {"zero_", "fill_"}


@dataclass(frozen=True)
class Step:
    """One recorded operation: its name, its arguments, and the part of the storage that it wrote (None: all)."""

    name: str
    args: tuple[Any, ...]
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None = None


@dataclass
class Recipe:
    """The operations that make one tensor from nothing."""

    shape: tuple[int, ...]
    steps: list[Step] = field(default_factory=list)
    computed: Callable[[], Tensor] | None = None

    def make(self, seed: int, name: str) -> Tensor:
        """The tensor (float32, `shape`) for a seed; equal recipes, seeds and names give equal bits."""
        if self.computed is not None:
            return self.computed().detach().float().clone()
        out = torch.zeros(self.shape, dtype=torch.float32)
        for number, step in enumerate(self.steps):
            target = out if step.view is None else out.as_strided(*step.view)
            stream = f"fresh{number}"
            if step.name == "normal_":
                mean, std = (*step.args, 0.0, 1.0)[:2] if step.args else (0.0, 1.0)
                target.copy_(random.normal(tuple(target.shape), seed, stream, name) * std + mean)
            elif step.name == "uniform_":
                low, high = step.args[:2] if len(step.args) >= 2 else (0.0, 1.0)
                target.copy_(random.uniform(tuple(target.shape), seed, stream, name) * (high - low) + low)
            elif step.name == "fill_" or step.name == "full":
                target.fill_(step.args[0])
            elif "ones" in step.name:
                target.fill_(1.0)
            elif step.name in _CONSTANTS:
                target.zero_()
            else:
                getattr(target, step.name)(*step.args)
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
