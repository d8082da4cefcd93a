"""Multiply in blocks: products of matrices by a bilinear algorithm with fewer multiplications, bit for bit the same.

    linear(x, W, b), conv 1x1, a @ b   ->   bilinear_linear(x, sums of blocks of W, b), bilinear_matmul(a, b)

W, A: int8 and uint8 codes; their sums of blocks take one or two bits more per level and are int16. Products and their sums may wrap
around in int32: the result, which is that of the layer, fits, because int32 is a ring. A dimension that is no multiple of the
algorithm's is extended by zeros. The sums of a constant weight are made here, once, for R / (n m) times its elements in twice the bytes.

Level: integer. Effect: EXACT (compared bit for bit by the pass manager; verify multiplies the algorithm out again).
Source: Strassen 1969; Winograd 1971; docs/bilinear.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import fx

from fxcompress.bilinear import ALGORITHMS, NAIVE, BilinearAlgorithm, operand_range
from fxcompress.block_products import ALGORITHM, Dimensions, layer_dimensions, matmul_dimensions
from fxcompress.errors import OptionError, nearest
from fxcompress.graph import ConstantPool, add_constant, argument, calls, constant, is_call, one_sample_shape, rank
from fxcompress.meta import describe, inherit_origin, tensor_meta
from fxcompress.options import context
from fxcompress.reference_bilinear import weight_sums
from fxcompress.rewrite import Effect, Fact, Level, Match, Pass, PassResult, Plan, Reject
from fxcompress.sum_schedule import SumSchedule

aten, ops = torch.ops.aten, torch.ops.fxcompress
INT16 = 1 << 15

#: What "auto" minimizes: the cost of a product by an algorithm.
Cost = Callable[[Dimensions, BilinearAlgorithm], object]


def multiplications(whole: Dimensions, algorithm: BilinearAlgorithm) -> tuple[int, int]:
    """Multiplications, then additions of scalars in the results (operands cost the same or less)."""
    part = whole.blocks(algorithm.size)
    return algorithm.products * part.multiplications, algorithm.additions.total * part.multiplications // part.m


def native_time(whole: Dimensions, algorithm: BilinearAlgorithm) -> float:
    """Measured here and now: ``backends.native.block_times``."""
    from fxcompress.backends.native.block_times import native_time

    return native_time(whole, algorithm)


#: What "auto" may minimize, by name.
COSTS: dict[str, Cost] = {"multiplications": multiplications, "time": native_time}


class MultiplyInBlocks(Pass):
    """See the module.

    Args:
        least: a dimension smaller than this is not cut any further.
        batch: samples that a layer without other rows (a linear layer on vectors) is counted for.
        cost: what ``matmul_algorithm="auto"`` minimizes: "multiplications", "time", which is measured on the native kernels of this
            processor when the network is compiled, or (dimensions, algorithm) -> anything that compares.

    Raises ``OptionError`` for another cost.
    """

    name = "multiply_in_blocks"
    level = Level.INTEGER
    effect = Effect.EXACT
    source = "Strassen 1969; Winograd 1971; docs/bilinear.md"
    needs = frozenset({Fact.LOWERED})

    def __init__(self, least: int = 64, batch: int = 1, cost: Cost | str = "multiplications"):
        if not callable(cost) and cost not in COSTS:
            raise OptionError(f"unknown cost {cost!r}", stage=self.name, remedy=nearest(str(cost), COSTS))
        self.least, self.batch = least, batch
        self.cost: Cost = cost if callable(cost) else COSTS[cost]

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan, options = Plan(self.name, gm), context(gm).options
        if options.matmul_algorithm == "naive":
            return plan
        for node in calls(gm, ops.conv.default, ops.linear.default, ops.matmul.default):
            reason = _unsuitable(gm, node) or self._choose(
                gm, node, options.matmul_algorithm, int(options.matmul_levels)
            )
            if isinstance(reason, str):
                plan.rejects.append(Reject(reason, node))
            elif reason is not None:
                plan.matches.append(Match(node, _summary(self._dimensions(node), reason), reason))
        return plan

    def apply(self, plan: Plan) -> PassResult:
        writer = _Writer(plan.graph_module)
        for match in plan.matches:
            writer.rewrite(match.node, match.data)
            plan.applied += 1
        return PassResult(plan.graph_module, plan.applied > 0)

    def _choose(self, gm: fx.GraphModule, node: fx.Node, name: str, levels: int) -> BilinearAlgorithm | str:
        """The algorithm for one product, or why none fits."""
        whole = self._dimensions(node)
        bases = [a for a in ALGORITHMS.values() if a is not NAIVE] if name == "auto" else [ALGORITHMS[name]]
        fitting = [
            base.levels(level) for base in bases for level in range(1, levels + 1) if self._fits(whole, base, level)
        ]
        if not fitting:
            return f"its dimensions {whole.n} x {whole.m} x {whole.p} are below {self.least}"
        fewer = [a for a in fitting if multiplications(whole, a)[0] < whole.multiplications]
        if not fewer:
            return f"blocks of {whole.n} x {whole.m} x {whole.p} would take more multiplications"
        narrow = [a for a in fewer if all(-INT16 <= v < INT16 for side in _operands(gm, node, a) for v in side.bounds)]
        if not narrow:
            return "its sums of blocks do not fit int16"
        if name != "auto":
            return narrow[-1]  # the most levels
        best = min(narrow, key=lambda a: self.cost(whole, a))
        return (
            best if self.cost(whole, best) < self.cost(whole, NAIVE) else "no algorithm is better than the definition"
        )

    def _fits(self, whole: Dimensions, base: BilinearAlgorithm, level: int) -> bool:
        """Every dimension that is cut is long enough before the last cut."""
        return all(d >= self.least * s ** (level - 1) for d, s in zip(whole[:3], base.size, strict=True) if s > 1)

    def _dimensions(self, node: fx.Node) -> Dimensions:
        if is_call(node, ops.matmul.default):
            return matmul_dimensions(*(one_sample_shape(argument(node, name)) for name in ("a", "b")))
        depth = one_sample_shape(argument(node, "weight"))[1]
        rows = one_sample_shape(node)
        outputs = rows.pop(_axis(node))
        return layer_dimensions([self.batch, *rows], depth, outputs)


def _axis(node: fx.Node) -> int:
    return 1 if is_call(node, ops.conv.default) else -1


def _unsuitable(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """Why a product cannot be written as one of matrices."""
    if is_call(node, ops.conv.default):
        kernel = one_sample_shape(argument(node, "weight"))[2:]
        if any(k != 1 for k in kernel):
            return f"its kernel is {' x '.join(map(str, kernel))}"
        if argument(node, "groups") != 1:
            return "it has groups"
        if any(argument(node, "padding")):
            return "it pads"
    if is_call(node, ops.matmul.default):
        if any(constant(gm, argument(node, name)).numel() != 1 for name in ("a_zero_point", "b_zero_point")):
            return "an operand has a zero point for every channel"
        if any(rank(argument(node, name)) < 2 for name in ("a", "b")):
            return "an operand is a vector"
    return None


def _operands(gm: fx.GraphModule, node: fx.Node, algorithm: BilinearAlgorithm):
    """Intervals of the sums of blocks of both operands."""
    if is_call(node, ops.matmul.default):
        zeros = (int(constant(gm, argument(node, name))) for name in ("a_zero_point", "b_zero_point"))
        sides = zip((algorithm.a, algorithm.b), zeros, strict=True)
        return [operand_range(coefficients, -zero, 255 - zero) for coefficients, zero in sides]
    largest = int(constant(gm, argument(node, "weight")).to(torch.int32).abs().max())
    return [operand_range(algorithm.a, -largest, largest), operand_range(algorithm.b, 0, 255)]


def _summary(whole: Dimensions, algorithm: BilinearAlgorithm) -> str:
    part = whole.blocks(algorithm.size)
    saved = 1 - multiplications(whole, algorithm)[0] / whole.multiplications
    return f"{algorithm.name}: {algorithm.products} products of {part.n} x {part.m} x {part.p}, {saved:.1%} fewer multiplications"


class _Writer:
    """Replaces products; programs of one algorithm are stored once."""

    def __init__(self, gm: fx.GraphModule):
        self.gm, self._constants = gm, ConstantPool(gm)

    def rewrite(self, node: fx.Node, algorithm: BilinearAlgorithm) -> None:
        """In place: the node computes the same tensor under the same name."""
        with self.gm.graph.inserting_before(node):
            if is_call(node, ops.matmul.default):
                programs = (self._program(algorithm, i, node) for i in range(3))
                args = (*node.args, *programs, list(algorithm.size), algorithm.products)
                node.target, node.args = ops.bilinear_matmul.default, args
            else:
                args = self._layer(node, algorithm)
                node.target, node.args = ops.bilinear_linear.default, args
        node.meta[ALGORITHM] = f"{algorithm.name} {' x '.join(map(str, algorithm.size))}"

    def _layer(self, node: fx.Node, algorithm: BilinearAlgorithm) -> tuple:
        x, weight, bias = (argument(node, name) for name in ("x", "weight", "bias"))
        rows = constant(self.gm, weight).flatten(1)
        if is_call(node, ops.conv.default):
            x = self._strided(node, x)
        if bias is None:
            bias = add_constant(self.gm, f"{node.name}_bias", torch.zeros(len(rows), dtype=torch.int32), node)
        sums = weight_sums(rows, algorithm.schedules[0], algorithm.size).to(torch.int16)
        return (
            x, self._constants.read("no_zero_point", torch.zeros((), dtype=torch.int32), node),
            add_constant(self.gm, f"{weight.target}_sums", sums, node), bias,
            self._program(algorithm, 1, node), self._program(algorithm, 2, node), list(algorithm.size), _axis(node),
        )  # fmt: skip

    def _strided(self, conv: fx.Node, x: fx.Node) -> fx.Node:
        """The pixels that a strided 1x1 convolution reads."""
        for dim, step in enumerate(argument(conv, "stride"), start=2):
            if step > 1:
                codes = tensor_meta(x).qparams
                x = inherit_origin(conv, self.gm.graph.call_function(aten.slice.Tensor, (x, dim, 0, sys.maxsize, step)))
                describe(x, qparams=codes)
        return x

    def _program(self, algorithm: BilinearAlgorithm, index: int, node: fx.Node) -> fx.Node:
        schedule: SumSchedule = algorithm.schedules[index]
        depth = "x".join(map(str, algorithm.size))
        return self._constants.read(f"{algorithm.name}_{depth}_{'abc'[index]}", schedule.tensor, node)
