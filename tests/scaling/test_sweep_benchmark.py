"""The benchmark of hyper-parameter laws, at a size of seconds: it ends, counts openly and goes on where it was."""

from __future__ import annotations

import json
import math
import random

import pytest

from benchmarks.hparams import Benchmark, Setting, as_table, interval


def tiny() -> Setting:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "head_dim": 8}
    sweep = {"proxies": (0.075, 0.126, 0.267, 0.5), "tokens_per_parameter": 2, "learning_rates": 3, "batch_sizes": 3}
    sweep |= {"refinements": 0, "min_steps": 10, "learning_rate": 0.016, "batch_tokens": 64}
    return Setting(sizes, 300, 16, 0.3, {"stories": 0.3, "both": 0.5}, sweep, 3, (0,), (1, 2), 1)


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "that", "ran", "to", "it", "in", "sun"]


def chain(words: list[str], seed: int, count: int) -> list[str]:
    """Words of which each has three that follow it, one as a rule: there is something to learn for longer than a few steps."""
    followers = random.Random(seed)
    after = {(a, b): followers.sample(words, 3) for a in words for b in words}
    draws, made = random.Random(count), [words[0], words[1]]
    while len(made) < count:
        made.append(draws.choices(after[made[-2], made[-1]], (8, 1, 1))[0])
    return made


def test_an_interval_is_students():
    assert interval([0.1]) == {"mean": 0.1, "low": None, "high": None, "seeds": 1}
    made = interval([0.0, 1.0, 2.0])  # t of two degrees of freedom at 97.5 % is 4.303
    assert made["mean"] == 1 and made["high"] == pytest.approx(1 + 4.303 / math.sqrt(3), rel=1e-3)
    assert made["low"] == pytest.approx(2 - made["high"])


@pytest.mark.slow
def test_the_benchmark_reports_regret_and_search_compute_and_goes_on(tmp_path, monkeypatch):
    texts = {}
    for name, seed, count in (("pretrain", 1, 8000), ("train", 2, 40000), ("eval", 2, 1500)):
        texts[name] = tmp_path / f"{name}.txt"
        texts[name].write_text(" ".join(chain(WORDS, seed, count)))
    report = Benchmark(tiny(), texts, tmp_path / "out").run()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report))
    for of in report["parents"].values():
        assert of["grid_best"]["points"] >= 9 and of["regret"]["seeds"] == 2
        assert of["regret"]["mean"] > -0.5 and of["presets"]
    search = report["search"]
    assert search["share"] == pytest.approx(
        (search["sweep_flops"] + search["evaluation_flops"]) / search["grid_flops"]
    )
    assert "Search compute" in as_table(report)
    monkeypatch.setattr("benchmarks.hparams.train", None)
    monkeypatch.setattr("hf_warmstart.scaling.sweeps.run.train", None)
    assert Benchmark(tiny(), texts, tmp_path / "out").run()["parents"] == report["parents"]
