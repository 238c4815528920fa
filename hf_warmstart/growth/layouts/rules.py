"""Rules: what each kind of operation does to the axes of its operands.

A rule takes (tape, node, args, kwargs, outputs) and gives the axes of each output; on the way it unifies axes that meet,
notes roles (which axis of a parameter is read, which written) and events (what restricts how an axis may grow).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .terms import Term, concat, product, split_product, unify
from .values import ORDERED, REDUCTIONS, SAME, VIEWS, Dim, Node, Value, fresh, matrices

if TYPE_CHECKING:
    from .tape import Tape


def _dims(tape: Tape, tensor: Tensor) -> list[Dim]:
    return list(tape.value(tensor).dims)


def _axis(dim: int, ndim: int) -> int:
    return dim % ndim if ndim else 0


def regroup(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """The axes of a value after `view`: merged and split so that lengths agree."""
    if 0 in sizes:
        old = list(dims)
        return [
            old[k] if len(old) == len(sizes) and old[k].size == size else fresh(size) for k, size in enumerate(sizes)
        ]
    old = [dim for dim in dims if dim.size > 1]
    made: list[Dim] = []
    todo = list(sizes)
    while todo:
        if todo[0] == 1:
            made.append(fresh(1))
            todo.pop(0)
            continue
        group, total = [old.pop(0)], 0
        want = [todo.pop(0)]
        total, wanted = group[0].size, want[0]
        while total != wanted:
            if total < wanted:
                group.append(old.pop(0))
                total *= group[-1].size
            else:
                want.append(todo.pop(0))
                wanted *= want[-1]
        source = frozenset().union(*(dim.source for dim in group))
        term = product([dim.term for dim in group]) if len(group) > 1 else group[0].term
        proper = [size for size in want if size > 1]
        parts = iter(split_product(term, proper)) if len(proper) > 1 else iter([term])
        made += [Dim(next(parts), source) if size > 1 else fresh(1) for size in want]
    return made


def _view(tape, node, args, kwargs, outs):
    return [regroup(tape.value(args[0]).dims, outs[0].shape)]


def _same(tape, node, args, kwargs, outs):
    return [list(node.inputs[0].dims) for _ in outs]


def _t(tape, node, args, kwargs, outs):
    return [_dims(tape, args[0])[::-1]]


def _transpose(tape, node, args, kwargs, outs):
    dims = _dims(tape, args[0])
    a, b = _axis(args[1], len(dims)), _axis(args[2], len(dims))
    dims[a], dims[b] = dims[b], dims[a]
    return [dims]


def _permute(tape, node, args, kwargs, outs):
    dims = _dims(tape, args[0])
    return [[dims[_axis(k, len(dims))] for k in args[1]]]


def _unsqueeze(tape, node, args, kwargs, outs):
    dims = _dims(tape, args[0])
    dims.insert(_axis(args[1], len(dims) + 1), fresh(1))
    return [dims]


def _squeeze(tape, node, args, kwargs, outs):
    dims = _dims(tape, args[0])
    chosen = range(len(dims)) if len(args) < 2 else [args[1]] if isinstance(args[1], int) else args[1]
    drop = {_axis(k, len(dims)) for k in chosen}
    return [[dim for k, dim in enumerate(dims) if not (k in drop and dim.size == 1)]]


def _expand(tape, node, args, kwargs, outs):
    dims, shape = _dims(tape, args[0]), outs[0].shape
    dims = [fresh(1)] * (len(shape) - len(dims)) + dims
    return [[dim if dim.size == size else fresh(size) for dim, size in zip(dims, shape, strict=True)]]


def _slice(tape, node, args, kwargs, outs):
    dims = _dims(tape, args[0])
    k = _axis(args[1] if len(args) > 1 else 0, len(dims))
    size = dims[k].size
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    stop = args[3] if len(args) > 3 and args[3] is not None else size
    step = args[4] if len(args) > 4 else 1
    start = max(0, start + size if start < 0 else min(start, size))
    stop = max(start, stop + size if stop < 0 else min(stop, size))
    if step == 1:
        dims[k] = tape.part(dims[k], start, stop, node)
    elif size % step == 0 and start < step and outs[0].shape[k] == size // step:
        outer, inner = split_product(dims[k].term, [size // step, step])
        tape.part(Dim(inner), start, start + 1, node)
        dims[k] = Dim(outer, dims[k].source)
    else:
        tape.event("opaque", [dims[k]], node)
        dims[k] = fresh(outs[0].shape[k])
    return [dims]


def _select(tape, node, args, kwargs, outs):
    dims = _dims(tape, args[0])
    k = _axis(args[1], len(dims))
    tape.event("indexed", [dims[k]], node)
    return [dims[:k] + dims[k + 1 :]]


def _split(tape, node, args, kwargs, outs):
    dims = _dims(tape, args[0])
    k = _axis(args[2] if len(args) > 2 else kwargs.get("dim", 0), len(dims))
    made, start = [], 0
    for out in outs:
        stop = start + out.shape[k]
        made.append([*dims[:k], tape.part(dims[k], start, stop, node), *dims[k + 1 :]])
        start = stop
    return made


def _unbind(tape, node, args, kwargs, outs):
    dims = _dims(tape, args[0])
    k = _axis(args[1] if len(args) > 1 else 0, len(dims))
    tape.event("indexed", [dims[k]], node)
    return [dims[:k] + dims[k + 1 :] for _ in outs]


def _cat(tape, node, args, kwargs, outs):
    values = [tape.value(t) for t in args[0] if t.numel() or t.ndim == outs[0].ndim]
    k = _axis(args[1] if len(args) > 1 else kwargs.get("dim", 0), outs[0].ndim)
    made = list(values[0].dims)
    for other in values[1:]:
        made = [made[i] if i == k else tape.join([made[i], other.dims[i]]) for i in range(len(made))]
    source = frozenset().union(*(v.dims[k].source for v in values))
    if len(values) > 1:
        made[k] = Dim(concat([v.dims[k].term for v in values]), source)
    return [made]


def _stack(tape, node, args, kwargs, outs):
    k = _axis(args[1] if len(args) > 1 else kwargs.get("dim", 0), outs[0].ndim)
    made = list(tape.value(args[0][0]).dims)
    for tensor in args[0][1:]:
        made = tape.match(made, tape.value(tensor).dims)
    made.insert(k, fresh(len(args[0])))
    return [made]


def _mm(tape, node, args, kwargs, outs):
    a, b = (tape.value(t) for t in args[:2])
    tape.contract(node, a.dims[-1], b.dims[-2 if len(b.dims) > 1 else -1], a, b)
    batch = [tape.join([x, y]) for x, y in zip(a.dims[:-2], b.dims[:-2], strict=True)]
    if batch and not matrices(a, b) and "constant" not in (a.kind, b.kind):
        tape.event("batched", batch, node)
    rest = (list(a.dims[-2:-1])) + (list(b.dims[-1:]) if len(b.dims) > 1 else [])
    for dim in [*batch, *rest]:
        tape.role(dim, "write")
    return [[*batch, *rest]]


def _addmm(tape, node, args, kwargs, outs):
    bias = tape.value(args[0])
    made = _mm(tape, node, args[1:3], {}, outs)
    node.inputs = [*node.inputs[1:], node.inputs[0]]  # bias last
    return tape.pointwise(node, [Value(tuple(made[0]), "activation", node, outs[0], 0), bias], outs)


def _mv(tape, node, args, kwargs, outs):
    return _mm(tape, node, args, kwargs, outs)


def _embedding(tape, node, args, kwargs, outs):
    weight, ids = tape.value(args[0]), tape.value(args[1])
    node.axes = (weight.dims[0].term,)
    tape.event("indexed", [weight.dims[0]], node)
    tape.role(weight.dims[0], "read")
    tape.role(weight.dims[1], "write")
    tape.looked_up(weight, weight.dims[1:], node)
    return [[*ids.dims, weight.dims[1]]]


def _as_slice(index: Tensor) -> tuple[int, int] | None:
    """The bounds of an index that takes neighbours in order."""
    if index.ndim != 1 or index.dtype in (torch.bool, torch.uint8) or not len(index):
        return None
    first = int(index[0])
    return (first, first + len(index)) if index.tolist() == list(range(first, first + len(index))) else None


def _index(tape, node, args, kwargs, outs):
    value = tape.value(args[0])
    given = [(k, index) for k, index in enumerate(args[1]) if index is not None]
    if len(given) == 1 and tape.value(given[0][1]).kind == "constant":
        k, index = given[0]
        size = value.dims[k].size
        bounds = _as_slice(torch.where(index < 0, index + size, index) if index.dtype == torch.int64 else index)
        if bounds is not None:
            neighbours = list(value.dims)
            neighbours[k] = tape.part(neighbours[k], *bounds, node)
            return [neighbours]
    dims: list[Dim] = []
    chosen: list[Tensor] = []
    first, k = None, 0
    gaps = False
    index_list = list(args[1]) + [None] * (
        len(value.dims) - sum(i.ndim if i is not None and i.dtype == torch.bool else 1 for i in args[1])
    )
    for index in index_list:
        if index is None:
            dims.append(value.dims[k])
            k += 1
            continue
        take = index.ndim if index.dtype in (torch.bool, torch.uint8) else 1
        if first is None:
            first = len(dims)
        elif first != len(dims):
            gaps = True
        tape.event("indexed", value.dims[k : k + take], node)
        chosen.append(index)
        k += take
    rank = outs[0].ndim - len(dims)
    position = 0 if gaps else (first or 0)
    sizes = outs[0].shape[position : position + rank]
    found = [fresh(size) for size in sizes]
    for index in chosen:
        if index.dtype in (torch.bool, torch.uint8):
            continue
        have = tape.value(index).dims
        for j in range(1, len(have) + 1):
            if have[-j].size == sizes[-j] and sizes[-j] > 1:
                found[-j] = Dim(have[-j].term)
    tape.looked_up(value, dims, node)
    return [[*dims[:position], *found, *dims[position:]]]


def _index_select(tape, node, args, kwargs, outs):
    dims = _dims(tape, args[0])
    k = _axis(args[1], len(dims))
    tape.event("indexed", [dims[k]], node)
    tape.role(dims[k], "read")
    tape.looked_up(tape.value(args[0]), dims[:k] + dims[k + 1 :], node)
    dims[k] = fresh(outs[0].shape[k])
    return [dims]


def _gather(tape, node, args, kwargs, outs):
    value, index = tape.value(args[0]), tape.value(args[2])
    k = _axis(args[1], len(value.dims))
    tape.event("indexed", [value.dims[k]], node)
    made = [
        index.dims[i]
        if i == k or value.dims[i].size != index.dims[i].size
        else tape.join([value.dims[i], index.dims[i]])
        for i in range(len(index.dims))
    ]
    return [made]


def _scatter(tape, node, args, kwargs, outs):
    """scatter, scatter_add, index_add, index_copy: (self, dim, index, source)."""
    value = tape.value(args[0])
    k = _axis(args[1], len(value.dims))
    tape.event("scattered", [value.dims[k]], node)
    if isinstance(args[3], Tensor):
        source = tape.value(args[3])
        if len(source.dims) == len(value.dims):
            for i, (x, y) in enumerate(zip(value.dims, source.dims, strict=True)):
                if i != k and x.size == y.size:
                    unify(x.term, y.term)
    return [list(value.dims)]


def _index_put(tape, node, args, kwargs, outs):
    value, source = tape.value(args[0]), tape.value(args[2])
    free = []
    k = 0
    for index in [*args[1], *[None] * len(value.dims)]:
        if k >= len(value.dims):
            break
        if index is None:
            free.append(value.dims[k])
            k += 1
        else:
            take = index.ndim if index.dtype in (torch.bool, torch.uint8) else 1
            tape.event("scattered", value.dims[k : k + take], node)
            k += take
    for x, y in zip(free[::-1], source.dims[::-1], strict=False):
        if x.size == y.size:
            unify(x.term, y.term)
    return [list(value.dims)]


def _masked_scatter(tape, node, args, kwargs, outs):
    value, source = tape.value(args[0]), tape.value(args[2])
    if value.dims and source.dims and value.dims[-1].size == source.dims[-1].size:
        unify(value.dims[-1].term, source.dims[-1].term)
    return [list(value.dims)]


def _copy(tape, node, args, kwargs, outs):
    made = tape.pointwise(node, node.inputs, outs)
    return made


def _reduce(tape, node, args, kwargs, outs):
    value = node.inputs[0]
    dims = list(value.dims)
    position = 2 if node.name in ("linalg_vector_norm", "norm") else 1
    axis = args[position] if len(args) > position else kwargs.get("dim")
    if isinstance(axis, (bool, Tensor)):
        axis = None
    chosen = [axis] if isinstance(axis, int) else (axis if axis else range(len(dims)))
    drop = {_axis(k, len(dims)) for k in chosen}
    node.axes = tuple(dims[k].term for k in sorted(drop))
    tape.event(f"reduced:{node.name}", [dims[k] for k in drop], node)
    made = []
    for out in outs:
        if out.ndim == len(dims):
            made.append([fresh(1) if k in drop else dim for k, dim in enumerate(dims)])
        else:
            made.append([dim for k, dim in enumerate(dims) if k not in drop][: out.ndim])
    return made


def _ordered(tape, node, args, kwargs, outs):
    value = node.inputs[0]
    name = node.name.rstrip("_")
    if name in ("tril", "triu"):
        axes = [-2, -1]
    else:
        position = 2 if name in ("topk", "roll") else 1
        axis = args[position] if len(args) > position else kwargs.get("dim", kwargs.get("dims", -1))
        if isinstance(axis, bool):
            axis = -1
        axes = [axis] if isinstance(axis, int) else list(axis or [-1])
    chosen = {_axis(k, len(value.dims)) for k in axes}
    tape.event("ordered", [value.dims[k] for k in chosen if value.dims], node)
    return [
        [fresh(out.shape[k]) if k in chosen and out.shape[k] != dim.size else dim for k, dim in enumerate(value.dims)]
        for out in outs
    ]


def _softmax(tape, node, args, kwargs, outs):
    value = node.inputs[0]
    node.axes = (value.dims[_axis(args[1], len(value.dims))].term,)
    tape.event("softmax", node.axes, node)
    return [list(value.dims)]


def _layer_norm(tape, node, args, kwargs, outs):
    value = tape.value(args[0])
    normed = value.dims[-len(args[1]) :]
    node.axes = tuple(dim.term for dim in normed)
    kind = "layer_norm" if node.name == "native_layer_norm" else "rms_norm"
    for extra in args[2:4]:
        if isinstance(extra, Tensor):
            for x, y in zip(normed, tape.value(extra).dims, strict=True):
                unify(x.term, y.term)
                tape.role(y, "write")
    tape.event(kind, normed, node)
    return [list(value.dims)] + [[fresh(size) for size in out.shape] for out in outs[1:]]


def _group_norm(tape, node, args, kwargs, outs):
    value = tape.value(args[0])
    groups = args[6] if node.name == "native_group_norm" else args[1]
    channels = value.dims[1]
    if groups > 1 and channels.size > groups:
        _, inner = split_product(channels.term, [groups, channels.size // groups])
    else:
        inner = channels.term if groups == 1 else Term(1)
    for extra in node.inputs[1:]:
        if len(extra.dims) == 1 and extra.dims[0].size == channels.size:
            unify(channels.term, extra.dims[0].term)
            tape.role(extra.dims[0], "write")
    node.axes = (inner,)
    if inner.size > 1:
        tape.event("group_norm", [inner], node)
    return [list(value.dims)] + [[fresh(size) for size in out.shape] for out in outs[1:]]


def _convolution(tape, node, args, kwargs, outs):
    value, weight = tape.value(args[0]), tape.value(args[1])
    transposed, groups = args[6], args[8]
    into = outs[0].shape[1]
    channels = value.dims[1]
    if transposed:
        if groups != 1:
            tape.opaque(node)
            return [[value.dims[0], *(fresh(size) for size in outs[0].shape[1:])]]
        tape.contract(node, channels, weight.dims[0], value, weight)
        made = weight.dims[1]
    elif groups == 1:
        tape.contract(node, channels, weight.dims[1], value, weight)
        made = weight.dims[0]
    elif groups == channels.size == into:
        unify(channels.term, weight.dims[0].term)
        made = weight.dims[0]
        node.axes = ()
    else:
        outer, inner = split_product(channels.term, [groups, channels.size // groups])
        g, rest = split_product(weight.dims[0].term, [groups, into // groups])
        unify(outer, g)
        tape.contract(node, Dim(inner), weight.dims[1], value, weight)
        made = Dim(product([g, rest]), weight.dims[0].source)
    tape.role(made, "write")
    tape.event("kernel", weight.dims[2:], node)
    for dim in weight.dims[2:]:
        tape.role(dim, "write")
    if len(node.inputs) > 2:
        unify(made.term, node.inputs[2].dims[0].term)
        tape.role(node.inputs[2].dims[0], "write")
    space = [
        dim if dim.size == size else fresh(size) for dim, size in zip(value.dims[2:], outs[0].shape[2:], strict=True)
    ]
    return [[value.dims[0], made, *space]]


def _pad(tape, node, args, kwargs, outs):
    value = node.inputs[0]
    dims = list(value.dims)
    padding = args[1]
    for j in range(len(padding) // 2):
        before, after = padding[2 * j], padding[2 * j + 1]
        k = len(dims) - 1 - j
        if before or after:
            if before >= 0 and after >= 0:
                dims[k] = Dim(concat([Term(before), dims[k].term, Term(after)]))
            else:
                dims[k] = fresh(outs[0].shape[k])
    return [dims]


def _repeat(tape, node, args, kwargs, outs):
    dims = _dims(tape, args[0])
    dims = [fresh(1)] * (len(args[1]) - len(dims)) + dims
    made = []
    for dim, times in zip(dims, args[1], strict=True):
        made.append(
            dim if times == 1 else Dim(product([Term(times), dim.term]) if dim.size > 1 else Term(times), dim.source)
        )
    return [made]


def _attention(tape, node, args, kwargs, outs):
    q, k, v = (tape.value(t) for t in args[:3])
    if kwargs.get("scale") is None:
        node.scalars += (q.dims[-1].size ** -0.5,)
    tape.contract(node, q.dims[-1], k.dims[-1], q, k)
    for x, y, z in zip(q.dims[:-2], k.dims[:-2], v.dims[:-2], strict=True):
        if x.size == y.size:
            unify(x.term, y.term)
        if x.size == z.size:
            unify(x.term, z.term)
    tape.event("batched", q.dims[:-2], node)
    return [[*q.dims[:-1], v.dims[-1]]] + [[fresh(size) for size in out.shape] for out in outs[1:]]


def _complex(tape, node, args, kwargs, outs):
    dims = _dims(tape, args[0])
    return [dims[:-1] if node.name == "view_as_complex" else [*dims, fresh(2)]]


def opaque(tape, node, args, kwargs, outs):
    tape.opaque(node)
    same = node.inputs[0].tensor.shape
    return [
        [dim if same == out.shape else fresh(size) for dim, size in zip(node.inputs[0].dims, out.shape, strict=True)]
        if out.ndim == len(node.inputs[0].dims)
        else [fresh(size) for size in out.shape]
        for out in outs
    ]


def _unfold(tape, node, args, kwargs, outs):
    dims = _dims(tape, args[0])
    k = _axis(args[1], len(dims))
    tape.event("indexed", [dims[k]], node)
    dims[k] = fresh(outs[0].shape[k])
    return [[*dims, fresh(outs[0].shape[-1])]]


def _one_hot(tape, node, args, kwargs, outs):
    return [[*_dims(tape, args[0]), fresh(outs[0].shape[-1])]]


def _diagonal(tape, node, args, kwargs, outs):
    tape.opaque(node)
    return [[fresh(size) for size in out.shape] for out in outs]


Rule = Callable[["Tape", Node, Sequence, Mapping, Sequence[Tensor]], list]
RULES: dict[str, Rule] = {
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(SAME - {"contiguous"}, _same),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(ORDERED, _ordered),
    "contiguous": _same,
    "t": _t,
    "transpose": _transpose,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "split": _split,
    "split_with_sizes": _split,
    "unbind": _unbind,
    "cat": _cat,
    "stack": _stack,
    "mm": _mm,
    "bmm": _mm,
    "mv": _mv,
    "dot": _mm,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "embedding": _embedding,
    "index": _index,
    "index_select": _index_select,
    "gather": _gather,
    "scatter": _scatter,
    "scatter_add": _scatter,
    "scatter_reduce": _scatter,
    "index_add": _scatter,
    "index_copy": _scatter,
    "index_put": _index_put,
    "_index_put_impl": _index_put,
    "masked_scatter": _masked_scatter,
    "copy": _copy,
    "_softmax": _softmax,
    "_log_softmax": _softmax,
    "_safe_softmax": _softmax,
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "convolution": _convolution,
    "constant_pad_nd": _pad,
    "repeat": _repeat,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "view_as_complex": _complex,
    "view_as_real": _complex,
    "unfold": _unfold,
    "as_strided": opaque,
    "one_hot": _one_hot,
    "diagonal": _diagonal,
    "nonzero": lambda tape, node, args, kwargs, outs: [[fresh(size) for size in out.shape] for out in outs],
    "_local_scalar_dense": lambda tape, node, args, kwargs, outs: [],
    "bincount": _diagonal,
    "histc": _diagonal,
}
