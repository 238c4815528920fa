"""muP's transfer of a learning rate, by coordinate checks: updates of activations do not depend on the width grown to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_warmstart import WarmstartError, grow
from hf_warmstart.training.coordinate_check import coordinate_check, plot_coordinate_checks

from ..models import some_tokens, tiny_model
from .conftest import blocks, warmstart_trainer

RATE, STEPS = 3e-3, 4


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": (ids := some_tokens(4, 16, seed=k)), "labels": ids} for k in range(STEPS)]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "operator", "near"),
    [
        ("llama", "perturbed_copy", 0.05),
        ("gpt2", "perturbed_copy", 0.05),
        ("llama", "szp", 0.3),
        pytest.param("llama", "exact_copy", 0.01, marks=SLOW),
        pytest.param("qwen3", "uneven_copy", 0.1, marks=SLOW),
        pytest.param("llama", "reference_slice", 0.3, marks=SLOW),
    ],
)
def test_updates_of_activations_keep_their_size_under_mup_and_grow_under_one_rate(family, operator, near):
    model = tiny_model(family, randomised=False)
    options = {"learning_rate": RATE, "widths": (1, 4), "width_operator": operator}
    with_mup = coordinate_check(model, batches(), **options)
    assert abs(with_mup.steepest) < near, with_mup
    one_rate = coordinate_check(model, batches(), learning_rate_transfer=None, **options)
    # In a hidden layer updates grow about as the width does.
    assert one_rate.slopes["layer 1"] > 0.7, one_rate
    assert one_rate.change["layer 1"][0] == with_mup.change["layer 1"][0]


@SLOW
@pytest.mark.parametrize(("transfer", "flat"), [("mup", True), (None, False)])
def test_a_warmstart_trainer_moves_activations_alike_at_every_width(tmp_path, transfer, flat):
    """The same through `WarmstartTrainer`: its groups, schedule and clipping."""
    parent = tiny_model("llama", randomised=False)
    ids, moved = some_tokens(4, 16, seed=9), []
    for width in (2, 4):
        child = grow(parent, width=width, width_operator="perturbed_copy")
        before = child(ids, output_hidden_states=True).hidden_states[1].detach()
        options = {"learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.0}
        trainer = warmstart_trainer(
            child, tmp_path / str(width), STEPS, blocks(0, STEPS), learning_rate_transfer=transfer, **options
        )
        trainer.train()
        after = child.eval()(ids, output_hidden_states=True).hidden_states[1].detach()
        moved.append(float((after - before).square().mean().sqrt()))
    slope = np.polyfit(np.log([2, 4]), np.log(moved), 1)[0]
    assert abs(slope) < 0.1 if flat else slope > 0.7, moved


def test_the_check_is_a_table_and_a_plot(tmp_path):
    model = tiny_model("llama", randomised=False)
    digest = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checks = [
        coordinate_check(model, batches()[:1], learning_rate=RATE, widths=(1, 2), learning_rate_transfer=transfer)
        for transfer in ("mup", None)
    ]
    assert all(torch.equal(tensor, digest[name]) for name, tensor in model.state_dict().items())
    words = str(checks[0])
    assert "reference_slice, mup" in words and list(checks[0].change) == [
        "embedding",
        "layer 1",
        "final norm",
        "logits",
    ]
    assert checks[0].scale["logits"][0] == pytest.approx(checks[0].scale["logits"][1], rel=1e-3)
    plot_coordinate_checks(checks, tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widths": (2,)}, "at least two rising factors"),
        ({"widths": (2, 1)}, "at least two rising factors"),
        ({"widths": (0.5, 1)}, "factors of 1 or more"),
        ({"learning_rate_transfer": "sp"}, "'sp' is none of"),
        ({"learning_rate": -1.0}, "must be positive"),
        ({"widths": (1, 1.01)}, "width"),
    ],
)
def test_checks_that_cannot_be_are_refused(options, words):
    with pytest.raises(WarmstartError, match=words):
        coordinate_check(tiny_model("llama"), batches(), **({"learning_rate": RATE} | options))
    with pytest.raises(WarmstartError, match="batches is empty"):
        coordinate_check(tiny_model("llama"), [], learning_rate=RATE)
