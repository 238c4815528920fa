"""Small models in memory: built in their config's dtype, with shapes alone, or filled with random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import WarmstartError
from .configs import config_dtype

# What classes and configs raise when they cannot be built or run as they are.
FAULTS = (
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    ImportError,
    LookupError,
    ArithmeticError,
    AssertionError,
    OSError,
    StrictDataclassError,
)


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
        # Some classes make a few tensors in a dtype of their own.
        return model_class(config).to(config_dtype(config)).eval()


def meta_shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters and persistent buffers of a config's model; nothing is allocated."""
    model = build(model_class, config, "meta")
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def parent_shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """`meta_shapes` of a model that is to be grown.

    Raises:
        WarmstartError: the class cannot be built from the config; its own words are kept.
    """
    try:
        return meta_shapes(model_class, config)
    except FAULTS as error:
        words = " ".join(str(error).split())
        raise WarmstartError(
            f"{model_class.__name__} cannot be built from this config: {type(error).__name__}: {words}"
        ) from error


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
            if name.endswith("running_var"):
                noise = noise.abs() + 0.5
            tensor.copy_(noise)
