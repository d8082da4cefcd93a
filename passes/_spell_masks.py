"""Attention masks: which elements take part in a softmax, as a bool tensor.

softmax(add(scores, mask))            mask 0 or at most -99 (-100, -1e4, finfo.min, -inf)   ->  masked_softmax(scores, kept)
softmax(masked_fill(scores, m, -inf)), softmax(where(m, scores, -1e9))                      ->  masked_softmax(scores, kept)

A large negative number added to a score would take all of the 8-bit range; exclusion takes none. Masks are constants (causal
ones, the windows of Swin) or computed from an integer input (the padding mask of BERT, taken for 0 and 1): then
``(1 - mask) * finfo.min`` and its likes have two values, which are followed through the graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress.dialects import ADD, MASKED_SOFTMAX, MOVEMENT, MUL, SUB
from fxcompress.graph import argument, constant, dtype, is_call, is_constant, is_float, one_sample_shape, rank, shape

from ._constructors import EXPAND, RESHAPE, fill_value, is_number, reshaped, same_size, static
from ._expression import Expression, Op, is_static, static_value

aten = torch.ops.aten

EXCLUDED = -99.0  # exp(-99) is 0 beside any score that takes part
_MOVES = MOVEMENT | {
    aten.unsqueeze.default, aten.view.default, aten.transpose.int, aten.squeeze.dim, aten.clone.default,
}  # fmt: skip
_CONVERSIONS = (aten.to.dtype, aten.to.device, aten._to_copy.default, aten.type_as.default, aten.to.dtype_layout)
_AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)


# ----------------------------------------------------------------------------------------------------------- bool masks


def kept(node: Expression, gm: fx.GraphModule) -> Expression | None:
    """A bool mask (True: takes part) without needless parts, broadcastable to it; None if all of it is True."""
    if isinstance(node, Op):
        return node
    if is_static(node):
        value = static_value(gm, node)
        return None if bool(value.all()) else value
    if is_call(node, EXPAND, aten.expand_as.default):
        return kept(node.args[0], gm)
    if is_call(node, *_AND):
        both = [m for m in (kept(operand, gm) for operand in node.args) if m is not None]
        return Op(aten.logical_and.default, *both) if len(both) == 2 else next(iter(both), None)
    return node


def masked_softmax(scores: Expression, mask: Expression | None) -> Op:
    return Op(aten.softmax.int, scores, -1) if mask is None else Op(MASKED_SOFTMAX, scores, mask)


# ------------------------------------------------------------------------------------------------------- additive masks


def excluding(x: fx.Node, gm: fx.GraphModule) -> Expression | None:
    """softmax(x) over the last dimension where x carries an additive mask, else None."""
    if is_call(x, RESHAPE) and same_size(shape(x)[-1], shape(x.args[0])[-1]):  # rows stay rows
        inner = excluding(x.args[0], gm)
        return None if inner is None else reshaped(inner, shape(x))
    if is_call(x, aten.masked_fill.Scalar, aten.masked_fill.Tensor) and _number(x.args[2], gm) <= EXCLUDED:
        return masked_softmax(x.args[0], _negated(x.args[1], gm))
    if is_call(x, *_WHERE):
        condition, chosen, other = x.args
        if _number(other, gm) <= EXCLUDED and _is_scores(chosen, x):
            return masked_softmax(chosen, kept(condition, gm))
        if _number(chosen, gm) <= EXCLUDED and _is_scores(other, x):
            return masked_softmax(other, _negated(condition, gm))
    if is_call(x, ADD) and argument(x, "alpha") == 1:
        pairs = ((a, b) for a, b in (x.args, x.args[::-1]) if _is_scores(a, x) and isinstance(b, fx.Node))
        return next((found for scores, mask in pairs if (found := _added(scores, mask, x, gm)) is not None), None)
    return None


def _is_scores(scores: object, x: fx.Node) -> bool:
    return isinstance(scores, fx.Node) and not is_static(scores) and rank(scores) == rank(x)


def _added(scores: Expression, mask: fx.Node, x: fx.Node, gm: fx.GraphModule) -> Expression | None:
    """softmax(scores + mask), shaped like x; None if the mask excludes nothing."""
    if is_call(mask, ADD) and not is_static(mask):
        for bias, rest in (mask.args, mask.args[::-1]):
            if is_static(bias) and isinstance(rest, fx.Node):
                return _added(Op(ADD, scores, bias), rest, x, gm)
    value = _of_each_sample(mask, gm)
    if value is not None:
        return _constant_mask(scores, value.float(), x)
    found = _two_valued(mask, gm)
    if found is None:
        return None
    if found.clear <= EXCLUDED and found.set == 0:
        return masked_softmax(scores, kept(found.bit, gm))
    if found.set <= EXCLUDED and found.clear == 0:
        return masked_softmax(scores, _negated(found.bit, gm))
    return None


def _constant_mask(scores: Expression, value: Tensor, x: fx.Node) -> Expression | None:
    """``value`` is repeated along dimension 0 for every sample. Swin: k windows of a sample have a mask each::

    softmax((N k, H, L, L) + (k, 1, L, L) N times)  ->  masked_softmax((N, k, H, L, L), (k, 1, L, L)), back to (N k, H, L, L)
    """
    taking_part = value > EXCLUDED
    if bool(taking_part.all()):
        return None
    bias = value.masked_fill(~taking_part, 0.0)
    if value.ndim == rank(x) and len(value) > 1 and not static(shape(x)[0]):
        scores = Op(RESHAPE, scores, [-1, len(value), *map(int, shape(x)[1:])])
    scores = Op(ADD, scores, bias) if bool(bias.any()) else scores
    return Op(RESHAPE, masked_softmax(scores, taking_part), [-1, *map(int, shape(x)[1:])])


def _of_each_sample(node: object, gm: fx.GraphModule) -> Tensor | None:
    """The constant that ``node`` holds for every sample: what is computed from constants by repeating them for the batch."""
    if not isinstance(node, fx.Node):
        return None
    if is_static(node):
        return static_value(gm, node)
    if not is_call(node, EXPAND, *_RESHAPES) or any(not static(n) for n in shape(node)[1:]):
        return None
    value = _of_each_sample(node.args[0], gm)
    if value is None:
        return None
    return (value.expand if is_call(node, EXPAND) else value.reshape)(one_sample_shape(node))


@dataclass
class _TwoValued:
    """A tensor that is ``set`` where ``bit`` (bool) is True and ``clear`` elsewhere."""

    bit: Expression
    clear: float
    set: float


def _two_valued(node: object, gm: fx.GraphModule) -> _TwoValued | None:
    """Follow a computation on an integer mask of zeros and ones."""
    if not isinstance(node, fx.Node) or is_constant(node):
        return None
    if not is_float(node):
        bit = node if dtype(node) == torch.bool else Op(aten.ne.Scalar, node, 0)
        return _TwoValued(bit, 0.0, 1.0)
    if is_call(node, EXPAND, *_CONVERSIONS):
        return _two_valued(node.args[0], gm)
    if is_call(node, *_MOVES):
        inner = _two_valued(node.args[0], gm)
        return inner and _TwoValued(Op(node.target, inner.bit, *node.args[1:]), inner.clear, inner.set)
    if is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _filled(node, gm)
    if is_call(node, *_WHERE):
        condition, chosen, other = node.args
        values = _number(other, gm), _number(chosen, gm)
        return None if any(map(math.isnan, values)) else _TwoValued(condition, *values)
    return _arithmetic(node, gm)


def _filled(node: fx.Node, gm: fx.GraphModule) -> _TwoValued | None:
    """masked_fill(x, x != 0, v) of a two-valued x; masked_fill(constant, m, v)."""
    x, condition, value = node.args[0], node.args[1], _number(node.args[2], gm)
    if not math.isnan(ground := _number(x, gm)):
        return _TwoValued(condition, ground, value)
    inner = _two_valued(x, gm)
    if inner is None or not is_call(condition, *_CONVERSIONS, aten.ne.Scalar) or condition.args[0] is not x:
        return None
    return _TwoValued(inner.bit, *(value if v else v for v in (inner.clear, inner.set)))


def _arithmetic(node: fx.Node, gm: fx.GraphModule) -> _TwoValued | None:
    """x + c, x - c, c - x, c x, x / c with a number c."""
    if not is_call(node, *_FUNCTIONS):
        return None
    sources = [(i, found) for i, a in enumerate(node.args[:2]) if (found := _two_valued(a, gm)) is not None]
    if len(sources) != 1 or (len(node.args) > 1 and math.isnan(_number(node.args[1 - sources[0][0]], gm))):
        return None
    (i, inner), rest = sources[0], [_number(a, gm) for a in node.args[:2]]

    def at(value: float) -> float:
        rest[i] = value
        return float(_FUNCTIONS[node.target](*(torch.tensor(v, dtype=torch.float64) for v in rest)))

    return _TwoValued(inner.bit, at(inner.clear), at(inner.set))


_RESHAPES = (RESHAPE, aten.view.default, aten.unsqueeze.default)
_WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
_FUNCTIONS = {
    **dict.fromkeys([ADD, aten.add.Scalar], torch.add),
    **dict.fromkeys([SUB, aten.sub.Scalar], torch.sub),
    **dict.fromkeys([MUL, aten.mul.Scalar], torch.mul),
    **dict.fromkeys([aten.rsub.Scalar, aten.rsub.Tensor], lambda a, b: b - a),
    **dict.fromkeys([aten.div.Tensor, aten.div.Scalar], torch.div),
}


def _number(value: object, gm: fx.GraphModule) -> float:
    """The one number a value holds, NaN if it holds more than one or is computed."""
    if is_number(value):
        return float(value)
    if not isinstance(value, fx.Node):
        return math.nan
    if (fill := fill_value(value)) is not None:
        return fill
    if not is_static(value):
        return math.nan
    tensor = constant(gm, value) if is_constant(value) else static_value(gm, value)
    return float(tensor.flatten()[0]) if tensor.numel() and bool((tensor == tensor.flatten()[0]).all()) else math.nan


def _negated(mask: Expression, gm: fx.GraphModule) -> Expression | None:
    """Where a bool mask is False; None if that is everywhere."""
    if isinstance(mask, Op):
        return Op(aten.logical_not.default, mask)
    if is_static(mask):
        value = ~static_value(gm, mask)
        return None if bool(value.all()) else value
    if is_call(mask, EXPAND, aten.expand_as.default):
        return _negated(mask.args[0], gm)
    return Op(aten.logical_not.default, mask)
