"""What `test_fsdp` launches: trainers under FSDP2, made by `Trainer` and accelerate themselves.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml -m tests.training.fsdp_job jobs.json

accelerate shards on GPUs only, though nothing in FSDP2 asks for one. So on a CPU it is told that its processes are such as
FSDP is for.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from hf_warmstart import WarmstartTrainer, WarmstartTrainingArguments, grow, grow_checkpoint

from .conftest import COMMON, blocks
from .sharded_jobs import wrong_model


def shard_on_cpus_too() -> None:
    """Let accelerate take processes on CPUs for such as FSDP is for."""
    if torch.cuda.is_available():
        return

    def on_cpu(state: PartialState) -> None:
        state.device = torch.device("cpu")

    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[assignment]
    PartialState.set_device = on_cpu  # type: ignore[method-assign]


def train(model: str, output: str, options: dict) -> None:
    """A stock Trainer, from weights."""
    _run(Trainer, TrainingArguments, AutoModelForCausalLM.from_pretrained(model), output, 0, options)


def resume(checkpoint: str, output: str, options: dict) -> None:
    """A stock Trainer, from a checkpoint with a config, into a model whose weights are all wrong."""
    model = wrong_model(AutoConfig.from_pretrained(checkpoint))
    _run(Trainer, TrainingArguments, model, output, 0, options, resume_from=checkpoint)


def grow_on_all(source: str, output: str, growth: dict) -> None:
    """`grow_checkpoint` in the trainers' process group."""
    grow_checkpoint(source, output, **growth)


def warmstart(model: str, parent: str, output: str, first: int, growth: dict, options: dict) -> None:
    """WarmstartTrainer, from a parent's weights and its sharded state."""
    child = grow(AutoModelForCausalLM.from_pretrained(model), **growth)
    _run(WarmstartTrainer, WarmstartTrainingArguments, child, output, first, options, warmstart_from=parent)


def resume_ours(checkpoint: str, output: str, first: int, options: dict) -> None:
    """WarmstartTrainer, from a checkpoint of its own."""
    model = wrong_model(AutoConfig.from_pretrained(checkpoint))
    _run(WarmstartTrainer, WarmstartTrainingArguments, model, output, first, options, resume_from=checkpoint)


JOBS: dict[str, Callable] = {f.__name__: f for f in (train, resume, grow_on_all, warmstart, resume_ours)}


def _run(trainer_class, arguments_class, model, output, first, options, resume_from=None, **more) -> None:
    arguments = arguments_class(output, **(COMMON | {"use_cpu": False} | options))
    data = blocks(first, arguments.max_steps)
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=data, data_collator=default_data_collator, **more
    )
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()


def main() -> None:
    """Jobs from a file, one after the other; or a script with its own arguments."""
    shard_on_cpus_too()
    if not sys.argv[1].endswith(".json"):
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    PartialState()  # which makes the process group
    for name, arguments in json.loads(Path(sys.argv[1]).read_text()):
        JOBS[name](**arguments)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
