"""Steps for pools, sums over dimensions and interpolation."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress.graph import argument
from fxcompress.reference_conv import windows
from fxcompress.reference_kernels import adaptive_bounds, pool_bounds

from . import structs
from .constants import varying_dims
from .epilogue import Target, group_varying_dims, pixel_branches, requantize_struct, with_channels_inside
from .fusion import Group
from .planner import Planner
from .views import CHANNELS_LAST, Pixels, View, merge_dims, spatial_pixels


def emit_sum_pool(planner: Planner, node: fx.Node, group: Group | None = None) -> None:
    kernel, stride, padding = (argument(node, name) for name in ("kernel", "stride", "padding"))
    sizes = planner.shapes[node.args[0]].shape[2:]
    bounds = [
        pool_bounds(n, k, s, padding[2 * i : 2 * i + 2])
        for i, (n, k, s) in enumerate(zip(sizes, kernel, stride, strict=True))
    ]
    _pool(planner, node, group, bounds, [1] * len(kernel), maximum=False)


def emit_adaptive_sum_pool(planner: Planner, node: fx.Node, group: Group | None = None) -> None:
    outputs = argument(node, "output_size")
    sizes = planner.shapes[node.args[0]].shape[2:]
    bounds = [adaptive_bounds(n, o) for n, o in zip(sizes, outputs, strict=True)]
    _pool(planner, node, group, bounds, [1] * len(outputs), maximum=False)


def emit_max_pool(planner: Planner, node: fx.Node) -> None:
    kernel, stride, padding, dilation = (argument(node, name) for name in ("kernel", "stride", "padding", "dilation"))
    sizes = planner.shapes[node.args[0]].shape[2:]
    bounds = [
        _max_bounds(n, k, s, padding[2 * i : 2 * i + 2], d)
        for i, (n, k, s, d) in enumerate(zip(sizes, kernel, stride, dilation, strict=True))
    ]
    _pool(planner, node, None, bounds, dilation, maximum=True)


def emit_adaptive_max_pool(planner: Planner, node: fx.Node) -> None:
    outputs = argument(node, "output_size")
    sizes = planner.shapes[node.args[0]].shape[2:]
    bounds = [adaptive_bounds(n, o) for n, o in zip(sizes, outputs, strict=True)]
    _pool(planner, node, None, bounds, [1] * len(outputs), maximum=True)


def _max_bounds(size: int, kernel: int, stride: int, padding, dilation: int) -> tuple[Tensor, Tensor]:
    """First and one-past-last tap of each window inside the tensor; the first one stays on the window's grid of taps."""
    starts = torch.arange(windows(size, kernel, stride, padding, dilation)) * stride - padding[0]
    ends = (starts + dilation * (kernel - 1) + 1).clamp(max=size)
    missing = (-starts).clamp(min=0)
    return starts + -(-missing // dilation) * dilation, ends


def _pool(
    planner: Planner, node: fx.Node, group: Group | None, bounds: list[tuple[Tensor, Tensor]], dilation, *, maximum
) -> None:
    if planner.rank(node.args[0]) != len(bounds) + 2:
        raise ValueError(
            f"pooling a tensor of {planner.rank(node.args[0])} dimensions over {len(bounds)} is not supported"
        )
    x = with_channels_inside(planner, planner.view(node.args[0]), CHANNELS_LAST, node, spatial_pixels)
    target = Target.of(node, group)
    out = planner.output(target.node, CHANNELS_LAST)
    params = _pool_params(planner, spatial_pixels(x), spatial_pixels(out).pixel_stride, bounds, dilation)
    params.maximum = int(maximum)
    if not maximum:
        params.zero_point = planner.constants.per_channel(planner.constant(node.args[1]), params.channels, "int32")
    _finish(planner, params, "pool", x, out, target, spatial_pixels)


def _pool_params(planner: Planner, x: Pixels, out_pixel_stride: int, bounds, dilation) -> structs.Pool:
    params = structs.Pool(
        batch=x.batch, channels=x.channels, in_image_stride=x.image_stride, out_pixel_stride=out_pixel_stride
    )
    missing = 3 - len(bounds)
    bounds = [(torch.zeros(1), torch.ones(1))] * missing + bounds
    params.in_stride[:], params.dilation[:] = x.stride, [1] * missing + list(dilation)
    for i, (starts, ends) in enumerate(bounds):
        params.out_size[i] = len(starts)
        params.start[i] = planner.constants.array(starts, "int32")
        params.end[i] = planner.constants.array(ends, "int32")
    return params


def _finish(planner: Planner, params, op: str, x: View, out: View, target: Target, pixels) -> None:
    if target.group is not None:
        params.requantize = requantize_struct(planner, target.group, params.channels)
    branches, strides = pixel_branches(planner, target, CHANNELS_LAST, pixels)
    for i, stride in enumerate(strides, start=1):
        params.branch_pixel_stride[i] = stride
    planner.step(op, params, [x, *branches], out, target.node)


def emit_sum(planner: Planner, node: fx.Node, group: Group | None = None) -> None:
    """Sum over dimensions; over all spatial ones it is a pool with one window per image."""
    x, rank = planner.view(node.args[0]), planner.rank(node.args[0])
    dims = sorted(d % rank for d in node.args[2])
    alone = group is None or len(group.branches) == 1
    if (
        rank > 2
        and dims == list(range(2, rank))
        and spatial_pixels(x) is not None
        and alone
        and _along_channels(planner, group)
    ):
        _global_pool(planner, node, group, x)
        return
    target = Target.of(node, group)
    out = planner.output(target.node)
    kept = x.tensor
    for d in reversed(dims):
        kept = kept.select(d, 0)
    if argument(node, "keepdim"):
        for d in dims:
            kept = kept.unsqueeze(d)
    zero_point = planner.constant(node.args[1])
    channels = group_varying_dims(planner, group) if group is not None else ()
    if zero_point.numel() > 1:  # of the input's dimensions; they line up with the output's unless some are dropped
        if not argument(node, "keepdim"):
            raise ValueError("a sum of tensors with per-channel zero points must keep its dimensions")
        channels = varying_dims(rank, zero_point)
    others = planner.branch_inputs(group) if group is not None else []
    loops, count = planner.loops(out, [x.moved(kept), *others], channels)
    params = structs.Sum(loops=loops, zero_point=planner.constants.per_channel(zero_point, count, "int32"))
    reduced = merge_dims([(x.shape[d], (x.strides[d],)) for d in dims])
    if len(reduced) > 3:
        raise ValueError(f"a sum over the dimensions {dims} needs more than three loops")
    for i, (size, (stride,)) in enumerate([(1, (0,))] * (3 - len(reduced)) + reduced):
        params.reduced_size[i], params.reduced_stride[i] = size, stride
    if group is not None:
        params.requantize = requantize_struct(planner, group, count)
    planner.step("sum", params, [x.moved(kept), *others], out, target.node)


def _along_channels(planner: Planner, group: Group | None) -> bool:
    return group is None or group_varying_dims(planner, group) in ((), (1,))


def _global_pool(planner: Planner, node: fx.Node, group: Group | None, x: View) -> None:
    target = Target.of(node, group)
    out = planner.output(target.node)
    bounds = [(torch.zeros(1), torch.full((1,), n)) for n in x.shape[2:]]
    params = _pool_params(planner, spatial_pixels(x), out.strides[0], bounds, [1] * len(bounds))
    params.zero_point = planner.constants.per_channel(planner.constant(node.args[1]), params.channels, "int32")
    _finish(planner, params, "pool", x, out, target, spatial_pixels)


def emit_resize(planner: Planner, node: fx.Node, group: Group | None = None) -> None:
    tables = [[planner.constant(n) for n in argument(node, name)] for name in ("index0", "index1", "weight1")]
    dims = len(tables[0])
    if planner.rank(node.args[0]) - 2 < dims:
        raise ValueError(
            f"interpolating {dims} dimensions of a tensor of {planner.rank(node.args[0])} is not supported"
        )
    x = with_channels_inside(planner, planner.view(node.args[0]), CHANNELS_LAST, node, spatial_pixels)
    target = Target.of(node, group)
    out = planner.output(target.node, CHANNELS_LAST)
    pixels, to = spatial_pixels(x), spatial_pixels(out)
    params = structs.Resize(
        batch=pixels.batch, channels=pixels.channels, dims=dims, fraction_bits=argument(node, "fraction_bits"),
        in_image_stride=pixels.image_stride, out_pixel_stride=to.pixel_stride,
        zero_point=planner.constants.per_channel(planner.constant(node.args[1]), pixels.channels, "int32"),
    )  # fmt: skip
    params.out_size[:], params.in_stride[:] = to.size, pixels.stride
    for pointers, values in zip((params.index0, params.index1, params.weight1), tables, strict=True):
        for i, value in enumerate(values, start=3 - dims):
            pointers[i] = planner.constants.array(value, "int32")
    _finish(planner, params, "resize", x, out, target, spatial_pixels)
