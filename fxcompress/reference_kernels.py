"""Reference kernels without weights: elementwise, pools, sums, resize, requantization. The meaning of each operator.

Integer tensors only inside (``quantize`` and ``dequantize`` are the float boundary, defined in ``numerics``). Any batch,
including 0; strided inputs are fine. Results are int32 unless said otherwise. ``padding`` lists (before, after) per
spatial dimension, first dimension first; pools act on the trailing len(kernel) dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import numerics
from .numerics import Dyadic
from .reference_conv import widen, windows


def mul(a, a_zero_point, b, b_zero_point) -> Tensor:
    """(a - a_zero_point) * (b - b_zero_point), broadcast."""
    return widen(a, a_zero_point) * widen(b, b_zero_point)


def clamp(acc, lo, hi) -> Tensor:
    """min(max(acc, lo), hi) with int32 tensors lo, hi broadcastable to acc."""
    return torch.minimum(torch.maximum(acc, lo), hi)


def table(x, lut, axis=1) -> Tensor:
    """lut[x] for uint8 codes: lut (256,), or (C, 256) with one row per channel along ``axis`` of x. Dtype of lut."""
    index = x.to(torch.int64)
    if lut.ndim == 2:
        rows = torch.arange(lut.shape[0], device=x.device) * lut.shape[1]
        index = index + rows.reshape([-1] + [1] * (x.ndim - 1 - axis % x.ndim))
    return lut.reshape(-1)[index]


def embedding(weight, index) -> Tensor:
    """weight[index]: rows of weight (rows, ...) for integers 0 <= index < rows of any shape. Dtype of weight."""
    return weight.index_select(0, index.reshape(-1)).reshape(*index.shape, *weight.shape[1:])


def requantize(acc, multiplier, right_shift, left_shift, zero_point, guard_bits, lo, hi) -> Tensor:
    """One rounding for all branches: ``numerics.requantize``; uint8 codes."""
    branches = [(a, Dyadic(*form)) for a, *form in zip(acc, multiplier, right_shift, left_shift, strict=True)]
    return numerics.requantize(branches, zero_point, guard_bits, lo, hi)


def rescale(acc, multiplier, shift) -> Tensor:
    """Sum of acc_i * b_i / 2^c_i, each rounded half up, saturated: ``numerics.rescale31``."""
    return numerics.rescale31(list(zip(acc, multiplier, shift, strict=True)))


# --------------------------------------------------------------------------------------------- sums and averages


def sum_dims(x, zero_point, dim, keepdim) -> Tensor:
    """Sum of (q - zero_point) over the dimensions ``dim`` (at least one)."""
    return widen(x, zero_point).sum(dim, keepdim=keepdim, dtype=torch.int32)


def pool_bounds(size: int, kernel: int, stride: int, padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    """First and one-past-last element of each pooling window, clipped to the tensor: padding contributes nothing."""
    starts = torch.arange(windows(size, kernel, stride, padding)) * stride - padding[0]
    return starts.clamp(0, size), (starts + kernel).clamp(0, size)


def adaptive_bounds(size: int, outputs: int) -> tuple[Tensor, Tensor]:
    """PyTorch's adaptive windows: floor(i * size / outputs) to ceil((i + 1) * size / outputs)."""
    i = torch.arange(outputs)
    return i * size // outputs, -(-(i + 1) * size // outputs)


def _window_sums(x: Tensor, dim: int, bounds: tuple[Tensor, Tensor]) -> Tensor:
    """Sums of x[starts_i : ends_i] along ``dim`` as differences of one running sum."""
    running = torch.cat([x.narrow(dim, 0, 1) * 0, x], dim).cumsum(dim, dtype=torch.int32)
    starts, ends = bounds
    return running.index_select(dim, ends) - running.index_select(dim, starts)


def sum_pool(x, zero_point, kernel, stride, padding) -> Tensor:
    """Sum of (q - zero_point) over each window; padding (ceil_mode's extra included) contributes 0."""
    x = widen(x, zero_point)
    for i in range(len(kernel)):
        dim = x.ndim - len(kernel) + i
        x = _window_sums(x, dim, pool_bounds(x.shape[dim], kernel[i], stride[i], padding[2 * i : 2 * i + 2]))
    return x


def adaptive_sum_pool(x, zero_point, output_size) -> Tensor:
    """Sum of (q - zero_point) over PyTorch's adaptive windows."""
    x = widen(x, zero_point)
    for i, outputs in enumerate(output_size):
        dim = x.ndim - len(output_size) + i
        x = _window_sums(x, dim, adaptive_bounds(x.shape[dim], outputs))
    return x


# ------------------------------------------------------------------------------------------------- on codes


def max_pool(x, kernel, stride, padding, dilation) -> Tensor:
    """Largest code of each window; padding holds the smallest value of the dtype. Dtype of x."""
    for i in range(len(kernel)):
        dim = x.ndim - len(kernel) + i
        x = _window_max(x, dim, kernel[i], stride[i], padding[2 * i : 2 * i + 2], dilation[i])
    return x


def _window_max(x: Tensor, dim: int, kernel: int, stride: int, padding: Sequence[int], dilation: int) -> Tensor:
    count = windows(x.shape[dim], kernel, stride, padding, dilation)
    lowest = torch.iinfo(x.dtype).min
    edges = [x.new_full((*x.shape[:dim], p, *x.shape[dim + 1 :]), lowest) for p in padding]
    x = torch.cat([edges[0], x, edges[1]], dim)
    taps = [x.narrow(dim, k * dilation, (count - 1) * stride + 1) for k in range(kernel)]
    step = (slice(None),) * dim + (slice(None, None, stride),)
    result = taps[0][step].clone()
    for tap in taps[1:]:
        torch.maximum(result, tap[step], out=result)
    return result


def adaptive_max_pool(x, output_size) -> Tensor:
    """Largest code of each of PyTorch's adaptive windows. Dtype of x."""
    for i, outputs in enumerate(output_size):
        dim = x.ndim - len(output_size) + i
        starts, ends = (b.tolist() for b in adaptive_bounds(x.shape[dim], outputs))
        x = torch.stack([x.narrow(dim, s, e - s).amax(dim) for s, e in zip(starts, ends, strict=True)], dim)
    return x


# ---------------------------------------------------------------------------------------------------- resize


def resize(x, zero_point, index0, index1, weight1, fraction_bits) -> Tensor:
    """Linear interpolation of (q - zero_point), one trailing dimension after the other, without rounding.

    Along each: (2^f - w1) * x[index0] + w1 * x[index1]. Total gain 2^(f * dimensions), left to the requantization.
    index0, index1: integer (outputs,), weight1 int32 (outputs,) in 0..2^f; see ``linear_resize_tables``.
    """
    x = widen(x, zero_point)
    for i, (first, second, weight) in enumerate(zip(index0, index1, weight1, strict=True)):
        dim = x.ndim - len(index0) + i
        weight = weight.reshape([-1] + [1] * (x.ndim - 1 - dim))
        x = x.index_select(dim, first) * ((1 << fraction_bits) - weight) + x.index_select(dim, second) * weight
    return x


def linear_resize_tables(
    in_size: int, out_size: int, align_corners: bool, scale_factor: float | None, fraction_bits: int
) -> tuple:
    """(index0, index1, weight1) int32 (out_size,) for one dimension of ``resize``, from torch's sampling positions.

    align_corners: src = i * (in - 1) / (out - 1). Otherwise src = max(0, (i + 0.5) * ratio - 0.5) with ratio
    1 / scale_factor when a scale factor was given, else in / out. weight1 = round_half_even(frac(src) * 2^fraction_bits),
    so that |weight1 / 2^f - exact| <= 2^-(f+1). Positions are float64; torch's own float32 ones differ by rounding only.

    >>> [t.tolist() for t in linear_resize_tables(2, 4, False, None, 2)]
    [[0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 3, 1]]
    """
    i = torch.arange(out_size, dtype=torch.float64)
    if align_corners:
        source = i * ((in_size - 1) / (out_size - 1) if out_size > 1 else 0.0)
    else:
        ratio = 1.0 / scale_factor if scale_factor else in_size / out_size
        source = ((i + 0.5) * ratio - 0.5).clamp(min=0.0)
    index0 = source.floor().clamp(max=in_size - 1)
    weight1 = torch.round((source - index0).clamp(0.0, 1.0) * 2.0**fraction_bits)
    index1 = (index0 + 1).clamp(max=in_size - 1)
    return index0.to(torch.int32), index1.to(torch.int32), weight1.to(torch.int32)
