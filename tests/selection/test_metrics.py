"""Zero-step metrics, probes and what they draw from."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hf_warmstart import WarmstartError, grow, plan_growth
from hf_warmstart.selection.metrics import divergence, effective_rank, outputs_of, zero_step_metrics
from hf_warmstart.selection.probes import Baseline, gradient_noise, probe, random_state_kept

from ..models import some_tokens, tiny_model
from .conftest import TINY


def batches(count=2, rows=3):
    made = [some_tokens(rows, 10, seed=seed) for seed in range(count)]
    return [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in made]


def grown(**growth):
    parent = tiny_model("llama", **TINY)
    return parent, grow(parent, **growth), plan_growth(parent, **growth)


def test_an_exact_growth_changes_nothing_and_an_inexact_one_does():
    parent, child, plan = grown(width=2, width_operator="reference_slice")
    found = zero_step_metrics(parent, child, batches(), plan)
    assert abs(found["loss_change"]) < 1e-5 and abs(found["kl"]) < 1e-9 and found["max_logit_change"] < 1e-4
    assert found["rms_ratio"] == pytest.approx([1.0, 1.0, 1.0], rel=1e-4)
    parent, child, plan = grown(width=2, width_operator="szp", shrink=0.5)
    found = zero_step_metrics(parent, child, batches(), plan)
    assert found["kl"] > 1e-4 and found["kl_reverse"] > 1e-4 and found["kl"] != found["kl_reverse"]
    assert max(abs(ratio - 1) for ratio in found["rms_ratio"]) > 0.1


def test_new_layers_are_compared_with_the_layers_that_they_grew_from():
    parent, child, plan = grown(depth=2)
    ratios = zero_step_metrics(parent, child, batches(), plan)["rms_ratio"]
    # identity blocks hand on what the layer before them gave; the last state is normed
    assert len(ratios) == 5 and ratios[:3] == pytest.approx([1.0, 1.0, 1.0], rel=1e-4)


def test_divergences_are_those_of_torch_in_both_directions():
    one, other = torch.randn(7, 11), torch.randn(7, 11)
    log = torch.nn.functional.kl_div
    expected = log(other.log_softmax(-1), one.log_softmax(-1), log_target=True, reduction="batchmean")
    assert divergence(one, other) == pytest.approx(float(expected), rel=1e-5)
    assert divergence(one, torch.cat([one, torch.zeros(7, 3)], 1)) == pytest.approx(0, abs=1e-12)


def test_effective_rank_counts_equal_directions():
    assert effective_rank(torch.eye(6)) == pytest.approx(6.0)
    assert effective_rank(torch.ones(6, 4)) == pytest.approx(1.0)


def test_padding_counts_in_no_metric():
    model = tiny_model("llama", **TINY)
    (batch,) = batches(1)
    batch["attention_mask"][:, 7:] = 0
    assert outputs_of(model, batch).logits.shape[0] == 3 * 7


def test_a_batch_without_labels_is_refused():
    with pytest.raises(WarmstartError, match="gave no loss for a batch of .'input_ids'.*labels"):
        outputs_of(tiny_model("llama", **TINY), {"input_ids": some_tokens(2, 4)})


def test_gradient_noise_is_that_of_its_formula():
    model = tiny_model("llama", **TINY)
    parts = batches(4)
    gradients = []
    for part in parts:
        model.zero_grad()
        model(**part).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    stacked = torch.stack(gradients)
    trace = float(stacked.var(0, unbiased=True).sum())
    signal = float(stacked.mean(0).square().sum()) - trace / 4
    before = [p.grad.clone() for p in model.parameters()]
    found = gradient_noise(model, parts)
    assert (found is None and signal <= 0) or found == pytest.approx(3 * trace / signal, rel=1e-3)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))
    # equal micro-batches have no noise
    assert gradient_noise(model, [parts[0]] * 3) == pytest.approx(0, abs=1e-4)


def test_a_probe_measures_change_since_step_0_and_changes_nothing():
    parent, child, plan = grown(width=2)
    child.train()
    fixed = batches()
    baseline = Baseline.of(parent, child, fixed)
    at_start = probe(child, baseline, fixed, [], plan)
    assert at_start["drift_logits"] == at_start["drift_parameters"] == at_start["drift_hidden"] == 0.0
    assert at_start["gradient_noise"] is None and at_start["escape"]["update"] is None
    with torch.no_grad():
        for parameter in child.parameters():
            parameter *= 1.5
    kept = {name: tensor.clone() for name, tensor in child.state_dict().items()}
    found = probe(child, baseline, fixed, fixed, plan)
    assert found["drift_parameters"] == pytest.approx(0.5, rel=1e-3)
    assert found["kl"] > 1e-4 and found["drift_logits"] > 0 and found["drift_hidden"] > 0
    assert child.training and all(torch.equal(kept[name], tensor) for name, tensor in child.state_dict().items())


def test_measures_leave_no_trace_in_random_states():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with random_state_kept():
        random.random()
        np.random.rand(3)
        torch.rand(3)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all() and torch.equal(torch.get_rng_state(), before[2])
