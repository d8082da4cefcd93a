"""Steps for elementwise operators, data movement and the float boundary."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, fx

from fxcompress.graph import argument, is_constant

from . import structs
from .constants import varying_dims
from .epilogue import Target, group_varying_dims, requantize_struct
from .fusion import Group
from .planner import Planner
from .views import ROW_MAJOR, View, dense_strides, new_view

aten = torch.ops.aten


def emit_requantize(planner: Planner, group: Group) -> None:
    """A requantization no other kernel computes."""
    branches, out = planner.branch_inputs(group), planner.output(group.result)
    dims = _common_dims(planner, group.requantize, group_varying_dims(planner, group), _zero_points(planner, group))
    target = out
    if len(dims) > 1:  # one array of parameters runs over several dimensions: all tensors have to lie in its order
        branches = [planner.dense(b.moved(b.tensor.expand(out.shape)), ROW_MAJOR, group.result) for b in branches]
        target = (
            out if out.strides == dense_strides(out.shape, ROW_MAJOR) else new_view(out.shape, out.dtype, ROW_MAJOR)
        )
    loops, channels = planner.loops(target, branches, dims)
    params = structs.RequantizeMap(loops, requantize_struct(planner, group, channels))
    planner.step("requantize", params, branches, target, group.result)
    if target is not out:
        planner.copy(target, out, group.result)


def _zero_points(planner: Planner, group: Group) -> list[Tensor]:
    widened = (group.requantize.args[0][i] for i in group.branches)
    return [planner.constant(n.args[1]) for n in widened if n.target is torch.ops.fxcompress.widen.default]


def _common_dims(planner: Planner, node: fx.Node, dims: tuple[int, ...], values: list[Tensor]) -> tuple[int, ...]:
    """The dimensions along which ``values`` vary too, which must be ``dims`` if both vary."""
    others = varying_dims(planner.rank(node), *values)
    if dims and others and dims != others:
        raise ValueError(f"parameters vary along the dimensions {dims} and {others}")
    return dims or others


def emit_mul(planner: Planner, node: fx.Node, group: Group | None = None) -> None:
    a, a_zero, b, b_zero = node.args
    zeros = [planner.constant(a_zero), planner.constant(b_zero)]
    target = Target.of(node, group)
    dims = _common_dims(planner, node, group_varying_dims(planner, group) if group else (), zeros)
    inputs = [planner.view(a), planner.view(b), *(planner.branch_inputs(group) if group else [])]
    out = planner.output(target.node)
    loops, channels = planner.loops(out, inputs, dims)
    params = structs.Mul(loops=loops)
    for i, zero in enumerate(zeros):
        params.zero_point[i] = planner.constants.per_channel(zero, channels, "int32")
    if group is not None:
        params.requantize = requantize_struct(planner, group, channels)
    planner.step("mul", params, inputs, out, target.node)


def emit_widen(planner: Planner, node: fx.Node) -> None:
    zero_point = planner.constant(node.args[1])
    loops, channels, x, out = _one_input(planner, node, zero_point)
    params = structs.Widen(loops, planner.constants.per_channel(zero_point, channels, "int32"))
    planner.step("widen", params, [x], out, node)


def emit_clamp(planner: Planner, node: fx.Node) -> None:
    lo, hi = planner.constant(node.args[1]), planner.constant(node.args[2])
    loops, channels, x, out = _one_input(planner, node, lo, hi)
    params = structs.Clamp(
        loops,
        planner.constants.per_channel(lo, channels, "int32"),
        planner.constants.per_channel(hi, channels, "int32"),
    )
    planner.step("clamp", params, [x], out, node)


def _one_input(
    planner: Planner, node: fx.Node, *parameters: Tensor
) -> tuple[structs.Loops, tuple[int, ...], View, View]:
    x, out = planner.view(node.args[0]), planner.output(node)
    return (*planner.loops(out, [x], varying_dims(planner.rank(node), *parameters)), x, out)


def emit_rescale(planner: Planner, node: fx.Node) -> None:
    branches, multipliers, shifts = node.args
    if len(branches) > structs.MAX_BRANCHES:
        raise ValueError(f"a sum of {len(branches)} branches; at most {structs.MAX_BRANCHES} are supported")
    values = [[planner.constant(n) for n in arg] for arg in (multipliers, shifts)]
    inputs, out = [planner.view(n) for n in branches], planner.output(node)
    loops, channels = planner.loops(out, inputs, varying_dims(planner.rank(node), *values[0], *values[1]))
    params = structs.Rescale(loops=loops)
    for i, (multiplier, shift) in enumerate(zip(*values, strict=True)):
        params.multiplier[i] = planner.constants.per_channel(multiplier, channels, "int64")
        params.shift[i] = planner.constants.per_channel(shift, channels, "int64")
    planner.step("rescale", params, inputs, out, node)


def emit_table(planner: Planner, node: fx.Node) -> None:
    lut = planner.constant(node.args[1])
    dims = (argument(node, "axis") % planner.rank(node),) if lut.ndim == 2 else ()
    x, out = planner.view(node.args[0]), planner.output(node)
    loops, _ = planner.loops(out, [x], dims)
    table = ctypes.cast(planner.constants.array(lut), ctypes.c_void_p)
    planner.step(
        "table", structs.Table(loops, table, int(lut.ndim == 2), int(lut.dtype == torch.int32)), [x], out, node
    )


# ----------------------------------------------------------------------------------------------------- movement


def emit_movement(planner: Planner, node: fx.Node) -> None:
    """Another view where the strides allow it; a reshape that mixes dimensions copies first."""
    x = planner.view(node.args[0])
    rest = [planner.constant(a) if is_constant(a) else a for a in node.args[1:]]
    moved = node.target(x.tensor, *rest, **node.kwargs)
    if not x.shares_storage(moved):
        x = planner.dense(x, ROW_MAJOR, node)
        moved = node.target(x.tensor, *rest, **node.kwargs)
    planner.alias(node, x.moved(moved))


def emit_clone(planner: Planner, node: fx.Node) -> None:
    planner.alias(node, planner.view(node.args[0]))


def emit_cat(planner: Planner, node: fx.Node) -> None:
    """Copies the parts that were not computed in place."""
    dim, start = argument(node, "dim"), 0
    whole = planner.whole(node)
    for part in node.args[0]:
        size = planner.shapes[part].shape[dim]
        if not planner.is_placed(part, node):
            planner.copy(planner.view(part), whole.moved(whole.tensor.narrow(dim, start, size)), node)
        start += size


def emit_pad(planner: Planner, node: fx.Node) -> None:
    """Fill everything with the border's value, then copy the inside."""
    x, pads, value = planner.view(node.args[0]).tensor, node.args[1], planner.constant(node.args[2])
    source, out = planner.view(node.args[0]), planner.output(node)
    loops, channels = planner.loops(out, [], (1,) if value.ndim else ())
    fill = structs.Fill(loops, planner.constants.per_channel(value, channels, "int32"), out.tensor.element_size(), 0)
    planner.step("fill", fill, [], out, node)
    inside = out.tensor
    first = x.ndim - len(pads) // 2
    for i, (before, after) in enumerate(zip(pads[0::2], pads[1::2], strict=True)):
        kept = x.shape[first + i] + min(before, 0) + min(after, 0)
        inside, x = inside.narrow(first + i, max(before, 0), kept), x.narrow(first + i, max(-before, 0), kept)
    planner.copy(source.moved(x), out.moved(inside), node)


def emit_index_select(planner: Planner, node: fx.Node) -> None:
    x, index = planner.view(node.args[0]), planner.constant(node.args[2])
    dim, out = node.args[1] % planner.rank(node), planner.output(node)
    source = torch.empty_strided(out.shape, x.strides, dtype=x.dtype, device="meta")  # element i stands for index[i]
    loops, _ = planner.loops(out, [x.moved(source)], (dim,))
    params = structs.Copy(loops, planner.constants.array(index, "int32"), loops.channel_dim, x.tensor.element_size())
    planner.step("copy", params, [x], out, node)


# ----------------------------------------------------------------------------------------------------- boundary


def emit_quantize(planner: Planner, node: fx.Node) -> None:
    scale, zero_point = planner.constant(node.args[1]), planner.constant(node.args[2])
    loops, channels, x, out = _one_input(planner, node, scale, zero_point)
    params = structs.Quantize(
        loops, planner.constants.per_channel((1.0 / scale).float(), channels, "float32"),
        planner.constants.per_channel(zero_point, channels, "int32"), node.args[3], node.args[4],
    )  # fmt: skip
    planner.step("quantize", params, [x, planner.counter("nan")], out, node)


def emit_dequantize(planner: Planner, node: fx.Node) -> None:
    scale, zero_point = planner.constant(node.args[1]), planner.constant(node.args[2])
    x, out = planner.view(node.args[0]), planner.output(node, ROW_MAJOR)
    loops, channels = planner.loops(out, [x], varying_dims(planner.rank(node), scale, zero_point))
    params = structs.Dequantize(
        loops, planner.constants.per_channel(scale, channels, "float64"),
        planner.constants.per_channel(zero_point, channels, "int32"), int(x.dtype == torch.int32), 0,
    )  # fmt: skip
    planner.step("dequantize", params, [x], out, node)
