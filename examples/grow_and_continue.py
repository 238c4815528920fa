"""Grow a Trainer checkpoint and go on training: one process, several with DDP, or several with FSDP2.

The parent may have been trained on any number of devices. Its folder is a checkpoint of `Trainer`, with its weights,
optimizer and schedule; the data are blocks of token ids, a `datasets.Dataset` with `input_ids` of one length, written by
`save_to_disk`. All fields of `WarmstartTrainingArguments` are options.

One process:

    python examples/grow_and_continue.py --parent runs/base/checkpoint-500 --data blocks --width 2 --depth 2 \
        --output_dir runs/grown --max_steps 1000 --learning_rate 3e-4 --lr_scheduler_type cosine

Several, each with the whole model (on CPUs add --use_cpu at the end; `accelerate launch --cpu` starts one process only):

    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 8 \
        examples/grow_and_continue.py --parent runs/base/checkpoint-500 --data blocks --width 2 --depth 2 \
        --output_dir runs/grown --max_steps 1000 --gradient_accumulation_steps 4

Several, each with a share of it (GPUs only: on a CPU accelerate does not shard):

    accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 8 \
        examples/grow_and_continue.py --parent runs/base/checkpoint-500 --data blocks --width 2 --depth 2 \
        --output_dir runs/grown --max_steps 1000

A run that was stopped goes on when the same command is given again. Where FSDP2 wrote the parent's weights in shards
(`pytorch_model_fsdp_0`), put them together first, and the model's config beside them, which `Trainer` leaves out; the
optimizer is read from the shards as it is:

    accelerate merge-weights runs/base/checkpoint-500/pytorch_model_fsdp_0 runs/base/checkpoint-500
    cp base-model/config.json runs/base/checkpoint-500

Under `SHARDED_STATE_DICT` the last checkpoint is all that a run leaves: `save_model` writes whole weights only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM, HfArgumentParser, default_data_collator
from transformers.trainer_utils import get_last_checkpoint

from hf_warmstart import GrowthRecord, WarmstartTrainer, WarmstartTrainingArguments, grow


@dataclass
class GrowthArguments:
    """What is grown, and what it is trained on."""

    parent: str = field(metadata={"help": "The parent's checkpoint, such as runs/base/checkpoint-500."})
    data: str = field(
        metadata={"help": "A folder written by Dataset.save_to_disk: blocks of input_ids of one length."}
    )
    width: float = field(default=1.0, metadata={"help": "Factor on the hidden size."})
    depth: float = field(default=1.0, metadata={"help": "Factor on the number of layers."})
    growth_seed: int = field(default=0, metadata={"help": "Seed of the growth; the same on every process."})


def blocks_in(folder: str) -> Dataset:
    """The training data, each block its own target."""
    blocks = load_from_disk(folder)
    return blocks if "labels" in blocks.column_names else blocks.add_column("labels", blocks["input_ids"][:])


def main() -> None:
    """Grow, train, save."""
    growth, args = HfArgumentParser((GrowthArguments, WarmstartTrainingArguments)).parse_args_into_dataclasses()
    # Every process grows the same child: what is random in it depends on the seed and the names alone.
    parent = AutoModelForCausalLM.from_pretrained(growth.parent)
    child = grow(parent, width=growth.width, depth=growth.depth, seed=growth.growth_seed)
    del parent

    trainer = WarmstartTrainer(
        model=child,
        args=args,
        train_dataset=blocks_in(growth.data),
        data_collator=default_data_collator,
        warmstart_from=growth.parent,
    )
    # Resuming takes weights and state from this run's own checkpoint; nothing is grown or carried a second time.
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        before, after = GrowthRecord.all_of(child.config)[-1].parameters
        print(f"{before:,} -> {after:,} parameters, {trainer.state.global_step} steps on {args.world_size} processes")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
