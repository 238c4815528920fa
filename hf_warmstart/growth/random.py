"""Random numbers that depend on (seed, stream, parameter name, place in the tensor) and on nothing else.

A tensor, or any of its rows, can so be made alone, on any machine, in any order: the words of `numpy`'s PCG64DXSM under
a key for each tensor, each entry at its own place in their sequence, which the generator jumps to.

Normal numbers are looked up: a word of 16 bits is one of 65536 quantiles, and two are added, so that values are as good as
continuous and reach 6.1 deviations. That is faster than `numpy`'s ziggurat, takes the same number of words for every entry,
and rests only on the raw words, which `numpy` keeps from version to version; it reserves the right to change its
`standard_normal`. `torch`'s own normals depend on the processor's vector units. `noise` is for what only has to differ: a
word of 16 bits is a number, which takes half the time of a quantile.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import cache
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

Rows = tuple[int, int]
NOISE_UNIT = ((65536**2 + 2) / 12) ** -0.5  # the mean square of all 16-bit words is one
CHUNK = 1 << 17  # words looked up at once, so that they stay in the processor's cache; no part of the definition


def normal(shape: tuple[int, ...], seed: int, stream: str, name: str, rows: Rows | None = None) -> Tensor:
    """Standard normal float32 numbers of a shape, or the rows of its leading axis from one number to another."""
    size, low, high = _span(shape, rows)
    out = _empty(high - low)
    table, second = _table(0.5), _empty(min(CHUNK, high - low))
    for start, words in _chunks(seed, stream, name, low, high, "<u4"):
        part, other = out[start - low :][: len(words)], second[: len(words)]
        torch.index_select(table, 0, _indices(words & 0xFFFF), out=part)
        part += torch.index_select(table, 0, _indices(words >> 16), out=other)
    return out.view(size)


def noise(
    shape: tuple[int, ...],
    seed: int,
    stream: str,
    name: str,
    rows: Rows | None = None,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Numbers uniform on 65536 values between -sqrt(3) and sqrt(3), of mean square one: float32, of a shape or some rows.

    Args:
        scale: a factor on them; they are rounded once. out: memory for them, of at least as many entries, which begin in its
            first one; None takes new memory.
    """
    size, low, high = _span(shape, rows)
    out = _empty(high - low) if out is None else out.view(-1)[: high - low]
    for start, words in _chunks(seed, stream, name, low, high, "<i2"):
        out[start - low :][: len(words)].copy_(torch.from_numpy(words)).mul_(scale * NOISE_UNIT)
    return out.view(size)


def uniform(shape: tuple[int, ...], seed: int, stream: str, name: str, rows: Rows | None = None) -> Tensor:
    """float32 numbers uniform on [0, 1), of 24 bits each, of a shape or of some of its rows."""
    size, low, high = _span(shape, rows)
    out = _empty(high - low)
    for start, words in _chunks(seed, stream, name, low, high, "<u4"):
        out[start - low :][: len(words)] = torch.from_numpy((words >> 8).astype(np.float32))
    return out.mul_(2.0**-24).view(size)


def _span(shape: tuple[int, ...], rows: Rows | None) -> tuple[tuple[int, ...], int, int]:
    """The shape of some rows, and their first and last entry in the whole."""
    if rows is None:
        return shape, 0, math.prod(shape)
    start, stop = rows
    each = math.prod(shape[1:])
    return (stop - start, *shape[1:]), start * each, stop * each


def _chunks(seed: int, stream: str, name: str, low: int, high: int, kind: str) -> Iterator[tuple[int, np.ndarray]]:
    """Words number `low` to `high` of a tensor's sequence, of 16 or 32 bits, some at a time: (number of the first, words)."""
    each = 8 // np.dtype(kind).itemsize
    generator = np.random.PCG64DXSM(_key(seed, stream, name))
    generator.advance(low // each)
    start = low - low % each
    while start < high:
        stop = min(start + CHUNK, high)
        raw = generator.random_raw(-(-(stop - start) // each)).astype("<u8", copy=False)
        first = max(start, low)
        yield first, raw.view(kind)[first - start : stop - start]
        start = stop


def _empty(entries: int) -> Tensor:
    """float32, also inside `true_float64()`: the numbers are the same there."""
    return torch.from_numpy(np.empty(entries, np.float32))


def _indices(words: np.ndarray) -> Tensor:
    return torch.from_numpy(words.astype(np.int32))


@cache
def _key(seed: int, stream: str, name: str) -> np.random.SeedSequence:
    digest = hashlib.sha256(f"{seed}\n{stream}\n{name}".encode()).digest()
    return np.random.SeedSequence(int.from_bytes(digest, "little"))


@cache
def _table(variance: float) -> Tensor:
    """The 65536 quantiles of a normal distribution, float32, with exactly this mean square before rounding."""
    quantile = NormalDist().inv_cdf
    upper = np.array([quantile((k + 0.5) / 65536) for k in range(32768, 65536)])
    upper *= math.sqrt(variance / (math.fsum(upper**2) / len(upper)))
    return torch.from_numpy(np.concatenate([-upper[::-1], upper]).astype(np.float32))
