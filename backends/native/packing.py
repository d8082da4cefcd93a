"""Weights rearranged for the kernels that read them: done once per layer and kernel, shared by all batch sizes."""

from __future__ import annotations

import ctypes

from torch import fx

from .constants import Constants, aligned_empty
from .kernels import KernelRow


class PackedWeights:
    """Packed weights by layer (node), part of it, and kernel row."""

    def __init__(self):
        self._packed: dict[tuple[fx.Node, int, str], object] = {}

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self._packed.values())

    def pack(
        self, row: KernelRow, params: ctypes.Structure, node: fx.Node, constants: Constants, part: int = 0
    ) -> None:
        """Point ``params.weight`` to the weights in the layout of ``row``, packing them the first time."""
        if not row.c.packed_bytes:
            return
        key = (node, part, row.name)
        if key not in self._packed:
            packed = aligned_empty(row.c.packed_bytes(ctypes.addressof(params)))
            row.c.pack(ctypes.addressof(params), packed.ctypes.data)
            self._packed[key] = packed
        constants.keep(self._packed[key])
        params.weight = self._packed[key].ctypes.data_as(type(params.weight))
