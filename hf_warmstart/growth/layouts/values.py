"""Values and operations: what a tape holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from .terms import Term

Kind = Literal["weight", "activation", "constant"]
ParameterAxis = tuple[str, int]


class Dim(NamedTuple):
    """One axis of a value: its term, and the parameter axes that it comes from (weights only)."""

    term: Term
    source: frozenset[ParameterAxis] = frozenset()

    @property
    def size(self) -> int:
        return self.term.size


def fresh(size: int) -> Dim:
    return Dim(Term(size))


@dataclass(eq=False)
class Value:
    """One version of one tensor.

    Args:
        dims: its axes. kind: what it is made of. node: what made it (None: a parameter, an input or a constant).
        tensor: kept alive, since values are told apart by identity. storage: identity of its memory.
        parameter: name of the parameter that it is a view of, if it is one.
        offset: what was added to that parameter (norms of the form `1 + weight`).
        filled: whether it is room that was made by numbers alone and is filled in place by activations.
        stream: whether a lookup or a product made it: a product with it contracts what its parameters wrote (a table of
            relative positions, looked up and met by the queries), and they do not read there.
    """

    dims: tuple[Dim, ...]
    kind: Kind
    node: Node | None
    tensor: Tensor
    storage: int
    parameter: str | None = None
    offset: float = 0.0
    filled: bool = False
    stream: bool = False

    @property
    def matrix(self) -> bool:
        """Whether it acts on what it is multiplied with, as the weight of a linear layer does."""
        return self.kind == "weight" and not self.stream

    def __repr__(self) -> str:
        return f"<{self.parameter or self.kind} {[d.term for d in self.dims]}>"


@dataclass(eq=False)
class Node:
    """One operation.

    Args:
        name: aten name. inputs: values that it read. outputs: values that it made. scope: path of the module that ran.
        scalars: numbers among its arguments, and constants of one element. axes: axes of the first input that it
            reduced, contracted, normalised or indexed.
    """

    name: str
    inputs: list[Value]
    scope: str
    scalars: tuple[float, ...] = ()
    outputs: list[Value] = field(default_factory=list)
    axes: tuple[Term, ...] = ()

    def __repr__(self) -> str:
        return f"{self.name}@{self.scope}"


@dataclass
class Event:
    """Something that restricts how a term may grow."""

    kind: str
    term: Term
    node: Node


VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten"}
SAME = {"clone", "contiguous", "_to_copy", "detach", "alias", "lift_fresh", "lift_fresh_copy", "positive"}
ADDS = {"add", "sub", "rsub"}
MULS = {"mul", "div"}
# What acts on each entry alone though the framework does not say so.
ALIKE = {
    "fill", "zero", "native_dropout", "masked_fill", "where", "copy", "lerp", "addcmul", "addcdiv", "mul", "add",
    "log_sigmoid_forward",
}  # fmt: skip
REDUCTIONS = {
    "sum", "mean", "amax", "amin", "prod", "linalg_vector_norm", "norm", "var", "std", "any", "all", "max", "min",
    "argmax", "argmin", "logsumexp", "median", "var_mean", "std_mean",
}  # fmt: skip
CREATES = {
    "zeros", "ones", "full", "empty", "arange", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros",
    "new_ones", "new_full", "new_empty", "scalar_tensor", "rand", "randn", "randint", "linspace", "eye", "empty_strided",
    "new_empty_strided", "rand_like", "randn_like", "logspace", "tril_indices", "triu_indices", "randperm",
}  # fmt: skip
ORDERED = {"cumsum", "cumprod", "logcumsumexp", "flip", "roll", "sort", "topk", "cummax", "tril", "triu", "argsort"}
STRUCTURAL = SAME | VIEWS | {
    "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "split", "split_with_sizes", "unbind",
    "select", "cat", "stack", "index", "index_select", "gather", "scatter", "scatter_add", "index_add", "index_copy",
    "index_put", "_index_put_impl", "copy", "constant_pad_nd", "repeat", "roll", "flip", "where", "masked_fill",
    "native_dropout", "neg", "scatter_reduce", "masked_scatter", "unfold", "tril", "triu", "positive", "as_strided",
    "view_as_complex", "view_as_real", "cumsum",
}  # fmt: skip
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
SCALING = {"mul", "div", "add", "sub", "rsub", "baddbmm", ATTENTION}  # what brings numbers into a forward
CONTRACTIONS = {"mm", "bmm", "mv", "dot", "addmm", "baddbmm", "convolution"}
PRODUCES = CONTRACTIONS | {"embedding"}  # what makes a stream, be it of parameters alone
NORMS = {"native_layer_norm", "_fused_rms_norm", "native_group_norm"}
SOFTMAXES = {"_softmax", "_log_softmax", "_safe_softmax"}


def matrices(left: Value, right: Value) -> list[Value]:
    """The operands of a product that act on the other; of two parameters the second, as in a linear layer."""
    found = [value for value in (left, right) if value.matrix]
    return found[-1:]


def base_name(node: Node) -> str:
    name = node.name
    return name.rstrip("_") if name.endswith("_") and not name.startswith("__") else name


def carries(value: Value, atom: Term) -> bool:
    """Whether an atom is part of one of a value's axes. To be asked when the tape is finished."""
    return any(dim.size > 1 and atom in dim.term.roots() for dim in value.dims)
