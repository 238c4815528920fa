"""Sweeps: the training of one run, and that a table is the same whatever happens on the way."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.optim import SGD
from transformers import LlamaForCausalLM, get_wsd_schedule

from hf_warmstart import HparamPredictor, WarmstartError, run_sweep
from hf_warmstart.cli import main
from hf_warmstart.errors import CheckpointError
from hf_warmstart.scaling.sweeps import Sweep, SweepConfig
from hf_warmstart.scaling.sweeps.cost import evaluations, run_flops, run_tokens
from hf_warmstart.scaling.sweeps.design import Point
from hf_warmstart.scaling.sweeps.folder import SweepFolder
from hf_warmstart.scaling.sweeps.proxies import Proxy
from hf_warmstart.scaling.sweeps.text import read_blocks
from hf_warmstart.scaling.sweeps.training import Horizon, Reference, accumulate, held_out_loss, new_model, train
from hf_warmstart.scaling.tables.evaluation import evaluate
from tests.scaling.sweep_inputs import LENGTH, VOCABULARY, arguments, target, text

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NOTHING = Reference()
TIMES = {"seconds"}  # what may differ between two runs of one sweep


def proxy(*horizons: int) -> Proxy:
    config = target(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1
    )
    return Proxy(config, 1500, 6.0 * 2000, LENGTH, horizons)


def texts():
    return (
        read_blocks(text(200, 1), "train_dataset", LENGTH, VOCABULARY, None),
        read_blocks(text(16, 2), "eval_dataset", LENGTH, VOCABULARY, None),
    )


def trained(small: Proxy, point: Point, asked: SweepConfig, reference: Reference = NOTHING, seed: int = 0):
    return train(LlamaForCausalLM, small, point, seed, texts(), asked, reference, CPU)


def table(rows) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


# -- one run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequences, batch, warmup", [(200, 4, 0.1), (33, 8, 0.0), (7, 7, 0.5)])
def test_the_rate_is_that_of_transformers_schedule(sequences, batch, warmup):
    horizon = Horizon.of(sequences, sequences, batch, SweepConfig(warmup=warmup))
    assert horizon.steps == math.ceil(sequences / batch)
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_wsd_schedule(
        optimizer,
        horizon.warmup,
        horizon.decay,
        num_stable_steps=horizon.stable_end - horizon.warmup,
        decay_type="linear",
    )
    for step in range(horizon.steps):
        assert horizon.rate(step) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_branches_are_runs_of_their_own_lengths_bit_for_bit():
    asked, point = SweepConfig(warmup=0.0, stop_ratio=None), Point(0.02, 4)
    both = trained(proxy(42, 90), point, asked)
    alone = [trained(proxy(n), point, asked)[0] for n in (42, 90)]
    assert [o.loss for o in both] == [o.loss for o in alone]
    assert both[1].loss < both[0].loss < math.log(VOCABULARY)
    spent = [o.spent_tokens // LENGTH for o in both]
    assert spent == [42, 90 - 36 + 0] and alone[1].spent_tokens == 90 * LENGTH  # 36 of the first 42 are the trunk's
    assert [n // LENGTH for n in run_tokens(proxy(42, 90), point, asked)] == spent
    assert [o.spent_evaluations for o in both] == [1, 1]


def test_batches_are_accumulated_to_the_same_gradient():
    asked = [SweepConfig(per_device_batch=n) for n in (3, 8)]
    torch.manual_seed(0)
    model = new_model(LlamaForCausalLM, proxy(8), CPU)
    found = []
    for each in asked:
        model.zero_grad()
        loss = accumulate(model, texts()[0].rows(0, 8, 0), each)
        found.append([loss, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_the_held_out_loss_is_the_mean_over_tokens():
    model = new_model(LlamaForCausalLM, proxy(8), CPU)
    blocks = texts()[1]
    rows = blocks.tokens.long()
    with torch.no_grad():
        chances = torch.log_softmax(model(input_ids=rows).logits, -1)
    wanted = -chances[:, :-1].gather(-1, rows[:, 1:, None]).mean()
    assert held_out_loss(model, blocks, SweepConfig(per_device_batch=5)) == pytest.approx(float(wanted), rel=1e-6)
    assert model.training
    rough = held_out_loss(model, blocks, SweepConfig(bf16=True))
    assert rough != float(wanted) and rough == pytest.approx(float(wanted), rel=1e-2)


def test_a_hopeless_run_is_stopped_and_is_no_finished_run():
    asked, point = SweepConfig(stop_ratio=1.25), Point(1e-3, 4)
    stopped = trained(proxy(40, 80), point, asked, Reference((1.0, None)))
    assert [(o.status, o.loss) for o in stopped] == [("stopped", None)] * 2
    assert sum(o.spent_tokens for o in stopped) == 5 * 4 * LENGTH, "stopped at a quarter"
    late = trained(proxy(40, 80), point, asked, Reference((None, 1.0)))
    assert [o.status for o in late] == ["finished", "stopped"], "the shorter run was finished by then"
    near = trained(proxy(40, 80), point, asked, Reference(tuple(x / 1.2 for x in late[1].check_losses)))
    assert [o.status for o in near] == ["finished"] * 2
    never = trained(proxy(40, 80), point, SweepConfig(stop_ratio=None), Reference((1.0, 1.0)))
    assert [o.status for o in never] == ["finished"] * 2


def test_a_run_that_knows_less_than_nothing_has_diverged():
    found = trained(proxy(40, 80), Point(1e4, 4), SweepConfig())
    assert [(o.status, o.loss) for o in found] == [("diverged", None)] * 2


def test_a_seed_decides_a_run_and_the_global_random_state_is_untouched():
    asked, point = SweepConfig(), Point(0.02, 4)
    before = torch.get_rng_state()
    first, again, other = (trained(proxy(40), point, asked, seed=s)[0].loss for s in (0, 0, 1))
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


# -- a sweep ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A finished sweep, its folder and what it reported."""
    folder, seen = tmp_path_factory.mktemp("sweep") / "out", []
    return run_sweep(target(), report=seen.append, **arguments(folder, refinements=1)), folder, seen


def test_a_sweep_leaves_a_table(swept):
    sweep, folder, seen = swept
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert sweep.path == folder / "runs.jsonl" and sweep.runs == rows
    assert len(rows) >= 18 and len({row["name"] for row in rows}) == len(rows)
    assert {row["params"] for row in rows} == {p.params for p in sweep.plan.proxies}
    for row in rows:
        assert (row["loss"] is None) == (row["status"] != "finished")
        assert row["flops"] == 6 * row["params"] * row["tokens"]
        assert row["batch_tokens"] == row["batch_sequences"] * LENGTH
    assert len(sweep.optima) == 3 and all(0 < o.loss < math.log(VOCABULARY) for o in sweep.optima)
    assert sweep.spent_flops == sum(row["spent_flops"] for row in rows) and sweep.spent_share < 1
    assert str(len(rows)) in str(sweep)


def test_laws_are_fitted_to_a_sweep_with_what_it_was_made_with(swept, tmp_path):
    sweep, folder, _ = swept
    laws = [HparamPredictor.fit(source, draws=20) for source in (sweep, folder, str(folder / "runs.jsonl"))]
    assert len({str(law) for law in laws}) == 1
    assert laws[0].laws.recipe.decay_fraction == 0.2 and laws[0].laws.fingerprint == sweep.plan.fingerprint
    assert len(laws[0].runs) == sum(row["status"] == "finished" for row in sweep.runs)
    model = LlamaForCausalLM(target())
    rows = Dataset.from_parquet(str(folder / "eval.parquet"), cache_dir=str(tmp_path))
    found = evaluate(model, rows)
    assert found.fingerprint == sweep.plan.fingerprint
    assert found.loss == pytest.approx(held_out_loss(model, sweep.plan.evaluation, SweepConfig()), rel=1e-6)
    settings = laws[0].recommend(
        params=17568, tokens=50_000, sequence_length=LENGTH, eval_loss=found.loss, eval_fingerprint=found.fingerprint,
        config=target(),
    )  # fmt: skip
    assert 0 < settings.learning_rate < 1
    with pytest.raises(WarmstartError, match="only planned"):
        HparamPredictor.fit(Sweep(sweep.plan))
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(WarmstartError, match="no runs.jsonl yet"):
        HparamPredictor.fit(tmp_path)


def test_a_stopped_run_closes_the_grid_on_its_side():
    rows = [
        {"params": n, "tokens": 20 * n, "learning_rate": 2.0**-k, "batch_tokens": 2**b, "status": "finished",
         "loss": 3 + 1e6 / n + 0.1 * (k - 9) ** 2 + 0.05 * (b - 15) ** 2}
        for n in (1e6, 2e6, 4e6) for k in (7, 8, 9) for b in (14, 15, 16)
    ]  # fmt: skip
    hopeless = [{**row, "learning_rate": 2.0**-11, "loss": None, "status": "stopped"} for row in rows[::9]]
    edges = [
        {e for o in HparamPredictor.fit(r, draws=20).laws.optima for e in o["edges"]} for r in (rows, rows + hopeless)
    ]
    assert edges == [{"learning_rate low"}, set()]


def test_progress_ends_where_the_sweep_does(swept):
    sweep, _, seen = swept
    assert seen[-1].flops == pytest.approx(sweep.spent_flops) and seen[-1].of == pytest.approx(seen[-1].flops)
    assert seen[-1].seconds_left == 0 and seen[len(seen) // 2].seconds_left > 0
    assert all(a.flops <= b.flops * (1 + 1e-9) for a, b in zip(seen, seen[1:], strict=False))


def test_a_finished_sweep_is_read_not_trained_anew(swept, monkeypatch):
    sweep, folder, _ = swept
    monkeypatch.setattr("hf_warmstart.scaling.sweeps.run.train", None)
    assert run_sweep(target(), **arguments(folder, refinements=1, per_device_batch=5)).runs == sweep.runs


def test_the_folder_of_another_sweep_is_refused_and_left_as_it_is(swept, tmp_path):
    _, folder, _ = swept
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(WarmstartError, match=r"another sweep, which differs in options.decay \(0.2 there, 0.3 here\)"):
        run_sweep(target(), **arguments(folder, refinements=1, decay=0.3))
    with pytest.raises(WarmstartError, match="differs in eval.sequences .24 there, 20 here.; eval.sha256"):
        run_sweep(target(), **arguments(folder, refinements=1, eval_dataset=text(20, 2)))
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WarmstartError, match="none of a sweep"):
        run_sweep(target(), **arguments(tmp_path))
    with pytest.raises(WarmstartError, match="is a file"):
        run_sweep(target(), **arguments(tmp_path / "notes.txt"))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_dry_run_writes_nothing(tmp_path):
    planned = run_sweep(target(), dry_run=True, **arguments(tmp_path / "out"))
    assert planned.runs == [] and planned.path is None and not list(tmp_path.iterdir())


def test_two_processes_do_not_run_one_sweep(tmp_path):
    first = SweepFolder(tmp_path / "out", {"a": 1})
    with pytest.raises(CheckpointError, match="Another process"):
        SweepFolder(tmp_path / "out", {"a": 1})
    first.close()
    SweepFolder(tmp_path / "out", {"a": 1}).close()


def test_finished_costs_are_those_that_were_planned(tmp_path):
    sweep = run_sweep(target(), **arguments(tmp_path, stop_ratio=None, tokens_per_parameter=(0.5, 1)))
    assert {row["status"] for row in sweep.runs} == {"finished"} and len(sweep.runs) == 36
    asked, eval_tokens = sweep.plan.asked, sweep.plan.evaluation.tokens.numel()
    for small in sweep.plan.proxies:
        assert evaluations(small, asked) == 2
        own = [row for row in sweep.runs if row["params"] == small.params]
        points = {Point(row["learning_rate"], row["batch_sequences"]) for row in own}
        planned = sum(run_flops(small, point, asked, eval_tokens) for point in points)
        assert sum(row["spent_flops"] for row in own) == pytest.approx(planned)


JOB = """
import sys, torch
torch.set_num_threads(1)
from hf_warmstart import run_sweep
from tests.scaling.sweep_inputs import arguments, target
if __name__ == "__main__":
    run_sweep(target(), **arguments(sys.argv[1], refinements=1))
"""


def start(command: list, folder: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*command, str(folder)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_table(swept, tmp_path):
    """Killed in the middle of its runs, then finished in this process."""
    sweep, _, _ = swept
    job = tmp_path / "job.py"
    job.write_text(JOB)
    folder = tmp_path / "out"
    process = start([sys.executable, str(job)], folder)
    while len(list((folder / "finished").glob("*.jsonl"))) < 4:
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = len(list((folder / "finished").glob("*.jsonl")))
    assert 4 <= left < len(sweep.runs), "it had ended before it was killed"
    finished = {p: p.stat().st_mtime_ns for p in (folder / "finished").glob("*.jsonl")}
    again = run_sweep(target(), **arguments(folder, refinements=1))
    assert table(again.runs) == table(sweep.runs)
    assert finished == {p: p.stat().st_mtime_ns for p in finished}, "what was finished is not trained anew"


@pytest.mark.distributed
def test_two_ranks_leave_the_table_of_one_process(swept, tmp_path):
    job = tmp_path / "job.py"
    job.write_text(JOB)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", str(job)]
    process = start(launch, tmp_path / "out")
    words = process.communicate()[0].decode()
    assert process.returncode == 0, words
    rows = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert table(rows) == table(swept[0].runs)


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path) -> list[str]:
    """A small sweep of text as a command; its tokenizer knows sixteen letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(97 + k): k for k in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(letters, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    target().save_pretrained(tmp_path / "target")
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / "target")
    for name, tokens in (("train", text(300, 1)), ("eval", text(24, 2))):
        (tmp_path / f"{name}.txt").write_text("".join(chr(97 + int(t)) for t in tokens.flatten()))
    given = [
        "sweep",
        str(tmp_path / "target"),
        str(tmp_path / "out"),
        "--tokens",
        "200K",
        "--sequence-length",
        str(LENGTH),
    ]
    given += ["--train", str(tmp_path / "train.txt"), "--eval", str(tmp_path / "eval.txt")]
    for name, value in (arguments(None, refinements=1)).items():
        if name in SweepConfig().to_dict():
            given += ["--set", f"{name}={json.dumps(value)}"]
    return given


def test_the_command_says_the_cost_and_goes_on_with_the_same_sweep(command, swept, tmp_path, capsys):
    assert main([*command, "--dry-run"]) == 0
    assert "of 25 points and 2 seeds on the target" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert main([*command, "--dry-run", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["cost"] == swept[0].plan.cost.to_dict() and data["tokens"] == 200_000
    shutil.copytree(swept[1], tmp_path / "out")
    missing = next((tmp_path / "out" / "finished").glob("*.jsonl"))
    missing.unlink()
    assert main([*command, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["event"] for line in lines[:-1]} == {"progress"} and lines[-1]["event"] == "done"
    assert lines[-1]["optima"] == swept[0].to_dict()["optima"]
    assert missing.exists() and main(command) == 0
    assert "grid search on the target" in capsys.readouterr().out


def test_the_command_says_what_is_wrong(command, capsys):
    assert main([*command, "--set", "lr=1"]) == 2
    assert "A sweep has no options ['lr']" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--tokens", "many"])
    assert "is no count such as 20B" in capsys.readouterr().err
