"""What a value of the qdq level becomes at the integer level.

Codes         uint8 codes with QParams
Accumulator   a sum of int32 branches, each ``real = scale * integer``, optionally clamped
Function      an elementwise function still to be tabulated: its table needs the QParams of the reader
Float         a float tensor of a ``keep_float`` region
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..meta import QParams

OUTPUT_BITS = 24  # resolution of int32 graph outputs that are not one accumulator: a table, a sum, a concatenation


@dataclass(frozen=True, eq=False)
class Codes:
    node: fx.Node
    qparams: QParams


@dataclass(frozen=True, eq=False)
class Branch:
    """``real = scale * node``. scale: float64 broadcastable to the tensor; bound: largest |integer| (any input)."""

    node: fx.Node
    scale: Tensor
    bound: int
    magnitude: float = 0.0  # largest |real| to be represented


@dataclass(frozen=True, eq=False)
class Accumulator:
    """Sum of branches, then clamp to [lo, hi] (real values; None: unbounded)."""

    branches: tuple[Branch, ...]
    lo: float | None = None
    hi: float | None = None

    @property
    def clamped(self) -> bool:
        return self.lo is not None or self.hi is not None

    def clamp(self, lo: float | None, hi: float | None) -> Accumulator:
        """Clamp further: bounds nest, later ones win where they are tighter."""
        new_lo = lo if self.lo is None else self.lo if lo is None else max(self.lo, lo)
        new_hi = hi if self.hi is None else self.hi if hi is None else min(self.hi, hi)
        return replace(self, lo=new_lo, hi=new_hi)

    def scaled(self, factor: float | Tensor) -> Accumulator:
        return replace(self, branches=tuple(replace(b, scale=b.scale * factor) for b in self.branches))


@dataclass(frozen=True, eq=False)
class Function:
    """``apply`` (float64 -> float64, elementwise) of the real value of ``codes``."""

    codes: Codes
    apply: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Float:
    node: fx.Node


Value = Codes | Accumulator | Function | Float


def output_scale(branches: tuple[Branch, ...]) -> float:
    """Scale of an int32 tensor that holds a sum of these branches with ``OUTPUT_BITS`` bits of resolution."""
    return max(b.magnitude for b in branches) * 2.0**-OUTPUT_BITS or 1.0


def largest_code(codes: Codes) -> int:
    """Largest |q - zero_point| the codes can take."""
    q = codes.qparams
    return int(torch.maximum(q.zero_point - q.qmin, q.qmax - q.zero_point).max())
