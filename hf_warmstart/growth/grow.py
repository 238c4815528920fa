"""`grow` and `plan_growth`: a model in, a larger model out."""

from __future__ import annotations

import copy
import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ExactnessError
from .adapters import adapted_child, bare_base, merged
from .config import GrowthConfig
from .layouts.moves import REFUSALS
from .layouts.probe import output_of, probe_inputs
from .plan import RECORD_KEY, GrowthPlan, make_plan
from .source import (
    UNQUANTISED,
    check_model,
    class_and_config,
    digest,
    parent_name,
    parent_revision,
    quantisation,
)
from .twin import default_dtype
from .wrapped import base_of, is_wrapped

if TYPE_CHECKING:
    from peft import PeftModel

TAG = "hf_warmstart"
logger = logging.getLogger(__name__)
# Largest |difference| over largest |logit| that rounding explains, by the model's dtype. In float64 it is float32's,
# since transformers computes norms and softmax in float32 whatever the dtype; `certify` sees past that.
SPOT_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}


def plan_growth(
    source: PreTrainedModel | PreTrainedConfig | str | os.PathLike,
    growth_config: GrowthConfig | PreTrainedConfig | None = None,
    **options: Any,
) -> GrowthPlan:
    """Plan a growth without touching a weight.

    Args:
        source: a model, a config, a folder or a Hub id. Of a quantised one the plan is for the model without that, with
            a warning: quantised weights are not grown.
        growth_config: what to grow; or its fields as keywords; or the target's config.
        **options: fields of `GrowthConfig`, or sizes by their transformers names (`hidden_size=768`).

    Returns:
        The `GrowthPlan`; `print` shows it as a table.

    Raises:
        WarmstartError: what was asked cannot be done; the message says what can.

    Example:

        >>> from transformers import LlamaConfig
        >>> plan = plan_growth(LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, vocab_size=99,
        ...                                num_hidden_layers=2), width=1.5)
        >>> plan.target_config.hidden_size, plan.target_config.num_attention_heads
        (96, 6)
    """
    asked = GrowthConfig.of(growth_config, options)
    model_class, config = class_and_config(source)
    if (method := quantisation(config)) is not None:
        logger.warning(
            "The weights are quantised (%s); this is the plan for the model without that. %s", method, UNQUANTISED
        )
        config = copy.deepcopy(config)
        del config.quantization_config
    return make_plan(model_class, config, asked)


@torch.no_grad()
def grow(
    model: PreTrainedModel,
    growth_config: GrowthConfig | PreTrainedConfig | None = None,
    *,
    merge_adapter: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Grow a model.

    Every tensor goes through the maps of its axes, `w' = W_out w R_in^T + Z (I - W_in R_in^T)`, with `R^T W = I` for
    each space, so that exact operators keep the function.

    Args:
        model: a `PreTrainedModel`, or a `PeftModel` whose LoRA adapters grow with their base; it is not changed.
        growth_config: what to grow; or its fields as keywords; or the target's config.
        merge_adapter (`bool`, defaults to `False`): grow a `PeftModel` with its active adapters merged into the weights. It
            costs a second copy of the parent for the while.
        **options: fields of `GrowthConfig`, or sizes by their transformers names (`hidden_size=768`).

    Returns:
        A new model of the same class, dtype, device and mode, ready for `save_pretrained` and `push_to_hub`. Its config
        carries the record of the growth under `warmstart`. Of a `PeftModel`: a `PeftModel` with the same adapters, their
        rank, scaling and training unchanged; its base has the very weights that the base alone would have grown to. With
        `merge_adapter` the class that was wrapped.

    Raises:
        WarmstartError: what was asked cannot be done; nothing was made.
        ExactnessError: an exact operator changed the logits of this model by more than its dtype's rounding.

    Example:

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> parent = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4,
        ...                                       vocab_size=99, num_hidden_layers=2))
        >>> grow(parent, width=2, depth=2).config.num_hidden_layers
        4

    Source: the general form follows arXiv 2310.07999 and 2409.12903; each operator's file names its own.
    """
    if is_wrapped(model) and not merge_adapter:
        return _grow_with_adapters(model, growth_config, options)
    if is_wrapped(model):
        model = merged(model)
    check_model(model)
    plan = plan_growth(model, growth_config, **options)
    child = apply_plan(model, plan)
    if plan.exact:
        spot_check(model, child)
    return child


def _grow_with_adapters(model: PeftModel, growth_config: Any, options: dict[str, Any]) -> PeftModel:
    """A model with adapters: the base as if it had none, then they."""
    bare = bare_base(model)
    plan = plan_growth(bare, growth_config, **options)
    child = apply_plan(bare, plan)
    if plan.exact:
        spot_check(bare, child)
    grown = adapted_child(model, child, plan)
    if plan.exact:
        spot_check(base_of(model), base_of(grown))
    return grown


@torch.no_grad()
def apply_plan(model: PreTrainedModel, plan: GrowthPlan) -> PreTrainedModel:
    """The child of a model under a plan; no check of the result."""
    source = model.state_dict()
    config = copy.deepcopy(plan.target_config)
    record = plan.record(parent_name(model.config), parent_revision(model.config), digest(model))
    setattr(config, RECORD_KEY, [*(getattr(model.config, RECORD_KEY, None) or []), record.to_dict()])
    config._name_or_path = ""  # the child is not what its parent's name names
    config.architectures = [type(model).__name__]
    child = empty_model(type(model), config, model.dtype)
    targets = child.state_dict(keep_vars=True)
    for name in plan.names:
        # What is filled below need not travel to a GPU, nor wait there beside what fills it.
        targets[name].data = targets[name].new_empty(0)
    child = child.to(model.device)
    trainable = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    for name in plan.names:
        source_name = plan.source_name(name)
        grown = plan.tensor(name).grow(source[source_name], "weight")
        target = targets[name]
        target.data = grown.to(model.device)
        target.requires_grad_(trainable.get(source_name, False))
    child.tie_weights()
    child.train(model.training)
    child.add_model_tags([TAG, *plan.operators])
    if model.can_generate():
        child.generation_config = copy.deepcopy(model.generation_config)
    return child


def empty_model(model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a class and config, its weights yet to be filled.

    It is built for real, on the CPU, because buffers that are not saved (rotary frequencies) are made on the way.
    """
    from transformers.initialization import no_init_weights

    with torch.random.fork_rng(devices=[]), default_dtype(dtype), no_init_weights():
        return model_class(config)


def spot_check(model: PreTrainedModel, child: PreTrainedModel) -> None:
    """Compare outputs of parent and child on a few inputs, in the model's own dtype."""
    training = model.training
    try:
        inputs = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in probe_inputs(model).items()
        }
        before = output_of(model.eval()(**inputs)).double()
    except REFUSALS as fault:
        # Nothing can be compared on inputs that the parent itself does not take; `certify` runs a twin all the same.
        logger.warning("%s was not run after growing: %s", type(model).__name__, fault)
        return
    finally:
        model.train(training)
    try:
        after = output_of(child.eval()(**inputs)).double()
    finally:
        child.train(training)
    if after.shape[-1] > before.shape[-1]:  # old tokens, where the vocabulary grew
        shift = float((after.logsumexp(-1) - before.logsumexp(-1)).mean())
        logger.warning("The new tokens' logits raise the loss of old tokens by %.3f nats, on random tokens.", shift)
        after = after[..., : before.shape[-1]]
    error = float((after - before).abs().max() / before.abs().max().clamp(min=1e-30))
    tolerance = SPOT_TOLERANCE.get(model.dtype, 1e-1)
    if not error <= tolerance:
        raise ExactnessError(
            f"The grown {type(model).__name__} differs from its parent by {error:.1e} of the largest logit, more than "
            f"{model.dtype} rounding explains ({tolerance:.0e}). Run certify(model, ...) and report its reason."
        )
