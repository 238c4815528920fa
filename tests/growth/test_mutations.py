"""The checker is checked: every fact of every layout is corrupted in turn, and the certificate must see it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from hf_warmstart import GrowthConfig, WarmstartError
from hf_warmstart.growth.axes import Axis, Concat, Dual, Fixed, Gain, Gate, Postnorm, Prenorm, Product, Scaled, Space
from hf_warmstart.growth.certify import compare, twin_plan
from hf_warmstart.growth.configs import model_class_of
from hf_warmstart.growth.layout import Kind, Layout, Stack, TensorLayout
from hf_warmstart.growth.layouts import layout_of
from hf_warmstart.growth.layouts.probe import probe_config
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
# Post-norm layers, low ranks and experts, shared heads, states, an encoder and a decoder.
MORE: dict[str, dict] = {
    "bert": {"architectures": ["BertForMaskedLM"]},
    "deepseek_v3": {},
    "falcon": {},
    "mamba2": {},
    "t5": {"architectures": ["T5ForConditionalGeneration"]},
}
# Facts that few families have, and the corruptions that concern them.
RARE: dict[str, str] = {
    "axk2": r".*(no Gate|: a gate)",
    "beam": r".*does not end a branch|the stream is not scaled",
    "bitnet": r".*(no Gate|: a gate)|kv_heads is free to have fresh units",
    "minimax": r".*is no norm of the stream|its norms end layers",
}
WHOLE = ("bert", "mamba2")  # their streams grow by whole factors only
# Growths that reach what `width` leaves alone: the insides of heads, low ranks.
INSIDE: dict[str, dict[str, int]] = {
    "bert": {"hidden_size": 128},
    "deepseek_v3": {"kv_lora_rank": 12, "q_lora_rank": 16, "v_head_dim": 24},
    "gpt2": {"n_embd": 128},
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128},
    "t5": {"d_kv": 24},
}
QUICK = ("gemma2",)
# What a space may be mistaken for: kinds whose maps keep less.
LOOSER: dict[Kind, tuple[Kind, ...]] = {
    "layer_normed": ("rms_normed", "linear"),
    "rms_normed": ("linear",),
    "whole": ("linear", "rms_normed"),
    "elementwise": ("rms_normed",),
    "heads": ("rms_normed",),
    "contracted": ("linear", "rms_normed"),
}
RESIDUAL = Space("residual")
TOLERANCE = 1e-10
APPROXIMATE = (
    1e-3  # of growths planned so: the eps of norms that new layers apply once more, or that take a scale back
)


def _wrong_axes(axis: Axis, layout: Layout) -> Iterator[tuple[str, Axis]]:
    """Corruptions of one axis, most of which keep its length."""
    if isinstance(axis, Product):
        yield "first two swapped", Product(axis.axes[1], axis.axes[0], *axis.axes[2:])
        yield "last outermost", Product(axis.axes[-1], *axis.axes[:-1])
        if isinstance(axis.axes[-1], Concat):
            yield "fused blocks, not heads", Concat(*(Product(*axis.axes[:-1], part) for part in axis.axes[-1].axes))
        yield "a stream, not heads", RESIDUAL
    if isinstance(axis, Concat):
        if axis.axes[0] != axis.axes[-1]:
            yield "swapped segments", Concat(*reversed(axis.axes))
        if all(part == axis.axes[0] for part in axis.axes):
            yield "interleaved segments", Product(axis.axes[0], Fixed(len(axis.axes)))
        if all(isinstance(part, Product) and part.parts()[0] == axis.axes[0].parts()[0] for part in axis.axes):
            rests = [part.parts()[1:] for part in axis.axes]
            inner = [Product(*rest) if len(rest) > 1 else rest[0] for rest in rests]
            yield "fused heads, not blocks", Product(axis.axes[0].parts()[0], Concat(*inner))
    if isinstance(axis, (Concat, Product)):
        for k, part in enumerate(axis.axes):
            for what, wrong in _wrong_axes(part, layout):
                yield f"in part {k}, {what}", type(axis)(*axis.axes[:k], wrong, *axis.axes[k + 1 :])
    if isinstance(axis, Gain):
        yield "no gain (makes)", axis.axes[1]
        yield "no gain (reads)", axis.axes[0]
        for what, wrong in _wrong_axes(axis.axes[1], layout):
            if set(wrong.spaces()) == set(axis.axes[1].spaces()):
                yield f"makes {what}", Gain(axis.axes[0], wrong)
    if isinstance(axis, (Prenorm, Scaled, Postnorm, Dual, Gate)):
        yield f"no {type(axis).__name__}", axis.axis
    if isinstance(axis, Dual):
        yield "not tied", Postnorm(axis.axis)
    if isinstance(axis, Postnorm):
        yield "tied", Dual(axis.axis)
    if isinstance(axis, (Space, Product)):
        yield "dual", Dual(axis)
        yield "before a wide norm", Prenorm(axis)
    if isinstance(axis, Space) and layout.spaces[axis.name].kind in ("layer_normed", "rms_normed"):
        yield "after the norm", Postnorm(axis)
        yield "a gate", Gate(axis)


def _wrong_tensors(tensor: TensorLayout, layout: Layout) -> Iterator[tuple[str, TensorLayout]]:
    """Corruptions of one tensor's layout."""
    for k, axis in enumerate(tensor.axes):
        roles = list(tensor.roles)
        roles[k] = "read" if roles[k] == "write" else "write"
        yield f"axis {k} has the wrong role", dataclasses.replace(tensor, roles=tuple(roles))
        for what, wrong in _wrong_axes(axis, layout):
            axes = (*tensor.axes[:k], wrong, *tensor.axes[k + 1 :])
            yield f"axis {k}: {what}", dataclasses.replace(tensor, axes=axes)
    if isinstance(tensor.axes[0], Gain):  # only norms have an offset; elsewhere a LayerNorm or softmax may absorb one
        yield "wrong offset", dataclasses.replace(tensor, offset=1.0 - tensor.offset)
    if tensor.scale:
        yield "no scale", dataclasses.replace(tensor, scale=())
    elif any("residual" in move.spaces for move in layout.moves):
        move = next(k for k, move in enumerate(layout.moves) if "residual" in move.spaces)
        yield "a scale by the width", dataclasses.replace(tensor, scale=((move, 0.5),))


def _wrong_stacks(stack: Stack) -> Iterator[tuple[str, Stack]]:
    """Corruptions of what makes a new layer an identity."""
    for end in stack.branch_ends:
        ends = tuple(other for other in stack.branch_ends if other != end)
        yield f"{end} does not end a branch", dataclasses.replace(stack, branch_ends=ends)
    for gate in stack.gates:
        gates = tuple(other for other in stack.gates if other != gate)
        yield f"{gate} is no gate", dataclasses.replace(stack, gates=gates)
    for number, norm in enumerate(stack.post_norms):
        norms = (*stack.post_norms[:number], *stack.post_norms[number + 1 :])
        yield f"{norm[0]} is no norm of the stream", dataclasses.replace(stack, post_norms=norms)
    for number, norm in enumerate(stack.inner_norms):
        norms = (*stack.inner_norms[:number], *stack.inner_norms[number + 1 :])
        yield f"{norm[0]} is no norm of the stream", dataclasses.replace(stack, inner_norms=norms)
    if stack.inner_norms:
        yield "its norms end layers", dataclasses.replace(stack, post_norms=stack.inner_norms, inner_norms=())
    if stack.scaled:
        yield "the stream is not scaled", dataclasses.replace(stack, scaled=False)


def _wrong_layouts(layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Corruptions of a whole layout, one fact each."""
    for name, tensor in layout.tensors.items():
        for what, wrong in _wrong_tensors(tensor, layout):
            yield f"{name}: {what}", layout.with_tensor(name, wrong)
    for number, stack in enumerate(layout.stacks):
        for what, wrong_stack in _wrong_stacks(stack):
            stacks = (*layout.stacks[:number], wrong_stack, *layout.stacks[number + 1 :])
            yield what, dataclasses.replace(layout, stacks=stacks)
    for name, info in layout.spaces.items():
        wrong_infos = [(kind, dataclasses.replace(info, kind=kind)) for kind in LOOSER.get(info.kind, ())]
        if info.scale:
            wrong_infos.append(("without its scale", dataclasses.replace(info, scale=())))
        if info.copied:
            wrong_infos.append(("free to have fresh units", dataclasses.replace(info, copied=False)))
        for what, wrong_info in wrong_infos:
            yield f"{name} is {what}", dataclasses.replace(layout, spaces={**layout.spaces, name: wrong_info})


def _same_effect(right: GrowthPlan, wrong: GrowthPlan) -> bool:
    """Whether two plans say the same and grow every tensor, and pull every gradient back, to the same numbers."""
    if right.exact != wrong.exact:
        return False
    generator = torch.Generator().manual_seed(1)
    for name in right.names:
        a, b = right.tensor(name), wrong.tensor(name)
        if right.maps is wrong.maps and a.layout == b.layout and a.fill == b.fill:
            continue
        before = torch.randn([m.n for m in a.maps], generator=generator, dtype=torch.float64)
        after = torch.randn(a.shape, generator=generator, dtype=torch.float64)
        if a.fill != b.fill or not torch.allclose(a.weight(before), b.weight(before), rtol=0, atol=1e-12):
            return False
        if not torch.allclose(a.pull_gradient(after), b.pull_gradient(after), rtol=0, atol=1e-12):
            return False
    return True


def _wrong_plan(plan: GrowthPlan, layout: Layout) -> GrowthPlan | None:
    """The same growth by another layout; None where it is refused, or where nothing would differ."""
    try:
        if layout.spaces != plan.layout.spaces:
            wrong = make_plan(plan.model_class, plan.source_config, plan.growth_config, layout)
        else:
            wrong = dataclasses.replace(plan, layout=layout)
            if layout.wrong_shapes(plan.source_config, plan.shapes, plan.sizes[0]):
                return None
            if layout.wrong_shapes(plan.target_config, plan.target_shapes, plan.sizes[1]):
                return None
        return None if _same_effect(plan, wrong) else wrong
    except WarmstartError:
        return None


# Corruptions that no input can show: a softmax ignores the biases of keys that are not rotated; a relu passes factors
# on; and the number that Gemma multiplies embeddings by makes the map of its table, `t sqrt(n / m)`, a dual of itself.
INVISIBLE = {
    "bert": r"bert\.encoder\.layer\.\{i\}\.attention\.self\.key\.bias.*",
    "gemma2": r"model\.norm\.weight: axis 0: makes (no Dual|not tied)",
    "opt": r"model\.decoder\.layers\.\{i\}\.self_attn\.k_proj\.bias.*|ffn_dim is rms_normed",
    "gpt2": r"transformer\.h\.\{i\}\.attn\.c_attn\.bias: axis 0: in part 1.*",
    "t5": r"d_ff is rms_normed",
}


def _error(plan: GrowthPlan) -> float:
    found = compare(plan)
    return found.max_relative_error + found.max_pullback_error  # a sum, since a maximum may lose what is no number


def _seen(wrong: GrowthPlan, allowed: float) -> bool:
    """Whether the certificate sees a corruption: what is planned as exact is not, or changes more than an eps does."""
    return not _error(wrong) < (TOLERANCE if wrong.exact else allowed)


def _right_plans(family: str, config: PreTrainedConfig, layout: Layout) -> list[GrowthPlan]:
    growths = [growth for growth in GROWTHS if family not in WHOLE or growth.width != 1.5]
    if family in INSIDE:
        growths.append(GrowthConfig(sizes=INSIDE[family], width_operator="uneven_copy"))
    return [twin_plan(make_plan(model_class_of(config), config, growth, layout)) for growth in growths]


def _config(family: str) -> PreTrainedConfig:
    return (
        tiny_config(family)
        if family in FAMILIES
        else probe_config(AutoConfig.for_model(family, **MORE.get(family, {})))
    )


def _missed(family: str, concerned: str = ".*") -> tuple[list[str], int]:
    """The corruptions of a family's facts that differ but do not show; and how many the certificate caught."""
    config = _config(family)
    layout = layout_of(model_class_of(config), config)
    right = _right_plans(family, config, layout)
    missed, caught = [], 0
    with true_float64():
        errors = [_error(plan) for plan in right]
        for plan, error in zip(right, errors, strict=True):
            assert error < (TOLERANCE if plan.exact else APPROXIMATE)
        for what, corrupted in _wrong_layouts(layout):
            if not re.fullmatch(concerned, what):
                continue
            differs = seen = False
            for plan, error in zip(right, errors, strict=True):
                wrong = _wrong_plan(plan, corrupted)
                if wrong is not None:
                    differs, seen = True, _seen(wrong, max(10 * error, TOLERANCE))
                if seen:
                    break
            caught += seen
            if differs and not seen and not re.fullmatch(INVISIBLE.get(family, ""), what):
                missed.append(what)
    return missed, caught


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in (*FAMILIES, *MORE)]
)
def test_every_corrupted_fact_is_caught(family):
    missed, caught = _missed(family)
    assert not missed
    assert caught >= 25, "too few corruptions to say anything"


@pytest.mark.slow
@pytest.mark.parametrize("family", RARE)
def test_corrupted_facts_that_few_families_have_are_caught(family):
    missed, caught = _missed(family, RARE[family])
    assert not missed
    assert caught, "no corruption was planned"


def test_a_copy_of_a_layer_that_keeps_its_place_is_refused():
    """The last layer alone has some tensor, so that no class builds a second one: the planner sees this corruption."""
    config = _config("gpt_neox_japanese")
    layout = layout_of(model_class_of(config), config)
    (stack,) = layout.stacks
    assert stack.copied
    assert make_plan(model_class_of(config), config, GrowthConfig(depth=2), layout).exact
    wrong = dataclasses.replace(layout, stacks=(dataclasses.replace(stack, copied=()),))
    with pytest.raises(WarmstartError, match="builds other tensors than planned"):
        make_plan(model_class_of(config), config, GrowthConfig(depth=2), wrong)
