"""Constants of a plan: arrays that C structs point to, kept alive and padded for the kernels' over-reads."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator

import numpy as np
from torch import Tensor

#: SIMD kernels read per-channel arrays up to the next multiple of 64 elements, and 64 bytes past an activation.
PADDING = 64

_CTYPES = {
    np.dtype(np.int8): ctypes.c_int8, np.dtype(np.uint8): ctypes.c_uint8, np.dtype(np.int16): ctypes.c_int16,
    np.dtype(np.int32): ctypes.c_int32, np.dtype(np.int64): ctypes.c_int64, np.dtype(np.float32): ctypes.c_float,
    np.dtype(np.float64): ctypes.c_double,
}  # fmt: skip


class Constants:
    """Owns every array and struct of one program. Equal arrays are stored once."""

    def __init__(self):
        self._arrays: dict[tuple, np.ndarray] = {}
        self._kept: list = []

    def arrays(self) -> Iterator[np.ndarray]:
        """Every array once, without its padding."""
        return (padded[: len(padded) - PADDING] for padded in self._arrays.values())

    @property
    def bytes(self) -> int:
        return sum(a.nbytes for a in self._arrays.values())

    def keep(self, thing):
        """Keep a ctypes structure (and what points to it) alive as long as the program."""
        self._kept.append(thing)
        return thing

    def array(self, value: Tensor | np.ndarray, dtype=None):
        """Pointer to a copy of ``value`` (flattened, padded with zeros)."""
        flat = np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value).reshape(-1)
        flat = flat.astype(dtype or (np.uint8 if flat.dtype == bool else flat.dtype), copy=False)
        key = (flat.dtype.str, flat.tobytes())
        if key not in self._arrays:
            padded = aligned_empty((len(flat) + PADDING) * flat.itemsize).view(flat.dtype)
            padded[: len(flat)] = flat
            padded[len(flat) :] = 0
            self._arrays[key] = padded
        return self._arrays[key].ctypes.data_as(ctypes.POINTER(_CTYPES[flat.dtype]))

    def per_channel(self, value: Tensor, channels: int | tuple[int, ...], dtype=None):
        """Pointer to ``value`` as one entry per channel: a scalar is repeated.

        ``channels``: how many, or a shape to which ``value`` broadcasts.
        """
        shape = (channels,) if isinstance(channels, int) else channels
        if value.numel() in (1, math.prod(shape)):
            flat = value.detach().reshape(-1).expand(math.prod(shape))
        elif len(shape) > 1:
            flat = value.detach().expand(shape)
        else:
            raise ValueError(f"a parameter of {value.numel()} entries for {shape[0]} channels")
        return self.array(flat, dtype)

    def pointer(self, struct: ctypes.Structure):
        """Pointer to a struct that is kept alive."""
        return ctypes.pointer(self.keep(struct))


def aligned_empty(size: int) -> np.ndarray:
    """``size`` bytes that start on a cache line."""
    raw = np.empty(size + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


def varying_dims(rank: int, *values: Tensor) -> tuple[int, ...]:
    """The dimensions of a tensor of ``rank`` dimensions along which broadcast parameters vary; () if all are scalars.

    >>> varying_dims(4, torch.ones(8, 1, 1), torch.ones(()))
    (1,)
    """
    return tuple(sorted({dim - v.ndim + rank for v in values for dim in range(v.ndim) if v.shape[dim] > 1}))
