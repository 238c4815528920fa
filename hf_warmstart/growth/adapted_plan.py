"""`AdaptedPlan`: how every tensor of a model with LoRA adapters grows, weights and optimizer's state alike.

An adapter's factors lie along one axis of the weight that they add to, and along the rank, which does not grow:

    B' = f W_out B          A' = A R_in^T
    G_B' = R_out G_B / f    G_A' = G_A W_in^T

(`f` is what the weight takes back of a number in the forward, nearly always 1; G are gradients of the loss). So each is a
`TensorGrowth` of its own, with the weight's map on that axis and nothing fresh. First and second moments follow from it as
any tensor's do: for even copies they are those that the child would have had itself. In a new layer first moments are zero,
and B where its weight is.

Names are peft's, such as `base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .axes import Fixed
from .layout import Role, TensorLayout
from .maps import SpaceMap
from .plan import GrowthPlan
from .transform import TensorGrowth
from .wrapped import base_of

if TYPE_CHECKING:
    from peft import PeftModel

# Parts of a name that peft puts in when it wraps a module, and parts that only its own tensors have.
WRAPPED = {"base_layer", "original_module"}
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
SAVED = "modules_to_save"


@dataclass(frozen=True)
class AdaptedPlan:
    """A plan together with the grown model's adapters; for `grow_optimizer_state` in the place of the base's plan.

    Args:
        plan (`GrowthPlan`): of the base. child (`PeftModel`): the grown model with its adapters, of which names and shapes
            are taken, and no weight.

    Example:

        >>> plan, child = plan_growth(adapted, width=2), grow(adapted, width=2)                  # doctest: +SKIP
        >>> state = grow_optimizer_state(parent_state, AdaptedPlan(plan, child))                 # doctest: +SKIP
    """

    plan: GrowthPlan
    child: PeftModel

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The base's class."""
        return self.plan.model_class

    @cached_property
    def _base(self) -> PreTrainedModel:
        return base_of(self.child)

    @cached_property
    def _prefix(self) -> str:
        """What stands before the base's own names."""
        return next(f"{name}." for name, module in self.child.named_modules() if module is self._base)

    @cached_property
    def names(self) -> list[str]:
        """The child's parameters that grow from one of the parent's, in the model's order."""
        return [name for name, _ in self.child.named_parameters() if self._placed(name)]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The parent's parameters."""
        return {self.source_name(name): tuple(m.n for m in self.tensor(name).maps) for name in self.names}

    def source_name(self, name: str) -> str:
        """The parent's tensor that a child's tensor grows from."""
        return self._prefix + self.plan.source_name(name.removeprefix(self._prefix))

    def is_added(self, name: str) -> bool:
        """As `GrowthPlan.is_added`, of the layer that a tensor lies in."""
        inner = clean(name.removeprefix(self._prefix))
        return self.plan.is_added(f"{parts(inner)[0]}.weight" if is_adapters(inner) else inner)

    def tensor(self, name: str) -> TensorGrowth:
        """How one of the child's tensors grows."""
        inner = clean(name.removeprefix(self._prefix))
        grown = adapter_growth(inner, self._base, self.plan) if is_adapters(inner) else self._of_base(inner)
        return replace(grown, name=name)

    def _of_base(self, name: str) -> TensorGrowth:
        return growth_of(self.plan, name, self._base.all_tied_weights_keys)

    def _placed(self, name: str) -> bool:
        inner = clean(name.removeprefix(self._prefix))
        return is_adapters(inner) or inner in self.plan.placed or inner in self._base.all_tied_weights_keys


def adapter_growth(name: str, child: PreTrainedModel, plan: GrowthPlan) -> TensorGrowth:
    """How one tensor of an adapter grows.

    Args:
        name: in the child, as if nothing were wrapped. child: the base with its layers wrapped. plan: of the base.
    """
    module, part, adapter, leaf = parts(name)
    tied = child.all_tied_weights_keys
    if part == SAVED:
        return growth_of(plan, f"{module}.{leaf}", tied)
    layer = growth_of(plan, f"{module}.weight", tied)
    wrapped = child.get_submodule(module)
    base_layer = wrapped.get_base_layer()  # type: ignore[operator]
    reads, writes = (0, 1) if isinstance(base_layer, (Conv1D, torch.nn.Embedding)) else (1, 0)
    rank = Fixed(wrapped.r[adapter])  # type: ignore[index]
    if part.endswith("_A"):
        return replace(_along(layer, name, (rank, reads)), factor=1.0, shrink=None, fill=None)
    if leaf == "bias":
        # It adds to what the layer writes, as the layer's own bias does where it has one.
        own = f"{module}.bias"
        bias = growth_of(plan, own, tied) if own in plan.placed else layer
        return _along(replace(layer, factor=bias.factor, shrink=bias.shrink, fill=bias.fill), name, (writes,))
    return _along(layer, name, (writes, rank))


def _along(layer: TensorGrowth, name: str, axes: tuple[int | Fixed, ...]) -> TensorGrowth:
    """The growth of a tensor whose axes are some of a weight's, by number, and constant ones."""
    layout, maps = layer.layout, layer.maps
    made = [axis if isinstance(axis, Fixed) else layout.axes[axis] for axis in axes]
    roles: list[Role] = ["write" if isinstance(axis, Fixed) else layout.roles[axis] for axis in axes]
    along = tuple(SpaceMap.identity(axis.length) if isinstance(axis, Fixed) else maps[axis] for axis in axes)
    columns = along[-1].m if len(along) > 1 else 1
    return replace(
        layer,
        layout=TensorLayout(tuple(made), tuple(roles)),
        maps=along,
        name=name,
        noise=0.0,
        fresh=lambda start, stop: torch.zeros(stop - start, columns),
        fill=None if layer.fill is None else 0.0,
    )


def growth_of(plan: GrowthPlan, name: str, tied: Mapping[str, str]) -> TensorGrowth:
    """How a tensor of the base grows; a tied one as what it is tied to."""
    return plan.tensor(name if name in plan.placed else tied.get(name, name))


def is_adapters(name: str) -> bool:
    """Whether a tensor is an adapter's own."""
    return not {*FACTORS, SAVED}.isdisjoint(name.split("."))


def clean(name: str) -> str:
    """The name of a tensor as if nothing were wrapped."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def parts(name: str) -> tuple[str, str, str, str]:
    """Module, factor, adapter and leaf of an adapter's tensor: `(".. q_proj", "lora_A", "default", "weight")`."""
    words = name.split(".")
    at = next(number for number, word in enumerate(words) if word in (*FACTORS, SAVED))
    return ".".join(words[:at]), words[at], words[at + 1], ".".join(words[at + 2 :])
