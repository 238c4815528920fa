"""`Study`: all that is the same for every arm of a selection, and what makes an arm's trainer from it.

An arm is one candidate in one repeat. Its trainer is the `WarmstartTrainer` that would train the candidate for good, with
the schedule of the whole planned run, stopped early; so what is compared is what would be started. Its data are listed
beforehand, the same list for every candidate.

A study's `fingerprint` is written beside the arms. A folder that holds another study's arms is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch.utils.data import Subset
from transformers import PreTrainedConfig, PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length

from ..errors import StateError, WarmstartError
from ..growth.grow import grow
from ..growth.plan import GrowthPlan, make_plan
from ..growth.twin import build
from ..training import WarmstartTrainer, WarmstartTrainingArguments
from ..training.data_position import place_in_data
from .candidates import Candidate
from .regimes import Regime

FINGERPRINT = "study.json"
ARMS = "_selection"  # below output_dir; what begins with an underscore is never pushed
NOISE_BATCHES = 4  # micro-batches of the gradient's noise
METRIC_BATCHES = 2  # evaluation batches of zero-step metrics and probes
# Arguments that do not change what an arm computes, or that an arm has of its own.
OWN_ARGUMENTS = {
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "seed",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "logging_steps",
    "disable_tqdm",
    "report_to",
    "run_name",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "logging_dir",
    "log_level",
}


@dataclass
class Study:
    """What every arm of a selection shares.

    Args:
        parent: the checkpoint's folder. model_class, config: of the parent, the config under the regime.
        candidates: to choose from, by name. args: of the planned run. regime: what is random.
        train_dataset, eval_dataset, trainer_options: for every trainer.
        planned_steps: of the run that is to be started. lags: steps at which probes measure.
        continuation_steps: of a continuation. eval_every: steps between two evaluations.
        folder: where the arms lie. settings: what else a selection was asked for.
        schedule: `"planned"`: a continuation is the beginning of the planned run; `"compressed"`: the planned run in little,
            its whole schedule within the continuation.
        racing: whether survivors of the probe are halved by steps (`racing`): two evaluations are then ever farther apart.
    """

    parent: Path
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    candidates: Mapping[str, Candidate]
    args: WarmstartTrainingArguments
    regime: Regime
    train_dataset: Any
    eval_dataset: Any
    planned_steps: int
    lags: tuple[int, ...]
    continuation_steps: int
    eval_every: int
    folder: Path
    trainer_options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    schedule: str = "planned"
    racing: bool = False

    # -- what follows ---------------------------------------------------------------------------------------------

    @property
    def probe_steps(self) -> int:
        """Steps of a probe: to its last lag."""
        return self.lags[-1]

    @property
    def schedule_speed(self) -> float:
        """How many steps of the planned schedule a step of an arm passes."""
        return self.planned_steps / self.continuation_steps if self.schedule == "compressed" else 1.0

    @property
    def examples_per_step(self) -> int:
        """Examples of one step: an arm runs in one process, however many share the arms."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps

    @cached_property
    def plans(self) -> dict[str, GrowthPlan]:
        """The growth of each candidate."""
        return {
            name: make_plan(self.model_class, self.config, candidate.growth)
            for name, candidate in self.candidates.items()
        }

    @cached_property
    def matrices(self) -> dict[str, int]:
        """Parameters of each candidate without its tables, which is what a step's FLOPs are counted from."""
        return {name: counted_parameters(plan.model_class, plan.target_config) for name, plan in self.plans.items()}

    @cached_property
    def parent_matrices(self) -> int:
        return counted_parameters(self.model_class, self.config)

    @cached_property
    def tokens(self) -> tuple[int, int]:
        """Tokens of a training example and of an evaluation example, by the first of each."""
        return _length(self.train_dataset), _length(self.eval_dataset)

    def step_flops(self, name: str) -> float:
        """FLOPs of a training step: 6 for each parameter and token, as `Trainer` counts them."""
        return 6.0 * self.matrices[name] * self.tokens[0] * self.examples_per_step

    def arm_flops(self, name: str, start: int, until: int, measured: bool) -> float:
        """FLOPs of an arm from one step to another, evaluations and measures included."""
        forward = 2.0 * self.tokens[1]
        evaluations = sum(start < step <= until for step in self.evaluated(until)) + (start == 0)
        total = (until - start) * self.step_flops(name) + evaluations * len(
            self.eval_dataset
        ) * forward * self.matrices[name]
        if measured:
            measures = sum(start < lag <= until for lag in self.lags) + (start == 0)
            batch = METRIC_BATCHES * self.args.per_device_eval_batch_size
            total += measures * batch * forward * self.matrices[name] + 2 * batch * forward * self.parent_matrices
            micro = NOISE_BATCHES * self.args.per_device_train_batch_size
            total += (
                sum(start < lag <= until for lag in self.lags) * 6.0 * self.matrices[name] * self.tokens[0] * micro
            )
        return total

    def evaluated(self, until: int) -> list[int]:
        """The steps at which an arm is evaluated, 0 apart: equally far from each other, and at every lag and end.

        In a race they are so to the probe's end, and from there on as many in each doubling of the steps.
        """
        start, every = until, self.eval_every
        if self.racing:
            start = min(until, self.probe_steps)
        found = {*range(every, start + 1, every), *(lag for lag in self.lags if lag <= until), until}
        while start < until:
            end = min(until, 2 * start)
            found |= {*range(start + every, end + 1, every), end}
            start, every = 2 * start, 2 * every
        return sorted(found)

    @cached_property
    def first_example(self) -> int:
        """Where in the data the first repeat begins: where the parent stopped, under `data_policy="continue"`."""
        if self.args.data_policy != "continue":
            return 0
        path = self.parent / TRAINER_STATE_NAME
        state = json.loads(path.read_text()) if path.is_file() else {}
        return place_in_data(state, len(self.train_dataset), drop_last=self.args.dataloader_drop_last)[1]

    def data(self, repeat: int) -> Any:
        """The training data of a repeat, in order."""
        needed = self.continuation_steps * self.examples_per_step
        order = self.regime.order(len(self.train_dataset), needed, self.first_example, self.args.seed, repeat)
        if hasattr(self.train_dataset, "select"):
            return self.train_dataset.select(order)
        return Subset(self.train_dataset, order)

    def arm_folder(self, name: str, repeat: int) -> Path:
        return self.folder / "arms" / name / f"repeat-{repeat}"

    # -- an arm's trainer -----------------------------------------------------------------------------------------

    def load_parent(self) -> PreTrainedModel:
        """The parent under the regime, in eval mode."""
        return self.model_class.from_pretrained(self.parent, config=self.config).eval()

    def make_model(self, parent: PreTrainedModel, name: str, repeat: int) -> PreTrainedModel:
        """A candidate's model at step 0."""
        import torch

        candidate = self.candidates[name]
        if not candidate.fresh:
            return grow(parent, candidate.seeded(repeat))
        torch.manual_seed(candidate.growth.seed + repeat)
        return self.model_class(self.plans[name].target_config).to(parent.dtype)

    def make_trainer(
        self, model: PreTrainedModel, name: str, repeat: int, callback: TrainerCallback, starts: bool = True
    ) -> WarmstartTrainer:
        """The trainer of an arm; it stops where its callback says. `starts`: whether it does not go on from a checkpoint."""
        candidate = self.candidates[name]
        args = candidate_arguments(
            self.args,
            candidate,
            output_dir=str(self.arm_folder(name, repeat)),
            max_steps=self.planned_steps,
            seed=self.args.seed + repeat,
            train_sampling_strategy="sequential",
            data_policy="restart",
            dataloader_drop_last=False,
            eval_strategy="steps",
            eval_steps=self.planned_steps + 1,
            eval_on_start=starts,
            save_strategy="no",
            save_total_limit=1,
            load_best_model_at_end=False,
            prediction_loss_only=True,
            logging_strategy="steps",
            logging_steps=self.planned_steps + 1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to="none",
            push_to_hub=False,
            auto_find_batch_size=False,
        )
        args._n_gpu = min(args.n_gpu, 1)  # arms share devices by process
        trainer = WarmstartTrainer(
            model,
            args,
            train_dataset=self.data(repeat),
            eval_dataset=self.eval_dataset,
            warmstart_from=None if candidate.fresh else self.parent,
            callbacks=[callback],
            **self.trainer_options,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    # -- the folder -----------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the arms' results, as plain data."""
        arguments = {name: value for name, value in self.args.to_dict().items() if name not in OWN_ARGUMENTS}
        weights = sorted(self.parent.glob("*.safetensors"))
        racing = {"evaluated": self.evaluated(self.continuation_steps)} if self.racing else {}
        return json.loads(
            json.dumps(
                {
                    **racing,
                    "parent": {path.name: file_digest(path) for path in weights},
                    "regime": {"shuffle": self.regime.shuffle, "dropout": self.regime.dropout},
                    "lags": self.lags,
                    "continuation_steps": self.continuation_steps,
                    "eval_every": self.eval_every,
                    "planned_steps": self.planned_steps,
                    "seed": self.args.seed,
                    "candidates": {name: c.to_dict() for name, c in self.candidates.items()},
                    "train_dataset": _dataset_mark(self.train_dataset),
                    "eval_dataset": _dataset_mark(self.eval_dataset),
                    "settings": self.settings,
                    "args": arguments,
                },
                default=str,
            )
        )

    def claim_folder(self) -> None:
        """Say whose arms lie in the folder.

        Raises:
            WarmstartError: it holds those of another study.
        """
        path = self.folder / FINGERPRINT
        own = self.fingerprint
        if path.is_file():
            other = json.loads(path.read_text())
            if different := sorted(key for key in {*own, *other} if own.get(key) != other.get(key)):
                raise WarmstartError(
                    f"{self.folder.parent.name} holds arms of a selection with other "
                    f"{', '.join(different)}. Pass an output_dir of its own, or the same settings to go on."
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json_file(path, own)


def candidate_arguments(
    args: WarmstartTrainingArguments, candidate: Candidate, **changes: Any
) -> WarmstartTrainingArguments:
    """The planned run's arguments under a candidate's policies."""
    own: dict[str, Any] = {"state_policy": candidate.state_policy, "schedule_policy": candidate.schedule_policy}
    if candidate.fresh:
        own["state_policy"], own["schedule_policy"] = "reset", "rewarm"
    own |= {"equal_loss_step": None, "equal_loss_run": None, **candidate.arguments}
    return dataclasses.replace(args, **{**own, **changes})


def as_warmstart_arguments(args: TrainingArguments) -> WarmstartTrainingArguments:
    """`TrainingArguments` as those of a warm start, with its defaults."""
    if isinstance(args, WarmstartTrainingArguments):
        return args
    given = {item.name: getattr(args, item.name) for item in dataclasses.fields(args) if item.init}
    return WarmstartTrainingArguments(**given)


def counted_parameters(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    """Parameters without embeddings of a model that is not made."""
    return int(build(model_class, config, "meta").num_parameters(exclude_embeddings=True))


def planned_steps(args: TrainingArguments, examples: int) -> int:
    """Optimizer steps of the run that arguments describe, in one process."""
    if args.max_steps > 0:
        return args.max_steps
    micro = math.ceil(examples / args.per_device_train_batch_size)
    return max(1, math.ceil(args.num_train_epochs * max(1, micro // args.gradient_accumulation_steps)))


def with_length(dataset: Any, examples: int) -> Any:
    """A dataset with a length: a stream's first examples, as many as are needed."""
    if dataset is None or has_length(dataset):
        return dataset
    taken = list(islice(dataset, examples))
    return Dataset.from_list(taken)


def write_json_file(path: Path, data: Any) -> None:
    """Write a file that is there whole or not at all."""
    import os
    import tempfile

    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        json.dump(data, file, indent=1)
    os.replace(file.name, path)


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file.read)
        )


def _sha256(read: Callable[[int], bytes]) -> str:
    total = hashlib.sha256()
    while block := read(2**20):
        total.update(block)
    return total.hexdigest()


def _dataset_mark(dataset: Any) -> list[Any]:
    """What tells two datasets apart without reading them: their length, and the first and last example."""
    examples = [dataset[0], dataset[len(dataset) - 1]]
    return [len(dataset), hashlib.sha256(repr(examples).encode()).hexdigest()[:16]]


def _length(dataset: Any) -> int:
    """Tokens of a dataset's first example: the longest of its sequences."""
    first = dataset[0]
    if not isinstance(first, Mapping):
        raise WarmstartError(f"Examples are mappings with input_ids and labels, not {type(first).__name__}.")
    lengths = [len(value) for value in first.values() if hasattr(value, "__len__") and not isinstance(value, str)]
    if not lengths:
        raise StateError(f"An example has no sequence: its columns are {sorted(first)}. Pass input_ids and labels.")
    return max(lengths)
