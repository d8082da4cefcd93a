"""Reference kernels for softmax and row normalization: integers only, exact, the same in any order of summation.

Both work on rows along the last dimension of 8-bit codes. Everything elementwise fits 32 bits (15-bit times 15- or 16-bit
numbers); what is computed once per row (a square root, a division) uses 64 bits. n is the length of a row.

softmax::

    e_i = T[max(q) - q_i]                         0 <= e_i <= T[0] = 2^B, 15 <= B <= 22; excluded elements: e_i = 0
    sum = e_1 + ... + e_n                         2^B <= sum < 2^31: the proof asks for n 2^B < 2^31
    b   = bits of sum                             B + 1 .. 31
    m   = 2^(b+14) // sum                         2^14 <= m <= 2^15, int64 division, once per row
    t_i = (e_i + 2^(B-16)) >> (B - 15)            0 .. 2^15; e_i itself for B = 15
    p_i = (t_i m + 2^(s-1)) >> s,  s = b + 5 - B  6 <= s <= 21, t_i m <= 2^30; 0 <= p_i <= 2^24

p_i is the probability in units of 2^-24. T is a table because the inputs are codes: the difference from the largest code of a
row is one of 0 .. 255, so that exp needs no polynomial and is exact to half a unit of 2^-B.

layer_norm, with q - z instead of q - mean for RMS normalization::

    d_i = 128 q_i - (128 sum(q) + n // 2) // n    |d_i| <= 32640: the distance from the mean in 1/128 code (RMS: 128 (q_i - z))
    V   = n sum(q^2) - sum(q)^2 + E               RMS: n sum((q - z)^2) + E;  E = n^2 eps / s_x^2, 0 <= E < 2^60;  V < 2^61
    M   = 2^(F-7) n / sqrt(V)                     as m / 2^s with 2^14 <= m < 2^15, from an exact 62-bit square root
    y_i = (d_i m + 2^(s-1)) >> s                  |d_i m| < 2^30; 1 <= s <= 31; M < 2^-16: y_i = 0; V = 0: y_i = 0

y_i is the normalized value in units of 2^-F. F is the largest for which M < 2^13 for any row (``fraction_bits``), so that s
is positive: 16 for rows of 96 codes, 14 for rows of 1024; more where eps dominates the variance and all values are small.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PROBABILITY_BITS = 24  # softmax results are in units of 2^-24
MIN_FRACTION_BITS, MAX_FRACTION_BITS = 7, 24
MAX_TABLE_BITS, MIN_TABLE_BITS = 22, 15
MAX_EPSILON = 1 << 60
MAX_ROW = 1 << 21

# ------------------------------------------------------------------------------------------------------------ softmax


def exp_table_bits(row: int) -> int:
    """B, the most bits for which ``row`` entries of 2^B fit an int32 sum, at most 22; below 15 there is no form.

    >>> exp_table_bits(197), exp_table_bits(4096), exp_table_bits(1 << 16)
    (22, 18, 14)
    """
    return min(MAX_TABLE_BITS, 30 - max(row - 1, 0).bit_length())


def exp_table(scale: Tensor, bits: int) -> Tensor:
    """T[d] = round_half_even(2^bits exp(-scale d)) for d = 0 .. 255; scale float64 scalar > 0. int32 (256,)."""
    distance = torch.arange(256, dtype=torch.float64)
    return torch.round(2.0**bits * torch.exp(-scale.double() * distance)).to(torch.int32)


def softmax(x: Tensor, table: Tensor, table_bits: int, mask: Tensor | None = None) -> Tensor:
    """Probabilities in units of 2^-24 along the last dimension of uint8 codes, int32; see the module docstring.

    mask: nonzero (True) where an element takes part, broadcastable to x; None: everywhere. A row without any is 0.
    """
    q = x.to(torch.int32)
    kept = None if mask is None else (mask != 0).expand(q.shape)
    visible = q if kept is None else torch.where(kept, q, -1)
    distance = (visible.amax(-1, keepdim=True) - q).clamp(0, 255)
    e = table[distance]
    e = e if kept is None else torch.where(kept, e, 0)
    total = e.sum(-1, keepdim=True, dtype=torch.int32)
    bits = bit_length(total)
    reciprocal = ((1 << (bits + 14).to(torch.int64)) // total.clamp(min=1)).to(torch.int32)
    reciprocal = torch.where(total > 0, reciprocal, 0)
    coarse = table_bits - MIN_TABLE_BITS
    t = (e + ((1 << coarse) >> 1)) >> coarse
    shift = (bits + 5 - table_bits).clamp(min=1)  # 0 bits: a row without any element
    return (t * reciprocal + (1 << (shift - 1))) >> shift


# --------------------------------------------------------------------------------------------------------- layer norm


def fraction_bits(n: int, epsilon: int) -> int:
    """F for rows of n codes: the largest with 2^(F-7) n < 2^13 sqrt(V) for every row that is not 0 throughout.

    The smallest such V is max(E, n - 1), or n for RMS: one code differs from the others by one.

    >>> fraction_bits(96, 0), fraction_bits(1024, 0), fraction_bits(1 << 21, 0)
    (16, 14, 9)
    """
    bits = MAX_FRACTION_BITS
    while not is_fraction(bits, n, epsilon):
        bits -= 1
    return bits


def is_fraction(bits: int, n: int, epsilon: int) -> bool:
    """``bits`` is a legal F for rows of n codes."""
    return (n << (bits - 7)) ** 2 < max(epsilon, n - 1, 1) << 26


def layer_norm(x: Tensor, zero_point: Tensor | None, epsilon: int, fraction_bits: int) -> Tensor:
    """Rows of uint8 codes with mean 0 and mean square 1 in units of 2^-fraction_bits, int32; see the module docstring.

    zero_point: None subtracts the mean of each row; an int32 scalar stands for real 0 and is subtracted instead (RMS).
    epsilon: E = n^2 eps / s_x^2, added to V. A constant row is 0.
    """
    n = x.shape[-1]
    q = x.to(torch.int32)
    if zero_point is None:
        total = q.sum(-1, keepdim=True, dtype=torch.int64)
        squares = (q * q).sum(-1, keepdim=True, dtype=torch.int64)
        distance = (q << 7) - ((total << 7) + n // 2).div(n, rounding_mode="floor").to(torch.int32)
        spread = n * squares - total * total
    else:
        q = q - zero_point
        distance = q << 7
        spread = n * (q * q).sum(-1, keepdim=True, dtype=torch.int64)
    multiplier, shift = inverse_root(spread + epsilon, n, fraction_bits)
    return (distance * multiplier + (1 << (shift - 1))) >> shift


def inverse_root(v: Tensor, n: int, fraction_bits: int) -> tuple[Tensor, Tensor]:
    """(m, s) int32 with F = fraction_bits, 2^(F-7) n / sqrt(v) ~ m / 2^s, 2^14 <= m < 2^15, 1 <= s <= 31; m = 0 outside (v = 0 among it).

    v int64, 0 <= v < 2^62; 1 <= n <= 2^21. Relative error below 2^-14.9::

        w = v 4^j with 2^60 <= w < 2^62;  r = floor(sqrt(w))     2^30 <= r < 2^31
        a = n 2^c with 2^61 <= a < 2^62;  g = a // r             2^30 <= g < 2^32
        m = g rounded half up to 15 bits
    """
    half = (62 - bit_length(v)) >> 1
    root = isqrt(v << (2 * half).to(torch.int64)).clamp(min=1)
    c = 62 - n.bit_length()
    g = (n << c) // root
    excess = bit_length(g) - 15
    m = ((g + (1 << (excess - 1).to(torch.int64))) >> excess.to(torch.int64)).to(torch.int32)
    carry = (m >> 15) & 1
    s = c - half - (fraction_bits - 7) - excess - carry
    valid = (v > 0) & (s >= 1) & (s <= 31)
    return torch.where(valid, m >> carry, 0), torch.where(valid, s, 1)


def layer_norm_bound(n: int, epsilon: int, fraction_bits: int) -> int:
    """Largest |result| of ``layer_norm`` over rows of ``n`` codes.

    |x - mean| <= sqrt(n) deviations; rounding the mean adds at most 2^-8 of that, the multiplier less than 2^-14. It is also
    at most 32640 M with the largest M, which is smaller where eps dominates.
    """
    root = math.isqrt(n) + 1
    spread = (root << fraction_bits) + (root << (fraction_bits - 7)) + 1
    codes = 32641 * (n << (fraction_bits - 7)) // max(math.isqrt(max(epsilon, 0)), 1) + 1
    return min(spread, codes)


# ------------------------------------------------------------------------------------------------------------ integers


def bit_length(v: Tensor) -> Tensor:
    """Bits of each non-negative integer, int32: 0 -> 0, 1 -> 1, 255 -> 8."""
    bits = torch.zeros_like(v, dtype=torch.int32)
    for step in (32, 16, 8, 4, 2, 1) if v.dtype == torch.int64 else (16, 8, 4, 2, 1):
        above = (v >> step) > 0
        bits = bits + above.to(torch.int32) * step
        v = torch.where(above, v >> step, v)
    return bits + (v > 0).to(torch.int32)


def isqrt(v: Tensor) -> Tensor:
    """floor(sqrt(v)) of int64 0 <= v < 2^62, bit by bit: 31 steps of shifts, additions and comparisons."""
    root = torch.zeros_like(v)
    bit = 1 << 60
    while bit:
        trial = root + bit
        fits = v >= trial
        v = torch.where(fits, v - trial, v)
        root = (root >> 1) + fits * bit
        bit >>= 2
    return root
