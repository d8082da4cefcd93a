"""Steps for layers with weights: convolutions, linear layers, products of two activations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from fxcompress.graph import argument
from fxcompress.numerics import rounding_constant

from . import structs
from .epilogue import Target, branch_dyadic, pixel_branches, requantize_struct, scalar, with_channels_inside
from .fusion import Group
from .planner import Planner
from .views import CHANNELS_LAST, ROW_MAJOR, Pixels, View, merge_dims, row_pixels, spatial_pixels


def emit_conv(planner: Planner, node: fx.Node, group: Group | None = None) -> None:
    weight, bias = planner.constant(node.args[1]), node.args[2]
    x = with_channels_inside(planner, planner.view(node.args[0]), CHANNELS_LAST, node, spatial_pixels)
    target = Target.of(node, group)
    out = planner.output(target.node, CHANNELS_LAST)
    params = conv_params(spatial_pixels(x), spatial_pixels(out), weight, argument(node, "groups"))
    conv_geometry(params, *(argument(node, name) for name in ("stride", "dilation", "padding")), weight.shape[2:])
    bias, border = _bias(planner, bias, weight), planner.constant(argument(node, "pad_value"))
    finish_conv(planner, params, x, out, target, weight, bias, border, CHANNELS_LAST, spatial_pixels)


def emit_linear(planner: Planner, node: fx.Node, group: Group | None = None) -> None:
    """A linear layer is a 1x1 convolution with one pixel per row."""
    weight, bias = planner.constant(node.args[1]), node.args[2]
    x = planner.view(node.args[0])
    if row_pixels(x) is None:
        x = planner.dense(x, ROW_MAJOR, node)
    target = Target.of(node, group)
    out = planner.output(target.node, ROW_MAJOR)
    params = conv_params(row_pixels(x), row_pixels(out), weight, 1)
    params.out_size[:] = params.in_size[:]
    conv_geometry(params, [1], [1], [0, 0], [1])
    border = torch.zeros(1, dtype=torch.uint8)
    finish_conv(planner, params, x, out, target, weight, _bias(planner, bias, weight), border, ROW_MAJOR, row_pixels)


def _bias(planner: Planner, bias: fx.Node | None, weight: Tensor) -> Tensor:
    return torch.zeros(weight.shape[0], dtype=torch.int32) if bias is None else planner.constant(bias)


def conv_params(x: Pixels, out: Pixels, weight: Tensor, groups: int) -> structs.Conv:
    params = structs.Conv(
        batch=x.batch, in_channels=x.channels, out_channels=weight.shape[0], groups=groups, in_image_stride=x.image_stride,
        in_plane_stride=x.stride[0], in_row_stride=x.stride[1], in_pixel_stride=x.stride[2], out_pixel_stride=out.pixel_stride,
    )  # fmt: skip
    params.in_size[:], params.out_size[:] = x.size, out.size
    return params


def conv_geometry(params: structs.Conv, stride, dilation, padding, kernel) -> None:
    """Missing leading dimensions have a kernel of 1 and no padding."""
    missing = 3 - len(kernel)
    params.kernel[:] = [1] * missing + list(kernel)
    params.stride[:] = [1] * missing + list(stride)
    params.dilation[:] = [1] * missing + list(dilation)
    params.pad_before[:] = [0] * missing + list(padding)[0::2]


def finish_conv(
    planner: Planner, params: structs.Conv, x: View, out: View, target: Target, weight: Tensor, bias: Tensor, border: Tensor,
    order: str, pixels, where=None, part: int = 0,
) -> None:  # fmt: skip
    """Weights, folded bias, requantization and branches; then the step.

    A layer computed in several parts packs its weights by ``part``; ``where`` selects the branches of a part.
    """
    constants, channels = planner.constants, params.out_channels
    # (O, I/G, *K) to (O, *K, I/G): the taps of one pixel lie together, like the activations
    params.weight = constants.array(weight.movedim(1, -1).contiguous())
    if target.group is not None:
        first = target.group.branches[0]
        bias = bias + rounding_constant(branch_dyadic(planner, target.group, first), first == 0).reshape(-1)
        params.requantize = requantize_struct(planner, target.group, channels, folded=True)
    params.bias = constants.array(bias, "int32")
    params.pad_value = constants.per_channel(border, params.in_channels, "uint8")
    branches, strides = pixel_branches(planner, target, order, pixels, where)
    for i, stride in enumerate(strides, start=1):
        params.branch_pixel_stride[i] = stride
    planner.step("conv", params, [x, *branches], out, target.node, part)


def emit_matmul(planner: Planner, node: fx.Node, group: Group | None = None) -> None:
    a, b = planner.view(node.args[0]), planner.view(node.args[2])
    if a.tensor.ndim < 2 or b.tensor.ndim < 2:
        raise ValueError("a product with a vector is not supported: give it two dimensions")
    target = Target.of(node, group)
    out = planner.output(target.node, ROW_MAJOR)
    planner.step("matmul", matmul_params(planner, node, group, a, b, out), [a, b], out, target.node)


def matmul_params(planner: Planner, node: fx.Node, group: Group | None, a: View, b: View, out: View) -> structs.Matmul:
    """Of a product whose first four arguments are a, its zero point, b, its zero point."""
    a_zero, b_zero = node.args[1], node.args[3]
    batch = _batch_dims(out, a, b)
    params = structs.Matmul(
        rows=out.shape[-2], columns=out.shape[-1], depth=a.shape[-1], a_row_stride=a.strides[-2], a_depth_stride=a.strides[-1],
        b_depth_stride=b.strides[-2], b_column_stride=b.strides[-1], out_row_stride=out.strides[-2],
        a_zero_point=scalar(planner.constant(a_zero)), b_zero_point=scalar(planner.constant(b_zero)),
    )  # fmt: skip
    for i, (size, (out_stride, a_stride, b_stride)) in enumerate(batch):
        params.size[i], params.out_stride[i] = size, out_stride
        params.a_stride[i], params.b_stride[i] = a_stride, b_stride
    if group is not None:
        params.requantize = requantize_struct(planner, group, params.columns)
    return params


def _batch_dims(out: View, a: View, b: View) -> list[tuple[int, tuple[int, ...]]]:
    """(size, strides of out, a, b) of up to three batch dimensions."""
    batch = out.shape[:-2]
    tensors = [out.tensor, *(t.tensor.expand(*batch, *t.shape[-2:]) for t in (a, b))]
    dims = merge_dims([(n, tuple(t.stride(d) for t in tensors)) for d, n in enumerate(batch)])
    if len(dims) > 3:
        raise ValueError(f"a batched product over {math.prod(batch)} pairs needs more than three loops")
    return [(1, (0, 0, 0))] * (3 - len(dims)) + dims
