"""The layout of a class under a config: from a file, or derived once, its depth tried out, and remembered."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import LayoutError, WarmstartError
from ..layout import Layout, Stack, layer_signatures
from ..twin import meta_shapes
from . import cache
from .derive import derive_layout
from .moves import REFUSALS
from .probe import probe_config, set_dtype
from .stacks import NORM_TOLERANCE

SCALED_TOLERANCE = 1e-3  # what a norm's eps may change where new layers scale the stream

_known: dict[tuple[type, str], Layout] = {}


def layout_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Layout:
    """The layout of a class under the switches of a config: from the package's files, else derived (seconds) and kept.

    Raises:
        LayoutError: the class cannot be derived; the message says why.
    """
    try:
        key = model_class, cache.switches(config)
    except REFUSALS as error:
        raise LayoutError(f"{model_class.__name__}: no small model can be made of its config: {error}") from error
    if key not in _known:
        _known[key] = cache.read(model_class, config) or derived(model_class, config)
    return _known[key]


def derived(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Layout:
    """The layout of a class from nothing but the class, with its claims on depth tried out."""
    return settled(model_class, config, derive_layout(model_class, config))


def settled(model_class: type[PreTrainedModel], config: PreTrainedConfig, layout: Layout) -> Layout:
    """A layout whose claims on depth were tried on a twin: what a class computes from a layer's number shows only then.

    Where new layers between old ones change the output but new layers at the end do not, the stack says so; so it does
    where only copies of layers like the first can be built (others share tensors that are numbered by use). Where
    nothing helps, it says that no new layer is an identity. A layer that norms the stream once more may change the output
    by what that does.
    """
    for number, stack in enumerate(layout.stacks):
        if stack.reason:
            continue
        problems: list[str] = []
        for tried in _candidates(model_class, config, stack):
            stacks = (*layout.stacks[:number], tried, *layout.stacks[number + 1 :])
            candidate = dataclasses.replace(layout, stacks=stacks)
            problems.append(_depth_changes(model_class, config, candidate, tried))
            if not problems[-1]:
                layout = candidate
                break
        else:
            refused = Stack(stack.prefix, stack.attribute, reason=problems[0])
            layout = dataclasses.replace(
                layout, stacks=(*layout.stacks[:number], refused, *layout.stacks[number + 1 :])
            )
    return layout


def _candidates(model_class, config: PreTrainedConfig, stack: Stack) -> Iterator[Stack]:
    """A stack as it is, with new layers at the end, and with copies of layers like the first alone.

    Like the first, so that all other layers move, and what is computed from their numbers shows.
    """
    if not stack.scaled:  # between old layers, what these read would have another scale
        yield stack
    yield dataclasses.replace(stack, append=True)
    if stack.scaled:
        return
    kinds = layer_signatures(meta_shapes(model_class, probe_config(config)), [stack])
    first = kinds.get(stack.prefix.replace("{i}", "0"))
    if first and set(kinds.values()) != {first} and not stack.copied:
        yield dataclasses.replace(stack, copied=(first,))


def _depth_changes(model_class, config: PreTrainedConfig, layout: Layout, stack: Stack) -> str:
    """In words, how new layers change the output of a twin; empty where they do not."""
    # The proof knows plans, and plans know layouts: it is asked for here, when a layout is made.
    from ..certify import LOGITS_TOLERANCE, compare
    from ..config import GrowthConfig
    from ..configs import get_attribute
    from ..plan import make_plan
    from ..precision import true_float64

    twin = probe_config(config)
    set_dtype(twin, torch.float64)
    layers = get_attribute(twin, stack.attribute)
    try:
        with true_float64():
            plan = make_plan(model_class, twin, GrowthConfig(sizes={stack.attribute: 2 * layers}), layout)
            change = compare(plan).max_relative_error
    except WarmstartError as error:
        return str(error).splitlines()[0]
    except REFUSALS as error:
        return f"the deeper twin does not run ({type(error).__name__}: {error})"
    # What eps may change: of norms that are applied once more, of a scaled stream.
    allowed = NORM_TOLERANCE if stack.normed else SCALED_TOLERANCE if stack.scaled else LOGITS_TOLERANCE
    return "" if change < allowed else f"new layers change the output by {change:.0e}"
