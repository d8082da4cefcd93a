"""Lower the qdq level to integer operators: scales become dyadic numbers, zero points move into biases.

    quantize(clamp(add(conv(dequantize(x), dequantize(w), b), dequantize(r))))
        ->  requantize([conv(x, w, b_q), widen(r)], multipliers s_x s_w / s_y, s_r / s_y; clamp in the code bounds)

One rule per operator, in ``RULES`` (the functions are in the modules ``_lower_*``); each
maps the lowered inputs (``lowering.values``) to a lowered result. Nothing is rounded
until a ``quantize`` node asks for codes, so every chain of fused operators has one rounding.

Source: Jacob et al. 2018, section 2.2-2.4; docs/numerics.md for the dyadic form.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from fxcompress import numerics
from fxcompress.analysis.encoded_weights import is_encoded
from fxcompress.analysis.quantization import is_function, is_scaling, keeps_float
from fxcompress.dialects import (
    ADAPTIVE_AVERAGE_POOLS,
    ADAPTIVE_MAX_POOL,
    ADD,
    AVERAGE_POOLS,
    CAT,
    CHANNEL_CLAMP,
    CLAMP,
    CONVOLUTIONS,
    INDEXING,
    LINEAR,
    MATMUL,
    MAX_POOLS,
    MOVEMENT,
    MUL,
    RESIZES,
    SUB,
    TRANSPOSED_CONVOLUTIONS,
)  # fmt: skip
from fxcompress.errors import UnsupportedOperatorError
from fxcompress.graph import argument, bounds, calls, constant, is_float, placeholders, rank
from fxcompress.lowering.state import State
from fxcompress.lowering.values import Accumulator, Codes, Float, Function, Index, Value
from fxcompress.meta import carry, place, tensor_meta
from fxcompress.options import context
from fxcompress.rewrite import Effect, Fact, Level, Match, Pass, PassResult, Plan

from . import _lower_movement as movement
from . import _lower_normalization as normalization
from . import _lower_pooling as pooling
from . import _lower_sums as sums

aten, ops = torch.ops.aten, torch.ops.fxcompress


class LowerToInteger(Pass):
    name = "lower_to_integer"
    level = Level.QDQ
    result_level = Level.INTEGER
    effect = Effect.LOSSY
    source = "Jacob et al. 2018, section 2.2; docs/numerics.md"
    needs = {Fact.QUANTIZED}
    establishes = {Fact.LOWERED}
    atomic = True  # a half-lowered graph is no level

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan = Plan(self.name, gm)
        if not any(calls(gm, ops.quantize.default)):
            return plan
        for node in gm.graph.nodes:
            if node.op != "call_function" or keeps_float(node) or node.target is ops.dequantize.default:
                continue
            if is_float(node) and node.target not in RULES and not is_function(node):
                raise UnsupportedOperatorError(f"{node.target} has no integer form", stage=self.name, where=place(node),
                                               remedy=f"keep_float=[{tensor_meta(node).origin.module!r}] leaves it in float.")  # fmt: skip
            plan.matches.append(Match(node, str(node.target)))
        return plan

    def apply(self, plan: Plan) -> PassResult:
        lowered = _lower(plan.graph_module)
        plan.applied = len(plan.matches)
        return PassResult(lowered, True)


def _lower(gm: fx.GraphModule) -> fx.GraphModule:
    """The integer graph: every node of ``gm`` in order, through its rule."""
    state = State(gm)
    for node in gm.graph.nodes:
        state.build.origin = node
        if node.op == "placeholder":
            kind = Float if is_float(node) else Index
            state.values[node] = kind(carry(node, state.build.graph.placeholder(node.target)))
        elif node.op == "output":
            _output(state, node)
        elif node.op == "call_function" and not is_encoded(node):
            state.values[node] = _rule(node)(state, node)
    return state.build.gm


def _rule(node: fx.Node):
    if keeps_float(node):
        return _keep
    if node.target in INDEXING and not is_float(node):
        return normalization.index
    return _function if is_function(node) else RULES[node.target]


def _keep(state: State, node: fx.Node) -> Float:
    """Copy a keep_float node; its integer inputs leave the integers first."""

    def argument_of(a: fx.Node) -> fx.Node:
        if a in state.values:
            state.build.origin = a  # the shape is that of the argument
            real = state.build.to_float(state.values[a])
            state.build.origin = node
            return real
        return state.build.call_constant(constant(state.gm, a), a.target)

    new = state.build.graph.node_copy(node, argument_of)
    carry(node, new)
    new.meta["keep_float"] = True
    return Float(new)


def _output(state: State, node: fx.Node) -> None:
    scales = []

    def leaf(a: fx.Node) -> fx.Node:
        state.build.origin = a
        value = state.values[a]
        if isinstance(value, Index):
            scales.append(None)
            return value.node
        if not state.integer_io or isinstance(value, Float):
            scales.append(None)
            return state.build.to_float(value)
        if isinstance(value, Codes):
            scales.append(value.qparams.broadcast(rank(a)))
            return value.node
        branch = state.build.to_single(value)
        scales.append((branch.scale, torch.zeros((), dtype=torch.int32)))
        return branch.node

    state.build.graph.output(fx.map_arg(node.args[0], leaf))
    gm = state.build.gm
    gm.meta["output_scales"] = scales
    if state.integer_io:  # from here on the graph is fed codes
        gm.meta["fxcompress"] = replace(context(gm), example_inputs=_example_codes(state))


def _example_codes(state: State) -> tuple[Tensor, ...]:
    codes = []
    for node, example in zip(placeholders(state.gm), context(state.gm).example_inputs, strict=True):
        q = next((tensor_meta(u).qparams for u in node.users if u.target is ops.quantize.default), None)
        codes.append(example if q is None else numerics.quantize(example, *q.broadcast(rank(node)), q.qmin, q.qmax))
    return tuple(codes)


def _quantize(state: State, node: fx.Node) -> Codes:
    q = tensor_meta(node).qparams
    source = node.args[0]
    state.build.origin = source  # origin and statistics are those of the tensor, not of the node that rounds it
    value = state.values[source]
    if source.op == "placeholder" and state.integer_io:
        value.node.meta["val"] = value.node.meta["val"].to(q.dtype)
        return state.build.codes(value.node, q)
    return state.build.to_codes(value, q, node.name)


def _dequantize(state: State, node: fx.Node) -> Value:
    return state.values[node.args[0]]


def _channel_clamp(state: State, node: fx.Node) -> Accumulator:
    return state.build.to_accumulator(state.values[node.args[0]]).clamp(*bounds(state.gm, node))


def _function(state: State, node: fx.Node) -> Accumulator | Function:
    (source,) = node.all_input_nodes
    value = state.values[source]
    if is_scaling(node) and isinstance(value, Accumulator):
        return state.scale(node, value, float(node.args[1]))
    if node.target is CLAMP and isinstance(value, Accumulator):
        return value.clamp(argument(node, "min"), argument(node, "max"))

    def apply(real: Tensor) -> Tensor:
        args = [real if a is source else a for a in node.args]
        return node.target(*args, **node.kwargs)

    if isinstance(value, Function):
        return Function(value.codes, lambda real: apply(value.apply(real)))
    return Function(value, apply)


RULES = (
    dict.fromkeys(CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | {LINEAR}, sums.weighted)
    | dict.fromkeys((ADD, SUB), sums.add)
    | dict.fromkeys((MUL, MATMUL), sums.product)
    | dict.fromkeys(AVERAGE_POOLS, pooling.average_pool)
    | dict.fromkeys(ADAPTIVE_AVERAGE_POOLS, pooling.adaptive_average_pool)
    | dict.fromkeys(MAX_POOLS, pooling.max_pool)
    | dict.fromkeys(RESIZES, pooling.resize)
    | dict.fromkeys(MOVEMENT, movement.movement)
    | normalization.RULES
    | {
        ADAPTIVE_MAX_POOL: pooling.adaptive_max_pool,
        aten.mean.dim: pooling.mean,
        CAT: movement.cat,
        CHANNEL_CLAMP: _channel_clamp,
        ops.pad.default: movement.pad_channels,
        ops.quantize.default: _quantize,
        ops.dequantize.default: _dequantize,
    }
)
