"""Configs of other sizes: attributes by their standard names, per-layer lists carried along, validators obeyed."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..errors import SizeError, WarmstartError
from .maps import LayerMap

# Attributes that count layers from the bottom; they follow the layer map as thresholds do.
LAYER_THRESHOLDS = ("max_window_layers", "first_k_dense_replace")


def config_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """A config's dtype; files and some trainers leave it as a string."""
    dtype = config.dtype
    return getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype


def standard_name(config: PreTrainedConfig, attribute: str) -> str:
    """The standard name of a config attribute: `n_embd` -> `hidden_size`. Unknown names raise with the nearest one."""
    reverse = {own: standard for standard, own in config.attribute_map.items()}
    name = reverse.get(attribute, attribute)
    known = (set(config.to_dict()) | set(config.attribute_map)) - {"warmstart"}
    if name not in known and attribute not in known:
        near = difflib.get_close_matches(attribute, sorted(known), n=1, cutoff=0.0)
        raise SizeError(
            f"{type(config).__name__} has no attribute {attribute!r}. The nearest is {near[0]!r}; pass sizes by their "
            f"transformers names."
        )
    return name


def per_layer_lists(config: PreTrainedConfig) -> list[str]:
    """Attributes that hold one entry for each layer."""
    layers = config.num_hidden_layers
    return [
        name
        for name, value in config.to_dict().items()
        if isinstance(value, (list, tuple)) and len(value) == layers and name not in ("architectures", "warmstart")
    ]


def resize_config(
    config: PreTrainedConfig, sizes: Mapping[str, Any], layer_map: LayerMap | None = None
) -> PreTrainedConfig:
    """A copy of a config with other sizes (by standard name) and layers; the input is untouched.

    Raises:
        SizeError: the config's own validators refuse the sizes; their words are kept.
    """
    lists = per_layer_lists(config) if layer_map else []
    layers = config.num_hidden_layers if layer_map else None
    data = copy.deepcopy(config.to_dict())
    for name, value in sizes.items():
        data[config.attribute_map.get(name, name)] = value
    if layer_map is not None:
        data[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layer_map.after
        for name in lists:
            data[name] = layer_map.carry(data[name])
        for name in LAYER_THRESHOLDS:
            if isinstance(data.get(name), int):
                # As many layers lie below the threshold as copy a layer that lay below it.
                below = sum(source < data[name] for source in layer_map.source)
                data[name] = below + max(0, data[name] - layers)
    try:
        resized = type(config).from_dict(data)
    except (StrictDataclassError, AttributeError, ValueError) as error:
        words = " ".join(str(error).split())
        raise SizeError(f"{type(config).__name__} refuses the sizes {dict(sizes)}: {words}") from error
    resized._attn_implementation_internal = config._attn_implementation_internal
    resized._experts_implementation_internal = getattr(config, "_experts_implementation_internal", None)
    resized.dtype = config_dtype(config)
    return resized


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config names under `architectures`, else the class for causal language modelling."""
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    raise WarmstartError(
        f"{type(config).__name__} names no model class and has none for causal language modelling. Pass a model."
    )
