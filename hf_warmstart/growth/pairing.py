"""Noise that the copies of a coordinate cancel among themselves.

What reads c copies of a coordinate, written with factors `w`, may change by any `e` with `sum_t w_t e_t = 0`. Such `e`
have c - 1 degrees of freedom, and so c - 1 random numbers `z` are drawn for each set of copies, and mapped by an
orthonormal basis of what is orthogonal to `w` (Helmert's, for weights `u_t = w_t / w_0`):

    e_t = u_t * sum_{b > t} a_b z_b  -  d_t z_t,    a_b = 1 / sqrt(P_b (1 + P_b / u_b^2)),  d_b = P_b a_b / u_b,
    P_b = sum_{s < b} u_s^2

That has the covariance of c independent numbers projected on the same space. For c = 2 it is `+z / sqrt(2), -z / sqrt(2)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from .maps import SpaceMap
from .runs import NONE, Along, Runs


class Pairing:
    """The noise of an axis as terms: with `q, k = terms[i]`, coordinate j takes `sum_i k_i[j] * z[q_i[j]]`.

    Args:
        source: int64 (m,), the old coordinate of each new one, -1 for none. write: float64 (m,), the factors `w`.
        n: the number of old coordinates.
    """

    def __init__(self, source: Tensor, write: Tensor, n: int) -> None:
        m, sourced = len(source), source >= 0
        old = source.clamp(min=0)
        order = torch.argsort(torch.where(sourced, source, n), stable=True)
        counts = torch.bincount(source[sourced], minlength=n)
        begins = torch.cumsum(counts, 0) - counts
        turn = torch.zeros(m, dtype=torch.int64)
        turn[order] = torch.arange(m) - torch.cat([begins, counts.sum()[None]])[torch.where(sourced, source, n)[order]]
        turn[~sourced] = 0
        copies = int(counts.max()) if n else 0
        drawn = sourced & (turn > 0)
        self.draws = int(drawn.sum())
        number = torch.cumsum(drawn, 0) - 1
        places = torch.full((copies, n), NONE)
        places[turn[sourced], source[sourced]] = torch.arange(m)[sourced]
        weight = write[places.clamp(min=0)] / write[places[:1].clamp(min=0)]
        before = torch.zeros(n, dtype=torch.float64)
        self.terms: list[tuple[Tensor, Tensor]] = []
        for b in range(1, copies):
            before = before + weight[b - 1].square()
            basis = 1 / torch.sqrt(before * (1 + before / weight[b].square()))
            there = (places[b] >= 0)[old] & sourced
            ahead = there & (turn < b)
            own = there & (turn == b)
            factor = torch.zeros(m, dtype=torch.float64)
            factor[ahead] = (weight[turn, old] * basis[old])[ahead]
            factor[own] = -(before / weight[b] * basis)[old][own]
            index = torch.where(ahead | own, number[places[b].clamp(min=0)][old], NONE)
            self.terms.append((index, factor))
        self.runs = [Runs(index, factor) for index, factor in self.terms]

    @cached_property
    def one_size(self) -> float | None:
        """The size of all factors but zeros, where it is one (two copies each)."""
        sizes = torch.cat([factor.abs() for _, factor in self.terms])
        sizes = sizes[sizes > 0]
        return float(sizes[0]) if bool((sizes == sizes[0]).all()) else None

    @classmethod
    def of_rows(cls, maps: Sequence[SpaceMap], axis: int) -> Pairing:
        """The pairing of one among several axes that are the rows together; the others are grown already."""
        identity = [SpaceMap.identity(axis_map.m) for axis_map in maps]
        parts = [Along.of(maps[k] if k == axis else identity[k], "read") for k in range(len(maps))]
        whole = Along.together(parts)
        inner = 1
        for axis_map in maps[axis + 1 :]:
            inner *= axis_map.m
        write = maps[axis].write.repeat_interleave(inner).repeat(whole.m // (maps[axis].m * inner))
        return cls(whole.source, write, whole.n)
