"""What a value of the qdq level becomes at the integer level.

Codes         uint8 codes with QParams
Accumulator   a sum of int32 branches, each ``real = scale * integer``, optionally clamped
Function      an elementwise function still to be tabulated: its table needs the QParams of the reader
Float         a float tensor of a ``keep_float`` region
Index         integers or booleans: token ids, masks
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..meta import QParams

Bound = float | Tensor | None  # of a clamp: float64, broadcastable to the tensor; None is no bound
OUTPUT_BITS = 24  # resolution of int32 graph outputs that are not one accumulator: a table, a sum, a concatenation


@dataclass(frozen=True, eq=False)
class Codes:
    node: fx.Node
    qparams: QParams


@dataclass(frozen=True, eq=False)
class Branch:
    """``real = scale * node``. scale: float64 broadcastable to the tensor; bound: largest |integer| (any input).

    ``magnitude``: largest |real| to be represented, a number or one per channel, broadcastable to the tensor.
    """

    node: fx.Node
    scale: Tensor
    bound: int
    magnitude: float | Tensor = 0.0

    @property
    def largest(self) -> float:
        """The magnitude of the whole tensor."""
        return float(torch.as_tensor(self.magnitude).max())


@dataclass(frozen=True, eq=False)
class Accumulator:
    """Sum of branches, then clamp to [lo, hi] (real values, tensors where they differ per channel; None: unbounded)."""

    branches: tuple[Branch, ...]
    lo: Bound = None
    hi: Bound = None

    @property
    def clamped(self) -> bool:
        return self.lo is not None or self.hi is not None

    def clamp(self, lo: Bound, hi: Bound) -> Accumulator:
        """Clamp further: bounds nest, later ones win where they are tighter."""
        return replace(self, lo=_tighter(torch.maximum, self.lo, lo), hi=_tighter(torch.minimum, self.hi, hi))

    def scaled(self, factor: float | Tensor) -> Accumulator:
        largest = float(torch.as_tensor(factor).abs().max())
        scaled = (replace(b, scale=b.scale * factor, magnitude=b.magnitude * largest) for b in self.branches)
        return replace(self, branches=tuple(scaled))


@dataclass(frozen=True, eq=False)
class Function:
    """``apply`` (float64 -> float64, elementwise) of the real value of ``codes``."""

    codes: Codes
    apply: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Float:
    node: fx.Node


@dataclass(frozen=True, eq=False)
class Index:
    """Integers or booleans that are no codes: token ids, masks."""

    node: fx.Node


Value = Codes | Accumulator | Function | Float | Index


def _tighter(choose: Callable, one: Bound, other: Bound) -> Bound:
    if one is None or other is None:
        return other if one is None else one
    return choose(*(torch.as_tensor(b, dtype=torch.float64) for b in (one, other)))


def output_scale(branches: tuple[Branch, ...]) -> float:
    """Scale of an int32 tensor that holds a sum of these branches with ``OUTPUT_BITS`` bits of resolution."""
    return max(b.largest for b in branches) * 2.0**-OUTPUT_BITS or 1.0


def largest_code(codes: Codes) -> int:
    """Largest |q - zero_point| the codes can take."""
    q = codes.qparams
    return int(torch.maximum(q.zero_point - q.qmin, q.qmax - q.zero_point).max())
