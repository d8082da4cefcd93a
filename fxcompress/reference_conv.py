"""Reference kernels with weights: convolutions, linear, matmul. Integer tensors only; sums wrap like int32.

ATen convolves and multiplies int32 tensors exactly (8-12 GMAC/s), but it has no integer kernel for dilated and
transposed convolution: those are sums over taps of a convolution with a 1x1 kernel.

Shapes: x (N, C, *spatial), spatial of length nd in 1..3, any batch N including 0. ``padding`` lists (before, after)
per spatial dimension, first dimension first; ``stride``, ``dilation`` and ``output_padding`` have one entry per dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def windows(size: int, kernel: int, stride: int, padding: Sequence[int], dilation: int = 1) -> int:
    """Number of windows along one dimension of ``size`` elements: floor((size + pads - extent) / stride) + 1."""
    return (size + padding[0] + padding[1] - dilation * (kernel - 1) - 1) // stride + 1


def pad(x: Tensor, pad: Sequence[int], value: Tensor) -> Tensor:
    """Surround the trailing len(pad)/2 dimensions with ``value``; negative entries crop. Same dtype as x, never x itself.

    value: () or (C,) along dimension 1, cast to the dtype of x.
    """
    first = x.ndim - len(pad) // 2
    sides = [(0, 0)] * first + list(zip(pad[0::2], pad[1::2], strict=True))
    out = x.new_empty([n + before + after for n, (before, after) in zip(x.shape, sides, strict=True)])
    out.copy_(value.to(x.dtype).reshape([-1] + [1] * (x.ndim - 2) if value.ndim else []))
    inside = out
    for dim, (before, after) in enumerate(sides):
        kept = x.shape[dim] + min(before, 0) + min(after, 0)
        inside, x = inside.narrow(dim, max(before, 0), kept), x.narrow(dim, max(-before, 0), kept)
    inside.copy_(x)
    return out


def _taps(
    kernel: Sequence[int], size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple]:
    """For each kernel position: (index into the kernel, the strided slices of the wide tensor that it touches)."""
    for tap in itertools.product(*map(range, kernel)):
        starts = [t * d for t, d in zip(tap, dilation, strict=True)]
        touched = tuple(slice(b, b + (n - 1) * s + 1, s) for b, n, s in zip(starts, size, stride, strict=True))
        yield (..., *tap), (..., *touched)


def _one_tap(weight: Tensor, index: tuple) -> Tensor:
    """The 1x1 kernel (O, C/G, 1, ...) of one tap."""
    return weight[index].reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))


def _add_bias(acc: Tensor, bias: Tensor | None) -> Tensor:
    return acc if bias is None else acc + bias.reshape(-1, *[1] * (acc.ndim - 2))


def conv(x, weight, bias, stride, padding, dilation, groups, pad_value) -> Tensor:
    """acc[n, o, i] = bias[o] + sum_{c, k} weight[o, c, k] * x_padded[n, c, i * stride + k * dilation], int32."""
    convolve, weight = _CONVOLVE[weight.ndim - 2], weight.to(torch.int32)
    x = pad(x, padding, pad_value).to(torch.int32) if any(padding) else x.to(torch.int32)
    if all(d == 1 for d in dilation):
        return convolve(x, weight, bias, stride=stride, groups=groups)
    kernel = weight.shape[2:]
    size = [windows(n, k, s, (0, 0), d) for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    acc = x.new_zeros((x.shape[0], weight.shape[0], *size))
    for index, touched in _taps(kernel, size, stride, dilation):
        acc += convolve(x[touched], _one_tap(weight, index), groups=groups)
    return _add_bias(acc, bias)


def conv_transpose(x, zero_point, weight, bias, stride, padding, output_padding, dilation, groups) -> Tensor:
    """Each (q - zero_point) scatters weight[c, o, k] * (q - zero_point) to position i * stride + k * dilation - before.

    weight (I, O/G, *K) as in PyTorch; result int32 (N, O, (n - 1)*stride - pads + dilation*(k - 1) + 1 + output_padding).
    """
    convolve, x = _CONVOLVE[weight.ndim - 2], widen(x, zero_point)
    kernel, size = weight.shape[2:], x.shape[2:]
    weight = _swap_channels(weight.to(torch.int32), groups)
    full = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(size, stride, dilation, kernel, strict=True)]
    acc = x.new_zeros((x.shape[0], weight.shape[0], *full))
    for index, touched in _taps(kernel, size, stride, dilation):
        acc[touched] += convolve(x, _one_tap(weight, index), groups=groups)
    crop = [
        c for b, a, extra in zip(padding[0::2], padding[1::2], output_padding, strict=True) for c in (-b, extra - a)
    ]
    return _add_bias(pad(acc, crop, acc.new_zeros(())), bias)


def _swap_channels(weight: Tensor, groups: int) -> Tensor:
    """(I, O/G, *K) of a transposed convolution to (O, I/G, *K)."""
    inputs, outputs, *kernel = weight.shape
    grouped = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
    return grouped.reshape(groups * outputs, inputs // groups, *kernel)


def linear(x, weight, bias) -> Tensor:
    """acc[..., o] = bias[o] + sum_i weight[o, i] * x[..., i], int32."""
    return F.linear(x.to(torch.int32), weight.to(torch.int32), bias)


def matmul(a, a_zero_point, b, b_zero_point) -> Tensor:
    """(a - a_zero_point) @ (b - b_zero_point), batched and broadcast as ``torch.matmul``, int32."""
    return torch.matmul(widen(a, a_zero_point), widen(b, b_zero_point))


def widen(x, zero_point) -> Tensor:
    """q - zero_point as int32: the integer whose real value is scale * that."""
    return x.to(torch.int32) - zero_point
