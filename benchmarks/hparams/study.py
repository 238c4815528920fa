"""The whole of the benchmark: texts, then sweep, parents and grids beside one another, then what the laws recommend."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_warmstart import HparamPredictor, WarmstartError
from hf_warmstart.scaling.hparams.presets import preset_data, preset_names
from hf_warmstart.scaling.sweeps import plan_sweep, train_sweep
from hf_warmstart.scaling.sweeps.design import Limits, Point, best_point, further_points
from hf_warmstart.scaling.sweeps.folder import write_atomically
from hf_warmstart.scaling.sweeps.pool import OutOfTimeError, WorkerPool
from hf_warmstart.scaling.sweeps.probes import next_rates
from hf_warmstart.scaling.sweeps.text import Blocks, read_blocks

from .jobs import ParentJob, ProbeJob, Shared, TargetJob, parent_file, probe_file, target_file, work
from .setting import PROBE, Setting, Target

FIRST, LATER = 0, 1  # priorities: what others wait for, and what nobody does
SETTING_NAME, LAWS_NAME = "setting.json", "laws.json"
FEWEST_STEPS = 10  # of a run of the grid


class Study:
    """All runs of one setting, in a folder.

    Args:
        texts: files by `pretrain`, `train` and `eval`. workers: processes; 0 for none but this one. device: of all runs.
        seconds: after which no run is begun.
    """

    def __init__(
        self,
        setting: Setting,
        texts: dict[str, Path],
        folder: Path,
        workers: int = 0,
        device: str = "cpu",
        seconds: float | None = None,
    ):
        self.setting, self.folder, self.target, self.workers = setting, folder, Target(setting), workers
        _own_folder(folder, setting)
        shared = Shared(self.target, folder, *self._texts(texts), device)
        self.plan = shared.plan
        self.pool = WorkerPool(workers, work, shared, seconds)

    def run(self) -> None:
        """Everything that is not there yet.

        Raises:
            OutOfTimeError: there was no time for all of it.
        """
        names = sorted(self.setting.parents, key=lambda name: -self.setting.parents[name])
        with self.pool:
            if not self.workers:
                laws: Future[HparamPredictor] = Future()
                laws.set_result(self.laws())
                for name in names:
                    self.of_parent(name, laws)
                return
            with ThreadPoolExecutor(1 + len(names)) as threads:
                parts = [laws := threads.submit(self.laws)]
                parts += [threads.submit(self.of_parent, name, laws) for name in names]
                ended, _ = wait(parts, return_when=FIRST_EXCEPTION)
                if any(not isinstance(part.exception(), (OutOfTimeError, type(None))) for part in ended):
                    self.pool.close()  # the others need not go on
            # What ended first is the cause: the others fail because the pool was closed.
            failures = [part.exception() for part in (*ended, *parts) if part.exception() is not None]
            # A fault says more than that there was no time for the rest.
            for failure in sorted(failures, key=lambda error: isinstance(error, OutOfTimeError)):
                raise failure

    # -- texts ----------------------------------------------------------------------------------------------------

    def _texts(self, texts: dict[str, Path]) -> tuple[Any, dict[str, Blocks]]:
        """The plan of the sweep, with its texts, and what each parent reads."""
        setting, tokenizer = self.setting, self._tokenizer(texts)
        length, vocabulary = setting.length, setting.vocabulary

        def read(name: str) -> Blocks:
            return read_blocks(texts[name], name, length, vocabulary, tokenizer)

        evaluation = read("eval").first(max(1, setting.eval_tokens // length))
        # One half of the text is what the target is trained on, the other what a parent may know of it.
        known, train = (part.contiguous() for part in read("train").tokens.chunk(2))
        stories = read("pretrain")
        both = torch.cat([stories.tokens[: len(known)], known])
        plan = plan_sweep(
            self.target.config,
            train_dataset=train,
            eval_dataset=evaluation.tokens,
            tokens=self.target.tokens,
            sequence_length=length,
            max_eval_tokens=evaluation.tokens.numel(),
            **self.target.sweep_options,
        )
        return plan, {"stories": stories, "both": Blocks(both, "both")}

    def _tokenizer(self, texts: dict[str, Path]) -> PreTrainedTokenizerFast:
        """A byte-level BPE of all training text."""
        file = self.folder / "tokenizer.json"
        if not file.exists():
            made = Tokenizer(models.BPE())
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            trainer = trainers.BpeTrainer(
                vocab_size=self.setting.vocabulary,
                special_tokens=["<|endoftext|>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            made.train([str(texts["pretrain"]), str(texts["train"])], trainer)
            write_atomically(file, made.to_str())
        return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")

    # -- stages ---------------------------------------------------------------------------------------------------

    def laws(self) -> HparamPredictor:
        """The sweep, and the laws through it."""
        sweep = train_sweep(
            self.plan,
            self.folder / "sweep",
            train_jobs=lambda jobs, done: self.pool.run(jobs, priority=FIRST, done=done),
        )
        print(sweep, flush=True)
        predictor = HparamPredictor.fit(sweep)
        print(predictor, flush=True)
        said = {"sweep": sweep.to_dict() | {"table": "sweep/runs.jsonl"}, "laws": str(predictor).splitlines()}
        write_atomically(self.folder / LAWS_NAME, json.dumps(said, indent=2))
        return predictor

    def of_parent(self, name: str, laws: Future[HparamPredictor]) -> None:
        """A parent, the grid and the presets from it, then what the laws recommend, and the comparison on fresh seeds."""
        if not parent_file(self.folder, name).exists():
            self.pool.run([ParentJob(name)], priority=FIRST)
        seeds = self.setting.grid_seeds
        presets = preset_points(self.target, parent_file(self.folder, name))
        given = sorted({point for point in presets.values() if isinstance(point, Point)})
        grid = self.grid(name, [(point, seeds[0]) for point in given])
        best = best_point(grid)
        if best is None:
            raise WarmstartError(f"Every run of the grid from the parent {name!r} diverged.")
        predictor = laws.result()
        points = [best, self.recommended(name, predictor), self.probed(name, predictor)]
        fresh = [(point, seed) for seed in self.setting.fresh_seeds for point in points]
        self.losses(name, [*fresh, *((point, seed) for point in points[1:] for seed in seeds)], FIRST)

    def recommended(self, name: str, predictor: HparamPredictor) -> Point:
        """What the laws say of a parent's continued training by its loss; kept beside the parent."""
        return self._recommended(name, "recommended", predictor, self.target.tokens, None)

    def probed(self, name: str, predictor: HparamPredictor) -> Point:
        """What they say when short runs from the parent tell what it knows, and which rates it prefers."""
        tokens = self.target.run_of(PROBE * self.setting.tokens_per_parameter).tokens[0]
        first = self._recommended(name, "probe-settings", predictor, tokens, None)

        def job(rate: float) -> ProbeJob:
            return ProbeJob(name, Point(rate, first.batch_sequences))

        rows: dict[float, dict[str, Any]] = {}
        while rates := next_rates(first.learning_rate, {rate: row["loss"] for rate, row in rows.items()}):
            files = {rate: probe_file(self.folder, job(rate)) for rate in rates}
            self.pool.run([job(rate) for rate, file in files.items() if not file.exists()], priority=FIRST)
            rows |= {rate: json.loads(file.read_text()) for rate, file in files.items()}
        return self._recommended(name, "probed", predictor, self.target.tokens, list(rows.values()))

    def _recommended(
        self, name: str, kept: str, predictor: HparamPredictor, tokens: int, probes: list[dict[str, Any]] | None
    ) -> Point:
        """Settings for a run from a parent; made once, in a file beside the parent."""
        file = parent_file(self.folder, name).with_name(f"{kept}.json")
        if not file.exists():
            parent = json.loads(parent_file(self.folder, name).read_text())
            # The tokens seen count where the loss lies below what the laws reach, and nowhere else.
            found = predictor.recommend(
                params=self.target.params, tokens=tokens, sequence_length=self.setting.length, probes=probes,
                eval_loss=parent["loss"], tokens_seen=parent["tokens"],
                eval_fingerprint=self.plan.fingerprint, config=self.target.config, per_device_train_batch_size=1,
            )  # fmt: skip
            said = {"learning_rate": found.learning_rate, "batch_sequences": found.batch_sequences}
            said |= {"equivalent_compute": found.equivalent_compute, "total_compute": found.total_compute}
            said |= {"intervals": found.intervals, "warnings": found.warnings, "sources": dict(found.sources)}
            write_atomically(file, json.dumps(said))
        said = json.loads(file.read_text())
        return Point(said["learning_rate"], said["batch_sequences"])

    def grid(self, name: str, beside: Sequence[tuple[Point, int]]) -> dict[Point, float]:
        """Point -> mean loss over the grid's seeds; neighbours are added where the best point has none on some side.

        Args:
            beside: other runs that have time till then.
        """
        limits = Limits(max(1, self.target.run_of(self.setting.tokens_per_parameter).horizons[0] // FEWEST_STEPS))
        points = grid_points(self.target.usual(self.target.tokens), self.setting.side)
        losses: dict[Point, float] = {}
        for _ in range(1 + self.setting.extensions):
            if not points:
                break
            jobs = [(point, seed) for seed in self.setting.grid_seeds for point in points]
            found = self.losses(name, [*jobs, *beside], LATER)
            losses |= {
                p: sum(found[p, s] for s in self.setting.grid_seeds) / len(self.setting.grid_seeds) for p in points
            }
            points, beside = further_points(losses, limits, self.setting.shared), []
        return losses

    def losses(self, name: str, jobs: Sequence[tuple[Point, int]], priority: float) -> dict[tuple[Point, int], float]:
        """Held-out loss of the target continued from a parent, for each (point, seed); infinite where it diverged."""
        files = {job: target_file(self.folder, TargetJob(name, *job)) for job in jobs}
        # Small batches take longest: begun first, they do not come last.
        todo = sorted((job for job in files if not files[job].exists()), key=lambda job: job[0].batch_sequences)
        self.pool.run(
            [TargetJob(name, *job) for job in todo],
            priority=priority,
            done=lambda job, _: print(f"{job.parent}: {target_file(self.folder, job).stem}", flush=True),
        )
        found = {job: json.loads(file.read_text())["loss"] for job, file in files.items()}
        return {job: math.inf if loss is None else loss for job, loss in found.items()}


def grid_points(centre: Point, side: int) -> list[Point]:
    """A square of powers of two round a point."""
    rate, batch = (round(math.log2(x)) for x in (centre.learning_rate, centre.batch_sequences))
    low = max(0, batch - side // 2)
    rates = range(rate - side // 2, rate - side // 2 + side)
    return [Point(2.0**r, 2**b) for r in rates for b in range(low, low + side)]


def preset_points(target: Target, parent: Path) -> dict[str, Point | str]:
    """What each preset says of the continued training, or why it says nothing.

    Args:
        parent: the file with its loss and the tokens that it has seen.
    """
    said, found = json.loads(parent.read_text()), {}
    usual = target.usual(target.tokens).batch_sequences * target.setting.length
    for name in preset_names():
        # A law of the rate alone gets the batch that the grid is centred on.
        batch = {} if "batch_tokens" in preset_data()[name] else {"batch_tokens": usual}
        try:
            made = HparamPredictor.from_pretrained(name).recommend(
                params=target.params, tokens=target.tokens, sequence_length=target.setting.length, config=target.config,
                tokens_seen=said["tokens"], eval_loss=said["loss"], per_device_train_batch_size=1, **batch,
            )  # fmt: skip
        except WarmstartError as error:
            found[name] = " ".join(str(error).split())
            continue
        found[name] = Point(made.learning_rate, made.batch_sequences)
    return found


def _own_folder(folder: Path, setting: Setting) -> None:
    """Make the folder of a setting, or refuse that of another."""
    folder.mkdir(parents=True, exist_ok=True)
    file, said = folder / SETTING_NAME, json.dumps(setting.to_dict(), indent=2)
    if not file.exists():
        write_atomically(file, said)
    elif file.read_text() != said:
        raise WarmstartError(f"{str(folder)!r} holds runs of another setting. Pass another folder.")
