"""What a config says of single layers follows every choice of layers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from hf_warmstart import plan_growth
from hf_warmstart.growth.configs import layer_attributes, resize_config
from hf_warmstart.growth.layerwise import carry, lists_layers, marks, own_of
from hf_warmstart.growth.layouts.probe import probe_config
from hf_warmstart.growth.maps import LayerMap

KINDS = ["full", "sliding"]
layers = st.integers(2, 8)
chosen = layers.flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), min_size=1, max_size=12)))
# Choices of layers that no growth can do without: old layers in order, each at least once.
grown = layers.flatmap(
    lambda n: st.lists(st.integers(1, 3), min_size=n, max_size=n).map(
        lambda times: (n, [k for k, count in enumerate(times) for _ in range(count)])
    )
)


@given(chosen, st.data())
def test_a_list_with_an_entry_for_each_layer_follows_the_layers(choice, data):
    number, sources = choice
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=number, max_size=number))
    assert marks("layer_types", kinds, number) == kinds
    assert carry("layer_types", kinds, number, sources) == [kinds[source] for source in sources]


@given(grown, st.integers(0, 8))
def test_a_threshold_from_below_counts_the_same_layers_after_any_growth(choice, first):
    number, sources = choice
    first = min(first, number)
    marked = marks("first_k_dense_replace", first, number)
    after = carry("first_k_dense_replace", first, number, sources)
    assert marked == [k < first for k in range(number)]
    assert marks("first_k_dense_replace", after, len(sources)) == [marked[source] for source in sources]


@given(grown, st.integers(0, 8))
def test_a_threshold_from_above_counts_the_same_layers_after_any_growth(choice, last):
    number, sources = choice
    last = min(last, number)
    marked = marks("num_kv_shared_layers", last, number)
    after = carry("num_kv_shared_layers", last, number, sources)
    assert marked == [k < number - last for k in range(number)]
    assert marks("num_kv_shared_layers", after, len(sources)) == [marked[source] for source in sources]


@given(grown, st.integers(0, 7))
def test_a_last_layer_from_below_is_itself_included(choice, last):
    number, sources = choice
    last = min(last, number - 1)
    marked = marks("moe_layer_end_index", last, number)
    after = carry("moe_layer_end_index", last, number, sources)
    assert marked == [k <= last for k in range(number)]
    assert marks("moe_layer_end_index", after, len(sources)) == [marked[source] for source in sources]


def test_a_threshold_beyond_the_last_layer_stays_beyond_it():
    """Qwen2's `max_window_layers` is 28 by default, whatever the depth."""
    assert carry("max_window_layers", 28, 24, [*range(24), 23, 23]) == 26 + 4
    assert marks("max_window_layers", 30, 26) == [True] * 26


@given(grown, st.data())
def test_numbers_of_layers_are_counted_anew(choice, data):
    number, sources = choice
    listed = sorted(data.draw(st.sets(st.integers(0, number - 1), min_size=1)))
    after = carry("full_attention_layers", listed, number, sources)
    assert after == [k for k, source in enumerate(sources) if source in listed]
    assert lists_layers("full_attention_layers", after)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("attn_layer_indices", [1, 3], True),
        ("global_attn_idxs", [0], True),
        ("no_rope_layers", [1, 1, 1, 0], False),  # marks, one for each layer
        ("no_rope_layers", [0, 1], True),
        ("attn_layer_indices", [3, 1], False),
        ("attn_layer_indices", [], False),
        ("attn_layer_indices", 3, False),
        ("attn_layer_indices", [True], False),
        ("hidden_sizes", [8, 16], False),
    ],
)
def test_lists_of_layers_numbers_are_told_from_marks(name, value, expected):
    assert lists_layers(name, value) is expected


@given(chosen, st.data())
def test_layers_own_attributes_follow_the_layers(choice, data):
    number, sources = choice
    having = data.draw(st.sets(st.integers(0, number - 1), min_size=1))
    own = {f"{k:02d}": {"head_dim": 8 * (k + 1)} for k in having}
    after = carry("per_layer_config", own, number, sources)
    assert [own_of(after, k) for k in range(len(sources))] == [own_of(own, source) for source in sources]


def test_layers_own_attributes_are_copies():
    own = {"0": {"head_dim": 8}}
    after = carry("per_layer_config", own, 1, [0, 0])
    after["0"]["head_dim"] = 16
    assert own == {"0": {"head_dim": 8}}
    assert after["1"] == {"head_dim": 8}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 2),
        ("rms_norm_eps", 1e-6),
        ("architectures", ["A", "B"]),
        ("image_mean", [0.5, 0.5]),
        ("mrope_section", [1, 1]),
        ("time_step_limit", [0.0, 1.0]),
        ("feed_forward_residual_weights", [1.5, 0.5]),
        ("layer_types", ["full", "full", "full"]),  # of three layers, where there are two
        ("layer_types", None),
        ("per_layer_config", {}),
        ("first_k_dense_replace", None),
        ("tie_word_embeddings", True),
    ],
)
def test_what_does_not_speak_of_layers_stays(name, value):
    assert marks(name, value, 2) is None
    assert carry(name, value, 2, [0, 0, 1, 1]) == value


def test_a_choice_of_nothing_changes_nothing():
    assert carry("layer_types", KINDS, 2, []) == KINDS


def test_a_config_follows_in_all_that_it_says_of_layers():
    config = AutoConfig.for_model("qwen2", num_hidden_layers=4, max_window_layers=2, use_sliding_window=True)
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    deeper = resize_config(config, {}, {"num_hidden_layers": LayerMap(4, (0, 0, 1, 2, 3, 3), (False,) * 6)})
    assert deeper.num_hidden_layers == 6
    assert deeper.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 3
    assert deeper.max_window_layers == 3
    assert config.num_hidden_layers == 4 and len(config.layer_types) == 4, "the given config is untouched"


def test_a_number_of_layers_that_a_class_works_out_follows_its_list():
    config = AutoConfig.for_model("nemotron_h", layers_block_type=["linear_attention", "full_attention", "mlp"])
    assert layer_attributes(config)[0] == "num_hidden_layers" and "num_hidden_layers" not in config.to_dict()
    deeper = resize_config(config, {}, {"num_hidden_layers": LayerMap(3, (0, 1, 2, 2), (False, False, False, True))})
    assert deeper.layers_block_type == ["linear_attention", "full_attention", "mlp", "mlp"]
    plan = plan_growth(probe_config(config), depth=2)
    assert plan.exact and plan.target_config.num_hidden_layers == 6
    assert plan_growth(probe_config(config), num_hidden_layers=6).changes == plan.changes


def test_a_second_count_of_the_same_layers_follows_the_first():
    config = AutoConfig.for_model("xlstm", num_hidden_layers=3, num_blocks=3)
    deeper = resize_config(config, {}, {"num_hidden_layers": LayerMap(3, (0, 1, 1, 2), (False, False, True, False))})
    assert (deeper.num_hidden_layers, deeper.num_blocks) == (4, 4)
    both = AutoConfig.for_model("bart", encoder_layers=12, decoder_layers=12)  # 12 is also what is left out
    deeper = resize_config(both, {}, {"num_hidden_layers": LayerMap(12, (*range(12), 11), (False,) * 13)})
    assert (deeper.encoder_layers, deeper.decoder_layers) == (13, 12)


def test_dense_layers_below_experts_stay_dense_in_a_plan():
    sizes = {"num_hidden_layers": 4, "first_k_dense_replace": 2}
    plan = plan_growth(AutoConfig.for_model("deepseek_v3", **sizes), depth=2)
    dense = {plan.layout.template(name)[2] for name in plan.names if name.endswith(".mlp.down_proj.weight")}
    assert plan.target_config.first_k_dense_replace == 4
    assert dense == {0, 1, 2, 3}
