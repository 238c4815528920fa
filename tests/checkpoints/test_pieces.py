"""Any rows of a tensor that code has put together are made alone, as in the whole."""

from __future__ import annotations

import random

import pytest
import torch

from hf_warmstart.checkpoints.weights.pieces import Source, axis_groups
from hf_warmstart.checkpoints.weights.traced import Trace
from hf_warmstart.errors import UntraceableError

SHAPE = (4, 6, 10)


def numbered(names):
    """Tensors whose entries are all different."""
    size = torch.Size(SHAPE).numel()
    return {name: torch.arange(k * size, (k + 1) * size).reshape(SHAPE) for k, name in enumerate(names)}


def reader(tensors, boxes=None):
    def read(name, box):
        if boxes is not None:
            boxes.append((name, box))
        return tensors[name][tuple(slice(*one) for one in box)]

    return read


def program(tensors, choice: random.Random):
    """Some moves in a row, the same for the same random numbers, whatever the tensors are."""
    (result, *others) = tensors
    for _ in range(choice.randint(1, 5)):
        axis = choice.randrange(result.ndim)
        move = choice.choice(
            ["cat", "stack", "chunk", "select", "unbind", "transpose", "permute", "merge", "rotary", "slice"]
        )
        if move == "cat" and others[0].shape == result.shape:
            result = torch.cat([result, others[0], result], axis)
        elif move == "stack" and result.ndim < 4:
            result = torch.stack([result, result[...]], axis - choice.randint(0, 1))
        elif move == "chunk" and result.shape[axis] > 1:
            result = choice.choice(torch.chunk(result, 2, axis)).contiguous()
        elif move in ("select", "unbind") and result.ndim > 1 and result.shape[axis]:
            k = choice.randrange(result.shape[axis])
            result = result.select(axis, k) if move == "select" else result.unbind(axis)[k]
        elif move == "transpose":
            result = result.transpose(axis, -1)
        elif move == "permute":
            result = result.permute(choice.sample(range(result.ndim), result.ndim))
        elif move == "merge":
            result = result.reshape(*result.shape[:axis], -1, *result.shape[axis + 2 :])
        elif move == "rotary" and result.shape[axis] % 2 == 0:
            halves = (*result.shape[:axis], result.shape[axis] // 2, 2, *result.shape[axis + 1 :])
            result = result.reshape(halves).transpose(axis, axis + 1).reshape(result.shape)
        elif move == "slice":
            result = result.narrow(axis, 0, max(1, result.shape[axis] // 2)).unsqueeze(0).squeeze(0)
    return result


@pytest.mark.parametrize("seed", range(40))
def test_any_box_of_any_program_is_what_the_whole_has_there(seed):
    tensors = numbered("ab")
    trace = Trace()
    expected = program(list(tensors.values()), random.Random(seed))
    made = program([trace.tensor(name, SHAPE, torch.int64) for name in tensors], random.Random(seed)).made
    assert (made.shape, made.dtype) == (tuple(expected.shape), expected.dtype)
    assert torch.equal(made.whole(reader(tensors)), expected)
    choice = random.Random(seed)
    for _ in range(10):
        box = tuple(tuple(sorted(choice.sample(range(size + 1), 2))) for size in made.shape)
        assert torch.equal(made.region(box, reader(tensors)), expected[tuple(slice(*one) for one in box)]), box
    rows = [made.rows(k, k + 1, reader(tensors)) for k in range(made.shape[0])]
    assert torch.equal(torch.cat(rows), expected) and all(one.is_contiguous() for one in rows)


def test_rows_of_stacked_experts_read_rows_of_one_tensor_each():
    tensors = numbered("ab")
    trace = Trace()
    gates, ups = ([trace.tensor(name, SHAPE, torch.int64)[k] for k in range(4)] for name in "ab")
    fused = torch.cat([torch.stack(gates), torch.stack(ups)], 1).made  # (4, 12, 10)
    boxes: list = []
    fused.region(((2, 3), (5, 8), (0, 10)), reader(tensors, boxes))
    assert boxes == [("a", ((2, 3), (5, 6))), ("b", ((2, 3), (0, 2)))]
    assert fused.sources == {"a", "b"} and fused.source is None


def test_rows_of_a_tensor_as_it_is_are_read_as_they_are():
    made = Trace().tensor("a", SHAPE, torch.int64).contiguous().made
    boxes: list = []
    made.rows(1, 3, reader(numbered("a"), boxes))
    made.whole(reader(numbered("a"), boxes))
    assert boxes == [("a", ((1, 3),)), ("a", ())] and made.source == "a"


def test_rows_of_rotary_heads_read_no_more_than_their_heads():
    half = Trace().tensor("a", (12, 5), torch.int64).view(3, 2, 2, 5).transpose(1, 2).reshape(12, 5).made
    boxes: list = []
    tensor = torch.arange(60).reshape(12, 5)
    assert torch.equal(half.rows(5, 7, reader({"a": tensor}, boxes)), tensor[[6, 5]])
    assert boxes == [("a", ((4, 8),))]


def test_scalars_and_tensors_without_entries_are_whole():
    trace = Trace()
    scalar = trace.tensor("a", (), torch.float32).reshape(1).reshape(())
    assert scalar.made.whole(lambda name, box: torch.tensor(3.0)).shape == ()
    nothing = trace.tensor("a", (0, 4), torch.float32).reshape(2, 0, 2)
    assert nothing.made.whole(lambda name, box: torch.empty(0, 4)).shape == (2, 0, 2)


def test_casts_are_made_one_after_another():
    made = Trace().tensor("a", (2,), torch.float64).to(torch.bfloat16).to(torch.float32).made
    value = torch.tensor([1 / 3, 1e-9], dtype=torch.float64)
    assert torch.equal(made.whole(lambda name, box: value), value.bfloat16().float())


def test_computed_values_are_known_as_such():
    tensor = Trace().tensor("a", SHAPE, torch.float32)
    mixed = torch.cat([tensor, tensor.exp()]).transpose(0, 1)
    assert mixed.made.operation == "aten.exp.default" and isinstance(tensor.made, Source)
    assert torch.zeros_like(tensor)[0].fill_(3.0).made.operation == "aten.zeros_like.default"


def test_a_tensor_that_is_given_the_data_of_another_is_that_one():
    trace = Trace()
    bias = torch.nn.Parameter(trace.tensor("a", (3,), torch.float32))
    bias.data = torch.nn.functional.pad(bias.data, (0, 0))
    assert bias.made.source == "a"
    bias.data = trace.tensor("b", (3,), torch.float32)
    assert bias.made.source == "b"
    bias.data = torch.nn.functional.pad(bias.data, (0, 2))
    assert bias.made.operation == "aten.constant_pad_nd.default" and bias.made.shape == (5,)
    with pytest.raises(UntraceableError, match="data"):
        bias.data = torch.zeros(3)


@pytest.mark.parametrize(
    "touch",
    [
        lambda tensor: tensor.zero_(),
        lambda tensor: tensor[0].detach().fill_(1.0),
        lambda tensor: tensor.unfold(0, 2, 1).zero_(),  # a view that is not followed
        lambda tensor: torch.empty(SHAPE).copy_(tensor),
        lambda tensor: torch.equal(tensor, tensor),
        lambda tensor: tensor.sum().item(),
    ],
)
def test_writing_to_known_tensors_and_asking_for_values_is_refused_and_remembered(touch):
    trace = Trace()
    for _ in range(2):
        with pytest.raises(UntraceableError, match="aten"):
            touch(trace.tensor("a", SHAPE, torch.float32))
    assert len(trace.refusals) == 2


def test_groups_of_axes_take_ones_along():
    assert axis_groups((4, 1), (4,)) == [(slice(0, 1), slice(0, 1)), (slice(1, 2), slice(1, 1))]
    assert axis_groups((1, 6), (2, 3)) == [(slice(0, 2), slice(0, 2))]
    assert axis_groups((), (1,)) == [(slice(0, 0), slice(0, 1))]
