"""Where a growth starts: a model, a config, a folder or a Hub id; and models that cannot be grown."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..errors import WarmstartError
from .configs import COUNTS_LAYERS, model_class_of
from .twin import FAULTS
from .wrapped import base_of, is_wrapped

# Of these a config makes lists and modules, one for each, before anything can be compared with its weights.
COUNTS = re.compile(rf"{COUNTS_LAYERS}|num_labels")
MAX_COUNT = 100_000
MAX_CONFIG_BYTES, MAX_NESTING = 50_000_000, 100

UNQUANTISED = (
    "Load the model unquantised (from_pretrained with quantization_config removed, or model.dequantize()), save it in "
    "bfloat16 and grow that; quantise the grown model anew."
)


# peft has names for these, and takes a second to import.
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_ALONE = (
    "It holds an adapter, and not the base that it belongs to. Load both (AutoPeftModelForCausalLM.from_pretrained) and grow "
    "that model; or save its merge_and_unload(), and grow that folder."
)


def class_and_config(
    source: PreTrainedModel | PreTrainedConfig | str | os.PathLike,
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The model class and config behind a source; loads no weights."""
    if isinstance(source, PreTrainedConfig):
        return model_class_of(source), source
    if isinstance(source, (str, os.PathLike)):
        config = read_config(source)
        return model_class_of(config), config
    if is_wrapped(source):
        source = base_of(source)  # a plan is of the base; adapters follow it
    else:
        check_model(source)
    return type(source), source.config


def read_config(source: str | os.PathLike) -> PreTrainedConfig:
    """The config in a folder or of a Hub id. No code of theirs is run, and nobody is asked whether it may.

    Raises:
        WarmstartError: there is none, or transformers cannot read it; its own words are kept.
    """
    try:
        _check_file(Path(source, CONFIG_NAME))
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except FAULTS as error:
        advice = ""
        if holds_adapter_alone(source):
            advice = f" {ADAPTER_ALONE}"
        elif Path(source).is_dir() and not Path(source, CONFIG_NAME).exists():
            advice = (
                f" Put the model's {CONFIG_NAME} there (model.config.save_pretrained(folder)): a Trainer that saves in "
                "shards leaves it out."
            )
        elif "trust_remote_code" in str(error):
            advice = " No code from a checkpoint is run here: load the model as you trust it, and pass it to grow()."
        words = f"{error}" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        raise WarmstartError(f"No model config could be read from {str(source)!r}: {words}{advice}") from error


def holds_adapter_alone(folder: str | os.PathLike) -> bool:
    """Whether a folder holds an adapter of peft without a model."""
    return Path(folder, ADAPTER_CONFIG_NAME).is_file() and not Path(folder, CONFIG_NAME).is_file()


def _check_file(path: Path) -> None:
    """Refuse a config of which transformers would make more than a machine holds, or that it would not survive."""
    if not path.is_file():
        return
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise WarmstartError(f"{path.name} has {path.stat().st_size} bytes, which no config has.")
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise WarmstartError(f"{path.name} holds no JSON object.")
    for key, value, depth in _entries(data):
        if depth > MAX_NESTING:
            raise WarmstartError(f"{path.name} is nested more than {MAX_NESTING} deep.")
        if isinstance(value, int) and value > MAX_COUNT and COUNTS.fullmatch(key):
            raise WarmstartError(f"{path.name} has {key}={value}, and at most {MAX_COUNT} can be.")


def _entries(data: dict[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """All values of a JSON object with their keys, and how deep they lie."""
    todo: list[tuple[str, Any, int]] = [("", data, 0)]
    while todo:
        key, value, depth = todo.pop()
        yield key, value, depth
        if isinstance(value, dict):
            todo += [(name, inner, depth + 1) for name, inner in value.items()]
        elif isinstance(value, list):
            todo += [(key, inner, depth + 1) for inner in value]


def check_model(model: object) -> None:
    """Raise unless an object is a plain `PreTrainedModel` whose weights can be grown."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise WarmstartError(
            f"{type(model).__name__} has adapters attached. Load them with peft (PeftModel.from_pretrained), which grows, or "
            "delete them (model.delete_adapter)."
        )
    if is_wrapped(model):
        raise WarmstartError(
            f"{type(model).__name__} wraps a model with adapters. Merge them first: model.merge_and_unload()."
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
    commits = list(Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots").glob("*"))
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
