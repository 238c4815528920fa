"""Laws through optima: planted laws come back, the right form is chosen, and budgets that tell nothing are refused."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from hf_warmstart import HparamPredictor, WarmstartError
from hf_warmstart.scaling.fits.fitting import fit_forms, fit_loss, ridge_of
from hf_warmstart.scaling.fits.laws import interval
from hf_warmstart.scaling.fits.optima import find_optima
from hf_warmstart.scaling.fits.settings_law import fit_power_law
from hf_warmstart.scaling.hparams.fitted import FittedLaws
from hf_warmstart.scaling.tables.runs import read_runs

from .planted import Planted


def optima_of(frame, draws=200, **options):
    return find_optima(read_runs(frame).frame, draws=draws, **options)[0]


def mixed(noise: float = 0.0, seed: int = 0, of_params: float = 400) -> pd.DataFrame:
    """Budgets of many shapes under laws of parameters and tokens: `lr = 2 N^-0.5 D^0.1`, `B = 4 D^0.5`.

    Args:
        of_params: the amplitude A of the parameters' term of the loss; a little below 0 they are of no use.
    """
    rng, rows = np.random.default_rng(seed), []
    for n in (2e7, 6e7, 2e8):
        for d in (1e9, 5e9, 2.5e10):
            for a in np.linspace(-2, 2, 6):
                for b in np.linspace(-2, 2, 5):
                    loss = 1.7 + of_params * n**-0.35 + 2000 * d**-0.36 + 0.015 * a * a + 0.01 * b * b
                    rate, batch = 2 * n**-0.5 * d**0.1 * math.exp(a), 4 * d**0.5 * math.exp(b)
                    rows.append((n, d, rate, batch, loss + noise * rng.standard_normal()))
    return pd.DataFrame(rows, columns=["params", "tokens", "learning_rate", "batch_tokens", "loss"])


def test_planted_laws_of_compute_come_back():
    laws = Planted()
    optima = optima_of(laws.runs())
    chosen, fitted, warnings = fit_forms(optima, "auto")
    assert chosen.form == "compute" and set(fitted) == {"compute"} and warnings == []
    assert chosen.learning_rate.law.exponents["compute"] == pytest.approx(-0.25, abs=1e-6)
    assert chosen.batch_tokens.law(compute=1e21) == pytest.approx(laws.batch_tokens(1e21), rel=1e-5)
    assert chosen.learning_rate.r_squared == pytest.approx(1.0) and chosen.regret["max"] < 1e-9
    assert fit_loss(optima, "compute").exponents["compute"] == pytest.approx(0.1, rel=1e-4)
    assert ridge_of(optima)[0] == pytest.approx(0.4, rel=1e-5)


def test_over_mixed_shapes_the_law_of_params_and_tokens_is_chosen_by_regret():
    optima = optima_of(mixed(noise=0.003))
    chosen, fitted, warnings = fit_forms(optima, "auto")
    assert chosen.form == "params_tokens" and set(fitted) == {"compute", "params_tokens"} and warnings == []
    assert fitted["compute"].regret["mean"] > 5 * chosen.regret["mean"]
    powers = chosen.learning_rate.law.exponents
    assert powers["params"] == pytest.approx(-0.5, abs=0.1) and powers["tokens"] == pytest.approx(0.1, abs=0.1)
    assert chosen.batch_tokens.law.exponents == {"tokens": pytest.approx(0.5, abs=0.1)}
    loss = fit_loss(optima, "params_tokens")
    assert loss(params=1e8, tokens=1e10) == pytest.approx(1.7 + 400 * 1e8**-0.35 + 2000 * 1e10**-0.36, abs=0.01)


def test_where_parameters_are_of_no_use_the_law_of_loss_is_one_of_tokens():
    """And the predictor reads tokens off a loss by it, and says so."""
    runs = mixed(noise=0.003, of_params=-5)
    law = fit_loss(optima_of(runs), "params_tokens")
    assert law.form == "tokens" and law(tokens=1e10, params=1e8) == pytest.approx(1.7 + 2000 * 1e10**-0.36, abs=0.01)
    assert np.median(law.inverse_draws(2.2)) == pytest.approx((2000 / 0.5) ** (1 / 0.36), rel=0.1)
    with pytest.raises(WarmstartError, match="tokens alone does not say how to share compute"):
        law.compute_optimal()
    predictor = HparamPredictor.fit(runs, draws=100)
    assert "The losses are no lower for more parameters: the law of loss is one of tokens alone." in predictor.warnings
    found = predictor.recommend(params=4e8, tokens=1e10, sequence_length=1024, eval_loss=2.2)
    assert found.equivalent_compute == pytest.approx(6 * 4e8 * (2000 / 0.5) ** (1 / 0.36), rel=0.1)
    again = FittedLaws.from_dict(predictor.laws.to_dict(), predictor.laws.draws(), predictor.runs)
    assert HparamPredictor(again).recommend(params=4e8, tokens=1e10, sequence_length=1024, eval_loss=2.2) == found
    # Losses that do not fall with tokens either have no law at all.
    with pytest.raises(WarmstartError, match="do not fall as"):
        fit_loss(optima_of(runs.assign(loss=6 - runs.loss)), "params_tokens")


def test_a_law_of_compute_over_mixed_shapes_warns():
    warnings = fit_forms(optima_of(mixed(), draws=20), "compute")[2]
    assert any("Tokens per parameter run from 5 to 1.25e+03" in words for words in warnings)


def test_forms_that_the_budgets_do_not_tell_are_refused():
    optima = optima_of(Planted().runs(), draws=20)
    with pytest.raises(WarmstartError, match=r"form='params_tokens' cannot be fitted: .* vary together"):
        fit_forms(optima, "params_tokens")
    with pytest.raises(WarmstartError, match="vary together"):
        fit_loss(optima, "params_tokens")
    with pytest.raises(WarmstartError, match="none of"):
        fit_forms(optima, "C")
    with pytest.raises(WarmstartError, match="at least 3 budgets .* got 2"):
        fit_forms(optima[:2], "auto")


def test_odd_trends_few_budgets_and_edges_warn():
    laws = Planted(rate_power=0.1, batch_power=-0.1)
    warnings = " ".join(fit_forms(optima_of(laws.runs(budgets=3, decades=1.0)), "auto")[2])
    for words in (
        "Only 3 budgets",
        "span 1 decades",
        "learning_rate grows with compute",
        "batch_tokens falls with compute",
    ):
        assert words in warnings
    frame = Planted().runs()
    cut = frame[(frame["params"] > frame["params"].min() * 1.01) | (frame["learning_rate"] > 3.5e-3)]
    assert "learning_rate low" in " ".join(fit_forms(optima_of(cut), "auto")[2])


def test_optima_on_an_edge_do_not_bend_the_law_where_others_remain():
    frame = Planted().runs(budgets=6)
    cut = frame[(frame["params"] > frame["params"].min() * 1.01) | (frame["learning_rate"] > 6e-3)]
    chosen, _, warnings = fit_forms(optima_of(cut), "compute")
    assert chosen.learning_rate.points == 5 and len(warnings) >= 1
    assert chosen.learning_rate.law.exponents["compute"] == pytest.approx(-0.25, abs=1e-4)


def test_the_loss_law_takes_the_best_shape_of_each_compute():
    rows = [Planted().runs(), Planted(tokens_per_param=300.0, above=2.4).runs()]
    law = fit_loss(optima_of(pd.concat(rows)), "compute")
    assert law(compute=1e18) == pytest.approx(Planted().loss(1e18), rel=1e-4)


def test_scatter_beyond_noise_widens_the_draws_of_the_law():
    rng = np.random.default_rng(0)
    x = np.geomspace(1e17, 1e21, 9)
    clean = 0.3 * np.log(x)
    draws = clean + 0.01 * rng.standard_normal((2000, 9))
    tight = fit_power_law(clean, draws, {"compute": x})
    wide = fit_power_law(clean + 0.3 * rng.standard_normal(9), draws, {"compute": x})
    assert tight.scatter == 0 and wide.scatter == pytest.approx(0.3, rel=0.5)
    assert wide.law.draws[:, 1].std() > 8 * tight.law.draws[:, 1].std()
    low, high = interval(tight.law.draws[:, 1])
    assert low < 0.3 < high and wide.r_squared < tight.r_squared <= 1


def test_precise_optima_weigh_more():
    x = np.array([1e17, 1e18, 1e19, 1e20])
    y = np.array([1.0, 2.0, 3.0, 9.0])
    draws = y + np.random.default_rng(0).standard_normal((500, 4)) * [0.1, 0.1, 0.1, 50.0]
    assert fit_power_law(y, draws, {"compute": x}).law.exponents["compute"] == pytest.approx(
        1 / math.log(10), rel=0.01
    )
