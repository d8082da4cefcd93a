"""Steps for products in blocks (``reference_bilinear``): linear layers, and products of two activations."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor, fx

from fxcompress.graph import argument
from fxcompress.numerics import rounding_constant
from fxcompress.sum_schedule import SumSchedule

from . import structs
from .constants import Constants
from .emit_layers import matmul_params
from .epilogue import Target, branch_dyadic, evenly_spaced, pixel_branches, requantize_struct
from .fusion import Group
from .planner import Planner, has_channels_second
from .views import CHANNELS_LAST, ROW_MAJOR, row_pixels, spatial_pixels


def emit_bilinear_linear(planner: Planner, node: fx.Node, group: Group | None = None) -> None:
    if argument(node, "axis") not in (1, -1, planner.rank(node) - 1):
        raise ValueError("channels neither second nor last")
    order, pixels = (CHANNELS_LAST, spatial_pixels) if has_channels_second(node) else (ROW_MAJOR, row_pixels)
    target = Target.of(node, group)
    x = evenly_spaced(planner, planner.view(node.args[0]), order, node, pixels)
    out = planner.output(target.node, order)
    rows, constants = pixels(x), planner.constants
    weight, bias, zero_point = (planner.constant(argument(node, name)) for name in ("weight", "bias", "zero_point"))
    (n, m, p), products = argument(node, "blocks"), weight.shape[0]
    params = structs.BilinearLinear(
        rows=rows.batch * math.prod(rows.size), depth=rows.channels, outputs=bias.shape[0], n=n, m=m, p=p, products=products,
        in_pixel_stride=rows.pixel_stride, out_pixel_stride=pixels(out).pixel_stride,
        encode=_sums(constants, planner.constant(argument(node, "encode")), m * p, products),
        decode=_sums(constants, planner.constant(argument(node, "decode")), products, n * p),
        zero_point=constants.per_channel(zero_point, rows.channels, "int32"), weight=constants.array(weight),
    )  # fmt: skip
    if group is not None:
        first = group.branches[0]
        bias = bias + rounding_constant(branch_dyadic(planner, group, first), first == 0).reshape(-1)
        params.requantize = requantize_struct(planner, group, params.outputs, folded=True)
    params.bias = constants.array(bias, "int32")
    branches, strides = pixel_branches(planner, target, order, pixels)
    for i, stride in enumerate(strides, start=1):
        params.branch_pixel_stride[i] = stride
    planner.step("bilinear_linear", params, [x, *branches], out, target.node)


def emit_bilinear_matmul(planner: Planner, node: fx.Node, group: Group | None = None) -> None:
    target = Target.of(node, group)
    a, b = (planner.view(argument(node, name)) for name in ("a", "b"))
    out = planner.output(target.node, ROW_MAJOR)
    (n, m, p), products = argument(node, "blocks"), argument(node, "products")
    programs = (planner.constant(argument(node, name)) for name in ("encode_a", "encode_b", "decode"))
    sizes = ((n * m, products), (m * p, products), (products, n * p))
    sums = (_sums(planner.constants, program, *size) for program, size in zip(programs, sizes, strict=True))
    params = structs.BilinearMatmul(matmul_params(planner, node, group, a, b, out), n, m, p, products, *sums)
    planner.step("bilinear_matmul", params, [a, b], out, target.node)


def _sums(constants: Constants, program: Tensor, inputs: int, results: int) -> structs.Sums:
    """The program with results that are terms as they are: a factor becomes a step."""
    schedule = SumSchedule.from_tensor(program, inputs, results)
    steps, places = list(schedule.steps), []
    for term, factor in schedule.outputs:
        if factor != 1:
            steps.append((max(term, 0), factor, max(term, 0), 0))
            term = inputs + len(steps) - 1
        places.append(term)
    pointers = (constants.array(torch.tensor(v, dtype=torch.int32)) for v in (steps, places))
    return structs.Sums(len(steps), results, *(ctypes.cast(q, ctypes.POINTER(ctypes.c_int32)) for q in pointers))
