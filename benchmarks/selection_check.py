"""Whether `select_warmstart` picks well: settings in which every candidate was also run to the planned run's end.

    python -m benchmarks.selection_check --stories TRAIN HELD_OUT --mathematics TRAIN HELD_OUT --output runs/check \\
        --set held-out --workers 2 [--minutes 10]
    python -m benchmarks.selection_check --output runs/check --set held-out --table [--document docs/selection.md]

A setting is a parent, the data that it goes on with, a regime, a schedule, a learning rate and a seed. In each setting

1. a small parent is trained;
2. the *truth*: every candidate runs the whole planned run, 1,280 steps under its decaying schedule, five times, as arms of
   a selection are run (`selection.run`); a repeat has other data, another draw of the growth and other dropout;
3. `select_warmstart` chooses, with a tenth of the FLOPs of running every candidate to the end once, and seeds of its own;
   and, to see what more would buy, again without a budget, in races to a fifth and two fifths of the planned run's steps.

The *winner* is the candidate of least mean final loss. The next one *ties* where it lies behind by less than one standard
error of the paired difference; no other candidate does. The *regret* of a choice is its mean final loss less the winner's.
It is compared with the best constant choice, the one candidate that would have been best over all settings, known only
afterwards, and with a random one. A run whose loss was not finite counts with that of a model that knows nothing.

The sets: `development`, on which the procedure's numbers were chosen; `held-out`, with other parents, parts of the texts
and seeds; `quick`, seconds, which shows that all runs. Work is divided over processes, of one thread each, by locks: also
over several calls at once. What is there is not run again; a call may be killed at any time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import default_data_collator

from examples.quickstart_text import blocks, spread
from hf_warmstart import SelectionReport, WarmstartTrainingArguments, select_warmstart
from hf_warmstart.cli import workers
from hf_warmstart.selection.outcomes import final_loss
from hf_warmstart.selection.prepare import prepare_selection
from hf_warmstart.selection.run import Runner, held
from hf_warmstart.selection.study import ARMS, write_json_file

from .document import replaced
from .selection_outcomes import Outcome, figures, regrets
from .selection_runs import common_arguments, documents, made_once, tokenizer_of, train_parent
from .selection_settings import PARENT_PART, PART, SETS, Case, candidates

MARKERS = "<!-- check: made by benchmarks.selection_check -->", "<!-- check: end -->"
TEXTS = ("stories", "mathematics")
TRUTH_SEED = 1000  # added to a setting's, so that truth and selection draw other things
DECAY = 0.2  # share of the steps that a warmup_stable_decay schedule decays over
UNIT_LIMIT = 1800.0  # seconds for one run


class Rows(Dataset):
    """Blocks of tokens in memory, as a model takes them.

    Args:
        rows: token ids (blocks, length).
    """

    def __init__(self, rows: Tensor):
        self.rows = rows.long()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Check:
    """All runs of one set, in a folder.

    Args:
        output: the folder. name: of the set. texts: of each name, the file to train on and the held-out one.
    """

    def __init__(self, output: Path, name: str, texts: Mapping[str, Sequence[Path]]):
        self.folder, self.texts = output / name, texts
        self.scale, self.cases = SETS[name]
        self._truths: dict[str, Runner] = {}

    # -- data -----------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        """One for both texts."""

        def texts() -> list[str]:
            most = self.scale.documents or 3000
            return [text for train, _ in self.texts.values() for text in documents(train, most)]

        return tokenizer_of(self.folder / "tokenizer", texts, self.scale.vocabulary)

    @cached_property
    def blocks(self) -> dict[str, Tensor]:
        """Token ids (blocks, length) of each text, and of what is held out."""
        path = self.folder / "blocks.safetensors"

        def make() -> None:
            made = {}
            for name, (train, held_out) in self.texts.items():
                for key, file in ((name, train), (f"{name}-held-out", held_out)):
                    found = blocks(self.tokenizer, documents(file, self.scale.documents), self.scale.length)
                    made[key] = found.to(torch.int16)
            save_file(made, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)

        return load_file(made_once(path, make))

    def part(self, text: str, start: float, share: float) -> Rows:
        """A part of a text."""
        rows = self.blocks[text]
        return Rows(rows[int(start * len(rows)) : int((start + share) * len(rows))])

    def held_out(self, text: str) -> Rows:
        """What losses are measured on."""
        rows = self.blocks[f"{text}-held-out"]
        return Rows(spread(rows.chunk(2)[self.scale.half], self.scale.eval_blocks))

    # -- runs -----------------------------------------------------------------------------------------------------

    def parent(self, case: Case) -> Path:
        """A setting's parent, trained where it is missing."""
        folder = self.folder / case.name / "parent"

        def make() -> None:
            data = self.part(case.parent_text, case.start, PARENT_PART)
            model = case.model(len(self.tokenizer), self.scale.length)
            arguments = common_arguments(self.scale.batch, 2e-3, case.seed)
            train_parent(folder, model, data, case.parent_steps, case.parent_steps, arguments)

        return made_once(folder / f"checkpoint-{case.parent_steps}", make)

    def arguments(self, case: Case, what: str) -> WarmstartTrainingArguments:
        """The planned run's."""
        seed = case.seed + (TRUTH_SEED if what == "truth" else 0)
        own: dict[str, Any] = {
            "max_steps": self.scale.steps,
            "per_device_eval_batch_size": 16,
            "lr_scheduler_type": case.schedule,
            "decay_fraction": DECAY if case.schedule == "warmup_stable_decay" else None,
            "save_strategy": "no",
            "remove_unused_columns": False,
        }
        shared = common_arguments(self.scale.batch, case.learning_rate, seed)
        return WarmstartTrainingArguments(str(self.folder / case.name / what), **{**shared, **own})

    def options(self, case: Case, what: str) -> dict[str, Any]:
        """What truth and selection of a setting have in common, for `select_warmstart`."""
        return {
            "parent": self.parent(case),
            "candidates": candidates(self.scale),
            "train_dataset": self.part(case.text, case.start + PARENT_PART, PART),
            "eval_dataset": self.held_out(case.text),
            "args": self.arguments(case, what),
            "regime": case.regime,
            "data_collator": default_data_collator,
        }

    def truth(self, case: Case) -> Runner:
        """What runs every candidate to the end: arms of a selection that is never asked to choose."""
        if case.name not in self._truths:
            steps, every = self.scale.steps, self.scale.eval_every
            length = {"probe_steps": steps, "continuation_steps": steps, "eval_every": every}
            made = prepare_selection(**self.options(case, "truth"), **length, repeats=self.scale.repeats)
            made.study.claim_folder()
            self._truths[case.name] = Runner(made.study, lambda steps: None)
        return self._truths[case.name]

    def run_truth(self, case: Case, candidate: str, repeat: int) -> None:
        """Run a candidate to the end once, unless another process does."""
        self.truth(case).run_if_free((candidate, repeat, self.scale.steps, False))

    def budget(self, case: Case) -> float:
        """The selection's, as a share of the planned run of the dearest candidate."""
        study = self.truth(case).study
        prices = [study.step_flops(name) for name in study.candidates]
        return self.scale.share * sum(prices) / max(prices)

    def run_selector(self, case: Case, steps: int | None = None) -> None:
        """Let `select_warmstart` choose, unless another process does; with `steps`, in a race of so many and no budget."""
        report = self.report_path(case, steps)
        with held(report.parent.with_suffix(".lock")) as mine:
            if mine and not report.is_file():
                select_warmstart(
                    **self.options(case, report.parent.name),
                    probe_steps=self.scale.probe_steps,
                    continuation_steps=steps or self.scale.continuation_steps,
                    eval_every=self.scale.selector_eval_every,
                    schedule=self.scale.schedule,
                    objective=self.scale.objective,
                    repeats=self.scale.selector_repeats,
                    budget=None if steps else self.budget(case),
                )

    # -- what is there --------------------------------------------------------------------------------------------

    def report_path(self, case: Case, steps: int | None = None) -> Path:
        """Of the selection with the budget, or of the race of so many steps."""
        return self.folder / case.name / (f"selector-to-{steps}" if steps else "selector") / "selection.json"

    def result_path(self, case: Case, candidate: str, repeat: int) -> Path:
        arm = self.folder / case.name / "truth" / ARMS / "arms" / candidate / f"repeat-{repeat}"
        return arm / f"result-{self.scale.steps}.json"

    def units(self) -> list[tuple[str, ...]]:
        """All that is to be run, parents first, then setting by setting: (setting, what, candidate or steps, repeat)."""
        found: list[tuple[str, ...]] = [(case.name, "parent", "", "0") for case in self.cases]
        for case in self.cases:
            found.append((case.name, "selector", "", "0"))
            found += [
                (case.name, "truth", candidate.name, str(repeat))
                for repeat in range(self.scale.repeats)
                for candidate in candidates(self.scale)
            ]
        return found + [(case.name, "selector", str(steps), "0") for steps in self.scale.longer for case in self.cases]

    def path_of(self, unit: tuple[str, ...]) -> Path:
        """What is there when a unit is done."""
        case, what, which, repeat = self.case(unit[0]), *unit[1:]
        if what == "parent":
            return self.folder / case.name / "parent" / f"checkpoint-{case.parent_steps}"
        if what == "selector":
            return self.report_path(case, int(which) if which else None)
        return self.result_path(case, which, int(repeat))

    def case(self, name: str) -> Case:
        return next(case for case in self.cases if case.name == name)

    def run(self, unit: tuple[str, ...]) -> None:
        """Run a unit, and note what it cost."""
        case, what, which, repeat = self.case(unit[0]), *unit[1:]
        begun = time.process_time()
        if what == "parent":
            self.parent(case)
        elif what == "selector":
            self.run_selector(case, int(which) if which else None)
        else:
            self.run_truth(case, which, int(repeat))
        cost = self.folder / "costs" / f"{'.'.join(unit)}.json"
        cost.parent.mkdir(parents=True, exist_ok=True)
        write_json_file(cost, time.process_time() - begun)


@lru_cache(maxsize=1)
def check_of(output: str, name: str, *texts: str) -> Check:
    """The check of a process; `texts`: the two files of each of `TEXTS`."""
    paths = [Path(text) for text in texts]
    return Check(Path(output), name, {text: paths[2 * k : 2 * k + 2] for k, text in enumerate(TEXTS)})


def run_unit(output: str, name: str, deadline: str, *rest: str) -> str:
    """Run one unit in a process of its own, unless it is too late; `rest`: the four files, then the unit."""
    if time.time() > float(deadline):
        return "late"
    torch.set_num_threads(1)
    check_of(output, name, *rest[:4]).run(rest[4:])
    return "done"


def run_all(check: Check, output: Path, name: str, files: Sequence[Path], processes: int, minutes: float) -> None:
    """Run what is missing, in processes of one thread each."""
    missing = [unit for unit in check.units() if not check.path_of(unit).exists()]
    deadline = str(time.time() + 60 * minutes)
    os.environ |= dict.fromkeys(workers.THREADS, "1")  # of the processes that are started
    common = (str(output), name, deadline, *map(str, files))
    tasks = [(*common, *unit) for unit in missing]
    with tqdm(total=len(tasks), unit="run", desc=name) as bar:
        for task, result in workers.results(run_unit, tasks, processes, UNIT_LIMIT):
            if isinstance(result, workers.Lost):
                bar.write(f"{' '.join(task[-4:])}: {result.reason}")
            bar.update(1)


def gather(check: Check) -> list[Outcome]:
    """The settings that are complete."""
    found, nothing = [], math.log(check.scale.vocabulary)
    names = [candidate.name for candidate in candidates(check.scale)]
    for case in check.cases:
        paths = {name: [check.result_path(case, name, r) for r in range(check.scale.repeats)] for name in names}
        if not check.report_path(case).is_file() or not all(p.is_file() for row in paths.values() for p in row):
            continue
        results = {name: [json.loads(path.read_text()) for path in row] for name, row in paths.items()}
        losses = {
            name: [final_loss(made["evaluations"]) if made["reason"] is None else nothing for made in row]
            for name, row in results.items()
        }
        curves = {name: [made["evaluations"] for made in row] for name, row in results.items()}
        longer = {steps: path for steps in check.scale.longer if (path := check.report_path(case, steps)).is_file()}
        picks = {steps: picked(path, check.scale.steps) for steps, path in longer.items()}
        found.append(Outcome(case.name, *picked(check.report_path(case), check.scale.steps), losses, curves, picks))
    return found


def picked(report: Path, planned: int) -> tuple[str, float]:
    """What a selection picked, and what it cost as a share of running every candidate to the end once."""
    found = SelectionReport.load(report.parent)
    flops = sum(row["step_flops"] for row in found.table)
    return found.best, found.settings["spent_flops"] / (flops * planned)


def core_seconds(check: Check) -> float:
    """CPU time of all runs that are there."""
    return sum(json.loads(path.read_text()) for path in (check.folder / "costs").glob("*.json"))


def main() -> None:
    """Run what is missing, print, and write the document where one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for text in TEXTS:
        parser.add_argument(
            f"--{text}", type=Path, nargs=2, metavar="FILE", help="text to train on, and held-out text"
        )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for all runs")
    parser.add_argument("--set", choices=sorted(SETS), default="quick", help="of settings (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="after which no run is begun")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--document", type=Path, metavar="FILE", help="put the figures between its markers")
    options = parser.parse_args()
    files = [file for text in TEXTS for file in getattr(options, text) or ()]
    check = check_of(str(options.output), options.set, *map(str, files))
    if not options.table:
        if len(files) != 2 * len(TEXTS):
            parser.error(f"--{' and --'.join(TEXTS)} are needed to run")
        run_all(check, options.output, options.set, files, options.workers, options.minutes)
    found = gather(check)
    text = figures(check.scale, check.cases, found, options.set)
    print(text)
    left = sum(not check.path_of(unit).exists() for unit in check.units())
    print(json.dumps({**(regrets(found) if found else {}), "left": left, "core_seconds": round(core_seconds(check))}))
    if options.document is not None:
        options.document.write_text(replaced(options.document.read_text(), MARKERS, text))


if __name__ == "__main__":
    main()
