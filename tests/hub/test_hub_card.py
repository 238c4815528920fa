"""The card says what the record, the certificate and the caller say, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import jinja2.meta
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from hf_warmstart import GrowthRecord, WarmstartError, grow
from hf_warmstart.growth.plan import RECORD_KEY
from hf_warmstart.hub import render_card
from hf_warmstart.hub.card import TEMPLATE


def block(text: str, language: str) -> str:
    """The content of the one fenced block in a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)\n```", text, flags=re.S)
    return found


def test_metadata_is_read_back_by_the_hubs_own_parser(grown, certificate, tmp_path):
    render_card(grown, certificate=certificate).save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data == {
        "base_model": "org/tiny",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf_warmstart", "reference_slice", "identity_blocks"],
    }


def test_numbers_of_record_and_certificate_stand_in_the_tables(grown, certificate):
    text = render_card(grown, certificate=certificate).text
    assert "| `hidden_size` | 32 | 48 |" in text
    before, after = GrowthRecord.all_of(grown.config)[0].parameters
    assert after == grown.num_parameters()
    assert f"| parameters | {before:,} | {after:,} |" in text
    assert f"growth factor of {after / before:.3f}" in text
    assert "| 1.2e-15 | below 1e-10 |" in text
    assert "| 2.5e-15 | below 1e-10 |" in text
    assert "because the test says so" in text
    assert "dtype (float32)" in text
    assert "dtype (bfloat16)" in render_card(grown.to(torch.bfloat16), certificate=certificate).text


def test_record_in_the_card_is_the_record_in_the_config(grown, certificate):
    text = render_card(grown, certificate=certificate).text
    assert json.loads(block(text, "json")) == getattr(grown.config, RECORD_KEY)


@pytest.mark.parametrize(("given", "expected"), [(None, None), ("mit", "mit")])
def test_license_stands_only_when_given(grown, certificate, given, expected):
    card = render_card(grown, certificate=certificate, license=given)
    assert card.data.license == expected
    assert ("No licence was stated" in card.text) is (given is None)


@pytest.mark.parametrize("name", ["", "folder", "../runs/parent", "a/b/c"])
def test_parent_that_is_no_repository_is_left_out_of_the_metadata(parent, certificate, name):
    parent.config._name_or_path = name
    card = render_card(grow(parent, depth=2), certificate=certificate)
    assert card.data.base_model is None
    assert "base_model_relation" not in card.data.to_dict()
    assert "The metadata names no `base_model`" in card.text


def test_bare_name_with_a_commit_is_a_repository(parent, certificate):
    parent.config._name_or_path = "gpt2"
    grown = grow(parent, depth=2)
    assert render_card(grown, certificate=certificate).data.base_model is None
    getattr(grown.config, RECORD_KEY)[0]["revision"] = "e" * 40
    card = render_card(grown, certificate=certificate)
    assert card.data.base_model == "gpt2"
    assert f"[gpt2](https://huggingface.co/gpt2) at revision `{'e' * 40}`" in card.text
    assert f"revision='{'e' * 40}'" in block(card.text, "python")
    assert f"`hf-warmstart grow gpt2 grown --revision {'e' * 40} --record THIS`" in card.text


def test_parent_in_a_folder_leaves_no_path_of_the_machine(parent, certificate, tmp_path):
    parent.save_pretrained(tmp_path / "runs" / "checkpoint")
    loaded = type(parent).from_pretrained(tmp_path / "runs" / "checkpoint")
    card = render_card(grow(loaded, depth=2), certificate=certificate)
    assert "`checkpoint`" in card.text
    assert "`hf-warmstart grow path/to/parent grown --record THIS`" in card.text
    assert str(tmp_path) not in str(card)


def test_metrics_with_a_dataset_make_a_model_index(grown, certificate):
    metrics = {"eval_loss": 3.25, "eval_tokens": 65536, "eval_runtime": 1.5}
    card = render_card(grown, certificate=certificate, metrics=metrics, dataset="org/corpus", model_name="big")
    (result,) = ModelCard(str(card)).data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("org/corpus", "loss", 3.25)
    assert result.metric_name == "eval_loss over 65,536 tokens"
    assert ModelCard(str(card)).data.model_name == "big"
    assert "| eval_loss | 3.25 |" in card.text


def test_metrics_without_a_dataset_stand_in_the_text_only(grown, certificate):
    card = render_card(grown, certificate=certificate, metrics={"eval_loss": 3.25})
    assert "model-index" not in card.data.to_dict()
    assert "| eval_loss | 3.25 |" in card.text
    assert "## Evaluation" not in render_card(grown, certificate=certificate).text


def test_metrics_that_are_no_finite_numbers_are_all_named(grown, certificate):
    with pytest.raises(WarmstartError, match="a=nan, b='x', c=True"):
        render_card(grown, certificate=certificate, metrics={"b": "x", "a": float("nan"), "c": True, "d": 1.0})


def test_growth_that_is_not_exact_says_why(parent):
    card = render_card(grow(parent, depth=2, depth_operator="stack"))
    assert card.data.tags == ["hf_warmstart", "stack"]
    assert "The growth is not exact" in card.text
    assert "\nNo: " in card.text
    assert "exact at step 0" not in card.text


def test_unreached_and_frozen_parameters_are_named(grown, certificate):
    spoiled = dataclasses.replace(
        certificate, exact=False, max_relative_error=float("inf"), unreached=["a.weight"], frozen={"b.bias": 1200}
    )
    text = render_card(grown, certificate=spoiled).text
    assert "Unreached: `a.weight`." in text
    assert "Frozen: `b.bias` (1200 entries)." in text
    assert "| not finite | below 1e-10 |" in text
    assert "(frozen) | 1,200 |" in text


def test_second_growth_shows_the_chain_and_is_rebuilt_in_both_steps(grown, certificate):
    text = render_card(grow(grown, depth=1.5), certificate=certificate).text
    assert "last of 2 growths" in text
    assert "| 1 | [org/tiny](https://huggingface.co/org/tiny) | `hidden_size` 32 to 48" in text
    assert "`num_hidden_layers` 4 to 6" in text
    assert block(text, "python").count("model = grow(model, growth_config)") == 2
    assert "hf-warmstart grow" not in text
    assert len(json.loads(block(text, "json"))) == 2
    assert "## Chain of growths" not in render_card(grown, certificate=certificate).text


def test_second_growth_of_a_saved_model_is_rebuilt_from_that_model(grown, certificate):
    grown.config._name_or_path = "org/middle"
    card = render_card(grow(grown, depth=1.5), certificate=certificate)
    assert card.data.base_model == "org/middle"
    assert "from_pretrained('org/middle')" in block(card.text, "python")
    assert block(card.text, "python").count("model = grow(model, growth_config)") == 1
    assert "| 1 | [org/tiny](https://huggingface.co/org/tiny) |" in card.text


def test_model_pushed_to_its_parents_repository_is_rebuilt_from_its_own_commit(grown, certificate):
    again = copy.deepcopy(grown)
    again.config._name_or_path = "org/tiny"  # as from_pretrained leaves it
    second = grow(again, depth=1.5)
    for record, revision in zip(getattr(second.config, RECORD_KEY), ("a" * 40, "b" * 40), strict=True):
        record["revision"] = revision
    code = block(render_card(second, certificate=certificate).text, "python")
    assert f"from_pretrained('org/tiny', revision='{'b' * 40}')" in code
    assert code.count("model = grow(model, growth_config)") == 1


@pytest.mark.parametrize(
    ("options", "tags"),
    [({"depth": 2}, ["identity_blocks"]), ({"width": 2, "width_operator": "exact_copy"}, ["exact_copy"])],
)
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_tags_name_the_operators_that_were_used(family, options, tags, certificate):
    # GPT-2 has names of its own for its sizes; Qwen2 has thresholds and lists that follow the layers.
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=2, n_positions=32, vocab_size=99))
    else:
        config = Qwen2Config(
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=2,
            vocab_size=99,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
        )
        model = Qwen2ForCausalLM(config)
    card = render_card(grow(model, **options), certificate=certificate)
    assert card.data.tags == ["hf_warmstart", *tags]
    assert card.data.pipeline_tag == "text-generation"
    # Lists are too long for the table; the record has them.
    assert "layer_types" not in card.text.split("## Growth record")[0]
    deepened_qwen2 = family == "qwen2" and "depth" in options
    assert ("layer_types" in block(card.text, "json")) is deepened_qwen2


def test_tags_that_the_user_added_are_kept(grown, certificate):
    grown.add_model_tags(["mine"])
    assert render_card(grown, certificate=certificate).data.tags[-1] == "mine"


def test_model_without_a_record_raises(parent, certificate):
    with pytest.raises(WarmstartError, match="LlamaConfig carries no growth record.*grow"):
        render_card(parent, certificate=certificate)
    with pytest.raises(WarmstartError, match="got str"):
        render_card("org/tiny", certificate=certificate)


def test_every_variable_of_the_template_is_given(grown, certificate, monkeypatch):
    # Jinja prints nothing for a name that it does not know: a misspelt one would pass unseen.
    given: set[str] = set()
    original = ModelCard.from_template.__func__
    monkeypatch.setattr(
        ModelCard, "from_template", classmethod(lambda cls, *a, **k: (given.update(k), original(cls, *a, **k))[1])
    )
    render_card(grown, certificate=certificate)
    wanted = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(TEMPLATE.read_text()))
    assert wanted - {"card_data"} == given - {"template_path"}
