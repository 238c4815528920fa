"""The predictor as a whole: fits every kind of table, says what is odd, and survives a folder and the Hub unchanged."""

from __future__ import annotations

import math

import datasets
import numpy as np
import pandas as pd
import pytest

from hf_warmstart import HparamPredictor, WarmstartError
from hf_warmstart.scaling.hparams.presets import preset_names
from hf_warmstart.scaling.tables.evaluation import Fingerprint

from .planted import Planted
from .test_fitting import mixed

RUN = {"params": 1e8, "tokens": 2e9, "sequence_length": 128, "eval_loss": 3.0}


def test_every_kind_of_table_gives_the_same_laws(predictor, tmp_path):
    frame = Planted().runs()
    frame.to_parquet(tmp_path / "runs.parquet")
    for source in (frame.to_dict("records"), datasets.Dataset.from_pandas(frame), str(tmp_path / "runs.parquet")):
        again = HparamPredictor.fit(source, draws=200)
        assert again.recommend(**RUN).learning_rate == pytest.approx(
            predictor.recommend(**RUN).learning_rate, rel=1e-9
        )


@pytest.mark.parametrize("form", ["compute", "params_tokens", "auto"])
def test_forms_can_be_asked_for(form):
    law = HparamPredictor.fit(mixed(noise=0.002), form=form, draws=50)
    assert law.form == ("params_tokens" if form == "auto" else form) and law.loss_law is not None
    assert set(law.laws.forms) == {"compute", "params_tokens"} and "regret of compute" in str(law)


@pytest.mark.parametrize("method", ["quadratic", "near_optimal", "interpolation"])
def test_methods_can_be_asked_for(method):
    law = HparamPredictor.fit(Planted().runs(120), method=method, draws=50)
    assert {o["method"] for o in law.laws.optima} == {method}
    assert law.laws.learning_rate(compute=1e18) == pytest.approx(Planted().learning_rate(1e18), rel=0.3)


def test_diverged_unfinished_and_repeated_runs_do_not_move_the_laws(predictor):
    frame = Planted().runs().assign(state="finished")
    worse = frame.head(20).assign(loss=1.0, state="crashed")
    nans = frame.tail(20).assign(loss=math.nan, learning_rate=0.5)
    twice = frame.iloc[40:60].assign(loss=frame.iloc[40:60]["loss"] - 0.5)
    law = HparamPredictor.fit(pd.concat([frame, worse, nans, twice]), draws=200)
    assert law.recommend(**RUN).learning_rate == pytest.approx(predictor.recommend(**RUN).learning_rate, rel=1e-9)
    reasons = law.runs.set_aside["reason"].str.split(":").str[0].value_counts().to_dict()
    # Several diverged runs of the same settings count one by one: none of them is in the fit.
    assert reasons == {"incomplete": 20, "diverged": 20, "duplicate": 20}
    assert "20 diverged" in str(law)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f[f["params"] < f["params"].unique()[2]], "at least 3 budgets .* got 2"),
        (lambda f: f.assign(loss=math.nan), "None of 150 runs is usable: diverged"),
        (lambda f: f.assign(learning_rate=f["learning_rate"] * 1000), "above 1"),
        (lambda f: f.assign(batch_tokens=f["batch_tokens"] / 1e6), "below one sequence"),
        (lambda f: f.drop(columns=["loss"]), "loss is missing"),
        (lambda f: f.rename(columns={"tokens": "toks"}), "tokens is missing .nearest: 'toks'"),
        (lambda f: f.assign(compute=6 * f["params"] * f["tokens"] / 8.64e19), "seems to be in PF-days"),
        (lambda f: f.assign(tokens=f["tokens"] / 1e9), "more than the whole run's tokens"),
        (lambda f: f.groupby("params").head(2), "None of 5 budgets .* has 3 runs"),
    ],
)
def test_tables_that_laws_cannot_be_fitted_to_are_refused(change, words):
    with pytest.raises(WarmstartError, match=words):
        HparamPredictor.fit(change(Planted().runs()))


def test_losses_without_a_law_leave_the_settings_and_say_so():
    flat = Planted(above=-0.05).runs()
    law = HparamPredictor.fit(flat, draws=20)
    assert law.loss_law is None and any("No law of loss" in words for words in law.warnings)
    assert law.recommend(params=1e8, tokens=2e9, sequence_length=128).learning_rate > 0
    with pytest.raises(WarmstartError, match="has none of loss"):
        law.recommend(**RUN)


def test_wrong_options_are_refused():
    frame = Planted().runs()
    for options, words in (
        ({"draws": 0}, "draws=0"),
        ({"form": "C"}, "form='C'"),
        ({"recipe": {"wd": 0.1}}, r"no \['wd'\]"),
        ({"recipe": {"schedule": "wsd", "weight_decay": -1}}, "schedule='wsd'.*weight_decay=-1"),
        ({"accounting": "flops"}, "accounting='flops'"),
    ):
        with pytest.raises(WarmstartError, match=words):
            HparamPredictor.fit(frame, **options)


def test_the_runs_recipe_is_kept_with_its_source(tmp_path):
    recipe = {"schedule": "cosine", "weight_decay": 0.05, "betas": [0.9, 0.98]}
    found = HparamPredictor.fit(Planted().runs(), draws=20, recipe=recipe).recommend(**RUN)
    args = found.training_arguments(tmp_path, use_cpu=True, bf16=False)
    assert args.lr_scheduler_type.value == "cosine" and args.weight_decay == 0.05 and args.adam_beta2 == 0.98
    assert found.recipe.sources["weight_decay"] == "the runs" and found.recipe.sources["epsilon"] == "torch's default"


@pytest.fixture(params=["compute", "params_tokens", "kaplan"])
def any_predictor(request):
    if request.param in preset_names():
        return HparamPredictor.from_pretrained(request.param)
    frame = mixed(noise=0.002) if request.param == "params_tokens" else Planted(noise=0.005).runs()
    print_ = Fingerprint("ids", 10, text="t", bytes=40, tokenizer="x", vocab_size=97, family="llama")
    aside = frame.head(3).assign(loss=math.nan)
    return HparamPredictor.fit(pd.concat([frame, aside]), request.param, draws=50, fingerprint=print_, name="my law")


def test_a_saved_predictor_comes_back_the_same(any_predictor, tmp_path):
    any_predictor.save_pretrained(tmp_path / "law")
    again = HparamPredictor.from_pretrained(tmp_path / "law")
    assert str(again) == str(any_predictor) and again.laws.to_dict() == any_predictor.laws.to_dict()
    for name, draws in any_predictor.laws.draws().items():
        assert np.array_equal(again.laws.draws()[name], draws)
    run = RUN | {"tokens_seen": 1e9}
    assert again.recommend(**run).to_dict() == any_predictor.recommend(**run).to_dict()
    if any_predictor.runs is not None:
        pd.testing.assert_frame_equal(again.runs.frame, any_predictor.runs.frame)
        assert again.runs.set_aside["reason"].tolist() == any_predictor.runs.set_aside["reason"].tolist()
    again.save_pretrained(tmp_path / "law")  # over itself
    card = (tmp_path / "law" / "README.md").read_text()
    assert card.count("# ") >= 4 and (any_predictor.runs is None or "my law" in card)


def test_damaged_or_foreign_folders_are_refused(predictor, tmp_path):
    with pytest.raises(WarmstartError, match="has no config.json"):
        HparamPredictor.from_pretrained(tmp_path)
    predictor.save_pretrained(tmp_path / "law")
    (tmp_path / "law" / "draws.parquet").unlink()
    with pytest.raises(WarmstartError, match="damaged or incomplete"):
        HparamPredictor.from_pretrained(tmp_path / "law")
    (tmp_path / "law" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(WarmstartError, match="holds no predictor"):
        HparamPredictor.from_pretrained(tmp_path / "law")
