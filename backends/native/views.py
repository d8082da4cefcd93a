"""Tensors of a plan: strided views of buffers. Data movement that is only another view costs nothing.

A ``View`` wraps a meta tensor (shape, strides, offset in elements, no data) and the ``Buffer`` it looks into, so torch's
own stride rules say when ``permute``, ``slice``, ``reshape`` or ``expand`` need no copy.

Memory order: ``CHANNELS_LAST`` puts the channels of (N, C, *spatial) innermost, which convolutions and pools want;
``ROW_MAJOR`` is the order of the dimensions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ROW_MAJOR = "row_major"
CHANNELS_LAST = "channels_last"


@dataclass(eq=False)
class Buffer:
    """A piece of memory that one plan step or more write.

    Attributes:
        bytes: size.
        fixed: address of a constant, None for what lives in the arena or outside.
        external: index of the input or output tensor of the call it stands for, None otherwise.
        offset: bytes from the start of the arena, once planned.
    """

    bytes: int
    fixed: int | None = None
    external: int | None = None
    offset: int | None = None


@dataclass(frozen=True, eq=False)
class View:
    """A strided tensor in a buffer. ``tensor`` is a meta tensor whose storage stands for the buffer."""

    buffer: Buffer
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        return self.tensor.stride()

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def byte_offset(self) -> int:
        return self.tensor.storage_offset() * self.tensor.element_size()

    def moved(self, tensor: Tensor) -> View:
        """Another view of the same buffer."""
        return View(self.buffer, tensor)

    def shares_storage(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata == self.tensor.untyped_storage()._cdata


def dense_strides(shape: Sequence[int], order: str) -> tuple[int, ...]:
    """Strides of a dense tensor of this memory order.

    >>> dense_strides((2, 3, 4, 5), CHANNELS_LAST)
    (60, 1, 15, 3)
    """
    dims = list(range(len(shape)))
    if order == CHANNELS_LAST and len(dims) > 2:
        dims = [0, *dims[2:], 1]
    strides, step = [0] * len(dims), 1
    for dim in reversed(dims):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def new_view(shape: Sequence[int], dtype: torch.dtype, order: str) -> View:
    """A dense tensor in a buffer of its own."""
    tensor = torch.empty_strided(tuple(shape), dense_strides(shape, order), dtype=dtype, device="meta")
    return View(Buffer(math.prod(shape) * tensor.element_size()), tensor)


@dataclass(frozen=True)
class Pixels:
    """(N, C, *spatial) or (..., C) as the kernels see it: up to three spatial dimensions and channels of stride 1."""

    batch: int
    size: tuple[int, int, int]
    channels: int
    image_stride: int
    stride: tuple[int, int, int]

    @property
    def pixel_stride(self) -> int | None:
        """Elements from one pixel to the next if that is the same everywhere in (n, d, h, w) order, else None."""
        sizes, strides = (self.batch, *self.size), (self.image_stride, *self.stride)
        steps = [(n, s) for n, s in zip(sizes, strides, strict=True) if n > 1]
        if not steps:
            return self.channels
        for (_, outer), (n, inner) in itertools.pairwise(steps):
            if outer != n * inner:
                return None
        return steps[-1][1]


def spatial_pixels(view: View) -> Pixels | None:
    """Pixels of (N, C, *spatial); None if the channels do not lie side by side."""
    n, c, *size = view.shape
    image, channel, *stride = view.strides
    if channel != 1 and c > 1:
        return None
    return _pixels(n, size, c, image, stride)


def row_pixels(view: View) -> Pixels | None:
    """Pixels of (..., C): leading dimensions merged until at most four are left; None where that needs a copy."""
    *size, c = view.shape
    *stride, channel = view.strides
    if channel != 1 and c > 1:
        return None
    merged = merge_dims([(n, (s,)) for n, s in zip(size, stride, strict=True)])
    if len(merged) > 4:
        return None
    merged = [(1, (0,))] * (4 - len(merged)) + merged
    (n, (image,)), *rest = merged
    return _pixels(n, [m for m, _ in rest], c, image, [s for _, (s,) in rest])


def _pixels(batch: int, size: Sequence[int], channels: int, image: int, stride: Sequence[int]) -> Pixels:
    missing = 3 - len(size)
    outer = size[0] * stride[0] if size else 0
    return Pixels(batch, (*[1] * missing, *size), channels, image, (*[outer] * missing, *stride))


def merge_dims(dims: list[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """Merge neighboring (size, strides) dimensions that every tensor walks as one; drop those of size 1.

    >>> merge_dims([(2, (12,)), (3, (4,)), (4, (1,))])
    [(24, (1,))]
    """
    result: list[tuple[int, tuple[int, ...]]] = []
    for size, strides in dims:
        if size == 1:
            continue
        if result and all(outer == size * inner for outer, inner in zip(result[-1][1], strides, strict=True)):
            result[-1] = (result[-1][0] * size, strides)
        else:
            result.append((size, strides))
    return result


@dataclass
class Uses:
    """First and last step that touches each buffer of the arena."""

    first: dict[Buffer, int] = field(default_factory=dict)
    last: dict[Buffer, int] = field(default_factory=dict)

    def touch(self, buffer: Buffer, step: int) -> None:
        if buffer.fixed is None and buffer.external is None:
            self.first.setdefault(buffer, step)
            self.last[buffer] = step
