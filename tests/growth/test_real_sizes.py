"""Layouts at real sizes: what is derived from a tiny probe fits the sizes that a user's config has."""

from __future__ import annotations

import pytest
from transformers import MinistralConfig, MinistralForCausalLM

from hf_warmstart import GrowthConfig, WarmstartError
from hf_warmstart.growth.plan import make_plan


def test_a_class_that_cannot_be_built_from_its_config_says_so_in_its_own_words():
    config = MinistralConfig()  # leaves head_dim unset, which the model needs
    with pytest.raises(
        WarmstartError, match="MinistralForCausalLM cannot be built from this config: TypeError"
    ) as info:
        make_plan(MinistralForCausalLM, config, GrowthConfig(width=2))
    assert isinstance(info.value.__cause__, TypeError)
