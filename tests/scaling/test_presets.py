"""Published laws reproduce the settings that were published with them, to the printed digit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hf_warmstart import HparamPredictor, WarmstartError
from hf_warmstart.scaling.hparams.predictor import formula
from hf_warmstart.scaling.hparams.presets import LogLaw, preset_data, preset_names, preset_recipe, tuned_recipe


def law(name: str, setting: str):
    return getattr(HparamPredictor.from_pretrained(name).laws, setting)


def printed(value: float, digits: int) -> str:
    return f"{value:.{digits - 1}e}"


@pytest.mark.parametrize(
    ("name", "setting", "at", "digits", "published"),
    [
        # arXiv 2401.02954: the released models, LR 4.2e-4 and 3.2e-4, batches of 2304 and 4608 sequences of 4096 tokens
        ("deepseek", "learning_rate", {"compute": 6 * 7e9 * 2e12}, 3, 4.25e-4),
        ("deepseek", "batch_tokens", {"compute": 6 * 7e9 * 2e12}, 2, 9.2e6),
        ("deepseek", "learning_rate", {"compute": 6 * 67e9 * 2e12}, 3, 3.20e-4),
        ("deepseek", "batch_tokens", {"compute": 6 * 67e9 * 2e12}, 3, 19.3e6),
        # step-law/steplaw: `fit_tool.py pred-opt-lr-bs 7e9 1.4e12 2048`
        ("steplaw", "learning_rate", {"params": 7e9, "tokens": 1.4e12}, 2, 9.2e-4),
        ("steplaw", "batch_tokens", {"tokens": 1.4e12}, 2, 5.0e6),
        # arXiv 2406.19146: the rounded fit at its reference size, and the form quoted elsewhere, within its 10 %
        ("porian", "learning_rate", {"params": 108e6}, 3, 4.7e-3),
        ("porian", "batch_tokens", {"params": 108e6}, 6, 2048 * 160),
        ("porian", "learning_rate", {"params": 1e8}, 1, 4.9e-3),
        # OLMo-core: LR 0.0047 (N / 108e6)^(-1/3) / 2, batch 2048 * 160 (N / 108e6)^(2/3)
        ("olmo-ladder", "learning_rate", {"params": 108e6}, 3, 2.35e-3),
        ("olmo-ladder", "learning_rate", {"params": 8 * 108e6}, 4, 1.175e-3),
        ("olmo-ladder", "batch_tokens", {"params": 8 * 108e6}, 7, 4 * 327680),
        # marin: 0.33 sqrt(batch) / hidden
        ("marin", "learning_rate", {"batch_sequences": 1024, "hidden_size": 2048}, 4, 0.33 * 32 / 2048),
        # arXiv 2404.06395: 1.21e9 / L^6.24, 4.0 M tokens at 2.5 nats; rate 0.01
        ("minicpm", "batch_tokens", {"loss": 2.5}, 2, 4.0e6),
        ("minicpm", "learning_rate", {}, 2, 0.01),
        # arXiv 2001.08361: 0.003239 - 0.0001395 ln N; B* = 2e8 tokens, alpha_B = 0.21
        ("kaplan", "learning_rate", {"params": 1e8}, 3, 0.003239 - 0.0001395 * math.log(1e8)),
        ("kaplan", "batch_tokens", {"loss": 1.0}, 1, 2e8),
        ("kaplan", "batch_tokens", {"loss": 3.0}, 2, 2e8 / 3 ** (1 / 0.21)),
    ],
)
def test_presets_give_the_published_numbers(name, setting, at, digits, published):
    assert printed(law(name, setting)(**at), digits) == printed(published, digits)


def test_kaplans_rate_ends_where_its_law_hits_zero():
    rate = law("kaplan", "learning_rate")
    assert rate(params=1.1e10) > 0
    with pytest.raises(WarmstartError, match="ends before that size"):
        rate(params=1.3e10)
    assert isinstance(rate, LogLaw)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_source_and_names_its_schedule_and_range(name):
    data = preset_data()[name]
    assert data["source"] and data["fitted_schedule"] and "range" in data
    predictor = HparamPredictor.from_pretrained(name)
    assert predictor.form == "preset" and predictor.loss_law is None and data["source"] in str(predictor)
    assert preset_recipe(name).sources["schedule"] == data["source"]


def test_recipes_that_follow_the_run_do():
    small = tuned_recipe(
        "olmo-ladder", preset_recipe("olmo-ladder"), params=1e8, tokens=2e9, batch_tokens=5e5, sequences=256
    )
    large = tuned_recipe(
        "olmo-ladder", preset_recipe("olmo-ladder"), params=1e8, tokens=2e9, batch_tokens=6e5, sequences=256
    )
    assert small.betas == (0.9, 0.99) and large.betas == (0.9, 0.95) and small.warmup_fraction == pytest.approx(0.05)
    marin = tuned_recipe("marin", preset_recipe("marin"), params=1e8, tokens=2e9, batch_tokens=6e5, sequences=256)
    assert marin.betas == (0.95, pytest.approx(0.98**2)) and marin.epsilon == 1e-15


def document_rows() -> list[str]:
    """The table of `docs/hyper-parameters.md`, from the data."""
    found = []
    for name, data in preset_data().items():
        laws = HparamPredictor.from_pretrained(name).laws
        reach = "; ".join(f"{n} {low:.3g} to {high:.3g}" for n, (low, high) in laws.range.items()) or "not published"
        cells = (f"`{name}`", formula(laws.learning_rate), formula(laws.batch_tokens), data["fitted_schedule"], reach)
        found.append("| " + " | ".join([*cells, data["source"]]) + " |")
    return found


def test_the_documents_table_of_presets_is_the_data():
    text = (Path(__file__).parents[2] / "docs" / "hyper-parameters.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| `") and "`params`" not in line] == document_rows()
