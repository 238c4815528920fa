"""What ranks do in `test_sharded`: train a parent under FSDP2, save it as `Trainer` does, grow it, train the child.

`accelerate` does not shard on a CPU, so models are sharded here by `fully_shard`; saving and loading are accelerate's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils.fsdp_utils import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, get_cosine_schedule_with_warmup

from hf_warmstart import WarmstartTrainer, grow_checkpoint, plan_growth
from hf_warmstart.checkpoints.state.parent_state import read_parent_state
from hf_warmstart.checkpoints.torch_files.sharded import ShardedFolder
from hf_warmstart.checkpoints.weights import whole as whole_weights
from hf_warmstart.growth.plan import GrowthPlan
from hf_warmstart.growth.twin import build
from hf_warmstart.training import load_grown_state, load_grown_weights

from ..models import some_tokens, tiny_model

BATCH = 6  # shared evenly by one, two or three ranks
PARENT_STEPS, CHILD_STEPS, WARMUP = 6, 5, 2
WEIGHTS, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
GROWTH = {"width": 2, "depth": 2, "seed": 4}


# -- training ---------------------------------------------------------------------------------------------------------


def sharded(model: PreTrainedModel) -> PreTrainedModel:
    """A model under FSDP2 on all ranks, wrapped layer by layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def optimizer_of(model: nn.Module, named: bool = False) -> torch.optim.AdamW:
    """AdamW in Trainer's groups, or with the parameters' names beside them as WarmstartTrainer has it."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    parameters = dict(model.named_parameters())
    names = [[n for n in parameters if n in decayed], [n for n in parameters if n not in decayed]]
    groups = [
        {"params": [parameters[n] for n in part], "weight_decay": decay} | ({"param_names": part} if named else {})
        for part, decay in zip(names, (0.1, 0.0), strict=True)
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


def schedule_of(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """A cosine over the parent's and the child's steps."""
    return get_cosine_schedule_with_warmup(optimizer, WARMUP, PARENT_STEPS + CHILD_STEPS)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: LambdaLR, start: int, steps: int
) -> list[float]:
    """Steps on two batches in turn, each rank on its part of them; the mean loss of every step."""
    several = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    found = []
    model.train()
    for step in range(start, start + steps):
        ids = some_tokens(BATCH, 16, seed=100 + step % 2).chunk(world)[rank]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if several:
            dist.all_reduce(mean)
        found.append(float(mean) / world)
    return found


# -- accelerate's own files -------------------------------------------------------------------------------------------


def _accelerate() -> tuple[FullyShardedDataParallelPlugin, Any]:
    """What accelerate's functions ask of a plugin and an accelerator."""
    PartialState(cpu=True)  # which its logger asks for
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    accelerator = SimpleNamespace(
        process_index=dist.get_rank(),
        num_processes=dist.get_world_size(),
        is_main_process=dist.get_rank() == 0,
        is_fsdp2=True,
        wait_for_everyone=dist.barrier,
    )
    return plugin, accelerator


def save_as_trainer(folder: Path, model: PreTrainedModel, optimizer: Any, schedule: LambdaLR, step: int) -> None:
    """The files of a Trainer's checkpoint under FSDP2."""
    plugin, accelerator = _accelerate()
    save_fsdp_model(plugin, accelerator, model, str(folder))
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder))
    torch.save({"python": None}, folder / f"rng_state_{dist.get_rank()}.pth")
    if dist.get_rank() == 0:
        model.config.save_pretrained(folder)
        torch.save(schedule.state_dict(), folder / "scheduler.pt")
        state = {"global_step": step, "epoch": 0.5, "train_batch_size": BATCH, "log_history": []}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    dist.barrier()


def load_as_trainer(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Load a checkpoint as a resumed Trainer does, into a sharded model and its optimizer."""
    plugin, accelerator = _accelerate()
    load_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder))
    load_fsdp_model(plugin, accelerator, model, str(folder))


# -- jobs -------------------------------------------------------------------------------------------------------------


def train_parent(folder: str) -> None:
    """Train a tiny parent and save it."""
    model = tiny_model("llama", randomised=False, num_hidden_layers=2)
    model.config.architectures = [type(model).__name__]
    model = sharded(model)
    optimizer = optimizer_of(model)
    schedule = schedule_of(optimizer)
    losses = train(model, optimizer, schedule, 0, PARENT_STEPS)
    save_as_trainer(Path(folder), model, optimizer, schedule, PARENT_STEPS)
    _report(Path(folder) / "losses.json", losses)


def grow_on_ranks(parent: str, grown: str) -> None:
    """`grow_checkpoint`, every rank taking part."""
    grow_checkpoint(parent, grown, **GROWTH)


def grow_whole_on_ranks(parent: str, grown: str, reports: str) -> None:
    """`grow_checkpoint` of a checkpoint that is not sharded; every rank reports the record."""
    record = grow_checkpoint(parent, grown, **GROWTH)
    Path(reports, f"record-{dist.get_rank()}.json").write_text(json.dumps(record.to_dict()))


def fail_to_grow_on_ranks(parent: str, grown: str, reports: str) -> None:
    """The main rank cannot write: all ranks report what they raise."""
    if dist.get_rank() == 0:
        whole_weights.stream_weights = _full_disk
    try:
        grow_checkpoint(parent, grown, **GROWTH)
    except Exception as fault:
        Path(reports, f"fault-{dist.get_rank()}.txt").write_text(str(fault))


def _full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def resume_by_our_trainer(grown: str, again: str, report: str) -> None:
    """Resume, and save once more, by the methods of WarmstartTrainer, whose groups hold names."""
    model = sharded(wrong_model(AutoConfig.from_pretrained(grown)))
    optimizer = optimizer_of(model, named=True)
    plugin, accelerator = _accelerate()
    accelerator.state = SimpleNamespace(fsdp_plugin=plugin)
    trainer = WarmstartTrainer.__new__(WarmstartTrainer)  # made by hand: on a CPU accelerate does not shard
    trainer.__dict__ |= {
        "args": SimpleNamespace(world_size=dist.get_world_size(), should_save=False, device=torch.device("cpu")),
        "accelerator": accelerator,
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": schedule_of(optimizer),
        "is_fsdp_enabled": True,
        "is_deepspeed_enabled": False,
        "is_fsdp_xla_v1_enabled": False,
    }
    trainer._load_optimizer_and_scheduler(grown)
    trainer._load_from_checkpoint(grown)
    trainer._save_optimizer_and_scheduler(again)
    assert all("param_names" in group for group in optimizer.param_groups)
    _continue(model, optimizer, Path(grown), Path(report))


def continue_grown(grown: str, report: str) -> None:
    """Resume a grown checkpoint as a Trainer would, and train."""
    model = sharded(wrong_model(AutoConfig.from_pretrained(grown)))
    optimizer = optimizer_of(model)
    load_as_trainer(Path(grown), model, optimizer)
    _continue(model, optimizer, Path(grown), Path(report))


def continue_parent(parent: str, report: str) -> None:
    """Grow a parent straight into a sharded child and its optimizer, and train."""
    plan = plan_growth(parent, **GROWTH)
    model = sharded(wrong_model(plan.target_config))
    optimizer = optimizer_of(model, named=True)
    load_grown_from(Path(parent), model, optimizer, plan)
    _continue(model, optimizer, Path(parent), Path(report))


def continue_training(model: nn.Module, optimizer: Any, checkpoint: Path) -> list[float]:
    """The losses of the child's steps, with the schedule of a checkpoint."""
    schedule = schedule_of(optimizer)
    schedule.load_state_dict(torch.load(checkpoint / "scheduler.pt", weights_only=True))
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    return train(model, optimizer, schedule, PARENT_STEPS, CHILD_STEPS)


def _continue(model: nn.Module, optimizer: Any, checkpoint: Path, report: Path) -> None:
    _report(report, continue_training(model, optimizer, checkpoint))


def _report(path: Path, value: Any) -> None:
    if dist.get_rank() == 0:
        path.write_text(json.dumps(value))


def wrong_model(config: Any) -> PreTrainedModel:
    """A model of a config whose weights are all wrong: a loader that leaves any out shows."""
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return model


def load_grown_from(parent: Path, model: nn.Module, optimizer: Any, plan: GrowthPlan) -> None:
    """Weights and optimizer state of a sharded parent, grown into a child that is sharded or whole."""
    load_grown_weights(model, ShardedFolder(parent / WEIGHTS).weights(), plan)
    load_grown_state(optimizer, _optimizer_state(parent, plan), plan)


def _optimizer_state(parent: str | Path, plan: GrowthPlan) -> dict[str, Any]:
    """A parent's optimizer state by name."""
    state = read_parent_state(
        parent,
        lambda config: build(plan.model_class, plan.source_config, "meta"),
        lambda model: Trainer.get_decay_parameter_names(None, model),  # type: ignore[arg-type]
    )
    assert state.optimizer is not None
    return state.optimizer


# -- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that torch's allocator had handed out at once while something ran, over what it had before: by the
    profiler's record of every allocation, whoever asked for it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measure(parent: str, grown: str, report: str) -> None:
    """Peak memory of a rank in `grow_checkpoint` and in loading a grown state, beside its share and its largest tensor."""
    plan = plan_growth(parent, **GROWTH)
    model = sharded(wrong_model(plan.target_config))
    optimizer = optimizer_of(model, named=True)
    weights = ShardedFolder(Path(parent) / WEIGHTS).weights()
    state = _optimizer_state(parent, plan)
    peaks = {
        "growing": peak_bytes(lambda: grow_checkpoint(parent, grown, **GROWTH)),
        "loading weights": peak_bytes(lambda: load_grown_weights(model, weights, plan)),
        "loading state": peak_bytes(lambda: load_grown_state(optimizer, state, plan)),
    }
    held = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, DTensor)]
    found = {
        "peaks": peaks,
        "share": sum(_local_bytes(parameter) for parameter in model.parameters()),
        "share of state": sum(_local_bytes(value) for value in held),
        "whole": 4 * plan.parameters_after,
        "tensor": 4 * max(torch.Size(shape).numel() for shape in plan.target_shapes.values()),
        "tensors": len(plan.names),
    }
    _report(Path(report), found)


def _local_bytes(tensor: Any) -> int:
    """What a rank holds for a sharded tensor: the memory behind it, not only what it shows."""
    return tensor.to_local().untyped_storage().nbytes()


def train_deep_parent(folder: str) -> None:
    """A parent of whose state one tensor is a small part, trained for a step."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 8}
    model = sharded(tiny_model("llama", randomised=False, **sizes))
    optimizer = optimizer_of(model)
    schedule = schedule_of(optimizer)
    train(model, optimizer, schedule, 0, 1)
    save_as_trainer(Path(folder), model, optimizer, schedule, 1)
