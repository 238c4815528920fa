"""LoRA adapters grow along with their base, through the same maps.

A LoRA layer adds `s B A` to a weight `w` (A of shape (r, in), B of shape (out, r)). The grown weight is
`W_out w R_in^T` and a part that no parent's activation reaches, so the grown adapter is

    B' = W_out B,   A' = A R_in^T,   s' = s:        s' B' A' = W_out (s B A) R_in^T

which is what the sum of weight and adapter would have grown to: parent and child compute one function, with the adapters
and without them. The rank's space does not grow. Where the operator adds noise that cancels, it is the base's alone: the
copies of a unit see different gradients through it, and the adapter's part with them. A new layer takes its source's
adapter; where its weight ends a branch, and so is zero, B is zero as well. Entries of A and B for new units are zero, and
learn as B does in a fresh adapter, since the other factor is not.

Only adapters that are a sum grow so: not DoRA, whose norm over a row of `w + s B A` is another one once the row is longer,
nor what peft knows besides LoRA. These can be merged first (`grow(..., merge_adapter=True)`).
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ExactnessError, StateError, WarmstartError
from .adapted_plan import adapter_growth, clean, is_adapters
from .plan import GrowthPlan
from .source import ADAPTER_CONFIG_NAME, check_model
from .wrapped import base_of

if TYPE_CHECKING:
    from peft import PeftModel

MERGE = "Pass merge_adapter=True to grow the model with its adapters merged in."


def merged(model: PeftModel) -> PreTrainedModel:
    """The model with its active adapters added to its weights; the input is untouched, so that memory holds it twice.

    Raises:
        WarmstartError: the kind of adapter cannot be merged.
    """
    base_of(model)
    unload = getattr(copy.deepcopy(model).base_model, "merge_and_unload", None)
    if unload is None:
        kinds = sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()})
        raise WarmstartError(
            f"Adapters of kind {kinds} change no weight, so they cannot be merged. Grow the base alone."
        )
    whole = unload()
    whole.config._name_or_path = ""  # the base that it was loaded as has other weights
    return whole


def bare_base(model: PeftModel) -> PreTrainedModel:
    """The base as it would be without adapters, on the same tensors; nothing of `model` is changed.

    Raises:
        WarmstartError: adapters that cannot grow, all of them named.
    """
    from .grow import empty_model

    base = base_of(model)
    check_model(base)
    check_adapters(model)
    bare = empty_model(type(base), copy.deepcopy(base.config), base.dtype)
    state = {clean(n): tensor for n, tensor in base.state_dict().items() if not is_adapters(n)}
    bare.load_state_dict(state, strict=True, assign=True)
    bare.tie_weights()
    bare.to(base.device).train(base.training)
    if base.can_generate():
        bare.generation_config = base.generation_config
    return bare


def check_adapters(model: PeftModel) -> None:
    """Raise unless all adapters of a model are plain LoRA on linear layers and embeddings, and none is merged in."""
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import Embedding, Linear
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    problems = []
    if not isinstance(model, PeftModel):
        problems.append(f"a {type(model).__name__} mixes kinds of adapters")
    for name, config in model.peft_config.items():
        if not isinstance(config, LoraConfig):
            problems.append(f"adapter {name!r} is of kind {getattr(config.peft_type, 'value', config.peft_type)}")
        elif getattr(config, "layer_replication", None):
            problems.append(f"adapter {name!r} repeats layers (layer_replication)")
    for name, module in base_of(model).named_modules():
        if isinstance(module, LoraLayer):
            if type(module) not in (Linear, Embedding):
                problems.append(f"{name} is adapted as a {type(module).__name__}")
            elif module.lora_variant or len(module.lora_magnitude_vector):
                variants = {type(v).__name__.removesuffix("Variant") for v in module.lora_variant.values()}
                problems.append(f"{name} is adapted by {' and '.join(sorted(variants)) or 'DoRA'}")
            elif module.merged:
                problems.append(f"{name} has its adapter merged in (call unmerge_adapter())")
        elif isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            problems.append(f"{name} is wrapped by {type(module).__name__}")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise WarmstartError(
            f"Only plain LoRA adapters of linear layers and embeddings grow: {'; '.join(sorted(problems)[:8])}{more}. {MERGE}"
        )


@torch.no_grad()
def adapted_child(model: PeftModel, child: PreTrainedModel, plan: GrowthPlan) -> PeftModel:
    """The child with the parent's adapters, grown.

    Args:
        model: the parent with its adapters; it is not changed. child: its base, grown under the plan; it is wrapped in place.

    Returns:
        A model of the parent's class. Names, ranks, scalings and active adapters are the parent's, and so is
        what is trained.

    Raises:
        WarmstartError: peft would adapt other modules of the child than those that grew from adapted ones.
    """
    names = list(model.peft_config)
    configs = {name: _config_for(model, name, child, plan) for name in names}
    grown = type(model)(child, configs[names[0]][0], adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        grown.add_adapter(name, configs[name][0], autocast_adapter_dtype=False)
    _check_same_modules(grown, {name: wanted for name, (_, wanted) in configs.items()})
    grown.base_model.set_adapter(list(model.active_adapters))
    grown.active_adapter = model.active_adapter

    base, grown_base = base_of(model), base_of(grown)
    parents = dict(base.state_dict(keep_vars=True).items())
    sources = {clean(name): tensor for name, tensor in parents.items()}
    for name, target in grown_base.state_dict(keep_vars=True).items():
        bare = clean(name)
        source = sources.get(plan.source_name(bare))
        if source is None:
            continue
        if is_adapters(name):
            target.data = adapter_growth(bare, grown_base, plan).weight(source).to(child.device)
        if isinstance(target, nn.Parameter):
            target.requires_grad_(source.requires_grad)
    return grown.train(model.training)


def adapted_on_meta(base: nn.Module, folder: Path, child: PeftModel) -> PeftModel:
    """A base on the meta device with the adapters of a checkpoint, of the child's names.

    Args:
        base: it is wrapped in place. folder: as peft saves adapters, each but `default` in a folder of its name.

    Raises:
        StateError: it holds no such adapters.
    """
    from peft import LoraConfig

    places = {name: folder if name == "default" else folder / name for name in child.peft_config}
    missing = sorted(name for name, place in places.items() if not (place / ADAPTER_CONFIG_NAME).is_file())
    if missing:
        raise StateError(
            f"The checkpoint {folder.name} holds no adapters {missing} ({ADAPTER_CONFIG_NAME}), which the grown model has. "
            "Pass the checkpoint of the parent with its adapters, or leave warmstart_from out."
        )
    configs = {}
    for name, place in places.items():
        try:
            configs[name] = LoraConfig.from_pretrained(str(place))
        except (ValueError, TypeError, KeyError) as error:
            raise StateError(f"{ADAPTER_CONFIG_NAME} in {place} cannot be read: {error}") from error
        configs[name].init_lora_weights = True  # others compute from the base's weights
    first, *others = configs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft has said it of the parent
        wrapped = type(child)(
            base, configs[first], adapter_name=first, autocast_adapter_dtype=False, low_cpu_mem_usage=True
        )
        for name in others:
            wrapped.add_adapter(name, configs[name], low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    return wrapped


# -- the adapter's config ---------------------------------------------------------------------------------------------


def _config_for(model: PeftModel, name: str, child: PreTrainedModel, plan: GrowthPlan) -> tuple[Any, dict[str, Any]]:
    """An adapter's config for the child, and the (rank, alpha) of each module that it is to adapt.

    The parent's own where it says the same of the child. Where it counts layers, which the growth may number anew, the
    modules are named one by one.
    """
    given = copy.deepcopy(model.peft_config[name])
    given.base_model_name_or_path = given.revision = None  # the child has no name yet
    if isinstance(given.init_lora_weights, str) and given.init_lora_weights not in ("gaussian", "orthogonal"):
        given.init_lora_weights = True  # these would change the base's weights again
    wanted = dict(_wanted(model, name, child, plan))
    if dict(_described(given, child)) != wanted:
        given.target_modules = set(wanted)
        given.layers_to_transform = given.layers_pattern = given.exclude_modules = None
        anchored = {module: rf"^{re.escape(module)}" for module in wanted}
        given.rank_pattern = {anchored[m]: rank for m, (rank, _) in wanted.items() if rank != given.r}
        given.alpha_pattern = {anchored[m]: alpha for m, (_, alpha) in wanted.items() if alpha != given.lora_alpha}
    return given, wanted


def _wanted(model: PeftModel, name: str, child: PreTrainedModel, plan: GrowthPlan) -> Iterator[tuple[str, Any]]:
    """The modules of the child that grow from modules with this adapter, with rank and alpha."""
    from peft.tuners.lora.layer import LoraLayer

    adapted = {n: m for n, m in base_of(model).named_modules() if isinstance(m, LoraLayer) and name in m.r}
    for module_name, _ in child.named_modules():
        layer = adapted.get(plan.source_name(f"{module_name}.weight").removesuffix(".weight"))
        if layer is not None:
            yield module_name, (layer.r[name], layer.lora_alpha[name])


def _described(config: Any, child: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The modules of the child that a config adapts, with rank and alpha, by peft's own rules."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    for name, _ in child.named_modules():
        if name and check_target_module_exists(config, name):
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
            yield (
                name,
                (rank, config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)),
            )


def _check_same_modules(grown: PeftModel, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    from peft.tuners.lora.layer import LoraLayer

    layers = {n: m for n, m in base_of(grown).named_modules() if isinstance(m, LoraLayer)}
    for adapter, modules in wanted.items():
        made = {n: (m.r[adapter], m.lora_alpha[adapter]) for n, m in layers.items() if adapter in m.r}
        if made != dict(modules):
            differing = sorted(set(made.items()) ^ set(modules.items()))[:5]
            raise ExactnessError(f"peft adapted other modules of the grown model than planned: {differing}. {MERGE}")
