"""Lowering rules for data movement: codes keep their values, unrounded graph outputs take their scale along."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress import numerics
from fxcompress.graph import argument, constant, is_constant, one_sample_shape, shape
from fxcompress.lowering.state import State
from fxcompress.lowering.values import Accumulator, Branch, Codes, Function, output_scale
from fxcompress.meta import QParams, tensor_meta

aten, ops = torch.ops.aten, torch.ops.fxcompress


def movement(state: State, node: fx.Node) -> Codes | Accumulator:
    value = state.values[node.args[0]]
    if isinstance(value, Codes):
        q = _moved(value.qparams, node)
        return state.build.codes(_move(state, node, value.node, q), q)
    return _move_accumulator(state, node, value)


def _move(state: State, node: fx.Node, x: fx.Node, q: QParams | None) -> fx.Node:
    if node.target is aten.constant_pad_nd.default:
        _, pads, value = (*node.args, 0)[:3]
        sides = [p for d in reversed(range(len(pads) // 2)) for p in pads[2 * d : 2 * d + 2]]
        code = numerics.quantize_offline(torch.tensor(float(value)), q.scale, q.zero_point, q.qmin, q.qmax)
        return state.build.call(ops.pad.default, x, sides, code)
    rest = [constant(state.gm, a) if is_constant(a) else a for a in node.args[1:]]
    return state.build.call(node.target, x, *rest)


def pad_channels(state: State, node: fx.Node) -> Codes:
    x: Codes = state.values[node.args[0]]
    q = x.qparams
    codes = numerics.quantize_offline(constant(state.gm, node.args[2]), q.scale, q.zero_point, q.qmin, q.qmax)
    return state.build.codes(state.build.call(ops.pad.default, x.node, list(node.args[1]), codes), q)


def _move_accumulator(state: State, node: fx.Node, value: Accumulator | Function) -> Accumulator:
    """Move an unrounded graph output: its per-channel scale moves along."""
    branch = state.build.to_single(value)
    scale = _moved_scale(state, node, branch.scale)
    if scale is None:
        branch = state.build.rescale((branch,), output_scale((branch,)))
        scale = branch.scale
    unit = QParams(branch.scale, torch.zeros((), dtype=torch.int32), numerics.INT32_MIN, numerics.INT32_MAX)
    new = _move(state, node, branch.node, unit)
    return Accumulator((Branch(new, scale, branch.bound, branch.largest),))


def _moved_scale(state: State, node: fx.Node, scale: Tensor) -> Tensor | None:
    """The scale of the result, None where one tensor cannot tell: padding has none, a merged batch repeats it."""
    if scale.numel() == 1:
        return scale
    if node.target is aten.constant_pad_nd.default:
        return None
    rest = [constant(state.gm, a) if is_constant(a) else a for a in node.args[1:]]
    moved = node.target(scale.expand(one_sample_shape(node.args[0])), *rest)
    for dim, size in enumerate(shape(node)):
        if isinstance(size, torch.SymInt):
            if not bool((moved == moved.narrow(dim, 0, 1)).all()):
                return None
            moved = moved.narrow(dim, 0, 1)
    return moved


def cat(state: State, node: fx.Node) -> Codes | Accumulator:
    parts = [state.values[a] for a in node.args[0]]
    dim = argument(node, "dim")
    if all(isinstance(p, Codes) for p in parts):
        q = tensor_meta(node).qparams or parts[0].qparams
        return state.build.codes(state.build.call(aten.cat.default, [p.node for p in parts], dim), q)
    singles = [state.build.to_single(p) for p in parts]
    scale = output_scale(tuple(singles))
    moved = [state.build.rescale((b,), scale) for b in singles]
    new = state.build.call(aten.cat.default, [b.node for b in moved], dim)
    return Accumulator((Branch(new, moved[0].scale, max(b.bound for b in moved), max(b.largest for b in moved)),))


def _moved(q: QParams, node: fx.Node) -> QParams:
    """What the codes stand for after a movement: scales per channel (``spiq``) move along."""
    return q if q.axis is None else tensor_meta(node).qparams
