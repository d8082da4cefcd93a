"""One spelling for taking, padding and joining parts of a tensor.

slice, narrow, select, chunk(x)[i], split(x)[i], unbind(x)[i]     ->  slice (and a reshape)
pad, cat with zeros                                               ->  constant_pad_nd
stack, repeat, tile, hstack                                       ->  cat
zeros_like, zeros, full of the batch                              ->  0 x, 0 x + v
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fxcompress.dialects import ADD, MUL
from fxcompress.graph import argument, is_call, is_float, rank, shape

from ._constructors import (
    CAT,
    EXPAND,
    FILLS,
    PAD,
    RESHAPE,
    SLICE,
    fill_value,
    reshaped,
    same_shape,
    same_size,
    sliced,
    static,
)
from ._expression import Expression, Op, Refused
from ._spell_gather import padded
from ._spell_tokens import shared_tokens

aten = torch.ops.aten


def slice_(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused | None:
    """slice(x, dim, start, end, step) with 0 <= start <= end <= size"""
    x, dim = call.args[0], argument(call, "dim") % rank(call)
    start, stop, step = (argument(call, name) for name in ("start", "end", "step"))
    if step == 1 and same_size(shape(x)[dim], shape(call)[dim]):
        return x
    if not static(shape(x)[dim]) or isinstance(start, fx.Node) or isinstance(stop, fx.Node):
        return Refused("it slices the batch")
    return sliced(x, dim, *slice(start, stop, step).indices(shape(x)[dim]))


def narrow(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """narrow(x, dim, start, length) -> slice"""
    x, dim, start, length = call.args
    dim %= rank(x)
    if not all(isinstance(v, int) for v in (start, length)) or not static(shape(x)[dim]):
        return Refused("it slices the batch")
    start %= max(shape(x)[dim], 1)
    return sliced(x, dim, start, start + length)


def select(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """x[..., i, ...] -> reshape(slice(x, dim, i, i + 1))"""
    x, dim, index = call.args
    dim %= rank(x)
    if not isinstance(index, int) or not static(shape(x)[dim]):
        return Refused("it selects a sample of the batch")
    index %= shape(x)[dim]
    return reshaped(sliced(x, dim, index, index + 1), shape(call))


def part(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """chunk(x, n)[i], split(x, sizes)[i], unbind(x)[i] -> slice"""
    source, index = call.args
    x, dim = source.args[0], argument(source, "dim") % rank(source.args[0])
    if not static(shape(x)[dim]):
        return Refused("it splits the batch")
    parts = source.meta["val"]
    index %= len(parts)
    if source.target is aten.unbind.int:
        return reshaped(sliced(x, dim, index, index + 1), shape(call))
    start = sum(int(p.shape[dim]) for p in parts[:index])
    return sliced(x, dim, start, start + int(parts[index].shape[dim]))


# -------------------------------------------------------------------------------------------------------- pad and cat


def pad(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """F.pad(x, pad, mode, value) -> constant_pad_nd, or index_select for reflect, replicate and circular"""
    mode = argument(call, "mode")
    return padded(call, mode) if mode != "constant" else constant_pad(call, gm)


def constant_pad(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """constant_pad_nd(x, pad, value): no zero pads of leading dimensions, negative ones as a slice"""
    x, widths = call.args[0], list(call.args[1])
    fill = argument(call, "value") if call.target is PAD else argument(call, "value") or 0.0
    for i in range(0, len(widths), 2):
        before, after = widths[i : i + 2]
        dim = rank(x) - 1 - i // 2
        if (before or after) and not static(shape(x)[dim]):
            return Refused("it pads the batch")
        if before < 0 or after < 0:
            cropped = Op(SLICE, x, dim, max(-before, 0), int(shape(x)[dim]) + min(after, 0), 1)
            widths[i : i + 2] = [max(before, 0), max(after, 0)]
            return Op(PAD, cropped, widths, float(fill)) if any(widths) else cropped
    while widths and not any(widths[-2:]):
        widths = widths[:-2]
    return Op(PAD, x, widths, float(fill)) if widths else x


def cat(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """cat([x], d) -> x;  cat([x, zeros], d) -> constant_pad_nd(x);  d >= 0"""
    tensors, dim = list(call.args[0]), argument(call, "dim") % rank(call)
    if len(tensors) == 1:
        return tensors[0]
    if (spelled := shared_tokens(call, gm)) is not None:
        return spelled
    fills = [fill_value(t) for t in tensors]
    ends = fills[0] is not None, fills[-1] is not None
    if sum(f is None for f in fills) and any(ends) and static(shape(call)[dim]):
        i = 0 if ends[0] else len(tensors) - 1
        rest = tensors[1:] if ends[0] else tensors[:-1]
        inner = rest[0] if len(rest) == 1 else Op(CAT, rest, dim)
        width = int(shape(tensors[i])[dim])
        widths = [0, 0] * (rank(call) - 1 - dim) + ([width, 0] if ends[0] else [0, width])
        return Op(PAD, inner, widths, fills[i])
    return Op(CAT, tensors, dim)


def stack(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """stack(tensors, d) -> cat of reshapes with a new dimension of 1"""
    tensors, dim = call.args[0], argument(call, "dim") % rank(call)
    part = (*shape(call)[:dim], 1, *shape(call)[dim + 1 :])
    parts = [reshaped(t, part) for t in tensors]
    refused = next((p for p in parts if isinstance(p, Refused)), None)
    return refused or (Op(CAT, parts, dim) if len(parts) > 1 else parts[0])


def hstack(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """hstack(tensors) -> cat along dimension 1"""
    return Op(CAT, list(call.args[0]), 1 if rank(call) > 1 else 0)


def repeat(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """repeat(x, times), tile -> cat of copies per dimension, new leading dimensions by reshape"""
    x, times = call.args
    times = [1] * (rank(call) - len(times)) + list(times)
    leading = (1,) * (len(times) - rank(x))
    value = reshaped(x, (*leading, *shape(x))) if leading else x
    if isinstance(value, Refused):
        return value
    for dim, count in enumerate(times):
        if count == 0 or isinstance(count, fx.Node):
            return Refused("it repeats by a number that depends on the batch")
        value = Op(CAT, [value] * count, dim) if count > 1 else value
    return value


# --------------------------------------------------------------------------------------------------------------- fills


def filled(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused | None:
    """zeros_like(x) -> 0 x;  zeros([batch of x, ...]) -> 0 of one value of each sample, expanded;  full -> 0 x + v"""
    value, sizes = fill_value(call), shape(call)
    if value is None or all(map(static, sizes)):
        return None  # not float, or a constant
    like = _tensor_of_batch(call)
    if like is None:
        return Refused("its size depends on the batch in more than its first dimension, or on one of integers")
    if not same_shape(shape(like), sizes):
        flat = reshaped(like, (sizes[0], math.prod(shape(like)[1:])))
        one = Op(RESHAPE, Op(SLICE, flat, 1, 0, 1, 1), [-1, *[1] * (len(sizes) - 1)])
        like = Op(EXPAND, one, [-1, *map(int, sizes[1:])])
    zeros = Op(MUL, like, 0.0)
    return zeros if value == 0 else Op(ADD, zeros, value)


def _tensor_of_batch(call: fx.Node) -> fx.Node | None:
    """A float tensor whose first dimension is the batch and the call's first dimension."""
    for source in call.all_input_nodes:
        source = source.args[0] if is_call(source, aten.sym_size.int) else source
        sizes = shape(source)
        if (
            is_float(source)
            and sizes
            and same_size(sizes[0], shape(call)[0])
            and all(map(static, (*sizes[1:], *shape(call)[1:])))
        ):
            return source
    return None


#: overload -> rule(call, gm)
SELECTIONS = {
    **dict.fromkeys(FILLS, filled),
    aten.slice.Tensor: slice_,
    aten.narrow.default: narrow,
    aten.select.int: select,
    aten.pad.default: pad,
    aten.constant_pad_nd.default: constant_pad,
    **dict.fromkeys([aten.cat.default, aten.concat.default, aten.concatenate.default], cat),
    aten.stack.default: stack,
    aten.hstack.default: hstack,
    aten.repeat.default: repeat,
    aten.tile.default: repeat,
}

#: producer -> rule(getitem call, gm)
PARTS = dict.fromkeys(
    [
        aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.unsafe_split.Tensor,
        aten.unsafe_chunk.default, aten.tensor_split.sections, aten.tensor_split.indices, aten.unbind.int,
    ],
    part,
)  # fmt: skip
