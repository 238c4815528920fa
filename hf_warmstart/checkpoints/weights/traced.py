"""Tensors without data that remember how they are made, so that code which moves tensors about can be run for its plan.

A `TracedTensor` goes where a tensor goes. Cut, joined, permuted, reshaped or cast, it gives another one, whose `made` is the
expression. Arithmetic gives one that is `Unknown`, for code that throws it away (initialisation does, of weights that are
loaded). Writing to known tensors and asking for values raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ...errors import UntraceableError
from .pieces import Assembled, Source, cast, cut, join, permute, reshape

aten = torch.ops.aten
SAME = (aten.alias, aten.clone, aten.detach, aten.lift_fresh, aten._to_copy)
RESHAPE = (aten.view, aten._unsafe_view, aten.squeeze, aten.unsqueeze)
VALUES = (aten.equal.default, aten._local_scalar_dense.default, aten.is_nonzero.default)


@dataclass(frozen=True, eq=False)
class Unknown(Assembled):
    """A tensor whose values are not those of others, moved about, but made by an operation."""

    operation: str = ""


@dataclass
class Trace:
    """One run of such code.

    Args:
        refusals: operations that raised `UntraceableError`: code in between may have caught it.
        storages: those in which known tensors lie, by number.
    """

    refusals: list[str] = field(default_factory=list)
    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> TracedTensor:
        """A source tensor."""
        like = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return TracedTensor(Source(tuple(shape), dtype, name=name), like, self)

    def written(self, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        """The tensor that an operation writes to; where it might hold a known tensor's values, that is refused."""
        given = {argument.name: argument for argument in func._schema.arguments}
        values = dict(zip(given, args, strict=False)) | kwargs
        written = [value for name, value in values.items() if (info := given[name].alias_info) and info.is_write]
        for value in written:
            if not isinstance(value, TracedTensor) or value.like.untyped_storage()._cdata in self.storages:
                self.refuse(func)
        return written[0]

    def refuse(self, func: Any) -> None:
        """Raise `UntraceableError` over an operation."""
        self.refusals.append(str(func))
        self.check()

    def check(self) -> None:
        """Raise `UntraceableError` if anything was refused."""
        if self.refusals:
            raise UntraceableError(f"Values are asked for or written to, by {sorted(set(self.refusals))}.")


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
        if not isinstance(made, Unknown):
            storage = like.untyped_storage()
            trace.storages[storage._cdata] = storage
        return tensor

    def __init__(self, made: Assembled, like: torch.Tensor, trace: Trace) -> None:
        pass

    def __repr__(self, **_: Any) -> str:
        return f"TracedTensor({self.made})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.data.__set__:  # which no dispatch sees
            tensor, value = args
            if not isinstance(tensor, cls) or not isinstance(value, cls):
                next(one for one in args if isinstance(one, cls)).trace.refuse("data.__set__")
            tensor.made, tensor.like = value.made, value.like
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        traced = [one for one in tree_leaves((args, kwargs)) if isinstance(one, TracedTensor)]
        trace = traced[0].trace
        if func in VALUES:
            trace.refuse(func)
        if func._schema.is_mutable:
            return trace.written(func, args, kwargs)
        like = func(*tree_map(_meta, args), **tree_map(_meta, kwargs))
        operations = [one.made.operation for one in traced if isinstance(one.made, Unknown)]
        several = isinstance(like, (list, tuple))
        likes = list(like) if several else [like]
        made = None if operations else _moved(func.overloadpacket, args, kwargs, likes)
        if made is None:
            operation = operations[0] if operations else str(func)
            made = [Unknown(tuple(one.shape), one.dtype, operation=operation) for one in likes]
        tensors = [cls(one, view, trace) for one, view in zip(made, likes, strict=True)]
        return tensors if several else tensors[0]


def _meta(value: Any) -> Any:
    if isinstance(value, TracedTensor):
        return value.like
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _moved(operation: Any, args: tuple, kwargs: dict, likes: Sequence[torch.Tensor]) -> Sequence[Assembled] | None:
    """The expressions of what an operation gives, if it moves entries about."""
    first, *others = args or (None,)
    if operation in (aten.cat, aten.stack):
        one = _joined(operation, *args, **kwargs, like=likes[0])
        return None if one is None else [one]
    if not isinstance(first, TracedTensor):
        return None
    axes = list(range(first.ndim))
    if operation in (aten.split, aten.split_with_sizes):
        return _split(first.made, axes[kwargs.get("dim", others[1] if len(others) > 1 else 0)], likes)
    if operation is aten.unbind:
        return _split(first.made, axes[others[0] if others else 0], likes)
    one = _view(operation, first.made, others, likes[0])
    return None if one is None else [one]


def _view(operation: Any, of: Assembled, others: Sequence, like: torch.Tensor) -> Assembled | None:
    """The expression of an operation that makes one tensor of one."""
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
    if operation is aten.select:
        axis, index = order[others[0]], range(of.shape[others[0]])[others[1]]
        return reshape(cut(of, axis, index, index + 1), like.shape)
    if operation is aten.slice:
        default: list[Any] = [0, None, None, 1]
        axis, start, stop, step = [*others, *default[len(others) :]]
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
