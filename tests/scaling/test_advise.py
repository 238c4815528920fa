"""Advice: the choice that the runs bear out, the figures behind it, and what is not known said so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hf_warmstart import GrowthAdvice, WarmstartError, advise_growth, grow
from hf_warmstart.scaling.growing.gain_law import fit_gain
from hf_warmstart.scaling.growing.growth_laws import GrowthLaws
from hf_warmstart.scaling.growing.growth_runs import pairs_of, read_runs
from hf_warmstart.scaling.growing.published_growth import published_laws, published_runs
from tests.models import tiny_config, tiny_model

from .studies import FACTORS, log_ratio, scratch_loss, study

N, D = 134561280, 2691225600  # the size and 20 tokens per parameter of arXiv 2605.13405


@pytest.fixture(scope="module")
def laws() -> GrowthLaws:
    """Of a study with the noise of seeds."""
    return GrowthLaws.fit(study(5, noise=0.002), draws=60)


# -- the published laws ---------------------------------------------------------------------------------------------------


def test_about_twofold_growth_is_advised_at_twenty_tokens_per_parameter():
    advice = advise_growth(N, D)
    assert advice.advice == "grow" and advice.warnings == [advice.warnings[0]]
    assert 1.9 < advice.growth_factor < 2.4 and 3.5 < advice.upper_bound < 5.5
    # Read off the paper's runs: 1.14 to 1.30 times fewer tokens at about 2x. With the base's tokens counted there is no gain.
    assert 1.1 < advice.expected_speedup < 1.3
    assert advice.expected_speedup_with_base_cost == pytest.approx(
        advice.expected_speedup / (1 + 1 / advice.growth_factor**2), rel=1e-6
    )
    assert advice.expected_speedup_with_base_cost < 1
    assert "pays where the base exists anyway" in advice.warnings[0]
    assert advise_growth(N, D, count_base_cost=True).advice == "scratch"


def test_gains_fade_with_the_budget():
    advices = [advise_growth(N, each * N, base_params=N / 2) for each in (10, 20, 30, 200)]
    changes = [advice.estimates["loss_change"].value for advice in advices]
    assert changes == sorted(changes)
    assert [advice.advice for advice in advices] == ["grow", "grow", "grow", "scratch"]
    assert any("tokens per parameter 200 is outside the range of the fit (10 to 30" in w for w in advices[-1].warnings)


def test_beyond_the_bound_scratch_is_advised():
    assert advise_growth(N, D, base_params=N / 7).advice == "scratch"
    assert advise_growth(N, D, method="net2net").advice == "scratch"


def test_a_base_trained_on_is_advised_only_where_that_is_clear():
    starved = advise_growth(N, 2 * N, base_params=N / 2)
    assert starved.advice == "continue the base" and any("times the tokens" in word for word in starved.warnings)
    assert starved.options[0]["tokens"] == pytest.approx(4 * N)
    near = advise_growth(N, 10 * N, base_params=N / 2)
    assert near.options[0]["option"] == "continue the base" and near.advice == "grow"
    assert any("run it too" in word for word in near.warnings)


def test_extrapolation_is_said_with_the_range():
    said = " ".join(advise_growth(7e9, 1.4e11).warnings)
    assert "params 7e+09 is outside the range of the fit (3.23e+07 to 2.87e+08, arXiv 2605.13405)" in said
    said = " ".join(advise_growth(N, D, base_params=N / 2, base_tokens=200 * N / 2).warnings)
    assert "base tokens per parameter 200 is outside the range of the fit (20 only" in said


def test_held_out_sizes_of_the_paper_are_advised_well():
    """Leaving one target out at a time: how far the advised run is above the best one, at each budget."""
    runs = [run for run in published_runs() if run["method"] in ("scratch", "szp")]
    near = []
    for held_out in sorted({run["params"] for run in runs}):
        gain = fit_gain(pairs_of(read_runs([run for run in runs if run["params"] != held_out])), draws=30)
        fitted = GrowthLaws({"szp": gain}, published_laws().scratch, base_tokens_per_parameter=20.0)
        for each in (10, 20, 30):
            cell = [run for run in runs if (run["params"], run["tokens"]) == (held_out, each * held_out)]
            losses: dict[float, float] = {}
            for run in cell:
                base = run.get("base_params", held_out)
                losses[held_out / base] = min(run["loss"], losses.get(held_out / base, math.inf))
            family = [held_out / factor for factor in losses if 1 < factor < 10]
            advice = advise_growth(held_out, each * held_out, family=family, laws=fitted)
            chosen = 1.0 if advice.advice == "scratch" else min(losses, key=lambda g: abs(g - advice.growth_factor))
            near.append(losses[chosen] / min(losses.values()) - 1 <= 0.002)
    assert sum(near) >= 10 and len(near) == 12


# -- a user's own runs ----------------------------------------------------------------------------------------------------


def test_the_choice_is_right_on_held_out_cells_of_a_study():
    rows = study(2, noise=0.002)
    cells = [(params, each) for params in (1e6, 4e6) for each in (5.0, 10.0, 20.0)]
    right = 0
    for params, each in cells:
        kept = [row for row in rows if (row["params"], row["tokens"]) != (params, each * params)]
        laws = GrowthLaws.fit(kept, draws=30)
        advice = advise_growth(params, each * params, family=[params / g for g in FACTORS], laws=laws)
        truth = {1.0: 0.0} | {g: log_ratio(g, each) for g in FACTORS}
        chosen = 1.0 if advice.advice == "scratch" else min(FACTORS, key=lambda g: abs(g - advice.growth_factor))
        right += truth[chosen] - min(truth.values()) <= 0.002
    assert right >= len(cells) - 1


def test_figures_are_those_of_the_study(laws):
    advice = advise_growth(2e6, 2e7, base_params=1e6, base_tokens=2e7, laws=laws)
    change = math.expm1(log_ratio(2, 10))
    low, high = advice.intervals["loss_change"]
    assert low < change < high
    loss = scratch_loss(2e6, 2e7) * (1 + change)
    needed = (60 / (loss - 1.5 - 20 * 2e6**-0.3)) ** (1 / 0.3)
    assert advice.expected_speedup == pytest.approx(needed / 2e7, rel=0.05)
    assert advice.estimates["tokens_saved"].value == pytest.approx((advice.expected_speedup - 1) * 2e7, rel=1e-6)
    assert advice.expected_speedup_with_base_cost == pytest.approx(advice.expected_speedup * 2 / 3, rel=1e-6)
    assert not any("outside" in word for word in advice.warnings)
    assert "own runs" in advice.sources[0]


def test_runs_are_taken_as_a_table():
    advice = advise_growth(2e6, 2e7, laws=study(seeds=1))
    assert advice.advice == "grow" and advice.growth_factor == pytest.approx(
        math.exp(-0.5 * _a(10) / _b(10)), rel=0.01
    )


def _a(each: float) -> float:
    return -0.024 + 0.008 * math.log(each / 20)


def _b(each: float) -> float:
    return 0.015 - 0.003 * math.log(each / 20)


def test_what_one_growth_factor_cannot_tell_is_not_known():
    rows = study(seeds=1, factors=(2.0,), sizes=(2e6,))
    advice = advise_growth(2e6, 2e7, laws=rows)
    assert advice.advice == "grow" and advice.growth_factor == 2 and advice.upper_bound is None
    assert "one growth factor was run" in str(advice)
    # One size: tokens to equal loss are told, but not how other sizes would do.
    assert advice.expected_speedup is not None and advice.paths is None
    given = advise_growth(2e6, 2e7, base_params=1e6, laws=rows)
    assert [row["reason"] for row in given.options if row["option"] == "continue the base"] == [
        "the runs give no law over sizes"
    ]
    unknown = advise_growth(2e6, 2e7, laws=[row for row in rows if row["tokens"] < 3e7])
    assert unknown.expected_speedup is None and "no law of scratch" in str(unknown)
    single = advise_growth(2e6, 2e7, laws=[row for row in rows if row["tokens"] == 2e7])
    assert any("too few runs for intervals" in word for word in single.warnings) and not single.intervals


def test_growth_that_is_not_told_apart_is_not_advised_beyond_the_runs():
    far = advise_growth(N, 100 * N, base_params=N / 2)
    grown = next(row for row in far.options if row["option"] == "grow")
    assert grown["loss_change"] < 0 < grown["interval"][1]
    assert far.advice == "scratch" and any("not enough to advise it" in word for word in far.warnings)


# -- bases, targets, paths -------------------------------------------------------------------------------------------------


def test_bases_of_a_family_are_ranked_and_the_best_is_taken():
    advice = advise_growth(N, D, family={"tiny": N / 40, "small": N / 6, "half": N / 2.1, "same": N, "large": 2 * N})
    by_name = {row["name"]: row for row in advice.bases}
    assert [row["name"] for row in advice.bases if row["serves"]] == ["half"] and advice.bases[0]["name"] == "half"
    assert advice.growth_factor == pytest.approx(2.1)
    assert (
        by_name["large"]["reason"] == "larger than the target"
        and by_name["same"]["reason"] == "as large as the target"
    )
    assert "outside the range" in by_name["tiny"]["reason"]
    none = advise_growth(N, D, family={"small": N / 6, "large": 2 * N})
    assert none.advice == "scratch" and none.growth_factor == 1


def test_a_base_without_a_target_is_grown_where_it_gains_most():
    advice = advise_growth(None, 1.5e9, base_params=6e7)
    assert advice.base_params == pytest.approx(6e7) and 1.7 < advice.growth_factor < 3
    law = published_laws().gain()
    gained = law.log_ratio(advice.growth_factor, 1.5e9 / advice.params)
    for factor in (1.8, 2.0, 2.5, 3.0, 5.0):
        assert gained <= law.log_ratio(factor, 1.5e9 / (factor * 6e7)) + 1e-4


def test_a_target_of_the_base_s_own_size_continues_it():
    advice = advise_growth(N, D, base_params=N)
    assert advice.advice == "continue the base" and advice.growth_factor == 1


def test_stages_cost_what_one_jump_costs(laws):
    advice = advise_growth(4e6, 8e7, base_params=1e6, laws=laws)
    path = advice.paths
    assert path.sizes == pytest.approx((1e6, 2e6, 4e6))
    assert (path.jump_tokens - 8e7) * 4e6 == pytest.approx(path.middle_tokens * 2e6)
    # The middle ends where a base is: scratch at 20 tokens per parameter.
    grown = laws.scratch_loss(2e6, path.middle_tokens) * math.exp(laws.gain().log_ratio(2, path.middle_tokens / 2e6))
    assert grown == pytest.approx(laws.scratch_loss(2e6, 4e7), rel=1e-9)
    assert path.difference.value == pytest.approx((1 + path.staged.value) / (1 + path.at_once.value) - 1)
    assert path.better in ("staged", "at once", "not told apart")


# -- checkpoints ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A Trainer checkpoint's config and state."""
    folder = tmp_path / "checkpoint-100"
    tiny_config("llama", architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 100, "num_input_tokens_seen": 1234567}))
    return folder


def test_size_and_tokens_are_read_off_a_checkpoint(checkpoint):
    model = tiny_model("llama")
    params = sum(p.numel() for p in model.parameters())
    advice = advise_growth(None, 3e6, checkpoint=checkpoint)
    assert (advice.base_params, advice.base_tokens) == (pytest.approx(params), 1234567)
    assert any("1.23e+06 tokens (num_input_tokens_seen" in word for word in advice.assumptions)
    outside = model.num_parameters(exclude_embeddings=True)
    state = {"num_input_tokens_seen": 0, "total_flos": 6 * outside * 5e5}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    assert advise_growth(None, 3e6, checkpoint=checkpoint).base_tokens == pytest.approx(5e5)
    assert advise_growth(None, 3e6, checkpoint=checkpoint, base_tokens=7e5).base_tokens == 7e5


def test_a_grown_checkpoint_without_a_count_of_tokens_says_so(tmp_path):
    child = grow(tiny_model("llama"), width=2)
    child.save_pretrained(tmp_path)
    advice = advise_growth(2 * child.num_parameters(), 1e8, checkpoint=tmp_path)
    assert advice.growth_factor == pytest.approx(2) and advice.base_params == pytest.approx(child.num_parameters())
    said = " ".join(advice.assumptions)
    assert "was grown 1 times" in said and "does not say how many tokens" in said and "20 tokens per parameter" in said


def test_a_damaged_state_is_refused(checkpoint):
    (checkpoint / "trainer_state.json").write_text('{"total_flos": "many"}')
    with pytest.raises(WarmstartError, match="damaged"):
        advise_growth(None, 3e6, checkpoint=checkpoint)


# -- bad input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((134.6, 2.7e9), {}, "params=134.6 cannot be a count of parameters.*not millions or billions"),
        ((N, 20), {}, "tokens=20 cannot be a count of tokens"),
        ((N, N / 2), {}, "below one token per parameter"),
        ((N, D), {"base_params": 2 * N}, "growth factor would be 0.5, below 1"),
        ((N, math.nan), {"base_params": -1}, "tokens=nan must be a finite number; base_params=-1 cannot be"),
        (("134M", D), {}, "params='134M' must be a finite number"),
        ((True, D), {"base_tokens": 0}, "params=True must be.*base_tokens=0 cannot be"),
        ((None, D), {}, "params is missing"),
        ((N, D), {"base_params": 1e7, "family": [1e7]}, "more than once"),
        ((N, D), {"family": {"a": 1e7, "b": 3}}, r"family\['b'\]=3 cannot be"),
        ((N, D), {"family": []}, "no bases"),
        ((N, D), {"method": "magic"}, r"No law of method 'magic'; there are laws of \['net2net', 'szp'"),
        ((None, 1e7), {"base_params": 2e7}, "below one token per parameter"),
        ((N, D), {"checkpoint": "nowhere/at-all"}, "No model config"),
        ((N, D), {"laws": "nowhere.csv"}, "no file"),
        ((1e4, 1e6), {"checkpoint": "CHECKPOINT"}, "smaller than its base"),
        ((None, 2e4), {"checkpoint": "CHECKPOINT"}, "below one token per parameter"),
    ],
)
def test_numbers_that_cannot_be_are_refused(arguments, options, words, checkpoint):
    options = {name: checkpoint if value == "CHECKPOINT" else value for name, value in options.items()}
    with pytest.raises(WarmstartError, match=words):
        advise_growth(*arguments, **options)


def test_advice_is_plain_data_and_a_table():
    advice = advise_growth(N, D, base_params=N / 2)
    assert isinstance(advice, GrowthAdvice)
    data = json.loads(json.dumps(advice.to_dict()))
    assert data["estimates"]["upper_bound"]["value"] == advice.upper_bound
    words = str(advice)
    for part in ("grow by 2", "upper bound", "speed-up, base's cost counted", "Sources:", "arXiv 2605.13405"):
        assert part in words
