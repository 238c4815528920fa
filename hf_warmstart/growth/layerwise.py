"""What a config says of each layer, and how that follows a choice of layers.

A config speaks of single layers in lists with one entry for each, in numbers of layers counted from the bottom or from
the top, in lists of layers' numbers, and in `per_layer_config`. They are recognised by their names and lengths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

BELOW = r"first_k_dense_replace|num_dense_layers|max_window_layers|moe_layer_start_index"  # from the bottom
UPTO = r"moe_layer_end_index"  # from the bottom, the last included
ABOVE = r"num_kv_shared_layers"  # layers counted from the top
LISTED = r".*(layer_ids|layers|idxs|indices|indexes)"  # numbers of layers
# Lists that say nothing of layers, though there may be as many entries as layers.
NOT_PER_LAYER = (
    r"architectures|warmstart|.*(limit|section|factor|range|mean|std|shape|token_id|_dims|multipliers|_weights)"
)
PER_LAYER = "per_layer_config"


def is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def lists_layers(name: str, value: Any) -> bool:
    """Whether an attribute lists layers by number: rising numbers, where marks of layers repeat."""
    is_list = isinstance(value, (list, tuple)) and bool(value) and all(map(is_integer, value))
    return is_list and re.fullmatch(LISTED, name) is not None and list(value) == sorted(set(value))


def own_of(per_layer: Mapping[Any, Mapping[str, Any]], layer: int) -> Mapping[str, Any] | None:
    """A layer's own attributes in a `per_layer_config`, whose keys are padded with zeros."""
    return next((own for key, own in per_layer.items() if int(key) == layer), None)


def marks(name: str, value: Any, layers: int) -> list[Any] | None:
    """What an attribute says of each layer; None where it does not speak of layers."""
    if lists_layers(name, value):
        return [k in value for k in range(layers)]
    is_list = isinstance(value, (list, tuple)) and len(value) == layers and not re.fullmatch(NOT_PER_LAYER, name)
    if is_list and (layers > 1 or name.endswith("types")):
        return list(value)
    if name == PER_LAYER and value:
        return [own_of(value, k) for k in range(layers)]
    if is_integer(value) and re.fullmatch(f"{BELOW}|{UPTO}|{ABOVE}", name):
        first = layers - value if re.fullmatch(ABOVE, name) else value + bool(re.fullmatch(UPTO, name))
        return [k < first for k in range(layers)]
    return None


def carry(name: str, value: Any, layers: int, sources: Sequence[int]) -> Any:
    """An attribute after a choice of layers; as it is where it does not speak of layers."""
    found = marks(name, value, layers) if sources else None
    if found is None:
        return value
    chosen = [found[source] for source in sources]
    if name == PER_LAYER:
        return {str(k): dict(own) for k, own in enumerate(chosen) if own}
    if lists_layers(name, value):
        return [k for k, mark in enumerate(chosen) if mark]
    if isinstance(value, (list, tuple)):
        return chosen
    if re.fullmatch(ABOVE, name):
        return chosen.count(False)
    last = bool(re.fullmatch(UPTO, name))
    return chosen.count(True) - last + max(0, value + last - layers)
