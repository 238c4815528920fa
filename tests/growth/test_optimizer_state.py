"""What is known of an optimizer's state, and what is refused, with the way out in the message."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_warmstart import grow, grow_optimizer_state, plan_growth
from hf_warmstart.errors import StateError
from hf_warmstart.growth.optimizers import RULES, grow_factored, rule_for_optimizer
from hf_warmstart.growth.state import grow_entry
from hf_warmstart.training import load_grown_state

from ..models import tiny_model

PARAMETER = (96, 64)  # of mlp.up_proj
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def plan():
    """A tiny Llama's growth by even copies."""
    return plan_growth(tiny_model("llama", num_hidden_layers=1), width=2, width_operator="exact_copy")


def _grow(entry: dict, plan, **options):
    return grow_optimizer_state({"state": {NAME: entry}, "param_groups": []}, plan, **options)["state"][NAME]


def _whole(entry: dict, **options) -> dict:
    return {"state": {NAME: entry}, "param_groups": [{"params": [NAME], **options}]}


def _bitsandbytes(quantised: bool) -> dict:
    """Its 8-bit Adam's entry; tensors of fewer than 4096 entries it keeps in float32, without maps and scales."""
    if not quantised:
        return {"step": 3, "state1": torch.zeros(PARAMETER), "state2": torch.zeros(PARAMETER)}
    entry = {"step": 3}
    for k in (1, 2):
        entry[f"state{k}"] = torch.zeros(PARAMETER, dtype=torch.uint8)
        entry[f"qmap{k}"], entry[f"absmax{k}"] = torch.zeros(256), torch.zeros(24)
    return entry


@pytest.mark.parametrize("policy", ["carry", "asymmetric_reset"])
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (_bitsandbytes(True), "quantised to 8 bits"),
        (_bitsandbytes(False), "state1.*of no known optimizer"),
        ({"step": torch.tensor(3.0), "sum": torch.ones(PARAMETER)}, "step.*sum.*of no known optimizer"),
        ({"step": 3, "exp_avg_sq": torch.ones(PARAMETER)}, "of no known optimizer"),
    ],
    ids=["8-bit", "8-bit, small tensor", "Adagrad", "half of Adam"],
)
def test_states_that_no_rule_knows_are_refused_by_name_and_reset_on_request(plan, entry, message, policy):
    with pytest.raises(StateError, match=rf"(?s){NAME}.*{message}.*state_policy='reset'"):
        _grow(entry, plan, state_policy=policy)
    assert grow_optimizer_state({NAME: entry}, plan, state_policy="reset") == {}


@pytest.mark.parametrize(
    "entry",
    [
        {"momentum_buffer": torch.ones(PARAMETER)},
        {"exp_avg": torch.ones(PARAMETER)},
        {"step": torch.tensor(3.0), "row_var": torch.ones(96, 1), "col_var": torch.ones(1, 64)},
        {"step": 3, "RMS": 1.0, "exp_avg_sq_row": torch.ones(96), "exp_avg_sq_col": torch.ones(64)},
        {"step": torch.tensor(3.0)}
        | dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), torch.ones(PARAMETER)),
    ],
    ids=["SGD", "Lion", "Adafactor (torch)", "Adafactor (transformers)", "AMSGrad"],
)
def test_what_grown_adamw_cannot_continue_is_refused_under_asymmetric_reset_alone(plan, entry):
    assert _grow(entry, plan).keys() == entry.keys()
    with pytest.raises(StateError, match="asymmetric_reset.*Pass state_policy='carry' or 'reset'"):
        _grow(entry, plan, state_policy="asymmetric_reset")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"momentum_buffer": torch.ones(64, 96)}, r"momentum_buffer has shape \(64, 96\), the parent's is \(96, 64\)"),
        (
            {"step": 3, "RMS": 1.0, "exp_avg_sq_row": torch.ones(64), "exp_avg_sq_col": torch.ones(96)},
            r"exp_avg_sq_row has shape \(64,\), the parent's is \(96,\)",
        ),
    ],
    ids=["SGD", "Adafactor"],
)
def test_shapes_are_checked_by_the_kind_of_each_piece(plan, entry, message):
    with pytest.raises(StateError, match=message):
        _grow(entry, plan)


def test_each_kind_of_piece_grows_by_its_own_factor(plan):
    """For even copies `w' = s tile(w)`, `G' = gamma tile(G)`: moments by gamma, its square, and s."""
    name = "lm_head.weight"  # reads twice as much and writes the same: its two factors differ
    growth = plan.tensor(name)
    ones = torch.ones(97, 64, dtype=torch.float64)
    s = float(growth.grow(ones, "weight").mean())
    entry = {"step": torch.tensor(7.0), "exp_avg": 3 * ones, "exp_avg_sq": 5 * ones, "max_exp_avg_sq": 6 * ones}
    grown = grow_optimizer_state({"state": {name: entry}}, plan)["state"][name]
    gamma = float(grown["exp_avg"].mean()) / 3
    assert grown["exp_avg"].shape == growth.shape == (97, 128)
    assert s != gamma and s * gamma * 2 == pytest.approx(
        1
    )  # a change of the weight changes the loss as it did in the parent
    torch.testing.assert_close(grown["exp_avg_sq"], torch.full(growth.shape, 5 * gamma**2, dtype=torch.float64))
    torch.testing.assert_close(grown["max_exp_avg_sq"], torch.full(growth.shape, 6 * gamma**2, dtype=torch.float64))
    assert float(grown["step"]) == 7.0 and grown["step"] is not entry["step"]
    adafactor = {"step": 7, "RMS": 0.5, "exp_avg": ones, "exp_avg_sq_row": ones[:, 0], "exp_avg_sq_col": ones[0]}
    grown = grow_optimizer_state({"state": {name: adafactor}}, plan)["state"][name]
    torch.testing.assert_close(grown["exp_avg"], torch.full(growth.shape, s, dtype=torch.float64))
    torch.testing.assert_close(grown["exp_avg_sq_row"], torch.full((97,), gamma**2, dtype=torch.float64))


@pytest.mark.parametrize("kept", [True, False], ids=["axes kept", "axes dropped"])
def test_factored_moments_are_the_means_of_the_grown_second_moment(plan, kept):
    """Rows and columns of a rank-one moment grow to the means that the whole moment, grown, has."""
    row = torch.rand(96, 1, dtype=torch.float64) + 0.1
    column = torch.rand(1, 64, dtype=torch.float64) + 0.1
    column *= row.mean() / column.mean()  # means of one matrix over either axis have the same mean
    whole = plan.tensor(NAME).grow(row * column / row.mean(), "second_moment")
    given = (row, column) if kept else (row[:, 0], column[0])
    rows, columns = grow_factored(plan.tensor(NAME), *given)
    torch.testing.assert_close(rows, whole.mean(-1, keepdim=kept))
    torch.testing.assert_close(columns, whole.mean(-2, keepdim=kept))
    torch.testing.assert_close(rows.reshape(-1, 1) * columns.reshape(1, -1) / rows.mean(), whole)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (("step", "exp_avg", "exp_avg_sq"), "Adam"),
        (("step", "RMS", "exp_avg", "exp_avg_sq"), "Adafactor (transformers)"),
        (("step", "variance"), "Adafactor (torch)"),
        (("step", "exp_avg"), "Lion"),
        (("exp_avg",), "Lion"),
        (("momentum_buffer",), "SGD or Muon"),
    ],
)
def test_an_entry_fits_the_one_rule_of_its_tensors(keys, name):
    assert [rule.name for rule in RULES if rule.fits(keys)] == [name]


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.RAdam], ids=["other keys", "Adam's keys"])
def test_an_optimizer_is_known_by_its_class_too(kind):
    """RAdam keeps tensors of Adam's names, and steps otherwise."""
    optimizer = kind([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(StateError, match=rf"{kind.__name__} is no optimizer.*AdamW.*state_policy='reset'"):
        rule_for_optimizer(optimizer)


def test_a_state_of_another_kind_than_the_optimizer_keeps_is_refused(plan):
    child = grow(tiny_model("llama", num_hidden_layers=1), width=2, width_operator="exact_copy")
    names, parameters = zip(*child.named_parameters(), strict=True)
    adam = torch.optim.AdamW(parameters)
    adam.param_groups[0]["param_names"] = list(names)
    with pytest.raises(StateError, match="SGD or Muon, which AdamW cannot use"):
        load_grown_state(adam, _whole({"momentum_buffer": torch.ones(PARAMETER)}), plan)
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.ones(PARAMETER), "exp_avg_sq": torch.ones(PARAMETER)}
    with pytest.raises(StateError, match="AdamW does not keep"):
        load_grown_state(adam, _whole(moments), plan, state_policy="asymmetric_reset")
    with pytest.raises(StateError, match="amsgrad=True needs"):
        maximal = torch.optim.AdamW(parameters, amsgrad=True)
        maximal.param_groups[0]["param_names"] = list(names)
        load_grown_state(maximal, _whole(moments), plan)
    load_grown_state(adam, _whole(moments), plan)
    assert adam.state[dict(child.named_parameters())[NAME]]["exp_avg_sq"].shape == (192, 128)


def test_sgds_sums_are_not_taken_for_muons_averages(plan):
    child = grow(tiny_model("llama", num_hidden_layers=1), width=2, width_operator="exact_copy")
    matrix, buffers = dict(child.named_parameters())[NAME], {"momentum_buffer": torch.ones(PARAMETER)}
    muon, sgd = torch.optim.Muon([matrix]), torch.optim.SGD([matrix], momentum=0.9)
    for optimizer, kept in ((muon, {"ns_steps": 5}), (sgd, {})):
        optimizer.param_groups[0]["param_names"] = [NAME]
        load_grown_state(optimizer, _whole(buffers, **kept), plan)
        with pytest.raises(StateError, match="SGD sums gradients, Muon averages them"):
            load_grown_state(optimizer, _whole(buffers, **({} if kept else {"ns_steps": 5})), plan)


def test_in_a_post_norm_stack_the_moments_of_the_final_norm_go_where_its_gain_goes():
    """BERT in depth: the new layer holds the parent's final norm, the old one a constant in its place."""
    plan = plan_growth(tiny_model("bert"), depth=2)
    names = [name for name in plan.names if name.endswith("output.LayerNorm.weight") and "attention" not in name]
    ones = {name: torch.ones(plan.shapes[name]) for name in plan.shapes}
    state = {n: {"step": torch.tensor(9.0), "exp_avg": v, "exp_avg_sq": v} for n, v in ones.items()}
    carried = grow_optimizer_state({"state": state, "param_groups": []}, plan)["state"]
    parted = grow_optimizer_state({"state": state, "param_groups": []}, plan, state_policy="asymmetric_reset")["state"]
    constant = [plan.tensor(name).fill is not None for name in names]
    assert any(constant) and not all(constant)
    for name, filled in zip(names, constant, strict=True):
        assert bool((carried[name]["exp_avg"] == 0).all()) is filled, name
        assert bool(parted[name]["new"].all()) is filled and bool(parted[name]["new"].any()) is filled, name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "growth",
    [
        {"width": 2},
        {"width": 1.5, "width_operator": "uneven_copy"},
        {"width": 1.5, "width_operator": "reference_slice"},
        {"depth": 2},
    ],
    ids=["copies", "uneven", "slice", "depth"],
)
def test_rows_of_a_moment_are_those_of_the_whole_and_come_from_few_of_the_parents(family, growth):
    plan = plan_growth(tiny_model(family), **growth)
    fewer = 0
    for name in plan.names:
        tensor = plan.tensor(name)
        parent = torch.rand(plan.shapes[plan.source_name(name)], generator=torch.Generator().manual_seed(1))
        read = []

        def rows(start, stop, parent=parent, read=read):
            read.append(stop - start)
            return parent[start:stop]

        length = tensor.shape[0]
        cuts = [0, length // 3, length // 2, length]
        for kind in ("first_moment", "second_moment", "update"):
            parts = [tensor.moment_rows(rows, kind, a, b) for a, b in itertools.pairwise(cuts)]
            assert torch.equal(torch.cat(parts), tensor.grow(parent, kind)), (name, kind)
            assert tensor.moment_rows(rows, kind, 2, 2).shape == (0, *tensor.shape[1:])
        fewer += max(read[:3]) < len(parent)
    assert fewer > 0


def test_factored_moments_are_refused_by_rows():
    plan = plan_growth(tiny_model("llama"), width=2)
    name = "model.layers.0.mlp.up_proj.weight"
    rows, columns = plan.shapes[name]
    entry = {"step": torch.tensor(1.0), "row_var": torch.ones(rows, 1), "col_var": torch.ones(1, columns)}
    with pytest.raises(StateError, match="averages over an axis that is cut"):
        grow_entry(plan, name, entry, "carry", (0, 4))
