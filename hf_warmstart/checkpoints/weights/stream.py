"""Weights grown from files to files: some rows are read, mapped, written and let go.

    a tensor of the child's files  <- file_view -  the child's tensors  <- maps -  the parent's  <- loaded_view -  its files

Nothing is instantiated beyond the meta device. Several threads make blocks of rows, a few ahead of the one place where they
are written in the files' order; the sink writes, hashes and syncs behind it. Every number depends on its own rows and on what
`TensorGrowth.totals` takes from the whole parent's tensor, so the bytes do not depend on threads or on the size of a block.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...growth.matrix import Totals
from ...growth.plan import GrowthPlan
from ...growth.transform import TensorGrowth, matrix_shape
from ..safetensors.sink import SafetensorsSink, Shard
from ..safetensors.source import SafetensorsSource
from ..safetensors.write_behind import Block
from .pieces import Assembled, Box, Reader

Made = TypeVar("Made")
READ_AHEAD = 3  # tensors that the system reads while others are made
REMEMBERED = 32  # tensors whose maps are kept: more than are under way at once


class ParentWeights:
    """The parent's tensors as they are in memory, read from its files.

    Args:
        source: the files. view: the tensors in memory, made of those in files (`loaded_view`).
    """

    def __init__(self, source: SafetensorsSource, view: Mapping[str, Assembled]):
        self._source, self._view = source, view
        self._stopped = False

    @contextmanager
    def needed(self) -> Iterator[None]:
        """Context whose faults end a digest that is under way, so that nobody waits for it."""
        try:
            yield
        except BaseException:
            self._stopped = True
            raise

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of each tensor in memory."""
        return {name: assembled.dtype for name, assembled in self._view.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor's matrix form, of shape (stop - start, columns)."""
        return matrix_rows(self._view[name], start, stop, self._read)

    def will_need(self, name: str) -> None:
        """Have what a tensor is made of read ahead."""
        for source in self._view[name].sources:
            self._source.will_need(source)

    def read_into(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """The same rows into memory of their shape and dtype: without a copy, where they lie so in a file."""
        tensor = self._view[name]
        if tensor.source is None:
            out.copy_(self.rows(name, start, stop))
            return
        columns = matrix_shape(tensor.shape)[1]
        self._source.read_entries(tensor.source, start * columns, stop * columns, out=out.view(-1))

    def _read(self, name: str, box: Box) -> Tensor:
        """A box of a tensor in the files, by way of its rows."""
        shape = self._source.tensors[name].shape
        if not box:
            return self._source.read_rows(name)
        # Leading axes of one entry are walked down to, so that rows of one expert are read alone.
        deep = next((k for k, (a, b) in enumerate(box) if b - a != 1), len(box) - 1)
        inner = math.prod(shape[deep + 1 :])
        at = 0
        for (first, _), size in zip(box[:deep], shape[:deep], strict=True):
            at = at * size + first
        (first, last), size = box[deep], shape[deep]
        entries = self._source.read_entries(name, (at * size + first) * inner, (at * size + last) * inner)
        rest = tuple(slice(a, b) for a, b in box[deep + 1 :])
        found = entries.view(*[1] * deep, last - first, *shape[deep + 1 :])
        return found[(slice(None),) * (deep + 1) + rest]

    def digest(self, block_bytes: int) -> str:
        """sha256 over names and bytes of all tensors: that of `growth.source.digest` for the loaded model."""
        total = hashlib.sha256()
        memory = torch.empty(block_bytes, dtype=torch.uint8)
        for name in sorted(self._view):
            assembled = self._view[name]
            columns = matrix_shape(assembled.shape)[1]
            total.update(f"{name} {assembled.dtype} {tuple(assembled.shape)}\n".encode())
            for start, stop in blocks_of(assembled, block_bytes):
                if self._stopped:
                    raise CheckpointError("The parent's digest was given up.")
                nbytes = (stop - start) * columns * assembled.dtype.itemsize
                if nbytes > len(memory):
                    memory = torch.empty(nbytes, dtype=torch.uint8)
                rows = memory[:nbytes].view(assembled.dtype).view(stop - start, columns)
                self.read_into(name, start, stop, rows)
                total.update(memory[:nbytes].numpy().data)
        return total.hexdigest()


class GrownWeights:
    """The child's tensors, any box of them made when it is asked for."""

    def __init__(self, plan: GrowthPlan, parent: ParentWeights):
        self._plan, self._parent = plan, parent
        self._growths: OrderedDict[str, tuple[TensorGrowth, Future[Totals]]] = OrderedDict()  # the last ones asked for
        self._lock = Lock()

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of each of the child's tensors."""
        of_parent = self._parent.dtypes
        return {name: of_parent[self._plan.source_name(name)] for name in self._plan.names}

    def rows(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Rows of a tensor's matrix form, into memory of their shape and dtype."""
        growth, totals = self._growth(name)
        source = self._plan.source_name(name)
        if growth.is_copy:
            self._parent.read_into(source, start, stop, out)
        else:
            growth.weight_rows(partial(self._parent.rows, source), start, stop, totals, out)

    def region(self, name: str, box: Box) -> Tensor:
        """A box of a tensor; trailing axes that the box leaves out are whole."""
        growth, totals = self._growth(name)
        shape = growth.shape
        read = partial(self._parent.rows, self._plan.source_name(name))
        start, stop, cover, cuts = rows_of_box(shape, box)
        rows = growth.weight_rows(read, start, stop, totals)
        return rows.reshape(cover)[cuts]

    def prepare(self, names: Iterable[str]) -> None:
        """Take from the parent's whole tensors what blocks of these will need."""
        for name in names:
            self._growth(name)

    def will_need(self, names: Iterable[str]) -> None:
        """Have what these are made of read ahead."""
        for name in names:
            self._parent.will_need(self._plan.source_name(name))

    def largest_piece(self) -> int:
        """Bytes of the largest row, or of the largest tensor that is not made by rows."""
        sizes = [0]
        dtypes = self.dtypes()
        for name in self._plan.names:
            growth = self._plan.tensor(name)
            rows, columns = growth.matrix_shape
            sizes.append(columns * (1 if growth.by_rows else rows) * dtypes[name].itemsize)
        return max(sizes)

    def _growth(self, name: str) -> tuple[TensorGrowth, Totals]:
        """How a tensor grows, and what its rows take from the whole parent's tensor: by the first thread that asks."""
        with self._lock:
            known = self._growths.get(name)
            if known is None:
                mine = self._growths[name] = self._plan.tensor(name), Future()
                if len(self._growths) > REMEMBERED:
                    self._growths.popitem(last=False)
            else:
                self._growths.move_to_end(name)
        if known is not None:
            return known[0], known[1].result()
        growth, totals = mine
        try:
            totals.set_result(growth.totals(partial(self._parent.rows, self._plan.source_name(name))))
        except BaseException as error:
            totals.set_exception(error)
        return growth, totals.result()


def stream_weights(
    grown: GrownWeights,
    files: Mapping[str, Assembled],
    sink: SafetensorsSink,
    *,
    threads: int,
    block_bytes: int,
    window: int,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write every shard that is not done.

    Args:
        files: the tensors of the files over those in memory (`file_view`).
        threads: make blocks at the same time. block_bytes: of a block, at least one row. window: blocks begun ahead.
        progress: called with the number of bytes that were written since the last call.

    Raises:
        CheckpointError: something could not be read or written.
    """
    todo = [shard for shard in sink.shards if not shard.done]

    def made_of(shard: Shard, name: str, start: int, stop: int) -> Block | Tensor:
        """Some rows of a file's tensor: in the memory that they are written from, where they are made as they are."""
        tensor = files[name]
        columns = matrix_shape(tensor.shape)[1]
        each = columns * tensor.dtype.itemsize
        block = shard.block(name, start * each, (stop - start) * each) if tensor.source is not None else None
        if block is None:
            return matrix_rows(tensor, start, stop, grown.region)
        grown.rows(str(tensor.source), start, stop, block.tensor(tensor.dtype, (stop - start, columns)))
        return block

    def blocks_in(shard: Shard, name: str) -> Iterator[Callable[[], Block | Tensor]]:
        for start, stop in blocks_of(files[name], block_bytes):
            yield partial(made_of, shard, name, start, stop)

    def work() -> Iterator[Callable[[], Block | Tensor | None]]:
        names = [(shard, name) for shard in todo for name in shard.layout]
        for number, (shard, name) in enumerate(names):
            # So that no thread waits: for the disk, nor for another one.
            for _, later in names[number + 1 : number + 1 + READ_AHEAD]:
                grown.will_need(files[later].sources)
            for _, following in names[number + 1 : number + 2]:
                yield partial(grown.prepare, files[following].sources)
            yield from blocks_in(shard, name)

    with ahead(work(), threads, window) as results:
        made = (rows for rows in results if rows is not None)
        for shard in todo:
            with shard.open():
                for _ in itertools.chain.from_iterable(blocks_in(shard, name) for name in shard.layout):
                    rows = next(made)
                    nbytes = rows.nbytes
                    if isinstance(rows, Block):
                        shard.send(rows)
                    else:
                        shard.write(rows)
                    progress(nbytes)


@contextmanager
def ahead(work: Iterable[Callable[[], Made]], threads: int, window: int) -> Iterator[Iterator[Made]]:
    """Context with the results of work in order, at most `window` of them begun before they are asked for."""
    tasks = iter(work)
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[Future[Made]] = deque()

        def results() -> Iterator[Made]:
            begun.extend(pool.submit(task) for task in itertools.islice(tasks, window))
            while begun:
                result = begun.popleft().result()
                begun.extend(pool.submit(task) for task in itertools.islice(tasks, 1))
                yield result
                del result  # the memory is the caller's

        try:
            yield results()
        finally:
            for future in begun:
                future.cancel()


# -- rows and boxes ---------------------------------------------------------------------------------------------------


def blocks_of(tensor: Assembled, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a tensor's matrix form (all axes but the last are rows together), of about a number of bytes each."""
    rows, columns = matrix_shape(tensor.shape)
    step = max(1, block_bytes // max(1, columns * tensor.dtype.itemsize))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def matrix_rows(tensor: Assembled, start: int, stop: int, read: Reader) -> Tensor:
    """Rows of a tensor's matrix form, contiguous, of shape (stop - start, columns)."""
    columns = matrix_shape(tensor.shape)[1]
    parts = [tensor.region(box, read).reshape(-1, columns) for box in boxes_of_rows(tensor.shape, start, stop)]
    if len(parts) == 1:
        return parts[0].contiguous()
    return torch.cat(parts) if parts else torch.empty(0, columns, dtype=tensor.dtype)


def boxes_of_rows(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The boxes that rows of a tensor's matrix form are, in order: whole leading entries together, parts of one apart."""
    if len(shape) < 2:
        yield ((start, stop),) if shape else ()
        return
    if len(shape) == 2:
        yield ((start, stop), (0, shape[1]))
        return
    inner = math.prod(shape[1:-1])
    while start < stop:
        entry, offset = divmod(start, inner)
        if offset == 0 and stop - start >= inner:
            last = stop // inner
            yield ((entry, last), *((0, size) for size in shape[1:]))
            start = last * inner
        else:
            end = min(inner, offset + stop - start)
            for box in boxes_of_rows(shape[1:], offset, end):
                yield ((entry, entry + 1), *box)
            start += end - offset


def rows_of_box(shape: tuple[int, ...], box: Box) -> tuple[int, int, tuple[int, ...], tuple[slice, ...]]:
    """The rows of a tensor's matrix form around a box: first and last, their shape, and where in it the box lies."""
    box = (*box, *((0, size) for size in shape[len(box) :]))
    if not shape:
        return 0, 1, (), ()
    lead = box[:-1] if len(shape) > 1 else box
    sizes = shape[: len(lead)]
    wide = next((k for k, (a, b) in enumerate(lead) if b - a != 1), len(lead) - 1)
    inner = math.prod(sizes[wide + 1 :])
    at = 0
    for (first, _), size in zip(lead[:wide], sizes[:wide], strict=True):
        at = at * size + first
    first, last = lead[wide]
    start = (at * sizes[wide] + first) * inner
    cover = (*[1] * wide, last - first, *shape[wide + 1 :])
    cuts = (*[slice(None)] * (wide + 1), *(slice(a, b) for a, b in box[wide + 1 :]))
    return start, start + (last - first) * inner, cover, cuts
