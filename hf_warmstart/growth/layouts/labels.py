"""Which config attribute moves which axis: one attribute at a time, on the meta device.

`Labels` maps (tensor, axis) to the attributes that move it, each with its slope: how much longer the axis gets when
the attribute grows by one. Slopes tell `[gate; up]` (2) from `up` (1), but never the order inside a fused axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import LayoutError, SizeError
from ..configs import resize_config
from ..twin import meta_shapes

Slopes = Mapping[str, Fraction]


@dataclass(frozen=True)
class Labels:
    """Slopes by (tensor, axis), and which attributes move together as one."""

    shapes: Mapping[str, tuple[int, ...]]
    slopes: Mapping[tuple[str, int], Slopes]
    groups: Mapping[str, tuple[str, ...]]

    def of(self, name: str, axis: int) -> Slopes:
        return self.slopes.get((name, axis), {})

    def moved_by(self, attribute: str) -> set[tuple[str, int]]:
        return {place for place, slopes in self.slopes.items() if attribute in slopes}


def _integers(config: PreTrainedConfig) -> list[str]:
    reverse = {own: standard for standard, own in config.attribute_map.items()}
    names = [
        reverse.get(name, name)
        for name, value in config.to_dict().items()
        if isinstance(value, int) and not isinstance(value, bool) and not name.endswith(("token_id", "_layers"))
    ]
    return [name for name in names if name not in ("num_hidden_layers",)]


def _step(config: PreTrainedConfig, attribute: str) -> int:
    """A step that keeps divisibility: whole groups of heads, whole heads of the width."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if attribute == "hidden_size":
        return 2 * heads
    if attribute == "num_attention_heads":
        return kv_heads if kv_heads < heads else heads
    if attribute == "num_key_value_heads":
        return heads - kv_heads
    return 2


def _shapes_with(model_class, config, changes: dict[str, int]) -> dict[str, tuple[int, ...]] | None:
    """Shapes under changed attributes, or None where the class refuses them or builds other tensors."""
    try:
        return meta_shapes(model_class, resize_config(config, changes))
    except (SizeError, StrictDataclassError, ValueError, RuntimeError, AssertionError):
        # A combination that the class cannot build explains no axis; the attribute may still move in company.
        return None


def measure_labels(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Labels:
    """Change one integer attribute of a small config at a time and see which axes move.

    Where an attribute alone would build other tensors (OPT's width without `word_embed_proj_dim`), those that equal it
    move along and form a group.
    """
    base = meta_shapes(model_class, config)
    slopes: dict[tuple[str, int], dict[str, Fraction]] = {}
    groups: dict[str, tuple[str, ...]] = {}
    attributes = _integers(config)
    for attribute in attributes:
        step = _step(config, attribute)
        value = getattr(config, attribute)
        if step <= 0:
            continue
        company = [
            a for a in attributes if a != attribute and getattr(config, a) == value and a.endswith(("_dim", "_size"))
        ]
        for group in ([attribute], [attribute, *company]):
            moved = _shapes_with(model_class, config, dict.fromkeys(group, value + step))
            if moved is not None and moved.keys() == base.keys():
                break
        else:
            continue
        if attribute != "hidden_size" and len(group) > 1:
            continue
        groups[attribute] = tuple(group)
        for name, shape in base.items():
            for axis, (before, after) in enumerate(zip(shape, moved[name], strict=True)):
                if before != after:
                    slopes.setdefault((name, axis), {})[attribute] = Fraction(after - before, step)
    if "hidden_size" not in groups:
        raise LayoutError(f"{model_class.__name__}: the hidden size cannot be changed, so nothing can be derived.")
    return Labels(base, slopes, groups)
