"""Lowering rules for pooling and resizing: integer sums whose 1/n is part of the multiplier, and maxima of codes."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress.graph import argument, per_dimension, rank, shape
from fxcompress.lowering.state import State
from fxcompress.lowering.values import Accumulator, Codes, largest_code
from fxcompress.meta import along_axis, tensor_meta
from fxcompress.reference_kernels import linear_resize_tables

ops = torch.ops.fxcompress
RESIZE_FRACTION_BITS = 10


def average_pool(state: State, node: fx.Node) -> Accumulator:
    x: Codes = state.values[node.args[0]]
    n = rank(node) - 2
    kernel, padding = (per_dimension(argument(node, a), n) for a in ("kernel_size", "padding"))
    stride = per_dimension(argument(node, "stride"), n) or kernel
    sides = [
        side
        for d in range(n)
        for side in _sides(shape(node.args[0])[2 + d], shape(node)[2 + d], kernel[d], stride[d], padding[d])
    ]
    zero = torch.zeros((), dtype=torch.int32)
    ones = torch.ones(1, 1, *shape(node.args[0])[2:])
    counts = ops.sum_pool(ones.to(torch.uint8), zero, kernel, stride, sides)
    averages = node.target(ones, *node.args[1:], **node.kwargs).double()  # what aten divides by is its own affair
    divisor = torch.round(counts / averages)
    new = state.build.call(ops.sum_pool.default, x.node, _zero_point(x, node), kernel, stride, sides)
    return _average(state, node, x, new, divisor, int(torch.tensor(kernel).prod()))


def adaptive_average_pool(state: State, node: fx.Node) -> Accumulator:
    x: Codes = state.values[node.args[0]]
    n = rank(node) - 2
    size = list(shape(node)[-n:])
    zero = torch.zeros((), dtype=torch.int32)
    divisor = ops.adaptive_sum_pool(torch.ones(1, 1, *shape(node.args[0])[2:], dtype=torch.uint8), zero, size).double()
    new = state.build.call(ops.adaptive_sum_pool.default, x.node, _zero_point(x, node), size)
    return _average(state, node, x, new, divisor, int(divisor.max()))


def mean(state: State, node: fx.Node) -> Accumulator:
    x: Codes = state.values[node.args[0]]
    dims, keepdim = argument(node, "dim"), argument(node, "keepdim")
    divisor = torch.tensor([shape(node.args[0])[d] for d in dims], dtype=torch.float64).prod()
    new = state.build.call(ops.sum.default, x.node, _zero_point(x, node.args[0]), list(dims), keepdim)
    return _average(state, node, x, new, divisor, int(divisor))


def _average(state: State, node: fx.Node, x: Codes, new: fx.Node, divisor: Tensor, count: int) -> Accumulator:
    divisor = divisor.flatten()[0] if bool((divisor == divisor.flatten()[0]).all()) else divisor.squeeze(0).squeeze(0)
    scale = along_axis(x.qparams.scale, tensor_meta(node).channel_axis, rank(node))
    return state.accumulate(node, new, scale / divisor, count * largest_code(x))


def resize(state: State, node: fx.Node) -> Accumulator:
    x: Codes = state.values[node.args[0]]
    n = rank(node) - 2
    factors = argument(node, "scale_factors") or [None] * n
    tables = [
        linear_resize_tables(shape(node.args[0])[2 + d], shape(node)[2 + d], argument(node, "align_corners"), factors[d],
                             RESIZE_FRACTION_BITS)
        for d in range(n)
    ]  # fmt: skip
    index0, index1, weight1 = (list(column) for column in zip(*tables, strict=True))
    new = state.build.call(
        ops.resize.default, x.node, _zero_point(x, node), index0, index1, weight1, RESIZE_FRACTION_BITS
    )
    gain = 1 << (RESIZE_FRACTION_BITS * n)
    return state.accumulate(node, new, x.qparams.broadcast(rank(node))[0] / gain, gain * largest_code(x))


def max_pool(state: State, node: fx.Node) -> Codes:
    x: Codes = state.values[node.args[0]]
    n = rank(node) - 2
    kernel, padding, dilation = (per_dimension(argument(node, a), n) for a in ("kernel_size", "padding", "dilation"))
    stride = per_dimension(argument(node, "stride"), n) or kernel
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sides = [
        side
        for d in range(n)
        for side in _sides(shape(node.args[0])[2 + d], shape(node)[2 + d], extent[d], stride[d], padding[d])
    ]
    return state.build.codes(state.build.call(ops.max_pool.default, x.node, kernel, stride, sides, dilation), x.qparams)


def adaptive_max_pool(state: State, node: fx.Node) -> Codes:
    x: Codes = state.values[node.args[0]]
    return state.build.codes(state.build.call(node.target, x.node, list(node.args[1])), x.qparams)


def _zero_point(x: Codes, node: fx.Node) -> Tensor:
    """Broadcastable to a tensor of the rank of ``node``."""
    return x.qparams.broadcast(rank(node))[1]


def _sides(size: int, out: int, extent: int, stride: int, before: int) -> tuple[int, int]:
    """(before, after) padding of one dimension such that exactly ``out`` windows fit: ceil_mode is resolved here."""
    return before, max(0, (out - 1) * stride + extent - size - before)
