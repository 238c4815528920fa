"""Models that peft has wrapped, told and opened without importing peft."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..errors import WarmstartError


def is_wrapped(model: object) -> bool:
    """Whether a model is one of peft's."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(model).__mro__)


def base_of(model: Any) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`; its adapted layers stay wrapped.

    Raises:
        WarmstartError: what is wrapped is none of transformers' models.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model.base_model.model
    if not isinstance(base, PreTrainedModel):
        raise WarmstartError(f"{type(model).__name__} wraps a {type(base).__name__}; a PreTrainedModel is needed.")
    return base
