"""Lower the qdq level to integer operators: scales become dyadic numbers, zero points move into biases.

    quantize(clamp(add(conv(dequantize(x), dequantize(w), b), dequantize(r))))
        ->  requantize([conv(x, w, b_q), widen(r)], multipliers s_x s_w / s_y, s_r / s_y; clamp in the code bounds)

One rule per operator, in ``RULES``; each maps the lowered inputs (``lowering.Value``) to a lowered result. Nothing is rounded
until a ``quantize`` node asks for codes, so every chain of fused operators has one rounding.

Source: Jacob et al. 2018, section 2.2-2.4; docs/numerics.md for the dyadic form.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from fxcompress import numerics
from fxcompress.analysis.quantization import is_function, keeps_float
from fxcompress.dialects import (
    ADAPTIVE_AVERAGE_POOLS, ADD, AVERAGE_POOLS, CAT, CLAMP, CONVOLUTIONS, LINEAR, MATMUL, MAX_POOLS, MOVEMENT, MUL, RESIZES,
    SUB, TRANSPOSED_CONVOLUTIONS, UNARY,
)  # fmt: skip
from fxcompress.errors import UnsupportedOperatorError
from fxcompress.graph import argument, calls, constant, is_constant, placeholders, rank, shape
from fxcompress.reference_kernels import linear_resize_tables
from fxcompress.lowering import Accumulator, Branch, Builder, Codes, Float, Function, Value, output_scale
from fxcompress.meta import QParams, along_axis, carry, place, tensor_meta
from fxcompress.options import context
from fxcompress.passes.quantize import is_encoded, rows
from fxcompress.rewrite import Effect, Fact, Level, Match, Pass, PassResult, Plan

aten, ops = torch.ops.aten, torch.ops.fxcompress
RESIZE_FRACTION_BITS = 10


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
            if node.target not in RULES and not is_function(node):
                raise UnsupportedOperatorError(f"{node.target} has no integer form", stage=self.name, where=place(node),
                                               remedy=f"keep_float=[{tensor_meta(node).origin.module!r}] leaves it in float.")  # fmt: skip
            plan.matches.append(Match(node, str(node.target)))
        return plan

    def apply(self, plan: Plan) -> PassResult:
        lowered = _Lowering(plan.graph_module).run()
        plan.applied = len(plan.matches)
        return PassResult(lowered, True)


class _Lowering:
    """One walk over the qdq graph; ``values`` maps its nodes to what they became."""

    def __init__(self, gm: fx.GraphModule):
        self.gm, self.build = gm, Builder(gm)
        self.values: dict[fx.Node, Value] = {}
        self.integer_io = context(gm).options.integer_io

    def run(self) -> fx.GraphModule:
        for node in self.gm.graph.nodes:
            self.build.origin = node
            if node.op == "placeholder":
                new = carry(node, self.build.graph.placeholder(node.target))
                self.values[node] = Float(new)
            elif node.op == "output":
                self._output(node)
            elif node.op == "call_function" and not is_encoded(node):
                self.values[node] = self._lower(node)
        return self.build.gm

    def _lower(self, node: fx.Node) -> Value:
        if keeps_float(node):
            return self._keep(node)
        if is_function(node):
            return self._function(node)
        return RULES[node.target](self, node)

    def _keep(self, node: fx.Node) -> Float:
        """Copy a keep_float node; its integer inputs leave the integers first."""

        def argument_of(a: fx.Node) -> fx.Node:
            if a in self.values:
                return self.build.to_float(self.values[a])
            return self.build.call_constant(constant(self.gm, a), a.target)

        new = self.build.graph.node_copy(node, argument_of)
        carry(node, new)
        new.meta["keep_float"] = True
        return Float(new)

    def _output(self, node: fx.Node) -> None:
        scales = []

        def leaf(a: fx.Node) -> fx.Node:
            self.build.origin = a
            value = self.values[a]
            if not self.integer_io or isinstance(value, Float):
                scales.append(None)
                return self.build.to_float(value)
            if isinstance(value, Codes):
                scales.append(value.qparams.broadcast(rank(a)))
                return value.node
            branch = self.build.to_single(value)
            scales.append((branch.scale, torch.zeros((), dtype=torch.int32)))
            return branch.node

        self.build.graph.output(fx.map_arg(node.args[0], leaf))
        gm = self.build.gm
        gm.meta["output_scales"] = scales
        if self.integer_io:  # from here on the graph is fed codes
            gm.meta["fxcompress"] = replace(context(gm), example_inputs=self._example_codes())

    def _example_codes(self) -> tuple[Tensor, ...]:
        codes = []
        for node, example in zip(placeholders(self.gm), context(self.gm).example_inputs, strict=True):
            q = next((tensor_meta(u).qparams for u in node.users if u.target is ops.quantize.default), None)
            codes.append(example if q is None else numerics.quantize(example, *q.broadcast(rank(node)), q.qmin, q.qmax))
        return tuple(codes)

    # -- quantize and dequantize

    def quantize(self, node: fx.Node) -> Codes:
        q = tensor_meta(node).qparams
        source = node.args[0]
        self.build.origin = source  # origin and statistics are those of the tensor, not of the node that rounds it
        value = self.values[source]
        if source.op == "placeholder" and self.integer_io:
            value.node.meta["val"] = value.node.meta["val"].to(q.dtype)
            return self.build.codes(value.node, q)
        return self.build.to_codes(value, q, node.name)

    def dequantize(self, node: fx.Node) -> Value:
        return self.values[node.args[0]]

    # -- operators with weights

    def weighted(self, node: fx.Node) -> Accumulator:
        x: Codes = self.values[node.args[0]]
        weight, w_scale = constant(self.gm, node.args[1].args[0]), tensor_meta(node.args[1]).qparams.scale
        q = x.qparams
        if q.axis is not None:
            raise UnsupportedOperatorError("a per-channel input scale", stage="lower_to_integer", where=place(node))
        scale = q.scale * w_scale
        weight_rows = rows(node, weight)
        bias = argument(node, "bias")
        bias = torch.round(constant(self.gm, bias).double() / scale) if bias is not None else torch.zeros_like(scale)
        largest = int(torch.maximum(q.zero_point - q.qmin, q.qmax - q.zero_point).max())
        bound = int((weight_rows.abs().sum(1) * largest + bias.abs()).max())
        if node.target in TRANSPOSED_CONVOLUTIONS:
            new = self._conv_transpose(node, x, weight, bias)
        else:  # the zero point moves into the bias: exact because padding is done with the zero point
            bias = bias - q.zero_point * weight_rows.sum(1)
            new = self._conv(node, x, weight, bias) if node.target in CONVOLUTIONS else self._linear(x, weight, bias)
        axis = -1 if node.target is LINEAR else 1
        return self._accumulate(node, new, along_axis(scale, axis, rank(node)), bound)

    def _conv(self, node: fx.Node, x: Codes, weight: Tensor, bias: Tensor) -> fx.Node:
        n = weight.ndim - 2
        stride, padding, dilation = (_per_dim(argument(node, a), n) for a in ("stride", "padding", "dilation"))
        sides = [p for p in padding for _ in range(2)]
        return self.build.call(ops.conv.default, x.node, weight, bias.to(torch.int32), stride, sides, dilation,
                               argument(node, "groups"), x.qparams.zero_point)  # fmt: skip

    def _linear(self, x: Codes, weight: Tensor, bias: Tensor) -> fx.Node:
        return self.build.call(ops.linear.default, x.node, weight, bias.to(torch.int32))

    def _conv_transpose(self, node: fx.Node, x: Codes, weight: Tensor, bias: Tensor) -> fx.Node:
        n = weight.ndim - 2
        stride, padding, extra, dilation = (
            _per_dim(argument(node, a), n) for a in ("stride", "padding", "output_padding", "dilation")
        )
        sides = [p for p in padding for _ in range(2)]
        return self.build.call(ops.conv_transpose.default, x.node, x.qparams.zero_point, weight, bias.to(torch.int32), stride, sides,
                               extra, dilation, argument(node, "groups"))  # fmt: skip

    def _accumulate(self, node: fx.Node, new: fx.Node, scale: Tensor, bound: int) -> Accumulator:
        chosen = tensor_meta(node).range
        magnitude = max(abs(v) for v in chosen.bounds) if chosen is not None else bound * float(scale.max())
        return Accumulator((Branch(new, scale, bound, magnitude),))

    # -- sums and products of activations

    def add(self, node: fx.Node) -> Accumulator:
        branches = []
        for i, operand in enumerate(node.args[:2]):
            value = self._constant_branch(operand) if is_constant(operand) else self.values[operand]
            sign = -1.0 if i == 1 and node.target is SUB else 1.0
            branches += Accumulator(self.build.branches(value)).scaled(sign).branches
        return Accumulator(tuple(branches))

    def _constant_branch(self, node: fx.Node) -> Accumulator:
        value = constant(self.gm, node).double()
        magnitude = float(value.abs().max())
        scale = torch.tensor(magnitude * 2.0**-20 or 1.0, dtype=torch.float64)
        codes = self.build.call_constant(torch.round(value / scale).to(torch.int32), f"{node.target}_codes")
        return Accumulator((Branch(codes, scale, 1 << 20, magnitude),))

    def product(self, node: fx.Node) -> Accumulator:
        a, b = (self._operand(arg) for arg in node.args[:2])
        op = ops.matmul.default if node.target is MATMUL else ops.mul.default
        terms = shape(node.args[0])[-1] if node.target is MATMUL else 1
        new = self.build.call(op, a.node, a.qparams.zero_point, b.node, b.qparams.zero_point)
        return self._accumulate(node, new, a.qparams.scale * b.qparams.scale, int(terms) * _largest(a) * _largest(b))

    def _operand(self, node: fx.Node) -> Codes:
        if not is_encoded(node):
            return self.values[node]
        codes = constant(self.gm, node.args[0])
        return Codes(self.build.call_constant(codes, node.args[0].target), tensor_meta(node).qparams)

    # -- pooling and resizing

    def average_pool(self, node: fx.Node) -> Accumulator:
        x: Codes = self.values[node.args[0]]
        n = rank(node) - 2
        kernel, padding = (_per_dim(argument(node, a), n) for a in ("kernel_size", "padding"))
        stride = _per_dim(argument(node, "stride"), n) or kernel
        sides = [side for d in range(n) for side in _sides(shape(node.args[0])[2 + d], shape(node)[2 + d], kernel[d], stride[d], padding[d])]
        zero = torch.zeros((), dtype=torch.int32)
        ones = torch.ones(1, 1, *shape(node.args[0])[2:])
        counts = ops.sum_pool(ones.to(torch.uint8), zero, kernel, stride, sides)
        averages = node.target(ones, *node.args[1:], **node.kwargs).double()  # what aten divides by is its own affair
        divisor = torch.round(counts / averages)
        new = self.build.call(ops.sum_pool.default, x.node, x.qparams.zero_point, kernel, stride, sides)
        return self._average(node, x, new, divisor, int(torch.tensor(kernel).prod()))

    def adaptive_average_pool(self, node: fx.Node) -> Accumulator:
        x: Codes = self.values[node.args[0]]
        n = rank(node) - 2
        size = list(shape(node)[-n:])
        zero = torch.zeros((), dtype=torch.int32)
        divisor = ops.adaptive_sum_pool(torch.ones(1, 1, *shape(node.args[0])[2:], dtype=torch.uint8), zero, size).double()
        new = self.build.call(ops.adaptive_sum_pool.default, x.node, x.qparams.zero_point, size)
        return self._average(node, x, new, divisor, int(divisor.max()))

    def mean(self, node: fx.Node) -> Accumulator:
        x: Codes = self.values[node.args[0]]
        dims, keepdim = argument(node, "dim"), argument(node, "keepdim")
        divisor = torch.tensor([shape(node.args[0])[d] for d in dims], dtype=torch.float64).prod()
        new = self.build.call(ops.sum.default, x.node, x.qparams.zero_point, list(dims), keepdim)
        return self._average(node, x, new, divisor, int(divisor))

    def _average(self, node: fx.Node, x: Codes, new: fx.Node, divisor: Tensor, count: int) -> Accumulator:
        divisor = divisor.flatten()[0] if bool((divisor == divisor.flatten()[0]).all()) else divisor.squeeze(0).squeeze(0)
        return self._accumulate(node, new, x.qparams.scale / divisor, count * _largest(x))

    def resize(self, node: fx.Node) -> Accumulator:
        x: Codes = self.values[node.args[0]]
        n = rank(node) - 2
        factors = argument(node, "scale_factors") or [None] * n
        tables = [
            linear_resize_tables(shape(node.args[0])[2 + d], shape(node)[2 + d], argument(node, "align_corners"), factors[d],
                                 RESIZE_FRACTION_BITS)
            for d in range(n)
        ]  # fmt: skip
        index0, index1, weight1 = (list(column) for column in zip(*tables, strict=True))
        new = self.build.call(ops.resize.default, x.node, x.qparams.zero_point, index0, index1, weight1, RESIZE_FRACTION_BITS)
        gain = 1 << (RESIZE_FRACTION_BITS * n)
        return self._accumulate(node, new, x.qparams.scale / gain, gain * _largest(x))

    def max_pool(self, node: fx.Node) -> Codes:
        x: Codes = self.values[node.args[0]]
        n = rank(node) - 2
        kernel, padding, dilation = (_per_dim(argument(node, a), n) for a in ("kernel_size", "padding", "dilation"))
        stride = _per_dim(argument(node, "stride"), n) or kernel
        extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        sides = [side for d in range(n) for side in _sides(shape(node.args[0])[2 + d], shape(node)[2 + d], extent[d], stride[d], padding[d])]
        return self.build.codes(self.build.call(ops.max_pool.default, x.node, kernel, stride, sides, dilation), x.qparams)

    # -- data movement

    def movement(self, node: fx.Node) -> Codes | Accumulator:
        value = self.values[node.args[0]]
        if isinstance(value, Codes):
            return self.build.codes(self._move(node, value.node, value.qparams), _moved(value.qparams, node))
        return self._move_accumulator(node, value)

    def _move(self, node: fx.Node, x: fx.Node, q: QParams | None) -> fx.Node:
        if node.target is aten.constant_pad_nd.default:
            _, pads, value = (*node.args, 0)[:3]
            sides = [p for d in reversed(range(len(pads) // 2)) for p in pads[2 * d : 2 * d + 2]]
            code = numerics.quantize_offline(torch.tensor(float(value)), q.scale, q.zero_point, q.qmin, q.qmax)
            return self.build.call(ops.pad.default, x, sides, code)
        rest = [constant(self.gm, a) if is_constant(a) else a for a in node.args[1:]]
        return self.build.call(node.target, x, *rest)

    def pad_channels(self, node: fx.Node) -> Codes:
        x: Codes = self.values[node.args[0]]
        q = x.qparams
        codes = numerics.quantize_offline(constant(self.gm, node.args[2]), q.scale, q.zero_point, q.qmin, q.qmax)
        return self.build.codes(self.build.call(ops.pad.default, x.node, list(node.args[1]), codes), q)

    def _move_accumulator(self, node: fx.Node, value: Accumulator | Function) -> Accumulator:
        """Move an unrounded graph output: its per-channel scale moves along."""
        branch = self.build.to_single(value)
        pads = node.target is aten.constant_pad_nd.default
        if pads and branch.scale.numel() > 1:
            branch = self.build.rescale((branch,), output_scale((branch,)))
        unit = QParams(branch.scale, torch.zeros((), dtype=torch.int32), numerics.INT32_MIN, numerics.INT32_MAX)
        new = self._move(node, branch.node, unit)
        scale = branch.scale
        if scale.numel() > 1:
            rest = [constant(self.gm, a) if is_constant(a) else a for a in node.args[1:]]
            scale = node.target(scale.expand(1, *shape(node.args[0])[1:]), *rest)
        return Accumulator((Branch(new, scale, branch.bound, branch.magnitude),))

    def cat(self, node: fx.Node) -> Codes | Accumulator:
        parts = [self.values[a] for a in node.args[0]]
        dim = argument(node, "dim")
        if all(isinstance(p, Codes) for p in parts):
            return self.build.codes(self.build.call(aten.cat.default, [p.node for p in parts], dim), parts[0].qparams)
        singles = [self.build.to_single(p) for p in parts]
        scale = output_scale(tuple(singles))
        moved = [self.build.rescale((b,), scale) for b in singles]
        new = self.build.call(aten.cat.default, [b.node for b in moved], dim)
        return Accumulator((Branch(new, moved[0].scale, max(b.bound for b in moved), max(b.magnitude for b in moved)),))

    # -- elementwise functions

    def _function(self, node: fx.Node) -> Accumulator | Function:
        (source,) = node.all_input_nodes
        value = self.values[source]
        if node.target is CLAMP and isinstance(value, Accumulator):
            return value.clamp(argument(node, "min"), argument(node, "max"))

        def apply(real: Tensor) -> Tensor:
            args = [real if a is source else a for a in node.args]
            return node.target(*args, **node.kwargs)

        return Function(value, apply)


def _per_dim(value, n: int) -> list[int]:
    """An operator's int or int list as one number per spatial dimension ([] stays [])."""
    value = [value] if isinstance(value, int) else list(value)
    return value * n if len(value) == 1 else value


def _sides(size: int, out: int, extent: int, stride: int, before: int) -> tuple[int, int]:
    """(before, after) padding of one dimension such that exactly ``out`` windows fit: ceil_mode is resolved here."""
    return before, max(0, (out - 1) * stride + extent - size - before)


def _largest(codes: Codes) -> int:
    q = codes.qparams
    return int(torch.maximum(q.zero_point - q.qmin, q.qmax - q.zero_point).max())


def _moved(q: QParams, node: fx.Node) -> QParams:
    return q if q.axis is None else tensor_meta(node).qparams


RULES = (
    dict.fromkeys(CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | {LINEAR}, _Lowering.weighted)
    | dict.fromkeys(AVERAGE_POOLS, _Lowering.average_pool)
    | dict.fromkeys(ADAPTIVE_AVERAGE_POOLS, _Lowering.adaptive_average_pool)
    | dict.fromkeys(MAX_POOLS, _Lowering.max_pool)
    | dict.fromkeys(MOVEMENT, _Lowering.movement)
    | dict.fromkeys(RESIZES, _Lowering.resize)
    | dict.fromkeys((ADD, SUB), _Lowering.add)
    | dict.fromkeys((MUL, MATMUL), _Lowering.product)
    | dict.fromkeys(UNARY | {CLAMP}, _Lowering._function)
    | {
        aten.mean.dim: _Lowering.mean,
        CAT: _Lowering.cat,
        ops.quantize.default: _Lowering.quantize,
        ops.dequantize.default: _Lowering.dequantize,
        ops.pad.default: _Lowering.pad_channels,
    }
)
