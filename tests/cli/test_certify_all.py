"""`certify --all`: rows from worker processes, the document, the README's figure, and faults that cannot hide."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hf_warmstart.cli import architectures, certify_all, coverage, main, workers
from hf_warmstart.errors import WarmstartError
from hf_warmstart.growth import zoo
from hf_warmstart.growth.zoo import GrowthResult, Status, TypeResult

GROWTHS = [growth.name for growth in zoo.SUITE]


def falsified(kind: str, model_type: str) -> TypeResult:
    """A row as `certify_type` would measure it if Llama's growth in width were wrong."""
    results = [GrowthResult(name, Status.EXACT, "", 1e-15, 2e-15) for name in GROWTHS]
    if model_type == "llama":
        results[0] = GrowthResult(
            GROWTHS[0], Status.NOT_EXACT, "the logits differ by 1.0e-03 of the largest", 1e-3, 0.1
        )
    return TypeResult(kind, model_type, zoo.class_name(kind, model_type), tuple(results), seconds=0.1)


def at_hand(function, tasks, jobs, limit, started):
    """`workers.results` in this process."""
    for task in tasks:
        started(task)
        yield task, function(*task)


def test_two_types_end_to_end(tmp_path, capsys):
    document, readme = tmp_path / "architectures.md", tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{coverage.BEGIN}\nan old figure\n{coverage.END}\n\nThe end.\n")
    arguments = ["certify", "--all", "--kind", "causal-lm", "--types", "llama,gpt2", "--jobs", "1", "--json"]
    assert main([*arguments, "--output", str(document), "--readme", str(readme)]) == 0
    out, err = capsys.readouterr()

    data = json.loads(out)
    assert [(row["model_type"], row["model_class"]) for row in data["rows"]] == [
        ("gpt2", "GPT2LMHeadModel"),
        ("llama", "LlamaForCausalLM"),
    ]
    for row in data["rows"]:
        assert [result["growth"] for result in row["results"]] == GROWTHS
        assert all(result["status"] == "exact" for result in row["results"])
        assert all(max(result["relative_error"], result["pullback_error"]) < 1e-9 for result in row["results"])
        assert row["results"][0]["checks"].items() >= {"padding": True, "sdpa": True, "reload": True}.items()
    assert {(count["growth"], count["exact"], count["types"]) for count in data["summary"]} == {
        (name, 2, 2) for name in GROWTHS
    }
    assert "2/2" in err

    text = document.read_text()
    assert "| llama | LlamaForCausalLM |" in text
    assert f"Made by `{data['command']}`" in text
    shown = readme.read_text()
    assert shown.startswith(f"# Title\n\n{coverage.BEGIN}\nTypes of transformers ")
    assert shown.endswith(f"([every type](architectures.md)).\n{coverage.END}\n\nThe end.\n")
    assert "| causal-lm | 2 (187 not asked) | 2 | 2 | 2 | 2 | 0 |" in shown
    assert "Growths planned as exact and measured otherwise: none." in shown


def test_what_is_not_exact_is_shown_and_is_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(workers, "results", at_hand)
    monkeypatch.setattr(zoo, "certify_type", falsified)
    document = tmp_path / "architectures.md"
    arguments = ["certify", "--all", "--kind", "causal-lm", "--types", "llama,gpt2", "--jobs", "1"]
    assert main([*arguments, "--output", str(document)]) == 1
    assert "NOT EXACT causal-lm llama, width 2: the logits differ" in capsys.readouterr().out
    text = document.read_text()
    assert "| **NOT EXACT** 1e-03 / 1e-01 |" in text
    assert "- causal-lm llama, width 2: the logits differ by 1.0e-03 of the largest" in text


def test_a_wrong_growth_is_measured_as_not_exact(monkeypatch):
    compare = zoo.compare
    monkeypatch.setattr(
        zoo, "compare", lambda plan, seed: dataclasses.replace(compare(plan, seed), max_pullback_error=1e-6)
    )
    model_class, config = zoo.source_of("causal-lm", "gpt2")
    result = zoo.certify_growth(model_class, zoo.probe_config(config), zoo.SUITE[1])
    assert result.status is Status.NOT_EXACT
    assert result.pullback_error == 1e-6
    assert result.reason.startswith("the pulled-back gradient of transformer.")
    assert result.reason.endswith(" differs by 1.0e-06")


def test_a_post_norm_is_no_exact_growth_and_no_fault():
    row = zoo.certify_type("masked-lm", "bert")
    result = row.result("depth 2")
    assert result.status is Status.POST_NORM
    assert 0 < result.relative_error < 1e-6
    assert row.result("width 1.5").status is Status.REFUSED
    assert "whole factors" in row.result("width 1.5").reason


def test_a_class_that_refuses_its_own_config_cannot_be_built(monkeypatch):
    def refuse(model_class, config):
        raise ImportError("it needs a library\nthat is not here")

    monkeypatch.setattr(zoo, "meta_shapes", refuse)
    row = zoo.certify_type("causal-lm", "llama")
    assert row.cannot_build == "ImportError: it needs a library that is not here"
    assert row.results == ()
    assert "cannot be built" in architectures.document([row], "a command")


def test_an_overrun_is_a_refused_row(monkeypatch):
    monkeypatch.setattr(workers, "results", at_hand)
    monkeypatch.setattr(zoo, "certify_type", lambda kind, model_type: workers.Lost("took more than 300 s", 300.0))
    rows = certify_all._measured([("causal-lm", "llama")], 1)
    assert {(r.status, r.reason, r.unexpected) for r in rows[0].results} == {
        (Status.REFUSED, "took more than 300 s", True)
    }


def test_the_held_out_types_are_chosen_by_hash_alone():
    chosen = zoo.held_out()
    assert len(set(chosen)) == 20
    assert {("causal-lm", name) for name in chosen} <= set(zoo.entries(["causal-lm"]))


def test_the_untuned_figure_counts_only_what_nothing_was_declared_for():
    first, second, third = zoo.held_out()[:3]
    rows = [
        falsified("causal-lm", first),
        dataclasses.replace(falsified("causal-lm", second), declared=(second,)),
        TypeResult("causal-lm", third, "X", cannot_build="no"),
    ]
    figure = coverage.held_out_figure(rows)
    assert figure.exact == (first,)
    assert figure.exact_declared == {second: (second,)}
    assert figure.others == {third: "cannot be built"}
    assert str(figure).startswith("1 of 3 held-out types are exact in width 2 with nothing declared (3 of the 20")


def test_declarations_of_nested_configs_count():
    assert zoo.declared_for(zoo.source_of("causal-lm", "llama")[1]) == ()
    _, kyutai = zoo.source_of("speech-seq2seq", "kyutai_speech_to_text")
    assert {"kyutai_speech_to_text", "mimi"} <= set(zoo.declared_for(kyutai))


@pytest.mark.parametrize(
    "text", ["no markers", f"{coverage.END} {coverage.BEGIN}", f"{coverage.BEGIN}{coverage.END}" * 2]
)
def test_a_readme_without_its_place_is_refused(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(WarmstartError, match="once each"):
        coverage.update_readme(readme, "a figure")
    assert readme.read_text() == text


def test_the_space_around_the_figure_stays(tmp_path):
    readme = tmp_path / "README.md"
    for around in ("{}{}{}", "{} {} {}", "{}\n{}\n{}"):
        readme.write_text("before " + around.format(coverage.BEGIN, "old\nfigure", coverage.END) + " after")
        coverage.update_readme(readme, r"a \1 figure")
        assert readme.read_text() == "before " + around.format(coverage.BEGIN, r"a \1 figure", coverage.END) + " after"
