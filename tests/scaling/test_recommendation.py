"""What a recommendation is turned into: arguments that transformers takes, YAML, accelerate's config, a table, a plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_warmstart import HparamPredictor, WarmstartError, WarmstartTrainingArguments
from hf_warmstart.scaling.hparams.presets import preset_names

from ..models import tiny_config, tiny_model
from .planted import Planted

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.fixture
def found(noisy):
    return noisy.recommend(
        params=1e8,
        tokens=2e9,
        sequence_length=128,
        eval_loss=Planted().loss(5e18),
        world_size=4,
        per_device_train_batch_size=16,
    )


def recommended(name: str):
    law = HparamPredictor.from_pretrained(name)
    config = tiny_config("llama", hidden_size=1024)
    return law.recommend(
        config=config, params=3e8, tokens=6e9, sequence_length=2048, tokens_seen=6e9, eval_loss=3.0, batch_tokens=2**19
    )


@pytest.mark.parametrize("name", preset_names())
def test_every_schedule_is_one_that_transformers_builds(name, tmp_path):
    made = recommended(name)
    args = made.training_arguments(tmp_path, max_steps=200, **CPU)
    trainer = Trainer(tiny_model("llama"), args, train_dataset=[{"input_ids": [1, 2]}])
    trainer.create_optimizer_and_scheduler(200)
    rates = []
    for _ in range(200):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
    assert max(rates) == pytest.approx(made.learning_rate, rel=1e-3)
    if made.recipe.schedule == "warmup_stable_decay":
        held = [rate for rate in rates if rate == pytest.approx(made.learning_rate)]
        assert len(held) == pytest.approx(200 * (1 - made.recipe.decay_fraction - made.recipe.warmup_fraction), abs=3)
        assert rates[-1] == pytest.approx(made.learning_rate * made.recipe.min_lr_ratio, abs=1e-9)


def test_arguments_hold_the_settings_and_take_overrides(found, tmp_path):
    args = found.training_arguments(tmp_path, seed=3, **CPU)
    assert isinstance(args, TrainingArguments) and args.seed == 3
    assert args.learning_rate == found.learning_rate and args.max_steps == found.steps
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 4 == found.batch_sequences
    assert args.get_warmup_steps(found.steps) == pytest.approx(0.01 * found.steps, abs=1)
    assert args.lr_scheduler_kwargs["num_decay_steps"] == round(0.1 * found.steps)
    assert args.include_num_input_tokens_seen == "all"
    shorter = found.training_arguments(tmp_path, max_steps=100, lr_scheduler_type="warmup_stable_decay", **CPU)
    assert shorter.max_steps == 100
    assert found.training_arguments(tmp_path, lr_scheduler_type="cosine", **CPU).lr_scheduler_kwargs == {}
    grown = found.training_arguments(tmp_path, args_class=WarmstartTrainingArguments, state_policy="reset", **CPU)
    assert isinstance(grown, WarmstartTrainingArguments) and grown.state_policy == "reset"
    with pytest.raises(WarmstartError, match=r"no \['learning_rte'\]"):
        found.training_arguments(tmp_path, learning_rte=1)


def test_yaml_is_read_by_the_parsers_of_scripts(found, tmp_path):
    text = found.to_yaml(tmp_path / "run.yaml", output_dir=tmp_path / "out", **CPU)
    assert (tmp_path / "run.yaml").read_text() == text and text.startswith("# hf_warmstart, law fitted law")
    (args,) = HfArgumentParser(TrainingArguments).parse_yaml_file(str(tmp_path / "run.yaml"))
    same = found.training_arguments(tmp_path / "out", **CPU)
    assert {k: v for k, v in args.to_dict().items() if k != "logging_dir"} == {
        k: v for k, v in same.to_dict().items() if k != "logging_dir"
    }


@pytest.mark.parametrize("world_size", [1, 4])
def test_accelerates_config_is_one_that_accelerate_loads(noisy, world_size, tmp_path):
    found = noisy.recommend(params=1e8, tokens=2e9, sequence_length=128, world_size=world_size)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(found.accelerate_config(mixed_precision="no")))
    config = load_config_from_file(str(tmp_path / "config.yaml"))
    assert config.num_processes == world_size and config.mixed_precision == "no"
    with pytest.raises(WarmstartError, match="do not divide"):
        found.accelerate_config(num_machines=3)


def test_the_table_shows_settings_intervals_sources_and_warnings(found):
    text = str(found)
    for words in (
        "learning rate",
        f"{found.learning_rate:.3g}",
        "95 %",
        "warm-up",
        "arXiv 2404.06395",
        "! Retention",
        "16 x",
    ):
        assert words in text
    replayed = found.laws and HparamPredictor(found.laws).recommend(
        params=1e8, tokens=2e9, sequence_length=128, eval_loss=3.0, replay_share=0.25
    )
    assert "25% of the tokens" in str(replayed) and "1.5e+09 tokens of new text" in str(replayed)


def test_plain_data_is_strict_json(found):
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["learning_rate"] == found.learning_rate and data["training_arguments"]["max_steps"] == found.steps
    assert data["recipe"]["sources"] and data["intervals"]["learning_rate"]


def test_plots_show_law_data_interval_and_this_run(found, noisy, tmp_path):
    figure = found.plot(tmp_path / "run.png")
    assert Path(tmp_path / "run.png").read_bytes().startswith(b"\x89PNG") and len(figure.axes) == 3
    loss, rate, batch = figure.axes
    (point,) = [line for line in loss.lines if line.get_marker() == "D"]
    assert point.get_xydata().tolist() == [[found.equivalent_compute, found.eval_loss]]
    for axis, value in ((rate, found.learning_rate), (batch, found.batch_tokens)):
        (point,) = [line for line in axis.lines if line.get_marker() == "D"]
        assert point.get_xydata().tolist() == [[found.total_compute, value]]
        assert len(axis.collections) >= 2 and axis.get_xscale() == "log"  # the band, and the optima's errors
    assert len(noisy.plot().axes) == 3


@pytest.mark.parametrize("name", ["steplaw", "marin", "kaplan"])  # over N and D; over the batch; no power law
def test_presets_can_be_plotted(name):
    with_run, alone = recommended(name).plot(), HparamPredictor.from_pretrained(name).plot()
    for figure in (with_run, alone):
        figure.draw_without_rendering()
    marks = [line for axis in with_run.axes for line in axis.lines if line.get_marker() == "D"]
    assert len(marks) == len(with_run.axes) and alone.axes
