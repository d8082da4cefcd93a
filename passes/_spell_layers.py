"""One spelling for convolution, batch norm and pooling: every stride, padding and dilation a full list, every argument written out.

convolution, conv2d(padding="same"), ...      ->  conv{1,2,3}d, conv_transpose{1,2,3}d
addmm, mm, einsum, matmul with a parameter    ->  linear;  of two activations: matmul
pooling over everything                       ->  mean.dim(keepdim); adaptive pooling with even windows: avg_pool
"""

from __future__ import annotations

import math
import re

import torch
from torch import fx

from fxcompress.dialects import ADAPTIVE_MAX_POOL, BATCH_NORM, MUL
from fxcompress.graph import argument, dtype, rank, shape

from ._constructors import PAD, reshaped, static
from ._expression import Expression, Op, Refused

aten = torch.ops.aten

CONVOLUTION = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}
AVERAGE_POOL = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}
MAX_POOL = {1: aten.max_pool1d.default, 2: aten.max_pool2d.default, 3: aten.max_pool3d.default}
ADAPTIVE_AVERAGE_POOL = {
    1: aten.adaptive_avg_pool1d.default, 2: aten.adaptive_avg_pool2d.default, 3: aten.adaptive_avg_pool3d.default
}  # fmt: skip
MEAN = aten.mean.dim


def full(value: int | list[int], n: int) -> list[int]:
    """One number per spatial dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return values * n if len(values) == 1 else values


# -------------------------------------------------------------------------------------------------------- convolution


def conv(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """conv(x, w, b, stride, padding, dilation, groups); padding="same" -> explicit, uneven as constant_pad_nd"""
    x, weight, bias = call.args[0], call.args[1], argument(call, "bias")
    n = rank(weight) - 2
    if rank(x) != n + 2:
        return Refused(f"its input has {rank(x)} dimensions: it lacks the batch")
    stride, dilation = full(argument(call, "stride"), n), full(argument(call, "dilation"), n)
    padding = argument(call, "padding")
    if isinstance(padding, str):
        x, padding = _padding_by_name(x, padding, [d * (k - 1) for d, k in zip(dilation, shape(weight)[2:])])
    return Op(CONVOLUTION[n], x, weight, bias, stride, full(padding, n), dilation, argument(call, "groups"))


def _padding_by_name(x: fx.Node, name: str, totals: list[int]) -> tuple[Expression, list[int]]:
    """(input, symmetric padding): "valid" pads nothing; an odd total of "same" pads one more behind."""
    if name == "valid":
        return x, [0] * len(totals)
    odd = [t % 2 for t in totals]
    if any(odd):
        widths = [w for extra in reversed(odd) for w in (0, extra)]
        x = Op(PAD, x, widths, 0.0)
    return x, [t // 2 for t in totals]


def conv_transpose(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """conv_transpose(x, w, b, stride, padding, output_padding, groups, dilation)"""
    n = rank(call.args[1]) - 2
    if rank(call) != n + 2:
        return Refused(f"its input has {rank(call)} dimensions: it lacks the batch")
    lists = [full(argument(call, name), n) for name in ("stride", "padding", "output_padding")]
    return Op(TRANSPOSED[n], *call.args[:2], argument(call, "bias"), *lists, argument(call, "groups"),
              full(argument(call, "dilation"), n))  # fmt: skip


def convolution(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups) -> conv or conv_transpose"""
    return (conv_transpose if argument(call, "transposed") else conv)(call, gm)


_STATISTICS = ("input", "weight", "bias", "running_mean", "running_var")


def _batch_norm(call: fx.Node) -> Op:
    statistics = [argument(call, name) for name in _STATISTICS]
    return Op(BATCH_NORM, *statistics, False, argument(call, "momentum"), argument(call, "eps"), False)


def batch_norm(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """batch_norm(x, w, b, mean, var, False, momentum, eps, False)"""
    return Refused("it is in training mode") if argument(call, "training") else _batch_norm(call)


def native_batch_norm(call: fx.Node, gm: fx.GraphModule) -> Expression | None:
    """native_batch_norm(...)[0] in eval mode -> batch_norm"""
    source, index = call.args
    trains = source.target is aten.native_batch_norm.default and argument(source, "training")
    return None if index != 0 or trains else _batch_norm(source)


def instance_norm(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """instance_norm that uses running statistics -> batch_norm"""
    if argument(call, "use_input_stats"):
        return Refused("it normalizes with the statistics of each sample")
    return _batch_norm(call)


# ------------------------------------------------------------------------------------------------------------ pooling


def max_pool(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """max_pool(x, kernel, stride, padding, dilation, ceil_mode)"""
    n = _spatial(call)
    kernel = full(argument(call, "kernel_size"), n)
    stride = full(argument(call, "stride"), n) or kernel
    return Op(MAX_POOL[n], call.args[0], kernel, stride, full(argument(call, "padding"), n),
              full(argument(call, "dilation"), n), argument(call, "ceil_mode"))  # fmt: skip


def _spatial(call: fx.Node) -> int:
    """Spatial dimensions an operator works on, from its name: 2 for avg_pool2d."""
    return int(re.search(r"(\d)d", call.target._schema.name)[1])


def max_pool_with_indices(call: fx.Node, gm: fx.GraphModule) -> Expression | None:
    """max_pool_with_indices(x, ...)[0] -> max_pool(x, ...)"""
    return max_pool(call.args[0], gm) if call.args[1] == 0 else None


def average_pool(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """avg_pool(x, kernel, stride, padding, ceil_mode, count_include_pad[, divisor]); over everything -> mean"""
    n = _spatial(call)
    kernel, padding = full(argument(call, "kernel_size"), n), full(argument(call, "padding"), n)
    stride = full(argument(call, "stride"), n) or kernel
    divisor = argument(call, "divisor_override") if n > 1 else None
    if tuple(kernel) == shape(call.args[0])[-n:] and not any(padding) and divisor is None:
        return _mean(call.args[0], range(-n, 0))
    rest = [argument(call, "ceil_mode"), argument(call, "count_include_pad"), *([divisor] if n > 1 else [])]
    return Op(AVERAGE_POOL[n], call.args[0], kernel, stride, padding, *rest)


def adaptive_average_pool(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """output 1 -> mean;  windows that divide the input evenly -> avg_pool;  same size -> x"""
    n = _spatial(call)
    x, output = call.args[0], full(argument(call, "output_size"), n)
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
    x, output = source.args[0], full(argument(source, "output_size"), n)
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
    """amax(x, dims) over all spatial dimensions -> max_pool"""
    x, n = call.args[0], rank(call.args[0]) - 2
    if sorted(d % rank(x) for d in argument(call, "dim")) != list(range(2, 2 + n)) or n not in MAX_POOL:
        return Refused("only the maximum over all spatial dimensions is supported")
    sizes = [int(s) for s in shape(x)[2:]]
    return reshaped(Op(MAX_POOL[n], x, sizes, sizes, [0] * n, [1] * n, False), shape(call))


#: overload -> rule(call, gm)
LAYERS = {
    **dict.fromkeys(
        [
            aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
            aten.conv3d.padding,
        ],
        conv,
    ),
    **dict.fromkeys(TRANSPOSED.values(), conv_transpose),
    aten.convolution.default: convolution,
    aten._convolution.default: convolution,
    aten.batch_norm.default: batch_norm,
    aten.instance_norm.default: instance_norm,
    **dict.fromkeys(MAX_POOL.values(), max_pool),
    **dict.fromkeys(AVERAGE_POOL.values(), average_pool),
    **dict.fromkeys(
        [*ADAPTIVE_AVERAGE_POOL.values(), aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default],
        adaptive_average_pool,
    ),
    aten.mean.dim: mean,
    aten.mean.default: mean,
    aten.sum.dim_IntList: sum_,
    aten.amax.default: amax,
}  # fmt: skip

#: producer -> rule(getitem call, gm)
LAYER_PARTS = {
    aten.native_batch_norm.default: native_batch_norm,
    aten._native_batch_norm_legit_no_training.default: native_batch_norm,
    aten.max_pool2d_with_indices.default: max_pool_with_indices,
    aten.max_pool3d_with_indices.default: max_pool_with_indices,
    **dict.fromkeys(
        [aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default],
        adaptive_max_pool,
    ),
}
