"""Facts of modules that are measured by running them: what a norm does, what an embedding is multiplied by."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def _run(norm: nn.Module, weight: float, shift: float) -> Tensor:
    """A norm's answer to fixed numbers, with all weights equal."""
    saved = norm.weight.data
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(5, len(saved), generator=generator, dtype=saved.dtype)
    try:
        norm.weight.data = torch.full_like(saved, weight)
        with torch.no_grad():
            return norm(numbers + shift)
    finally:
        norm.weight.data = saved


def centres(norm: nn.Module) -> bool:
    """Whether a norm subtracts the mean: a constant added to its input changes nothing."""
    return torch.allclose(_run(norm, 1.0, 0.0), _run(norm, 1.0, 3.0), atol=1e-4)


def offset_of(norm: nn.Module) -> float:
    """1 for norms that multiply by `1 + weight`: a zero weight then still lets the input through."""
    at_zero = _run(norm, 0.0, 0.0)
    if getattr(norm, "bias", None) is not None:
        at_zero = at_zero - norm.bias.detach()
    return 0.0 if float(at_zero.abs().max()) == 0.0 else 1.0


def embedding_multiplier(model: PreTrainedModel) -> float | None:
    """The constant between the embedding table and the first layer's input, in the model's dtype; None if none is.

    Measured, not computed: classes round it to their own dtype.
    """
    table = model.get_input_embeddings()
    stack = next(
        (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers), None
    )
    if table is None or stack is None:
        return None
    seen: list[Tensor] = []

    class _Stop(Exception):
        pass

    def stop(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    handle = stack[0].register_forward_pre_hook(stop, with_kwargs=True)
    ids = torch.arange(1, 4, device=table.weight.device).reshape(1, -1)
    try:
        with torch.no_grad():
            model(input_ids=ids)
    except _Stop:
        pass
    finally:
        handle.remove()
    rows = table.weight.detach()[ids[0]].double()
    if not seen or rows.shape != seen[0][0].shape:
        return None
    ratios = seen[0][0].double() / rows
    ratio = ratios.flatten()[rows.abs().argmax()]
    return float(ratio) if torch.allclose(ratios, ratio.expand_as(ratios), rtol=1e-2) else None
