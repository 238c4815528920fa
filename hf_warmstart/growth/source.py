"""Where a growth starts: a model, a config, a folder or a Hub id; and models that cannot be grown."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..errors import WarmstartError
from .configs import model_class_of

UNQUANTISED = (
    "Load the model unquantised (from_pretrained with quantization_config removed, or model.dequantize()), save it in "
    "bfloat16 and grow that; quantise the grown model anew."
)


def class_and_config(
    source: PreTrainedModel | PreTrainedConfig | str | os.PathLike,
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The model class and config behind a source; loads no weights."""
    if isinstance(source, PreTrainedConfig):
        return model_class_of(source), source
    if isinstance(source, (str, os.PathLike)):
        try:
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            advice = ""
            if Path(source).is_dir() and not Path(source, CONFIG_NAME).exists():
                advice = (
                    f" Put the model's {CONFIG_NAME} there (model.config.save_pretrained(folder)): a Trainer that saves in "
                    "shards leaves it out."
                )
            raise WarmstartError(f"No model config could be read from {str(source)!r}: {error}{advice}") from error
        return model_class_of(config), config
    check_model(source)
    return type(source), source.config


def check_model(model: object) -> None:
    """Raise unless an object is a plain `PreTrainedModel` whose weights can be grown."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise WarmstartError(
            f"{type(model).__name__} has adapters attached. Merge or delete them (model.delete_adapter) before growing."
        )
    if "peft" in type(model).__module__:
        raise WarmstartError(
            f"{type(model).__name__} wraps a model with adapters. Merge them first: grow(model.merge_and_unload(), ...)."
        )
    if not isinstance(model, PreTrainedModel):
        raise WarmstartError(f"A PreTrainedModel is needed, got {type(model).__name__}.")
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        method = getattr(getattr(model.config, "quantization_config", None), "quant_method", "quantised")
        raise WarmstartError(
            f"{type(model).__name__} is quantised ({method}). Load it unquantised (without quantization_config) or call "
            f"model.dequantize() first."
        )
    odd = sorted(
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.device.type == "meta" or type(tensor.data) is not torch.Tensor
    )
    if odd:
        raise WarmstartError(
            f"{len(odd)} tensors of {type(model).__name__} are not plain tensors in memory (meta, sharded or wrapped): "
            f"{odd[:5]}. Load the whole model on one device."
        )


def quantisation(config: PreTrainedConfig) -> str | None:
    """How a config says that its weights are quantised; None where it does not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(method or "quantization_config")


def parent_name(config: PreTrainedConfig) -> str:
    """A parent's Hub id, or the last part of its folder: records never hold a machine's paths."""
    name = config._name_or_path or ""
    is_path = os.path.isabs(name) or os.path.exists(name) or name.startswith((".", "~"))
    return Path(name).name if is_path else name


def parent_revision(config: PreTrainedConfig) -> str | None:
    """The commit that a parent was loaded from, where it can only be one: transformers 5 does not keep it.

    The Hub's cache holds a folder for each commit of a repository; a single one must be the parent's.
    """
    name = parent_name(config)
    if not name or name != config._name_or_path:
        return None
    commits = list(Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots").glob("*"))
    return commits[0].name if len(commits) == 1 else None


def digest(model: PreTrainedModel) -> str:
    """sha256 over names and bytes of all tensors, in the order of their names, tied ones once."""
    tied = set(model.all_tied_weights_keys)
    state = model.state_dict()
    total = hashlib.sha256()
    for name in sorted(set(state) - tied):
        tensor = state[name].detach().to("cpu").contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return total.hexdigest()
