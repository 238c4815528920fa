"""What becomes of a parent's training state: every source of it, every optimizer, every policy, each really done.

    python -m benchmarks.training_state --output docs/training-state.md

A tiny Llama is trained for some steps in true float64 with each optimizer. Its state is written in the form of each
source, by the functions that write it there; `read_parent_state` reads it back, `load_grown_state` puts it, grown, into
the optimizer of an exact copy in its parent's coordinates, and parent and child take the next steps side by side.

The generated parts of the document lie between markers; the text around them is kept. The first part depends on the
library alone, and a test makes it anew; the figures of the second depend on the machine.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate.checkpointing import save_accelerator_state
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.optimization import Adafactor
from transformers.trainer_callback import TrainerState

from hf_warmstart import WarmstartError
from hf_warmstart.checkpoints.state.parent_state import ParentState, read_parent_state
from hf_warmstart.cli.coverage import versions
from hf_warmstart.growth.grow import apply_plan
from hf_warmstart.growth.plan import GrowthPlan
from hf_warmstart.growth.precision import true_float64
from hf_warmstart.growth.state import STATE_POLICIES
from hf_warmstart.growth.twin import build
from hf_warmstart.training import GrownAdamW, load_grown_state
from tests.growth.test_parent_coordinates import (
    FIRST_STEPS,
    LEARNING_RATE,
    Lion,
    MakeOptimizers,
    name_groups,
    start_child,
    take_step,
    train_parent,
)

TABLE = "<!-- table: made by benchmarks.training_state -->", "<!-- table: end -->"
FIGURES = "<!-- figures: made by benchmarks.training_state -->", "<!-- figures: end -->"
COMMAND = "python -m benchmarks.training_state --output docs/training-state.md"
STEPS, TOLERANCE, LONGEST_REASON = 5, 1e-9, 420

# -- optimizers -------------------------------------------------------------------------------------------------------


class Adam8bit(torch.optim.Optimizer):
    """Keeps what bitsandbytes' 8-bit Adam keeps: two quantised moments, their maps and the scales of their blocks."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                entry = self.state[p]
                entry["step"] = entry.get("step", 0) + 1
                for k in (1, 2):
                    entry[f"state{k}"] = torch.zeros(p.shape, dtype=torch.uint8)
                    entry[f"qmap{k}"] = torch.zeros(256)
                    entry[f"absmax{k}"] = torch.zeros(-(-p.numel() // 256))
                p.sub_(group["lr"] * p.grad)


def _muon(groups: list[dict]) -> list[torch.optim.Optimizer]:
    """Muon takes matrices alone: all else is frozen."""
    for parameter in groups[1]["params"]:
        parameter.requires_grad_(False)
    return [torch.optim.Muon([groups[0], {"params": [], "weight_decay": 0.0}], lr=1e-2)]


OPTIMIZERS: dict[str, MakeOptimizers] = {
    "AdamW (torch)": lambda groups: [torch.optim.AdamW(groups, lr=LEARNING_RATE)],
    "AdamW (torch, fused)": lambda groups: [torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)],
    "AMSGrad": lambda groups: [torch.optim.AdamW(groups, lr=LEARNING_RATE, amsgrad=True)],
    "Adam, coupled decay": lambda groups: [torch.optim.Adam(groups, lr=LEARNING_RATE, eps=1e-4)],
    "SGD, momentum": lambda groups: [torch.optim.SGD(groups, lr=0.1, momentum=0.9)],
    "Lion": lambda groups: [Lion(groups, lr=3e-4)],
    "Adafactor (transformers)": lambda groups: [Adafactor(groups, lr=1e-2, relative_step=False, beta1=0.9)],
    "Adafactor (torch)": lambda groups: [torch.optim.Adafactor(groups, lr=1e-2)],
    "Muon (torch)": _muon,
    "8-bit Adam (bitsandbytes)": lambda groups: [Adam8bit(groups)],
    "unknown (Adagrad)": lambda groups: [torch.optim.Adagrad(groups, lr=1e-2)],
}

# -- sources ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A parent's run, to be written as a checkpoint."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def scheduler(self) -> LambdaLR:
        made = LambdaLR(copy.copy(self.optimizer), lambda step: 1.0)
        made.last_epoch = FIRST_STEPS
        return made

    def named_optimizer(self, whole: bool) -> dict[str, Any]:
        options = StateDictOptions(full_state_dict=whole, cpu_offload=whole)
        return get_optimizer_state_dict(self.model, self.optimizer, options=options)

    def write_trainer_files(self, folder: Path, config: bool = True) -> None:
        """What `Trainer` writes beside the optimizer."""
        TrainerState(global_step=FIRST_STEPS, epoch=1.0).save_to_json(str(folder / "trainer_state.json"))
        torch.save(self.scheduler.state_dict(), folder / "scheduler.pt")
        if config:
            self.model.config.save_pretrained(folder)


def _stock(run: Run, folder: Path) -> None:
    run.write_trainer_files(folder)
    torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")


def _ours(run: Run, folder: Path) -> None:
    run.write_trainer_files(folder)
    name_groups(run.model, run.optimizer)
    torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")
    for group in run.optimizer.param_groups:
        del group["param_names"]


def _accelerate(run: Run, folder: Path) -> None:
    save_accelerator_state(
        str(folder), [run.model.state_dict()], [run.optimizer], [run.scheduler], [], process_index=0, step=FIRST_STEPS,
        safe_serialization=False,
    )  # fmt: skip


def _full(run: Run, folder: Path) -> None:
    run.write_trainer_files(folder)
    torch.save(run.named_optimizer(whole=True), folder / "optimizer.bin")


def _sharded(run: Run, folder: Path) -> None:
    run.write_trainer_files(folder, config=False)
    state = {"optimizer": run.named_optimizer(whole=False)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what no_dist asks for
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "optimizer_0"), no_dist=True)


def _per_rank(run: Run, folder: Path) -> None:
    run.write_trainer_files(folder, config=False)
    torch.save(run.named_optimizer(whole=False), folder / "optimizer_0_rank0.bin")


def _deepspeed(run: Run, folder: Path) -> None:
    run.write_trainer_files(folder)
    (folder / "latest").write_text(f"global_step{FIRST_STEPS}")
    (folder / f"global_step{FIRST_STEPS}").mkdir()
    flat = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    torch.save(flat, folder / f"global_step{FIRST_STEPS}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


SOURCES: dict[str, Callable[[Run, Path], None]] = {
    "`Trainer`, DDP": _stock,
    "`WarmstartTrainer`": _ours,
    "`Accelerator.save_state`": _accelerate,
    "FSDP, full state": _full,
    "FSDP2, sharded (DCP)": _sharded,
    "FSDP, a file per rank": _per_rank,
    "DeepSpeed ZeRO": _deepspeed,
}

# -- a cell -----------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """What became of one state: *exact*, *defined* or *refused*, with the loss difference or the reason."""

    verdict: str
    worst: float | None = None
    reason: str = ""


@dataclass
class Parent:
    """A trained parent, its checkpoints, and the children that started from them."""

    plan: GrowthPlan
    run: Run
    make: MakeOptimizers
    children: dict[str, tuple] = field(default_factory=dict)

    def start_child(self) -> tuple:
        """The child in its parent's coordinates, its optimizers fresh."""
        with true_float64():
            return start_child(self.plan, self.run.model, self.make)

    def read(self, folder: Path, policy: str) -> ParentState:
        """The state in a folder as `WarmstartTrainer` reads it."""

        def parent_on_meta(config: Any) -> torch.nn.Module:
            parent = build(self.plan.model_class, self.plan.source_config, "meta")
            for ours, theirs in zip(parent.parameters(), self.run.model.parameters(), strict=True):
                ours.requires_grad_(theirs.requires_grad)
            return parent

        names = Trainer.get_decay_parameter_names
        return read_parent_state(
            folder, parent_on_meta, lambda model: names(None, model), optimizer=policy != "reset"  # type: ignore[arg-type]
        )  # fmt: skip


def _carry(parent: Parent, source: str, folder: Path) -> Cell:
    """Start a child from the state; `_follow` then measures it."""
    state = parent.read(folder, "carry")
    assert state.optimizer is not None and state.step == state.scheduler_step == FIRST_STEPS
    child = parent.start_child()
    load_grown_state(child[1][0], state.optimizer, parent.plan)
    parent.children[source] = child
    return Cell("defined")


def _asymmetric_reset(parent: Parent, folder: Path) -> Cell:
    """The state in a `GrownAdamW`: the moments of new entries are zero, those of old ones not, and it steps."""
    state = parent.read(folder, "asymmetric_reset")
    assert state.optimizer is not None
    with true_float64():
        child = apply_plan(parent.run.model, parent.plan)
    optimizer = GrownAdamW(child.parameters(), lr=LEARNING_RATE)
    name_groups(child, optimizer)
    load_grown_state(optimizer, state.optimizer, parent.plan, state_policy="asymmetric_reset")
    for entry in optimizer.state.values():
        for moment in (entry["exp_avg"], entry["exp_avg_sq"]):
            assert not moment[entry["new"]].any() and float(entry["born"]) == FIRST_STEPS
        assert entry["exp_avg_sq"][~entry["new"]].any()
    with true_float64():
        loss, _ = take_step(child, [optimizer], FIRST_STEPS)
    assert math.isfinite(loss)
    return Cell("defined")


def _reset(parent: Parent, folder: Path) -> Cell:
    """Nothing of the optimizer is read; its schedule's place is."""
    state = parent.read(folder, "reset")
    assert state.optimizer is None and state.scheduler_step == FIRST_STEPS
    return Cell("defined")


def _follow(parent: Parent, steps: int) -> dict[str, float]:
    """The largest difference of a loss of each child to its parent's over some steps."""
    worst = dict.fromkeys(parent.children, 0.0)
    with true_float64():
        for step in range(FIRST_STEPS, FIRST_STEPS + steps):
            loss, _ = take_step(parent.run.model, [parent.run.optimizer], step)
            for source, (child, optimizers, factors) in parent.children.items():
                worst[source] = max(worst[source], abs(loss - take_step(child, optimizers, step, factors)[0]))
    return worst


def measure(optimizer: str, root: Path, steps: int = STEPS) -> tuple[dict[tuple[str, str], Cell], float]:
    """The cells of one optimizer by source and policy, and the loss difference of a child without its parent's state."""
    make = OPTIMIZERS[optimizer]
    cells: dict[tuple[str, str], Cell] = {}
    with true_float64():
        plan, model, (made,) = train_parent("llama", make, num_hidden_layers=1)
    parent = Parent(plan, Run(model, made), make)
    for source, write in SOURCES.items():
        folder = Path(tempfile.mkdtemp(dir=root), f"checkpoint-{FIRST_STEPS}")
        folder.mkdir()
        write(parent.run, folder)
        for policy in STATE_POLICIES:
            try:
                if policy == "carry":
                    cell = _carry(parent, source, folder)
                else:
                    cell = (_reset if policy == "reset" else _asymmetric_reset)(parent, folder)
            except WarmstartError as refusal:
                cell = Cell("refused", reason=_reason(str(refusal)))
            cells[source, policy] = cell
    without = math.inf
    if parent.children:
        parent.children[""] = parent.start_child()
        worst = _follow(parent, steps)
        without = worst.pop("")
        for source, difference in worst.items():
            # A child that follows its parent even without a state would say nothing about the state.
            exact = difference < TOLERANCE < 1e-6 < without
            cells[source, "carry"] = Cell("exact" if exact else "defined", difference)
    return cells, without


def _reason(message: str) -> str:
    """A refusal on one line: its first lines and its last, which says what to do."""
    lines = [line.strip() for line in message.splitlines()]
    text = " ".join(lines if len(lines) < 4 else [*lines[:2], "...", lines[-1]])
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


# -- the document -----------------------------------------------------------------------------------------------------

Cells = Mapping[str, Mapping[tuple[str, str], Cell]]


def table(cells: Cells) -> str:
    """One table per policy, and the reasons of what is refused."""
    reasons: dict[str, int] = {}
    parts = []
    for policy in STATE_POLICIES:
        lines = [f"| `{policy}` | " + " | ".join(SOURCES) + " |", "|---|" + "---|" * len(SOURCES)]
        for optimizer, of_optimizer in cells.items():
            row = []
            for source in SOURCES:
                cell = of_optimizer[source, policy]
                note = f" [{reasons.setdefault(cell.reason, len(reasons) + 1)}]" if cell.reason else ""
                row.append(cell.verdict + note)
            lines.append(f"| {optimizer} | " + " | ".join(row) + " |")
        parts.append("\n".join(lines))
    parts.append("What is refused says:")
    parts.append("\n".join(f"{number}. {_safe(reason)}" for reason, number in reasons.items()))
    return "\n\n".join(parts)


def _safe(text: str) -> str:
    for sign in "\\*_|[]":
        text = text.replace(sign, "\\" + sign)
    return text.replace("<", "&lt;").replace(">", "&gt;")


def figures(cells: Cells, without: Mapping[str, float], longer: Mapping[int, tuple[float, float]]) -> str:
    """What was measured: differences of loss with the state and without, and Muon's over more steps."""
    lines = [
        f"Largest difference of a loss of parent and child over {STEPS} steps, in float64, over all sources; with "
        + ", ".join(f"{name} {version}" for name, version in versions().items())
        + ".",
        "",
        "| optimizer | state carried | without the state |",
        "|---|--:|--:|",
    ]
    for optimizer, of_optimizer in cells.items():
        found = [cell.worst for cell in of_optimizer.values() if cell.worst is not None]
        if found:
            lines.append(f"| {optimizer} | {max(found):.0e} | {without[optimizer]:.0e} |")
    lines += ["", "Muon, whose Newton-Schulz iteration runs in bfloat16, over more steps:", ""]
    lines += ["| steps | state carried | without the state |", "|--:|--:|--:|"]
    lines += [f"| {steps} | {carried:.1e} | {fresh:.1e} |" for steps, (carried, fresh) in longer.items()]
    return "\n".join(lines)


def measure_all(names: Mapping[str, Any] = OPTIMIZERS) -> tuple[Cells, dict[str, float]]:
    """Every cell, and per optimizer the loss difference without the state."""
    cells, without = {}, {}
    with tempfile.TemporaryDirectory() as root:
        for optimizer in names:
            cells[optimizer], without[optimizer] = measure(optimizer, Path(root))
    return cells, without


def between(text: str, markers: tuple[str, str]) -> str:
    """The generated part of a document between two markers."""
    return text.split(markers[0])[1].split(markers[1])[0].strip()


def _replaced(text: str, markers: tuple[str, str], part: str) -> str:
    before, rest = text.split(markers[0])
    after = rest.split(markers[1])[1]
    return f"{before}{markers[0]}\n\n{part}\n\n{markers[1]}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what becomes of a parent's training state.")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="document with the markers")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    text = output.read_text()
    cells, without = measure_all()
    longer = {}
    for steps in (20, 100):
        with tempfile.TemporaryDirectory() as root:
            of_muon, fresh = measure("Muon (torch)", Path(root), steps)
            carried = max(cell.worst for cell in of_muon.values() if cell.worst is not None)
            longer[steps] = carried, fresh
    text = _replaced(text, TABLE, table(cells))
    output.write_text(_replaced(text, FIGURES, figures(cells, without, longer)))


if __name__ == "__main__":
    main()
