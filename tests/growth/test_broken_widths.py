"""Widths that are no whole number: what takes part, what stays, and what a norm asks of its neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_warmstart import WarmstartError, certify, plan_growth
from hf_warmstart.growth.config import GrowthConfig
from hf_warmstart.growth.layouts.derive import derive_layout
from hf_warmstart.growth.layouts.probe import probe_config
from hf_warmstart.growth.plan import make_plan
from hf_warmstart.growth.zoo import SUITE, Status, certify_growth, source_of

from .test_custom_model import QuillBlock, QuillConfig, QuillModel, QuillNorm

OPERATORS = ["uneven_copy", "reference_slice"]


def model_of(block: type[nn.Module], **sizes) -> QuillModel:
    """A user's model with blocks of its own."""
    return type("OwnModel", (QuillModel,), {"block_class": block})(QuillConfig(**sizes))


class InkNormBlock(QuillBlock):
    """Units of the MLP that are normed as they leave the nonlinearity: no factor reaches them."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = nn.Linear(config.model_width, config.ink)
        self.even = QuillNorm(config.ink, config.eps)

    def forward(self, x):
        x = super().forward(x)
        return x + self.think_out(self.even(F.gelu(self.seen(self.before_think(x)))))


@pytest.mark.parametrize("operator", OPERATORS)
def test_units_that_come_in_whole_copies_only_stay_while_the_stream_widens(operator):
    model = model_of(InkNormBlock)
    plan = plan_growth(model, width=1.5, width_operator=operator)
    assert plan.changes == {"model_width": [48, 72], "n_pens": [6, 9]}
    assert certify(model, width=1.5, width_operator=operator).exact


def test_units_that_come_in_whole_copies_only_follow_a_whole_width_and_are_refused_by_name():
    assert plan_growth(model_of(InkNormBlock), width=2).changes["ink"] == [80, 160]
    with pytest.raises(WarmstartError, match="intermediate_size can only grow by whole factors"):
        plan_growth(model_of(InkNormBlock), ink=120)


class SideNormBlock(QuillBlock):
    """A side stream that is normed, and units of the same size."""

    def __init__(self, config):
        super().__init__(config)
        self.into, self.between = nn.Linear(config.model_width, config.ink), nn.Linear(config.ink, config.ink)
        self.even = QuillNorm(config.ink, config.eps)

    def forward(self, x):
        x = super().forward(x)
        return x + self.think_out(F.gelu(self.between(self.even(self.into(self.before_think(x))))))


@pytest.mark.parametrize("operator", OPERATORS)
def test_factors_that_a_norm_asks_for_reach_no_units_of_the_same_size(operator):
    certificate = certify(model_of(SideNormBlock), width=1.5, width_operator=operator)
    assert certificate.exact, certificate


class GatedNorm(QuillNorm):
    """A norm whose output meets a gate that is computed from it; `leak` lets the gate into the stream as well."""

    leak = False

    def __init__(self, width, eps):
        super().__init__(width, eps)
        self.down, self.up = nn.Linear(width, 7), nn.Linear(7, width)

    def forward(self, x):
        y = super().forward(x)
        gate = torch.sigmoid(self.up(F.silu(self.down(y))))
        return y * gate + gate if self.leak else y * gate


class LeakyNorm(GatedNorm):
    leak = True


def gated_block(norm: type[nn.Module]) -> type[nn.Module]:
    class GatedBlock(QuillBlock):
        def __init__(self, config):
            super().__init__(config)
            self.before_think = norm(config.model_width, config.eps)

    return GatedBlock


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_gate_on_a_normed_stream_is_copied_without_the_factors_of_the_stream(operator):
    certificate = certify(model_of(gated_block(GatedNorm)), width=1.5, width_operator=operator)
    assert certificate.exact, certificate


def test_a_gate_that_enters_the_stream_as_well_holds_it_to_whole_factors():
    model = model_of(gated_block(LeakyNorm))
    with pytest.raises(WarmstartError, match="residual can only grow by whole factors"):
        plan_growth(model, width=1.5)
    assert certify(model, width=2).exact


class PooledBlock(QuillBlock):
    """Attention over two states of the stream at each place, with a query that is a parameter."""

    def __init__(self, config):
        super().__init__(config)
        self.query = nn.Parameter(torch.ones(config.model_width))

    def forward(self, x):
        states = torch.stack([self.before_think(x), self.before_look(super().forward(x))], dim=-2)
        query = self.query.expand(*x.shape[:-1], 1, -1)
        return x + F.scaled_dot_product_attention(query, states, states).squeeze(-2)


@pytest.mark.parametrize("operator", OPERATORS)
def test_attention_over_states_of_the_stream_is_linear_in_them(operator):
    certificate = certify(model_of(PooledBlock), width=1.5, width_operator=operator)
    assert certificate.exact, certificate


class SubNormBlock(QuillBlock):
    """Norms over what all heads found and over all gated units; `groups` queries for each head of keys and values."""

    groups = 2

    def __init__(self, config):
        super().__init__(config)
        width = config.model_width
        self.queries = nn.Linear(width, width)
        self.keys, self.values = (nn.Linear(width, width // self.groups) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, config.ink, bias=False) for _ in range(2))
        del self.look, self.think
        self.found, self.even = QuillNorm(width, config.eps), QuillNorm(config.ink, config.eps)

    def forward(self, x):
        batch, length, width = x.shape
        dim = width // self.pens
        made = (part(self.before_look(x)) for part in (self.queries, self.keys, self.values))
        q, k, v = (y.view(batch, length, -1, dim).transpose(1, 2) for y in made)
        k, v = (y.repeat_interleave(self.groups, dim=1) for y in (k, v))
        seen = (q @ k.transpose(-1, -2) * dim**-0.5).softmax(-1) @ v
        x = x + self.look_out(self.found(seen.transpose(1, 2).reshape(batch, length, width)))
        seen = self.before_think(x)
        return x + self.think_out(self.even(F.relu(self.gate(seen)) * self.up(seen)))


class LonelySubNormBlock(SubNormBlock):
    groups = 1


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("block", [SubNormBlock, LonelySubNormBlock])
def test_values_and_linear_halves_of_gated_units_keep_the_mean_square_of_a_norm_behind_them(block, operator):
    model = model_of(block, model_width=64, n_pens=4)
    assert plan_growth(model, width=1.5, width_operator=operator).changes == {
        "model_width": [64, 96],
        "n_pens": [4, 6],
        "ink": [80, 120],
    }
    certificate = certify(model, width=1.5, width_operator=operator)
    assert certificate.exact, certificate


class FusedSubNormBlock(QuillBlock):
    """A norm over gated units whose halves are one projection."""

    def __init__(self, config):
        super().__init__(config)
        self.even = QuillNorm(config.ink, config.eps)

    def forward(self, x):
        x = super().forward(x)
        gate, up = self.think(self.before_think(x)).chunk(2, dim=-1)
        return x + self.think_out(self.even(F.relu(gate) * up))


@pytest.mark.parametrize("operator", OPERATORS)
def test_one_axis_for_both_halves_of_gated_units_takes_no_factor(operator):
    model = model_of(FusedSubNormBlock)
    assert "ink" not in plan_growth(model, width=1.5, width_operator=operator).changes
    assert certify(model, width=1.5, width_operator=operator).exact


class SplitNormBlock(InkNormBlock):
    """A norm over one part of what a projection writes, and units behind it."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = nn.Linear(config.model_width, config.ink + 7)
        self.rest = nn.Linear(7, config.model_width)

    def forward(self, x):
        x = QuillBlock.forward(self, x)
        first, second = self.seen(self.before_think(x)).split([self.think_out.in_features, 7], dim=-1)
        return x + self.think_out(F.gelu(self.even(first))) + self.rest(second)


def test_a_norm_over_a_part_of_an_axis_is_no_norm_over_all_of_it():
    model = model_of(SplitNormBlock)
    assert "ink" not in plan_growth(model, width=1.5).changes
    assert certify(model, width=1.5, width_operator="uneven_copy").exact


def test_each_stack_of_layers_keeps_its_own_number_of_queries_for_a_head_of_keys():
    model_class, config = source_of("seq2seq-lm", "t5gemma")
    layout = derive_layout(model_class, config)
    assert [layout.spaces[name].widens for name in ("group", "group_2")] == [False, False]


@pytest.mark.parametrize("growth", SUITE[1:3], ids=lambda growth: growth.name)
def test_what_stays_is_said_to_the_child_and_to_the_twin_where_the_parent_left_it_unset(growth):
    """Heads stay as wide and as many as they were, so the child's config names a width that the parent's implied."""
    model_class, config = source_of("causal-lm", "minimax")
    config = probe_config(config)
    changes = make_plan(model_class, config, GrowthConfig(**growth.options)).changes
    assert changes == {"hidden_size": [64, 96], "intermediate_size": [24, 36], "head_dim": [None, 16]}
    assert certify_growth(model_class, config, growth).status is Status.EXACT
