"""Integer weights of the qdq level: a constant's dequantize node, or the sum of several, one per accumulator.

    conv(x, dequantize(c1, s1), b)                                one int8 weight
    conv(x, dequantize(c1, s1) + dequantize(c2, s2), b)           two: what one of them leaves, the other adds

Rows: a weight as (O, K), one row per output channel, whatever its layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..dialects import ADD, TRANSPOSED_CONVOLUTIONS
from ..graph import constant, is_call, is_constant
from ..meta import tensor_meta
from ..options import context
from ..weight_quantizers import QUANTIZERS, WeightQuantizer

DEQUANTIZE = torch.ops.fxcompress.dequantize.default
EXPANSION = "expansion"  # node.meta key of a layer whose weight got residuals: its ``Expansion``


@dataclass(frozen=True, eq=False)
class Expansion:
    """What residuals did to a weight, per row (O,): how many there are, and the bound on what is left, in steps of the first summand."""

    residuals: Tensor
    error: Tensor


def layer_quantizer(gm: fx.GraphModule, node: fx.Node) -> WeightQuantizer:
    """How the weight of this layer of a qdq graph is rounded: as the user chose.

    By default ``squant`` for weights of fewer than 8 bits that meet inputs which are never negative, the case its balanced sums
    are made for; else ``nearest``.
    """
    options = context(gm).options
    if options.weight_quantizer is not None:
        return QUANTIZERS[options.weight_quantizer]
    x = tensor_meta(node.args[0]).qparams
    positive = x is not None and bool((x.zero_point == x.qmin).all())
    return QUANTIZERS["squant" if positive and options.target.weight_bits < 8 else "nearest"]


def is_encoded(node: fx.Node) -> bool:
    """True for an integer weight: the dequantize node of a constant, or a sum of such nodes."""
    if is_call(node, ADD):
        return all(isinstance(a, fx.Node) and is_encoded(a) for a in node.args[:2])
    return is_call(node, DEQUANTIZE) and is_constant(node.args[0])


def summands(node: fx.Node) -> list[fx.Node]:
    """The dequantize nodes of an integer weight, in order."""
    return [d for a in node.args[:2] for d in summands(a)] if is_call(node, ADD) else [node]


def decode(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The real value of an integer weight, float64: what the integer network multiplies with."""
    parts = ([constant(gm, a).double() for a in dequantize.args] for dequantize in summands(node))
    return sum((codes - zero_point) * scale for codes, scale, zero_point in parts)


def kernel_taps(weight: Tensor) -> int:
    """How many weights lead from one input channel to one output channel: 9 for a 3x3 kernel, 1 for a linear layer."""
    return math.prod(weight.shape[2:])


def rows(node: fx.Node, weight: Tensor) -> Tensor:
    """The weight as (O, K) float64: one row per output channel. Transposed convolutions store (I, O/G, *kernel)."""
    if node.target not in TRANSPOSED_CONVOLUTIONS:
        return weight.double().flatten(1)
    groups = _groups(node)
    split = weight.double().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return split.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def from_rows(node: fx.Node, rows: Tensor, weight: Tensor) -> Tensor:
    """Inverse of ``rows``: (O, K) of any dtype in the layout and shape of ``weight``."""
    if node.target not in TRANSPOSED_CONVOLUTIONS:
        return rows.reshape(weight.shape)
    groups = _groups(node)
    split = rows.reshape(groups, weight.shape[1], weight.shape[0] // groups, -1)
    return split.transpose(1, 2).reshape(weight.shape)


def _groups(node: fx.Node) -> int:
    return node.args[6] if len(node.args) > 6 else 1
