"""Lowering rules for sums and products: layers with weights, additions, products of two activations."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress.analysis.encoded_weights import is_encoded, rows, summands
from fxcompress.analysis.layer_weights import scale_inputs
from fxcompress.dialects import CONVOLUTIONS, LINEAR, MATMUL, SUB, TRANSPOSED_CONVOLUTIONS
from fxcompress.graph import argument, constant, is_call, is_constant, per_dimension, rank, shape
from fxcompress.lowering.state import State
from fxcompress.lowering.values import Accumulator, Branch, Codes, largest_code
from fxcompress.meta import QParams, along_axis, tensor_meta

ops = torch.ops.fxcompress


def weighted(state: State, node: fx.Node) -> Accumulator:
    """The layer; a weight that is a sum gives one branch per summand, the first with the bias."""
    bias = argument(node, "bias")
    bias = torch.zeros((), dtype=torch.float64) if bias is None else constant(state.gm, bias).double()
    branches = []
    for weight in summands(node.args[1]):
        branches += _product_with(state, node, weight, bias).branches
        bias = torch.zeros_like(bias)
    return Accumulator(tuple(branches))


def _product_with(state: State, node: fx.Node, encoded: fx.Node, bias: Tensor) -> Accumulator:
    x: Codes = state.values[node.args[0]]
    weight, w_scale = constant(state.gm, encoded.args[0]), tensor_meta(encoded).qparams.scale
    q = x.qparams
    scale = q.scale * w_scale if q.axis is None else w_scale  # scales per channel are folded into the weight
    weight_rows = rows(node, weight)
    bias = torch.round(bias / scale)
    bound = int((weight_rows.abs().sum(1) * largest_code(x) + bias.abs()).max())
    if node.target in TRANSPOSED_CONVOLUTIONS:
        new = _conv_transpose(state, node, x, weight, bias)
    else:  # the zero point moves into the bias: exact because padding is done with the zero point
        bias = bias - _zero_point_sums(node, weight, q)
        new = _conv(state, node, x, weight, bias) if node.target in CONVOLUTIONS else _linear(state, x, weight, bias)
    axis = -1 if node.target is LINEAR else 1
    return state.accumulate(node, new, along_axis(scale, axis, rank(node)), bound)


def _zero_point_sums(node: fx.Node, weight: Tensor, q: QParams) -> Tensor:
    """(O,): what codes that stand for 0 add up to."""
    if q.axis is None:
        return q.zero_point * rows(node, weight).sum(1)
    return rows(node, scale_inputs(node, weight.double(), q.zero_point.double())).sum(1)


def _conv(state: State, node: fx.Node, x: Codes, weight: Tensor, bias: Tensor) -> fx.Node:
    n = weight.ndim - 2
    stride, padding, dilation = (per_dimension(argument(node, a), n) for a in ("stride", "padding", "dilation"))
    sides = [p for p in padding for _ in range(2)]
    return state.build.call(ops.conv.default, x.node, weight, bias.to(torch.int32), stride, sides, dilation,
                           argument(node, "groups"), x.qparams.zero_point)  # fmt: skip


def _linear(state: State, x: Codes, weight: Tensor, bias: Tensor) -> fx.Node:
    return state.build.call(ops.linear.default, x.node, weight, bias.to(torch.int32))


def _conv_transpose(state: State, node: fx.Node, x: Codes, weight: Tensor, bias: Tensor) -> fx.Node:
    n = weight.ndim - 2
    stride, padding, extra, dilation = (
        per_dimension(argument(node, a), n) for a in ("stride", "padding", "output_padding", "dilation")
    )
    sides = [p for p in padding for _ in range(2)]
    _, zero_point = x.qparams.broadcast(rank(node))
    return state.build.call(ops.conv_transpose.default, x.node, zero_point, weight, bias.to(torch.int32), stride, sides,
                           extra, dilation, argument(node, "groups"))  # fmt: skip


def add(state: State, node: fx.Node) -> Accumulator:
    if _is_rest(node):
        return _rest(state, *node.args[:2])
    branches = []
    for i, operand in enumerate(node.args[:2]):
        value = _constant_branch(state, operand) if is_constant(operand) else state.values[operand]
        sign = -1.0 if i == 1 and node.target is SUB else 1.0
        branches += Accumulator(state.build.branches(value)).scaled(sign).branches
    return Accumulator(tuple(branches))


def _is_rest(node: fx.Node) -> bool:
    """x - dequantize(quantize(x)): what rounding left (``expand_inputs``)."""
    rounded = node.args[1]
    return (
        node.target is SUB
        and is_call(rounded, ops.dequantize.default)
        and is_call(rounded.args[0], ops.quantize.default)
        and rounded.args[0].args[0] is node.args[0]
    )


def _rest(state: State, x: fx.Node, rounded: fx.Node) -> Accumulator:
    """One accumulator, clamped before the codes are taken off: any branch alone may be larger than the sum."""
    codes = state.build.widen(state.values[rounded])
    return Accumulator((state.build.to_single(state.values[x]), *Accumulator((codes,)).scaled(-1.0).branches))


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
    (a_scale, a_zero), (b_scale, b_zero) = (operand.qparams.broadcast(rank(node)) for operand in (a, b))
    new = state.build.call(op, a.node, a_zero, b.node, b_zero)
    return state.accumulate(node, new, a_scale * b_scale, int(terms) * largest_code(a) * largest_code(b))


def _operand(state: State, node: fx.Node) -> Codes:
    if not is_encoded(node):
        return state.values[node]
    codes = constant(state.gm, node.args[0])
    return Codes(state.build.call_constant(codes, node.args[0].target), tensor_meta(node).qparams)
