"""Constructors of movements that leave out what does nothing: a reshape to the same shape is the tensor itself."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress.dialects import ADD, MUL
from fxcompress.graph import argument, dtype, is_call, shape

from ._expression import Expression, Op, Refused

aten = torch.ops.aten

RESHAPE, PERMUTE, SLICE = aten.reshape.default, aten.permute.default, aten.slice.Tensor
GATHER, EXPAND, CAT, PAD = (
    aten.index_select.default,
    aten.expand.default,
    aten.cat.default,
    aten.constant_pad_nd.default,
)


def is_number(value: object) -> bool:
    return isinstance(value, int | float)


def static(size: object) -> bool:
    return not isinstance(size, torch.SymInt)


def same_size(a: object, b: object) -> bool:
    """Sizes equal without asking the shape environment: two ints, or the same expression."""
    if static(a) or static(b):
        return static(a) and static(b) and a == b
    return a.node.expr == b.node.expr


def same_shape(a: tuple, b: tuple) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


def reshaped(x: Expression, sizes: tuple) -> Expression | Refused:
    """x in the given sizes, of which at most one may be symbolic: it becomes -1."""
    if sum(not static(s) for s in sizes) > 1:
        return Refused("its result has two dimensions that depend on the batch")
    if isinstance(x, fx.Node) and same_shape(shape(x), sizes):
        return x
    return Op(RESHAPE, x, [int(s) if static(s) else -1 for s in sizes])


def permuted(x: fx.Node, order: list[int]) -> Expression:
    return x if order == sorted(order) else Op(PERMUTE, x, order)


def sliced(x: fx.Node, dim: int, start: int, stop: int, step: int = 1) -> Expression:
    """x[start:stop:step] along ``dim``; the whole of a dimension is x itself."""
    if (start, step) == (0, 1) and stop == shape(x)[dim]:
        return x
    return Op(SLICE, x, dim, start, stop, step)


def gathered(x: Expression, indices: dict[int, Tensor], sizes: tuple) -> Expression | Refused:
    """index_select along each dimension of ``indices`` (of the given present ``sizes``); identities are skipped."""
    for dim, index in indices.items():
        if not static(sizes[dim]):
            return Refused("it rearranges the batch")
        if not torch.equal(index, torch.arange(sizes[dim])):
            x = Op(GATHER, x, dim, index)
    return x


FILLS = {
    aten.zeros_like.default: 0.0, aten.zeros.default: 0.0, aten.new_zeros.default: 0.0,
    aten.ones_like.default: 1.0, aten.ones.default: 1.0, aten.new_ones.default: 1.0,
    aten.full_like.default: None, aten.full.default: None, aten.new_full.default: None,
}  # fmt: skip


def fill_value(node: object) -> float | None:
    """The number every element of a float tensor is (zeros_like(x), 0 x: 0), None if it is not such a tensor."""
    if is_call(node, MUL) and node.args[1] == 0:
        return 0.0
    if is_call(node, ADD) and is_number(node.args[1]) and fill_value(node.args[0]) == 0:
        return float(node.args[1])
    if not is_call(node, *FILLS) or not dtype(node).is_floating_point:
        return None
    value = FILLS[node.target]
    return float(argument(node, "fill_value")) if value is None else value
