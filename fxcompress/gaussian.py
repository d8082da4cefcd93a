"""The algebra of approximate distributions: what clamps, functions, sums and products do to moments and intervals.

A tensor is described by the mean and variance of a Gaussian and by two intervals that travel side by side through the
same interval arithmetic: its *hard support* (ReLU: lo = 0) and the *range* that holds ``sigmas`` standard deviations.
Behind an elementwise function the range is the image of the range before it, not a multiple of the new deviation: ReLU of
N(beta, gamma^2) ends at ``beta + 6 gamma``. Where independent terms are summed, the range is the Gaussian's again.

Source: Nagel et al. 2019 (data-free ranges, clipped-normal means); moments of the doubly clipped normal are derived in
``clipped_normal``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SUPPORT, RANGE = 0, 1  # rows of ``Moments.lo`` and ``Moments.hi``
_BLOCK = 1 << 22  # weights looked at together: bounds the memory for copies of them
_TAIL = 12.0  # standard deviations that stand for an unbounded support where a function is evaluated
_Z = torch.linspace(-8, 8, 1025, dtype=torch.float64)
_DENSITY = torch.softmax(-0.5 * _Z**2, 0)
_UNIT = torch.linspace(0, 1, 513, dtype=torch.float64)
_NEAR_ZERO = torch.linspace(-8, 8, 513, dtype=torch.float64)  # where SiLU, GELU, ... have their extrema


@dataclass(frozen=True, eq=False)
class Moments:
    """mean, var: float64 () or (C,).  lo, hi: (2,) or (2, C), the rows SUPPORT (may be infinite) and RANGE."""

    mean: Tensor
    var: Tensor
    lo: Tensor
    hi: Tensor

    @property
    def std(self) -> Tensor:
        return self.var.sqrt()

    @property
    def is_finite(self) -> bool:
        """False where the algebra broke down (a pole inside the range); the support may be infinite."""
        return all(bool(torch.isfinite(t).all()) for t in (self.mean, self.var, self.lo[RANGE], self.hi[RANGE]))


def normal(mean: Tensor, std: Tensor, lo: Tensor, hi: Tensor, sigmas: float) -> Moments:
    """N(mean, std^2) on the support [lo, hi]; its range is mean +- sigmas * std inside the support."""
    mean, std, lo, hi = (t.double() for t in (mean, std, lo, hi))
    return Moments(
        mean,
        std**2,
        torch.stack([lo, torch.clamp(mean - sigmas * std, lo, hi)]),
        torch.stack([hi, torch.clamp(mean + sigmas * std, lo, hi)]),
    )


def interval(mean: Tensor, std: Tensor, lo: Tensor, hi: Tensor) -> Moments:
    """A tensor known to stay inside [lo, hi]: support and range are the same."""
    mean, std, lo, hi = (t.double() for t in (mean, std, lo, hi))
    return Moments(mean, std**2, torch.stack([lo, lo]), torch.stack([hi, hi]))


def constant_moments(value: Tensor, kept: tuple[int, ...] = ()) -> Moments:
    """The elements of a constant, pooled over all dimensions but ``kept`` (at most one)."""
    value = value.double()
    dims = [d for d in range(value.ndim) if d not in kept]
    if not dims:
        return interval(value, torch.zeros_like(value), value, value)
    return interval(value.mean(dims), value.std(dims, correction=0), value.amin(dims), value.amax(dims))


def pooled(m: Moments) -> Moments:
    """The mixture of all channels as one tensor: var = E[var] + Var[mean]."""
    if m.mean.ndim == 0:
        return m
    return Moments(m.mean.mean(), m.var.mean() + m.mean.var(correction=0), m.lo.amin(-1), m.hi.amax(-1))


def consistent(m: Moments) -> Moments:
    """Moments that the support allows: mean inside it, var <= (hi - mean)(mean - lo), range inside support."""
    lo, hi = m.lo[SUPPORT], m.hi[SUPPORT]
    mean = torch.clamp(m.mean, lo, hi)
    largest = torch.nan_to_num((hi - mean) * (mean - lo), nan=0.0, posinf=math.inf)  # Bhatia and Davis 2000
    return Moments(mean, torch.minimum(m.var, largest), torch.clamp(m.lo, lo, hi), torch.clamp(m.hi, lo, hi))


def within_sigmas(m: Moments, sigmas: float) -> Moments:
    """A sum of many independent terms is Gaussian again: cut its range to mean +- sigmas * std."""
    lo, hi = m.mean - sigmas * m.std, m.mean + sigmas * m.std
    cut_lo, cut_hi = torch.clamp(m.lo[RANGE], lo, hi), torch.clamp(m.hi[RANGE], lo, hi)
    return replace(m, lo=torch.stack([m.lo[SUPPORT], cut_lo]), hi=torch.stack([m.hi[SUPPORT], cut_hi]))


# -------------------------------------------------------------------------------------------------- elementwise


def clipped_normal(mean: Tensor, std: Tensor, lo: float | Tensor, hi: float | Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``clamp(X, lo, hi)``, X ~ N(mean, std^2); lo or hi may be infinite, std may be 0.

    With a = (lo - mean)/std, b = (hi - mean)/std and z the clipped standard normal::

        E[z]   = a Phi(a) + b (1 - Phi(b)) + phi(a) - phi(b)
        E[z^2] = a^2 Phi(a) + b^2 (1 - Phi(b)) + Phi(b) - Phi(a) + a phi(a) - b phi(b)

    >>> zero, one = torch.zeros(1).double(), torch.ones(1).double()
    >>> clipped_normal(one, one, 0.0, math.inf)[0]
    tensor([1.0833], dtype=torch.float64)
    """
    scale = torch.where(std > 0, std, torch.ones_like(std))
    a, b = (((bound - mean) / scale).clamp(-40, 40) for bound in (lo, hi))  # phi(40) and Phi(-40) are 0 in float64
    below, above = torch.special.ndtr(a), torch.special.ndtr(-b)
    phi_a, phi_b = (torch.exp(-0.5 * t**2) / math.sqrt(2 * math.pi) for t in (a, b))
    first = a * below + b * above + phi_a - phi_b
    second = a**2 * below + b**2 * above + (1 - below - above) + a * phi_a - b * phi_b
    clipped_mean = torch.where(std > 0, mean + scale * first, mean).clamp(lo, hi)
    return clipped_mean, torch.where(std > 0, scale**2 * (second - first**2).clamp(min=0), torch.zeros_like(std))


def clamp(m: Moments, lo: float | Tensor, hi: float | Tensor) -> Moments:
    """Both bounds are numbers, or both tensors (C,)."""
    mean, var = clipped_normal(m.mean, m.std, lo, hi)
    return Moments(mean, var, m.lo.clamp(lo, hi), m.hi.clamp(lo, hi))


def function(m: Moments, f: Callable[[Tensor], Tensor]) -> Moments:
    """Elementwise ``f`` of a Gaussian cut to its support.

    Moments by the trapezoidal rule over +-8 sigma, which converges exponentially for smooth functions and, unlike
    Gauss-Hermite quadrature, quadratically at kinks (leaky ReLU). Bounds by evaluating ``f`` on a fine grid, where an
    unbounded support ends 12 sigma from the mean.
    """
    x = m.mean[..., None] + m.std[..., None] * _Z
    y = f(torch.clamp(x, m.lo[SUPPORT, ..., None], m.hi[SUPPORT, ..., None]))
    mean = (y * _DENSITY).sum(-1)
    var = ((y - mean[..., None]) ** 2 * _DENSITY).sum(-1)
    lo, hi = m.lo.clone(), m.hi.clone()
    below, above = m.mean - _TAIL * m.std, m.mean + _TAIL * m.std
    lo[SUPPORT] = torch.where(torch.isfinite(lo[SUPPORT]), lo[SUPPORT], torch.minimum(below, lo[RANGE]))
    hi[SUPPORT] = torch.where(torch.isfinite(hi[SUPPORT]), hi[SUPPORT], torch.maximum(above, hi[RANGE]))
    lo, hi = lo[..., None], hi[..., None]
    values = f(torch.cat([lo + (hi - lo) * _UNIT, torch.clamp(_NEAR_ZERO, lo, hi)], -1))
    return Moments(mean, var, values.amin(-1), values.amax(-1))


# ------------------------------------------------------------------------------------------- independent tensors


def repeated(m: Moments, count: int) -> Moments:
    """Scalar moments as ``count`` equal channels."""
    return Moments(*(t[..., None].expand(*t.shape, count) for t in (m.mean, m.var, m.lo, m.hi)))


def _aligned(a: Moments, b: Moments) -> tuple[Moments, Moments]:
    """Both with the same channels: a scalar one, or one of a single channel, is repeated."""
    count = max(m.mean.shape[0] if m.mean.ndim else 0 for m in (a, b))
    return tuple(repeated(pooled(m), count) if count and m.mean.shape != (count,) else m for m in (a, b))


def add(a: Moments, b: Moments, sign: float = 1.0) -> Moments:
    """a + sign * b of independent tensors. The deviations of the range's ends from the mean add in quadrature:
    for two Gaussians that is sigmas * sqrt(var_a + var_b), and a constant just shifts the range."""
    a, b = _aligned(a, b)
    near, far = (b.lo, b.hi) if sign > 0 else (-b.hi, -b.lo)
    mean_b = sign * b.mean
    mean = a.mean + mean_b
    lo, hi = a.lo + near, a.hi + far
    lo[RANGE] = mean - torch.hypot(a.mean - a.lo[RANGE], mean_b - near[RANGE])
    hi[RANGE] = mean + torch.hypot(a.hi[RANGE] - a.mean, far[RANGE] - mean_b)
    return Moments(mean, a.var + b.var, lo, hi)


def mul(a: Moments, b: Moments) -> Moments:
    """The product of independent tensors; bounds from the four corners (0 * inf = 0)."""
    a, b = _aligned(a, b)
    corners = torch.stack([torch.nan_to_num(p * q, nan=0.0, posinf=math.inf, neginf=-math.inf)
                           for p in (a.lo, a.hi) for q in (b.lo, b.hi)])  # fmt: skip
    var = a.var * b.var + a.var * b.mean**2 + b.var * a.mean**2
    return Moments(a.mean * b.mean, var, corners.amin(0), corners.amax(0))


def scale(m: Moments, factor: Tensor, offset: Tensor) -> Moments:
    """factor * m + offset, per channel or scalar."""
    ends = torch.stack([m.lo * factor, m.hi * factor]) + offset
    ends = torch.where(factor == 0, offset.expand_as(ends), ends)
    return Moments(m.mean * factor + offset, m.var * factor**2, ends.amin(0), ends.amax(0))


def weighted_sum(m: Moments, weight: Tensor, bias: Tensor) -> Moments:
    """sum over inputs i and taps t of weight[g, o, i, t] * x[g, i] + bias[g, o], terms independent.

    m has channels (G*I,), weight (G, O, I, T) in the precision to sum in, bias (G*O,). Neighboring pixels are correlated in
    truth, so the variance is an estimate: too small where a kernel's taps agree in sign, too large where they cancel.
    """
    groups, _, inputs, taps = weight.shape
    m = Moments(*(t.reshape(*t.shape[:-1], groups, inputs) for t in (m.mean, m.var, m.lo, m.hi)))
    rows = max(1, _BLOCK // max(1, groups * inputs * taps))
    blocks = [_weighted_rows(m, block) for block in weight.split(rows, 1)]
    mean, var, lo, hi = (torch.cat(parts, -1).flatten(-2) for parts in zip(*blocks))
    return Moments(mean + bias, var, lo + bias, hi + bias)


def _weighted_rows(m: Moments, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``weighted_sum`` of some output channels: m (..., G, I), weight (G, O, I, T), results float64 (..., G, O)."""

    def times(matrix: Tensor, vector: Tensor) -> Tensor:
        """(G, O, I) times (..., G, I); an infinite entry counts only where its coefficient is not 0."""
        finite = torch.isfinite(vector)
        value = product(matrix, torch.where(finite, vector, torch.zeros_like(vector)))
        if finite.all():
            return value
        reached = product(matrix, ~finite * vector.sign())
        return torch.where(reached != 0, reached * math.inf, value)

    def product(matrix: Tensor, vector: Tensor) -> Tensor:
        return torch.einsum("goi,...gi->...go", matrix, vector.to(matrix.dtype)).double()

    bounds = torch.stack([m.lo, m.hi])
    positive, negative = (times(part.sum(-1), bounds) for part in (weight.clamp(min=0), weight.clamp(max=0)))
    mean, var = times(weight.sum(-1), m.mean), times((weight**2).sum(-1), m.var)
    return mean, var, positive[0] + negative[1], positive[1] + negative[0]


def dot_product(a: Moments, b: Moments, terms: int) -> Moments:
    """The sum of ``terms`` independent products of two tensors described by scalars."""
    product = mul(a, b)
    return Moments(*(terms * t for t in (product.mean, product.var, product.lo, product.hi)))
