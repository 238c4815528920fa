"""Random numbers that depend on (seed, stream, parameter name, block of rows) and on nothing else.

A tensor, or a block of its rows, can so be made alone, on any machine, in any order. `numpy`'s Philox is counter-based
and its ziggurat normals do not depend on the processor's vector units, as torch's do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

BLOCK_ENTRIES = 1 << 18


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the leading axis of about `BLOCK_ENTRIES` entries each; part of the definition of every draw."""
    if not shape:
        yield slice(None)
        return
    per_row = max(1, int(np.prod(shape[1:])))
    rows = max(1, BLOCK_ENTRIES // per_row)
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def block_generator(seed: int, stream: str, name: str, block: int) -> np.random.Generator:
    """The generator of one block of one tensor."""
    digest = hashlib.sha256(f"{seed}\n{stream}\n{name}\n{block}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _draw(shape: tuple[int, ...], seed: int, stream: str, name: str, method: str) -> Tensor:
    out = torch.empty(shape, dtype=torch.float32)
    for index, rows in enumerate(row_blocks(shape)):
        generator = block_generator(seed, stream, name, index)
        block = out[rows]
        values = getattr(generator, method)(size=tuple(block.shape), dtype=np.float32)
        block.copy_(torch.as_tensor(values))
    return out


def normal(shape: tuple[int, ...], seed: int, stream: str, name: str) -> Tensor:
    """Standard normal float32 numbers of the given shape."""
    return _draw(shape, seed, stream, name, "standard_normal")


def uniform(shape: tuple[int, ...], seed: int, stream: str, name: str) -> Tensor:
    """float32 numbers uniform on [0, 1) of the given shape."""
    return _draw(shape, seed, stream, name, "random")
