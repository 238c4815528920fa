"""`WarmstartTrainer` is `Trainer`: the same run, the same log, the same files, the same resume.

`CASES` lists the behaviours. Each runs with the stock `Trainer` and with ours, on the same grown model. A case with
`stop` is stopped after that step and resumed by a new trainer, with `resume_from_checkpoint=True`, whose model has other
weights; the stock `Trainer` also resumes what ours wrote. Compared are everything that was logged, the order of the
callbacks' events, the state of the trainer, the learning rates, the weights, and every file that was written.

`WARM_CASES` do the same for warm starts: the stock `Trainer` resumes from what `grow_checkpoint` made of the parent's
checkpoint, ours starts from the checkpoint itself.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    trainer_callback,
)
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import BestRun

from hf_warmstart import WarmstartTrainer, WarmstartTrainingArguments, grow, grow_checkpoint
from hf_warmstart.checkpoints.state.parent_state import OWN_STATE
from hf_warmstart.growth.plan import RECORD_KEY

from ..models import some_tokens, tiny_model

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "head_dim": 8, "attention_dropout": 0.1}
# 21 examples in batches of 2: 11 steps an epoch, the last of one example.
EXAMPLES, BATCH = 21, 2
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": 4,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "warmup_steps": 2,
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "seed": 3,
}


@dataclass(frozen=True)
class Case:
    """A behaviour: what the trainer is given, and where its run is cut."""

    options: dict[str, Any]
    stop: int | None = None
    data: Callable[[], Any] = field(default=lambda: rows(EXAMPLES))
    trainer: Callable[[torch.nn.Module], dict[str, Any]] = field(default=lambda model: {})
    prepare: Callable[[torch.nn.Module], Any] = field(default=lambda model: None)
    train: Callable[[Trainer], Any] = field(default=lambda trainer: trainer.train())


def case(name: str, /, *marks, **options):
    """A row of the list."""
    own = {key: options.pop(key) for key in ("stop", "data", "trainer", "prepare", "train") if key in options}
    return pytest.param(Case(options, **own), id=name, marks=marks)


# -- what the cases are made of ---------------------------------------------------------------------------------------


def rows(number: int, seed: int = 11, longest: int = 8) -> list[dict[str, list[int]]]:
    """Blocks of tokens."""
    return [{"input_ids": ids, "labels": ids} for ids in some_tokens(number, longest, seed=seed).tolist()]


def ragged() -> list[dict[str, list[int]]]:
    """Texts of two lengths, of which batches are made by length."""
    return rows(8, longest=8) + rows(12, longest=5)


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        return iter(rows(EXAMPLES))


def pad(batch):
    """Rows of any lengths, as one batch."""
    longest = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])
    return {"input_ids": ids, "labels": ids.clone()}


def freeze_embeddings(model):
    """Train all but the embeddings."""
    model.get_input_embeddings().requires_grad_(False)


def full_above_two(model):
    """Memory for two rows."""

    def check(module, args, kwargs):
        if len(kwargs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(check, with_kwargs=True)


def accuracy(prediction) -> dict[str, float]:
    """The share of tokens that the model finds."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def own_optimizer(model) -> dict[str, Any]:
    """A user's optimizer and schedule."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
    return {"optimizers": (optimizer, schedule)}


def train_twice(trainer: Trainer) -> None:
    trainer.train()
    trainer.train()


def train_and_evaluate(trainer: Trainer) -> None:
    trainer.train()
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)


def search(trainer: Trainer) -> None:
    """Two trials of `hyperparameter_search`."""
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.params["learning_rate"]}, n_trials=2, backend="optuna"
    )
    trainer.state.log_history.append({"best": best.run_id, "objective": best.objective})


class TwoTrials:
    """A backend for `hyperparameter_search` under optuna's name, which does what `run_hp_search_optuna` does."""

    name = "optuna"

    @dataclass
    class Trial:
        number: int
        params: dict[str, float]

    def ensure_available(self) -> None:
        pass

    def run(self, trainer, n_trials, direction, **kwargs):
        results = []
        for number in range(n_trials):
            trainer.objective = None
            trainer.train(trial=self.Trial(number, {"learning_rate": 1e-3 * 10**number}))
            results.append(BestRun(str(number), trainer.compute_objective(trainer.evaluate()), {}))
        return min(results, key=lambda run: run.objective)


class Counter(TrainerCallback, trainer_callback.ExportableState):
    """A callback with a state of its own, which it puts into the log."""

    def __init__(self, steps: int = 0):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs["counted"] = self.steps

    def state(self):
        return {"args": {"steps": self.steps}, "attributes": {}}


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
BEST = EVALUATED | {"load_best_model_at_end": True}
DIVERGING = {"learning_rate": 1.0, "warmup_steps": 0}
SCHEDULES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("polynomial", {"power": 2.0}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("cosine_with_min_lr", {"min_lr": 1e-4}),
    ("warmup_stable_decay", {"num_decay_steps": 2}),
]
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")

CASES = [
    # where a run ends, and where it is cut
    case("steps_within_an_epoch"),
    case("steps_over_several_epochs", max_steps=14, save_steps=5),
    case("whole_epochs_with_a_last_partial_batch", max_steps=-1, num_train_epochs=2, save_steps=9),
    case("half_an_epoch", max_steps=-1, num_train_epochs=0.5),
    case("last_partial_batch_dropped", max_steps=-1, num_train_epochs=1, dataloader_drop_last=True),
    case("resume_within_the_first_epoch", stop=3),
    case("resume_at_the_end_of_an_epoch", stop=11, max_steps=13, save_steps=20),
    case("resume_within_the_second_epoch", stop=13, max_steps=15, save_steps=20),
    case("resume_a_run_of_epochs", stop=8, max_steps=-1, num_train_epochs=1, save_steps=20),
    case("resume_without_skipping_data", stop=3, ignore_data_skip=True),
    case("resume_with_a_seed_for_data_alone", stop=3, data_seed=7),
    case("resume_in_sequential_order", stop=3, train_sampling_strategy="sequential"),
    case("resume_a_finished_run", stop=6),
    case("resume_and_train_longer", stop=3, max_steps=8),
    # gradients
    case("accumulation", gradient_accumulation_steps=2),
    case("accumulation_with_a_partial_last_step", gradient_accumulation_steps=4, max_steps=-1, num_train_epochs=1),
    case("accumulation_resumed_within_an_epoch", stop=3, gradient_accumulation_steps=2),
    case("accumulation_resumed_in_the_second_epoch", stop=7, gradient_accumulation_steps=2, max_steps=9),
    case("no_clipping", max_grad_norm=0.0),
    case("tight_clipping", max_grad_norm=0.01),
    # what is evaluated, and which checkpoint is best
    case("evaluation_each_steps", **EVALUATED),
    case("evaluation_at_the_start", eval_on_start=True, **EVALUATED),
    case("evaluation_at_a_resume", stop=3, eval_on_start=True, **EVALUATED),
    case("evaluation_each_epoch", max_steps=-1, num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch"),
    case("best_model_is_loaded", **BEST, **DIVERGING),
    case("best_model_is_the_last", **BEST),
    case("best_model_across_a_resume", stop=4, **BEST, **DIVERGING),
    case("best_model_with_one_checkpoint_kept", save_total_limit=1, **BEST, **DIVERGING),
    case("best_model_with_two_checkpoints_kept", save_total_limit=2, max_steps=8, **BEST, **DIVERGING),
    case("best_model_evaluated_more_often_than_saved", **BEST | {"eval_steps": 1}),
    case("only_the_best_is_saved", save_strategy="best", metric_for_best_model="loss", **EVALUATED),
    case(
        "best_by_a_metric_of_the_user",
        metric_for_best_model="accuracy",
        trainer=lambda model: {
            "compute_metrics": accuracy,
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        },
        **BEST,
    ),
    case("evaluate_and_predict_after_training", train=train_and_evaluate),
    # what is saved
    case("one_checkpoint_kept", save_total_limit=1),
    case("two_checkpoints_kept_across_a_resume", stop=4, save_total_limit=2, max_steps=8),
    case("saved_each_epoch", max_steps=-1, num_train_epochs=2, save_strategy="epoch"),
    case("nothing_saved", save_strategy="no"),
    case("only_the_model_saved", save_only_model=True),
    # callbacks
    case(
        "early_stopping",
        trainer=lambda model: {"callbacks": [EarlyStoppingCallback(1)]},
        **BEST | {"eval_steps": 1, "save_steps": 1},
        **DIVERGING,
    ),
    case(
        "early_stopping_across_a_resume",
        stop=2,
        trainer=lambda model: {"callbacks": [EarlyStoppingCallback(3)]},
        restore_callback_states_from_checkpoint=True,
        **BEST | {"eval_steps": 1, "save_steps": 1},
        **DIVERGING,
    ),
    case(
        "callback_state_across_a_resume",
        stop=3,
        trainer=lambda model: {"callbacks": [Counter()]},
        restore_callback_states_from_checkpoint=True,
    ),
    # schedules
    *[
        case(f"{kind}_schedule_across_a_resume", stop=3, lr_scheduler_type=kind, lr_scheduler_kwargs=options)
        for kind, options in SCHEDULES
    ],
    case(
        "reduce_lr_on_plateau_schedule_across_a_resume",
        stop=4,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0},
        metric_for_best_model="loss",
        **EVALUATED | DIVERGING,
    ),
    # optimizers and parameters
    *[case(f"{kind}_across_a_resume", stop=3, optim=kind) for kind in OPTIMIZERS],
    case("a_users_optimizer_and_schedule", stop=3, trainer=own_optimizer),
    case(
        "a_users_optimizer_class",
        stop=3,
        trainer=lambda model: {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 1e-3})},
    ),
    case("frozen_parameters", stop=3, prepare=freeze_embeddings),
    # data
    case("stream", data=Stream),
    case("stream_resumed", stop=3, data=Stream),
    case("batches_by_length", stop=3, data=ragged, train_sampling_strategy="group_by_length"),
    case("batch_size_found", prepare=full_above_two, per_device_train_batch_size=4, auto_find_batch_size=True),
    # how a step is computed
    case("label_smoothing", label_smoothing_factor=0.1),
    case("noise_on_embeddings", stop=3, neftune_noise_alpha=5.0),
    case("bf16", stop=3, bf16=True),
    case("activation_checkpointing", stop=3, activation_checkpointing=True),
    case("full_determinism", pytest.mark.slow, stop=3, full_determinism=True),
    case(
        "compiled",
        pytest.mark.slow,
        pytest.mark.filterwarnings("ignore::DeprecationWarning"),
        stop=3,
        torch_compile=True,
    ),
    # how training is called
    case("trained_twice", train=train_twice),
    case("model_init", trainer=lambda model: {"model": None, "model_init": lambda: fresh()}, train=train_twice),
    case(
        "hyperparameter_search",
        trainer=lambda model: {"model": None, "model_init": lambda trial: fresh()},
        train=search,
    ),
]

# -- running one and taking its record --------------------------------------------------------------------------------

_grown: list[torch.nn.Module] = []


def fresh() -> torch.nn.Module:
    """The grown model, as it was grown."""
    if not _grown:
        _grown.append(grow(tiny_model("llama", **TINY), width=2))
    return copy.deepcopy(_grown[0])


class Witness(TrainerCallback):
    """Writes down the order of events and the learning rate of each, and stops a run after a step."""

    def __init__(self, stop: int | None):
        self.events: list[tuple] = []
        self.stop = stop


def _witnessed(name: str):
    def note(self, args, state, control, lr_scheduler=None, **kwargs):
        saved = sorted(path.name for path in Path(args.output_dir).glob("checkpoint-*"))
        rates = [float(rate) for rate in lr_scheduler.get_last_lr()] if lr_scheduler is not None else None
        self.events.append((name, state.global_step, rates, saved))
        if name == "on_step_end" and state.global_step == self.stop:
            control.should_training_stop = control.should_save = True

    return note


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_") and name != "on_init_end"]:
    setattr(Witness, _event, _witnessed(_event))


def play(kind: str, case: Case, folder: Path, monkeypatch, half: str = "whole") -> dict[str, Any]:
    """A run, or half of one, and its record. It writes into `run` in a folder of its own."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    trainer_class, arguments_class = {
        "stock": (Trainer, TrainingArguments),
        "ours": (WarmstartTrainer, WarmstartTrainingArguments),
    }[kind]
    torch.manual_seed(0)
    model = fresh()
    case.prepare(model)
    if half == "second":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
    witness = Witness(case.stop if half == "first" else None)
    given: dict[str, Any] = {"model": model, "data_collator": default_data_collator} | case.trainer(model)
    if case.data is ragged:
        given["data_collator"] = pad
    trainer = trainer_class(
        args=arguments_class("run", **copy.deepcopy(COMMON | case.options)),
        train_dataset=case.data(),
        eval_dataset=rows(8, seed=12),
        **given | {"callbacks": [*given.get("callbacks", []), witness]},
    )
    if half == "second":
        trainer.train(resume_from_checkpoint=True)
    else:
        case.train(trainer)
    return {
        "events": witness.events,
        "state": plain(vars(trainer.state)),
        "rates": [float(rate) for rate in trainer.lr_scheduler.get_last_lr()],
        "weights": trainer.model.state_dict(),
        "optimizer": plain(trainer.optimizer.state_dict()),
        "files": {path.relative_to("run").as_posix(): read(path) for path in sorted(Path("run").rglob("*.*"))},
    }


def read(path: Path) -> Any:
    """What a file says; None for what only our trainer writes."""
    if path.name == OWN_STATE or path.is_dir():
        return None
    if path.suffix == ".json":
        return plain(json.loads(path.read_text()))
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=False)
    if isinstance(content, TrainingArguments):
        return {name: str(getattr(content, name)) for name in TrainingArguments.__dataclass_fields__}
    return plain(content)


def plain(value: Any) -> Any:
    """A value without the times that it took and the names that our optimizers carry."""
    if isinstance(value, dict):
        dropped = ("_runtime", "_per_second", "param_names")
        return {key: plain(item) for key, item in value.items() if not str(key).endswith(dropped)}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two records differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{where}/{key}" for key in sorted({*a} ^ {*b}, key=str) if (a | b)[key] is not None]
        return missing + [d for key in a if key in b for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for k, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{k}")]
    if isinstance(a, (torch.Tensor, np.ndarray)):
        same = type(a) is type(b) and a.shape == b.shape and bool((a == b).all())
    else:
        same = a == b or (a != a and b != b)
    return [] if same else [f"{where}: {a!r} and {b!r}"[:200]]


@pytest.fixture(autouse=True, scope="module")
def _quick_garbage_collection():
    """`Trainer` collects garbage at each start; what the imports made need not be looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:This model was widened by exact_copy")
def test_a_run_is_the_stock_trainers(case, tmp_path, monkeypatch):
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, "optuna", TwoTrials)
    monkeypatch.setattr("transformers.integrations.integration_utils.hp_params", lambda trial: trial.params)
    halves = ("whole",) if case.stop is None else ("first", "second")
    for half in halves:
        stock = play("stock", case, tmp_path / "stock", monkeypatch, half)
        if half == "second":
            shutil.copytree(tmp_path / "ours", tmp_path / "crossed")
            crossed = play("stock", case, tmp_path / "crossed", monkeypatch, half)
            assert differences(stock, crossed) == []
        ours = play("ours", case, tmp_path / "ours", monkeypatch, half)
        assert stock["events"], "nothing happened"
        assert differences(stock, ours) == []


# -- warm starts ------------------------------------------------------------------------------------------------------

PARENT_STEPS, WARM_STEPS = 5, 6
WARM_CASES = [
    *[case(f"{kind}_schedule", lr_scheduler_type=kind, lr_scheduler_kwargs=options) for kind, options in SCHEDULES],
    *[case(kind, optim=kind) for kind in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd")],
    case("accumulation", gradient_accumulation_steps=2),
    case("tight_clipping", max_grad_norm=0.01),
    case("bf16", bf16=True),
    case("stream", data=Stream),
    case("batch_size_found", prepare=full_above_two, per_device_train_batch_size=4, auto_find_batch_size=True),
]


def trained(trainer_class, arguments_class, case: Case, model, folder: Path, steps: int, start=None, **given):
    """A trainer that has run."""
    case.prepare(model)
    own = {"train_sampling_strategy": "sequential", "save_steps": PARENT_STEPS}
    arguments = arguments_class(str(folder), **copy.deepcopy(COMMON | own | case.options | {"max_steps": steps}))
    trainer = trainer_class(model, arguments, default_data_collator, case.data(), **given)
    trainer.train(resume_from_checkpoint=start)
    return trainer


@pytest.mark.parametrize("case", WARM_CASES)
def test_a_warm_start_is_the_stock_trainers_resume_of_the_grown_checkpoint(case, tmp_path, monkeypatch):
    # Without dropout and in sequential order, random numbers play no part: a resume restores its parent's.
    parent = tiny_model("llama", **TINY | {"attention_dropout": 0.0})
    trained(Trainer, TrainingArguments, case, parent, tmp_path / "parent", PARENT_STEPS + WARM_STEPS)
    checkpoint, made = tmp_path / "parent" / f"checkpoint-{PARENT_STEPS}", tmp_path / "made"
    grow_checkpoint(checkpoint, made, width=2, width_operator="uneven_copy")

    def child():
        return type(parent).from_pretrained(made)

    from_the_start = replace(case, options=case.options | {"ignore_data_skip": True})
    stock = trained(
        Trainer,
        TrainingArguments,
        from_the_start,
        child(),
        tmp_path / "stock",
        PARENT_STEPS + WARM_STEPS,
        start=str(made),
    )
    ours = trained(
        WarmstartTrainer,
        WarmstartTrainingArguments,
        case,
        child(),
        tmp_path / "ours",
        WARM_STEPS,
        warmstart_from=checkpoint,
    )
    told = [
        [(row["loss"], row["grad_norm"], row["learning_rate"]) for row in trainer.state.log_history if "loss" in row]
        for trainer in (stock, ours)
    ]
    assert len(told[1]) == WARM_STEPS
    assert told[0][-WARM_STEPS:] == told[1]
    assert differences(stock.model.state_dict(), ours.model.state_dict()) == []
    assert differences(plain(stock.optimizer.state_dict()), plain(ours.optimizer.state_dict())) == []
    assert plain(stock.lr_scheduler.state_dict())["last_epoch"] == ours.lr_scheduler.state_dict()["last_epoch"]


def test_a_second_training_is_the_stock_trainers_second_training(tmp_path):
    """It goes on with the optimizer, and begins a schedule over its own steps."""
    parent = tiny_model("llama", **TINY)
    checkpoint = tmp_path / "parent" / f"checkpoint-{PARENT_STEPS}"
    trained(Trainer, TrainingArguments, Case({}), parent, tmp_path / "parent", PARENT_STEPS)
    stock = trained(Trainer, TrainingArguments, Case({}), fresh(), tmp_path / "stock", WARM_STEPS)
    stock.train()
    model = grow(type(parent).from_pretrained(checkpoint), width=2)
    ours = trained(
        WarmstartTrainer,
        WarmstartTrainingArguments,
        Case({}),
        model,
        tmp_path / "ours",
        WARM_STEPS,
        warmstart_from=checkpoint,
    )
    ours.train()
    assert _rates(ours) == _rates(stock)
    assert {float(entry["step"]) for entry in ours.optimizer.state.values()} == {PARENT_STEPS + 2 * WARM_STEPS}


def _rates(trainer: Trainer) -> list[float]:
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


@pytest.mark.parametrize("options", [{"state_policy": "asymmetric_reset"}, {"learning_rate_transfer": "mup"}, {}])
def test_each_trial_of_a_search_warm_starts_with_its_own_learning_rate(options, tmp_path, monkeypatch):
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, "optuna", TwoTrials)
    monkeypatch.setattr("transformers.integrations.integration_utils.hp_params", lambda trial: trial.params)
    parent, steps = tiny_model("llama", **TINY), []
    checkpoint = tmp_path / "parent" / f"checkpoint-{PARENT_STEPS}"
    trained(Trainer, TrainingArguments, Case({}), parent, tmp_path / "parent", PARENT_STEPS)

    class Steps(TrainerCallback):
        def on_train_end(self, args, state, control, optimizer, **kwargs):
            group = optimizer.param_groups[0]
            steps.append((group["initial_lr"], {float(entry["step"]) for entry in optimizer.state.values()}))

    trainer = WarmstartTrainer(
        args=WarmstartTrainingArguments(str(tmp_path / "ours"), **COMMON, **options),
        data_collator=default_data_collator,
        train_dataset=rows(EXAMPLES),
        eval_dataset=rows(4),
        model_init=lambda trial: grow(type(parent).from_pretrained(checkpoint), width=2),
        warmstart_from=checkpoint,
        callbacks=[Steps()],
    )
    search(trainer)
    factor = steps[0][0] / 1e-3
    assert [rate for rate, _ in steps] == pytest.approx([1e-3 * factor, 1e-2 * factor])
    assert [count for _, count in steps] == [{PARENT_STEPS + COMMON["max_steps"]}] * 2


def test_a_second_training_keeps_the_groups_of_a_transferred_rate(tmp_path):
    options = {"learning_rate_transfer": "mup"}
    trainer = trained(WarmstartTrainer, WarmstartTrainingArguments, Case(options), fresh(), tmp_path, WARM_STEPS)
    groups = [group["param_names"] for group in trainer.optimizer.param_groups]
    first = _rates(trainer)
    trainer.train()
    assert [group["param_names"] for group in trainer.optimizer.param_groups] == groups
    assert _rates(trainer) == first


def test_reports_show_the_growth_in_the_models_config(tmp_path):
    """Integrations report `model.config.to_dict()`, as TensorBoard's and others do, when training begins."""
    seen = []

    class Report(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            seen.append(json.loads(model.config.to_json_string()))

    trained(WarmstartTrainer, WarmstartTrainingArguments, Case({}), fresh(), tmp_path, 1, callbacks=[Report()])
    assert [record["growth_config"]["width"] for record in seen[0][RECORD_KEY]] == [2]
