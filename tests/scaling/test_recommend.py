"""From a checkpoint's state to settings: the planted laws give the expected numbers, doubts are said, refusals are clear."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from hf_warmstart import HparamPredictor, WarmstartError, grow
from hf_warmstart.growth.plan import RECORD_KEY
from hf_warmstart.scaling.hparams.presets import preset_names
from hf_warmstart.scaling.hparams.recommend import _divided
from hf_warmstart.scaling.tables.compute import count_parameters, flops_per_token
from hf_warmstart.scaling.tables.evaluation import Fingerprint, evaluate, fingerprint

from ..models import some_tokens, tiny_config, tiny_model
from .planted import Planted
from .test_fitting import mixed

LAWS = Planted()
RUN = {"params": 1e8, "tokens": 2e9, "sequence_length": 128}


def said(found, words: str) -> bool:
    return any(words in warning for warning in found.warnings)


def test_the_settings_are_read_at_the_sum_of_equivalent_and_planned_compute(predictor):
    found = predictor.recommend(**RUN, eval_loss=LAWS.loss(5e18))
    total = 5e18 + 6 * 1e8 * 2e9
    assert found.equivalent_compute == pytest.approx(5e18, rel=1e-3) and found.planned_compute == 1.2e18
    assert found.total_compute == pytest.approx(total, rel=1e-3)
    assert found.optimal_learning_rate == pytest.approx(LAWS.learning_rate(total), rel=1e-3)
    assert found.optimal_batch_tokens == pytest.approx(LAWS.batch_tokens(total), rel=1e-3)
    assert found.batch_tokens == found.batch_sequences * 128 == pytest.approx(found.optimal_batch_tokens, rel=0.03)
    assert found.steps == math.ceil(2e9 / found.batch_tokens)
    assert said(found, "Retention")


def test_from_scratch_the_checkpoint_is_worth_nothing(predictor):
    found = predictor.recommend(**RUN)
    assert found.equivalent_compute == 0 and found.total_compute == found.planned_compute
    assert "equivalent_compute" not in found.intervals and not said(found, "Retention")


def test_a_worse_checkpoint_takes_a_higher_rate_and_a_smaller_batch(predictor):
    good, bad = (predictor.recommend(**RUN, eval_loss=LAWS.loss(c)) for c in (2e19, 2e17))
    assert bad.learning_rate > good.learning_rate and bad.batch_tokens < good.batch_tokens


def probes(rates, batch: float = 1e5, tokens: float = 1e8, loss=lambda rate: 3.0, **more) -> list[dict[str, float]]:
    """Short runs at some rates."""
    shared = {"batch_tokens": batch, "tokens": tokens, **more}
    return [{"learning_rate": rate, "loss": loss(rate), **shared} for rate in rates]


def test_a_probe_counts_where_it_says_more_than_the_loss_before(predictor):
    """A checkpoint of other text: worth nothing by its first loss, and much by the loss after a short run."""
    spent = 6 * 1e8 * 1e8
    before = {"eval_loss": LAWS.loss(1e15)}
    blind = predictor.recommend(**RUN, **before)
    found = predictor.recommend(**RUN, **before, probes=probes([1e-3], loss=lambda _: LAWS.loss(5e18 + spent)))
    assert found.equivalent_compute == pytest.approx(5e18, rel=1e-2) and "probe" in str(
        found.sources["equivalent_compute"]
    )
    assert found.learning_rate < blind.learning_rate and found.batch_tokens > blind.batch_tokens
    low, high = found.intervals["equivalent_compute"]
    assert low <= found.equivalent_compute * 1.01 and high >= found.equivalent_compute * 0.99
    assert said(found, "1 probes do not tell where the best learning rate lies")
    worse = probes([1e-3], loss=lambda _: LAWS.loss(1e18))
    useless = predictor.recommend(**RUN, eval_loss=LAWS.loss(5e18), probes=worse)
    assert useless.equivalent_compute == pytest.approx(5e18, rel=1e-3)


WORTH = 4e16  # of a checkpoint that is new to the text


@pytest.mark.parametrize("off", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("batch", [1.0, 3.0])
def test_probes_at_several_rates_correct_the_law_by_what_this_model_prefers(predictor, off, batch):
    """A model whose best rates are `off` times the law's: at few tokens it shows, and the rate of the run follows."""
    own = LAWS.learning_rate(WORTH + 6 * 1e8 * 1e8) * off
    batch *= LAWS.batch_tokens(WORTH + 6 * 1e8 * 1e8)
    at_batch = own * (batch / LAWS.batch_tokens(WORTH + 6 * 1e8 * 1e8)) ** 0.4
    rates = 3e-3 * 2.0 ** np.arange(-6, 4)

    def loss(rate: float) -> float:
        return 3.6 + 0.015 * math.log(rate / at_batch) ** 2

    law = predictor.recommend(**RUN, eval_loss=LAWS.loss(WORTH))
    found = predictor.recommend(**RUN, eval_loss=LAWS.loss(WORTH), probes=probes(rates, batch, loss=loss))
    assert found.learning_rate == pytest.approx(off * law.learning_rate, rel=0.01)
    assert found.batch_tokens == law.batch_tokens and not said(found, "best probe")
    low, high = found.intervals["learning_rate"]
    assert low <= found.learning_rate <= high and high / low < 1.05 * max(1.1, law.intervals["learning_rate"][1] / low)
    assert (
        f"{off:.2g}"[:2] in found.sources["learning_rate"]
        and "10 probes of 100,000,000" in found.sources["learning_rate"]
    )
    # Cut off below the best: the end is said, and nothing is taken beyond it.
    few = [row for row in probes(rates, batch, loss=loss) if row["learning_rate"] < at_batch / 1.5]
    cut = predictor.recommend(**RUN, eval_loss=LAWS.loss(WORTH), probes=few)
    assert said(cut, "the highest learning rate of all") and cut.learning_rate < found.learning_rate
    # From a checkpoint that is worth more of the text than the probes saw, nothing is taken.
    known = predictor.recommend(**RUN, eval_loss=LAWS.loss(5e18), probes=probes(rates, batch, loss=loss))
    assert known.learning_rate == predictor.recommend(**RUN, eval_loss=LAWS.loss(5e18)).learning_rate
    assert said(known, "so short a run from it prefers lower rates than a long one")
    # A run that diverged above the best closes that end.
    lost = {**few[-1], "learning_rate": 2 * few[-1]["learning_rate"], "loss": math.nan}
    assert not said(predictor.recommend(**RUN, eval_loss=LAWS.loss(WORTH), probes=[*few, lost]), "best probe")


def test_probes_correct_published_laws_too(predictor):
    run = {**RUN, "tokens_seen": 1e8}
    plain = HparamPredictor.from_pretrained("deepseek").recommend(**run)
    rates = plain.learning_rate * 2.0 ** np.arange(-1, 4)
    found = HparamPredictor.from_pretrained("deepseek").recommend(
        **run, probes=probes(rates, loss=lambda rate: 3 + math.log(rate / rates[2]) ** 2)
    )
    assert found.learning_rate > 1.2 * plain.learning_rate and found.equivalent_compute == plain.equivalent_compute


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (probes([1e-3, 2e-3]) + probes([4e-3], batch=2e5), "have batch_tokens from 100000 to 200000"),
        (probes([1e-3, 2e-3]) + probes([4e-3], tokens=2e8), "have tokens from 1e\\+08 to 2e\\+08"),
        (probes([1e-3], loss=lambda _: -1.0), "None of 1 runs is usable"),
        ([{"learning_rate": 1e-3, "loss": 3.0, "tokens": 1e8}], "batch"),
        ([], "empty"),
    ],
)
def test_probes_that_say_nothing_are_refused(predictor, rows, words):
    with pytest.raises(WarmstartError, match=words):
        predictor.recommend(**RUN, eval_loss=3.0, probes=rows)


def test_the_rate_follows_the_rounded_batch_along_the_ridge(predictor):
    free = predictor.recommend(**RUN)
    held = predictor.recommend(**RUN, world_size=8, per_device_train_batch_size=100)
    assert held.batch_sequences == 800 * held.gradient_accumulation_steps
    ratio = held.batch_tokens / free.optimal_batch_tokens
    assert (
        held.learning_rate == pytest.approx(free.optimal_learning_rate * ratio**0.4, rel=1e-3)
        and abs(ratio - 1) > 0.01
    )
    large = predictor.recommend(**RUN, batch_tokens=2**24)
    assert large.batch_tokens == 2**24 and said(large, "moved further along the ridge")
    assert large.sources["batch_tokens"] == "given"


@pytest.mark.parametrize("share", [0.3, 1.0, 5.4, 8.0, 11.0, 37.0, 1000.0])
@pytest.mark.parametrize("per_device", [None, 4, 16])
def test_batches_divide_as_evenly_as_they_can(share, per_device):
    size, accumulation = _divided(share, per_device)
    assert size == (per_device or size) and size <= (per_device or 8) and accumulation >= 1
    made = size * accumulation
    others = [size * k for k in (accumulation - 1, accumulation + 1) if k >= 1]
    assert all(abs(math.log(made / share)) <= abs(math.log(o / share)) + 1e-9 for o in others)


def test_intervals_hold_the_estimate_and_widen_with_the_losss_error(noisy):
    found = noisy.recommend(**RUN, eval_loss=LAWS.loss(5e18))
    for name, value in (
        ("learning_rate", found.learning_rate),
        ("batch_tokens", found.optimal_batch_tokens),
        ("equivalent_compute", found.equivalent_compute),
        ("total_compute", found.total_compute),
    ):
        low, high = found.intervals[name]
        assert low < value < high < 2 * low, name
    cautious = noisy.recommend(**RUN, eval_loss=LAWS.loss(5e18), cautious=True)
    assert cautious.learning_rate == found.intervals["learning_rate"][0]


def test_far_from_the_data_it_says_how_far(predictor):
    found = predictor.recommend(params=1e10, tokens=1e12, sequence_length=4096)
    assert said(found, "Extrapolated: compute 6e+22 is 1.9e+03 times the largest")
    assert said(predictor.recommend(params=1e6, tokens=1e8, sequence_length=64), "times below the smallest")
    assert said(predictor.recommend(**RUN, eval_loss=2.3), "below the lowest that was fitted")
    assert said(predictor.recommend(params=1e8, tokens=1e6, sequence_length=128), "Only ")


@pytest.mark.parametrize("loss", [1.5, 1.2])
def test_a_loss_at_the_floor_is_no_compute(predictor, loss):
    with pytest.raises(WarmstartError, match="at or below .* tokens_seen="):
        predictor.recommend(**RUN, eval_loss=loss)
    found = predictor.recommend(**RUN, eval_loss=loss, tokens_seen=1e10)
    assert found.equivalent_compute == 6e18 and said(found, "at or below")


def test_losses_that_many_draws_never_reach_warn(noisy):
    loss = float(np.quantile(np.exp(noisy.loss_law.draws[:, 0]), 0.8))
    if loss <= noisy.loss_law.floor:
        loss = noisy.loss_law.floor * 1.001
    found = noisy.recommend(**RUN, eval_loss=loss)
    assert said(found, "draws never reach") and found.intervals["equivalent_compute"][1] == math.inf
    assert 0 < found.intervals["learning_rate"][0] < found.learning_rate


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 0}, "tokens=0 must be positive"),
        ({"tokens": 20}, "less than one sequence"),
        ({"params": 7}, "params=7 must be a count"),
        ({"params": None}, "number of parameters is not known"),
        ({"eval_loss": -1.0}, "eval_loss=-1.0"),
        ({"eval_loss": math.nan}, "eval_loss=nan"),
        ({"world_size": 0}, "world_size=0"),
        ({"per_device_train_batch_size": 1.5}, "per_device_train_batch_size=1.5"),
        ({"batch_tokens": 64}, "below one sequence of 128"),
        ({"replay_share": 1.0}, "replay_share=1.0"),
        ({"eval_dataset": [1], "eval_loss": 2.0}, "exclude one another"),
        ({"eval_dataset": [1]}, "needs model= or checkpoint="),
        ({"tokens_seen": -1}, "tokens_seen=-1"),
        ({"tokens_seen": 1e9}, "held-out loss is. Pass eval_dataset="),
        ({"learning_rte": 1}, r"no options \['learning_rte'\]"),
        ({"checkpoint": "/nowhere/at/all"}, "gives no config"),
    ],
)
def test_what_cannot_be_is_refused(predictor, changes, words):
    with pytest.raises(WarmstartError, match=words):
        predictor.recommend(**RUN | changes)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_at(folder, config, *, tokens=10**9, loss=3.0, rates=(1e-3, 2e-3, 1e-3, 1e-5), step=4):
    logs = [{"step": k + 1, "learning_rate": rate} for k, rate in enumerate(rates)]
    logs.append({"step": step, "eval_loss": loss})
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    state = {"log_history": logs, "global_step": 4, "max_steps": 4, "num_input_tokens_seen": tokens}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_a_trainers_checkpoint_says_parameters_loss_tokens_and_whether_it_is_annealed(predictor, tmp_path):
    config = tiny_config("llama")
    folder = checkpoint_at(tmp_path / "a", config)
    found = predictor.recommend(checkpoint=folder, tokens=1e8, sequence_length=64)
    assert found.params == count_parameters(config).non_embedding and found.eval_loss == 3.0
    assert found.equivalent_compute == pytest.approx(predictor.loss_law.inverse(3.0))
    assert said(found, "trainer_state.json") and said(found, "looks annealed")
    assert f"{6 * found.params * 1e9:.3g} were spent" in found.sources["equivalent_compute"]
    open_ended = checkpoint_at(tmp_path / "b", config, rates=(1e-3, 2e-3, 2e-3, 2e-3))
    assert not said(predictor.recommend(checkpoint=open_ended, tokens=1e8, sequence_length=64), "annealed")
    stale = checkpoint_at(tmp_path / "c", config, step=2)
    with pytest.raises(WarmstartError, match="held-out loss is"):
        predictor.recommend(checkpoint=stale, tokens=1e8, sequence_length=64)


def test_damaged_checkpoints_are_refused(predictor, tmp_path):
    folder = checkpoint_at(tmp_path / "a", tiny_config("llama"))
    (folder / "trainer_state.json").write_text("{")
    with pytest.raises(WarmstartError, match="trainer_state.json of a cannot be read"):
        predictor.recommend(checkpoint=folder, tokens=1e8, sequence_length=64)
    with pytest.raises(WarmstartError, match="number of parameters is not known"):
        predictor.recommend(checkpoint=tmp_path, tokens=1e8, sequence_length=64)


def test_a_model_is_measured_on_the_evaluation_set(predictor, tmp_path):
    model, rows = tiny_model("llama"), some_tokens(6, 33)
    measured = evaluate(model, rows)
    laws = replace(predictor.laws, fingerprint=fingerprint(rows, config=model.config))
    law = HparamPredictor(laws)
    found = law.recommend(model=model, eval_dataset=rows, tokens=1e8, sequence_length=64)
    assert found.eval_loss == pytest.approx(measured.loss) and found.sources["eval_loss"] == "measured"
    assert not said(found, "which text")
    model.save_pretrained(tmp_path / "m")
    again = law.recommend(checkpoint=tmp_path / "m", eval_dataset=rows, tokens=1e8, sequence_length=64)
    assert again.learning_rate == pytest.approx(found.learning_rate)
    low, high = found.intervals["equivalent_compute"]
    assert high > 1.01 * low  # the loss's own error, since the law here has none


def test_losses_of_other_text_tokenizer_or_family_are_refused_unless_trusted(predictor):
    model, rows = tiny_model("llama"), some_tokens(6, 33)
    law = HparamPredictor(replace(predictor.laws, fingerprint=fingerprint(rows, config=model.config)))
    run = {"tokens": 1e8, "sequence_length": 64}
    with pytest.raises(WarmstartError, match="evaluation set is not the law's"):
        law.recommend(model=model, eval_dataset=rows[:3], **run)
    with pytest.raises(WarmstartError, match="the model is a opt, the law's runs were llama"):
        law.recommend(config=tiny_config("opt"), eval_loss=3.0, **run)
    with pytest.raises(WarmstartError, match="100 tokens in its vocabulary, the law's 97"):
        law.recommend(config=tiny_config("llama", vocab_size=100), eval_loss=3.0, **run)
    trusted = law.recommend(config=tiny_config("opt"), eval_loss=3.0, trust_loss=True, **run)
    assert said(trusted, "Taken on trust: the model is a opt")
    assert said(law.recommend(**RUN, eval_loss=3.0), "Nothing says on which text")
    assert not said(law.recommend(**RUN, eval_loss=3.0, eval_fingerprint=law.laws.fingerprint), "which text")


def test_another_tokenizers_loss_is_mapped_by_bits_per_byte(predictor):
    own = Fingerprint("ids-1", 1000, text="t", bytes=4000, tokenizer="a", vocab_size=97)
    other = Fingerprint("ids-2", 2000, text="t", bytes=4000, tokenizer="b", vocab_size=50)
    law = HparamPredictor(replace(predictor.laws, fingerprint=own))
    found = law.recommend(**RUN, eval_loss=1.5, eval_fingerprint=other)
    assert found.eval_loss == 3.0 and said(found, "bits per byte")
    assert found.learning_rate == predictor.recommend(**RUN, eval_loss=3.0).learning_rate


def test_a_grown_models_record_supplies_its_size_and_its_parents_tokens(predictor, tmp_path):
    parent = tiny_model("llama", randomised=False)
    child = grow(parent, depth=2)
    assert getattr(child.config, RECORD_KEY)
    found = HparamPredictor.from_pretrained("deepseek").recommend(
        model=child, tokens=1e8, sequence_length=64, tokens_seen=1e9
    )
    assert found.params == count_parameters(child.config).non_embedding
    assert found.equivalent_compute == 6 * count_parameters(parent.config).non_embedding * 1e9
    folder = checkpoint_at(tmp_path / "grown", child.config, loss=3.1)
    found = predictor.recommend(checkpoint=folder, tokens=1e8, sequence_length=64)
    assert found.eval_loss == 3.1 and found.params == count_parameters(child.config).non_embedding
    (folder / "trainer_state.json").unlink()
    (folder / "growth.json").write_text(json.dumps({"metrics": {"eval_loss": 3.2}}))
    assert predictor.recommend(checkpoint=folder, tokens=1e8, sequence_length=64).eval_loss == 3.2
    (folder / "growth.json").write_text("{")
    with pytest.raises(WarmstartError, match="growth.json of grown cannot be read"):
        predictor.recommend(checkpoint=folder, tokens=1e8, sequence_length=64)


def test_compute_from_the_config_needs_a_config():
    config, rows = tiny_config("llama"), Planted().runs()
    rows["compute"] = 1.5 * 6 * rows["params"] * rows["tokens"]
    law = HparamPredictor.fit(rows, accounting="config", draws=20)
    with pytest.raises(WarmstartError, match="counts compute from the config"):
        law.recommend(**RUN)
    found = law.recommend(config=config, tokens=1e8, sequence_length=64)
    assert found.planned_compute == pytest.approx(1e8 * flops_per_token(config, 64))


# -- forms and presets ------------------------------------------------------------------------------------------------


def test_the_form_of_params_and_tokens_reads_at_the_models_own_size():
    law = HparamPredictor.fit(mixed(), draws=100)
    assert law.form == "params_tokens"
    loss = law.loss_law(params=6e7, tokens=5e9)
    found = law.recommend(params=6e7, tokens=2e9, sequence_length=512, eval_loss=loss)
    assert found.equivalent_compute == pytest.approx(6 * 6e7 * 5e9, rel=1e-3)
    assert found.optimal_learning_rate == pytest.approx(2 * 6e7**-0.5 * 7e9**0.1, rel=0.02)
    assert found.optimal_batch_tokens == pytest.approx(4 * 7e9**0.5, rel=0.02)
    assert found.intervals["learning_rate"][0] < found.learning_rate < found.intervals["learning_rate"][1]


@pytest.mark.parametrize("name", preset_names())
def test_presets_count_what_was_spent_and_say_so(name):
    law = HparamPredictor.from_pretrained(name)
    run = {"config": tiny_config("llama", hidden_size=1024), "params": 3e8, "tokens": 6e9, "sequence_length": 2048}
    found = law.recommend(**run, tokens_seen=6e9, eval_loss=3.0, batch_tokens=2**19)
    assert found.equivalent_compute == 6 * 3e8 * 6e9 and said(found, "knows compute only")
    assert found.intervals == {} and 1e-6 < found.learning_rate < 0.1
    with pytest.raises(WarmstartError, match="tokens_seen="):
        law.recommend(**run, eval_loss=3.0, batch_tokens=2**19)
    halved = law.recommend(**run, tokens_seen=6e9, eval_loss=3.0, batch_tokens=2**19, cautious=True)
    assert halved.learning_rate == found.learning_rate / 2


def test_presets_say_what_they_need_and_where_they_end():
    with pytest.raises(WarmstartError, match=r"Pass eval_loss="):
        HparamPredictor.from_pretrained("minicpm").recommend(**RUN)
    with pytest.raises(WarmstartError, match=r"none for the batch. Pass batch_tokens="):
        HparamPredictor.from_pretrained("marin").recommend(**RUN)
    with pytest.raises(WarmstartError, match=r"Pass checkpoint=, model= or config="):
        HparamPredictor.from_pretrained("marin").recommend(**RUN, batch_tokens=2**18)
    with pytest.raises(WarmstartError, match="is no law that could be loaded: .*'deepseek'"):
        HparamPredictor.from_pretrained("deepsek")
    far = HparamPredictor.from_pretrained("porian").recommend(params=7e9, tokens=1e11, sequence_length=2048)
    assert said(far, "Extrapolated: params 7e+09 is 63.6 times the largest")
    marin = HparamPredictor.from_pretrained("marin").recommend(
        config=tiny_config("llama", hidden_size=256), **RUN, batch_tokens=128 * 4096
    )
    assert marin.learning_rate == pytest.approx(0.33 * 64 / 256) and said(marin, "refuses learning rates above 0.01")


def test_deepseeks_own_models_come_out_as_released():
    """arXiv 2401.02954: 7B on 2T tokens, batch 2304 x 4096, rate 4.2e-4; from the law 9.2M tokens and 4.25e-4."""
    found = HparamPredictor.from_pretrained("deepseek").recommend(params=7e9, tokens=2e12, sequence_length=4096)
    assert f"{found.optimal_learning_rate:.3g}" == "0.000425" and f"{found.optimal_batch_tokens:.2g}" == "9.2e+06"
    assert found.recipe.schedule == "warmup_stable_decay" and found.recipe.sources["weight_decay"].startswith(
        "arXiv 2401"
    )
