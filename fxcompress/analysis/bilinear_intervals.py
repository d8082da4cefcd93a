"""Worst-case intervals of products in blocks (``reference_bilinear``): the algorithm is multiplied out again.

With a constant weight the result is linear in the codes, so its interval comes from the weight that every code effectively
meets. For an exact algorithm that is the weight of the layer: the proof trusts neither the algorithm nor the sums of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sum_schedule import SumSchedule
from .interval_arithmetic import Interval, combinations_of, dot, exactly, product, repeated


def linear_interval(
    x: Interval, channels: int, weight: Tensor, encode: Tensor, decode: Tensor, blocks: Sequence[int]
) -> Interval:
    """(n ceil(O / n),): what ``bilinear_linear`` can reach without its bias.

    x: x - zero_point, (K,) with K = ``channels``, or (1,).
    """
    n, m, p = blocks
    products, outputs, inner = weight.shape
    encode = SumSchedule.from_tensor(encode, m * p, products).coefficients
    decode = SumSchedule.from_tensor(decode, products, n * p).coefficients
    lo, hi = (_channel_blocks(t.expand(channels), m, inner) for t in (x.lo, x.hi))
    sums = weight.double().flatten(1)  # every term and sum is an integer far below 2^53
    ends: list[list[Interval]] = [[] for _ in range(n)]
    for index, row in enumerate(decode):
        i, j = divmod(index, p)
        effective = ((row[:, None] * encode).double().T @ sums).reshape(m * p, outputs, inner).transpose(0, 1).long()
        own = torch.arange(p)[None, :, None] == j  # rows past the last are 0, and nobody's own
        low, high = torch.where(own, lo, lo.clamp(max=0)), torch.where(own, hi, hi.clamp(min=0))
        ends[i].append(dot(effective.flatten(1)[..., None], 1, Interval(low.flatten(), high.flatten())))
    rows = [
        Interval(torch.stack([e.lo for e in row]).amin(0), torch.stack([e.hi for e in row]).amax(0)) for row in ends
    ]
    return Interval(torch.cat([r.lo for r in rows]), torch.cat([r.hi for r in rows]))


def _channel_blocks(values: Tensor, m: int, inner: int) -> Tensor:
    """(m, 1, inner); channels past the last are 0."""
    padded = values.new_zeros(m * inner)
    padded[: len(values)] = values
    return padded.reshape(m, 1, inner)


def matmul_interval(
    a: Interval, b: Interval, depth: int, programs: Sequence[Tensor], blocks: Sequence[int], products: int
) -> Interval:
    """What ``bilinear_matmul`` can reach. a, b: scalar intervals of the centered operands, ``depth`` elements per sum.

    programs: encode_a, encode_b, decode.
    """
    n, m, p = blocks
    sizes = ((n * m, products), (m * p, products), (products, n * p))
    left, right, decode = (SumSchedule.from_tensor(t, *s).coefficients for t, s in zip(programs, sizes, strict=True))
    terms = decode @ (left[:, :, None] * right[:, None]).flatten(1)  # (n p, n m m p)
    rows, inner, columns = (torch.eye(size, dtype=torch.int64) for size in (n, m, p))
    if torch.equal(terms, torch.einsum("xi,kh,yj->xyikhj", rows, inner, columns).reshape(terms.shape)):
        return repeated(product(a, b), depth, depth)
    each = product(_with_zero(a), _with_zero(b))
    found, length = combinations_of(each, terms), -(-depth // m)
    return repeated(exactly(*found.bounds), 0, length)


def operand_interval(x: Interval, program: Tensor, blocks: int, products: int) -> Interval:
    """(R,): the sums of blocks whose elements lie anywhere in x or are missing."""
    lo, hi = x.bounds
    return combinations_of(_with_zero(exactly(lo, hi)), SumSchedule.from_tensor(program, blocks, products).coefficients)


def _with_zero(x: Interval) -> Interval:
    return x.union(exactly(0, 0))
