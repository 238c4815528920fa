"""Small twins: models of the same class and config, tiny, for derivation and for the certificate.

A twin keeps what decides whether a growth is right (the class, every switch of the config, the grouping of heads, one
period of the layer pattern, the ties) and shrinks what does not (sizes, vocabulary, positions, number of experts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .configs import config_dtype, per_layer_lists, resize_config
from .maps import LayerMap

HEAD_DIM = 8
VOCABULARY = 61
POSITIONS = 48
EXPERTS = 4


def layer_period(config: PreTrainedConfig) -> int:
    """The shortest period of all per-layer lists, at least 1; all layers where nothing repeats."""
    lists = [getattr(config, name) for name in per_layer_lists(config)]
    layers = config.num_hidden_layers
    for period in range(1, layers):
        if all(values[k] == values[k % period] for values in lists for k in range(layers)):
            return period
    return layers


def twin_config(
    config: PreTrainedConfig, sizes: Mapping[str, int], layers: int, dtype: torch.dtype = torch.float32
) -> PreTrainedConfig:
    """A small config with the given sizes (by standard name), number of layers and dtype.

    Attributes that equal the hidden size and are named as a width (OPT's `word_embed_proj_dim`) stay equal to it.
    """
    data = config.to_dict()
    changes: dict = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
    for name, value in data.items():
        is_width = isinstance(value, int) and value == config.hidden_size and name.endswith(("_dim", "_size"))
        if is_width and name not in ("hidden_size", "head_dim", "vocab_size", *sizes):
            changes[name] = sizes["hidden_size"]
        if name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
            changes[name] = 0
        if name in ("num_local_experts", "num_experts") and isinstance(value, int):
            changes[name] = min(value, EXPERTS)
        if name == "num_experts_per_tok" and isinstance(value, int):
            changes[name] = min(value, EXPERTS)
        if name == "sliding_window" and isinstance(value, int):
            changes[name] = min(value, 5)
    if getattr(config, "head_dim", None) is not None:
        changes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    changes.update(sizes)
    period = layer_period(config)
    # Whole periods from the bottom, so that every kind of layer is there.
    source = tuple(k % max(period, 1) if layers > config.num_hidden_layers else k for k in range(layers))
    twin = resize_config(config, changes, LayerMap(config.num_hidden_layers, source, (False,) * layers))
    twin._attn_implementation = "eager"
    twin._experts_implementation = "eager"
    twin.dtype = dtype
    return twin


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Context in which new tensors have a dtype, as in `from_pretrained`: constants that classes compute follow it."""
    saved = torch.get_default_dtype()
    torch.set_default_dtype(dtype or saved)
    try:
        yield
    finally:
        torch.set_default_dtype(saved)


def build(model_class: type[PreTrainedModel], config: PreTrainedConfig, device: str = "cpu") -> PreTrainedModel:
    """A model in its config's dtype with whatever weights its class gives it, in `eval` mode.

    The global random state is untouched.
    """
    with torch.random.fork_rng(devices=[]), default_dtype(config_dtype(config)), torch.device(device):
        torch.manual_seed(0)
        return model_class(config).eval()


def meta_shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters and persistent buffers of a config's model; nothing is allocated."""
    model = build(model_class, config, "meta")
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def randomise(model: PreTrainedModel, seed: int, scale: float = 0.3) -> None:
    """Give every parameter and persistent buffer random values, norms and biases included, in place.

    One-dimensional tensors keep their mean (1 for most gains), so that nothing vanishes.
    """
    generator = torch.Generator().manual_seed(seed)
    tied = set(model.all_tied_weights_keys)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in tied or not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale
            if tensor.ndim == 1:
                noise = noise + tensor.double().mean()
            tensor.copy_(noise)
