"""Steps of transformers: softmax, row normalization, embeddings, and the arithmetic of their indices and masks."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import fx

from fxcompress.graph import argument

from . import structs
from .epilogue import Target, requantize_struct, scalar
from .fusion import Group
from .planner import Planner
from .views import ROW_MAJOR, View

aten = torch.ops.aten

#: Operator -> operation of ``fxc_logic``.
LOGIC = {
    aten.ne.Scalar: 0, aten.eq.Scalar: 1, aten.logical_not.default: 2, aten.logical_and.default: 3,
    aten.logical_or.default: 4, aten.to.dtype: 5, aten.add.Tensor: 6, aten.sub.Tensor: 7, aten.mul.Tensor: 8,
    aten.cumsum.default: 9,
}  # fmt: skip


def _rows(planner: Planner, node: fx.Node, inputs: list[View], dim: int) -> tuple[structs.Loops, View]:
    """Loops whose rows run along ``dim``."""
    out = planner.output(node, ROW_MAJOR)
    return planner.loops(out, inputs, (dim % planner.rank(node),), rows=True)[0], out


def _finish(planner: Planner, op: str, params: ctypes.Structure, inputs: list[View], target: Target, out: View) -> None:
    """The step, with the requantization of its rows."""
    if target.group is not None:
        params.requantize = requantize_struct(planner, target.group, out.shape[-1])
    planner.step(op, params, inputs, out, target.node)


def emit_softmax(planner: Planner, node: fx.Node, group: Group | None = None) -> None:
    x, mask, target = planner.view(node.args[0]), argument(node, "mask"), Target.of(node, group)
    inputs = [x] if mask is None else [x, planner.view(mask)]
    loops, out = _rows(planner, target.node, inputs, -1)
    params = structs.Softmax(
        loops, planner.constants.array(planner.constant(node.args[1]), "int32"), argument(node, "table_bits"),
        0 if mask is None else inputs[1].tensor.element_size(),
    )  # fmt: skip
    _finish(planner, "softmax", params, inputs, target, out)


def emit_layer_norm(planner: Planner, node: fx.Node, group: Group | None = None) -> None:
    zero_point, target = node.args[1], Target.of(node, group)
    inputs = [planner.view(node.args[0]), *(planner.branch_inputs(group) if group else [])]
    loops, out = _rows(planner, target.node, inputs, -1)
    params = structs.LayerNorm(
        loops, argument(node, "epsilon"), argument(node, "fraction_bits"), int(zero_point is not None),
        0 if zero_point is None else scalar(planner.constant(zero_point)), 0,
    )  # fmt: skip
    _finish(planner, "layer_norm", params, inputs, target, out)


def emit_embedding(planner: Planner, node: fx.Node) -> None:
    """Rows of (rows, ...) codes; everything behind the first dimension is one row."""
    weight, index = planner.view(node.args[0]), planner.view(node.args[1])
    if index.dtype != torch.int64:
        raise ValueError(f"indices of type {index.dtype}; int64 is supported")
    out = planner.output(node, ROW_MAJOR)
    width = math.prod(weight.shape[1:])
    rows = out.moved(out.tensor.view(*index.shape, width))
    # An index is broadcast over its row: stride 0 along the width. The weight is addressed by the kernel.
    spread = index.moved(index.tensor.unsqueeze(-1).expand(*index.shape, width))
    start = weight.moved(torch.empty_strided(rows.shape, [0] * rows.tensor.ndim, dtype=weight.dtype, device="meta"))
    loops, _ = planner.loops(rows, [start, spread], (rows.tensor.ndim - 1,), rows=True)
    params = structs.Embedding(loops, weight.shape[0], width, weight.tensor.element_size(), 0)
    planner.step("embedding", params, [weight, index, planner.counter("index")], out, node)


def emit_logic(planner: Planner, node: fx.Node) -> None:
    operation, arguments = LOGIC[node.target], node.args
    if argument(node, "alpha") != 1 if node.target in (aten.add.Tensor, aten.sub.Tensor) else False:
        raise ValueError("a sum of indices with a factor is not supported")
    inputs = [planner.view(a) for a in arguments[:2] if isinstance(a, fx.Node)]
    if node.target is aten.cumsum.default:
        loops, out = _rows(planner, node, inputs, arguments[1])
    else:
        out = planner.output(node)
        loops, _ = planner.loops(out, inputs)
    value = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], (int, float)) else 0
    if value != int(value):
        raise ValueError(f"an index compared with {value}; integers are supported")
    params = structs.Logic(loops, int(value), operation, out.tensor.element_size())
    for i, view in enumerate(inputs):
        params.in_bytes[i] = view.tensor.element_size()
    planner.step("logic", params, inputs, out, node)
