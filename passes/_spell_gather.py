"""One spelling for everything that picks values by a constant index: index_select along one dimension at a time.

    flip, roll, repeat_interleave, x[:, [2, 0, 1]]      nearest resizing      reflect, replicate and circular padding

Linear resizing, which is no selection, has its one spelling here beside nearest.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from fxcompress.graph import argument, constant, is_constant, rank, shape

from ._constructors import gathered, same_shape, static
from ._expression import Expression, Op, Refused
from ._spell_tokens import indexed

aten = torch.ops.aten


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
    if (spelled := indexed(call, gm)) is not None:
        return spelled
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
    """upsample_linear, upsample_bilinear(x): by explicit size when the scale factors say the same; to itself -> x

    A factor that does not lead to a whole size (6 * 1.1 = 6.6 -> 6) samples at its own step, so it stays.
    """
    x, corners, sizes = call.args[0], argument(call, "align_corners"), list(shape(call)[2:])
    scales = _scales(call, len(sizes))
    overload = call.target if call.target._overloadname == "vec" else call.target._overloadpacket.vec
    if not corners and any(s is not None and n * s != m for s, n, m in zip(scales, shape(x)[2:], sizes)):
        return Op(overload, x, None, corners, scales)
    return x if same_shape(shape(x), shape(call)) else Op(overload, x, [int(s) for s in sizes], corners, None)


_PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


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


#: overload -> rule(call, gm)
GATHERS = {
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
    **dict.fromkeys(
        [aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default],
        reflection_pad,
    ),
    **dict.fromkeys(
        [aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default],
        replication_pad,
    ),
}  # fmt: skip
