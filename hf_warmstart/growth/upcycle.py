"""`upcycle`: a dense model into a mixture of experts that computes the same function.

Every MLP becomes E equal experts behind a fresh router. Whatever the router picks, each token meets the same MLP k times,
weighted by gates; where the class renormalises the gates of the chosen experts they sum to one, and the output is the
dense model's. (Where it does not, the output would shrink by what the gates leave out: refused.) Equal experts part as
soon as they are trained, since the router sends them different tokens. A class with a shared expert beside the routed
ones gets a fresh one whose last projection is zero.

The child is of another class than its parent, so there is no growth record and no optimizer state to carry: training
starts with a fresh optimizer.

Source: arXiv 2212.05055.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import ExactnessError, WarmstartError
from .configs import model_class_of
from .fresh import recipes
from .grow import TAG, empty_model, spot_check
from .layout import collect
from .source import check_model
from .twin import meta_shapes

NUMBER_OF_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERT = re.compile(r"(?P<mlp>.+)\.experts\.(?P<leaf>gate_up_proj|down_proj)")
_NOT_SIZES = {"architectures", "model_type", "transformers_version", "dtype", "_name_or_path"}


@torch.no_grad()
def upcycle(
    model: PreTrainedModel,
    target: str | PreTrainedConfig,
    *,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    seed: int = 0,
    **changes: Any,
) -> PreTrainedModel:
    """Turn a dense model into a mixture of experts of the same family.

    Args:
        model: a dense `PreTrainedModel` whose MLPs are `gate_proj`, `up_proj`, `down_proj`; it is not changed.
        target (`str` or `PreTrainedConfig`): the type of the mixture, such as `"mixtral"` for a Llama or Mistral,
            `"qwen3_moe"` for a Qwen3; or its whole config.
        num_experts (`int`, defaults to 8): experts of each layer. num_experts_per_tok (`int`, defaults to 2): of them, how
            many a token is sent to.
        seed (`int`, defaults to 0): of the fresh router.
        **changes: other attributes of the target's config.

    Returns:
        A model of the target's class, in the dtype, device and mode of the parent.

    Raises:
        WarmstartError: the two classes do not go together; every tensor without a counterpart is named.
        ExactnessError: the mixture does not compute the dense model's function (gates that are not renormalised).

    Example:

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> dense = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4,
        ...                                      num_key_value_heads=2, vocab_size=99, num_hidden_layers=2))
        >>> upcycle(dense, "mixtral", num_experts=4).config.num_local_experts
        4

    Source: arXiv 2212.05055.
    """
    check_model(model)
    if isinstance(target, str):
        config = _config_for(model.config, target, num_experts, num_experts_per_tok, changes)
    elif changes:
        raise WarmstartError(f"A whole config was given; set {sorted(changes)} in it.")
    else:
        config = target
    config.dtype = model.dtype
    model_class = model_class_of(config)
    parts = _parts(model, model_class, config, seed)
    for interleaved in (False, True):
        child = _filled(model, model_class, config, parts, interleaved)
        try:
            spot_check(model, child)
        except ExactnessError:
            continue
        child.add_model_tags([TAG, "upcycled"])
        return child
    raise ExactnessError(
        f"As {model_class.__name__} the experts do not add up to the dense MLP: its gates are not renormalised over the chosen "
        "experts. Pass norm_topk_prob=True where its config has it, or another class."
    )


def _config_for(
    dense: PreTrainedConfig, kind: str, experts: int, active: int, changes: Mapping[str, Any]
) -> PreTrainedConfig:
    """The mixture's config with every setting that the dense model's has too."""
    try:
        known = AutoConfig.for_model(kind).to_dict()
    except ValueError as fault:
        raise WarmstartError(f"target={kind!r} is no model type that transformers knows.") from fault
    counted = [name for name in NUMBER_OF_EXPERTS if name in known]
    if not counted or "num_experts_per_tok" not in known:
        raise WarmstartError(
            f"target={kind!r} has no number of experts. Pass the type of a mixture, such as 'mixtral'."
        )
    if not 1 <= active <= experts:
        raise WarmstartError(f"num_experts_per_tok={active} must lie between 1 and num_experts={experts}.")
    settings = {name: value for name, value in dense.to_dict().items() if name in known and name not in _NOT_SIZES}
    settings |= {counted[0]: experts, "num_experts_per_tok": active}
    if "moe_intermediate_size" in known:
        settings["moe_intermediate_size"] = settings["intermediate_size"]
    if "norm_topk_prob" in known:
        settings["norm_topk_prob"] = True
    return AutoConfig.for_model(kind, **(settings | dict(changes)))


def _parts(
    model: PreTrainedModel, model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int
) -> dict[str, Tensor | tuple[Tensor, ...]]:
    """For each of the child's tensors: itself, or the dense matrices that each of its experts is made of."""
    source = model.state_dict()
    fresh = recipes(model_class, config)
    made: dict[str, Tensor | tuple[Tensor, ...]] = {}
    used: set[str] = set()
    problems = []
    shapes = meta_shapes(model_class, config)
    mlps = {match["mlp"] for name in shapes if (match := _EXPERT.fullmatch(name))}
    for name, shape in shapes.items():
        match = _EXPERT.fullmatch(name)
        if match:
            leaves = ("gate_proj", "up_proj") if match["leaf"] == "gate_up_proj" else ("down_proj",)
            pieces = [f"{match['mlp']}.{leaf}.weight" for leaf in leaves]
            if missing := [piece for piece in pieces if piece not in source]:
                problems.append(f"{name} is made of {missing}, which {type(model).__name__} does not have")
                continue
            used.update(pieces)
            made[name] = tuple(source[piece] for piece in pieces)
        elif any(name.startswith(f"{mlp}.") for mlp in mlps) and name not in source:
            silent = "shared_expert" in name and name.endswith("down_proj.weight")
            made[name] = torch.zeros(shape) if silent else fresh[name].make(seed, name)
        elif name in source and tuple(source[name].shape) == shape:
            used.add(name)
            made[name] = source[name]
        else:
            problems.append(f"{name} {shape} has no counterpart of its shape in {type(model).__name__}")
    left = set(source) - used - set(model.all_tied_weights_keys)
    problems += [f"{name} of {type(model).__name__} has no place in {model_class.__name__}" for name in sorted(left)]
    if problems:
        raise WarmstartError(
            f"{type(model).__name__} does not become {model_class.__name__}:\n{collect(problems)}\n"
            "Pass the mixture of its own family."
        )
    return made


def _filled(
    model: PreTrainedModel,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    parts: Mapping[str, Tensor | tuple[Tensor, ...]],
    interleaved: bool,
) -> PreTrainedModel:
    """The child, with gate and up of each expert one after the other, or row by row."""
    child = empty_model(model_class, config, model.dtype)
    targets = child.state_dict(keep_vars=True)
    for name, part in parts.items():
        target = targets[name]
        if isinstance(part, Tensor):
            target.copy_(part)
            continue
        rows = torch.stack(part, dim=1).flatten(0, 1) if interleaved else torch.cat(part)
        if target.shape[1:] != rows.shape:
            rows = rows.T
        if target.shape[1:] != rows.shape:
            raise WarmstartError(
                f"{name}: an expert has shape {tuple(target.shape[1:])}, the dense MLP gives {tuple(rows.shape)}. Keep the "
                "experts as wide as the dense MLP."
            )
        target.copy_(rows.expand_as(target))
    child.tie_weights()
    return child.to(model.device).train(model.training)
