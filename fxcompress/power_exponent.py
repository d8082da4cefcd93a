"""The exponent of PowerQuant: which ``a`` of ``q = sign(w) round(B (|w| / m)^a)`` loses the network's weights least.

One exponent for the whole network minimizes ``sum_l |W_l - W^_l|``. Only a = 1/2 decodes to integers (``weight_quantizers``): the
search says what that costs against the best exponent, which would need a table of real numbers in front of every product.

Source: Yvinec et al. 2023, PowerQuant, eq. 4. The error is smooth piecewise only and not proven convex: Nelder-Mead from 0.5
is checked against a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .numerics import weight_limit

START = 0.5
GRID = [0.2 + 0.05 * i for i in range(27)]  # 0.2 .. 1.5
SAMPLE = 1 << 16  # weights of a layer that ``exponent_choice`` looks at


@dataclass
class ExponentChoice:
    """``best`` exponent and its error, beside the error of 1/2 (what the integer network has) and of 1 (uniform)."""

    best: float
    best_error: float
    half_error: float
    uniform_error: float


def power_round(weight: Tensor, exponent: float, bits: int) -> Tensor:
    """W^ (O, K) float64: each row to sign(q) m (|q| / B)^(1/a), m its largest magnitude; a = 1 is uniform rounding."""
    limit, largest = weight_limit(bits), weight.abs().amax(1, keepdim=True).clamp(min=1e-300)
    codes = torch.round(limit * (weight.abs() / largest).pow(exponent))
    return weight.sign() * largest * (codes / limit).pow(1 / exponent)


def network_error(weights: Sequence[Tensor], exponent: float, bits: int) -> float:
    """sum_l |W_l - W^_l| over rows (O, K), Euclidean norms."""
    return sum(float((w - power_round(w, exponent, bits)).norm()) for w in weights)


def search_exponent(weights: Sequence[Tensor], bits: int) -> float:
    """The exponent of the least ``network_error``: Nelder-Mead from 0.5, and from the best point of the grid if that is lower."""

    def error(a: float) -> float:
        return network_error(weights, a, bits) if a > 0.05 else float("inf")

    found = nelder_mead(error, START, 0.1)
    start = min(GRID, key=error)
    return found if error(found) <= error(start) else min(nelder_mead(error, start, 0.025), start, key=error)


def nelder_mead(function: Callable[[float], float], start: float, size: float, tolerance: float = 1e-3) -> float:
    """A local minimum of a function of one number: reflect, expand, contract a simplex of two points."""
    best, worst = sorted((function(x), x) for x in (start, start + size))
    while abs(best[1] - worst[1]) > tolerance:
        step = best[1] - worst[1]
        reflected = (function(best[1] + step), best[1] + step)
        if reflected < best:
            expanded = (function(best[1] + 2 * step), best[1] + 2 * step)
            best, worst = min(expanded, reflected), best
        else:
            middle = (best[1] + worst[1]) / 2
            best, worst = sorted((best, (function(middle), middle)))
    return best[1]


def exponent_choice(weights: Sequence[Tensor], bits: int) -> ExponentChoice:
    """The search on rows (O, K) of every layer, at most ``SAMPLE`` weights of each."""
    steps = [max(1, w.numel() // SAMPLE) for w in weights]
    sample = [(w[::n] if len(w) > 1 else w[:, ::n]).double() for w, n in zip(weights, steps, strict=True)]
    best = search_exponent(sample, bits)
    return ExponentChoice(best, *(network_error(sample, a, bits) for a in (best, 0.5, 1.0)))
