"""One spelling for arithmetic, and for activations written out in it.

add, sub, mul of tensors without alpha; numbers and constants stand second; a quotient is a product
x * sigmoid(x), x * relu6(x + 3) / 6, ...               ->  silu(x), hardswish(x), ...
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fxcompress.dialects import ADD, CLAMP, MUL, SUB
from fxcompress.graph import argument, constant, is_call, is_constant, shape

from ._constructors import EXPAND, fill_value, is_number, same_shape
from ._expression import Expression, Op, Refused
from ._spell_normalization import normalized, unit_length
from ._spell_tokens import shared_embedding

aten = torch.ops.aten

RECIPROCAL, SIGMOID, HARDSIGMOID = aten.reciprocal.default, aten.sigmoid.default, aten.hardsigmoid.default


# ----------------------------------------------------------------------------------------------------------- operands


def operands(call: fx.Node, gm: fx.GraphModule) -> tuple:
    """(self, other) with one-element constants and filled tensors as numbers, and needless ``expand``s left out."""
    a, b = call.args[0], argument(call, "other")
    first, second = _operand(a, b, call, gm), _operand(b, a, call, gm)
    return (a, second) if is_number(first) and is_number(second) else (first, second)


def _operand(value: object, other: object, call: fx.Node, gm: fx.GraphModule) -> object:
    if not isinstance(value, fx.Node) or not isinstance(other, fx.Node) or not same_shape(shape(other), shape(call)):
        return value
    if is_constant(value) and constant(gm, value).numel() == 1 and not is_constant(other):
        return constant(gm, value).item()
    if (number := fill_value(value)) is not None:
        return number
    if is_call(value, EXPAND, aten.expand_as.default):
        return value.args[0]  # broadcasting does the same
    if (shared := shared_embedding(value, gm)) is not None:
        return shared
    return value


def _second(a: object, b: object) -> tuple:
    """Numbers and constants stand second in a commutative operation."""
    swap = is_number(a) or (isinstance(a, fx.Node) and is_constant(a) and not is_number(b))
    return (b, a) if swap else (a, b)


def _plus(a: object, b: object) -> Expression:
    a, b = _second(a, b)
    if is_number(b) and b == 0:
        return a
    return Op(ADD, a, b)


def _times(a: object, factor: float) -> object:
    if is_number(a):
        return a * factor
    return a if factor == 1 else Op(MUL, a, factor)


# --------------------------------------------------------------------------------------------------------- arithmetic


def add(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """add(x, y, alpha) -> x + alpha y;  x + 0 -> x"""
    a, b = operands(call, gm)
    return _plus(a, _times(b, argument(call, "alpha")))


def sub(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """sub(x, y, alpha): x - c -> x + (-c);  c - x -> (-1) x + c;  else x - alpha y"""
    return _minus(*operands(call, gm), argument(call, "alpha"))


def rsub(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """rsub(x, y, alpha) -> y - alpha x"""
    a, b = operands(call, gm)
    return _minus(b, a, argument(call, "alpha"))


def _minus(a: object, b: object, alpha: float) -> Expression:
    if is_number(b) or is_constant(b):
        return _plus(a, _times(b, -alpha))
    if is_number(a) or is_constant(a):
        return _plus(_times(b, -alpha), a)
    return Op(SUB, a, _times(b, alpha))


def mul(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """1 x -> x;  x sigmoid(x) -> silu(x);  and the other activations people write out"""
    a, b = _second(*operands(call, gm))
    if is_number(b):
        return a if b == 1 else _written_out_scaled(a, b) or Op(MUL, a, b)
    return (
        _written_out(a, b)
        or _written_out(b, a)
        or normalized(a, b)
        or normalized(b, a)
        or unit_length(a, b)
        or Op(MUL, a, b)
    )


def div(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """x / c -> x (1/c);  x / y -> x reciprocal(y)"""
    a, b = operands(call, gm)
    if is_number(b):
        if b == 0:
            return Refused("it divides by zero")
        return a if b == 1 else _written_out_scaled(a, 1 / b) or Op(MUL, a, 1 / b)
    inverse = Op(RECIPROCAL, b)
    if is_number(a):
        return inverse if a == 1 else Op(MUL, inverse, a)
    return Op(MUL, inverse, a) if is_constant(a) else Op(MUL, a, inverse)


def _written_out(x: fx.Node, gate: fx.Node) -> Op | None:
    """x sigmoid(x) -> silu;  x hardsigmoid(x) -> hardswish;  x tanh(softplus(x)) -> mish"""
    if is_call(gate, SIGMOID) and gate.args[0] is x:
        return Op(aten.silu.default, x)
    if is_call(gate, HARDSIGMOID) and gate.args[0] is x:
        return Op(aten.hardswish.default, x)
    if (
        is_call(gate, aten.tanh.default)
        and is_call(inner := gate.args[0], aten.softplus.default)
        and inner.args[0] is x
    ):
        return Op(aten.mish.default, x) if (argument(inner, "beta"), argument(inner, "threshold")) == (1, 20) else None
    return None


def _written_out_scaled(x: fx.Node, factor: float) -> Op | None:
    """relu6(x + 3) / 6 -> hardsigmoid(x);  x relu6(x + 3) / 6 -> hardswish(x)"""
    if not math.isclose(factor, 1 / 6, rel_tol=1e-9):
        return None
    if (source := _relu6_of_plus_3(x)) is not None:
        return Op(HARDSIGMOID, source)
    if is_call(x, MUL):
        for a, b in (x.args, x.args[::-1]):
            if isinstance(a, fx.Node) and _relu6_of_plus_3(b) is a:
                return Op(aten.hardswish.default, a)
    return None


def _relu6_of_plus_3(node: object) -> fx.Node | None:
    """x if ``node`` is clamp(x + 3, 0, 6)."""
    if not is_call(node, CLAMP) or node.args[1:] != (0, 6) or not is_call(inner := node.args[0], ADD):
        return None
    return inner.args[0] if inner.args[1] == 3 else None


def addcmul(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """x + value a b"""
    x, a, b = call.args[:3]
    return Op(ADD, x, Op(MUL, Op(MUL, a, b), argument(call, "value")))


def lerp(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """lerp(x, y, w) -> x + w (y - x)"""
    x, y, weight = call.args
    return Op(ADD, x, Op(MUL, Op(SUB, y, x), weight))


def square(call: fx.Node, gm: fx.GraphModule) -> Expression:
    return Op(aten.pow.Tensor_Scalar, call.args[0], 2)


def maximum(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """max(x, c) -> clamp(x, c);  max(x, y) -> x + clamp(y - x, 0)"""
    return _extremum(call, gm, (0.0, None))


def minimum(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """min(x, c) -> clamp(x, max=c);  min(x, y) -> x + clamp(y - x, max=0)"""
    return _extremum(call, gm, (None, 0.0))


def _extremum(call: fx.Node, gm: fx.GraphModule, bounds: tuple) -> Expression:
    a, b = _second(*operands(call, gm))
    if is_number(b):
        return Op(CLAMP, a, *(None if bound is None else float(b) for bound in bounds))
    return Op(ADD, a, Op(CLAMP, Op(SUB, b, a), *bounds))


#: overload -> rule(call, gm)
ARITHMETIC = {
    **dict.fromkeys([aten.add.Tensor, aten.add.Scalar], add),
    **dict.fromkeys([aten.sub.Tensor, aten.sub.Scalar, aten.subtract.Tensor, aten.subtract.Scalar], sub),
    **dict.fromkeys([aten.rsub.Tensor, aten.rsub.Scalar], rsub),
    **dict.fromkeys([aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor, aten.multiply.Scalar], mul),
    **dict.fromkeys(
        [
            aten.div.Tensor, aten.div.Scalar, aten.divide.Tensor, aten.divide.Scalar, aten.true_divide.Tensor,
            aten.true_divide.Scalar,
        ],
        div,
    ),
    aten.addcmul.default: addcmul,
    aten.lerp.Scalar: lerp,
    aten.lerp.Tensor: lerp,
    aten.square.default: square,
    **dict.fromkeys([aten.maximum.default, aten.max.other], maximum),
    **dict.fromkeys([aten.minimum.default, aten.min.other], minimum),
}  # fmt: skip
