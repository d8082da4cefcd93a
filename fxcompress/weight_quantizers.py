"""Weight quantizers: ways to round the rows of a weight to integer codes, all behind one interface.

    nearest    each weight to the nearest code
    squant     nearest, then single weights the other way, so that the errors of a kernel and of a row cancel
    power      codes q|q|: fine steps near zero, coarse ones far out

A quantizer reads weights in steps (``v = w / scale``, one row per output channel) and gives int8 codes that decode by
``w^ = scale * code``, so whatever it does, lowering and kernels see an ordinary int8 weight.

    >>> QUANTIZERS["squant"].encode(torch.tensor([[0.8, 0.8, 0.7]]), taps=3, bits=4).tolist()
    [[1, 1, 0]]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .numerics import weight_limit


@dataclass(frozen=True)
class WeightQuantizer:
    """One way of rounding.

    Attributes:
        name: the value of the option ``weight_quantizer``.
        encode: (v (O, K) float64 in steps, taps, bits) -> int8 codes (O, K). ``taps`` consecutive weights of a row read
            one input channel (a 3x3 kernel: 9; a linear layer: 1).
        largest: bits -> largest code. The scale of a row is its largest weight divided by it.
        error: bits -> bound on ``|v - code|``, in steps, for ``|v| <= largest(bits)``.
        widest: most bits whose codes fit int8.
        source: paper and equation.
    """

    name: str
    encode: Callable[[Tensor, int, int], Tensor]
    largest: Callable[[int], int]
    error: Callable[[int], float]
    widest: int
    source: str


def nearest(v: Tensor, taps: int, bits: int) -> Tensor:
    """Half to even, clipped to the codes of ``bits``: |v - code| <= 1/2."""
    limit = weight_limit(bits)
    return torch.round(v).clamp(-limit, limit).to(torch.int8)


def squant(v: Tensor, taps: int, bits: int) -> Tensor:
    """Nearest, then flips: |sum of errors| <= 1/2 for every kernel, then for every row; |v - code| < 1.

    A flip moves a code by one, in the direction that takes from the sum of errors; the weights that were rounded the
    farthest in the wrong direction are flipped first. The row may flip one weight of a kernel, whose sum then stays
    within 1. Both are bounds up to flips that would leave the codes of ``bits``, which are not made.

    Source: Guo et al. 2022, SQuant, algorithms 2 and 3.
    """
    limit = weight_limit(bits)
    codes = nearest(v, taps, bits).double()
    kernels = v.reshape(v.shape[0], -1, taps)
    codes = codes.reshape(kernels.shape)
    codes = codes - _flips(codes - kernels, codes, limit)
    error = codes - kernels
    direction = error.sum((1, 2), keepdim=True).sign()
    wrong, tap = _wrong_way(error, codes, direction, limit).max(2, keepdim=True)  # the one weight a kernel may give
    sums = torch.where(wrong > 0, (error.sum(2, keepdim=True) * direction).clamp(min=0), 0)
    count = error.sum((1, 2)).abs().round()
    chosen = _largest(sums.flatten(1), count).unsqueeze(2)
    codes = codes.scatter_add(2, tap, -(chosen * direction))
    return codes.reshape(v.shape).to(torch.int8)


def _flips(error: Tensor, codes: Tensor, limit: int) -> Tensor:
    """-1, 0 or 1 to take from each code (..., n) so that the errors of the last dimension sum to at most 1/2."""
    total = error.sum(-1, keepdim=True)
    direction = total.sign()
    return _largest(_wrong_way(error, codes, direction, limit), total.squeeze(-1).abs().round()) * direction


def _wrong_way(error: Tensor, codes: Tensor, direction: Tensor, limit: int) -> Tensor:
    """How far each code lies in ``direction``; 0 where it lies the other way or cannot move back."""
    movable = (codes - direction).abs() <= limit
    return torch.where(movable, (error * direction).clamp(min=0), 0)


def _largest(score: Tensor, count: Tensor) -> Tensor:
    """1.0 at the ``count`` (...) largest positive scores (..., n) of the last dimension, else 0; ties by position."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(score.shape[-1]).expand_as(order).contiguous())
    return ((rank < count.unsqueeze(-1)) & (score > 0)).double()


def power(v: Tensor, taps: int, bits: int) -> Tensor:
    """q|q| with q = sign(v) round(sqrt|v|): PowerQuant with exponent 1/2, decoded to integers.

    For B = 2^(bits-1) - 1 the codes reach B^2, 49 at 4 bits: they fit int8, and a layer runs on the ordinary kernels. At 5
    bits and more they do not.

    Source: Yvinec et al. 2023, PowerQuant, eq. 3; integer form: docs/passes.md.
    """
    limit = weight_limit(bits)
    q = torch.round(v.abs().sqrt()).clamp(max=limit)
    return (q.square() * v.sign()).to(torch.int8)


QUANTIZERS = {
    quantizer.name: quantizer
    for quantizer in (
        WeightQuantizer("nearest", nearest, weight_limit, lambda bits: 0.5, 8, "Jacob et al. 2018, eq. 1"),
        WeightQuantizer("squant", squant, weight_limit, lambda bits: 1.0, 8, "Guo et al. 2022, SQuant"),
        WeightQuantizer("power", power, lambda bits: weight_limit(bits) ** 2, lambda bits: weight_limit(bits) - 0.25, 4,
                        "Yvinec et al. 2023, PowerQuant"),
    )
}  # fmt: skip
