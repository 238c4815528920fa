"""`grow_checkpoint`: a checkpoint in, a grown one out, weights and training state in the form that they came in.

| source | weights | optimizer |
|---|---|---|
| a model's folder, a Hub id | safetensors | |
| `Trainer`, `Accelerator.save_state` | safetensors | `optimizer.pt` / `.bin`, numbered |
| FSDP, full state | safetensors, `pytorch_model_fsdp.bin` | `optimizer.bin`, named |
| FSDP2, sharded | `pytorch_model_fsdp_0/` | `optimizer_0/` |

Sharded checkpoints are grown tensor by tensor. Under `torch.distributed` every rank takes part, keeps its share of each
grown tensor and writes its own shards; the number of ranks need not be that of the parent's run.

Everything is written to a folder beside the target, which takes its name when it is complete: a run that dies leaves no
half-written checkpoint under the target's name. Files beside weights and state (tokenizer, chat template, processor,
code, random states) are copied as they are, folders are not.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, Trainer
from transformers.trainer import (
    OPTIMIZER_NAME,
    OPTIMIZER_NAME_BIN,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)

from ..errors import StateError, WarmstartError
from ..growth.config import GrowthConfig
from ..growth.grow import grow
from ..growth.plan import RECORD_KEY, GrowthPlan, GrowthRecord, make_plan
from ..growth.source import class_and_config, parent_name
from ..growth.state import check_state_policy
from ..growth.twin import build
from ..hub.save import CARD_NAME, GROWTH_NAME, save_grown
from ..training.grown_adamw import set_aside_for_us
from .later import Later, save_sharded
from .parent_state import (
    GROWN_NAME,
    SCHEDULER_NAMES,
    SHARDED_OPTIMIZER,
    ParentState,
    load_file,
    optimizer_file,
    read_parent_state,
    read_settings,
)
from .placement import Rows
from .sharded import ShardedFolder, Weights, is_sharded
from .state_stream import write_optimizer, write_sharded_optimizer

SHARDED_MODEL = "pytorch_model_fsdp_0"
FULL_MODEL = "pytorch_model_fsdp.bin"
Result = TypeVar("Result")
# What a growth writes anew or leaves out; every other file is taken along as it is.
WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "tf_model*", "flax_model*", "rust_model*"),
    *("*.gguf", "*.onnx", "consolidated*", "adapter_*"),
)
DESCRIPTION = ("config.json", "generation_config.json", CARD_NAME, GROWTH_NAME, TRAINING_ARGS_NAME)
STATE = (
    *(OPTIMIZER_NAME, "optimizer*.bin", GROWN_NAME, *SCHEDULER_NAMES, TRAINER_STATE_NAME),
    *("latest", "zero_to_fp32.py"),  # DeepSpeed's
)


def grow_checkpoint(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    growth_config: GrowthConfig | PreTrainedConfig | None = None,
    *,
    state_policy: str = "carry",
    max_shard_size: str | int = "5GB",
    **options: Any,
) -> GrowthRecord:
    """Grow a checkpoint on disk or on the Hub, with the training state that it holds.

    Args:
        source: a model's folder, a checkpoint of `Trainer` (one device, DDP, FSDP), a folder of `Accelerator.save_state`
            with the model's `config.json` in it, or a Hub id.
        output_dir: the new folder; it must not exist, or be empty. `from_pretrained` loads it, and where the source held
            training state, training resumes from it (`train(resume_from_checkpoint=output_dir)`).
        growth_config: what to grow; or its fields as keywords; or the target's config.
        state_policy (`str`, defaults to `"carry"`): as for `grow_optimizer_state`. Under `"reset"` the optimizer's file
            keeps the settings of its groups and no state, so that the schedule goes on; of an FSDP model neither is written.
        max_shard_size (`str` or `int`, defaults to `"5GB"`): of the safetensors files.
        **options: fields of `GrowthConfig`, or sizes by their transformers names.

    Returns:
        The `GrowthRecord`.

    Raises:
        WarmstartError: the growth cannot be done, the source is incomplete, or the target is not empty. Nothing is left
            under the target's name.

    Example:

        >>> record = grow_checkpoint("runs/base/checkpoint-500", "runs/grown", width=2)          # doctest: +SKIP
    """
    check_state_policy(state_policy)
    target = Path(os.path.realpath(output_dir))  # a link stays one, to the folder that is written
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WarmstartError(f"{target} is not empty. Pass a new folder; nothing is overwritten.")
    model_class, config = class_and_config(source)
    plan = make_plan(model_class, config, GrowthConfig.of(growth_config, options))
    folder = Path(source)
    state = _training_state(folder, plan, state_policy) if folder.is_dir() else None
    target.parent.mkdir(parents=True, exist_ok=True)
    made = _staging(target)
    try:
        if is_sharded(folder / SHARDED_MODEL):
            record = _grow_sharded_weights(folder, plan, made)
        else:
            record = _on_main(lambda: _grow_whole_weights(source, plan, made, max_shard_size))
        if state is not None:
            _write_state(folder, state, plan, made, state_policy)
        _barrier()
        _on_main(lambda: _finish(folder, made, target))
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return record


def _finish(folder: Path, made: Path, target: Path) -> None:
    """Add what a growth does not change, and give the folder its name."""
    if folder.is_dir():
        _copy_other_files(folder, made)
    os.umask(umask := os.umask(0))
    made.chmod(0o777 & ~umask)  # a temporary folder is its owner's alone
    if target.exists():
        target.rmdir()
    os.replace(made, target)


# -- the pieces -------------------------------------------------------------------------------------------------------


def _training_state(folder: Path, plan: GrowthPlan, state_policy: str) -> ParentState | None:
    """The state in a folder, if it is a training checkpoint."""
    if not (folder / TRAINER_STATE_NAME).is_file() and not any(folder.glob("random_states_*.pkl")):
        return None

    def parent_on_meta(config: PreTrainedConfig | None) -> PreTrainedModel:
        return build(plan.model_class, plan.source_config, "meta")

    def decay_names(model: nn.Module) -> list[str]:
        return Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]

    reset = state_policy == "reset"
    scheduler = any((folder / name).is_file() for name in SCHEDULER_NAMES)
    state = read_parent_state(folder, parent_on_meta, decay_names, optimizer=not reset, scheduler=scheduler)
    if reset and not is_sharded(folder / SHARDED_OPTIMIZER):
        settings = read_settings(folder, parent_on_meta(None), decay_names)
        if settings is not None:
            return replace(state, optimizer={"state": {}, "param_groups": settings})
    return state


def _grow_whole_weights(
    source: str | os.PathLike, plan: GrowthPlan, made: Path, max_shard_size: str | int
) -> GrowthRecord:
    parent = plan.model_class.from_pretrained(source)
    child = grow(parent, plan.growth_config)
    del parent
    save_grown(child, made, max_shard_size=max_shard_size)
    if (Path(source) / FULL_MODEL).is_file():
        torch.save(child.state_dict(), made / FULL_MODEL)
    return GrowthRecord.all_of(child.config)[-1]


def _grow_sharded_weights(folder: Path, plan: GrowthPlan, made: Path) -> GrowthRecord:
    weights = ShardedFolder(folder / SHARDED_MODEL).weights()
    missing = sorted({plan.source_name(name) for name in plan.names} - set(weights))
    if missing:
        raise StateError(f"The weights in {SHARDED_MODEL} lack {len(missing)} of the parent's tensors: {missing[:5]}.")

    def later(name: str) -> Later:
        dtype = weights.described(plan.source_name(name)).dtype
        return Later(plan.target_shapes[name], dtype, lambda rows: _grown_weight(weights, plan, name, rows))

    grown = {name: later(name) for name in plan.names}
    child = build(plan.model_class, plan.target_config, "meta")
    tied = dict(child.all_tied_weights_keys)
    state = {"model": grown | {name: grown[tied[name]] for name in tied if name in weights}}
    save_sharded(state, made / SHARDED_MODEL, _mesh())
    config = copy.deepcopy(plan.target_config)
    record = plan.record(parent_name(plan.source_config))
    setattr(config, RECORD_KEY, [*(getattr(plan.source_config, RECORD_KEY, None) or []), record.to_dict()])
    config.architectures = [plan.model_class.__name__]
    if _is_main():
        config.save_pretrained(made)
        if (folder / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(folder).save_pretrained(made)
    return record


def _grown_weight(weights: Weights, plan: GrowthPlan, name: str, rows: Rows | None) -> torch.Tensor:
    """A grown weight, or some of its rows."""
    whole = plan.tensor(name).grow(weights[plan.source_name(name)], "weight")
    return whole if rows is None else whole[slice(*rows)].clone()


def _write_state(folder: Path, state: ParentState, plan: GrowthPlan, made: Path, state_policy: str) -> None:
    if state.optimizer is not None and is_sharded(folder / SHARDED_OPTIMIZER):
        _write_sharded_optimizer(state.optimizer, plan, made, state_policy)
    _on_main(lambda: _write_whole_state(folder, state, plan, made, state_policy))


def _write_whole_state(folder: Path, state: ParentState, plan: GrowthPlan, made: Path, state_policy: str) -> None:
    """What one process writes: all but shards."""
    if state.optimizer is not None and not is_sharded(folder / SHARDED_OPTIMIZER):
        name = OPTIMIZER_NAME_BIN if optimizer_file(folder) == folder / OPTIMIZER_NAME_BIN else OPTIMIZER_NAME
        _write_whole_optimizer(state.optimizer, plan, made / name, state_policy, _is_named(folder))
    for name in SCHEDULER_NAMES:
        # Without an optimizer file neither is loaded.
        if state.optimizer is not None and (folder / name).is_file():
            shutil.copy2(folder / name, made / name)
    if state.trainer:
        # The best checkpoint so far is the parent's, which the grown run cannot load.
        best = {"best_metric": None, "best_model_checkpoint": None, "best_global_step": None}
        (made / TRAINER_STATE_NAME).write_text(json.dumps({**state.trainer, **best}, indent=2) + "\n")


def _copy_other_files(folder: Path, made: Path) -> None:
    """Tokenizer, processor, code, random states, our own notes: what is neither weights nor written anew."""
    for path in folder.iterdir():
        known = any(fnmatchcase(path.name, pattern) for pattern in (*WEIGHTS, *DESCRIPTION, *STATE))
        if path.is_file() and not known and not (made / path.name).exists():
            shutil.copy2(path, made / path.name)


def _is_named(folder: Path) -> bool:
    """Whether an optimizer's file has its state by name, as that of an FSDP model has."""
    file = optimizer_file(folder)
    return file is not None and any(isinstance(name, str) for name in load_file(file)["state"])


def _write_whole_optimizer(
    state: Mapping[str, Any], plan: GrowthPlan, path: Path, state_policy: str, named: bool
) -> None:
    if state_policy == "asymmetric_reset" and path.name != OPTIMIZER_NAME:
        raise WarmstartError(
            "Only WarmstartTrainer resumes a state under 'asymmetric_reset', from one device or DDP. Pass the checkpoint as "
            "warmstart_from to it, or state_policy='carry'."
        )
    write_optimizer(state, plan, path, state_policy, named)
    if state_policy == "asymmetric_reset":
        set_aside_for_us(path.parent)


def _write_sharded_optimizer(state: Mapping[str, Any], plan: GrowthPlan, made: Path, state_policy: str) -> None:
    if state_policy == "asymmetric_reset":
        raise WarmstartError(
            "A sharded checkpoint cannot keep two step counts per tensor for a stock resume. Pass it as warmstart_from to "
            "WarmstartTrainer(state_policy='asymmetric_reset'), or state_policy='carry'."
        )
    write_sharded_optimizer(state, plan, made / SHARDED_OPTIMIZER, state_policy, _mesh())


# -- one process or many ----------------------------------------------------------------------------------------------


def _mesh() -> DeviceMesh | None:
    """All ranks in a row; None where there is one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _staging(target: Path) -> Path:
    """A folder beside the target, the same for all ranks."""
    name = [tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-") if _is_main() else ""]
    if dist.is_initialized():
        dist.broadcast_object_list(name)
    return Path(name[0])


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _on_main(work: Callable[[], Result]) -> Result:
    """What the main rank's work gives, on every rank; where it fails, all of them do."""
    if not dist.is_initialized():
        return work()
    outcome: list[Any] = [None, None]
    fault: Exception | None = None
    if _is_main():
        try:
            outcome[0] = work()
        except Exception as raised:
            fault = raised
            outcome[1] = f"The main rank failed: {type(raised).__name__}: {raised}"
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise fault or WarmstartError(outcome[1])
    return outcome[0]


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
