"""The benchmark of hyper-parameter laws, at a size of seconds: it ends, counts openly and goes on where it was."""

from __future__ import annotations

import json
import math
import random

import pytest

from benchmarks.hparams.jobs import TargetJob, parent_file, target_file
from benchmarks.hparams.report import KINDS, MARKERS, as_table, interval, plot, report, write_document
from benchmarks.hparams.setting import PROBE, SETTINGS, Setting, Target
from benchmarks.hparams.study import LAWS_NAME, SETTING_NAME, Study, grid_points, preset_points
from hf_warmstart import WarmstartError
from hf_warmstart.scaling.sweeps.cost import FORWARD_SHARE
from hf_warmstart.scaling.sweeps.design import Point
from hf_warmstart.scaling.sweeps.probes import MOST


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


OURS = Point(0.005, 3)


def bowl(point: Point, seed: int) -> float:
    """A loss whose best grid point is (2^-8, 4); a seed shifts all points alike."""
    away = math.log2(point.learning_rate / 2.0**-8) ** 2 + math.log2(point.batch_sequences / 4) ** 2
    return (2 + 0.02 * away) * (1 + 0.01 * seed)


@pytest.fixture
def planted(tmp_path):
    """A folder of runs with known losses, its setting and target; no model is trained."""
    setting = tiny()
    target = Target(setting)
    (tmp_path / SETTING_NAME).write_text(json.dumps(setting.to_dict(), indent=2))
    for name in setting.parents:
        parent_file(tmp_path, name).parent.mkdir()
        parent_file(tmp_path, name).write_text(json.dumps({"loss": 3.0, "tokens": 5000}))
        said = {"learning_rate": OURS.learning_rate, "batch_sequences": OURS.batch_sequences}
        said |= {"equivalent_compute": 1e9, "total_compute": 2e9, "intervals": {}, "warnings": []}
        for kind in KINDS:
            parent_file(tmp_path, name).with_name(f"{kind}.json").write_text(json.dumps(said))
        (tmp_path / f"probes-{name}").mkdir()
        for k in range(3 if name == "stories" else 4):
            (tmp_path / f"probes-{name}" / f"b3-lr{k}.json").write_text("{}")
        (tmp_path / f"target-{name}").mkdir()
        presets = [p for p in preset_points(target, parent_file(tmp_path, name)).values() if isinstance(p, Point)]
        points = [*grid_points(Point(2.0**-8, 4), 3), OURS, *presets]
        for point in points:
            for seed in (*setting.grid_seeds, *setting.fresh_seeds):
                run = {"learning_rate": point.learning_rate, "batch_sequences": point.batch_sequences, "seed": seed}
                run |= {"status": "finished", "loss": bowl(point, seed), "seconds": 2.0}
                target_file(tmp_path, TargetJob(name, point, seed)).write_text(json.dumps(run))
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "runs.jsonl").write_text('{"seconds": 3.5}\n{"seconds": 1.5}\n')
    (tmp_path / "sweep" / "sweep.json").write_text('{"eval": {"sequences": 10}}')
    (tmp_path / LAWS_NAME).write_text(json.dumps({"sweep": {"spent_flops": 1e9}, "laws": []}))
    return tmp_path, setting, target


def test_the_report_says_regret_and_search_compute_of_what_is_there(planted):
    folder, setting, target = planted
    made = report(folder, setting)
    assert made["missing"] == [] and made["regret"].keys() == KINDS.keys()
    wanted = bowl(OURS, 0) / 2 - 1
    for found in made["regret"].values():
        assert (
            found["mean"] == pytest.approx(wanted) and found["high"] == pytest.approx(wanted) and found["seeds"] == 4
        )
    for of in made["parents"].values():
        assert of["grid_best"]["learning_rate"] == 2.0**-8 and of["grid_best"]["batch_tokens"] == 4 * setting.length
        assert of["grid_best"]["points"] == 9 and of["grid_best"]["edge"] == []
        assert of["recommended"]["surface_regret"] == pytest.approx(wanted, rel=1e-6)
        ran = {name: said for name, said in of["presets"].items() if "refused" not in said}
        assert {"deepseek", "steplaw", "marin"} <= set(ran)
        said = ran["steplaw"]
        point = Point(said["learning_rate"], said["batch_tokens"] // setting.length)
        assert said["regret"] == pytest.approx(bowl(point, 0) / 2 - 1)
    search, grid = made["search"], 50 * target.tokens * target.flops_per_token
    spent = 1e9 + FORWARD_SHARE * target.flops_per_token * 10 * setting.length
    assert search["share"] == pytest.approx(spent / grid)
    assert search["share_of_seconds"] == pytest.approx(5 / (50 * 2))
    each = (
        PROBE * target.tokens * target.flops_per_token + FORWARD_SHARE * target.flops_per_token * 10 * setting.length
    )
    assert search["probes_share"] == pytest.approx(4 * each / grid)  # the parent that took more
    with pytest.raises(WarmstartError, match="no runs of this setting"):
        report(folder, SETTINGS["quick"])


def test_what_is_missing_is_named_and_the_rest_is_said(planted):
    folder, setting, _ = planted
    (folder / LAWS_NAME).unlink()
    next((folder / "target-stories").glob(f"b4-lr{2.0**-8:.6g}-s0.json")).unlink()
    next((folder / "target-both").glob(f"b3-lr{OURS.learning_rate:.6g}-s2.json")).unlink()
    made = report(folder, setting)
    assert "grid of stories (8 of 9 points)" in made["missing"] and "sweep" in made["missing"]
    assert "comparison on fresh seeds of both (recommended)" in made["missing"] and made["regret"] == {}
    words = as_table(made, "tiny")
    assert "Not there yet" in words and "| both | grid's best of 9 |" in words


def test_the_table_goes_between_a_documents_markers_and_the_grid_is_drawn(planted, tmp_path):
    folder, setting, _ = planted
    made = report(folder, setting)
    document = tmp_path / "page.md"
    document.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    write_document(document, as_table(made, "tiny"))
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| both | **recommended by the laws alone** | 0.005 | 48 |" in text
    assert "| search compute of the laws, of 25 points and 2 seeds" in text
    write_document(document, "new")
    assert "recommended" not in document.read_text()
    document.write_text("none")
    with pytest.raises(WarmstartError, match="needs one line"):
        write_document(document, "new")
    figure = plot(made)
    assert len([axes for axes in figure.axes if axes.get_xlabel() == "batch, tokens"]) == 2


@pytest.mark.slow
def test_the_benchmark_goes_from_texts_to_a_report_and_goes_on(tmp_path, monkeypatch):
    texts = {}
    for name, seed, count in (("pretrain", 1, 8000), ("train", 2, 40000), ("eval", 2, 1500)):
        texts[name] = tmp_path / f"{name}.txt"
        texts[name].write_text(" ".join(chain(WORDS, seed, count)))
    folder = tmp_path / "out"
    Study(tiny(), texts, folder).run()
    made = report(folder, tiny())
    assert made["missing"] == []
    for of in made["parents"].values():
        assert of["grid_best"]["points"] >= 9 and of["presets"]
        assert 3 <= of["probes"] <= MOST and "probes" in of["probed"]["sources"]["learning_rate"]
        for kind in KINDS:
            assert of[kind]["regret"]["seeds"] == 2 and of[kind]["regret"]["mean"] > -0.5
    monkeypatch.setattr("benchmarks.hparams.jobs.train", None)
    monkeypatch.setattr("hf_warmstart.scaling.sweeps.runner.train", None)
    Study(tiny(), texts, folder).run()
    assert report(folder, tiny()) == made
