"""What a product computed in blocks costs: multiplications, additions, operand bits, bytes. Read from the integer graph.

acc (rows, O) = x (rows, K) W^T: as A B with A = W (O, K), the blocks of n rows and m columns, B = x^T in m and p blocks
a (N, K) @ b (K, P): as it is
a convolution in tiles: n, m positions of results and of a tile, p = 1; multiplications by definition are those of the convolution
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from .analysis.bilinear_intervals import operand_interval
from .analysis.interval_arithmetic import Interval, bits_needed, exactly
from .graph import argument, calls, constant, is_call, one_sample_shape, shape
from .meta import tensor_meta

ops = torch.ops.fxcompress
BLOCK_PRODUCTS = (ops.bilinear_linear.default, ops.bilinear_matmul.default)
#: ``node.meta`` key: the name of the algorithm, for the report.
ALGORITHM = "matmul_algorithm"
#: ``node.meta`` key of a layer that was something else than a product of matrices: its ``Definition``.
DEFINITION = "computed_by_definition"


class Definition(NamedTuple):
    """What a layer takes computed as it is defined: multiplications per sample, elements of its weight."""

    multiplications: int
    weight_elements: int


class Dimensions(NamedTuple):
    """A product of an (n, m) with an (m, p) matrix, ``count`` times."""

    n: int
    m: int
    p: int
    count: int = 1

    @property
    def multiplications(self) -> int:
        """By definition."""
        return math.prod(self)

    def blocks(self, size: tuple[int, int, int]) -> Dimensions:
        """The product of one block, rounded up, when each dimension is cut into as many."""
        return Dimensions(*(-(-d // s) for d, s in zip(self[:3], size, strict=True)), self.count)


def layer_dimensions(rows: list[int], depth: int, outputs: int) -> Dimensions:
    """A = W (O, K), B = x^T. rows: all dimensions of x but the channels."""
    return Dimensions(outputs, depth, math.prod(rows))


def matmul_dimensions(a: list[int], b: list[int]) -> Dimensions:
    """Of shapes (..., N, K) and (..., K, P)."""
    batch = torch.broadcast_shapes(a[:-2], b[:-2])
    return Dimensions(a[-2], a[-1], b[-1], math.prod(batch))


@dataclass
class BlockProduct:
    """One product in blocks. Numbers are per sample.

    Attributes:
        node, origin: where.
        algorithm: its name and levels.
        products: of blocks.
        multiplications, additions: executed (sums of a constant weight are none); plain_multiplications: by definition.
        operand_bits: of the sums of both operands' blocks.
        weight_bytes: of the stored sums (0 for a product of two activations); plain_weight_bytes: of the int8 weight.
    """

    node: str
    origin: str
    algorithm: str
    products: int
    multiplications: int
    plain_multiplications: int
    additions: int
    operand_bits: tuple[int, int]
    weight_bytes: int
    plain_weight_bytes: int


def block_products(gm: fx.GraphModule) -> list[BlockProduct]:
    """One entry per product in blocks of an integer graph."""
    return [_block_product(gm, node) for node in calls(gm, *BLOCK_PRODUCTS)]


def multiplications(node: fx.Node) -> int:
    """Multiplications per sample of a product in blocks."""
    size, products = argument(node, "blocks"), _products(node)
    return products * _dimensions(node).blocks(tuple(size)).multiplications


def _block_product(gm: fx.GraphModule, node: fx.Node) -> BlockProduct:
    whole, products = _dimensions(node), _products(node)
    n, m, p = argument(node, "blocks")
    part = whole.blocks((n, m, p))
    is_layer = is_call(node, ops.bilinear_linear.default)
    decode = constant(gm, argument(node, "decode"))
    additions = (len(decode) - n * p) * part.n * part.p
    weight_bytes = 0
    if is_layer:
        weight, encode = (constant(gm, argument(node, name)) for name in ("weight", "encode"))
        additions += (len(encode) - products) * part.m * part.p
        bits = bits_needed(int(weight.min()), int(weight.max())), _bits(gm, node, "zero_point", encode, m * p, products)
        weight_bytes = weight.nbytes
    else:
        left, right = (constant(gm, argument(node, name)) for name in ("encode_a", "encode_b"))
        additions += (len(left) - products) * part.n * part.m + (len(right) - products) * part.m * part.p
        bits = (
            _bits(gm, node, "a_zero_point", left, n * m, products),
            _bits(gm, node, "b_zero_point", right, m * p, products),
        )
    plain = node.meta.get(DEFINITION, Definition(whole.multiplications, whole.n * whole.m if is_layer else 0))
    return BlockProduct(
        node.name, tensor_meta(node).origin.module, node.meta.get(ALGORITHM, "-"), products, products * part.multiplications,
        plain.multiplications, additions * part.count, bits, weight_bytes, plain.weight_elements,
    )  # fmt: skip


def _bits(gm: fx.GraphModule, node: fx.Node, zero_point: str, program: Tensor, blocks: int, products: int) -> int:
    """Bits of the sums of codes 0..255 minus their zero points."""
    zero = constant(gm, argument(node, zero_point))
    centered: Interval = exactly(-int(zero.max()), 255 - int(zero.min()))
    return operand_interval(centered, program, blocks, products).bits


def _products(node: fx.Node) -> int:
    return shape(node.args[2])[0] if is_call(node, ops.bilinear_linear.default) else argument(node, "products")


def _dimensions(node: fx.Node) -> Dimensions:
    if is_call(node, ops.bilinear_matmul.default):
        return matmul_dimensions(*(one_sample_shape(argument(node, name)) for name in ("a", "b")))
    rows, axis = one_sample_shape(argument(node, "x")), argument(node, "axis")
    depth = rows.pop(axis)
    return layer_dimensions(rows, depth, one_sample_shape(node)[axis])
