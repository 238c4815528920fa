"""What the default width operator is in one growth, and that plans, records and cards name it."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from hf_warmstart import GrowthConfig, GrowthRecord, WarmstartError, grow, plan_growth
from hf_warmstart.growth.source import digest

from ..models import FAMILIES, tiny_config, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"width": 2}, {"width": 1.5, "depth": 2}])
def test_a_slice_where_all_that_grows_can_take_fresh_units(family, options):
    plan = plan_growth(tiny_config(family), **options)
    assert plan.growth_config.width_operator == plan.operators[0] == "reference_slice" and plan.exact


@pytest.mark.parametrize(
    ("model_type", "sizes", "options"),
    [
        ("bert", {"is_decoder": True}, {"width": 2}),  # a norm of the stream is the stream: whole copies
        ("bloom", {}, {"width": 2}),  # ALiBi: the inside of heads grows, written alike on both sides
        ("mixtral", {"num_key_value_heads": 2}, {"num_local_experts": 16}),  # experts are copied as a whole
        ("mixtral", {"num_key_value_heads": 2}, {"intermediate_size": 192, "num_local_experts": 16}),
        ("llama", {}, {"width": 2, "noise": 0.1}),  # an option of copies' alone
    ],
)
def test_copies_where_something_can_only_be_copied(model_type, sizes, options):
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 97}
    config = AutoConfig.for_model(
        model_type, **small, **({"intermediate_size": 96} if model_type != "bloom" else {}), **sizes
    )
    plan = plan_growth(config, **options)
    assert plan.growth_config.width_operator == plan.operators[0] == "perturbed_copy" and plan.exact


@pytest.mark.parametrize("options", [{"width": 2}, {"width": 1.5, "depth": 2}, {"depth": 2}, {"vocab_size": 120}])
def test_the_record_names_the_operator_and_makes_the_same_model(options):
    parent = tiny_model("llama")
    child = grow(parent, **options)
    record = GrowthRecord.all_of(child.config)[-1]
    assert record.growth_config["width_operator"] == "reference_slice"
    assert digest(grow(parent, GrowthConfig.from_dict(json.loads(json.dumps(record.growth_config))))) == digest(child)
    assert digest(grow(parent, **options, width_operator="reference_slice")) == digest(child)


def test_a_record_that_names_copies_still_makes_copies():
    """Records of versions whose default they were."""
    written = {
        "library_version": "0.1.0",
        "width": 2,
        "width_operator": "perturbed_copy",
        "depth_operator": "identity_blocks",
    }
    plan = plan_growth(tiny_config("llama"), GrowthConfig.from_dict(written | {"seed": 0}))
    assert plan.operators == ["perturbed_copy"]


def test_the_config_keeps_what_was_asked():
    asked = GrowthConfig(width=2)
    assert asked.width_operator == asked.to_dict()["width_operator"] == "auto"
    assert GrowthConfig.from_dict(asked.to_dict()) == asked
    with pytest.raises(WarmstartError, match=r"'automatic' is none of \['auto', 'exact_copy'"):
        GrowthConfig(width=2, width_operator="automatic")
