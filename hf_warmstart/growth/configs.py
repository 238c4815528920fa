"""Configs of other sizes: attributes by their standard names, per-layer lists carried along, validators obeyed."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..errors import SizeError, WarmstartError
from .layerwise import PER_LAYER, carry, is_integer, marks
from .maps import LayerMap

# Integers that size no tensor (units that sizes are rounded to), or count layers.
NOT_A_SIZE = re.compile(
    r".*(token_id|token_index|_idx|(?<!per_)layers?|_layer_id|max_length|seed|_version|multiple_of)|num_labels"
)
COUNTS_LAYERS = r".*(layers?|depth|num_blocks|layers_per_stack)"


def config_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """A config's dtype; files and some trainers leave it as a string.

    Raises:
        WarmstartError: torch has none of that name.
    """
    named = config.dtype
    dtype = getattr(torch, named.removeprefix("torch."), None) if isinstance(named, str) else named
    if named is not None and not isinstance(dtype, torch.dtype):
        raise WarmstartError(f"The config's dtype {named!r} is none of torch's. Pass one such as 'bfloat16'.")
    return dtype


def standard_name(config: PreTrainedConfig, attribute: str) -> str:
    """The standard name of a config attribute: `n_embd` -> `hidden_size`. Unknown names raise with the nearest one."""
    reverse = {own: standard for standard, own in config.attribute_map.items()}
    name = reverse.get(attribute, attribute)
    known = (set(config.to_dict()) | set(config.attribute_map) | set(worked_out_layers(config))) - {"warmstart"}
    if name not in known and attribute not in known:
        near = difflib.get_close_matches(attribute, sorted(known), n=1, cutoff=0.0)
        raise SizeError(
            f"{type(config).__name__} has no attribute {attribute!r}. The nearest is {near[0]!r}; pass sizes by their "
            f"transformers names."
        )
    return name


_RAISE = object()


def get_attribute(config: PreTrainedConfig, path: str, default: Any = _RAISE) -> Any:
    """A config attribute by its path: `hidden_size`, `text_config.hidden_size` for one of a part, or
    `per_layer_config.head_dim` for what some layers have of their own.
    """
    value: Any = config
    names = path.split(".")
    for k, name in enumerate(names):
        if name == PER_LAYER:
            own = {
                layer[names[k + 1]] for layer in value.to_dict().get(PER_LAYER, {}).values() if names[k + 1] in layer
            }
            return own.pop() if len(own) == 1 else default
        try:
            value = getattr(value, name)
        except AttributeError:
            if default is _RAISE:
                raise
            return default
        except RuntimeError:  # an attribute that single layers may replace: the others' value
            value = value.to_dict()[value.attribute_map.get(name, name)]
    return value[0] if is_size_list(value) else value


def is_size_list(value: Any) -> bool:
    """Whether an attribute holds one size for each layer; its first stands for all, which grow by one factor."""
    return isinstance(value, (list, tuple)) and len(value) > 1 and all(is_integer(v) and v > 1 for v in value)


def resolve_attribute(config: PreTrainedConfig, name: str) -> str:
    """The path of an attribute that a person named: as it is, or within the part for text, or the only part with it.

    Raises:
        SizeError: the name is unknown (with the nearest one), or several parts have it.
    """
    if "." in name and get_attribute(config, name, None) is not None:
        return name
    parts = {n: p for n in config.sub_configs if isinstance(p := vars(config).get(n), PreTrainedConfig)}
    own = set(config.to_dict()) | set(config.attribute_map) | set(worked_out_layers(config))
    holders = [n for n, part in parts.items() if name in part.to_dict() or name in part.attribute_map]
    if name in own and not (name in config.attribute_map and config.attribute_map[name] not in config.to_dict()):
        return standard_name(config, name)
    if "text_config" in holders or len(holders) == 1:
        part = "text_config" if "text_config" in holders else holders[0]
        return f"{part}.{standard_name(parts[part], name)}"
    if holders:
        raise SizeError(
            f"{name!r} is in several parts of this config: pass {' or '.join(f'{h}.{name}' for h in holders)}."
        )
    return standard_name(config, name)


def attribute_paths(config: PreTrainedConfig) -> list[str]:
    """Paths of all integers of a config and its parts that may be sizes, by their standard names."""
    paths = []
    reverse = {own: standard for standard, own in config.attribute_map.items()}
    for name, value in config.to_dict().items():
        part = vars(config).get(name)
        if isinstance(part, PreTrainedConfig):
            paths += [f"{name}.{path}" for path in attribute_paths(part)]
        elif name == PER_LAYER and value:
            own = {inner for layer in value.values() for inner, v in layer.items() if is_integer(v)}
            paths += [
                f"{PER_LAYER}.{inner}" for inner in sorted(own) if get_attribute(config, f"{PER_LAYER}.{inner}", None)
            ]
        elif (is_integer(value) or is_size_list(value)) and not NOT_A_SIZE.fullmatch(name):
            paths.append(reverse.get(name, name))
    return list(dict.fromkeys(paths))


def unset_sizes(config: PreTrainedConfig) -> list[str]:
    """Attributes that may hold a size and are left to the class."""
    return [
        n for n, v in config.to_dict().items() if v is None and re.fullmatch(r"n_inner|.*(_dim|intermediate_size)", n)
    ]


def worked_out_layers(config: PreTrainedConfig) -> list[str]:
    """The attribute that counts layers where no file holds it: classes work it out from a list with an entry for each."""
    name = "num_hidden_layers"
    held = config.attribute_map.get(name, name) in config.to_dict()
    return [name] if not held and is_integer(getattr(config, name, None)) else []


def layer_attributes(config: PreTrainedConfig) -> list[str]:
    """Paths of attributes that may count layers, the standard name first."""
    found = worked_out_layers(config)
    reverse = {own: standard for standard, own in config.attribute_map.items()}
    for name, value in config.to_dict().items():
        part = vars(config).get(name)
        if isinstance(part, PreTrainedConfig):
            found += [f"{name}.{path}" for path in layer_attributes(part)]
        elif (
            isinstance(value, int)
            and not isinstance(value, bool)
            and re.fullmatch(COUNTS_LAYERS, reverse.get(name, name))
        ):
            found.append(reverse.get(name, name))
    order = lambda p: (p.count("."), p != "num_hidden_layers", "text" not in p, "decoder" in p)  # noqa: E731
    return sorted(dict.fromkeys(found), key=order)


def _level(config: PreTrainedConfig, path: str) -> PreTrainedConfig:
    """The config, or the part of it, that holds an attribute."""
    parent = path.rpartition(".")[0]
    return get_attribute(config, parent) if parent else config


def layer_tag(config: PreTrainedConfig, attribute: str, layer: int) -> str:
    """The kind of one layer: what the attributes beside the one that counts the layers say of it."""
    level, layers = _level(config, attribute), get_attribute(config, attribute)
    data = level.to_dict()
    found = [marks(name, value, layers) for name, value in data.items() if not is_size_list(value)]
    return "/".join(_word(entries[layer]) for entries in found if entries)


def _word(entry: Any) -> str:
    """An entry without its sizes."""
    return "+".join(sorted(entry)) if isinstance(entry, dict) else str(entry)


def resize_config(
    config: PreTrainedConfig, sizes: Mapping[str, Any], layer_maps: Mapping[str, LayerMap] | None = None
) -> PreTrainedConfig:
    """A copy of a config with other sizes and layers, both by the path of an attribute; the input is untouched.

    Raises:
        SizeError: the config's own validators refuse the sizes; their words are kept.
    """
    data = copy.deepcopy(config.to_dict())
    for path, value in sizes.items():
        level, own = _own_level(config, data, path)
        for target in level if isinstance(level, list) else [level]:
            old = target.get(own)
            target[own] = [v * value // old[0] for v in old] if is_size_list(old) else value
    for path, layer_map in (layer_maps or {}).items():
        level, own = _own_level(config, data, path)
        layers = get_attribute(config, path)
        for name, value in list(level.items()):
            level[name] = carry(name, value, layers, layer_map.source)
        if own in level:  # else it follows from a list
            level[own] = layer_map.after
            level |= dict.fromkeys(_echoes(_level(config, path), own), layer_map.after)
    try:
        resized = type(config).from_dict(data)
    except (StrictDataclassError, AttributeError, ValueError) as error:
        words = " ".join(str(error).split())
        raise SizeError(f"{type(config).__name__} refuses the sizes {dict(sizes)}: {words}") from error
    _keep_implementations(config, resized)
    resized.dtype = config_dtype(config)
    return resized


def _echoes(level: PreTrainedConfig, own: str) -> list[str]:
    """Other attributes that count the same layers: left out, they become what this one is."""
    data = level.to_dict()
    layers = data[own]
    alike = [
        n for n, v in data.items() if n != own and is_integer(v) and v == layers and re.fullmatch(COUNTS_LAYERS, n)
    ]
    return [name for name in alike if all(_left_out(level, data, own, name, layers + k) for k in (1, 2))]


def _left_out(level: PreTrainedConfig, data: Mapping[str, Any], own: str, other: str, layers: int) -> bool:
    """Whether an attribute that is left out becomes the number of layers."""
    try:
        made = type(level).from_dict({**{n: v for n, v in data.items() if n != other}, own: layers})
    except (StrictDataclassError, AttributeError, ValueError):
        return False  # the kinds of layers are those of the old number
    return getattr(made, other, None) == layers


def _own_level(config: PreTrainedConfig, data: dict, path: str) -> tuple[Any, str]:
    """The part of a config's plain data that holds an attribute, and the class's own name for it."""
    part, level = config, data
    *parents, name = path.split(".")
    for parent in parents:
        if parent == PER_LAYER:
            return [own for own in level[PER_LAYER].values() if name in own], name
        part, level = vars(part)[parent], level[parent]
    return level, part.attribute_map.get(name, name)


def _keep_implementations(config: PreTrainedConfig, resized: PreTrainedConfig) -> None:
    """What a config says about how to run, in all its parts: not part of its files."""
    resized._attn_implementation_internal = config._attn_implementation_internal
    resized._experts_implementation_internal = getattr(config, "_experts_implementation_internal", None)
    for name in config.sub_configs:
        part, other = vars(config).get(name), vars(resized).get(name)
        if isinstance(part, PreTrainedConfig) and isinstance(other, PreTrainedConfig):
            _keep_implementations(part, other)
            other.dtype = config_dtype(part)


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config names under `architectures`, else the class for causal language modelling."""
    import transformers

    named = config.architectures or ()
    for name in named if isinstance(named, (list, tuple)) else ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    raise WarmstartError(
        f"{type(config).__name__} names no model class and has none for causal language modelling. Pass a model."
    )
