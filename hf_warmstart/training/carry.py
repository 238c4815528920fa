"""Putting a grown optimizer state into an optimizer, parameter by parameter, whole or sharded.

Each parameter's entry is read from the parent's checkpoint and grown piece by piece. Where parameters are cut by rows
(FSDP2) a process reads the rows that its own rows come from, and makes its own rows only: it never holds more than its share
and one tensor. Nothing is sent between ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..checkpoints.torch_files.placement import Rows, from_rows, rows_of_parameter
from ..errors import StateError
from ..growth.adapted_plan import AdaptedPlan
from ..growth.optimizers import rule_for_entry, rule_for_optimizer, same_buffers
from ..growth.plan import GrowthPlan
from ..growth.state import check_entry, grow_entry
from .grown_adamw import GrownAdamW


def load_grown_state(
    optimizer: Any, state: Mapping[str, Any], plan: GrowthPlan | AdaptedPlan, *, state_policy: str = "carry"
) -> None:
    """Load the parent's optimizer state, grown, into the optimizer of the grown model.

    Args:
        optimizer: of the child; its groups hold the parameters' names as `param_names`. Parameters may be DTensors.
        state: `{"state": {name: {...}}, "param_groups": [...]}` by the parent's names; entries are read one at a time.
        plan: the growth. state_policy: as for `grow_optimizer_state`.

    Raises:
        StateError: an entry is not of the parent, or of another kind than this optimizer keeps.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    rule = rule_for_optimizer(inner)
    if state_policy == "asymmetric_reset" and not isinstance(inner, GrownAdamW):
        raise StateError(
            f"state_policy='asymmetric_reset' gives new entries a step count of their own, which {type(inner).__name__} does "
            "not keep. Pass no optimizer, so that WarmstartTrainer makes a GrownAdamW, or another state_policy."
        )
    entries = state["state"]
    whole = optimizer.state_dict()
    for group, live in zip(whole["param_groups"], inner.param_groups, strict=True):
        for number, name, parameter in zip(group["params"], group["param_names"], live["params"], strict=True):
            source = plan.source_name(name)
            if source not in entries:
                continue
            entry = entries[source]
            if wrong := check_entry(source, entry, tuple(plan.shapes[source])):
                raise StateError("; ".join(wrong))
            if rule_for_entry(entry) is not rule:
                kept = rule_for_entry(entry)
                raise StateError(
                    f"The parent's state is of {kept.name if kept else 'no known optimizer'}, which {type(inner).__name__} "
                    "cannot use. Pass the parent's optimizer as optim (or optimizer_cls_and_kwargs), or "
                    "state_policy='reset'."
                )
            if not same_buffers(state["param_groups"], inner):
                raise StateError(
                    f"The parent's momentum buffers are not {type(inner).__name__}'s: SGD sums gradients, Muon averages them. "
                    "Pass the parent's optimizer, or state_policy='reset'."
                )
            if group.get("amsgrad") and "max_exp_avg_sq" not in entry:
                raise StateError(
                    f"{source}: the parent kept no maximum of its second moments, which amsgrad=True needs. Leave it out, or "
                    "pass state_policy='reset'."
                )
            rows = rows_of_parameter(parameter)
            grown = grow_entry(plan, name, entry, state_policy, rows)
            whole["state"][number] = {key: _placed(value, parameter, rows) for key, value in grown.items()}
            del grown  # before the next is made
    optimizer.load_state_dict(whole)


def _placed(value: Any, parameter: Tensor, rows: Rows | None) -> Any:
    if rows is None or not isinstance(value, Tensor) or value.ndim == 0:
        return place_like(value, parameter)
    return from_rows(value.to(parameter.device).contiguous(), parameter.shape, parameter.device_mesh)  # type: ignore[attr-defined]


def place_like(value: Any, parameter: Tensor) -> Any:
    """A tensor of a parameter's shape, cut and placed as the parameter is; everything else as it is."""
    if not isinstance(value, Tensor) or value.ndim == 0 or not isinstance(parameter, DTensor):
        return value
    if value.shape != parameter.shape:
        raise StateError(
            f"A state of shape {tuple(value.shape)} cannot be sharded as its parameter {tuple(parameter.shape)} is: factored "
            "moments exist only in whole. Train without sharding, or pass state_policy='reset'."
        )
    local = value.to(parameter.device)
    return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None).detach()


@torch.no_grad()
def load_grown_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], plan: GrowthPlan) -> None:
    """Fill a model of the child's config, whole or sharded, from the parent's weights, tensor by tensor.

    Args:
        model: of `plan.target_config`; its parameters may be DTensors. weights: the parent's, by name.

    Raises:
        StateError: weights are missing.
    """
    targets = model.state_dict(keep_vars=True)
    missing = sorted({plan.source_name(name) for name in plan.names} - set(weights))
    if missing:
        raise StateError(f"The parent's weights lack {len(missing)} tensors: {missing[:5]}.")
    for name in plan.names:
        # Nothing is named, so that nothing of one tensor is still held while the next is grown.
        targets[name].copy_(
            place_like(plan.tensor(name).grow(weights[plan.source_name(name)], "weight"), targets[name])
        )
