"""Reference kernels of products computed in blocks by a bilinear algorithm (``bilinear.py``). int32; sums wrap.

An algorithm for <n, m, p> with R products arrives as three programs of sums (``SumSchedule.tensor``): of the blocks of each
operand, and of the products. What is missing at the ends of a dimension that is not a multiple is 0. Nothing here knows whether
the algorithm is exact: a pruned one computes what is left of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference_conv import widen
from .sum_schedule import SumSchedule


def bilinear_linear(x, zero_point, weight, bias, encode, decode, blocks, axis) -> Tensor:
    """A layer over dimension ``axis`` of codes x: acc = bias + C, C = A B with the weight A (O, K) and B = (x - zero_point) (K, rows).

    weight: (R, ceil(O / n), ceil(K / m)) int16, the block sums S_r of A. bias: (O,) int32. zero_point: () or (K,).
    Rows are the other dimensions of x in order; block j of B are the rows j, j + p, ..., so that a block of the result depends on p
    neighboring rows. Blocks of channels follow each other: block k of K are the channels from k ceil(K / m) on.
    """
    n, _, p = blocks
    lead, outputs = x.movedim(axis, -1).shape[:-1], bias.shape[0]
    products = layer_products(x, zero_point, weight, encode, blocks, axis)
    groups, outer = products.shape[1:]
    result = _run(decode, products, n * p).reshape(n, p, groups, outer).permute(2, 1, 0, 3)
    result = result.reshape(groups * p, n * outer)[: lead.numel(), :outputs] + bias
    return result.reshape(*lead, outputs).movedim(-1, axis).contiguous()


def layer_products(x, zero_point, weight, encode, blocks, axis) -> Tensor:
    """The products P_r of ``bilinear_linear``, (R, ceil(rows / p), ceil(O / n))."""
    _, m, p = blocks
    rows = widen(x.movedim(axis, -1), zero_point)
    rows = rows.reshape(rows.shape[:-1].numel(), rows.shape[-1])
    groups, inner = -(-rows.shape[0] // p), weight.shape[2]
    padded = _zero_extended(rows, groups * p, m * inner).reshape(groups, p, m, inner).permute(2, 1, 0, 3)
    sums = _run(encode, padded.flatten(0, 1), weight.shape[0])
    return torch.matmul(sums, weight.to(torch.int32).transpose(1, 2))


def bilinear_matmul(a, a_zero_point, b, b_zero_point, encode_a, encode_b, decode, blocks, products) -> Tensor:
    """(a - a_zero_point) @ (b - b_zero_point), batched, R = ``products`` products of blocks; blocks follow each other.

    a: (..., N, K), b: (..., K, P) codes.
    """
    n, m, p = blocks
    a, b = widen(a, a_zero_point), widen(b, b_zero_point)
    rows, columns = a.shape[-2], b.shape[-1]
    left = _run(encode_a, _cut(a, n, m), products)
    right = _run(encode_b, _cut(b, m, p), products)
    found = torch.stack([torch.matmul(s, t) for s, t in zip(left, right, strict=True)])  # batches may broadcast
    result = _run(decode, found, n * p)
    result = result.unflatten(0, (n, p)).movedim((0, 1), (-4, -2))  # (..., n, N / n, p, P / p)
    return result.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns].contiguous()


def _run(program: Tensor, terms: Tensor, sums: int) -> Tensor:
    """The sums (sums, ...) of ``terms`` (inputs, ...)."""
    found = SumSchedule.from_tensor(program, terms.shape[0], sums).run(terms.unbind(0))
    return torch.stack([terms.new_zeros(terms.shape[1:]) + total for total in found])


def _cut(x: Tensor, rows: int, columns: int) -> Tensor:
    """(..., N, K) as row-major blocks (rows * columns, ..., N / rows, K / columns), the last ones extended by zeros."""
    sizes = [-(-size // count) for size, count in zip(x.shape[-2:], (rows, columns), strict=True)]
    x = _zero_extended(x, rows * sizes[0], columns * sizes[1])
    return x.unflatten(-1, (columns, sizes[1])).unflatten(-3, (rows, sizes[0])).movedim((-4, -2), (0, 1)).flatten(0, 1)


def _zero_extended(x: Tensor, rows: int, columns: int) -> Tensor:
    extended = x.new_zeros((*x.shape[:-2], rows, columns))
    extended[..., : x.shape[-2], : x.shape[-1]] = x
    return extended


def weight_sums(weight: Tensor, program: SumSchedule, size: Sequence[int]) -> Tensor:
    """The block sums S_r of a weight (O, K) as ``bilinear_linear`` wants them: (R, ceil(O / n), ceil(K / m)) int64.

    program: the sums of A of an algorithm whose ``size`` begins with n, m.
    """
    blocks = _cut(weight.to(torch.int64), size[0], size[1])
    return torch.stack([torch.zeros_like(blocks[0]) + total for total in program.run(blocks.unbind(0))])
