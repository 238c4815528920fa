"""Continuing the data where the parent stopped: its passes over the data, from its place in them, in its order.

A run that was seeded as its parent was would draw the parent's first batches once more. `ContinuedSampler` starts inside
the pass that the parent was in. Its k-th pass is what remains of the parent's pass e + k, followed by the beginning of
pass e + k + 1, so that each has the data's full length, as `Trainer`'s count of steps and its skipping on resume expect.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from torch.utils.data import IterableDataset, Sampler

from ..errors import StateError

DATA_POLICIES = ("restart", "continue")


class ContinuedSampler(Sampler[int]):
    """Another sampler's passes, from a place inside one of them.

    Args:
        base: gives the order of pass k after `set_epoch(k)`, or the same order in every pass.
        passes: whole passes that the parent made. offset: examples that it took of the next.
    """

    def __init__(self, base: Sampler[int], passes: int, offset: int):
        self.base, self.passes, self.offset = base, passes, offset
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass: `Trainer` counts from 0."""
        self.epoch = epoch

    def _order(self, number: int) -> Iterator[int]:
        if hasattr(self.base, "set_epoch"):
            self.base.set_epoch(number)
        return iter(list(self.base))

    def __iter__(self) -> Iterator[int]:
        number = self.passes + self.epoch
        rest = islice(self._order(number), self.offset, None)
        yield from chain(list(rest), islice(self._order(number + 1), self.offset))

    def __len__(self) -> int:
        return len(self.base)  # type: ignore[arg-type]


class SkippedOnce(IterableDataset):
    """A stream whose first pass begins after some examples; later passes are whole.

    Args:
        stream: a `datasets.IterableDataset`, or another with `skip`. examples: how many to skip.
    """

    def __init__(self, stream: Any, examples: int):
        self.stream, self.examples, self.epoch = stream, examples, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass: `Trainer` counts from 0."""
        self.epoch = epoch
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        if self.epoch:
            yield from self.stream
            return
        left = False
        for example in self.stream.skip(self.examples):
            left = True
            yield example
        if not left:
            raise StateError(
                f"The stream ends within the {self.examples} examples that the parent saw, so that its place in a later pass "
                "is not known. Pass data_policy='restart'."
            )


def add_places(one: tuple[int, int], other: Sequence[int], examples: int) -> tuple[int, int]:
    """Passes and examples of two runs, one after the other, over data of a length."""
    passes, offset = divmod(one[1] + other[1], max(1, examples))
    return one[0] + other[0] + passes, offset


def place_in_data(
    trainer_state: Mapping[str, Any], examples: int, processes: int = 1, drop_last: bool = False
) -> tuple[int, int]:
    """Whole passes and examples of the next that a run took, by its `trainer_state.json`.

    A pass is a whole number of batches, the last of which may be short, so that its share of the batches is not its share
    of the examples.

    Args:
        trainer_state: with `epoch`, passes as a fraction, and `train_batch_size`, examples per device and step.
        examples: length of its training data.
        processes: of this run; the parent's are taken to be as many, or one, whichever fits its fraction.
        drop_last: whether a last short batch was left out, as it is in this run.

    Raises:
        StateError: the state says neither.
    """
    if trainer_state.get("epoch") is None:
        raise StateError(
            "data_policy='continue' needs the parent's place in its data, and its checkpoint's trainer_state.json has no "
            "epoch. Pass data_policy='restart'."
        )
    passes = math.floor(trainer_state["epoch"] + 1e-9)
    share = trainer_state["epoch"] - passes
    for devices in (processes, 1):
        batch = int(trainer_state.get("train_batch_size") or 0) * devices
        whole = math.floor if drop_last else math.ceil
        batches = share * whole(examples / batch) if batch else 0.5
        if abs(batches - round(batches)) < 1e-6:
            return passes, min(examples, round(batches) * batch)
    return passes, min(examples, round(share * examples))


def samples_seen(trainer_state: Mapping[str, Any], accumulation: int, processes: int) -> int:
    """Examples of a stream that a run took, if it accumulated gradients and was distributed as this one is.

    Raises:
        StateError: the state has no batch size.
    """
    batch = trainer_state.get("train_batch_size")
    if not batch:
        raise StateError(
            "data_policy='continue' on a stream needs the parent's batch size, and its checkpoint's trainer_state.json has "
            "none. Skip what it saw yourself (dataset.skip) and pass data_policy='restart'."
        )
    return int(trainer_state["global_step"]) * int(batch) * accumulation * processes
