"""Any architecture: what transformers ships is exact or refused with a reason, and the layouts on file are fresh."""

from __future__ import annotations

import json

import pytest
from transformers import __version__ as transformers_version

from hf_warmstart import GrowthConfig, WarmstartError, certify, grow, plan_growth
from hf_warmstart.errors import SizeError
from hf_warmstart.growth import zoo
from hf_warmstart.growth.layout import Layout
from hf_warmstart.growth.layouts import cache, layout_of, lookup, regenerate
from hf_warmstart.growth.layouts.probe import probe_config
from hf_warmstart.growth.plan import make_plan
from hf_warmstart.growth.zoo import Status, certify_type, entries, source_of

from ..models import tiny_config, tiny_model

ACROSS = [
    ("causal-lm", "deepseek_v3"),  # latent attention, groups of experts
    ("causal-lm", "mamba2"),
    ("causal-lm", "qwen3_next"),  # gated delta rule beside attention
    ("causal-lm", "bloom"),  # ALiBi: heads stay, their inside grows
    ("causal-lm", "gpt_oss"),  # interleaved gates
    ("causal-lm", "falcon"),  # one key/value head in a fused projection
    ("causal-lm", "gemma4_text"),  # per-layer embeddings, layers of two sizes
    ("causal-lm", "minicpm3"),  # numbers that depend on width and depth
    ("masked-lm", "bert"),
    ("seq2seq-lm", "t5"),
    ("image-classification", "vit"),
    ("speech-seq2seq", "whisper"),
]
# All causal language models that no width of 2, or no depth of 2, keeps; the slow test below sees that these are all.
REFUSED = [
    ("causal-lm", "ctrl", {"width": 2}, "constant at"),  # sinusoids in the stream
    ("causal-lm", "musicgen", {"width": 2}, "constant at"),
    ("causal-lm", "musicgen_melody", {"width": 2}, "constant at"),
    ("causal-lm", "xglm", {"width": 2}, "constant at"),
    ("causal-lm", "xlnet", {"width": 2}, "div@transformer multiplies by a number that depends on sizes"),
    ("causal-lm", "prophetnet", {"width": 2}, "must stay: .*contracted at bmm@prophetnet.decoder.layers.0.self_attn"),
    (
        "causal-lm",
        "blt",
        {"width": 2},
        "head_dim would shrink .*no attribute is known to widen",
    ),  # several streams, each with heads of its own
    ("causal-lm", "deepseek_v4", {"depth": 2}, "its stream is multiplied by activations"),
    ("causal-lm", "gemma3n_text", {"depth": 2}, "with its branch ends zero a layer still changes its input"),
    ("causal-lm", "inkling2_text", {"depth": 2}, "new layers change the output by"),
    ("causal-lm", "xmod", {"depth": 2}, "LayerNorm.weight of the stream is used more than once"),
    ("masked-lm", "fnet", {"width": 2}, "_fft_c2c"),
    ("causal-lm", "mamba2", {"width": 1.5}, "whole factors .*a norm over units"),
    ("causal-lm", "bert", {"width": 1.5}, "whole factors"),
    ("image-classification", "pp_lcnet", {"width": 2}, "no attribute of its config sizes one"),
    ("masked-lm", "perceiver", {"width": 2}, "head_dim would shrink .*width must stay: the input of the tied head"),
]


@pytest.mark.parametrize(("kind", "model_type"), ACROSS, ids=[name for _, name in ACROSS])
def test_families_of_every_sort_are_exact_in_width_two(kind, model_type):
    model_class, config = source_of(kind, model_type)
    made = zoo.certify_growth(model_class, probe_config(config), zoo.SUITE[0])
    assert made.status is Status.EXACT, made


@pytest.mark.parametrize(("kind", "model_type", "options", "words"), REFUSED, ids=[row[1] for row in REFUSED])
def test_what_cannot_grow_is_refused_with_the_place_in_the_model(kind, model_type, options, words):
    model_class, config = source_of(kind, model_type)
    with pytest.raises(WarmstartError, match=words):
        make_plan(model_class, probe_config(config), GrowthConfig(**options))


@pytest.mark.parametrize("growth", [zoo.SUITE[0], zoo.SUITE[3]], ids=lambda growth: growth.name)
def test_reversible_layers_are_certified_in_training_mode(growth):
    """Reformer takes no gradient in another; its heads, each with random numbers of its own, stay as many as they are."""
    model_class, config = source_of("causal-lm", "reformer")
    made = zoo.certify_growth(model_class, probe_config(config), growth)
    assert made.status is Status.EXACT, made
    assert make_plan(model_class, probe_config(config), GrowthConfig(width=2)).target_config.num_attention_heads == 4


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "t5", "vit"])
def test_layouts_on_file_are_what_the_package_derives(model_type):
    assert (cache.FOLDER / f"{model_type}.json").read_text() == regenerate.family(model_type)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the classes themselves, such as on weights without entries
def test_all_layouts_on_file_are_what_the_package_derives():
    stale = [
        path.stem for path in sorted(cache.FOLDER.glob("*.json")) if path.read_text() != regenerate.family(path.stem)
    ]
    assert stale == []


def test_layouts_on_file_survive_reading_and_writing():
    for path in sorted(cache.FOLDER.glob("*.json")):
        for entry in json.loads(path.read_text())["layouts"]:
            assert Layout.from_data(entry["layout"]).to_data() == entry["layout"], path.name


def test_a_known_family_derives_nothing(monkeypatch):
    def never(*args):
        raise AssertionError("derived")

    monkeypatch.setattr(lookup, "derived", never)
    monkeypatch.setattr(lookup, "_known", {})
    config = tiny_config("llama", num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert layout_of(type(tiny_model("llama")), config).model_type == "llama"


def test_files_written_for_another_transformers_are_not_used(monkeypatch):
    monkeypatch.setattr(cache, "transformers_version", transformers_version + ".other")
    cache._entries.cache_clear()
    try:
        assert cache.read(type(tiny_model("gpt2")), tiny_config("gpt2")) is None
    finally:
        monkeypatch.undo()
        cache._entries.cache_clear()


def test_layers_that_scale_the_stream_are_added_up_to_an_eps():
    model_class, config = source_of("causal-lm", "beam")
    plan = make_plan(model_class, probe_config(config), GrowthConfig(depth=2))
    assert not plan.exact and "scales the stream" in plan.reason
    assert plan.layer_map.gated == (False,) * plan.layer_map.before + (True,) * plan.layer_map.before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the classes themselves, such as on weights without entries
def test_every_causal_language_model_is_exact_or_refused_with_a_reason():
    rows = [certify_type(kind, name) for kind, name in entries(["causal-lm"])]
    wrong = [r for r in rows for g in r.results if g.status is Status.NOT_EXACT or g.unexpected]
    assert [row.model_type for row in wrong] == []
    for row in rows:
        for growth in row.results:
            assert growth.status is not Status.REFUSED or growth.reason, row.model_type
    exact = {
        g.name: sum(r.status is Status.EXACT for row in rows for r in row.results if r.growth == g.name)
        for g in zoo.SUITE
    }
    assert sum(not row.cannot_build for row in rows) >= 180
    assert exact["width 2"] >= 179 and exact["depth 2"] >= 157
    assert exact["width 1.5"] >= 144 and exact["width 1.5 slice"] >= 144
    for way, growth in (("width", "width 2"), ("depth", "depth 2")):
        found = {
            row.model_type for row in rows for g in row.results if (g.growth, g.status) == (growth, Status.REFUSED)
        }
        assert found == {name for kind, name, options, _ in REFUSED if kind == "causal-lm" and options == {way: 2}}
    approximate = {row.model_type for row in rows for g in row.results if g.status is Status.APPROXIMATE}
    assert approximate == {"beam"}


# -- more growth -----------------------------------------------------------------------------------------------------


def test_key_value_heads_grow_alone_and_every_query_keeps_its_keys():
    for family in ("llama", "phi3"):  # apart, and in one fused matrix
        config = tiny_config(family, num_attention_heads=4, num_key_value_heads=2)
        plan = plan_growth(config, num_key_value_heads=4)
        assert plan.target_config.num_attention_heads == 4
        certificate = certify(config, num_key_value_heads=4)
        assert certificate.exact and certificate.frozen == {}, certificate


@pytest.mark.parametrize("operator", ["perturbed_copy", "reference_slice"])
def test_the_inside_of_rotated_heads_grows_by_whole_factors(operator):
    certificate = certify(tiny_config("llama"), head_dim=32, width_operator=operator)
    assert certificate.exact and certificate.frozen == {}, certificate
    with pytest.raises(SizeError, match="whole factors, where its angles nest"):
        plan_growth(tiny_config("llama"), head_dim=24)


def test_intermediate_size_grows_alone_by_any_amount():
    certificate = certify(tiny_config("llama"), intermediate_size=101, width_operator="reference_slice")
    assert certificate.exact and certificate.frozen == {}, certificate


def test_more_experts_take_as_many_times_more_tokens():
    config = tiny_config("mixtral")
    plan = plan_growth(config, num_local_experts=8)
    assert plan.target_config.num_experts_per_tok == 2 * config.num_experts_per_tok
    assert certify(config, num_local_experts=8).exact
    with pytest.raises(SizeError, match="whole factor"):
        plan_growth(config, num_local_experts=6)


def test_new_tokens_and_positions_leave_old_logits_alone():
    assert certify(tiny_config("llama"), vocab_size=120).exact
    assert certify(tiny_config("gpt2"), vocab_size=120, n_positions=96).exact
    child = grow(tiny_model("llama"), vocab_size=120)
    assert child.get_input_embeddings().weight.shape[0] == child.config.vocab_size == 120


def test_layers_of_a_masked_language_model_are_added_up_to_its_norms_eps():
    model_class, config = source_of("masked-lm", "bert")
    depth = next(g for g in zoo.SUITE if g.name == "depth 2")
    made = zoo.certify_growth(model_class, probe_config(config), depth)
    assert made.status is Status.POST_NORM
    assert made.relative_error < 1e-9
