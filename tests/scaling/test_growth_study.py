"""The growth-factor study: whole comparisons in a sensible order, verdicts that follow the numbers, no run done twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
import torch

from benchmarks.growth_factor import main
from benchmarks.growth_study.calibration import check_advice
from benchmarks.growth_study.claims import NO, OPEN, YES, claims, decide, fewest_tokens, is_exact
from benchmarks.growth_study.document import Report
from benchmarks.growth_study.jobs import (
    BASE,
    CONTROL,
    GROWN,
    GROWN_TRIAL,
    SCRATCH,
    TRANSFERRED,
    TRANSFERRED_TRIAL,
    TRIAL,
    Job,
    jobs_of,
)
from benchmarks.growth_study.running import DONE, Study
from benchmarks.growth_study.settings import ASYMMETRIC, CARRY, QUICK, SETTINGS, Arm, only, paper, tenth
from benchmarks.growth_study.table import Cell, Interval, cells_of, runs_of
from benchmarks.growth_study.text import prepare
from benchmarks.growth_study.workers import held, work
from hf_warmstart import WarmstartError, advise_growth
from hf_warmstart.scaling.growing.growth_laws import GrowthLaws
from hf_warmstart.scaling.growing.tokens_to_loss import Bounded
from hf_warmstart.scaling.sweeps.training import RATE_FACTOR

from .studies import FACTORS, GAIN, log_ratio, scratch_loss, study
from .test_sweep_benchmark import WORDS, chain

# -- what is run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_no_run_comes_before_what_it_needs_and_seeds_come_in_turn(name):
    jobs = jobs_of(SETTINGS[name])
    place = {job.name: number for number, job in enumerate(jobs)}
    assert len(place) == len(jobs)
    assert all(place[needed] < place[job.name] for job in jobs for needed in job.needs)
    setting = SETTINGS[name]
    targets = list(setting.targets) if setting.target_by_target else []
    reported = [
        (targets.index(job.target) if targets else 0, job.seed)
        for job in jobs
        if job.seed != setting.tuning_seed and job.kind != BASE  # a base may be needed by two targets
    ]
    assert reported == sorted(reported)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_arm_has_as_many_trials_as_the_others_and_scratch_no_fewer(name):
    setting = SETTINGS[name]
    jobs = jobs_of(setting)
    for arm in setting.arms:
        trials = [job for job in jobs if job.kind == GROWN_TRIAL and job.arm == arm]
        assert sorted(job.rate for job in trials) == sorted(setting.factors)
        assert {job.seed for job in trials} == {setting.tuning_seed} and setting.tuning_seed not in setting.seeds
    for target in setting.targets:
        assert len([job for job in jobs if job.kind == TRIAL and job.target == target]) >= len(setting.factors)
    assert len({(job.target, job.base, job.method) for job in jobs if job.kind == GROWN}) == len(setting.arms)


def test_the_hour_setting_holds_what_the_study_is_about():
    setting = SETTINGS["hour"]
    main_target = next(iter(setting.targets))
    own = [arm for arm in setting.arms if arm.target == main_target]
    factors = [setting.growth_factor(arm.target, arm.base) for arm in own]
    assert sum(1.5 <= g < 2.75 for g in factors) >= 4 and sum(3.5 <= g < 4.5 for g in factors) >= 3
    assert 1e5 < setting.params[main_target] < 2e5 and len(setting.seeds) >= 3
    assert {arm.shrink for arm in own if arm.width == "szp"} >= {0.4, 1.0}
    assert {arm.depth for arm in own} == {"stack", "identity_blocks"}
    assert {CARRY, ASYMMETRIC, "reset"} <= {arm.state for arm in own}
    assert set(setting.checks) <= {setting.method(arm) for arm in setting.arms}


def test_the_gpus_setting_has_a_small_twin():
    gpu, small = SETTINGS["gpu"], tenth(SETTINGS["gpu"])
    assert 25e6 < gpu.params["512x10"] < 40e6 and 110e6 < gpu.params["1024x10"] < 140e6
    assert all(small.params[name] < gpu.params[name] / 30 for name in gpu.sizes) and small.arms == gpu.arms


# -- what it says -------------------------------------------------------------------------------------------------------


def cell(
    method: str, g: float, rung: float, ratio: float, noise: float = 0.0002, speed: float = 1.6, base="b"
) -> Cell:
    """An arm whose ln(loss / scratch's) is planted, with a spread over three seeds."""
    draws = random.Random(f"{method} {g} {rung}")
    ratios = {seed: ratio + draws.gauss(0, noise) for seed in range(3)}
    speeds = {seed: Bounded(speed * math.exp(0.01 * (seed - 1))) for seed in range(3)}
    losses = {seed: 2 * math.exp(x) for seed, x in ratios.items()}
    with_base = {seed: bound.times(0.5) for seed, bound in speeds.items()}
    control = {seed: -0.02 + 0.001 * seed for seed in range(3)}
    return Cell("t", base, method, g, rung, rung, 1.0, losses, ratios, speeds, with_base, {}, control)


def planted(**changes: float) -> list[Cell]:
    """A study in which everything is as the paper says, but for what is changed."""
    values = {"szp2": -0.02, "szp2_late": -0.01, "szp4": -0.005, "szp4_late": 0.01, "whole": -0.005, "exact": -0.019}
    values |= changes
    szp, exact = "szp 0.4, fresh", "perturbed_copy, carried"
    return [
        cell(szp, 1.9, 5, values["szp2"] - 0.01, speed=1.7),
        cell(szp, 1.9, 10, values["szp2"], speed=values.get("speed", 1.7)),
        cell(szp, 1.9, 20, values["szp2_late"]),
        cell("szp 1, fresh", 1.9, 10, values["whole"]),
        cell(exact, 1.9, 10, values["exact"]),
        cell(szp, 3.7, 10, values["szp4"], base="c", speed=1.1),
        cell(szp, 3.7, 20, values["szp4_late"], base="c", speed=0.9),
    ]


def verdicts(cells: list[Cell]) -> list[str]:
    return [claim.verdict for claim in claims(cells, "t", (5, 10, 20))]


def test_a_study_as_the_paper_says_reproduces_it():
    assert verdicts(planted()) == [YES] * 8


@pytest.mark.parametrize(
    ("changes", "number", "verdict"),
    [
        ({"szp4": -0.03}, 0, NO),  # 4x is better than 2x
        ({"szp2": 0.01, "whole": 0.02}, 0, NO),  # scratch is better than 2x
        ({"szp4": -0.0202}, 0, OPEN),
        ({"szp4_late": -0.01}, 1, NO),  # 4x still gains
        ({"szp4_late": 0.0001}, 1, OPEN),
        ({"szp2_late": -0.05}, 2, NO),  # the gain grows
        ({"exact": -0.03}, 3, NO),  # an exact operator is better
        ({"whole": -0.03}, 4, NO),
        ({"speed": 1.2, "exact": -0.03}, 5, YES),  # another arm still has 1.6
        ({"szp2_late": -0.0301}, 2, OPEN),
    ],
)
def test_verdicts_follow_the_numbers(changes, number, verdict):
    assert verdicts(planted(**changes))[number] == verdict


def test_one_seed_resolves_nothing():
    alone = [
        dataclasses.replace(c, **{n: {0: getattr(c, n)[0]} for n in ("losses", "ratios", "speedups", "with_base", "control")})
        for c in planted()
    ]  # fmt: skip
    assert verdicts(alone) == [OPEN] * 8


def test_a_verdict_needs_the_whole_interval():
    assert decide(Interval(-1, -2, -0.1, 3)) == YES and decide(Interval(1, 0.1, 2, 3)) == NO
    assert decide(Interval(-1, -3, 0.1, 3)) == OPEN and decide(Interval(-1, None, None, 1)) == OPEN
    assert decide(Interval(0.001, 0.0005, 0.0015, 3), 0.002, 0.0) == YES


def test_exact_methods_are_told_by_all_their_operators():
    assert is_exact("perturbed_copy, carried") and is_exact("perturbed_copy + identity_blocks, carried")
    assert not is_exact("perturbed_copy + stack, carried") and not is_exact("szp 0.4, fresh")


def test_the_warm_start_with_the_fewest_tokens_is_found_among_whole_arms():
    cells = planted(speed=1.7)
    assert fewest_tokens(cells, 2, 10).method == "szp 0.4, fresh"
    assert fewest_tokens(cells, 4, 10).growth_factor == 3.7 and fewest_tokens(cells, 8, 10) is None
    half = dataclasses.replace(cell("lucky, carried", 1.9, 10, -0.1, speed=9.0), speedups={0: Bounded(9.0)})
    assert fewest_tokens([*cells, half], 2, 10).method == "szp 0.4, fresh"


def as_runs(rows):
    """Rows of a planted study with the columns of this one's table."""
    import pandas

    frame = pandas.DataFrame(rows)
    frame["kind"] = frame["method"].map({"scratch": SCRATCH}).fillna(GROWN)
    frame["target"] = frame["params"].map(str)
    frame["rung"] = frame["tokens"] / frame["params"]
    return frame


def test_advice_is_right_on_cells_that_were_left_out_of_a_study_whose_law_is_known():
    choices = check_advice(as_runs(study(3, noise=0.001, sizes=(1e6, 4e6))), ("grown",))
    assert len(choices) == 6 and sum(choice.good for choice in choices) >= 5
    truth = {1.0: 0.0} | {g: log_ratio(g, 10.0) for g in FACTORS}
    right = min(truth, key=truth.__getitem__)
    assert all(choice.best == pytest.approx(right) for choice in choices if choice.rung == 10)


def test_the_laws_have_not_seen_the_cell_that_they_are_asked_about(monkeypatch):
    seen, fit = [], GrowthLaws.fit

    def recorded(runs, **options):
        seen.append({(row.params, row.rung) for row in runs.itertuples()})
        return fit(runs, **options)

    monkeypatch.setattr(GrowthLaws, "fit", recorded)
    choices = check_advice(as_runs(study(0, seeds=1, sizes=(1e6, 4e6))), ("grown",))
    everything = set.union(*seen)
    assert [everything - cells for cells in seen] == [{(float(c.target), c.rung)} for c in choices]


def test_wrong_advice_is_counted_as_wrong():
    """Laws of a study in which growing gains say nothing on a target where it does not: the advice is wrong there."""
    rows = study(0, sizes=(1e6,), seeds=1) + study(0, sizes=(4e6,), seeds=1, gain={k: -v for k, v in GAIN.items()})
    assert any(not choice.good for choice in check_advice(as_runs(rows), ("grown",)))


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("text")
    files = folder / "train.txt", folder / "held-out.txt"
    for file, count in zip(files, (30000, 2500), strict=True):
        file.write_text(" ".join(chain(WORDS, 2, count)))
    return files


def opened(folder: Path, text: tuple[Path, Path], setting=QUICK) -> Study:
    return Study(folder, setting, prepare(folder, setting, [text[0]], [text[1]]))


def planted_records(made: Study, loss) -> None:
    """Files as finished runs leave them, with losses by kind, seed and tokens."""
    (made.folder / DONE).mkdir()
    for job in made.jobs:
        size = made.trained_size(job)
        rows = [
            {"rung": rung, "tokens": n * made.setting.length, "loss": loss(job, n * made.setting.length)}
            for rung, n in zip(job.rungs, made.horizons(job), strict=False)
        ]
        record = {
            "name": job.name, "kind": job.kind, "target": job.target, "base": job.base, "method": job.method,
            "seed": job.seed, "size": size, "params": made.setting.params[size], "learning_rate": 0.01,
            "rate_factor": 1.0 if job.arm else None, "arm": None, "rows": rows, "trained_flops": 1.0, "seconds": 1.0,
            "base_tokens": made.base_tokens(job.base) if job.base and not job.is_transferred else None,
            "device": "CPU, one thread", "torch": "2",
        }  # fmt: skip
        (made.folder / DONE / f"{job.name}.json").write_text(json.dumps(record))


def test_speedups_and_both_costs_are_those_of_planted_losses(tmp_path, text):
    made = opened(tmp_path / "study", text)
    params = made.setting.params["target"]

    def loss(job: Job, tokens: float) -> float:
        level = scratch_loss(1e6, 3e6 * tokens / params) + 0.01 * job.seed
        if job.kind == TRANSFERRED:
            return level + 0.02
        if job.kind == CONTROL:
            return 2.0
        # Grown arms do what scratch does with half as many tokens again, by its ladder of logarithms.
        return loss(Job(SCRATCH, "target", job.seed, ()), 2 * tokens) if job.kind == GROWN else level

    planted_records(made, loss)
    runs = runs_of(made)
    assert set(runs["method"]) == {made.setting.method(arm) for arm in made.setting.arms} | {"scratch", "continue"}
    found = {(c.method, c.base, c.rung): c for c in cells_of(made, runs)}
    szp = found["szp 0.4, fresh", "width", 0.1]
    assert [b.value for b in szp.speedups.values()] == pytest.approx([2.0, 2.0], rel=5e-3)
    assert szp.speedup.mean == pytest.approx(2.0, rel=5e-3) and szp.change.mean < 0
    f, g = made.flops_per_token["target"], made.flops_per_token["width"]
    tokens = made.sequences("target", 0.1) * made.setting.length
    cost = made.base_tokens("width") * g / f
    assert szp.speedup_with_base.mean == pytest.approx(2 * tokens / (tokens + cost), rel=5e-3)
    assert szp.against_control.mean == pytest.approx(loss(Job(GROWN, "target", 0, ()), tokens) + 0.005 - 2.0)
    assert made.factor(next(job for job in made.jobs if job.kind == GROWN)) == 1.0
    report = Report.of(made, "quick")
    words = report.write(tmp_path)
    assert "2.00 (2.00 to 2.00) times fewer tokens" in words and "not resolvable" in words
    assert len(report.claims) == 8 and words.count("reproduced") + words.count("not resolvable") >= 8
    for name in ("isoflops", "tokens"):
        assert (tmp_path / f"growth-study-quick-{name}.png").read_bytes().startswith(b"\x89PNG")
    advice = advise_growth(2 * params, 20 * params, laws=tmp_path / "growth-study-quick-runs.csv")
    assert advice.advice == "grow"


@pytest.mark.parametrize("named, judged", [((5.0, 10.0, 20.0), False), ((500.0, 1000.0, 2000.0), True)])
def test_budgets_that_a_short_text_left_below_a_token_per_parameter_judge_nothing(tmp_path, text, named, judged):
    """And they are said, in words and on the axis, as what they hold."""
    setting = dataclasses.replace(QUICK, rungs=named, scratch_rungs=(*named, 2 * named[-1]), max_epochs=0.5)
    if judged:  # a text that is long enough for this target, and still too short for what was asked
        setting = dataclasses.replace(setting, max_epochs=10.0, base_rung=named[0])
    made = opened(tmp_path / "study", text, setting)
    held = made.scale("target") * named[0]
    assert made.scale("target") < 1 and (held >= 1) == judged
    planted_records(made, lambda job, tokens: 4.0 - 0.1 * math.log(tokens) + 0.01 * job.seed)
    report = Report.of(made, "quick")
    words = report.write(tmp_path)
    assert (len(report.claims) > 0) == ("The paper's claims\n" in words) == ("The advice on" in words) == judged
    assert ("none is judged or fitted" in words) != judged
    assert f"(tokens per parameter: {made.scale('target') * named[1]:.2g} of target)" in words
    for name in ("isoflops", "tokens"):
        assert (tmp_path / f"growth-study-quick-{name}.png").is_file()


def test_a_study_of_arms_alone_lets_the_trials_choose_and_scratch_try_what_muP_carries_over(tmp_path, text):
    setting = dataclasses.replace(
        QUICK, scratch_factors=(2.0, 1.0), factors=(2.0, 1.0), checks=(), arms=(*QUICK.arms[:2], QUICK.arms[3])
    )
    made = opened(tmp_path / "study", text, setting)
    of_factor = {2.0: 0.2, 1.0: 0.1}

    def loss(job: Job, tokens: float) -> float:
        level = 4.0 - 0.1 * math.log(tokens) + 0.01 * job.seed
        if job.kind in (GROWN_TRIAL, TRANSFERRED_TRIAL):  # the asymmetric reset is chosen, by the lower of its two
            return 3.0 + of_factor[job.rate] + (0.0 if job.arm and job.arm.state == ASYMMETRIC else 0.05)
        if job.kind == TRIAL:
            return 1.0 / job.rate  # the highest rate is tuned
        return level - (0.2 if job.kind == GROWN and job.arm.width == "szp" else 0.1 * (job.kind == GROWN))

    planted_records(made, loss)
    transferred = next(job for job in made.jobs if job.kind == TRANSFERRED)
    assert [trial.rate for trial in made.trials(transferred)] == [2.0, 1.0]
    assert made.factor(transferred) == 1.0 and made.rate(transferred) == max(QUICK.rates)
    assert made.rate(made.trials(transferred)[0]) == 2 * max(QUICK.rates)
    report = Report.of(made, "quick")
    words = report.write(tmp_path)
    assert "**szp 0.4, fresh** from width" in words and "not reproduced" not in words and "laws" not in words
    assert "seed 1000, which is not among these: perturbed_copy, asymmetric reset from width," in words
    assert "| target | width | perturbed_copy, asymmetric reset | 2: 3.2000, 1: 3.1000 |" in words
    assert not list(tmp_path.glob("*.png")) and "png" not in words
    assert len(runs_of(made)) == sum(len(job.rungs) for job in made.jobs if not job.is_trial and job.seed != 1000)


def test_a_study_that_an_older_version_began_goes_on(tmp_path, text):
    opened(tmp_path, text)
    said = json.loads((tmp_path / "study.json").read_text())
    del said["setting"]["scratch_factors"]
    (tmp_path / "study.json").write_text(json.dumps(said))
    opened(tmp_path, text)
    with pytest.raises(WarmstartError, match="differs in scratch_factors"):
        prepare(tmp_path, dataclasses.replace(QUICK, scratch_factors=(2.0, 1.0)), [], [])


def test_the_twofold_setting_compares_with_scratch_at_more_rates_than_any_arm_tries():
    setting, hour = SETTINGS["twofold"], SETTINGS["hour"]
    assert (
        all(setting.sizes[name] == hour.sizes[name] for name in setting.sizes)
        and setting.tuning_seed not in setting.seeds
    )
    assert all(1.5 <= setting.growth_factor(arm.target, arm.base) < 2.75 for arm in setting.arms)
    jobs = jobs_of(setting)
    own = [job for job in jobs if job.kind == TRIAL and job.target == "32x3"]
    carried = [job for job in jobs if job.kind == TRANSFERRED_TRIAL]
    assert len(own) > len(setting.factors) and {job.rate for job in carried} == set(setting.factors)
    assert len(setting.seeds) >= 8 and setting.scratch_rungs[-1] >= 2 * setting.rungs[1]


def test_budgets_shrink_where_the_text_is_short(tmp_path, text):
    made = opened(tmp_path, text)
    longest = next(job for job in made.jobs if job.kind == SCRATCH)
    assert made.scale("target") == 1.0 and made.horizons(longest)[-1] * 16 == pytest.approx(
        0.4 * made.setting.params["target"], abs=16
    )
    short = Study(tmp_path, dataclasses.replace(QUICK, max_epochs=0.03), made.text)
    assert short.scale("target") < 1
    most = max(n for job in short.jobs if job.kind != BASE for n in short.horizons(job))
    assert most * 16 <= 0.03 * short.text.tokens + 16


# -- running -------------------------------------------------------------------------------------------------------------


def test_what_a_grown_arm_starts_from(tmp_path, text):
    """Its base's weights and moments, grown; muP's factors on its rates; a control is its base as it was."""
    setting = dataclasses.replace(QUICK, arms=(Arm("target", "width"), paper("target", "width")), rates=(0.01,))
    made = opened(tmp_path, text, setting)
    base = next(job for job in made.jobs if job.kind == BASE and job.seed == 0)
    for job in made.jobs[: made.jobs.index(base) + 1]:
        if job.kind == TRIAL or job is base:
            made.run(job)
    saved = torch.load(made.states / f"{base.name}.pt")
    step = made.base_tokens("width") // (setting.batch * setting.length)
    assert {int(entry["step"]) for entry in saved["optimizer"]["state"].values()} == {step}
    control = next(job for job in made.jobs if job.kind == CONTROL)
    model, optimizer = made._continued(control, 0.01)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in saved["model"].items())
    assert len(optimizer.state) == len(list(model.parameters()))
    carried, szp = (next(job for job in made.jobs if job.kind == GROWN and job.arm == arm) for arm in setting.arms)
    model, optimizer = made._grown(carried, 0.01)
    assert {int(entry["step"]) for entry in optimizer.state.values()} == {step}
    assert all(float(entry["exp_avg_sq"].mean()) > 0 for entry in optimizer.state.values())
    model, optimizer = made._grown(szp, 0.01)
    factors = {name: group[RATE_FACTOR] for group in optimizer.param_groups for name in group["param_names"]}
    assert not optimizer.state and factors["model.embed_tokens.weight"] == 1
    assert factors["model.layers.0.mlp.up_proj.weight"] == pytest.approx(16 / 32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = {}

    def kept(found, _):
        moved.update({name: not torch.equal(before[name], p) for name, p in found.named_parameters()})

    made._begin, made._keep = lambda job, rate: (model, _frozen(optimizer)), lambda job, *both: kept(*both)
    made.factor = lambda job: 1.0
    made.run(szp)
    assert moved["model.layers.0.mlp.up_proj.weight"] is False and moved["model.embed_tokens.weight"] is True


def _frozen(optimizer):
    """With a factor of 0 on the rates of muP's matrices, which then must not move."""
    for group in optimizer.param_groups:
        group[RATE_FACTOR] = 0.0 if group[RATE_FACTOR] < 1 else 1.0
    return optimizer


def test_a_run_that_is_under_way_elsewhere_is_left_alone(tmp_path, text):
    made = opened(tmp_path, text)
    first = made.jobs[0]
    with held(made, first) as mine, held(made, first) as again:
        assert mine and not again
    with held(made, first) as freed:
        assert freed


def test_a_study_of_something_else_and_missing_text_are_refused(tmp_path, text):
    opened(tmp_path, text)
    with pytest.raises(WarmstartError, match="another study, which differs in batch"):
        prepare(tmp_path, dataclasses.replace(QUICK, batch=4), [], [])
    with pytest.raises(WarmstartError, match="holds no study yet"):
        prepare(tmp_path / "new", QUICK, [], [])
    with pytest.raises(WarmstartError, match=r"No such files: .*nowhere.txt"):
        prepare(tmp_path / "new", QUICK, [tmp_path / "nowhere.txt"], [text[1]])
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match="no finished runs"):
        main(["--output", str(tmp_path)])


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, text, monkeypatch, capsys):
    made = opened(tmp_path, text)
    done = []

    def run(self, job):
        if job.kind == TRIAL and job.target == "width":
            raise WarmstartError("planted")
        done.append(job)
        (self.folder / DONE).mkdir(exist_ok=True)
        record = {"rows": [{"loss": 1.0}], "seconds": 0.1, "trained_flops": 0, "size": job.target}
        (self.folder / DONE / f"{job.name}.json").write_text(json.dumps(record))
        return record

    monkeypatch.setattr(Study, "run", run)
    monkeypatch.setattr(Study, "is_done", lambda self, job: self.record(job.name) is not None)
    work(made)
    assert "planted" in next((tmp_path / "failed").glob("*.txt")).read_text()
    assert {job.target for job in done} == {"target", "depth"} and not any(job.base == "width" for job in done)


@pytest.mark.slow
def test_the_quick_study_ends_in_a_report_and_no_run_is_done_twice(tmp_path, text, capsys):
    folder, document = tmp_path / "study", tmp_path / "document.md"
    command = ["--text", str(text[0]), "--eval-text", str(text[1]), "--output", str(folder)]
    with contextlib.suppress(SystemExit):  # where no reported run ended in time
        main([*command, "--minutes", "0.1"])
    part = {file: file.stat().st_mtime_ns for file in (folder / DONE).iterdir()}
    assert 0 < len(part) < len(jobs_of(QUICK))
    document.write_text(
        "before\n<!-- quick: made by benchmarks.growth_factor -->\nNot run yet.\n<!-- quick: end -->\nafter\n"
    )
    main([*command, "--document", str(document)])
    made = opened(folder, text)
    assert all(made.is_done(job) for job in made.jobs) and not list((folder / "failed").glob("*"))
    assert all(file.stat().st_mtime_ns == time for file, time in part.items())
    words = document.read_text()
    assert words.startswith("before\n") and words.endswith("after\n") and "Not run yet" not in words
    assert f"{len(made.jobs)} of {len(made.jobs)} runs" in words
    again = {file: file.stat().st_mtime_ns for file in (folder / DONE).iterdir()}
    main(["--output", str(folder)])
    assert again == {file: file.stat().st_mtime_ns for file in (folder / DONE).iterdir()}


def test_a_setting_is_cut_to_some_targets_with_all_that_they_need():
    setting = SETTINGS["hour"]
    cut = only(setting, ["32x3"])
    assert list(cut.sizes) == ["32x3", "20x3", "12x3"] and not cut.controls
    assert {job.target for job in jobs_of(cut) if job.kind != TRIAL} == {"32x3", "20x3", "12x3"}
    assert cut.arms and all(arm in setting.arms for arm in cut.arms)
    with pytest.raises(WarmstartError, match=r"no targets \['30x3'\]; it has \['48x3', '32x3'\]"):
        only(setting, ["30x3", "32x3"])
