"""True float64: models with their hard-coded upcasts to float32 lifted to float64.

transformers computes norms, softmax and rotary angles in float32 whatever the model's dtype, which hides every error
below about 1e-7. Inside `true_float64()` each request for float32 is answered in float64, also one that is not spoken:
a tensor made without a dtype has the default one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from transformers.utils import logging


class true_float64(TorchFunctionMode):  # noqa: N801  (used as a context manager, like torch.no_grad)
    """Context in which `float32` means `float64`, for casts, factories, `dtype=` arguments and the default dtype."""

    def __enter__(self):
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_default_dtype(self._default)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*args, **kwargs)


@contextmanager
def quiet() -> Iterator[None]:
    """Context without transformers' progress bars: twins are saved and loaded in milliseconds."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
