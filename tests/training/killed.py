"""A run that is killed again and again, as a program: `python -m tests.training.killed FOLDER KILLS SEED`.

The imports are paid once: each attempt is a fork that does what a restarted script does. It grows the parent, makes a
`WarmstartTrainer(warmstart_from=parent)` and trains from the last checkpoint that transformers finds, if it finds one.
Attempts are killed in turn at a random moment after a random step (SIGKILL from outside, in forward passes as in the
middle of a file) and at a random file operation (SIGKILL by itself, between any two of those that a save consists of).
After each kill every folder named `checkpoint-N` is read. Prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_utils import get_last_checkpoint

from hf_warmstart import WarmstartTrainer, WarmstartTrainingArguments, grow
from hf_warmstart.checkpoints.state.parent_state import GROWN_NAME
from hf_warmstart.checkpoints.target.complete import STAGING

from ..models import some_tokens, tiny_model

PARENT_STEPS, STEPS_PER_KILL = 4, 5
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "head_dim": 8, "attention_dropout": 0.1}
OPTIONS = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
OPTIONS |= {"learning_rate": 3e-3, "warmup_steps": 2, "lr_scheduler_type": "cosine", "logging_steps": 1}
OPTIONS |= {"per_device_train_batch_size": 2, "log_level": "error"}
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def data() -> list[dict[str, list[int]]]:
    """Random blocks; a pass over them takes 11 steps."""
    return [{"input_ids": ids, "labels": ids} for ids in some_tokens(21, 8, seed=11).tolist()]


def train_parent(folder: Path) -> Path:
    """The parent, by a stock Trainer; its checkpoint."""
    arguments = TrainingArguments(str(folder), max_steps=PARENT_STEPS, save_steps=PARENT_STEPS, **OPTIONS)
    Trainer(tiny_model("llama", **TINY), arguments, default_data_collator, data()).train()
    return folder / f"checkpoint-{PARENT_STEPS}"


class Killer(TrainerCallback):
    """Tells each step to the process that waits, or dies at a file operation."""

    def __init__(self, pipe: int | None, operation: int | None):
        self.pipe, self.operation = pipe, operation

    def on_train_begin(self, args, state, control, **kwargs):
        if self.operation is not None:
            sys.addaudithook(self.count)

    def on_step_end(self, args, state, control, **kwargs):
        if self.pipe is not None:
            os.write(self.pipe, b".")

    def count(self, event: str, arguments: tuple) -> None:
        """An audit hook: Python tells it of every file operation."""
        if event in FILE_EVENTS and not (event == "open" and arguments[1] in ("r", "rb")):
            self.operation -= 1
            if self.operation == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def attempt(parent: Path, folder: Path, steps: int, pipe: int | None = None, operation: int | None = None) -> bool:
    """What a user's script does at each start; whether it took the parent's state."""
    torch.manual_seed(0)
    model = grow(LlamaForCausalLM.from_pretrained(parent), width=2)
    trainer = WarmstartTrainer(
        model,
        WarmstartTrainingArguments(str(folder), max_steps=steps, save_steps=2, save_total_limit=2, **OPTIONS),
        default_data_collator,
        data(),
        warmstart_from=parent,
        callbacks=[Killer(pipe, operation)],
    )
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    return trainer.parent_state is not None


def killed_attempt(parent: Path, folder: Path, steps: int, chance: random.Random, by_time: bool) -> int:
    """One attempt in a process of its own, killed; how it ended, as `os.waitpid` says."""
    moment = chance.randint(1, 3), chance.uniform(0, 0.03)
    operation = None if by_time else chance.randint(1, 40)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        try:
            attempt(parent, folder, steps, writing if by_time else None, operation)
        except BaseException as fault:
            (folder / "fault.txt").write_text(repr(fault))
            os._exit(1)
        os._exit(0)
    os.close(writing)
    if by_time:
        for _ in range(moment[0]):
            os.read(reading, 1)  # returns at once where the child has ended
        time.sleep(moment[1])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reading)
    return status


def faults_of(folder: Path, whole: set[str]) -> list[str]:
    """What is wrong with the checkpoints in a folder: each must have all files, and each file must be readable."""
    faults = []
    for checkpoint in folder.glob("checkpoint-*"):
        if missing := whole - {path.name for path in checkpoint.iterdir()}:
            faults.append(f"{checkpoint.name} lacks {sorted(missing)}")
            continue
        try:
            load_file(checkpoint / "model.safetensors")
            for name in (GROWN_NAME, "scheduler.pt"):
                torch.load(checkpoint / name, weights_only=True)
            if json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] != int(checkpoint.name[11:]):
                faults.append(f"{checkpoint.name} is of another step")
        except Exception as fault:
            faults.append(f"{checkpoint.name}: {fault!r}")
    return faults


def staged(folder: Path) -> set[tuple[str, int]]:
    """What lies in the staging folder."""
    return {(path.name, path.stat().st_ino) for path in (folder / STAGING).glob("*")}


def main(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Train once without a stop, once with `kills` of them, in `folder/whole` and `folder/killed`."""
    chance, steps = random.Random(seed), STEPS_PER_KILL * (kills + 2)
    parent = train_parent(folder / "parent")
    attempt(parent, folder / "whole", steps)
    names = {path.name for path in Path(get_last_checkpoint(folder / "whole")).iterdir()}
    killed, faults, found, starts, saving = folder / "killed", [], [], [], 0
    killed.mkdir()
    for number in range(kills):
        last = get_last_checkpoint(killed)
        starts.append(0 if last is None else int(Path(last).name[11:]))
        before = staged(killed)
        status = killed_attempt(parent, killed, steps, chance, by_time=number % 2 == 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            faults.append(f"attempt {number} was not killed: {status}")
        saving += not staged(killed) <= before
        found += faults_of(killed, names)
    if (killed / "fault.txt").exists():
        faults.append((killed / "fault.txt").read_text())
    starts.append(int(Path(get_last_checkpoint(killed) or "checkpoint-0").name[11:]))
    warm = attempt(parent, killed, steps)
    return {"starts": starts, "while_saving": saving, "faults": faults, "half_written": found, "last_is_warm": warm}


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write("\n" + json.dumps(result) + "\n")
