"""One spelling for taking, joining and repeating parts of a tensor.

    slice, narrow, select, chunk(x)[i], split(x)[i]               ->  slice (and a reshape)
    flip, roll, indexing, nearest resizing, reflect padding, ...  ->  index_select with a constant index
    pad, cat with zeros                                           ->  constant_pad_nd
    stack, repeat, tile, hstack                                   ->  cat
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.graph import argument, constant, dtype, is_call, is_constant, rank, shape

from ._expression import Expression, Op, Refused
from ._spell_reshape import GATHER, reshaped, same_shape, same_size, static

aten = torch.ops.aten

SLICE, CAT, PAD = aten.slice.Tensor, aten.cat.default, aten.constant_pad_nd.default


# -------------------------------------------------------------------------------------------------------------- slice


def sliced(x: fx.Node, dim: int, start: int, stop: int, step: int = 1) -> Expression:
    """x[start:stop:step] along ``dim``; the whole of a dimension is x itself."""
    if (start, step) == (0, 1) and stop == shape(x)[dim]:
        return x
    return Op(SLICE, x, dim, start, stop, step)


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


# ------------------------------------------------------------------------------------------------------- index_select


def gathered(x: Expression, indices: dict[int, Tensor], sizes: tuple) -> Expression | Refused:
    """index_select along each dimension of ``indices`` (of the given present ``sizes``); identities are skipped."""
    for dim, index in indices.items():
        if not static(sizes[dim]):
            return Refused("it rearranges the batch")
        if not torch.equal(index, torch.arange(sizes[dim])):
            x = Op(GATHER, x, dim, index)
    return x


def flip(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """flip(x, dims) -> index_select with n-1 ... 0"""
    x, sizes = call.args[0], shape(call)
    dims = [d % len(sizes) for d in call.args[1]]
    if not all(static(sizes[d]) for d in dims):
        return Refused("it rearranges the batch")
    return gathered(x, {d: torch.arange(sizes[d]).flip(0) for d in dims}, sizes)


def roll(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """roll(x, shifts, dims) -> index_select with (i - shift) mod n"""
    x, sizes = call.args[0], shape(call)
    shifts, dims = argument(call, "shifts"), [d % len(sizes) for d in argument(call, "dims")]
    if not dims or not all(static(sizes[d]) for d in dims):
        return Refused("it rearranges the batch")
    return gathered(x, {d: (torch.arange(sizes[d]) - s) % sizes[d] for d, s in zip(dims, shifts)}, sizes)


def repeat_interleave(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """repeat_interleave(x, k, dim) -> index_select with 0 0 .. 1 1 .."""
    x, times, dim = call.args[0], argument(call, "repeats"), argument(call, "dim")
    if dim is None or not static(shape(x)[dim % rank(x)]):
        return Refused("it repeats the batch")
    dim %= rank(x)
    return gathered(x, {dim: torch.arange(shape(x)[dim]).repeat_interleave(times)}, shape(x))


def index(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """x[:, idx] with a constant idx (K,) -> index_select(x, 1, idx)"""
    x, indices = call.args
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(given) != 1 or not is_constant(given[0][1]) or not static(shape(x)[given[0][0]]):
        return Refused("only one constant index behind the batch is supported")
    dim, value = given[0][0], constant(gm, given[0][1])
    value = value.nonzero().flatten() if value.dtype == torch.bool and value.ndim == 1 else value
    if value.ndim != 1:
        return Refused(f"the index has {value.ndim} dimensions")
    return gathered(x, {dim: value.to(torch.int64) % shape(x)[dim]}, shape(x))


def nearest(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """upsample_nearest(x) -> index_select per dimension, the index found by resizing 0, 1, 2, ... with the same rule"""
    x, sizes = call.args[0], shape(call)
    spatial = len(sizes) - 2
    exact = "exact" in call.target._schema.name
    resize = aten._upsample_nearest_exact1d.default if exact else aten.upsample_nearest1d.default
    scales = _scales(call, spatial)
    indices = {}
    for i in range(spatial):
        ramp = torch.arange(shape(x)[2 + i], dtype=torch.float32)[None, None]
        indices[2 + i] = resize(ramp, [sizes[2 + i]], scales[i]).flatten().to(torch.int64)
    return gathered(x, indices, shape(x))


def _scales(call: fx.Node, spatial: int) -> list[float | None]:
    """The scale factor of each spatial dimension, None where the sizes determine it."""
    if call.target._overloadname == "vec":
        return list(argument(call, "scale_factors") or [None] * spatial)
    names = ["scales"] if spatial == 1 else ["scales_d", "scales_h", "scales_w"][3 - spatial :]
    return [argument(call, name) for name in names]


def resize_linear(call: fx.Node, gm: fx.GraphModule) -> Expression | None:
    """upsample_linear, upsample_bilinear(x): by explicit size when the scale factors say the same; same size -> x"""
    x, corners, sizes = call.args[0], argument(call, "align_corners"), list(shape(call)[2:])
    if same_shape(shape(x), shape(call)):
        return x
    scales = _scales(call, len(sizes))
    overload = call.target if call.target._overloadname == "vec" else call.target._overloadpacket.vec
    if corners or all(s is None or n * s == m for s, n, m in zip(scales, shape(x)[2:], sizes)):
        return Op(overload, x, [int(s) for s in sizes], corners, None)
    return Op(overload, x, None, corners, scales)


# ---------------------------------------------------------------------------------------------------- pad, cat, expand

_PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


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


def padded(call: fx.Node, mode: str) -> Expression | Refused:
    """index_select with the index numpy pads 0, 1, 2, ... to in the same mode"""
    x, widths, indices = call.args[0], argument(call, "pad" if call.target is aten.pad.default else "padding"), {}
    for i in range(0, len(widths), 2):
        dim = rank(x) - 1 - i // 2
        if min(widths[i : i + 2]) < 0 or not static(shape(x)[dim]):
            return Refused("it crops, or pads the batch")
        indices[dim] = torch.from_numpy(np.pad(np.arange(shape(x)[dim]), tuple(widths[i : i + 2]), _PAD_MODES[mode]))
    return gathered(x, indices, shape(x))


def reflection_pad(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    return padded(call, "reflect")


def replication_pad(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    return padded(call, "replicate")


_FILLS = {
    aten.zeros_like.default: 0.0, aten.zeros.default: 0.0, aten.new_zeros.default: 0.0,
    aten.ones_like.default: 1.0, aten.ones.default: 1.0, aten.new_ones.default: 1.0,
    aten.full_like.default: None, aten.full.default: None, aten.new_full.default: None,
}  # fmt: skip


def fill_value(node: object) -> float | None:
    """The number every element of a float tensor is (zeros_like(x): 0), None if it is not such a tensor."""
    if not is_call(node, *_FILLS) or not dtype(node).is_floating_point:
        return None
    value = _FILLS[node.target]
    return float(argument(node, "fill_value")) if value is None else value


def cat(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """cat([x], d) -> x;  cat([x, zeros], d) -> constant_pad_nd(x);  d >= 0"""
    tensors, dim = list(call.args[0]), argument(call, "dim") % rank(call)
    if len(tensors) == 1:
        return tensors[0]
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
    for dim, count in enumerate(times):
        if count == 0 or isinstance(count, fx.Node):
            return Refused("it repeats by a number that depends on the batch")
        value = Op(CAT, [value] * count, dim) if count > 1 else value
    return value


#: overload -> rule(call, gm)
SELECTIONS = {
    aten.slice.Tensor: slice_,
    aten.narrow.default: narrow,
    aten.select.int: select,
    aten.flip.default: flip,
    aten.roll.default: roll,
    aten.repeat_interleave.self_int: repeat_interleave,
    aten.index.Tensor: index,
    **dict.fromkeys(
        [
            aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec,
            aten.upsample_nearest1d.default, aten.upsample_nearest2d.default, aten.upsample_nearest3d.default,
            aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec,
            aten._upsample_nearest_exact3d.vec,
        ],
        nearest,
    ),
    **dict.fromkeys(
        [
            aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default, aten.upsample_linear1d.vec,
            aten.upsample_linear1d.default,
        ],
        resize_linear,
    ),
    aten.pad.default: pad,
    aten.constant_pad_nd.default: constant_pad,
    **dict.fromkeys(
        [aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default],
        reflection_pad,
    ),
    **dict.fromkeys(
        [aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default],
        replication_pad,
    ),
    **dict.fromkeys([aten.cat.default, aten.concat.default, aten.concatenate.default], cat),
    aten.stack.default: stack,
    aten.hstack.default: hstack,
    aten.repeat.default: repeat,
    aten.tile.default: repeat,
}  # fmt: skip

#: producer -> rule(getitem call, gm)
PARTS = dict.fromkeys(
    [
        aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.unsafe_split.Tensor,
        aten.unsafe_chunk.default, aten.tensor_split.sections, aten.tensor_split.indices, aten.unbind.int,
    ],
    part,
)  # fmt: skip
