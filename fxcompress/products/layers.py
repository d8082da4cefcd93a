"""Layers of a float graph in blocks, so that products of a bilinear algorithm can be left out and the rest trained.

    y = W x     ->     T_r = sum_kj b[r, k, j] x_kj       P_r = S_r T_r       y_ij = sum_r c[i, j, r] P_r

Blocks of W are n parts of its outputs and m of its inputs; those of x are m parts of its channels at p neighboring rows, or pixels along
the last dimension. A convolution multiplies its weight with the windows of x, and the windows of a sum of shifted images are the sums of
their windows: T_r is an image, P_r a convolution of it with p times the stride, and nothing is unfolded.

Two forms compute the same:

    ``write``    in a graph, as above, in ordinary operators: what is left out is not computed. It compiles like any network.
    ``apply``    as one layer that reads p neighbors and writes p, with the weight sum_r c[i, j, r] b[r, k, j'] S_r: p times the
                 multiplications (4/3 in a 3x3 convolution with p = 2), but one call, and differentiable by b, c and S: for training.

The sums S_r of blocks of W are constants, free to be trained each on its own; they take no addition at run time.

Source: Yvinec 2023, section 4.2; blocks of images: docs/bilinear.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..bilinear import BilinearAlgorithm
from ..dialects import ADD, CAT, CONVOLUTIONS, LINEAR, MUL, SUB
from ..graph import add_constant, argument, constant, is_call, one_sample_shape, rank
from ..meta import inherit_origin, module_name

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """Multiplications, and additions of elements in sums of blocks, per sample."""

    multiplications: int
    additions: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.multiplications + other.multiplications, self.additions + other.additions)


class BlockLayer:
    """A linear layer or convolution, and an exact algorithm with coefficients 0, 1 and -1 that computes it.

    Attributes:
        node: the layer in its graph; name: of the module it came from.
        algorithm: as given.
        sums: (R, O / n, I / m, *kernel), the weights of the products. bias: (O,).
        positions: rows or pixels of the result per sample.
        plain_cost: as it is defined.
    """

    def __init__(self, gm: fx.GraphModule, node: fx.Node, algorithm: BilinearAlgorithm):
        self.node, self.algorithm, self.is_linear = node, algorithm, is_call(node, LINEAR)
        self.name = module_name(node)
        weight, bias = constant(gm, node.args[1]).detach(), argument(node, "bias")
        (n, m, _), (outputs, inputs, *self.kernel) = algorithm.size, weight.shape
        self.outputs, self.inputs, self.positions = outputs, inputs, math.prod(one_sample_shape(node)) // outputs
        blocks = weight.unflatten(1, (m, -1)).unflatten(0, (n, -1)).movedim(2, 1).flatten(0, 1)
        self.sums = torch.tensordot(algorithm.a.flatten(1).to(weight.dtype), blocks, 1)
        self.bias = weight.new_zeros(outputs) if bias is None else constant(gm, bias).detach()
        self.plain_cost = Cost(weight.numel() * self.positions)

    def cost(self, algorithm: BilinearAlgorithm) -> Cost:
        """Computed by what remains of the algorithm."""
        per_product = self.plain_cost.multiplications // math.prod(algorithm.size)
        of_x, of_result = self.block_elements
        return Cost(algorithm.products * per_product, algorithm.additions.b * of_x + algorithm.additions.c * of_result)

    @property
    def block_elements(self) -> tuple[int, int]:
        """Elements per sample of a block of x, and of one of the result."""
        n, m, p = self.algorithm.size
        of_result = self.outputs * self.positions // (n * p)
        if self.is_linear:
            return self.inputs * self.positions // (m * p), of_result
        sizes, padding = one_sample_shape(self.node.args[0])[2:-1], argument(self.node, "padding")[:-1]
        lines = math.prod(size + 2 * pad for size, pad in zip(sizes, padding, strict=True))
        return self.inputs // m * lines * self.read_pixels, of_result

    @property
    def read_pixels(self) -> int:
        """Pixels along the last dimension that the products of one shift read."""
        p, stride = self.algorithm.size[2], argument(self.node, "stride")[-1]
        return (one_sample_shape(self.node)[-1] // p - 1) * p * stride + self.kernel[-1]

    # -- for training

    def apply(self, x: Tensor, sums: Tensor, bias: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """The layer's result for x, with coefficients b (R, m, p) and c (n, p, R) in real numbers."""
        n, m, p = self.algorithm.size
        factors = torch.einsum("ijr,rkl->jiklr", c, b).flatten(0, 3)
        weight = (factors @ sums.flatten(1)).reshape(p, n, m, p, *sums.shape[1:])  # j i k l o c ...
        weight = weight.movedim((0, 1, 4, 3, 2, 5), (0, 1, 2, 3, 4, 5))  # j i o l k c ...
        weight = weight.flatten(4, 5).flatten(0, 2)  # (p O, p, I, *kernel)
        if self.is_linear:
            y = F.linear(x.reshape(-1, p * self.inputs), weight.flatten(1), bias.repeat(p))
            return y.reshape(*x.shape[:-1], self.outputs)
        padding, stride = argument(self.node, "padding"), argument(self.node, "stride")
        last = stride[-1]
        wide = sum(F.pad(weight[:, j], (j * last, (p - 1 - j) * last)) for j in range(p))
        symmetric = [pad for pad in reversed(padding) for _ in range(2)]
        y = self.node.target(F.pad(x, symmetric), wide, bias.repeat(p), [*stride[:-1], p * last])
        return y.unflatten(1, (p, -1)).movedim(1, -1).flatten(-2)

    # -- for the result

    def write(self, node: fx.Node, algorithm: BilinearAlgorithm, sums: Tensor, bias: Tensor) -> None:
        """Replace ``node``, this layer in a copy of its graph, by what remains of its algorithm.

        sums: (R', O / n, I / m, *kernel) of the remaining products. bias: (O,).
        """
        writer = _Writer(self, node)
        with node.graph.inserting_before(node):
            result = writer.layer(algorithm, sums, bias)
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        node.graph.erase_node(node)


def refusal(gm: fx.GraphModule, node: fx.Node, algorithm: BilinearAlgorithm) -> str | None:
    """Why a layer cannot be computed in blocks."""
    n, m, p = algorithm.size
    outputs, inputs = constant(gm, node.args[1]).shape[:2]
    if is_call(node, *CONVOLUTIONS):
        if argument(node, "groups") != 1:
            return "it has groups"
        if any(step != 1 for step in argument(node, "dilation")):
            return "it is dilated"
        if (width := one_sample_shape(node)[-1]) % p:
            return f"its result is {width} pixels wide, no multiple of {p}"
    elif (rows := math.prod(one_sample_shape(node)[:-1])) % p:
        return f"a sample has {rows} rows, and blocks of {p} would mix samples"
    if outputs % n or inputs % m:
        return f"its {inputs} inputs and {outputs} outputs are no multiples of {m} and {n}"
    return None


@dataclass(frozen=True)
class _Value:
    """sign * node, in a program of sums."""

    node: fx.Node
    call: Callable[..., fx.Node]
    sign: int = 1

    def __neg__(self) -> _Value:
        return _Value(self.node, self.call, -self.sign)

    def __add__(self, other: _Value) -> _Value:
        if self.sign == other.sign:
            return _Value(self.call(ADD, self.node, other.node), self.call, self.sign)
        plus, minus = (self, other) if self.sign == 1 else (other, self)
        return _Value(self.call(SUB, plus.node, minus.node), self.call)


class _Writer:
    """Writes what replaces ``node``, a copy of the layer."""

    def __init__(self, block: BlockLayer, node: fx.Node):
        self.block, self.node = block, node

    def layer(self, algorithm: BilinearAlgorithm, sums: Tensor, bias: Tensor) -> fx.Node:
        operands = algorithm.schedules[1].run(self.blocks_of_x())
        biases = _biases(algorithm.c, bias)
        products = [
            self.product(operand, sums[r], None if biases is None else biases[r]) for r, operand in enumerate(operands)
        ]
        y = self.joined(algorithm.schedules[2].run(products))
        if biases is not None:
            return y
        shaped = bias if self.block.is_linear else bias.reshape(-1, *[1] * (rank(self.node) - 2))
        return self.call(ADD, y, self.constant("bias", shaped))

    def blocks_of_x(self) -> list[_Value]:
        """x_kj, row by row."""
        block, x, (_, m, p) = self.block, self.node.args[0], self.block.algorithm.size
        if block.is_linear:
            groups = self.call(aten.reshape.default, x, [-1, p, block.inputs])
            shifted = [self.call(aten.select.int, groups, 1, j) for j in range(p)]
        else:
            padding, stride = argument(self.node, "padding"), argument(self.node, "stride")[-1]
            if any(padding):
                symmetric = [pad for pad in reversed(padding) for _ in range(2)]
                x = self.call(aten.constant_pad_nd.default, x, symmetric, 0.0)
            last, length = rank(self.node) - 1, block.read_pixels
            shifted = [self.call(aten.slice.Tensor, x, last, j * stride, j * stride + length) for j in range(p)]
        part = block.inputs // m
        return [
            _Value(self.call(aten.slice.Tensor, x, 1, k * part, (k + 1) * part), self.call)
            for k in range(m)
            for x in shifted
        ]

    def product(self, operand: _Value, weight: Tensor, bias: Tensor | None) -> _Value:
        """P_r; the operand's sign goes into the weight."""
        constants = [
            self.constant("sums", operand.sign * weight),
            None if bias is None else self.constant("bias", bias),
        ]
        if self.block.is_linear:
            return _Value(self.call(LINEAR, operand.node, *constants), self.call)
        *steps, last = argument(self.node, "stride")
        stride = [*steps, last * self.block.algorithm.size[2]]
        return _Value(self.call(self.node.target, operand.node, *constants, stride), self.call)

    def joined(self, results: list[_Value | int]) -> fx.Node:
        """The blocks y_ij as one tensor."""
        (n, _, p), shape = self.block.algorithm.size, [-1, *one_sample_shape(self.node)[1:]]
        found = next(v for v in results if v != 0)
        signed = {v: v.node if v.sign == 1 else self.call(aten.neg.default, v.node) for v in results if v != 0}
        nodes = [self.call(MUL, found.node, 0.0) if v == 0 else signed[v] for v in results]
        columns = [self.call(CAT, nodes[j::p], 1) if n > 1 else nodes[j] for j in range(p)]
        at, lead = (1, []) if self.block.is_linear else (len(shape), shape[1:-1])
        parts = [-1, 1, self.block.outputs] if self.block.is_linear else [-1, *lead, shape[-1] // p, 1]
        columns = [self.call(aten.reshape.default, y, parts) for y in columns]
        return self.call(aten.reshape.default, self.call(CAT, columns, at), shape)

    def constant(self, role: str, value: Tensor) -> fx.Node:
        return add_constant(self.node.graph.owning_module, f"{self.block.name}_{role}", value.clone(), self.node)

    def call(self, target, *args) -> fx.Node:
        return inherit_origin(self.node, self.node.graph.call_function(target, args))


def _biases(c: Tensor, bias: Tensor) -> Tensor | None:
    """(R, O / n) biases of products that make up the bias (O,) of the result; None where none do."""
    n, p, _ = c.shape
    coefficients, wanted = c.double().flatten(0, 1), bias.double().reshape(n, 1, -1).expand(n, p, -1).flatten(0, 1)
    found = torch.linalg.pinv(coefficients) @ wanted
    return found.to(bias.dtype) if torch.allclose(coefficients @ found, wanted, atol=1e-7) else None
