"""Operator -> rule that emits its steps. What is not here the native backend refuses by name."""

from __future__ import annotations

import torch
from torch import fx

from . import emit_bilinear as bilinear
from . import emit_conv_transpose as transposed
from . import emit_elementwise as elementwise
from . import emit_layers as layers
from . import emit_pooling as pooling
from . import emit_tokens as tokens
from .planner import Planner

aten, ops = torch.ops.aten, torch.ops.fxcompress


def _grouped(planner: Planner, node: fx.Node) -> None:
    """A requantization, or the table behind one: by the kernel of its host if it has one."""
    group = planner.fusion.groups.get(node)
    if group is None:
        elementwise.emit_table(planner, node)
    elif group.host is None:
        elementwise.emit_requantize(planner, group)
    else:
        RULES[group.host.target](planner, group.host, group)


RULES = (
    {
        ops.conv.default: layers.emit_conv,
        ops.conv_transpose.default: transposed.emit_conv_transpose,
        ops.linear.default: layers.emit_linear,
        ops.matmul.default: layers.emit_matmul,
        ops.bilinear_linear.default: bilinear.emit_bilinear_linear,
        ops.bilinear_matmul.default: bilinear.emit_bilinear_matmul,
        ops.sum_pool.default: pooling.emit_sum_pool,
        ops.adaptive_sum_pool.default: pooling.emit_adaptive_sum_pool,
        ops.sum.default: pooling.emit_sum,
        ops.max_pool.default: pooling.emit_max_pool,
        ops.adaptive_max_pool.default: pooling.emit_adaptive_max_pool,
        ops.resize.default: pooling.emit_resize,
        ops.requantize.default: _grouped,
        ops.table.default: _grouped,
        ops.mul.default: elementwise.emit_mul,
        ops.widen.default: elementwise.emit_widen,
        ops.clamp.default: elementwise.emit_clamp,
        ops.rescale.default: elementwise.emit_rescale,
        ops.pad.default: elementwise.emit_pad,
        ops.quantize.default: elementwise.emit_quantize,
        ops.dequantize.default: elementwise.emit_dequantize,
        ops.softmax.default: tokens.emit_softmax,
        ops.layer_norm.default: tokens.emit_layer_norm,
        ops.embedding.default: tokens.emit_embedding,
        aten.index_select.default: elementwise.emit_index_select,
        aten.cat.default: elementwise.emit_cat,
        aten.clone.default: elementwise.emit_clone,
    }
    | dict.fromkeys(
        (aten.reshape.default, aten.permute.default, aten.slice.Tensor, aten.select.int, aten.expand.default),
        elementwise.emit_movement,
    )
    | dict.fromkeys(tokens.LOGIC, tokens.emit_logic)
)
