"""The optimizer's entry of one parameter, grown piece by piece and rows by rows, for whoever cannot hold it whole.

`grow_entry` makes an entry at once. Here its pieces are described first (shapes and dtypes, no numbers) and their rows
are made when they are asked for, bit for bit the same. What is of a whole tensor, the mean second moment that fills
entries without a source, is taken once.

Two kinds of pieces are no rows of anything: Adafactor's two means, for which the moment that they stand for is made
whole, and moments of a map whose channels hold the mean of all others, for which all of the parent's rows are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import StateError
from .optimizers import cut_mean, grow_factored, reader
from .plan import GrowthPlan
from .state import BORN, NEW, new_entries, rule_of
from .transform import AVERAGED, Kind, TensorGrowth

WORK_BYTES = 4  # of an entry while it is grown


class EntryGrowth:
    """The entry of one of the child's parameters.

    Args:
        plan: the growth. name: the child's name of the parameter.
        entry: that of its source. An entry that reads from disk is asked for `entry.rows(key, start, stop)`, and for
            `entry.described()`.
        state_policy: `"carry"` or `"asymmetric_reset"`.

    Attributes:
        described: the grown entry in its order: tensors of the grown shapes on the meta device, and what has no rows
            (counts) as it is.

    Raises:
        StateError: no rule knows the entry, or the policy does not go with it.
    """

    def __init__(self, plan: GrowthPlan, name: str, entry: Mapping[str, Any], state_policy: str):
        self._plan, self._entry = plan, entry
        self._rule = rule_of(name, entry, state_policy)
        self._shape = plan.target_shapes[name]
        self._name = name
        self._parted = state_policy == "asymmetric_reset"
        self._filled: dict[str, TensorGrowth] = {}
        self._means: dict[str, Tensor] = {}
        self.described: dict[str, Any] = self._describe()

    @cached_property
    def _growth(self) -> TensorGrowth:
        return self._plan.tensor(self._name)  # whose maps are large: not where entries are only described

    def _describe(self) -> dict[str, Any]:
        shape = tuple(self._shape)
        pieces = self._entry.described() if hasattr(self._entry, "described") else self._entry
        described: dict[str, Any] = {}
        for key in self._entry:
            if self._rule.pieces[key] == "scalar":
                value = self._entry[key]
                described[key] = value.clone() if isinstance(value, Tensor) else value
            else:
                grown = self._rule.shape(key, shape, pieces[key])
                described[key] = torch.empty(grown, dtype=pieces[key].dtype, device="meta")
        if self._parted:
            described[NEW] = torch.empty(shape, dtype=torch.bool, device="meta")
            described[BORN] = int(self._entry["step"])
        return described

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows of one grown piece, from one number to another."""
        if key == NEW:
            return new_entries(self._plan, self._growth, (start, stop))
        kind = self._rule.pieces[key]
        if kind in ("row", "column"):
            return self._factored(key)[start:stop].clone()
        read = reader(self._entry, key)
        if kind == "second_moment" and key not in self._filled:
            self._filled[key] = self._growth.with_filling(read)
        grown = self._filled.get(key, self._growth).moment_rows(read, cast(Kind, kind), start, stop)
        if self._parted:
            grown.masked_fill_(new_entries(self._plan, self._growth, (start, stop)).to(grown.device), 0.0)
        return grown

    def blocks(self, key: str, max_block_bytes: int, rows: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """A grown piece, or some of its rows, in blocks of rows one after the other.

        Args:
            max_block_bytes: the most that a block takes while it is grown; one row may take more.
        """
        piece = self.described[key]
        if piece.ndim == 0:
            yield self._whole(key)
            return
        start, stop = rows or (0, piece.shape[0])
        step = self._rows_at_once(key, max_block_bytes)
        for low in range(start, stop, step):
            yield self.rows(key, low, min(low + step, stop))

    def piece(self, key: str, max_block_bytes: int, rows: tuple[int, int] | None = None) -> Tensor:
        """A grown piece, or some of its rows, made in blocks so that only the result is ever whole."""
        described = self.described[key]
        start, stop = rows or (0, len(described) if described.ndim else 0)
        if described.ndim == 0 or start == stop:
            return self._whole(key) if described.ndim == 0 else self.rows(key, start, stop)
        made = torch.empty((stop - start, *described.shape[1:]), dtype=described.dtype)
        done = 0
        for block in self.blocks(key, max_block_bytes, (start, stop)):
            made[done : done + len(block)] = block
            done += len(block)
        return made

    def refuse_if_cut(self) -> None:
        """Raise `StateError` where the entry's rows cannot lie on different processes."""
        for key in self.described:
            if self._rule.pieces.get(key) in ("row", "column"):
                raise StateError(cut_mean(self._name, key))

    def memory(self, max_block_bytes: int) -> int:
        """About the most bytes that are held at once while the entry is grown in blocks: of the parent's rows that a block
        comes from, of the same grown along one axis and along the next, and of the result."""
        most = 0
        for key, piece in self.described.items():
            if isinstance(piece, Tensor) and piece.is_meta:
                rows = self._rows_at_once(key, max_block_bytes)
                most = max(most, min(rows, piece.shape[0]) * _row_bytes(self._shape) if piece.ndim else 0)
        return 4 * most + 12 * AVERAGED

    def _rows_at_once(self, key: str, max_block_bytes: int) -> int:
        kind = self._rule.pieces.get(key)
        if kind in ("row", "column") or kind in ("first_moment", "update") and self._growth.takes_all_rows(kind):
            return max(1, self._shape[0])
        return max(1, max_block_bytes // max(1, _row_bytes(self._shape)))

    def _whole(self, key: str) -> Tensor:
        """A piece of a parameter without axes."""
        if key == NEW:
            return new_entries(self._plan, self._growth)
        grown = self._growth.grow(self._entry[key], cast(Kind, self._rule.pieces[key]))
        return grown.masked_fill(new_entries(self._plan, self._growth), 0.0) if self._parted else grown

    def _factored(self, key: str) -> Tensor:
        if not self._means:
            keys = [
                next(key for key, kind in self._rule.pieces.items() if kind == wanted) for wanted in ("row", "column")
            ]
            self._means = dict(zip(keys, grow_factored(self._growth, *(self._entry[k] for k in keys)), strict=True))
        return self._means[key]


def _row_bytes(shape: Sequence[int]) -> int:
    """Of a row while it is grown."""
    return WORK_BYTES * math.prod(shape[1:])
