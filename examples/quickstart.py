"""Grow a small model and see whether it pays: the whole way in a few minutes, with no network and no arguments.

    python examples/quickstart.py                                     # text that every Python has
    python examples/quickstart.py --model runs/base/checkpoint-500 --train-text corpus/

A small Llama-style parent is trained with AdamW, grown about twofold, and continued from its optimizer state. Beside it
run: the same with a fresh state; a model of the child's size from scratch, at several budgets; and the parent itself,
not grown, continued for the same compute. Fair by construction: every run sees the same stream of new data in the same
order (block k of a stream depends on the seed alone), with the same batch, the same warm-up, plateau and decay, and
every loss that is compared comes from a decayed run. Learning rates are tuned by the same short trials for parent, scratch,
grown model and the parent that continues. Losses are compared on held-out files.

Left behind: the grown model with its card, `curves.png` and `report.json` (see `docs/tokens-to-loss.md`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from quickstart_arms import Arm, Result, Setup, flops_per_token, run_arm, start_worker
from quickstart_report import Costs, make_report, plot
from quickstart_text import blocks, load_corpus, spread, train_tokenizer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.utils import logging

from hf_warmstart import GrowthPlan, WarmstartError, plan_growth
from hf_warmstart.hub import save_grown

LENGTH, BATCH, VOCABULARY = 128, 16, 1024
# Learning rates that are tried first; where the best is the lowest or highest, one beyond it is tried as well.
GRIDS = {"base": (4e-3, 8e-3, 16e-3), "scratch": (2e-3, 4e-3, 8e-3), "grown": (1e-3, 2e-3, 4e-3)}
GRIDS["control"] = GRIDS["grown"]
WARMUP, DECAY = 20, 0.2
BASE_STEPS, STEPS = 2000, 500
# Short runs prefer rates that are too low for longer ones, so trials are half as long as what they tune.
TRIAL_STEPS = {"base": 150, "scratch": 250, "grown": 250}  # the control: as many FLOPs as the grown model
EVALUATED_BLOCKS = 96
PARENT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
}


def main() -> None:
    """Run all arms and leave the report."""
    options = _options()
    console = Console()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as work:
            report = Experiment(options, Path(work), console).run()
    except WarmstartError as error:
        sys.exit(f"quickstart: {error}")
    console.print()
    for line in report["verdict"]:
        console.print(f"- {line}", highlight=False, soft_wrap=True)
    console.print(
        f"\n{time.perf_counter() - start:.0f} s in all. Model, card, curves and report lie in {options.output}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Grow a small model, continue it, and compare.")
    add = parser.add_argument
    add("--model", help="a trained parent: folder or Hub id; a Trainer checkpoint carries its optimizer's state")
    add("--train-text", help="file or folder of text to learn from")
    add("--dataset", help="or a dataset: Hub id or folder")
    add("--text-column", default="text", help="its column (default: text)")
    add("--eval-text", help="file or folder: the second held-out domain")
    add("--output", default="runs/quickstart", help="folder to leave (default: runs/quickstart)")
    add("--width", type=float, help="factor of the width (default: 1.5 unless --depth is given)")
    add("--depth", type=float, help="factor of the number of layers")
    add("--width-operator", default="auto", help="as in GrowthConfig (default: auto)")
    add("--depth-operator", default="identity_blocks")
    add("--budget", type=float, default=1.0, help="multiplies every number of steps (default: 1)")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=2, help="processes, one thread each (default: 2)")
    add("--quick", action="store_true", help="a run of seconds that shows that everything works, and nothing else")
    options = parser.parse_args()
    if options.train_text and options.dataset:
        parser.error("pass --train-text or --dataset, not both")
    if options.budget <= 0 or options.workers < 1:
        parser.error("--budget must be positive and --workers at least 1")
    return options


class Experiment:
    """All arms in worker processes, each as soon as what it needs is there."""

    def __init__(self, options: argparse.Namespace, work: Path, console: Console):
        self.options, self.work, self.console = options, work, console
        scale = 0.03 if options.quick else options.budget
        self.base_steps, self.steps = (max(32, round(steps * scale)) for steps in (BASE_STEPS, STEPS))
        self.trial_steps = {what: max(8, round(steps * scale)) for what, steps in TRIAL_STEPS.items()}
        self.growth = {
            name: getattr(options, name)
            for name in ("width", "depth", "width_operator", "depth_operator", "seed")
            if getattr(options, name) is not None
        }
        if options.width is None and options.depth is None:
            self.growth["width"] = 1.5
        self.grids = {what: grid[1:2] if options.quick else grid for what, grid in GRIDS.items()}
        self.trials: dict[str, dict[float, float]] = {}

    # -- the whole ------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Prepare, train, compare, and leave the folder."""
        plan = self._prepare()
        context = multiprocessing.get_context("spawn")
        queue, stop = context.Manager().Queue(), context.Manager().Event()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with (
            ProcessPoolExecutor(self.options.workers, context, start_worker, (queue, stop)) as pool,
            Progress(*columns, console=self.console, transient=True) as progress,
        ):
            try:
                results = Scheduler(self, pool, queue, progress).run()
            finally:
                stop.set()
        costs = Costs(
            BATCH * self.length,
            *self.flops,
            None if self.options.model else self.base_steps * BATCH * self.length * self.flops[0],
        )
        report = make_report(results, self.steps, costs, self._facts(plan))
        self._leave(results["carried"], report)
        return report

    def _prepare(self) -> GrowthPlan:
        """Text, tokenizer, blocks and configs, in the work folder."""
        options = self.options
        with self.console.status("reading text and training a tokenizer" if not options.model else "reading text"):
            self.corpus = load_corpus(options.train_text, options.dataset, options.text_column, options.eval_text)
            if options.model:
                config = AutoConfig.from_pretrained(options.model)
                self.tokenizer = AutoTokenizer.from_pretrained(options.model)
            else:
                self.tokenizer = train_tokenizer(self.corpus.train, VOCABULARY)
                ends = {f"{kind}_token_id": self.tokenizer.eos_token_id for kind in ("bos", "eos")}
                config = LlamaConfig(**PARENT, **ends)
            self.length = min(LENGTH, config.max_position_embeddings)
            data = {
                "train": blocks(self.tokenizer, self.corpus.train, self.length),
                "source": spread(blocks(self.tokenizer, self.corpus.source, self.length), EVALUATED_BLOCKS),
                "docs": spread(blocks(self.tokenizer, self.corpus.docs, self.length), EVALUATED_BLOCKS),
            }
            short = [name for name, rows in data.items() if len(rows) < 8]
            if short:
                raise WarmstartError(f"Too little text for {short}: fewer than 8 blocks of {self.length} tokens.")
            torch.save(data, self.work / "blocks.pt")
            plan = plan_growth(config, **self.growth)
            config.save_pretrained(self.work / "base-config")
            plan.target_config.save_pretrained(self.work / "scratch-config")
        self.flops = tuple(flops_per_token(c, self.length) for c in (plan.source_config, plan.target_config))
        self.train_tokens = data["train"].numel()
        self.console.print(f"[bold]{self.corpus.name}[/bold], {self.train_tokens:,} tokens to learn from")
        self.console.print(str(plan), highlight=False)
        if options.model and not self.setup(options.model, 0).carries:
            self.console.print(
                f"{options.model} holds no optimizer.pt and scheduler.pt: the grown model starts with a fresh state"
            )
        return plan

    def setup(self, parent: str, evaluations: int) -> Setup:
        """What the arms share, for a parent's folder ('' before there is one)."""
        carries = bool(parent) and all(Path(parent, name).is_file() for name in ("optimizer.pt", "scheduler.pt"))
        step = json.loads(Path(parent, "trainer_state.json").read_text())["global_step"] if carries else 0
        seed = self.options.seed
        warmup = min(WARMUP, min(self.trial_steps.values()) // 4)
        return Setup(
            str(self.work), parent, self.growth, carries, step, BATCH, self.length, warmup, DECAY, evaluations, seed
        )

    @property
    def control_steps(self) -> int:
        """Steps in which the parent spends the compute of the grown arm."""
        return round(self.steps * self.flops[1] / self.flops[0])

    def trial_length(self, what: str) -> int:
        """Steps of a trial; the control's cost what the grown model's cost."""
        if what == "control":
            return round(self.trial_steps["grown"] * self.flops[1] / self.flops[0])
        return self.trial_steps[what]

    @property
    def longest_scratch(self) -> int:
        """Steps of the longest run from scratch: the compute of base and growth together, where that is known."""
        if self.options.model:
            return 2 * self.steps
        return self.steps + max(self.steps // 2, round(self.base_steps * self.flops[0] / self.flops[1]))

    def _facts(self, plan: GrowthPlan) -> dict[str, Any]:
        return {
            "corpus": {"name": self.corpus.name, "digest": self.corpus.digest, "train_tokens": self.train_tokens},
            "parameters": [plan.parameters_before, plan.parameters_after],
            "growth_config": plan.growth_config.to_dict(),
            "base": self.options.model or {"steps": self.base_steps, "tokens": self.base_steps * BATCH * self.length},
            "batch": BATCH,
            "length": self.length,
            "warmup_steps": WARMUP,
            "decay_share": DECAY,
            "seed": self.options.seed,
            "state_carried": not self.options.model or self.setup(self.options.model, 0).carries,
            "quick": self.options.quick,
            "learning_rate_trials": {
                "steps": {what: self.trial_length(what) for what in self.grids},
                "loss": {
                    kind: {f"{rate:g}": loss for rate, loss in found.items()} for kind, found in self.trials.items()
                },
                "at_edge": [kind for kind, found in self.trials.items() if len(found) > 2 and _at_edge(found)],
            },
        }

    def _leave(self, grown: Result, report: dict[str, Any]) -> None:
        """The folder: model, tokenizer, card, curves, report."""
        output = Path(self.options.output)
        model = AutoModelForCausalLM.from_pretrained(grown.model)
        metrics = {f"eval_{domain}_loss": loss for domain, loss in grown.final.items()}
        tokens = EVALUATED_BLOCKS * (self.length - 1)
        save_grown(model, output, metrics=metrics | {"eval_tokens": tokens}, dataset=self.corpus.name)
        self.tokenizer.save_pretrained(output)
        plot(report, output / "curves.png")
        (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def _at_edge(found: dict[float, float]) -> bool:
    """Whether the best rate is the lowest or the highest that was tried."""
    return min(found, key=lambda rate: found[rate]) in (min(found), max(found))


class Scheduler:
    """Submits arms when what they need is there: trials first, then the runs that they tune."""

    def __init__(self, experiment: Experiment, pool: ProcessPoolExecutor, queue: Any, progress: Progress):
        self.e, self.pool, self.queue, self.progress = experiment, pool, queue, progress
        self.running: dict[Future, Arm] = {}
        self.results: dict[str, Result] = {}
        self.parent = experiment.options.model or ""
        e = experiment
        trials = {what: len(grid) * e.trial_length(what) for what, grid in e.grids.items()}
        ladder = e.longest_scratch + DECAY * 1.5 * e.steps + trials["scratch"]
        grown = 2 * e.steps + DECAY * 1.25 * e.steps + trials["grown"]
        small = (
            e.control_steps * (1 + DECAY / 2)
            + trials["control"]
            + (0 if self.parent else e.base_steps + trials["base"])
        )
        self.total = e.flops[1] * (ladder + grown) + e.flops[0] * small
        self.task = progress.add_task("training", total=self.total)

    def run(self) -> dict[str, Result]:
        """All arms; returns those that are compared, by name."""
        # The base first: everything but scratch waits for it.
        if self.parent:
            self._with_parent()
        else:
            self._try("base")
        self._try("scratch")
        while self.running:
            done, _ = wait(self.running, timeout=0.3, return_when=FIRST_COMPLETED)
            self._listen()
            for future in done:
                arm = self.running.pop(future)
                self._finished(arm, future.result())
        return {name: self.results[name] for name in ("carried", "fresh", "scratch", "control")}

    def _submit(self, arm: Arm, evaluations: int = 8) -> None:
        self.running[self.pool.submit(run_arm, arm, self.e.setup(self.parent, evaluations))] = arm

    def _try(self, what: str) -> None:
        """Short decayed runs over the grid of learning rates."""
        for rate in self.e.grids[what]:
            self._trial(what, rate)

    def _trial(self, what: str, rate: float) -> None:
        kind = "base trial" if what == "base" else what
        self._submit(Arm(f"{what} trial {rate:g}", kind, rate, (self.e.trial_length(what),)), evaluations=0)

    def _finished(self, arm: Arm, result: Result) -> None:
        if " trial " in arm.name:
            what = arm.name.split()[0]
            found = self.e.trials.setdefault(what, {})
            found[arm.learning_rate] = result.final["source"]
            waiting = any(other.name.startswith(f"{what} trial") for other in self.running.values())
            if not waiting and len(found) == len(GRIDS[what]) and _at_edge(found):
                best = min(found, key=lambda rate: found[rate])
                self._trial(what, best * 2 if best == max(found) else best / 2)  # the grid was too narrow
            elif not waiting:
                self._tuned(what, min(found, key=lambda rate: found[rate]))
            return
        self.results[arm.name] = result
        losses = ", ".join(f"{domain} {loss:.3f}" for domain, loss in result.final.items())
        steps = arm.rungs[-1]
        self.progress.console.print(
            f"{arm.name:<8} {steps:>5} steps  {steps * BATCH * self.e.length / 1e6:5.2f} M tokens  "
            f"learning rate {arm.learning_rate:g}  {losses}",
            highlight=False,
            soft_wrap=True,
        )
        if arm.kind == "base":
            self.parent = result.checkpoints[arm.rungs[-1]]
            self._with_parent()

    def _with_parent(self) -> None:
        self._try("grown")
        self._try("control")

    def _tuned(self, what: str, rate: float) -> None:
        """Start the runs whose learning rate is known now."""
        steps = self.e.steps
        if what == "base":
            self._submit(Arm("base", "base", rate, (self.e.base_steps,)))
        elif what == "scratch":
            self._submit(Arm("scratch", "scratch", rate, (steps // 2, steps, self.e.longest_scratch)))
        elif what == "control":
            self._submit(Arm("control", "control", rate, (self.e.control_steps // 2, self.e.control_steps)))
        else:
            rungs = (steps // 4, steps // 2, steps)
            self._submit(Arm("carried", "grown", rate, rungs))
            self._submit(Arm("fresh", "grown", rate, (steps // 2, steps), state_policy="reset"))

    def _listen(self) -> None:
        """Move the bar by what the workers say that they have done."""
        while True:
            try:
                arm, steps, loss = self.queue.get_nowait()
            except Empty:
                return
            per_step = self.e.flops[0 if arm.kind in ("base", "base trial", "control") else 1]
            shown = f"{arm.name} {loss:.3f}" if loss is not None else arm.name
            self.progress.update(self.task, advance=steps * per_step, description=shown)


if __name__ == "__main__":
    main()
