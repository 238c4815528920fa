"""Whether a model of a config's sizes can lie in files as small as those beside it: told before anything is planned.

A config is a few bytes that can ask for any number of layers or rows. Planning takes memory that follows its sizes, so a
damaged one is refused here, while its model is built on the meta device.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import CheckpointError
from ...growth.twin import parent_shapes

WEIGHTS = ("*.safetensors", "*/*.safetensors", "pytorch_model*.bin", "pytorch_model_fsdp_0/*.distcp")
ENTRIES_PER_BYTE = 2  # of eight-bit numbers, tied tensors counted twice
MAX_PARAMETERS = 200_000  # of the largest models that there are, with every expert by itself


class _TooLarge(Exception):
    """Raised within the constructor of a model."""


def check_size(model_class: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> None:
    """Raise if a config's model is far larger than the weights in a folder.

    Raises:
        CheckpointError: it is. WarmstartError: the model cannot be built.
    """
    nbytes = sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern) if path.is_file())
    parameters = entries = 0

    def count(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal parameters, entries
        parameters += 1
        entries += 0 if parameter is None else parameter.numel()
        # Each has a name and a shape in a file, however small it is.
        if entries > nbytes * ENTRIES_PER_BYTE or parameters > min(MAX_PARAMETERS, 1000 + nbytes):
            raise _TooLarge

    handle = register_module_parameter_registration_hook(count)
    try:
        parent_shapes(model_class, config)
    except _TooLarge as error:
        raise CheckpointError(
            f"config.json in {folder} describes a {model_class.__name__} of more than {entries:,} numbers in {parameters:,} "
            f"parameters; its files of weights have {nbytes:,} bytes. They do not belong together: pass the folder as it was "
            "saved."
        ) from error
    finally:
        handle.remove()
