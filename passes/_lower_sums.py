"""Lowering rules for sums and products: layers with weights, additions, products of two activations."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress.dialects import CONVOLUTIONS, LINEAR, MATMUL, SUB, TRANSPOSED_CONVOLUTIONS
from fxcompress.errors import UnsupportedOperatorError
from fxcompress.graph import argument, constant, is_constant, rank, shape
from fxcompress.lowering.state import State, per_dim
from fxcompress.lowering.values import Accumulator, Branch, Codes, largest_code
from fxcompress.meta import along_axis, place, tensor_meta
from fxcompress.passes.quantize import is_encoded, rows

ops = torch.ops.fxcompress


def weighted(state: State, node: fx.Node) -> Accumulator:
    x: Codes = state.values[node.args[0]]
    weight, w_scale = constant(state.gm, node.args[1].args[0]), tensor_meta(node.args[1]).qparams.scale
    q = x.qparams
    if q.axis is not None:
        raise UnsupportedOperatorError("a per-channel input scale", stage="lower_to_integer", where=place(node))
    scale = q.scale * w_scale
    weight_rows = rows(node, weight)
    bias = argument(node, "bias")
    bias = torch.round(constant(state.gm, bias).double() / scale) if bias is not None else torch.zeros_like(scale)
    bound = int((weight_rows.abs().sum(1) * largest_code(x) + bias.abs()).max())
    if node.target in TRANSPOSED_CONVOLUTIONS:
        new = _conv_transpose(state, node, x, weight, bias)
    else:  # the zero point moves into the bias: exact because padding is done with the zero point
        bias = bias - q.zero_point * weight_rows.sum(1)
        new = _conv(state, node, x, weight, bias) if node.target in CONVOLUTIONS else _linear(state, x, weight, bias)
    axis = -1 if node.target is LINEAR else 1
    return state.accumulate(node, new, along_axis(scale, axis, rank(node)), bound)


def _conv(state: State, node: fx.Node, x: Codes, weight: Tensor, bias: Tensor) -> fx.Node:
    n = weight.ndim - 2
    stride, padding, dilation = (per_dim(argument(node, a), n) for a in ("stride", "padding", "dilation"))
    sides = [p for p in padding for _ in range(2)]
    return state.build.call(ops.conv.default, x.node, weight, bias.to(torch.int32), stride, sides, dilation,
                           argument(node, "groups"), x.qparams.zero_point)  # fmt: skip


def _linear(state: State, x: Codes, weight: Tensor, bias: Tensor) -> fx.Node:
    return state.build.call(ops.linear.default, x.node, weight, bias.to(torch.int32))


def _conv_transpose(state: State, node: fx.Node, x: Codes, weight: Tensor, bias: Tensor) -> fx.Node:
    n = weight.ndim - 2
    stride, padding, extra, dilation = (
        per_dim(argument(node, a), n) for a in ("stride", "padding", "output_padding", "dilation")
    )
    sides = [p for p in padding for _ in range(2)]
    return state.build.call(ops.conv_transpose.default, x.node, x.qparams.zero_point, weight, bias.to(torch.int32), stride, sides,
                           extra, dilation, argument(node, "groups"))  # fmt: skip


def add(state: State, node: fx.Node) -> Accumulator:
    branches = []
    for i, operand in enumerate(node.args[:2]):
        value = _constant_branch(state, operand) if is_constant(operand) else state.values[operand]
        sign = -1.0 if i == 1 and node.target is SUB else 1.0
        branches += Accumulator(state.build.branches(value)).scaled(sign).branches
    return Accumulator(tuple(branches))


def _constant_branch(state: State, node: fx.Node) -> Accumulator:
    return Accumulator((constant_branch(state, constant(state.gm, node).double(), node.target),))


def constant_branch(state: State, value: Tensor, name: str) -> Branch:
    """A float64 constant as an int32 branch with 20 bits of resolution."""
    magnitude = float(value.abs().max())
    scale = torch.tensor(magnitude * 2.0**-20 or 1.0, dtype=torch.float64)
    codes = state.build.call_constant(torch.round(value / scale).to(torch.int32), f"{name}_codes")
    return Branch(codes, scale, 1 << 20, magnitude)


def product(state: State, node: fx.Node) -> Accumulator:
    a, b = (_operand(state, arg) for arg in node.args[:2])
    op = ops.matmul.default if node.target is MATMUL else ops.mul.default
    terms = shape(node.args[0])[-1] if node.target is MATMUL else 1
    new = state.build.call(op, a.node, a.qparams.zero_point, b.node, b.qparams.zero_point)
    return state.accumulate(
        node, new, a.qparams.scale * b.qparams.scale, int(terms) * largest_code(a) * largest_code(b)
    )


def _operand(state: State, node: fx.Node) -> Codes:
    if not is_encoded(node):
        return state.values[node]
    codes = constant(state.gm, node.args[0])
    return Codes(state.build.call_constant(codes, node.args[0].target), tensor_meta(node).qparams)
