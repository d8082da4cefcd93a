"""One spelling for activations.

relu, relu6, hardtanh, clamp_min, clip, ...     ->  clamp(x, min, max) with numbers
prelu, rrelu, glu                               ->  clamp, leaky_relu, mul, add, sigmoid
leaky_relu, elu, softplus, ...                  ->  the same with every argument written out
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fxcompress.dialects import ADD, CLAMP, MUL
from fxcompress.graph import argument, constant, is_constant, rank, shape

from ._constructors import RESHAPE, sliced, static
from ._expression import Expression, Op, Refused, functional_overload

aten = torch.ops.aten


def clamped(x: fx.Node, lo: object, hi: object) -> Expression:
    """clamp(x, lo, hi) with float bounds; no bound at all is x."""
    lo, hi = (None if v is None or math.isinf(v) else float(v) for v in (lo, hi))
    return x if lo is None and hi is None else Op(CLAMP, x, lo, hi)


def relu(call: fx.Node, gm: fx.GraphModule) -> Expression:
    return Op(CLAMP, call.args[0], 0.0, None)


def relu6(call: fx.Node, gm: fx.GraphModule) -> Expression:
    return Op(CLAMP, call.args[0], 0.0, 6.0)


def hardtanh(call: fx.Node, gm: fx.GraphModule) -> Expression:
    return clamped(call.args[0], argument(call, "min_val"), argument(call, "max_val"))


def clamp(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """clamp, clip, clamp_min, clamp_max(x) -> clamp(x, min, max); one-element constants are numbers"""
    names = {a.name for a in call.target._schema.arguments}
    bounds = [argument(call, name) if name in names else None for name in ("min", "max")]
    for i, bound in enumerate(bounds):
        if isinstance(bound, fx.Node):
            if not is_constant(bound) or constant(gm, bound).numel() != 1:
                return Refused("its bounds are tensors")
            bounds[i] = constant(gm, bound).item()
    return clamped(call.args[0], *bounds)


def threshold(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """threshold(x, t, t) = max(x, t);  with another value it jumps and stays"""
    x, limit, value = call.args
    return clamped(x, limit, None) if limit == value else Op(aten.threshold.default, x, limit, value)


def prelu(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """one slope: leaky_relu;  slopes w (C,): clamp(x, 0) + w clamp(x, max=0)"""
    x, weight = call.args
    if not is_constant(weight):
        return Refused("its slopes are not constants")
    slopes = constant(gm, weight)
    if slopes.numel() == 1:
        return Op(aten.leaky_relu.default, x, slopes.item())
    slopes = Op(RESHAPE, weight, [-1] + [1] * (rank(x) - 2))
    return Op(ADD, Op(CLAMP, x, 0.0, None), Op(MUL, Op(CLAMP, x, None, 0.0), slopes))


def rrelu(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """In eval mode rrelu is leaky_relu with the mean slope."""
    if argument(call, "training"):
        return Refused("rrelu in training mode is random")
    return Op(aten.leaky_relu.default, call.args[0], (argument(call, "lower") + argument(call, "upper")) / 2)


def glu(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """glu(x, d) -> a sigmoid(b), the halves of x along d"""
    x = call.args[0]
    dim = argument(call, "dim") % rank(x)
    n = shape(x)[dim]
    if not static(n):
        return Refused("it splits the batch")
    return Op(MUL, sliced(x, dim, 0, n // 2), Op(aten.sigmoid.default, sliced(x, dim, n // 2, n)))


def explicit(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """The same call with every positional argument written out."""
    positional = [a for a in call.target._schema.arguments if not a.kwarg_only]
    kwargs = {
        a.name: call.kwargs[a.name] for a in call.target._schema.arguments if a.kwarg_only and a.name in call.kwargs
    }
    return Op(functional_overload(call.target), *(argument(call, a.name) for a in positional), **kwargs)


#: overload -> rule(call, gm)
ACTIVATIONS = {
    aten.relu.default: relu,
    aten.relu6.default: relu6,
    aten.hardtanh.default: hardtanh,
    **dict.fromkeys(
        [
            aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_max.default, aten.clip.default,
            aten.clamp_min.Tensor, aten.clamp_max.Tensor, aten.clip.Tensor,
        ],
        clamp,
    ),
    aten.threshold.default: threshold,
    aten.prelu.default: prelu,
    aten._prelu_kernel.default: prelu,
    aten.rrelu.default: rrelu,
    aten.glu.default: glu,
    **dict.fromkeys(
        [
            aten.leaky_relu.default, aten.elu.default, aten.celu.default, aten.softplus.default, aten.hardshrink.default,
            aten.softshrink.default,
        ],
        explicit,
    ),
}  # fmt: skip
