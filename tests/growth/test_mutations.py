"""The checker is checked: every fact of every layout is corrupted in turn, and the certificate must see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from hf_warmstart import GrowthConfig, WarmstartError
from hf_warmstart.growth.axes import Axis, Concat, Dual, Fixed, Gain, Postnorm, Prenorm, Product, Scaled, Space
from hf_warmstart.growth.certify import compare, twin_plan
from hf_warmstart.growth.configs import model_class_of
from hf_warmstart.growth.layout import Layout, TensorLayout
from hf_warmstart.growth.layouts import derive_layout
from hf_warmstart.growth.plan import GrowthPlan, make_plan
from hf_warmstart.growth.precision import true_float64

from ..models import FAMILIES, tiny_config

# Uneven shares and free new channels, by whole and broken factors: a wrong fact cannot hide behind equal copies.
GROWTHS = (
    GrowthConfig(width=1.5, width_operator="uneven_copy"),
    GrowthConfig(width=1.5, width_operator="reference_slice"),
    GrowthConfig(width=2, width_operator="uneven_copy"),
    GrowthConfig(depth=2),
)
RESIDUAL = Space("residual")


def _wrong_axes(axis: Axis) -> Iterator[tuple[str, Axis]]:
    """Corruptions of one axis that keep its length."""
    if isinstance(axis, Product):
        if len(axis.axes) > 2:
            yield "head order", Product(axis.axes[1], axis.axes[0], *axis.axes[2:])
        yield "head_dim outermost", Product(axis.axes[-1], *axis.axes[:-1])
        if isinstance(axis.axes[-1], Concat):
            yield "fused blocks, not heads", Concat(*(Product(*axis.axes[:-1], part) for part in axis.axes[-1].axes))
    if isinstance(axis, Concat):
        if axis.axes[0] != axis.axes[-1]:
            yield "swapped segment", Concat(*reversed(axis.axes))
        if all(part == axis.axes[0] for part in axis.axes):
            yield "interleaved segments", Product(axis.axes[0], Fixed(len(axis.axes)))
            yield "segments outermost per unit", Product(Fixed(len(axis.axes)), axis.axes[0])
        if isinstance(axis.axes[0], Product) and len(axis.axes) == 3:
            yield "fused heads, not blocks", Product("kv_heads", Concat("head_dim", "head_dim", "head_dim"), "group")
    if isinstance(axis, Gain):
        yield "missed norm", axis.axes[1]
        yield "missed norm (reads)", axis.axes[0]
        if isinstance(axis.axes[1], Dual):
            yield "untied norm", Gain(axis.axes[0], Postnorm(RESIDUAL))
        else:
            yield "norm of a tied head", Gain(axis.axes[0], Dual(axis.axes[0]))
    if isinstance(axis, (Prenorm, Scaled, Postnorm)):
        yield f"no {type(axis).__name__}", axis.axis
    if isinstance(axis, Dual):
        yield "no Dual", axis.axis
    if axis == RESIDUAL:
        yield "after the norm", Postnorm(RESIDUAL)
        yield "dual", Dual(RESIDUAL)


def _wrong_tensors(tensor: TensorLayout) -> Iterator[tuple[str, TensorLayout]]:
    """Corruptions of one tensor's layout."""
    for k, axis in enumerate(tensor.axes):
        roles = list(tensor.roles)
        roles[k] = "read" if roles[k] == "write" else "write"
        yield f"axis {k} has the wrong role", dataclasses.replace(tensor, roles=tuple(roles))
        for what, wrong in _wrong_axes(axis):
            axes = (*tensor.axes[:k], wrong, *tensor.axes[k + 1 :])
            yield f"axis {k}: {what}", dataclasses.replace(tensor, axes=axes)
    if isinstance(tensor.axes[0], Gain):  # only norms have an offset; elsewhere a LayerNorm or softmax may absorb one
        yield "wrong offset", dataclasses.replace(tensor, offset=1.0 - tensor.offset)


def _wrong_layouts(layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Corruptions of a whole layout, one fact each."""
    for name, tensor in layout.tensors.items():
        for what, wrong in _wrong_tensors(tensor):
            yield f"{name}: {what}", layout.with_tensor(name, wrong)
    for end in layout.branch_ends:
        others = tuple(other for other in layout.branch_ends if other != end)
        yield f"{end} does not end a branch", dataclasses.replace(layout, branch_ends=others)
    kind = layout.spaces["residual"].kind
    other = "rms_normed" if kind == "layer_normed" else "layer_normed"
    if other == "rms_normed":
        # A map that keeps the mean as well suits RMSNorm too, so only the other direction is an error.
        info = dataclasses.replace(layout.spaces["residual"], kind="rms_normed")
        yield "the norm's kind", dataclasses.replace(layout, spaces=layout.spaces | {"residual": info})


def _same_effect(right: GrowthPlan, wrong: GrowthPlan) -> bool:
    """Whether two plans grow every tensor, and pull every gradient back, to the same numbers (to rounding)."""
    generator = torch.Generator().manual_seed(1)
    for name in right.names:
        a, b = right.tensor(name), wrong.tensor(name)
        before = torch.randn([m.n for m in a.maps], generator=generator, dtype=torch.float64)
        after = torch.randn(a.shape, generator=generator, dtype=torch.float64)
        if a.gate != b.gate or not torch.allclose(a.weight(before), b.weight(before), rtol=0, atol=1e-12):
            return False
        if not torch.allclose(a.pull_gradient(after), b.pull_gradient(after), rtol=0, atol=1e-12):
            return False
    return True


def _invisible(family: str, what: str) -> bool:
    """Corruptions that no input can show: a softmax ignores the bias of keys that are not rotated."""
    return family == "opt" and what.startswith("model.decoder.layers.{i}.self_attn.k_proj.bias")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_corrupted_fact_is_caught(family):
    config = tiny_config(family)
    model_class = model_class_of(config)
    right_layout = derive_layout(model_class, config)
    right = [twin_plan(make_plan(model_class, config, growth)) for growth in GROWTHS]
    with true_float64():
        assert all(compare(plan).same for plan in right)
    missed, caught = [], 0
    for what, layout in _wrong_layouts(right_layout):
        effects = seen = False
        for plan in right:
            try:
                wrong = make_plan(model_class, plan.source_config, plan.growth_config, layout)
                if _same_effect(plan, wrong):
                    continue
                effects = True
                with true_float64():
                    seen = not compare(wrong).same
            except (WarmstartError, RuntimeError):
                seen = effects = True  # refused before or while growing: caught as well
            if seen:
                break
        if effects and not seen and not _invisible(family, what):
            missed.append(what)
        caught += seen
    assert not missed
    assert caught >= 25, "too few corruptions to say anything"
