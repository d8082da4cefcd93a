"""The accumulator proof: what the integer kernels assume about their numbers, shown from intervals.

int32 tensors        their worst-case interval fits int32
requantize           (|acc| + |r|) * 2^l < 2^31 in every channel of every branch; 2^14 <= |m| < 2^15 or m = 0;
                     0 <= p <= 31; 0 <= l <= 31; 0 <= k <= 6; 0 <= lo <= hi <= 255; zero point within 0..255
rescale              |acc| * |b| + 2^(c-1) < 2^63; the branches together too; 1 <= c <= 62
softmax              0 <= T <= T[0] = 2^B, 15 <= B <= 22, n 2^B < 2^31 for rows of n elements
bilinear_*           the sums of blocks of every operand fit int16; the programs read terms that exist
layer_norm           rows of 1 .. 2^21 codes, 0 <= epsilon < 2^60, zero point within 0..255, shifts 1 .. 31
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from .analysis.bilinear_intervals import operand_interval
from .analysis.interval_arithmetic import subtract
from .analysis.intervals import Interval, tensor_intervals
from .errors import AccumulatorError, VerificationError
from .graph import argument, constant, dtype, is_constant, shape
from .integer_ops import INTEGER_OPS
from .meta import place
from .numerics import INT32_MAX, INT32_MIN, MAX_GUARD_BITS, Dyadic, rounding_constant
from .reference_normalization import (
    MAX_EPSILON,
    MAX_FRACTION_BITS,
    MAX_ROW,
    MAX_TABLE_BITS,
    MIN_FRACTION_BITS,
    MIN_TABLE_BITS,
    is_fraction,
)

REMEDY = "Quantize this layer's weights to fewer bits, or keep it in float (keep_float)."


def prove_accumulators(gm: fx.GraphModule) -> dict[fx.Node, Interval]:
    """The worst-case interval of every int32 node, all of which fit. Nodes need ``node.meta["val"]``.

    Raises:
        AccumulatorError: names the first node that could overflow, with the bits it needs.
        VerificationError: a multiplier, shift or bound outside the range the kernels are written for.
    """
    intervals = tensor_intervals(gm)
    accumulators = {n: i for n, i in intervals.items() if n.op == "call_function" and dtype(n) == torch.int32}
    for node in gm.graph.nodes:
        if node in accumulators:
            _prove_int32(node, accumulators[node])
        if (examine := _EXAMINED.get(node.target)) is not None:
            examine(_Proof(gm, node, intervals))
    return accumulators


def _prove_int32(node: fx.Node, interval: Interval) -> None:
    lo, hi = interval.bounds
    if lo < INT32_MIN or hi > INT32_MAX:
        raise AccumulatorError(f"its sum reaches {lo}..{hi} and needs {interval.bits} bits", stage="verify",
                               where=place(node), expected="32 bits", remedy=REMEDY)  # fmt: skip


class _Proof:
    """The checks of one node."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node, intervals: Mapping[fx.Node, Interval]):
        self.gm, self.node, self.intervals = gm, node, intervals

    def requantize(self) -> None:
        guard = argument(self.node, "guard_bits")
        self.check_range("guard_bits", torch.tensor(guard), 0, MAX_GUARD_BITS)
        lo, hi = self.constant("lo"), self.constant("hi")
        for name, value in (("lo", lo), ("hi", hi), ("zero_point", self.constant("zero_point"))):
            self.check_range(name, value, 0, 255)
        if bool((lo > hi).any()):
            raise self.refuse("lo is above hi", "lo <= hi")
        shifts = argument(self.node, "left_shift")
        branches = zip(*map(self.branches, ("acc", "multiplier", "right_shift")), shifts, strict=True)
        for i, (acc, m, p, left) in enumerate(branches):
            m, p = self.tensor(m), self.tensor(p)
            self.check_range("|multiplier|", m.abs()[m != 0], 1 << 14, (1 << 15) - 1)
            self.check_range("right_shift", p, 0, 31)
            self.check_range("left_shift", torch.tensor(left), 0, 31)
            rounding = rounding_constant(Dyadic(m, p, left), first=i == 0).to(torch.int64).abs()
            largest = (self.magnitude(acc) + rounding) * (1 << left)
            self.check_fits(acc, int(largest.max()), 32, f"shifted left by {left}")

    def rescale(self) -> None:
        total = 0
        for acc, b, c in zip(*map(self.branches, ("acc", "multiplier", "shift")), strict=True):
            b, c = self.tensor(b), self.tensor(c)
            self.check_range("multiplier", b, INT32_MIN + 1, INT32_MAX)
            self.check_range("shift", c, 1, 62)
            largest = int(self.magnitude(acc).max()) * int(b.abs().max()) + (1 << int(c.max()) >> 1)
            self.check_fits(acc, largest, 64, "times its multiplier")
            total += largest >> int(c.min())
        self.check_fits(self.node, total, 64, "summed over its branches")

    def softmax(self) -> None:
        bits, table = argument(self.node, "table_bits"), self.constant("table")
        self.check_range("table_bits", torch.tensor(bits), MIN_TABLE_BITS, MAX_TABLE_BITS)
        self.check_range("table", table, 0, 1 << bits)
        self.check_range("table[0]", table[0], 1 << bits, 1 << bits)
        self.check_fits(self.node, self.row() << bits, 32, "as the sum of a row of exponentials")

    def layer_norm(self) -> None:
        self.check_range("the row length", torch.tensor(self.row()), 1, MAX_ROW)
        epsilon, bits = (argument(self.node, name) for name in ("epsilon", "fraction_bits"))
        self.check_range("epsilon", torch.tensor(epsilon), 0, MAX_EPSILON - 1)
        self.check_range("fraction_bits", torch.tensor(bits), MIN_FRACTION_BITS, MAX_FRACTION_BITS)
        if not is_fraction(bits, self.row(), epsilon):
            raise self.refuse(f"{bits} fraction_bits for rows of {self.row()}", "a positive shift for any row")
        if argument(self.node, "zero_point") is not None:
            self.check_range("zero_point", self.constant("zero_point"), 0, 255)

    def bilinear_linear(self) -> None:
        _, m, p = argument(self.node, "blocks")
        self.check_operand("x", "zero_point", "encode", m * p, shape(argument(self.node, "weight"))[0])

    def bilinear_matmul(self) -> None:
        n, m, p = argument(self.node, "blocks")
        products = argument(self.node, "products")
        self.check_operand("a", "a_zero_point", "encode_a", n * m, products)
        self.check_operand("b", "b_zero_point", "encode_b", m * p, products)

    def check_operand(self, name: str, zero_point: str, program: str, blocks: int, products: int) -> None:
        """The sums of the blocks of one operand fit int16."""
        x, program = argument(self.node, name), argument(self.node, program)
        codes = self.tensor(x) if is_constant(x) else self.intervals[x]
        codes = Interval(codes, codes) if isinstance(codes, Tensor) else codes
        zero = self.constant(zero_point)
        sums = operand_interval(
            subtract(codes, Interval(zero.min(), zero.max())), constant(self.gm, program), blocks, products
        )
        self.check_range(f"a sum of blocks of {name}", torch.tensor(sums.bounds), -(1 << 15), (1 << 15) - 1)

    def row(self) -> int:
        """Length of the rows of x, which are uint8 codes."""
        x = argument(self.node, "x")
        if dtype(x) != torch.uint8 or isinstance(shape(x)[-1], torch.SymInt):
            raise self.refuse(f"its input {x.name} is {dtype(x)} {list(shape(x))}", "uint8 rows of known length")
        return int(shape(x)[-1])

    def branches(self, name: str) -> list[fx.Node]:
        return argument(self.node, name)

    def constant(self, name: str) -> Tensor:
        return self.tensor(argument(self.node, name))

    def tensor(self, node: fx.Node) -> Tensor:
        if not is_constant(node):
            raise self.refuse(f"{node.name} is computed at run time", "a constant")
        return constant(self.gm, node).to(torch.int64)

    def magnitude(self, acc: fx.Node) -> Tensor:
        if dtype(acc) != torch.int32:
            raise self.refuse(f"its branch {acc.name} is {dtype(acc)}", "int32")
        return self.tensor(acc).abs() if is_constant(acc) else self.intervals[acc].magnitude

    def check_range(self, name: str, value: Tensor, lo: int, hi: int) -> None:
        if value.numel() and (int(value.min()) < lo or int(value.max()) > hi):
            raise self.refuse(f"{name} spans {int(value.min())}..{int(value.max())}", f"{lo}..{hi}")

    def check_fits(self, acc: fx.Node, largest: int, bits: int, how: str) -> None:
        if largest >= 1 << (bits - 1):
            raise AccumulatorError(f"{acc.name} {how} reaches {largest} and needs {largest.bit_length() + 1} bits",
                                   stage="verify", where=place(self.node), expected=f"{bits} bits", remedy=REMEDY)  # fmt: skip

    def refuse(self, found: str, expected: str) -> VerificationError:
        return VerificationError(found, stage="verify", where=place(self.node), expected=expected)


_EXAMINED = {
    INTEGER_OPS[name].overload: getattr(_Proof, name)
    for name in ("requantize", "rescale", "softmax", "layer_norm", "bilinear_linear", "bilinear_matmul")
}
