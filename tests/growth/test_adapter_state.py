"""The optimizer's state of LoRA adapters grows through the maps that their weights take."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from hf_warmstart import grow, grow_optimizer_state, plan_growth
from hf_warmstart.errors import StateError
from hf_warmstart.growth.adapted_plan import AdaptedPlan
from hf_warmstart.growth.precision import true_float64

from ..models import some_tokens
from .test_adapters import ALL, adapted

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*"),
]
EVEN = {"width": 2, "width_operator": "exact_copy"}
COPIES = {"width": 2, "width_operator": "perturbed_copy"}


def first_state(model) -> dict[str, dict[str, torch.Tensor]]:
    """The state by name after one step of AdamW that changes nothing: moments of this model's own gradient."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, weight_decay=0.0)
    with true_float64():
        ids = some_tokens()
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.zero_grad()
    return {name: optimizer.state[p] for name, p in trained.items()}


@pytest.mark.parametrize(
    ("family", "options", "changes"),
    [
        ("llama", {"target_modules": list(ALL)}, {}),
        ("llama", {"target_modules": [*ALL, "embed_tokens", "lm_head"]}, {}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"], "lora_bias": True}, {}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}, {"tie_word_embeddings": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc", "wte"], "fan_in_fan_out": True}, {}),
        ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}, {}),
    ],
    ids=str,
)
def test_of_even_copies_the_grown_state_is_the_childs_own(family, options, changes):
    with true_float64():
        parent = adapted(family, LoraConfig(r=3, lora_alpha=7, **options), **changes)
        plan, child = plan_growth(parent, **EVEN), grow(parent, **EVEN)
    grown = grow_optimizer_state({"state": first_state(parent)}, AdaptedPlan(plan, child))["state"]
    own = first_state(child)
    assert grown.keys() == own.keys() and len(own) > 3
    for name, entry in own.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert grown[name][key].shape == entry[key].shape, (name, key)
            scale = entry[key].abs().max()
            assert scale > 0, (name, key)
            assert (grown[name][key] - entry[key]).abs().max() < 1e-9 * scale, (name, key)


def test_in_new_layers_first_moments_are_zero_and_everywhere_else_the_parents():
    growth = {"width": 1.5, "depth": 2}
    parent = adapted()
    plan, child = plan_growth(parent, **growth), grow(parent, **growth)
    state = first_state(parent)
    grown = grow_optimizer_state({"state": state}, AdaptedPlan(plan, child))["state"]
    assert len(grown) == 2 * len(state)
    for name, entry in grown.items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        source = state[name.replace(f".layers.{layer}.", f".layers.{layer // 2}.")]
        assert entry["exp_avg_sq"].min() > 0, name
        if layer % 2:
            assert not entry["exp_avg"].any(), name
        else:
            # The parent's own numbers are among them: its first copies, times a factor that this map gives each.
            assert entry["exp_avg"].any(), name
            assert entry["exp_avg"].shape == child.get_parameter(name).shape
        if "down_proj.lora_B" not in name:
            assert entry["step"] == source["step"]


def test_the_first_copies_alone_keep_their_moments_under_asymmetric_reset():
    parent = adapted()
    plan, child = plan_growth(parent, **COPIES), grow(parent, **COPIES)
    names = AdaptedPlan(plan, child)
    state = first_state(parent)
    grown = grow_optimizer_state({"state": state}, names, state_policy="asymmetric_reset")["state"]
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight"
    new = grown[name]["new"]
    assert new.shape == (3, 128) and new.sum() == new.numel() / 2
    assert not grown[name]["exp_avg"][new].any()
    kept = grown[name]["exp_avg"][~new].abs().sort().values
    torch.testing.assert_close(kept, state[name]["exp_avg"].flatten().abs().sort().values)


def test_of_new_layers_all_is_new_under_asymmetric_reset():
    parent = adapted()
    plan, child = plan_growth(parent, width=2, depth=2), grow(parent, width=2, depth=2)
    state = {"state": first_state(parent)}
    grown = grow_optimizer_state(state, AdaptedPlan(plan, child), state_policy="asymmetric_reset")["state"]
    for name, entry in grown.items():
        in_new_layer = int(name.split(".layers.")[1].split(".")[0]) % 2 == 1
        assert bool(entry["new"].all()) is in_new_layer, name
        assert bool(entry["exp_avg"].any()) is not in_new_layer, name


def test_a_state_of_other_adapters_is_refused_by_name():
    parent = adapted()
    other = adapted(config=LoraConfig(r=2, target_modules=["q_proj"]))
    plan, child = plan_growth(parent, width=2), grow(parent, width=2)
    with pytest.raises(StateError, match=r"q_proj\.lora_A\.default\.weight: exp_avg has shape \(2, 64\)"):
        grow_optimizer_state({"state": first_state(other)}, AdaptedPlan(plan, child))
