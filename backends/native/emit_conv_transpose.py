"""Transposed convolution as ordinary convolutions, one per phase of the stride: every convolution kernel serves it.

Input position i reaches output position o through tap k where ``o = i * stride + k * dilation - before``. The outputs
``o = q * stride + r`` of phase r hence see the taps with ``k * dilation = r + before (mod stride)`` only, at positions i that
are evenly spaced around q: a convolution with these taps, from last to first. Each phase writes every stride-th pixel of the
output, by a copy where no single stride leads from each of them to the next.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress.graph import argument
from fxcompress.reference_conv import _swap_channels

from .emit_layers import conv_geometry, conv_params, finish_conv
from .epilogue import Target, with_channels_inside
from .fusion import Group
from .planner import Planner
from .views import CHANNELS_LAST, View, new_view, spatial_pixels


@dataclass(frozen=True)
class Phase:
    """One dimension of a phase: its taps in the order of the input positions they read, of which the first is ``-pad_before``
    for the first output. A tap equal to the kernel's size stands for a weight of 0."""

    taps: tuple[int, ...]
    dilation: int
    pad_before: int


def phases(kernel: int, stride: int, dilation: int, before: int) -> list[Phase]:
    """The phases 0 .. stride - 1 of one dimension; ``before``: what is cut off in front of the output.

    >>> phases(kernel=3, stride=2, dilation=1, before=1)
    [Phase(taps=(1,), dilation=1, pad_before=0), Phase(taps=(2, 0), dilation=1, pad_before=0)]
    """
    found, step = [], dilation // math.gcd(stride, dilation)
    for phase in range(stride):
        taps = [k for k in reversed(range(kernel)) if (k * dilation - phase - before) % stride == 0]
        pad = (taps[0] * dilation - phase - before) // stride if taps else 0
        unseen = max(-(pad // step), 0) if taps else 1  # kernels want a first position at or before that of the output
        found.append(Phase((*[kernel] * unseen, *taps), step, pad + unseen * step if taps else 0))
    return found


def emit_conv_transpose(planner: Planner, node: fx.Node, group: Group | None = None) -> None:
    weight, groups = _swap_channels(planner.constant(node.args[2]), argument(node, "groups")), argument(node, "groups")
    x = with_channels_inside(planner, planner.view(node.args[0]), CHANNELS_LAST, node, spatial_pixels)
    target = Target.of(node, group)
    out = planner.output(target.node, CHANNELS_LAST)
    stride = argument(node, "stride")
    geometry = zip(weight.shape[2:], stride, argument(node, "dilation"), argument(node, "padding")[0::2], strict=True)
    combinations = itertools.product(*(enumerate(phases(*dim)) for dim in geometry))
    zero_point = planner.constant(node.args[1])
    bias = torch.zeros(weight.shape[0]) if node.args[3] is None else planner.constant(node.args[3])
    for part, combination in enumerate(combinations):
        starts, parts = zip(*combination, strict=True)
        taps = _phase_weight(weight, parts)
        where = _Every(starts, stride)
        result = where(out)
        if result.tensor.numel() == 0:
            continue
        direct = spatial_pixels(result).pixel_stride is not None
        place = result if direct else new_view(result.shape, result.dtype, CHANNELS_LAST)
        params = conv_params(spatial_pixels(x), spatial_pixels(place), taps, groups)
        pads = [before for p in parts for before in (p.pad_before, 0)]
        conv_geometry(params, [1] * len(parts), [p.dilation for p in parts], pads, taps.shape[2:])
        folded = bias.long() - _zero_point_sum(taps, zero_point, groups)
        finish_conv(
            planner, params, x, place, target, taps, folded, zero_point, CHANNELS_LAST, spatial_pixels, where, part
        )
        if not direct:
            planner.copy(place, result, node)


@dataclass(frozen=True)
class _Every:
    """Selects the pixels of one phase of a tensor (N, C, *spatial)."""

    starts: tuple[int, ...]
    stride: list[int]

    def __call__(self, view: View) -> View:
        spatial = (slice(start, None, step) for start, step in zip(self.starts, self.stride, strict=True))
        return view.moved(view.tensor[(slice(None), slice(None), *spatial)])


def _phase_weight(weight: Tensor, parts: tuple[Phase, ...]) -> Tensor:
    """The taps of a phase, of (O, I/G, *K)."""
    for dim, part in enumerate(parts, start=2):
        zero = torch.zeros_like(weight.narrow(dim, 0, 1))
        weight = torch.cat([weight, zero], dim).index_select(dim, torch.tensor(part.taps))
    return weight


def _zero_point_sum(weight: Tensor, zero_point: Tensor, groups: int) -> Tensor:
    """What the zero point of x adds to the accumulator of each output channel, int64."""
    outputs, depth = weight.shape[:2]
    zero = zero_point.long().reshape(-1).expand(groups * depth).reshape(groups, 1, depth)
    return (weight.long().flatten(2).sum(-1).reshape(groups, -1, depth) * zero).sum(-1).reshape(outputs)
