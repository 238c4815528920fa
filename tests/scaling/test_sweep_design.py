"""Points, texts and proxies of sweeps: what is tried, on what, and which requests are refused before anything is trained."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from datasets import Dataset

from hf_warmstart import WarmstartError
from hf_warmstart.scaling.sweeps import SweepConfig
from hf_warmstart.scaling.sweeps.design import (
    Limits,
    Point,
    best_point,
    first_centre,
    first_points,
    further_points,
    moved_centre,
    on_edge,
)
from hf_warmstart.scaling.sweeps.plan import plan_sweep
from hf_warmstart.scaling.sweeps.text import check_texts, read_blocks
from hf_warmstart.scaling.tables.compute import count_parameters
from tests.models import tiny_config
from tests.scaling.sweep_inputs import LENGTH, arguments, target

ASKED = SweepConfig()


def bowl(at: Point, width: float = 0.02):
    """A loss that is quadratic in the logarithms of both settings."""
    return lambda p: (
        2
        + width
        * (math.log2(p.learning_rate / at.learning_rate) ** 2 + math.log2(p.batch_sequences / at.batch_sequences) ** 2)
    )


def search(loss, centre: Point, limits: Limits, asked: SweepConfig = ASKED) -> dict[Point, float]:
    tried = {p: loss(p) for p in first_points(centre, limits, asked)}
    for _ in range(asked.refinements):
        more = further_points(tried, limits, asked)
        tried |= {p: loss(p) for p in more}
        if not more:
            break
    return tried


def test_the_first_design_is_a_grid_of_powers_round_its_centre_which_comes_first():
    points = first_points(Point(0.0095, 9), Limits(1000), ASKED)
    assert points[0] == Point(2**-7, 8)
    assert {p.learning_rate for p in points} == {2.0**k for k in range(-9, -4)}
    assert {p.batch_sequences for p in points} == {4, 8, 16, 32}
    assert len(points) == 20


def test_the_first_design_keeps_within_what_a_budget_admits():
    points = first_points(Point(0.01, 64), Limits(20), ASKED)
    assert {p.batch_sequences for p in points} == {2, 4, 8, 16}
    assert {p.batch_sequences for p in first_points(Point(0.01, 64), Limits(3), ASKED)} == {1, 2}
    assert max(p.learning_rate for p in first_points(Point(0.9, 4), Limits(20), ASKED)) == 1.0


def test_a_space_filling_design_covers_the_region_of_the_grid():
    asked = SweepConfig(design="space_filling")
    points = first_points(Point(2**-7, 8), Limits(1000), asked)
    assert points[0] == Point(pytest.approx(2**-7, rel=0.2), 10) and 16 <= len(points) <= 20
    assert all(type(p.learning_rate) is float for p in points)
    assert len({p.learning_rate for p in points}) > 12
    assert all(2**-9 <= p.learning_rate <= 2**-5 and 4 <= p.batch_sequences <= 32 for p in points)


@pytest.mark.parametrize("design", ["grid", "space_filling"])
def test_points_are_added_until_the_optimum_lies_within(design):
    asked, best = SweepConfig(design=design), Point(2**-4, 128)
    tried = search(bowl(best), Point(2**-7, 8), Limits(1000), asked)
    found = best_point(tried)
    assert found is not None and bowl(best)(found) - 2 < 0.02
    assert on_edge(tried, asked) == [] and len(tried) < 40
    within = search(bowl(Point(2**-7, 16)), Point(2**-7, 8), Limits(1000), SweepConfig())
    assert len(within) == 20, "an optimum that lies within needs no further points"


def test_an_optimum_that_no_point_may_lie_beyond_is_on_the_edge():
    tried = search(bowl(Point(2**-7, 512)), Point(2**-7, 8), Limits(16), ASKED)
    assert on_edge(tried, ASKED) == ["batch_tokens"]
    assert best_point({Point(0.1, 1): math.inf}) is None
    assert further_points({Point(0.1, 1): math.inf}, Limits(16), ASKED) == []


def test_centres_follow_the_laws_of_deepseek():
    # arXiv 2401.02954: the released 7B model of 2T tokens was trained with 4.2e-4 and 2304 sequences of 4096 tokens;
    # its non-embedding FLOPs are those of C = M D, M = 4.3e10.
    centre = first_centre(4.3e10 * 2e12, 4096, ASKED)
    assert centre.learning_rate == pytest.approx(4.2e-4, rel=0.03)
    assert centre.batch_sequences == pytest.approx(2304, rel=0.05)
    moved = moved_centre(Point(0.01, 100), 36)
    assert moved.learning_rate == pytest.approx(0.01 * 36**-0.125) and moved.batch_sequences == 323
    asked = SweepConfig(learning_rate=0.02, batch_tokens=640)
    assert first_centre(1e12, 32, asked) == Point(0.02, 20)


# -- text -------------------------------------------------------------------------------------------------------------


def test_a_stream_passes_over_all_blocks_in_a_new_order_each_time():
    blocks = read_blocks(torch.arange(40), "train_dataset", 4, 40, None)
    assert blocks.count == 10 and blocks.text_bytes is None
    stream = blocks.rows(0, 30, seed=3)
    passes = stream[:, 0].reshape(3, 10)
    assert all(sorted(p.tolist()) == list(range(0, 40, 4)) for p in passes)
    assert len({tuple(p.tolist()) for p in passes}) == 3
    assert torch.equal(blocks.rows(7, 23, seed=3), stream[7:23]) and not torch.equal(
        blocks.rows(0, 10, 4), stream[:10]
    )


class Bytes:
    """A tokenizer of bytes."""

    eos_token_id = 0

    def __call__(self, texts, **options):
        return {"input_ids": [list(t.encode()) for t in texts]}


def test_text_comes_from_files_and_datasets(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("three")
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    blocks = read_blocks(files, "train_dataset", 3, 256, Bytes())
    assert bytes(blocks.tokens.flatten().tolist()) == b"one\ntwo\nthre" and blocks.text_bytes == 12
    rows = Dataset.from_dict({"text": ["ab", "cd"]})
    assert bytes(read_blocks(rows, "x", 6, 256, Bytes()).tokens[0].tolist()) == b"ab\0cd\0"
    ids = Dataset.from_dict({"input_ids": [[1, 2, 3], [4]]})
    assert read_blocks(ids, "x", 2, 5, None).tokens.tolist() == [[1, 2], [3, 4]]
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    bad = {
        "no such files: .*missing.txt": {"source": [tmp_path / "missing.txt"], "tokenizer": Bytes()},
        "not text in UTF-8": {"source": tmp_path / "c.txt", "tokenizer": Bytes()},
        "brings no tokenizer": {"source": tmp_path / "a.txt", "tokenizer": None},
        "columns \\['words'\\]": {"source": Dataset.from_dict({"words": ["a"]}), "tokenizer": Bytes()},
        "must be files of text": {"source": 7, "tokenizer": None},
        "ids are integers": {"source": torch.rand(9), "tokenizer": None},
        "holds the token 300, and the target has 256": {"source": torch.tensor([300] * 9), "tokenizer": None},
        "has 2 tokens, less than one sequence of 3": {"source": torch.tensor([1, 2]), "tokenizer": None},
    }
    for words, how in bad.items():
        with pytest.raises(WarmstartError, match=words):
            read_blocks(what="train_dataset", sequence_length=3, vocabulary=256, **how)


def test_held_out_text_must_be_held_out_and_long_enough(caplog):
    train = read_blocks(torch.arange(200), "train_dataset", 4, 200, None)
    with pytest.raises(WarmstartError, match="8 of the 8 sequences of eval_dataset stand in train_dataset"):
        check_texts(train, train.first(8), 10)
    other = read_blocks(torch.arange(2, 35), "eval_dataset", 4, 200, None)
    check_texts(train, other, 200)
    with pytest.raises(WarmstartError, match="has 7 sequences, and fewer than 8"):
        check_texts(train, other.first(7), 10)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        check_texts(train, other, 250)
    assert "passes 5.0 times over train_dataset" in caplog.text


# -- plans ------------------------------------------------------------------------------------------------------------


def plan(config=None, **changes):
    given = arguments(None, **changes)
    del given["output_dir"]
    return plan_sweep(config or target(), **given)


def test_proxies_are_of_the_targets_family_on_one_path_of_tokens_per_parameter():
    planned = plan()
    assert [p.params for p in planned.proxies] == sorted(p.params for p in planned.proxies)
    for proxy, wanted in zip(planned.proxies, (1300, 2400, 4500), strict=True):
        assert type(proxy.config) is type(target()) and proxy.config.head_dim == 8
        assert proxy.params == count_parameters(proxy.config).non_embedding
        assert proxy.params == pytest.approx(wanted, rel=0.1)
        assert proxy.tokens[0] / proxy.params == pytest.approx(1.5, abs=(LENGTH / 2 + 1e-6) / proxy.params)
    assert planned.target_params == count_parameters(target()).non_embedding


def test_by_default_four_proxies_span_a_decade_and_a_half_of_compute():
    big = target(
        hidden_size=128, intermediate_size=352, num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=8
    )
    proxies = plan(big, proxies=None, tokens_per_parameter=20).proxies
    assert len(proxies) == 4
    span = math.log10(proxies[-1].params * proxies[-1].tokens[0] / proxies[0].params / proxies[0].tokens[0])
    assert span == pytest.approx(1.5, abs=0.25)
    assert proxies[-1].params < 0.4 * count_parameters(big).non_embedding


def test_the_cost_is_a_share_of_the_grid_on_the_target():
    planned = plan()
    cost = planned.cost
    assert cost.grid_flops == pytest.approx(50 * 200_000 * 6 * (planned.target_params + 16 * 32 + 2 * 2 * 32 * LENGTH))
    assert [b.runs for b in cost.budgets] == [6, 6, 6]
    assert 0 < cost.share == cost.most_share < 1
    refined = plan(refinements=2).cost
    assert refined.share == cost.share and refined.most_share > cost.share
    assert plan(tokens=400_000).cost.share == pytest.approx(cost.share / 2)
    assert f"{cost.share:.1%} of 25 points and 2 seeds" in str(planned)


def test_what_cannot_be_swept_is_refused():
    bad = {
        "too few: two numbers": {"proxies": [1300, 2400]},
        "smaller than the target.*1,000,000": {"proxies": [1300, 2400, 1_000_000]},
        "no proxies near 50 ": {"proxies": [50, 1300, 2400]},
        "names a size twice": {"proxies": [1300, 1300, 2400]},
        "these proxies see fewer: .*parameters": {"min_steps": 1000},
        "longer than the 16 positions": {"sequence_length": 17},
        "an integer of at least 2": {"sequence_length": 1},
        "tokens=nan": {"tokens": math.nan},
        "A sweep has no options \\['lr'\\]": {"lr": 1e-3},
        "not both: .*proxies": {"sweep_config": SweepConfig()},
        "tokenizer": {"train_dataset": __file__},
    }
    for words, changes in bad.items():
        with pytest.raises(WarmstartError, match=words):
            plan(**changes)
    with pytest.raises(WarmstartError, match="none for causal language modelling"):
        plan(tiny_config("t5", num_layers=2, num_decoder_layers=2))
    with pytest.raises(WarmstartError, match="no proxies near"):
        plan(target(hidden_size=8, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1), proxies=None)


def test_all_faulty_options_are_named_at_once():
    with pytest.raises(WarmstartError) as fault:
        SweepConfig(budgets=0, decay=1.0, stop_ratio=1, design="random", seeds=[0, 0], learning_rate=2, adam_beta2=1)
    for name in (
        "budgets=0",
        "decay=1.0",
        "stop_ratio=1",
        "design='random'",
        "seeds=(0, 0)",
        "learning_rate=2",
        "beta2=1",
    ):
        assert name in str(fault.value)
    assert SweepConfig(tokens_per_parameter=[20, 10]).paths == ((10.0, 20.0),)


def test_proxies_may_differ_in_their_tokens_per_parameter():
    """Paths follow the size that they were given with, in whatever order; refusals name what is wrong."""
    sizes, ratios = [40_000, 10_000, 20_000], [[1], [8, 4], [2, 4]]
    asked = SweepConfig(proxies=sizes, tokens_per_parameter=ratios)
    assert asked.paths == ((4.0, 8.0), (2.0, 4.0), (1.0,))
    assert asked.to_dict()["tokens_per_parameter"] == ratios
    assert SweepConfig(**asked.to_dict()) == asked
    made = plan(proxies=[4500, 1300, 2400], tokens_per_parameter=[[0.5], [4, 2], [1.5]], min_steps=4)
    for proxy, own in zip(made.proxies, [(2, 4), (1.5,), (0.5,)], strict=True):
        assert proxy.tokens == pytest.approx([r * proxy.params for r in own], abs=made.sequence_length / 2)
    assert made.recipe["warmup_fraction"] == made.asked.warmup
    for wrong, words in (
        ([[1], [2]], "a list of its own for 2 proxies"),
        ([[1], [2], []], "positive numbers"),
        ([[1], [2], 3], "positive numbers"),
        ([[1], [2], [3, 3.0]], "a path twice"),
    ):
        with pytest.raises(WarmstartError, match=words):
            SweepConfig(proxies=sizes, tokens_per_parameter=wrong)
    with pytest.raises(WarmstartError, match="pass as many proxies"):
        SweepConfig(tokens_per_parameter=ratios)
