"""Two views of one model: its tensors in memory, made of those in files, and its files' tensors, made of those in memory.

transformers renames tensors on their way from files to memory and back, stacks and joins them (Mixtral's experts), adds or
drops prefixes, casts and ties. Here its own code runs, on tensors without data that remember what becomes of them, so that
nothing of its tables is repeated and nothing is loaded: a model of 70B parameters takes seconds and no memory.

What cannot be followed raises `UntraceableError`; such a model is loaded, and saved, whole.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import logging as transformers_logging

from ...errors import CheckpointError, UntraceableError
from ...growth.configs import config_dtype
from ...growth.twin import FAULTS, default_dtype
from .pieces import Assembled
from .traced import Trace, TracedTensor, Unknown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileView:
    """The tensors of a model's files, in the order in which `save_pretrained` deals them out to files.

    Args:
        tensors: over the names of parameters and persistent buffers, by the files' names.
        storages: a number of each one's storage and its bytes: `save_pretrained` keeps tensors that share a storage
            while they are saved, such as the experts of one layer, in one file.
    """

    tensors: dict[str, Assembled]
    storages: dict[str, tuple[int, int]]


def loaded_view(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    files: Mapping[str, tuple[torch.dtype, Sequence[int]]],
) -> dict[str, Assembled]:
    """How `from_pretrained` makes a model's tensors of those in files, without loading any.

    Args:
        files: dtype and shape of every tensor in the files, by name.

    Returns:
        Parameters and persistent buffers by name, in the order of `state_dict()` and tied ones once, over the files'
        tensors. Their dtypes are those that `from_pretrained` gives: the config's, or for a config without one that of
        the files, unless the class keeps some in another.

    Raises:
        CheckpointError: tensors are missing or of other shapes than the class's; all are named. Tensors that have no
            place in the model only give a warning.
        UntraceableError: the model must be loaded to know what its tensors are.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UntraceableError("The config has a quantization_config, so values change while they are loaded.")
    found = {dtype for dtype, _ in files.values() if dtype.is_floating_point}
    if config_dtype(config) is None and len(found) > 1:
        raise UntraceableError(f"The config has no dtype and the files several: {sorted(map(str, found))}.")
    trace = Trace()
    tensors = {name: trace.tensor(name, shape, dtype) for name, (dtype, shape) in files.items()}
    try:
        with _as_class(model_class, trace):
            model, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
            )
    except UntraceableError as error:
        if not trace.refusals and (lacking := _lacking(model_class, config, files)):
            raise CheckpointError(f"{lacking} {error}") from error
        raise
    _check_report(model, report, files)
    made, computed = {}, []
    for name in model.state_dict():
        if name in model.all_tied_weights_keys:
            continue
        tensor = model.get_parameter_or_buffer(name)
        if isinstance(tensor, TracedTensor):
            made[name] = tensor.made
        else:
            computed.append(name)
    if computed:
        raise UntraceableError(f"{model_class.__name__} computes tensors that the files lack: {sorted(computed)}.")
    return _known(made)


def file_view(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtypes: torch.dtype | Mapping[str, torch.dtype]
) -> FileView:
    """How `save_pretrained` makes the tensors of files of a new model's, without making any.

    Args:
        dtypes: of the tensors in memory, by name; or one for the model, in which its class may make some in another.

    Returns:
        The files' tensors, and how they are dealt out to files.

    Raises:
        UntraceableError: the class saves itself in a way of its own.
    """
    if model_class.save_pretrained is not PreTrainedModel.save_pretrained:
        raise UntraceableError(f"{model_class.__name__} has a save_pretrained of its own.")
    by_name = dtypes if isinstance(dtypes, Mapping) else {}
    config = copy.deepcopy(config)
    config.dtype = config_dtype(config)  # saved configs have it as a text
    built_in = config.dtype if isinstance(dtypes, Mapping) else dtypes
    trace = Trace()
    with _as_class(model_class, trace):
        with torch.random.fork_rng(devices=[]), default_dtype(built_in), torch.device("meta"):
            model = model_class(config)
        state = model.state_dict()
        for name in model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        tensors = {}
        for name, tensor in remove_tied_weights_from_state_dict(state, model).items():
            own = model.all_tied_weights_keys.get(name, name)
            tensors[name] = trace.tensor(own, tensor.shape, by_name.get(own, tensor.dtype))
        saved = revert_weight_conversion(model, tensors)
    storages = {name: tensor.like.untyped_storage() for name, tensor in saved.items()}
    numbers: dict[int, int] = {}
    return FileView(
        _known({name: tensor.made for name, tensor in saved.items()}),
        {name: (numbers.setdefault(one._cdata, len(numbers)), one.nbytes()) for name, one in storages.items()},
    )


def _known(made: dict[str, Assembled]) -> dict[str, Assembled]:
    """Tensors as they are given, unless there are some whose values are computed."""
    for name, one in made.items():
        if isinstance(one, Unknown):
            raise UntraceableError(f"{name} is computed, by {one.operation}.")
    return made


def _check_report(model: PreTrainedModel, report: Mapping, files: Mapping) -> None:
    """Raise if tensors are missing or of other shapes; warn of those that have no place."""
    own = type(model).__name__
    if report["mismatched_keys"]:
        words = [f"{name} of {tuple(has)} for {tuple(wants)}" for name, has, wants in report["mismatched_keys"]]
        lacking = _lacking(type(model), model.config, files)
        raise CheckpointError(f"The files do not fit {own}: they give {', '.join(sorted(words))}. {lacking}".rstrip())
    buffers = {name for name, _ in model.named_buffers()}
    if missing := sorted(set(report["missing_keys"]) - buffers):
        raise CheckpointError(f"The files lack {len(missing)} tensors of {own}: {missing}.")
    if unexpected := sorted(report["unexpected_keys"]):
        logger.warning("The files have %d tensors that %s has no place for: %s", len(unexpected), own, unexpected)


def _lacking(model_class: type[PreTrainedModel], config: PreTrainedConfig, files: Mapping) -> str:
    """In words, which of the names that a model would be saved under are not in files that hold some of them."""
    try:
        names = set(file_view(model_class, config, torch.float32).tensors)
    except UntraceableError:
        return ""
    lacking = sorted(names - set(files))
    if not lacking or names.isdisjoint(files):
        return ""
    return f"Of the tensors that a {model_class.__name__} is saved as, the files lack {len(lacking)}: {lacking}."


@contextmanager
def _as_class(model_class: type[PreTrainedModel], trace: Trace) -> Iterator[None]:
    """Context in which transformers works on traced tensors: quietly, and with errors of this library."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    bars = transformers_logging.set_tqdm_hook(lambda bar, args, options: bar(*args, **{**options, "disable": True}))
    try:
        yield
    except UntraceableError:
        raise
    except FAULTS as error:
        trace.check()
        words = " ".join(str(error).split())
        raise UntraceableError(f"{model_class.__name__} stops with {type(error).__name__}: {words}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.set_tqdm_hook(bars)
    trace.check()
