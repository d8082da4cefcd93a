"""One spelling for pooling and for reductions over whole dimensions.

pooling over everything                                  ->  mean.dim(keepdim)
adaptive pooling whose windows divide the input evenly   ->  avg_pool, max_pool
sum, amax, amin, max(x, dim)[0]                          ->  mean.dim, max_pool
max_unpool                                               ->  products with the places of the maxima
"""

from __future__ import annotations

import itertools
import math
import operator
import re

import torch
from torch import fx

from fxcompress.dialects import ADAPTIVE_MAX_POOL, ADD, CLAMP, MUL, SUB
from fxcompress.graph import argument, dtype, is_call, per_dimension, rank, shape

from ._constructors import CAT, PAD, PERMUTE, RESHAPE, SLICE, reshaped, same_shape, static
from ._expression import Expression, Op, Refused

aten = torch.ops.aten

AVERAGE_POOL = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}
MAX_POOL = {1: aten.max_pool1d.default, 2: aten.max_pool2d.default, 3: aten.max_pool3d.default}
ADAPTIVE_AVERAGE_POOL = {
    1: aten.adaptive_avg_pool1d.default, 2: aten.adaptive_avg_pool2d.default, 3: aten.adaptive_avg_pool3d.default
}  # fmt: skip
MEAN, NEG = aten.mean.dim, aten.neg.default


def max_pool(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """max_pool(x, kernel, stride, padding, dilation, ceil_mode)"""
    n = _spatial(call)
    kernel = per_dimension(argument(call, "kernel_size"), n)
    stride = per_dimension(argument(call, "stride"), n) or kernel
    return Op(MAX_POOL[n], call.args[0], kernel, stride, per_dimension(argument(call, "padding"), n),
              per_dimension(argument(call, "dilation"), n), argument(call, "ceil_mode"))  # fmt: skip


def _spatial(call: fx.Node) -> int:
    """Spatial dimensions an operator works on, from its name: 2 for avg_pool2d."""
    return int(re.search(r"(\d)d", call.target._schema.name)[1])


def max_pool_with_indices(call: fx.Node, gm: fx.GraphModule) -> Expression | None:
    """max_pool_with_indices(x, ...)[0] -> max_pool(x, ...)"""
    return max_pool(call.args[0], gm) if call.args[1] == 0 else None


def max_unpool(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused | None:
    """max_unpool(v, positions of the maxima of x): per tap of the window v where x has its first maximum there, else 0

    m_t = 1 + sign(x_t - max_pool(x)) is 1 at every maximum, max(0, m_t - m_0 - ... - m_(t-1)) at the first one only.
    """
    v, positions, size = call.args[:3]
    if not (is_call(positions, operator.getitem) and is_call(positions.args[0], aten.max_pool2d_with_indices.default)):
        return Refused("its positions do not come from a max pooling")
    x, window, stride, padding, dilation, ceil_mode = max_pool(positions.args[0], gm).args
    if stride != window or any(padding) or dilation != [1, 1] or ceil_mode or tuple(size) != shape(x)[-2:]:
        return Refused("it does not undo a pooling over windows that lie side by side")
    h, w = (int(s) for s in shape(v)[-2:])
    peaks, earlier, parts = Op(MAX_POOL[2], x, window, stride, padding, dilation, False), None, []
    for tap in itertools.product(*map(range, window)):
        taps = x
        for dim, start, step, count in zip((2, 3), tap, window, (h, w), strict=True):
            taps = Op(SLICE, taps, dim, start, start + (count - 1) * step + 1, step)
        here = Op(ADD, Op(aten.sign.default, Op(SUB, taps, peaks)), 1.0)
        first = here if earlier is None else Op(CLAMP, Op(SUB, here, earlier), 0.0, None)
        earlier = here if earlier is None else Op(ADD, earlier, here)
        parts.append(Op(RESHAPE, Op(MUL, v, first), [-1, int(shape(v)[1]), 1, h, w]))
    taps = Op(RESHAPE, Op(CAT, parts, 2), [-1, int(shape(v)[1]), *window, h, w])
    spread = Op(RESHAPE, Op(PERMUTE, taps, [0, 1, 4, 2, 5, 3]), [-1, int(shape(v)[1]), h * window[0], w * window[1]])
    rest = [size[1] - w * window[1], size[0] - h * window[0]]
    return Op(PAD, spread, [0, rest[0], 0, rest[1]], 0.0) if any(rest) else spread


def average_pool(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """avg_pool(x, kernel, stride, padding, ceil_mode, count_include_pad[, divisor]); over everything -> mean"""
    n = _spatial(call)
    kernel, padding = per_dimension(argument(call, "kernel_size"), n), per_dimension(argument(call, "padding"), n)
    stride = per_dimension(argument(call, "stride"), n) or kernel
    divisor = argument(call, "divisor_override") if n > 1 else None
    if tuple(kernel) == shape(call.args[0])[-n:] and not any(padding) and divisor is None:
        return _mean(call.args[0], range(-n, 0))
    rest = [argument(call, "ceil_mode"), argument(call, "count_include_pad"), *([divisor] if n > 1 else [])]
    return Op(AVERAGE_POOL[n], call.args[0], kernel, stride, padding, *rest)


def adaptive_average_pool(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """output 1 -> mean;  windows that divide the input evenly -> avg_pool;  same size -> x"""
    n = _spatial(call)
    x, output = call.args[0], per_dimension(argument(call, "output_size"), n)
    sizes = shape(x)[-n:]
    if list(sizes) == output:
        return x
    if all(o == 1 for o in output):
        return _mean(x, range(-n, 0))
    if any(s % o for s, o in zip(sizes, output)):
        return Op(ADAPTIVE_AVERAGE_POOL[n], x, output)
    kernel = [s // o for s, o in zip(sizes, output)]
    return Op(AVERAGE_POOL[n], x, kernel, kernel, [0] * n, False, True, *([None] if n > 1 else []))


def adaptive_max_pool(call: fx.Node, gm: fx.GraphModule) -> Expression | None:
    """adaptive_max_pool(x, output)[0] -> max_pool if the windows divide the input evenly, else without the indices"""
    source, index = call.args
    n = _spatial(source)
    x, output = source.args[0], per_dimension(argument(source, "output_size"), n)
    sizes = shape(x)[-n:]
    if index != 0:
        return None
    if any(s % o for s, o in zip(sizes, output)):
        return Op(ADAPTIVE_MAX_POOL, x, output)
    kernel = [s // o for s, o in zip(sizes, output)]
    return Op(MAX_POOL[n], x, kernel, kernel, [0] * n, [1] * n, False)


def _mean(x: fx.Node, dims) -> Expression:
    """mean over ``dims`` (kept, with size 1), ascending and non-negative; over one element: x."""
    dims = sorted(d % rank(x) for d in dims)
    if all(static(shape(x)[d]) and shape(x)[d] == 1 for d in dims):
        return x
    return Op(MEAN, x, dims, True)


def mean(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """mean(x, dims) -> mean(x, dims, keepdim), then reshape"""
    x, dims = call.args[0], _dims(call)
    if dtype(x) != dtype(call):
        return Refused("it changes the dtype")
    if any(not static(shape(x)[d]) for d in dims):
        return Refused("it reduces the batch")
    kept = _mean(x, dims)
    return kept if argument(call, "keepdim") else reshaped(kept, shape(call))


def _dims(call: fx.Node) -> list[int]:
    """The dimensions a reduction runs over, all of them when it names none."""
    named = any(a.name == "dim" for a in call.target._schema.arguments)
    return list((argument(call, "dim") if named else None) or range(rank(call.args[0])))


def sum_(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """sum(x, dims) -> mean(x, dims) n"""
    x, value = call.args[0], mean(call, gm)
    if isinstance(value, Refused):
        return value
    return Op(MUL, value, math.prod(int(shape(x)[d]) for d in _dims(call)))


def amax(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """amax(x, dims) -> max_pool: over the spatial dimensions directly, else over (N, before, dims, behind)"""
    return _largest(call.args[0], _dims(call), shape(call))


def amin(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """amin(x, dims) -> -amax(-x)"""
    return _negated(_largest(Op(NEG, call.args[0]), _dims(call), shape(call), like=call.args[0]))


def max_dim(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused | None:
    """max(x, dim)[0] -> amax(x, [dim])"""
    (source, index), x = call.args, call.args[0].args[0]
    return None if index else _largest(x, [argument(source, "dim")], shape(call))


def min_dim(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused | None:
    """min(x, dim)[0] -> -amax(-x, [dim])"""
    (source, index), x = call.args, call.args[0].args[0]
    return None if index else _negated(_largest(Op(NEG, x), [argument(source, "dim")], shape(call), like=x))


def _negated(x: Expression | Refused) -> Expression | Refused:
    return x if isinstance(x, Refused) else Op(NEG, x)


def _largest(x: Expression, dims: list[int], result: tuple, like: fx.Node | None = None) -> Expression | Refused:
    """The maximum over adjacent dimensions, in the shape ``result``. ``like``: a node of the shape of x."""
    sizes = shape(like or x)
    dims = sorted(d % len(sizes) for d in dims)
    first, n = dims[0], len(dims)
    if any(not static(sizes[d]) for d in dims):
        return Refused("it reduces the batch")
    if dims != list(range(first, first + n)):
        return Refused("it takes the maximum over dimensions that are not adjacent")
    if not (first == 2 and first + n == len(sizes) and n in MAX_POOL):
        before, behind = math.prod(sizes[1:first]), math.prod(sizes[first + n :])
        merged = (sizes[0], before, math.prod(sizes[d] for d in dims), behind)
        x, n, sizes = (x if same_shape(sizes, merged) else reshaped(x, merged)), 2, (*merged[:3], 1)
    window = [int(s) for s in sizes[2:]]
    return reshaped(Op(MAX_POOL[n], x, window, window, [0] * n, [1] * n, False), result)


#: overload -> rule(call, gm)
POOLINGS = {
    **dict.fromkeys(MAX_POOL.values(), max_pool),
    **dict.fromkeys(AVERAGE_POOL.values(), average_pool),
    **dict.fromkeys(
        [*ADAPTIVE_AVERAGE_POOL.values(), aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default],
        adaptive_average_pool,
    ),
    aten.mean.dim: mean,
    aten.mean.default: mean,
    aten.sum.dim_IntList: sum_,
    aten.sum.default: sum_,
    aten.amax.default: amax,
    aten.amin.default: amin,
}

#: overload -> rule(call, gm), of calls that take positions
UNPOOLINGS = {aten.max_unpool2d.default: max_unpool}

#: producer -> rule(getitem call, gm)
POOLING_PARTS = {
    aten.max_pool2d_with_indices.default: max_pool_with_indices,
    aten.max_pool3d_with_indices.default: max_pool_with_indices,
    **dict.fromkeys(
        [aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default],
        adaptive_max_pool,
    ),
    aten.max.dim: max_dim,
    aten.min.dim: min_dim,
}
