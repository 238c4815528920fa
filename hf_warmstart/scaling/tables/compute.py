"""What a token of training costs, in parameters and FLOPs, read off a config.

A law of compute means nothing without its count of compute, so that there are two, by name:

- `"6ND"`: `C = 6 N D`, with N the parameters that a token passes through, lookup tables and head left out (of a mixture of
  experts, the active ones);
- `"config"`: `C = f D`, with f from the config: `f = 6 M + 12 * sum over attention layers of heads * head_dim * T`, M the
  parameters in matrix products (the head's included, lookup tables not; active experts only), T the tokens of a sequence
  or of the layer's window. DeepSeek LLM (arXiv 2401.02954, section 3.2) counts so, but without the head. Where keys and
  values differ in width, `head_dim` is the mean of the two.

Attention counts whole squares, as is usual, not their causal half. State-space scans and convolutions over few tokens are not
counted. Numbers of parameters come from the class itself, built without weights, and so hold for any architecture; which of
them are experts is read off two such models that differ only in their number of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ...errors import WarmstartError

ACCOUNTINGS = ("6ND", "config")
# Names under which configs say how many routed experts a layer has.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, counted by what a token does with them.

    Args:
        total (`int`): all, tied ones once. active (`int`): without the experts that a token does not visit, and without their
            rows of the router.
        embedding (`int`): in tables that are looked up. head (`int`): in the output head, tied or not.
        tied (`bool`): whether the head is one of those tables.
    """

    total: int
    active: int
    embedding: int
    head: int
    tied: bool

    @property
    def non_embedding(self) -> int:
        """N of the laws: active parameters without lookup tables and head."""
        return self.active - self.embedding - (0 if self.tied else self.head)

    @property
    def in_matmuls(self) -> int:
        """M: active parameters that are multiplied with, the head's included."""
        return self.non_embedding + self.head


def training_flops(params: float, tokens: float) -> float:
    """`6 N D`: two FLOPs for each parameter and token going forward, four going backward.

    Args:
        params (`float`): N, active and without embeddings. tokens (`float`): D.

    Example:

        >>> training_flops(1e9, 2e10)
        1.2e+20

    Source: Kaplan et al. 2020, arXiv 2001.08361, section 2.1.
    """
    return 6.0 * params * tokens


def count_parameters(config: PreTrainedConfig) -> ParameterCount:
    """Parameters of a config's model; no weights are allocated.

    Args:
        config (`PreTrainedConfig`): names its class under `architectures`, or has one for causal language modelling.

    Raises:
        WarmstartError: the class cannot be built; or the config has experts but does not say how many a token visits.

    Example:

        >>> from transformers import LlamaConfig
        >>> small = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
        >>> count_parameters(small).non_embedding
        20640
    """
    from ...growth.configs import get_attribute, resize_config
    from ...growth.sizes import active_experts

    count = _counted(config)
    path, experts = _experts(config)
    if path is None:
        return count
    active = next(iter(active_experts(config)), None)
    if active is None:
        raise WarmstartError(
            f"{type(config).__name__} has {experts} experts but no number of experts for each token, so that active parameters "
            "cannot be told. Pass params= yourself."
        )
    visited = min(get_attribute(config, active), experts)
    # Twice as many: what divides their number, such as groups of experts, still does.
    doubled = _counted(resize_config(config, {path: 2 * experts}))
    per_expert, rest = divmod(doubled.total - count.total, experts)
    if rest:
        raise WarmstartError(
            f"{type(config).__name__} does not grow evenly with {path}, so that active parameters cannot be told. Pass "
            "params= yourself."
        )
    return ParameterCount(
        count.total, count.total - per_expert * (experts - visited), count.embedding, count.head, count.tied
    )


def flops_per_token(config: PreTrainedConfig, sequence_length: int, count: ParameterCount | None = None) -> float:
    """Training FLOPs of one token: `6 M + 12 * sum over attention layers of heads * head_dim * T`.

    Args:
        config (`PreTrainedConfig`): of the model.
        sequence_length (`int`): T, in tokens.
        count (`ParameterCount`, *optional*): of the same config, where it is known already.

    Raises:
        WarmstartError: as `count_parameters`; or a sequence without tokens.

    Example:

        >>> from transformers import LlamaConfig
        >>> small = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
        >>> flops_per_token(small, 128) == 6 * (20640 + 99 * 32) + 12 * 2 * 32 * 128
        True
    """
    if sequence_length < 1:
        raise WarmstartError(f"sequence_length={sequence_length} must be at least one token.")
    text = config.get_text_config()
    heads, spans = _sizes(text, "num_attention_heads"), attention_spans(config, sequence_length)
    head_dim = _sizes(text, "head_dim") or (_sizes(text, "hidden_size") // heads if heads else 0)
    # Latent attention names its widths: keys have a rotated part, and values another width.
    keys = _sizes(text, "qk_nope_head_dim") + _sizes(text, "qk_rope_head_dim") or head_dim
    values = _sizes(text, "v_head_dim") or head_dim
    count = count or count_parameters(config)
    return 6.0 * count.in_matmuls + 6.0 * heads * (keys + values) * sum(spans)


def attention_spans(config: PreTrainedConfig, sequence_length: int) -> list[int]:
    """How many tokens a query attends to in each attention layer: T, or the layer's window. Other layers are left out."""
    text = config.get_text_config()
    layers, window = _sizes(text, "num_hidden_layers"), _sizes(text, "sliding_window")
    chunk = _sizes(text, "attention_chunk_size")
    kinds = getattr(text, "layer_types", None)
    if not _sizes(text, "num_attention_heads"):
        return []
    if not kinds:
        narrow = window if window and getattr(text, "use_sliding_window", True) else sequence_length
        return [min(sequence_length, narrow)] * layers
    found = []
    for kind in kinds:
        if "sliding" in kind:
            found.append(min(sequence_length, window or sequence_length))
        elif "chunked" in kind:
            found.append(min(sequence_length, chunk or sequence_length))
        elif "attention" in kind and "linear" not in kind:
            found.append(sequence_length)
    return found


def _sizes(config: Any, name: str) -> int:
    """A size of a config, the first of a list of one per layer; 0 where there is none."""
    value = getattr(config, name, None)
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _experts(config: PreTrainedConfig) -> tuple[str | None, int]:
    """The path of the attribute that counts a layer's routed experts, and their number; (None, 0) for a dense model."""
    from ...growth.configs import get_attribute

    parts = ["", *(f"{name}." for name in config.sub_configs if name == "text_config")]
    for path in (part + name for part in parts for name in EXPERTS):
        number = get_attribute(config, path, None)
        if isinstance(number, int) and number > 1:
            return path, number
    return None, 0


def _counted(config: PreTrainedConfig) -> ParameterCount:
    """Parameters with every expert active."""
    from torch import nn

    from ...growth.configs import model_class_of
    from ...growth.twin import FAULTS, build

    model_class = model_class_of(config)
    try:
        model = build(model_class, config, "meta")
    except FAULTS as error:
        words = " ".join(str(error).split())
        raise WarmstartError(
            f"{model_class.__name__} cannot be built from this config, so that its parameters cannot be counted: "
            f"{type(error).__name__}: {words}. Pass params= yourself."
        ) from error
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    total = sum(parameter.numel() for parameter in model.parameters())
    output = model.get_output_embeddings()
    weight = getattr(output, "weight", None)
    tied = weight is not None and (
        id(weight) in tables or any(name.endswith(_name_of(model, output)) for name in model.all_tied_weights_keys)
    )
    if weight is not None and tied and id(weight) not in tables:  # on the meta device ties may not be made yet
        total -= weight.numel()
    return ParameterCount(total, total, sum(tables.values()), 0 if weight is None else weight.numel(), tied)


def _name_of(model: Any, part: Any) -> str:
    """The name of a part's weight."""
    return next((f"{name}.weight" for name, module in model.named_modules() if module is part), "\0")
