"""Tensors without data that remember how they are made, so that code which moves tensors about can be run for its plan.

A `TracedTensor` goes where a tensor goes. Cut, joined, permuted, reshaped or cast, it gives another one, whose `made` is the
expression; whatever else is done to it raises: arithmetic, writing in place, asking for values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import UntraceableError
from .pieces import Assembled, Source, cast, cut, join, permute, reshape

aten = torch.ops.aten
SAME = (aten.alias, aten.clone, aten.detach, aten.lift_fresh, aten._to_copy)
RESHAPE = (aten.view, aten._unsafe_view, aten.squeeze, aten.unsqueeze)
PIECES = (aten.split, aten.split_with_sizes, aten.unbind, aten.select, aten.slice)
MOVES = {*SAME, *RESHAPE, *PIECES, aten.permute, aten.transpose, aten.t, aten.cat, aten.stack, aten.constant_pad_nd}


@dataclass
class Trace:
    """One run of such code.

    Args:
        refusals: what it did that is more than moving entries about, in words. Each of these also raised
            `UntraceableError`, but code in between may have caught it.
    """

    refusals: list[str] = field(default_factory=list)

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> TracedTensor:
        """A source tensor."""
        like = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return TracedTensor(Source(tuple(shape), dtype, name=name), like, self)

    def check(self) -> None:
        """Raise `UntraceableError` if anything was refused."""
        if self.refusals:
            raise UntraceableError(f"Tensors are not only moved about: {sorted(set(self.refusals))}.")


class TracedTensor(torch.Tensor):
    """A tensor, nominally on the CPU, that stands for an expression.

    Args:
        made: the expression. like: a meta tensor of its shape, strides and dtype that shares its storage with the
            `like` of others where the real ones would.
    """

    made: Assembled
    like: torch.Tensor
    trace: Trace

    @staticmethod
    def __new__(cls, made: Assembled, like: torch.Tensor, trace: Trace) -> TracedTensor:
        layout = {"strides": like.stride(), "storage_offset": like.storage_offset(), "dtype": like.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, like.shape, device="cpu", **layout)
        tensor.made, tensor.like, tensor.trace = made, like, trace
        return tensor

    def __init__(self, made: Assembled, like: torch.Tensor, trace: Trace) -> None:
        pass

    def __repr__(self, **_: Any) -> str:
        return f"TracedTensor({self.made})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        trace = next(one.trace for one in tree_leaves((args, kwargs)) if isinstance(one, TracedTensor))
        like = func(*tree_map(_meta, args), **tree_map(_meta, kwargs)) if func.overloadpacket in MOVES else None
        made = _moved(func.overloadpacket, args, kwargs, like)
        if made is None:
            trace.refusals.append(str(func))
            trace.check()
        if isinstance(made, list):
            return [cls(one, view, trace) for one, view in zip(made, like, strict=True)]
        return cls(made, like, trace)


def _meta(value: Any) -> Any:
    if isinstance(value, TracedTensor):
        return value.like
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _moved(operation: Any, args: tuple, kwargs: dict, like: Any) -> Assembled | list[Assembled] | None:
    """The expression, or expressions, of an operation that moves entries about; None for every other."""
    if operation not in MOVES:
        return None
    if operation in (aten.cat, aten.stack):
        return _joined(operation, *args, **kwargs, like=like)
    if not args or not isinstance(args[0], TracedTensor):
        return None
    of, others = args[0].made, args[1:]
    if operation in SAME:
        return cast(of, like.dtype)
    if operation is aten.constant_pad_nd:
        return None if any(others[0]) else of
    if operation in RESHAPE and like.dtype == of.dtype:
        return reshape(of, like.shape)
    order = list(range(len(of.shape)))
    if operation is aten.permute:
        return permute(of, [order[axis] for axis in others[0]])
    if operation in (aten.transpose, aten.t):
        if order:
            a, b = others or (0, -1)
            order[a], order[b] = order[b], order[a]
        return permute(of, order)
    if operation in (aten.split, aten.split_with_sizes):
        return _split(of, order[kwargs.get("dim", others[1] if len(others) > 1 else 0)], like)
    if operation is aten.unbind:
        return _split(of, order[others[0] if others else 0], like)
    if operation is aten.select:
        axis, index = order[others[0]], range(of.shape[others[0]])[others[1]]
        return reshape(cut(of, axis, index, index + 1), like.shape)
    if operation is aten.slice:
        axis, start, stop, step = (*others, *(0, None, None, 1)[len(others) :])
        start, stop, step = slice(start, stop, step).indices(of.shape[axis])
        return cut(of, order[axis], start, max(start, stop)) if step == 1 else None
    return None


def _split(of: Assembled, axis: int, like: Sequence[torch.Tensor]) -> list[Assembled]:
    """A tensor in pieces along an axis, of given shapes; where they lack the axis, it is 1."""
    made, start = [], 0
    for one in like:
        stop = start + (one.shape[axis] if one.ndim == len(of.shape) else 1)
        made.append(reshape(cut(of, axis, start, stop), one.shape))
        start = stop
    return made


def _joined(operation: Any, tensors: Sequence, dim: int = 0, *, like: torch.Tensor) -> Assembled | None:
    """The expression of `cat` or `stack`; None where plain tensors are among the parts."""
    if not all(isinstance(tensor, TracedTensor) for tensor in tensors):
        return None
    axis = dim % like.ndim
    parts = [cast(tensor.made, like.dtype) for tensor in tensors]
    if operation is aten.stack:
        parts = [reshape(part, (*part.shape[:axis], 1, *part.shape[axis:])) for part in parts]
    return join(parts, axis) if all(len(part.shape) == like.ndim for part in parts) else None
