"""Quantize: put quantize/dequantize pairs around every tensor that becomes 8-bit codes, and integer codes for weights.

    conv(x, w)   ->   conv(dequantize(quantize(x)), dequantize(w_q))

Activations: unsigned affine codes of the range that ``assign_ranges`` chose, one scale per tied set. Weights: signed,
symmetric, per output channel, ``s = max|w| / B``; a nearly dead row gets a larger scale so that its bias and shift stay
representable: ``s_w s_x >= max(|b| 2^-28, s_y 2^-24)``. Accumulators that flow into a clamp, an addition or a graph output
stay unrounded.

Source: Jacob et al. 2018, section 2.1-2.2; row guard: docs/numerics.md.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fxcompress import numerics
from fxcompress.analysis.encoded_weights import from_rows, kernel_taps, layer_quantizer, rows
from fxcompress.analysis.layer_weights import scale_inputs
from fxcompress.analysis.quantization import QuantizationPoints, keeps_float
from fxcompress.dialects import MATMUL, MUL, TRANSPOSED_CONVOLUTIONS, WEIGHTED
from fxcompress.graph import add_constant, argument, calls, constant, is_call, is_constant, make_graph_module, rank
from fxcompress.meta import QParams, Range, along_axis, describe, inherit_origin, tensor_meta
from fxcompress.options import context
from fxcompress.rewrite import Effect, Fact, Level, Match, Pass, PassResult, Plan, Reject
from fxcompress.weight_quantizers import QUANTIZERS

ops = torch.ops.fxcompress
INPUT_BITS = 8  # a graph input is data, not a hidden activation: its width is not the target's to cut


@dataclass
class _Activation:
    """Cut behind ``node``; ``readers`` are the users that read codes."""

    node: fx.Node
    qparams: QParams
    readers: list[fx.Node]


@dataclass
class _Constant:
    """Replace argument ``index`` of ``user``, a constant, by integer codes with ``qparams``.

    ``input_scale`` (I,): the codes that a layer reads have a scale per channel. It becomes part of the weight: ``qparams``
    and the codes are those of ``W[:, c] * input_scale[c]``, and their scale is that of the accumulators.
    """

    user: fx.Node
    index: int
    qparams: QParams
    input_scale: Tensor | None = None


class Quantize(Pass):
    name = "quantize"
    level = Level.FLOAT
    result_level = Level.QDQ
    effect = Effect.LOSSY
    source = "Jacob et al. 2018, eq. 1-5"
    needs = {Fact.RANGES}
    establishes = {Fact.QUANTIZED}

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan = Plan(self.name, gm)
        if any(calls(gm, ops.quantize.default)):  # already cut
            return plan
        points = QuantizationPoints(gm)
        qparams = self._activation_qparams(gm, points)
        for node in points.codes:
            readers = [
                u for u in node.users if not points.reads_raw(node, u) and not (keeps_float(node) and keeps_float(u))
            ]
            if readers:
                edit = _Activation(node, qparams[node], readers)
                plan.matches.append(Match(node, _summary(qparams[node]), edit))
        for node in gm.graph.nodes:
            if keeps_float(node):
                plan.rejects.append(Reject("keep_float names its module", node))
            elif is_call(node, *WEIGHTED):
                weight = self._weight_qparams(gm, node, qparams, points)
                edit = _Constant(node, 1, weight, _channel_scale(qparams[node.args[0]]))
                plan.matches.append(Match(node, "weight " + _summary(weight), edit))
            elif is_call(node, MUL, MATMUL):
                plan.matches += [self._constant_operand(gm, node, i) for i in (0, 1) if is_constant(node.args[i])]
        return plan

    def _constant_operand(self, gm: fx.GraphModule, node: fx.Node, index: int) -> Match:
        value = constant(gm, node.args[index])
        q = numerics.affine_qparams(float(value.min()), float(value.max()), 8)
        return Match(node, "constant operand " + _summary(q), _Constant(node, index, q))

    def apply(self, plan: Plan) -> PassResult:
        gm = plan.graph_module
        before = make_graph_module(gm, copy.deepcopy(gm.graph))
        gm.meta["fxcompress"] = replace(context(gm), float_graph=before)
        for match in plan.matches:
            edit = match.data
            _cut(gm, edit) if isinstance(edit, _Activation) else _encode_constant(gm, edit)
            plan.applied += 1
        return PassResult(gm, plan.applied > 0)

    def _activation_qparams(self, gm: fx.GraphModule, points: QuantizationPoints) -> dict[fx.Node, QParams]:
        bits = context(gm).options.target.activation_bits
        chosen = {}
        for tied in points.tied_sets():
            if any(tensor_meta(n).qparams is not None for n in tied):  # of each channel, chosen by spiq
                chosen |= {n: tensor_meta(n).qparams for n in tied}
                continue
            lo, hi = _union([_range(n) for n in points.sources(tied)])
            width = INPUT_BITS if any(n.op == "placeholder" for n in tied) else bits
            chosen |= dict.fromkeys(tied, numerics.affine_qparams(lo, hi, width))
        return chosen

    def _weight_qparams(self, gm, node, qparams: dict[fx.Node, QParams], points: QuantizationPoints) -> QParams:
        q = qparams[node.args[0]]
        weight = rows(node, folded_weight(node, constant(gm, node.args[1]), _channel_scale(q)))
        bits = context(gm).options.target.weight_bits
        s_x = q.scale if q.axis is None else 1.0
        floor = torch.zeros(weight.shape[0], dtype=torch.float64)
        if (bias := argument(node, "bias")) is not None:
            floor = constant(gm, bias).double().abs() / numerics.MAX_BIAS_CODE
        if (destination := points.destination(node)) is not None:
            floor = torch.maximum(floor, qparams[destination].scale * numerics.MIN_ACCUMULATOR_SCALE)
        largest = weight.abs().amax(1)
        if context(gm).options.weight_granularity == "tensor":
            largest, floor = largest.max().expand_as(largest), floor.max().expand_as(floor)
        limit = QUANTIZERS[context(gm).options.weight_quantizer or "nearest"].largest(bits)
        scale = torch.maximum(numerics.symmetric_scale(largest, limit), floor / s_x)
        if q.axis is not None:  # of a row of zeros: in units of its output, not of one
            scale = torch.where((largest == 0) & (floor > 0), floor, scale)
        axis = 1 if node.target in TRANSPOSED_CONVOLUTIONS else 0
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), -limit, limit, axis)


def _channel_scale(q: QParams) -> Tensor | None:
    """The scales (C,) of codes that have one per channel."""
    return None if q.axis is None else q.scale


def folded_weight(node: fx.Node, weight: Tensor, input_scale: Tensor | None) -> Tensor:
    """The weight, float64, that multiplies codes instead of what they stand for: ``W[:, c] * input_scale[c]``."""
    return weight.double() if input_scale is None else scale_inputs(node, weight.double(), input_scale)


def weight_scale(node: fx.Node, scale: Tensor, weight: Tensor) -> Tensor:
    """Per-output-channel scale (O,) shaped to broadcast against the stored weight."""
    if node.target not in TRANSPOSED_CONVOLUTIONS:
        return along_axis(scale, 0, weight.ndim)
    groups = argument(node, "groups")
    per_input = scale.reshape(groups, 1, weight.shape[1]).expand(-1, weight.shape[0] // groups, -1)
    return per_input.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))


def _range(node: fx.Node) -> Range:
    chosen = tensor_meta(node).range
    if chosen is None:
        raise RuntimeError(f"{node.name} has no range: assign_ranges must run first")
    return chosen


def _union(ranges: list[Range]) -> tuple[float, float]:
    bounds = [r.bounds for r in ranges]
    return min(lo for lo, _ in bounds), max(hi for _, hi in bounds)


def _summary(q: QParams) -> str:
    if q.axis is None:
        lo, hi = (float(q.scale) * (code - int(q.zero_point)) for code in (q.qmin, q.qmax))
        return f"codes {q.qmin}..{q.qmax} for [{lo:.5g}, {hi:.5g}], scale {float(q.scale):.6g}, zero point {int(q.zero_point)}"
    return f"codes {q.qmin}..{q.qmax}, {len(q.scale)} scales {float(q.scale.min()):.4g}..{float(q.scale.max()):.4g}"


def _cut(gm: fx.GraphModule, edit: _Activation) -> None:
    node, q = edit.node, edit.qparams
    scale, zero_point = q.broadcast(rank(node))
    with gm.graph.inserting_after(node):
        scale_node = add_constant(gm, f"{node.name}_scale", scale, node)
    with gm.graph.inserting_after(scale_node):
        zero_node = add_constant(gm, f"{node.name}_zero_point", zero_point, node)
    with gm.graph.inserting_after(zero_node):
        codes = _call(gm, ops.quantize.default, (node, scale_node, zero_node, q.qmin, q.qmax), f"{node.name}_q")
    with gm.graph.inserting_after(codes):
        real = _call(gm, ops.dequantize.default, (codes, scale_node, zero_node), f"{node.name}_dq")
    for new in (codes, real):
        describe(inherit_origin(node, new), qparams=q, range=tensor_meta(node).range)
    for reader in edit.readers:
        reader.replace_input_with(node, real)


def _call(gm: fx.GraphModule, op, args: tuple, name: str) -> fx.Node:
    return gm.graph.create_node("call_function", op, args, name=name)


def _encode_constant(gm: fx.GraphModule, edit: _Constant) -> None:
    q, user, source = edit.qparams, edit.user, edit.user.args[edit.index]
    value = folded_weight(user, constant(gm, source), edit.input_scale)
    scale = weight_scale(user, q.scale, value) if q.axis is not None else q.scale
    zero_point = torch.zeros((), dtype=torch.int32) if q.axis is not None else q.zero_point
    codes = _codes(gm, edit, value, scale, zero_point)
    if edit.input_scale is not None:  # the qdq level stays in real units: codes * scale is the weight before the fold
        scale = scale_inputs(user, scale.expand(*value.shape[:2], *scale.shape[2:]), 1 / edit.input_scale)
    with gm.graph.inserting_before(user):
        code_node = add_constant(gm, f"{source.target}_codes", codes, user)
        scale_node = add_constant(gm, f"{source.target}_scale", scale, user)
        zero_node = add_constant(gm, f"{source.target}_zero_point", zero_point, user)
        real = _call(gm, ops.dequantize.default, (code_node, scale_node, zero_node), f"{source.name}_dq")
    describe(code_node, qparams=q)
    describe(inherit_origin(user, real), qparams=q)
    user.update_arg(edit.index, real)


def _codes(gm: fx.GraphModule, edit: _Constant, value: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The constant in integers: weights by the quantizer the user chose, other operands to the nearest code."""
    q, user = edit.qparams, edit.user
    if user.target not in WEIGHTED:
        return numerics.quantize_offline(value, scale, zero_point, q.qmin, q.qmax).to(q.dtype)
    v, bits = rows(user, value.double() / scale), context(gm).options.target.weight_bits
    codes = layer_quantizer(gm, user).encode(v, kernel_taps(value), bits)
    return from_rows(user, codes, value)
