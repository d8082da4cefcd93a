"""Intervals of integer tensors and the sums and products the integer operators are made of.

Everything is exact in int64; what could pass 2^62 is computed in Python integers and saturates there, far beyond any
int32 accumulator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 1 << 62  # intervals saturate here


@dataclass(frozen=True, eq=False)
class Interval:
    """lo <= value <= hi, elementwise: int64 tensors that broadcast against the tensor (per channel: (C, 1, 1))."""

    lo: Tensor
    hi: Tensor

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest lo and largest hi over the tensor; (0, 0) for an empty one."""
        return (int(self.lo.min()), int(self.hi.max())) if self.lo.numel() else (0, 0)

    @property
    def bits(self) -> int:
        return bits_needed(*self.bounds)

    @property
    def magnitude(self) -> Tensor:
        """Largest absolute value, elementwise."""
        return torch.maximum(-self.lo, self.hi)

    def map(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """Apply a non-decreasing function (or a movement) to both ends."""
        return Interval(function(self.lo), function(self.hi))

    def union(self, other: Interval) -> Interval:
        return Interval(torch.minimum(self.lo, other.lo), torch.maximum(self.hi, other.hi))

    def over(self, dims: Sequence[int], ndim: int) -> Interval:
        """The union over ``dims`` of the ``ndim``-dimensional tensor, those dimensions kept with size 1."""
        aligned = self.map(lambda t: t.reshape((1,) * (ndim - t.ndim) + tuple(t.shape)))
        dims = [d % ndim for d in dims]
        return Interval(aligned.lo.amin(dims, keepdim=True), aligned.hi.amax(dims, keepdim=True)) if dims else aligned

    def along(self, axis: int, ndim: int) -> Interval:
        """One interval per index of dimension ``axis``: (C,), or (1,) when it does not vary along it."""
        return self.over([d for d in range(ndim) if d != axis % ndim], ndim).map(Tensor.flatten)

    def whole(self) -> Interval:
        return exactly(*self.bounds)


def exactly(lo: int, hi: int) -> Interval:
    """A scalar interval, saturated to +-2^62."""
    lo, hi = (torch.tensor(max(-LIMIT, min(LIMIT, v)), dtype=torch.int64) for v in (lo, hi))
    return Interval(lo, hi)


def bits_needed(lo: int, hi: int) -> int:
    """Bits of the smallest two's complement integer that holds lo..hi.

    >>> bits_needed(-128, 127), bits_needed(0, 128), bits_needed(0, 0)
    (8, 9, 1)
    """
    return 1 + max(hi if hi >= 0 else ~hi, lo if lo >= 0 else ~lo).bit_length()


def subtract(a: Interval, b: Interval) -> Interval:
    return Interval(a.lo - b.hi, a.hi - b.lo)


def product(a: Interval, b: Interval) -> Interval:
    """Elementwise product; scalar, in Python integers, when int64 might overflow."""
    if largest(a) * largest(b) > LIMIT:
        corners = [x * y for x in a.bounds for y in b.bounds]
        return exactly(min(corners), max(corners))
    corners = torch.stack(torch.broadcast_tensors(a.lo * b.lo, a.lo * b.hi, a.hi * b.lo, a.hi * b.hi))
    return Interval(corners.amin(0), corners.amax(0))


def repeated(a: Interval, fewest: int, most: int) -> Interval:
    """A sum of ``fewest`` to ``most`` values of ``a``."""
    if largest(a) * most > LIMIT:
        ends = [n * v for n in (fewest, most) for v in a.bounds]
        return exactly(min(ends), max(ends))
    return Interval(torch.minimum(a.lo * fewest, a.lo * most), torch.maximum(a.hi * fewest, a.hi * most))


def combinations_of(x: Interval, coefficients: Tensor) -> Interval:
    """(rows,): bounds of ``coefficients`` (rows, terms) times terms that are free in the scalar interval x."""
    positive, negative = coefficients.clamp(min=0).sum(1), coefficients.clamp(max=0).sum(1)
    return Interval(positive * x.lo + negative * x.hi, positive * x.hi + negative * x.lo)


def largest(a: Interval) -> int:
    return max(abs(v) for v in a.bounds)


def dot(weight: Tensor, groups: int, x: Interval) -> Interval:
    """Bounds of sum_{i, k} weight[o, i, k] * x_i,k with every code x_i,k free in the interval of its channel.

    hi = sum_i (sum_k max(w, 0)) * hi_i + (sum_k min(w, 0)) * lo_i, and likewise lo.
    weight: integers (O, I/G, K); x: (I,), or (1,) when all channels share one interval. Result (O,).
    """
    rows = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    if x.lo.numel() == 1:
        rows = rows.flatten(2).unsqueeze(2)
    lo, hi = (t.reshape(-1 if t.numel() > 1 else 1, 1, rows.shape[2]) for t in (x.lo, x.hi))
    parts = [_dot_rows(r, lo, hi, largest(x)) for r in rows.split(256, dim=1)]  # the int64 sums of few rows at a time
    return Interval(*(torch.cat(ends, dim=1).flatten() for ends in zip(*parts, strict=True)))


def _dot_rows(rows: Tensor, lo: Tensor, hi: Tensor, magnitude: int) -> tuple[Tensor, Tensor]:
    positive = rows.clamp(min=0).sum(-1, dtype=torch.int64)
    negative = rows.clamp(max=0).sum(-1, dtype=torch.int64)
    if rows.numel() and int((positive - negative).sum(-1).max()) * magnitude > LIMIT:
        beyond = torch.full(rows.shape[:2], LIMIT)
        return -beyond, beyond
    return (positive * lo + negative * hi).sum(-1), (positive * hi + negative * lo).sum(-1)
