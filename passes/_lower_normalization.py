"""Lowering rules for softmax, normalized rows and embeddings.

softmax(x)                  ->  softmax of codes through a table of exponentials, units of 2^-24
layer_norm(x, gamma, beta)  ->  gamma 2^-F layer_norm(codes) + beta: both join the rounding, no tensor in between
group_norm                  ->  the same on rows (N, G, C/G * S), gamma and beta per channel
embedding(table, index)     ->  embedding of the table's codes
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from fxcompress import numerics
from fxcompress import reference_normalization as reference
from fxcompress.dialects import EMBEDDING, GROUP_NORM, LAYER_NORM, RMS_NORM, SOFTMAXES
from fxcompress.errors import UnsupportedOperatorError
from fxcompress.graph import argument, constant, rank, shape
from fxcompress.lowering.state import State
from fxcompress.lowering.values import Accumulator, Branch, Codes, Index
from fxcompress.meta import along_axis, place, tensor_meta

from ._lower_sums import constant_branch

aten, ops = torch.ops.aten, torch.ops.fxcompress


def softmax(state: State, node: fx.Node) -> Accumulator:
    x: Codes = state.values[node.args[0]]
    row = int(shape(node)[-1])
    bits = reference.exp_table_bits(row)
    if bits < reference.MIN_TABLE_BITS:
        raise _too_long(node, row, 1 << 15)
    table = reference.exp_table(_scalar_scale(x, node), bits)
    mask = [state.index(node.args[1])] if len(node.args) > 1 and isinstance(node.args[1], fx.Node) else []
    new = state.build.call(ops.softmax.default, x.node, table, bits, *mask)
    unit = torch.tensor(2.0**-reference.PROBABILITY_BITS, dtype=torch.float64)
    return state.accumulate(node, new, unit, 1 << reference.PROBABILITY_BITS)


def layer_norm(state: State, node: fx.Node) -> Accumulator:
    x: Codes = state.values[node.args[0]]
    dims = len(argument(node, "normalized_shape"))
    lead = _sizes(node)[: rank(node) - dims]
    return _normalized(state, node, x, [*lead, math.prod(argument(node, "normalized_shape"))], None)


def rms_norm(state: State, node: fx.Node) -> Accumulator:
    x: Codes = state.values[node.args[0]]
    dims = len(argument(node, "normalized_shape"))
    lead = _sizes(node)[: rank(node) - dims]
    rows = [*lead, math.prod(argument(node, "normalized_shape"))]
    return _normalized(state, node, x, rows, x.qparams.zero_point)


def group_norm(state: State, node: fx.Node) -> Accumulator:
    x: Codes = state.values[node.args[0]]
    groups = argument(node, "num_groups")
    batch, *rest = _sizes(node)
    return _normalized(state, node, x, [batch, groups, math.prod(rest) // groups], None)


def _normalized(state: State, node: fx.Node, x: Codes, rows: list[int], zero_point: Tensor | None) -> Accumulator:
    """gamma * (codes as ``rows``, normalized) + beta."""
    n, scale = rows[-1], _scalar_scale(x, node)
    if n > reference.MAX_ROW:
        raise _too_long(node, n, reference.MAX_ROW)
    eps = argument(node, "eps")
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    epsilon = min(round(n**2 * eps / float(scale) ** 2), reference.MAX_EPSILON - 1)
    codes = x.node if len(rows) == rank(node) else state.build.call(aten.reshape.default, x.node, rows)
    bits = reference.fraction_bits(n, epsilon)
    new = state.build.call(ops.layer_norm.default, codes, zero_point, epsilon, bits)
    new = new if len(rows) == rank(node) else state.build.call(aten.reshape.default, new, _sizes(node))
    unit = torch.tensor(2.0**-bits, dtype=torch.float64)
    return _affine(state, node, new, unit, reference.layer_norm_bound(n, epsilon, bits))


def _affine(state: State, node: fx.Node, new: fx.Node, unit: Tensor, bound: int) -> Accumulator:
    gamma, beta = _parameter(state, node, "weight"), _parameter(state, node, "bias")
    normalized = state.accumulate(node, new, unit if gamma is None else gamma * unit, bound)
    if beta is None or not bool(beta.any()):
        return normalized
    (rows,) = normalized.branches
    shift = constant_branch(state, beta, f"{node.name}_bias")
    magnitude = min(rows.largest + shift.largest, rows.bound * float(rows.scale.abs().max()))
    return Accumulator((Branch(rows.node, rows.scale, rows.bound, magnitude), shift))


def _parameter(state: State, node: fx.Node, name: str) -> Tensor | None:
    """weight or bias as float64, broadcastable to the result; None without one."""
    if name not in {a.name for a in node.target._schema.arguments} or argument(node, name) is None:
        return None
    value = constant(state.gm, argument(node, name)).double()
    return along_axis(value, 1, rank(node)) if node.target is GROUP_NORM else value


def embedding(state: State, node: fx.Node) -> Codes:
    """The rows of the table are rounded offline, to the codes its reader asks for."""
    q = next(tensor_meta(u).qparams for u in node.users if u.target is ops.quantize.default)
    table = constant(state.gm, node.args[0])
    codes = numerics.quantize_offline(table, *q.broadcast(table.ndim), q.qmin, q.qmax).to(q.dtype)
    return state.build.codes(state.build.call(ops.embedding.default, codes, state.index(node.args[1])), q)


def index(state: State, node: fx.Node) -> Index:
    """Integers and booleans computed from integer inputs (token ids, masks) stay what they are."""
    args = fx.map_arg(node.args, state.index)
    return Index(state.build.call(node.target, *args))


def _sizes(node: fx.Node) -> list[int]:
    """The shape of a node, the batch as -1."""
    return [-1 if isinstance(n, torch.SymInt) else n for n in shape(node)]


def _scalar_scale(x: Codes, node: fx.Node) -> Tensor:
    if x.qparams.axis is not None:
        raise UnsupportedOperatorError("a per-channel input scale", stage="lower_to_integer", where=place(node))
    return x.qparams.scale


def _too_long(node: fx.Node, row: int, limit: int) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(f"{node.target} over rows of {row} elements", stage="lower_to_integer", where=place(node),
                                    expected=f"at most {limit}",
                                    remedy=f"keep_float=[{tensor_meta(node).origin.module!r}] leaves it in float.")  # fmt: skip


#: operator -> rule(state, node)
RULES = dict.fromkeys(SOFTMAXES, softmax) | {
    LAYER_NORM: layer_norm,
    RMS_NORM: rms_norm,
    GROUP_NORM: group_norm,
    EMBEDDING: embedding,
}
