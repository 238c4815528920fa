"""Training alone what a growth added: whole layers, and single entries of tensors that grew.

Layers that a growth in depth added are tensors of their own: all others are frozen (`requires_grad=False`), as in block
expansion. A growth in width adds entries inside tensors, and an optimizer moves tensors: their gradients are
multiplied by a mask of the new entries, so that norms and moments are of these alone, and after each step old entries get
back the bits that they had before it, whatever momentum, weight decay or rounding made of them.

Source: LLaMA Pro, arXiv 2401.02415, section 3.2, trains the added blocks and freezes all others; for single entries this is the
same rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..errors import WarmstartError
from ..growth.config import GrowthConfig
from ..growth.plan import GrowthRecord, make_plan


@dataclass
class NewParts:
    """What a growth added to a model, and now is all that trains.

    Args:
        tensors: names of parameters that are new as a whole. masks: name -> bool tensor of the parameter's shape, True for
            new entries, of those that hold old ones too. trained_before: names of all parameters that trained before.
    """

    tensors: list[str]
    masks: dict[str, Tensor]
    trained_before: frozenset[str]
    _handles: list[Any] = field(default_factory=list, repr=False)
    _parameters: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)

    @property
    def entries(self) -> int:
        """How many numbers train."""
        whole = sum(self._parameters[name].numel() for name in self.tensors)
        return whole + sum(int(mask.sum()) for mask in self.masks.values())

    def hold(self, optimizer: Any) -> None:
        """Keep old entries bit for bit through the steps of an optimizer.

        Args:
            optimizer: a `torch.optim.Optimizer`, or accelerate's around one. A step costs a copy of the tensors in `masks`
                for its duration.
        """
        inner = getattr(optimizer, "optimizer", optimizer)
        before: dict[str, Tensor] = {}

        def keep(*_: Any) -> None:
            for name in self.masks:
                before[name] = self._parameters[name].detach().clone()

        @torch.no_grad()
        def put_back(*_: Any) -> None:
            for name, old in before.items():
                parameter = self._parameters[name]
                parameter.copy_(torch.where(self.masks[name].to(old.device), parameter, old))
            before.clear()

        if self.masks:
            self._handles += [inner.register_step_pre_hook(keep), inner.register_step_post_hook(put_back)]

    def release(self) -> None:
        """Let everything train again that did before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in self.trained_before)


def freeze_parent(model: PreTrainedModel, *, entries: bool = True) -> NewParts:
    """Freeze all that a grown model has from its parent; what the last growth added stays to be trained.

    Args:
        model (`PreTrainedModel`): a grown model; its parameters' `requires_grad` is set, and those with new entries get a
            hook that masks their gradients.
        entries (`bool`, defaults to `True`): train new entries of tensors that grew, too; `False` trains whole new layers
            alone. In width, an entry is old if it is the first copy of one of the parent's, and new otherwise.

    Returns:
        `NewParts`. With a growth in width, call its `hold(optimizer)` once the optimizer is made: without it, momentum and
        weight decay move old entries. `WarmstartTrainingArguments(train_only="new")` does both.

    Raises:
        WarmstartError: the model carries no record of a growth, its parameters are sharded, or nothing in it is new.

    Example:

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_warmstart import grow
        >>> parent = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4,
        ...                                       vocab_size=99, num_hidden_layers=2))
        >>> child = grow(parent, depth=1.5)
        >>> sorted({name.split(".")[2] for name in freeze_parent(child).tensors})
        ['2']

    Source: arXiv 2401.02415, section 3.2.
    """
    records = GrowthRecord.all_of(model.config) if isinstance(model, PreTrainedModel) else []
    if not records:
        raise WarmstartError(
            f"{type(model).__name__} carries no record of a growth, so nothing in it is known to be new. Pass a model from "
            "grow()."
        )
    asked = GrowthConfig.from_dict(records[-1].growth_config)
    plan = make_plan(type(model), records[-1].parent_config(model.config), asked)
    parameters = dict(model.named_parameters())
    if sharded := sorted(name for name, p in parameters.items() if isinstance(p, DTensor)):
        raise WarmstartError(f"{sharded[0]} is sharded. Call freeze_parent before the model is wrapped.")
    before = frozenset(name for name, p in parameters.items() if p.requires_grad)
    tensors = [name for name in parameters if name in before and plan.is_added(name)]
    masks: dict[str, Tensor] = {}
    for name in parameters:
        if entries and name in before and name not in tensors and name in plan.placed:
            mask = plan.tensor(name).new_entries()
            if bool(mask.any()):
                masks[name] = mask
    if not tensors and not masks:
        raise WarmstartError(
            "The last growth added no layer, so that entries=False leaves nothing to train. Pass entries=True."
            if not entries
            else "Nothing that the last growth added is trained: it is frozen already."
        )
    found = NewParts(tensors, masks, before, _parameters=parameters)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in tensors or name in masks)
        if name in masks:
            found._handles.append(parameter.register_hook(_masked(masks, name)))
    return found


def _masked(masks: Mapping[str, Tensor], name: str) -> Any:
    def mask(gradient: Tensor) -> Tensor:
        return gradient * masks[name].to(gradient.device)

    return mask
