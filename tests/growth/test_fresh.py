"""Fresh tensors: the class's own initialisation, tensor by tensor; `szp` lies over it."""

from __future__ import annotations

import hashlib

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_warmstart import grow, plan_growth
from hf_warmstart.growth import random
from hf_warmstart.growth.fresh import recipes

from ..models import FAMILIES, tiny_config, tiny_model

PINNED = {
    random.normal: [-0.921887993812561, 1.73362398147583, -0.4628955125808716, 0.6714545488357544],
    random.noise: [-1.15626859664917, 0.14382660388946533, -0.031080501154065132, -1.61528742313385],
    random.uniform: [0.041529297828674316, 0.5337217450141907, 0.9574586153030396, 0.3240343928337097],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_szp_without_the_parent_is_the_fresh_model_of_the_target(family):
    parent = tiny_model(family)
    plan = plan_growth(parent, width=2, width_operator="szp", shrink=0, seed=4)
    child = grow(parent, width=2, width_operator="szp", shrink=0, seed=4).state_dict()
    fresh = recipes(type(parent), plan.target_config)
    for name in plan.names:
        assert torch.equal(child[name], fresh[name].make(4, name)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_tensors_have_the_mean_and_deviation_of_from_config(family):
    config = tiny_config(family, vocab_size=499)
    plan = plan_growth(config, width=2)
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(plan.target_config).state_dict()
    for name, recipe in recipes(plan.model_class, plan.target_config).items():
        ours, theirs = recipe.make(0, name), reference[name]
        assert ours.shape == theirs.shape, name
        deviation = float(theirs.std(correction=0))
        if deviation == 0:
            assert torch.equal(ours, theirs), name
            continue
        entries = theirs.numel()
        # Four standard errors of a mean, and of a deviation, of each of two normal samples.
        assert abs(float(ours.mean() - theirs.mean())) < 4 * deviation * (2 / entries) ** 0.5, name
        assert abs(float(ours.std(correction=0)) - deviation) < 4 * deviation * (1 / entries) ** 0.5, name


def test_padding_rows_are_zero_as_the_class_makes_them():
    made = recipes(type(tiny_model("opt")), tiny_config("opt"))["model.decoder.embed_tokens.weight"].make(0, "x")
    assert torch.equal(made[1], torch.zeros(64)) and made[2].abs().max() > 0


def test_residual_projections_of_gpt2_keep_their_own_deviation():
    made = recipes(type(tiny_model("gpt2")), tiny_config("gpt2"))
    projection = made["transformer.h.0.mlp.c_proj.weight"].make(0, "a").std()
    ordinary = made["transformer.h.0.mlp.c_fc.weight"].make(0, "b").std()
    assert float(ordinary / projection) == pytest.approx(2.0, rel=0.05)  # sqrt(2 * 2 layers)


def test_draws_depend_on_seed_stream_and_name_only():
    a = random.normal((300, 1000), 0, "noise", "w")
    assert torch.equal(a, random.normal((300, 1000), 0, "noise", "w"))
    for other in ((1, "noise", "w"), (0, "fresh", "w"), (0, "noise", "v")):
        assert not torch.equal(a, random.normal((300, 1000), *other))


def test_draws_are_the_same_on_every_machine():
    """Literal numbers: a change of the generator would break every record."""
    for draw, pinned in PINNED.items():
        assert draw((2, 2), 0, "noise", "w").flatten().tolist() == pytest.approx(pinned, rel=0, abs=0), draw


def test_the_table_of_quantiles_is_the_same_on_every_machine():
    """Its numbers are rounded from float64: none lies so near the middle of two float32 that an ulp would decide."""
    table = random._table(1.0).numpy()
    digest = hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()
    assert digest == "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"
    assert (table == -table[::-1]).all() and (table[1:] > table[:-1]).all()
