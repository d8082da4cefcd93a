"""Convolve in tiles: 3x3 convolutions of stride 1 with 2.25 or 4 times fewer multiplications, bit for bit the same.

    conv(x, W, b)   ->   tiles of x (index_select, reshape, permute)
                         bilinear_linear(tiles, operands of W, scale b) = scale (W x + b)      programs of the algorithm
                         reshape, permute, slice; rescale by 1 / scale, which is exact

A tile is a row of t t C codes and its results are a row of m m O accumulators, so that the convolution is a product in blocks
(``reference_bilinear``) whose programs are the algorithm's transforms: it has the same proof, the same kernels and the same
report. The last tiles of a size that is no multiple of m repeat the last pixels, and their surplus results are cut off.

What has to fit: the operands int16, and scale times the accumulator int32, for any codes; products and sums on the way may wrap.

Level: integer. Effect: EXACT (compared bit for bit by the pass manager; verify multiplies the algorithm out again).
Source: Winograd 1980; Lavin and Gray 2016; docs/bilinear.md.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fxcompress.analysis.interval_arithmetic import bits_needed, combinations_of, exactly
from fxcompress.block_products import ALGORITHM, DEFINITION, Definition
from fxcompress.graph import ConstantPool, add_constant, argument, calls, constant, one_sample_shape
from fxcompress.meta import describe, inherit_origin, tensor_meta
from fxcompress.options import context
from fxcompress.rewrite import Effect, Fact, Level, Match, Pass, PassResult, Plan, Reject
from fxcompress.tile_convolution import CONV_ALGORITHMS, ConvolutionAlgorithm, exact_division

aten, ops = torch.ops.aten, torch.ops.fxcompress
INT16 = 1 << 15


class ConvolveInTiles(Pass):
    """See the module."""

    name = "convolve_in_tiles"
    level = Level.INTEGER
    effect = Effect.EXACT
    source = "Winograd 1980; Lavin and Gray 2016; docs/bilinear.md"
    needs = frozenset({Fact.LOWERED})

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan, wanted = Plan(self.name, gm), context(gm).options.conv_algorithm
        if wanted == "direct":
            return plan
        algorithms = list(CONV_ALGORITHMS.values()) if wanted == "auto" else [CONV_ALGORITHMS[wanted]]
        for node in calls(gm, ops.conv.default):
            refused = {a: _refusal(gm, node, a) for a in algorithms}
            fitting = [a for a, reason in refused.items() if reason is None]
            if fitting:
                best = min(fitting, key=lambda a: _multiplications(node, a))
                plan.matches.append(Match(node, _summary(node, best), best))
            else:
                plan.rejects.append(Reject("; ".join(dict.fromkeys(refused.values())), node))
        return plan

    def apply(self, plan: Plan) -> PassResult:
        writer = _Writer(plan.graph_module)
        for match in plan.matches:
            writer.rewrite(match.node, match.data)
            plan.applied += 1
        return PassResult(plan.graph_module, plan.applied > 0)


def _refusal(gm: fx.GraphModule, node: fx.Node, algorithm: ConvolutionAlgorithm) -> str | None:
    """Why a convolution cannot be computed by this algorithm."""
    kernel, taps = one_sample_shape(argument(node, "weight"))[2:], algorithm.taps
    if kernel != [taps, taps]:
        return f"its kernel is {' x '.join(map(str, kernel))}"
    for name, usual in (("stride", 1), ("dilation", 1)):
        if any(step != usual for step in argument(node, name)):
            return f"its {name} is {' x '.join(map(str, argument(node, name)))}"
    if argument(node, "groups") != 1:
        return "it has groups"
    if _multiplications(node, algorithm) >= _definition(node).multiplications:
        height, width = one_sample_shape(node)[2:]
        return f"tiles of {algorithm.outputs} x {algorithm.outputs} on {height} x {width} pixels would take more multiplications"
    return _does_not_fit(gm, node, algorithm)


def _does_not_fit(gm: fx.GraphModule, node: fx.Node, algorithm: ConvolutionAlgorithm) -> str | None:
    weight, bias = constant(gm, argument(node, "weight")), argument(node, "bias")
    operands = algorithm.weight_operands(weight)
    sums = combinations_of(exactly(0, 255), algorithm.encode.coefficients)
    for what, lo, hi in (("weight", int(operands.min()), int(operands.max())), ("input", *sums.bounds)):
        if lo < -INT16 or hi >= INT16:
            return f"{algorithm.name}: the operands of its {what} need {bits_needed(lo, hi)} bits of 16"
    taps, scale = weight.long().flatten(1), algorithm.scale**2
    offset = torch.zeros(len(taps), dtype=torch.int64) if bias is None else constant(gm, bias).long()
    lo, hi = (255 * side.sum(1) + offset for side in (taps.clamp(max=0), taps.clamp(min=0)))
    bits = bits_needed(scale * min(int(lo.min()), int(offset.min())), scale * max(int(hi.max()), int(offset.max())))
    return f"{algorithm.name}: {scale} times its accumulator needs {bits} bits of 32" if bits > 32 else None


def _tiles(node: fx.Node, algorithm: ConvolutionAlgorithm) -> list[int]:
    """Tiles along height and width."""
    return [-(-size // algorithm.outputs) for size in one_sample_shape(node)[2:]]


def _multiplications(node: fx.Node, algorithm: ConvolutionAlgorithm) -> int:
    outputs, depth = one_sample_shape(argument(node, "weight"))[:2]
    return algorithm.products * math.prod(_tiles(node, algorithm)) * outputs * depth


def _definition(node: fx.Node) -> Definition:
    elements = math.prod(one_sample_shape(argument(node, "weight")))
    return Definition(elements * math.prod(one_sample_shape(node)[2:]), elements)


def _summary(node: fx.Node, algorithm: ConvolutionAlgorithm) -> str:
    height, width = _tiles(node, algorithm)
    saved = _definition(node).multiplications / _multiplications(node, algorithm)
    return f"{algorithm.name}: {height} x {width} tiles of {algorithm.products} products, {saved:.2f} times fewer multiplications"


class _Writer:
    """Replaces convolutions; programs and indices that are the same are stored once."""

    def __init__(self, gm: fx.GraphModule):
        self.gm, self._constants = gm, ConstantPool(gm)

    def rewrite(self, node: fx.Node, algorithm: ConvolutionAlgorithm) -> None:
        """In place: the node computes the same tensor under the same name."""
        definition = _definition(node)
        with self.gm.graph.inserting_before(node):
            product = self._product(node, self._gather(node, algorithm), algorithm)
            product.meta[ALGORITHM] = f"{algorithm.name} {algorithm.tile} x {algorithm.tile}"
            product.meta[DEFINITION] = definition
            acc = self._scatter(node, product, algorithm)
            division = zip(("multiplier", "shift"), exact_division(algorithm.scale**2), strict=True)
            b, c = (
                self._constants.read(f"{algorithm.name}_{name}", torch.tensor(value), node) for name, value in division
            )
        node.target, node.args, node.kwargs = ops.rescale.default, ([acc], [b], [c]), {}

    def _gather(self, conv: fx.Node, algorithm: ConvolutionAlgorithm) -> fx.Node:
        """(N, th, tw, t t C): the codes of every tile, position by position."""
        x, padding, t = argument(conv, "x"), argument(conv, "padding"), algorithm.tile
        codes, (channels, *sizes), tiles = tensor_meta(x).qparams, one_sample_shape(x)[1:], _tiles(conv, algorithm)
        if any(padding):
            x = self._call(conv, ops.pad.default, x, list(padding), argument(conv, "pad_value"))
        for dim, (size, count) in enumerate(zip(sizes, tiles, strict=True), start=2):
            last = size + sum(padding[2 * dim - 4 : 2 * dim - 2]) - 1
            index = (algorithm.outputs * torch.arange(count)[:, None] + torch.arange(t)).clamp(max=last).flatten()
            x = self._call(
                conv, aten.index_select.default, x, dim, self._constants.read(f"tiles_{count}_{t}_{last}", index, conv)
            )
        x = self._call(conv, aten.reshape.default, x, [-1, channels, tiles[0], t, tiles[1], t])
        x = self._call(conv, aten.permute.default, x, [0, 2, 4, 3, 5, 1])
        x = self._call(conv, aten.reshape.default, x, [-1, *tiles, t * t * channels])
        if codes is not None and codes.scale.numel() == codes.zero_point.numel() == 1:
            describe(x, qparams=codes)
        return x

    def _product(self, conv: fx.Node, tiles: fx.Node, algorithm: ConvolutionAlgorithm) -> fx.Node:
        """(N, th, tw, m m O): scale times the accumulators of every tile."""
        weight, bias = argument(conv, "weight"), argument(conv, "bias")
        codes, results = constant(self.gm, weight), algorithm.outputs**2
        offset = torch.zeros(len(codes), dtype=torch.int32) if bias is None else constant(self.gm, bias)
        scaled = (offset.long() * algorithm.scale**2).to(torch.int32).repeat(results)
        operands = algorithm.weight_operands(codes).to(torch.int16).contiguous()
        return self._call(
            conv, ops.bilinear_linear.default, tiles,
            self._constants.read("no_zero_point", torch.zeros((), dtype=torch.int32), conv),
            add_constant(self.gm, f"{weight.target}_operands", operands, conv),
            add_constant(self.gm, f"{conv.name}_scaled_bias", scaled, conv),
            self._constants.read(f"{algorithm.name}_encode", algorithm.encode.tensor, conv),
            self._constants.read(f"{algorithm.name}_decode", algorithm.decode.tensor, conv),
            [results, algorithm.tile**2, 1], -1,
        )  # fmt: skip

    def _scatter(self, conv: fx.Node, product: fx.Node, algorithm: ConvolutionAlgorithm) -> fx.Node:
        """The results of the tiles as (N, O, H, W)."""
        (outputs, *sizes), (down, across), m = one_sample_shape(conv)[1:], _tiles(conv, algorithm), algorithm.outputs
        y = self._call(conv, aten.reshape.default, product, [-1, down, across, m, m, outputs])
        y = self._call(conv, aten.permute.default, y, [0, 5, 1, 3, 2, 4])
        y = self._call(conv, aten.reshape.default, y, [-1, outputs, down * m, across * m])
        for dim, (size, count) in enumerate(zip(sizes, (down, across), strict=True), start=2):
            if size < count * m:
                y = self._call(conv, aten.slice.Tensor, y, dim, 0, size)
        return y

    def _call(self, conv: fx.Node, target, *args) -> fx.Node:
        return inherit_origin(conv, self.gm.graph.call_function(target, args))
