"""How many bytes a child will take on disk, from its plan alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...errors import UntraceableError
from ...growth.configs import config_dtype
from ...growth.twin import build
from ..safetensors.layout import TensorSpec, folder_bytes
from .views import file_view, loaded_view

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...growth.plan import GrowthPlan
    from .pieces import Assembled


def saved_bytes(plan: GrowthPlan, max_shard_size: str | int = "5GB") -> int:
    """Bytes of the safetensors files, with their index, that `save_pretrained` writes of a plan's child.

    The parent is taken to have its config's dtype, and what the class keeps in another when it is loaded in that.

    Raises:
        UntraceableError: how the class is loaded or saved cannot be followed.
    """
    config = plan.source_config
    files = file_view(plan.model_class, config, config_dtype(config) or torch.float32)
    parent = loaded_view(plan.model_class, config, specs_of(files.tensors))
    try:
        dtypes = {name: parent[plan.source_name(name)].dtype for name in plan.names}
    except KeyError as lacking:
        raise UntraceableError(f"{plan.model_class.__name__} does not load {lacking} from its files.") from lacking
    child = file_view(plan.model_class, plan.target_config, dtypes)
    total = build(plan.model_class, plan.target_config, "meta").num_parameters()
    tensors = specs_of(child.tensors)
    return folder_bytes(tensors, max_shard_size, total_parameters=total, storages=child.storages)


def specs_of(tensors: Mapping[str, Assembled]) -> dict[str, TensorSpec]:
    """Dtype and shape of each tensor of a view."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
