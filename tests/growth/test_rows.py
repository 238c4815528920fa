"""Rows of a grown weight made alone are bit for bit those of the whole; its noise and draws are what they are said to be."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch import Tensor

from hf_warmstart import plan_growth
from hf_warmstart.growth import matrix, random
from hf_warmstart.growth.fresh import Recipe, Step
from hf_warmstart.growth.layout import TensorLayout
from hf_warmstart.growth.maps import SpaceMap
from hf_warmstart.growth.matrix import Totals
from hf_warmstart.growth.operators.base import copy_map, even
from hf_warmstart.growth.pairing import Pairing
from hf_warmstart.growth.plan import GrowthPlan
from hf_warmstart.growth.precision import true_float64
from hf_warmstart.growth.transform import TensorGrowth

from ..models import FAMILIES, tiny_config

GROWTHS = {
    "perturbed 2": {"width": 2, "depth": 2},
    "perturbed 1.5": {"width": 1.5},
    "perturbed 3": {"width": 3},
    "exact": {"width": 2, "width_operator": "exact_copy"},
    "uneven": {"width": 1.5, "width_operator": "uneven_copy"},
    "slice": {"width": 1.5, "width_operator": "reference_slice"},
    "szp": {"width": 2, "width_operator": "szp"},
}
# One family for each way that tensors are laid out; the others are in the slow half.
QUICK = ("llama", "gpt2", "mixtral")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def _parent(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


def _joined(growth: TensorGrowth, tensor: Tensor, step: int, reads: list[int] | None = None) -> Tensor:
    """The weight, made some rows at a time."""
    rows = tensor.reshape(growth.matrix_before)

    def read(start: int, stop: int) -> Tensor:
        if reads is not None:
            reads.append(stop - start)
        return rows[start:stop]

    totals = growth.totals(read)
    if reads is not None:
        reads.clear()
    count = growth.matrix_shape[0]
    cuts = [*range(0, count, step), count]
    parts = [growth.weight_rows(read, low, high, totals) for low, high in itertools.pairwise(cuts)]
    return torch.cat(parts).reshape(growth.shape)


def _check(plan: GrowthPlan, dtype: torch.dtype) -> int:
    by_rows = 0
    for number, name in enumerate(plan.names):
        growth = plan.tensor(name)
        tensor = _parent(plan.shapes[plan.source_name(name)], dtype)
        whole = growth.weight(tensor)
        assert whole.shape == plan.target_shapes[name] and whole.dtype == dtype, name
        step = 7 + number % 6 if number % 3 == 0 else growth.matrix_shape[0] // 3 + 1
        assert torch.equal(_joined(growth, tensor, step), whole), (name, step)
        by_rows += growth.by_rows
    return by_rows


def _usual() -> list[tuple[str, str, str]]:
    """All growths of a few families and one of each other, in dtypes in turn."""
    pairs = [(f, g) for f in QUICK for g in GROWTHS]
    pairs += [(f, list(GROWTHS)[k % len(GROWTHS)]) for k, f in enumerate(f for f in FAMILIES if f not in QUICK)]
    return [(family, growth, list(DTYPES)[k % 3]) for k, (family, growth) in enumerate(pairs)]


@pytest.mark.parametrize(("family", "growth", "dtype"), _usual())
def test_rows_joined_are_the_whole(family, growth, dtype):
    assert _check(plan_growth(tiny_config(family), **GROWTHS[growth]), DTYPES[dtype]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_joined_are_the_whole_in_each_dtype(family, growth, dtype):
    assert _check(plan_growth(tiny_config(family), **GROWTHS[growth]), DTYPES[dtype]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", ["perturbed_copy", "exact_copy"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_short_ways_have_the_bits_of_the_long_one(family, operator, dtype, monkeypatch):
    """Copies in pairs, and copies alone, are made by code of their own; what any growth can be made by is the measure."""
    plan = plan_growth(tiny_config(family), width=2, width_operator=operator)
    monkeypatch.setattr("hf_warmstart.growth.runs.SHORT", 1)  # so that the runs of tiny models are long
    made, twins, copies = {}, 0, 0
    for name in plan.names:
        growth = plan.tensor(name)
        made[name] = growth.weight(_parent(plan.shapes[plan.source_name(name)], dtype))
        matrix_growth = growth._matrix
        twins, copies = twins + (matrix_growth.twins is not None), copies + matrix_growth.plain
    assert copies >= 5
    assert (twins >= len(made) // 3) == (operator == "perturbed_copy"), f"{twins} of {len(made)}"
    monkeypatch.setattr(matrix.Matrix, "twins", None)
    monkeypatch.setattr(
        matrix.Matrix, "_copy", lambda m, parent, *rows: m._carry(parent, *rows[:2], Totals(), rows[2])
    )
    for name, whole in made.items():
        growth = plan.tensor(name)
        assert torch.equal(growth.weight(_parent(plan.shapes[plan.source_name(name)], dtype)), whole), name


def test_pieces_made_at_once_are_no_part_of_the_definition(monkeypatch):
    """Neither those of the arithmetic, nor those of the draws, nor threads."""
    plans = [plan_growth(tiny_config(family), width=1.5, width_operator=operator) for family, operator in
             (("llama", "perturbed_copy"), ("gpt2", "reference_slice"), ("gpt2", "perturbed_copy"))]  # fmt: skip

    def made() -> list[Tensor]:
        return [
            plan.tensor(name).weight(_parent(plan.shapes[plan.source_name(name)], torch.float32))
            for plan in plans
            for name in plan.names
        ]

    usual = made()
    monkeypatch.setattr(matrix, "CHUNK", 777)
    monkeypatch.setattr(random, "CHUNK", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(a, b) for a, b in zip(usual, made(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_blocks_may_be_made_by_threads_side_by_side():
    plan = plan_growth(tiny_config("llama"), width=2, width_operator="perturbed_copy")
    growth = plan.tensor("model.layers.0.mlp.down_proj.weight")
    tensor = _parent(tuple(m.n for m in growth.maps), torch.float32)
    rows, totals = growth.matrix_shape[0], growth.totals(lambda a, b: tensor[a:b])
    out = torch.empty(growth.shape)

    def work(first: int) -> None:
        for low in range(first, rows, 16):
            growth.weight_rows(lambda a, b: tensor[a:b], low, low + 8, totals, out[low : low + 8])

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(out, growth.weight(tensor))


@pytest.mark.parametrize("operator", ["perturbed_copy", "reference_slice"])
def test_only_rows_that_are_needed_are_read(operator):
    plan = plan_growth(tiny_config("llama"), width=2, width_operator=operator)
    for name in plan.names:
        growth, reads = plan.tensor(name), []
        tensor = _parent(plan.shapes[plan.source_name(name)], torch.float32)
        _joined(growth, tensor, 4, reads)
        most = 4 * max(1, -(-growth.matrix_shape[0] // 4))
        assert sum(reads) <= most and max(reads) <= 4, name


def _growth(maps: tuple[SpaceMap, ...], roles: tuple[str, ...], noise: float = 0.2, **other) -> TensorGrowth:
    layout = TensorLayout((None,) * len(maps), roles, other.pop("offset", 0.0))
    return TensorGrowth(layout, maps, "w", 3, noise, None, lambda a, b: torch.zeros(b - a, maps[-1].m), **other)


def _copies(n: int, m: int, kind: str = "rms_normed") -> SpaceMap:
    return copy_map(n, m, kind, even)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("maps", "roles"),
    [
        ((), ()),
        ((_copies(30, 75),), ("write",)),
        ((_copies(30, 70), _copies(30, 70)), ("write", "read")),
        ((_copies(30, 75), _copies(20, 50)), ("read", "write")),
        ((_copies(3, 5, "elementwise"), _copies(30, 45), _copies(4, 8)), ("write", "read", "write")),
        ((_copies(3, 6), _copies(10, 20), _copies(8, 20)), ("write", "write", "read")),
        ((_copies(3, 6), _copies(10, 15, "layer_normed"), _copies(8, 20)), ("write", "write", "read")),
        ((_copies(10, 15, "layer_normed"), _copies(8, 20)), ("write", "read")),
        ((_copies(10, 15), _copies(8, 20, "layer_normed")), ("read", "write")),
        ((SpaceMap.kronecker([_copies(40, 60), _copies(2, 3)]), _copies(8, 16)), ("write", "read")),
        ((_copies(8, 16), SpaceMap.kronecker([_copies(40, 60), _copies(2, 3)])), ("write", "read")),
        ((SpaceMap.kronecker([_copies(40, 60), _copies(2, 3)]), _copies(8, 16)), ("read", "write")),
    ],
)
def test_rows_of_any_form_pull_back_to_the_parent(maps, roles, dtype):
    """Readers undo what writers did, noise and all: `W_in` on the axes that read, and `R` on those that write."""
    growth = _growth(maps, roles)
    tensor = _parent(tuple(m.n for m in maps), dtype)
    whole = growth.weight(tensor)
    for step in (1, 5, 1000):
        assert torch.equal(_joined(growth, tensor, step), whole)
    pulled = whole.double()
    for axis, (axis_map, role) in enumerate(zip(maps, roles, strict=True)):
        pulled = axis_map.pull(pulled, axis, "read" if role == "write" else "write")
    eps = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 5e-2}[dtype]
    assert (pulled - tensor.double()).abs().max() <= eps * tensor.double().abs().max()


@pytest.mark.parametrize("copies", [(2, 2, 2), (3, 1, 2), (5, 4, 0)])
def test_noise_is_that_of_projected_normal_numbers(copies):
    """The covariance of each set of copies is that of `I - w w^T / |w|^2`, and across sets there is none."""
    source = torch.cat([torch.full((c,), k) for k, c in enumerate(copies)] + [torch.tensor([-1])])
    source = source[torch.randperm(len(source), generator=torch.Generator().manual_seed(0))]
    write = torch.rand(len(source), generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    pairing = Pairing(source, write, 3)
    basis = torch.zeros(len(source), pairing.draws, dtype=torch.float64)
    for index, factor in pairing.terms:
        basis[torch.arange(len(source))[index >= 0], index[index >= 0]] += factor[index >= 0]
    expected = torch.zeros(len(source), len(source), dtype=torch.float64)
    for k in range(3):
        w = torch.where(source == k, write, 0.0)
        if (source == k).any():
            expected += torch.diag((source == k).double()) - torch.outer(w, w) / w.square().sum()
    assert pairing.draws == sum(max(c - 1, 0) for c in copies)
    assert torch.allclose(basis @ basis.T, expected, atol=1e-12)


def test_noise_of_a_pair_is_the_same_number_with_both_signs():
    growth = _growth((_copies(64, 128), _copies(64, 128)), ("write", "read"))
    tensor = torch.zeros(64, 64)
    tensor[0] = 8.0
    grown = growth.weight(tensor)
    first, second = grown[1:64, :64], grown[1:64, 64:]
    assert torch.equal(first, -second) and first.unique().numel() > 3000
    # 0.2 of the root mean square of the grown weight (1/8 of its entries are 4), halved by projection of the variance.
    assert float(first.std()) == pytest.approx(0.2 * 4 * 64**-0.5 * 0.5**0.5, rel=0.03)


@pytest.mark.parametrize("operator", ["perturbed_copy", "exact_copy"])
def test_copies_and_powers_of_two_are_exact_and_the_rest_is_rounded_once(operator):
    growth = plan_growth(tiny_config("llama"), width=2, width_operator=operator)
    growth = growth.tensor("model.layers.0.mlp.up_proj.weight")
    tensor = _parent((96, 64), torch.bfloat16)
    in_float64 = growth.weight(tensor.double())
    assert torch.allclose(growth.weight(tensor).double(), in_float64, rtol=2**-8, atol=1e-6)
    if operator == "exact_copy":
        assert torch.equal(growth.weight(tensor).double(), in_float64)


def test_the_size_of_noise_counts_each_entry_as_often_as_it_is_carried():
    maps = _copies(300, 450), _copies(200, 500)
    tensor = _parent((300, 200), torch.float64)
    carried = _growth(maps, ("write", "read"), noise=0.0).weight(tensor)
    totals = _growth(maps, ("write", "read"), noise=0.3).totals(lambda a, b: tensor[a:b])
    assert totals.noise == pytest.approx(0.3 * float(carried.square().mean().sqrt()), rel=1e-12)


@pytest.mark.parametrize("draw", [random.normal, random.noise, random.uniform])
def test_rows_of_draws_are_those_of_the_whole(draw):
    shape = (300, 7, 129)
    whole = draw(shape, 5, "s", "n")
    for low, high in ((0, 1), (13, 170), (299, 300), (4, 4)):
        assert torch.equal(draw(shape, 5, "s", "n", (low, high)), whole[low:high])


@pytest.mark.parametrize("draw", [random.normal, random.noise, random.uniform])
def test_draws_are_the_same_where_float32_means_float64(draw):
    usual = draw((5, 7), 0, "s", "n")
    with true_float64():
        assert torch.equal(draw((5, 7), 0, "s", "n").double(), usual.double())


def test_normal_numbers_are_normal():
    """Four standard errors of the first four moments, of the correlation of neighbours, and of the share beyond 3."""
    values = random.normal((1 << 20,), 0, "s", "n").double()
    root = len(values) ** 0.5
    assert abs(float(values.mean())) < 4 / root
    assert abs(float(values.square().mean()) - 1) < 4 * 2**0.5 / root
    assert abs(float(values.pow(3).mean())) < 4 * 15**0.5 / root
    assert abs(float(values.pow(4).mean()) - 3) < 4 * 96**0.5 / root
    assert abs(float((values[1:] * values[:-1]).mean())) < 4 / root
    share = 0.0026997960632601866
    assert abs(float((values.abs() > 3).double().mean()) - share) < 4 * share**0.5 / root


def test_noise_is_uniform_of_mean_square_one():
    """As above; the fourth moment of a uniform number of variance one is 9/5, its eighth 9."""
    values = random.noise((1 << 20,), 0, "s", "n").double()
    root = len(values) ** 0.5
    assert abs(float(values.mean())) < 4 / root
    assert abs(float(values.square().mean()) - 1) < 4 * 0.8**0.5 / root
    assert abs(float(values.pow(4).mean()) - 1.8) < 4 * (9 - 1.8**2) ** 0.5 / root
    assert abs(float((values[1:] * values[:-1]).mean())) < 4 / root
    assert float(values.abs().max()) < 3**0.5 + 1e-4 and values.unique().numel() > 65000
    every = torch.arange(-32768, 32768, dtype=torch.float64) * random.NOISE_UNIT
    assert float(every.square().mean()) == pytest.approx(1, abs=1e-14)
    assert torch.allclose(random.noise((999,), 0, "s", "n", scale=0.1).double(), values[:999] * 0.1, rtol=1e-6)


def test_the_size_of_noise_in_large_tensors_is_taken_over_a_sample():
    """Evenly spread: rows that grow in size from the first to the last are seen in proportion."""
    maps = _copies(6000, 9000), _copies(1000, 2000)
    tensor = _parent((6000, 1000), torch.float32) * torch.linspace(0.5, 1.5, 6000)[:, None]
    seen = []

    def read(start: int, stop: int) -> Tensor:
        seen.append(stop - start)
        return tensor[start:stop]

    totals = _growth(maps, ("write", "read"), noise=0.3).totals(read)
    carried = _growth(maps, ("write", "read"), noise=0.0).weight(tensor)
    assert matrix.SAMPLE / 1000 <= sum(seen) < 1.1 * matrix.SAMPLE / 1000 + matrix.SAMPLED_RUNS
    assert totals.noise == pytest.approx(0.3 * float(carried.double().square().mean().sqrt()), rel=0.01)


def test_recipes_make_rows_of_padding_and_of_scattered_parts():
    embedding = Recipe((50, 8), [Step("normal_", (0.0, 0.5)), Step("zero_", (), ((8,), (1,), 24))])
    scattered = Recipe((50, 8), [Step("zeros", ()), Step("normal_", (), ((50, 4), (8, 1), 2))])
    truncated = Recipe((5000, 8), [Step("uniform_", (-0.9, 0.9)), Step("erfinv_", ()), Step("mul_", (1.5,))])
    assert embedding.by_rows and truncated.by_rows and not scattered.by_rows
    for recipe in (embedding, scattered, truncated):
        whole = recipe.make(1, "w")
        for low, high in ((0, 3), (3, 4), (2, 50), (17, 49)):
            assert torch.equal(recipe.rows(1, "w", low, high), whole[low:high])
    assert not embedding.make(1, "w")[3].any() and embedding.make(1, "w")[2].all()


def test_experts_are_made_row_by_row():
    config = tiny_config("mixtral")
    growth = plan_growth(config, width=2).tensor("model.layers.0.mlp.experts.gate_up_proj")
    assert growth.by_rows and growth.matrix_shape == (4 * 2 * 192, 128)
