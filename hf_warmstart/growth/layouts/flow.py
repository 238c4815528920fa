"""What each module reads and makes, seen in one forward pass of a small twin.

Shapes cannot tell the residual stream from heads of the same total size. The flow of tensors can: a tensor is on the
residual *level* when it comes from an embedding, enters or leaves a layer, or is a norm's image of such a tensor; a
matrix takes the residual level to the inner level and the inner level back. Tensors are told apart by their storage,
so views count as the tensor that they view.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import LayoutError


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: named so by its class, with a one-dimensional weight."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.ndim == 1


def _first_tensor(value) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return next((t for v in value if (t := _first_tensor(v)) is not None), None)
    return None


@dataclass
class Call:
    """One call of one module: the storages of what it read and made."""

    name: str
    module: nn.Module
    reads: int
    makes: int
    read: Tensor
    made: Tensor


@dataclass
class Flow:
    """All calls in order, and the level of each storage."""

    calls: dict[str, Call] = field(default_factory=dict)
    makers: dict[int, str] = field(default_factory=dict)
    residual: set[int] = field(default_factory=set)

    def reads_residual(self, name: str) -> bool:
        return self.calls[name].reads in self.residual

    def maker_of(self, name: str) -> str | None:
        """The module that made what `name` reads."""
        return self.makers.get(self.calls[name].reads)

    def reader_norm(self, name: str) -> str | None:
        """The norm that reads what `name` made, if any."""
        return next(
            (c.name for c in self.calls.values() if c.reads == self.calls[name].makes and is_norm(c.module)), None
        )


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def trace(model: PreTrainedModel, layers: list[nn.Module], inputs: dict[str, Tensor]) -> Flow:
    """Run the model once and follow its tensors. `layers`: the modules of its stack."""
    flow = Flow()
    stack = {id(layer) for layer in layers}
    names = {id(module): name for name, module in model.named_modules()}
    alive: list[Tensor] = []  # storages are compared by identity, so none may be freed meanwhile

    def hook(module, args, kwargs, output):
        read = _first_tensor(args) if args else _first_tensor(list(kwargs.values()))
        made = _first_tensor(output if not hasattr(output, "to_tuple") else output.to_tuple())
        if read is None or made is None:
            return
        alive.extend((read, made))
        name = names[id(module)]
        call = Call(name, module, _key(read), _key(made), read, made)
        if id(module) in stack:
            flow.residual |= {call.reads, call.makes}
            return
        if next(module.parameters(recurse=False), None) is None:
            return
        flow.calls[name] = call
        flow.makers[call.makes] = name
        if isinstance(module, nn.Embedding):
            flow.residual.add(call.makes)
        elif is_norm(module):
            # A norm keeps the level. A tensor that no module made is a sum of residual branches.
            if call.reads in flow.residual or call.reads not in flow.makers:
                flow.residual |= {call.reads, call.makes}
        elif isinstance(module, (nn.Linear, Conv1D)) and call.reads not in flow.residual:
            flow.residual.add(call.makes)

    def enter(module, args, kwargs):
        read = _first_tensor(args) if args else _first_tensor(list(kwargs.values()))
        if read is not None:
            alive.append(read)
            flow.residual.add(_key(read))

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in model.modules()]
    handles += [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not flow.calls:
        raise LayoutError(f"{type(model).__name__}: nothing could be followed in a forward pass.")
    return flow
