"""The integer arithmetic against Python integers, the published vectors and its own bounds."""

import doctest
from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fxcompress import numerics
from fxcompress.numerics import Dyadic, dyadic, dyadic31, requantize, rescale31

INT32_MAX = (1 << 31) - 1


def clip(v: int, lo: int, hi: int) -> int:
    return max(lo, min(hi, v))


def requantize_exactly(branches, zero_point: int, k: int, lo: int, hi: int) -> int:
    """The formula of numerics.py in Python integers: branches of (acc, m, p, l)."""
    total = 0
    for i, (acc, m, p, left) in enumerate(branches):
        rounding = 1 << (p - 1 - left) if p > left else 0
        if i == 0 and m > 0:  # half a unit of u, rounded half up
            rounding -= ((rounding << 15) + (m >> 1)) // m
        t = clip(((acc + rounding) << left) >> p, -(1 << 15), (1 << 15) - 1)
        total += (t * m + (1 << 14)) >> 15
    total = clip(total, -(1 << 15), (1 << 15) - 1)
    y = clip(total + (zero_point << k) + (1 << k >> 1), -(1 << 15), (1 << 15) - 1) >> k
    return clip(y, lo, hi)


def requantize_one(branches, zero_point: int, k: int, lo: int = 0, hi: int = 255) -> int:
    def int32(v):
        return torch.tensor(v, dtype=torch.int32)

    forms = [(int32(acc), Dyadic(int32(m), int32(p), left)) for acc, m, p, left in branches]
    result = requantize(forms, int32(zero_point), k, int32(lo), int32(hi))
    assert result.dtype == torch.uint8
    return int(result)


@st.composite
def branch(draw):
    """(acc, m, p, l) within the accumulator proof: |acc| * 2^l + 2^(p-1) < 2^31; often at its edge or on a tie."""
    p, left = draw(st.integers(0, 31)), draw(st.integers(0, 8))
    largest = ((1 << 31) - 1 - (1 << p >> 1)) >> left
    tie = (draw(st.integers(-300, 300)) << p) + (1 << p >> 1) >> left
    acc = draw(st.one_of(st.integers(-largest, largest), st.sampled_from([-largest, largest, 0]), st.just(tie)))
    m = draw(st.integers(1 << 14, (1 << 15) - 1)) * draw(st.sampled_from([1, -1]))
    return clip(acc, -largest, largest), draw(st.sampled_from([m, m, m, 0])), p, left


@given(st.lists(branch(), min_size=1, max_size=4), st.integers(0, 255), st.integers(0, 6), st.integers(0, 128))
@example([(-3, 1 << 14, 1, 0)], 0, 0, 0)  # negative tie in the first shift
@example([(-(1 << 31) + 1, -(1 << 14), 0, 0)], 255, 6, 0)  # p = 0, a sat16 at once, a negative multiplier
@example([(INT32_MAX - (1 << 30), (1 << 15) - 1, 31, 0)], 0, 6, 0)  # the largest shift
@example([(123456, 0, 0, 0)], 17, 6, 0)  # a vanishing multiplier leaves the zero point
def test_requantize_is_the_formula_in_python_integers(branches, zero_point, k, lo):
    expected = requantize_exactly(branches, zero_point, k, lo, 255)
    assert requantize_one(branches, zero_point, k, lo) == expected


def test_requantize_broadcasts_per_channel_constants():
    acc = torch.randint(-40000, 40000, (2, 3, 4, 4), dtype=torch.int32)
    d = dyadic(torch.tensor([0.001, -0.02, 0.7], dtype=torch.float64).reshape(3, 1, 1), 6)
    lo, hi = (torch.tensor(v, dtype=torch.int32).reshape(3, 1, 1) for v in ([0, 10, 20], [255, 200, 100]))
    zero_point = torch.tensor([1, 128, 30], dtype=torch.int32).reshape(3, 1, 1)
    got = requantize([(acc, d)], zero_point, 6, lo, hi)
    for c in range(3):
        form = int(d.multiplier[c]), int(d.right_shift[c]), d.left_shift
        for value, code in zip(acc[:, c].flatten().tolist(), got[:, c].flatten().tolist(), strict=True):
            assert code == requantize_exactly([(value, *form)], int(zero_point[c]), 6, int(lo[c]), int(hi[c]))


@given(st.floats(2.0**-30, 2.0**10), st.booleans(), st.integers(0, 6))
def test_dyadic_is_within_two_to_the_minus_15(real, negative, k):
    real = -real if negative else real
    d = dyadic(torch.tensor(real, dtype=torch.float64), k)
    m, p = int(d.multiplier), int(d.right_shift)
    if m == 0:
        assert abs(real) * 2**k < 2.0**-31
        return
    assert 1 << 14 <= abs(m) < 1 << 15 and 0 <= p <= 31 and (m < 0) == negative
    exact = Fraction(real) * 2**k
    assert abs(Fraction(m) * Fraction(2) ** (d.left_shift - p - 15) - exact) <= abs(exact) * Fraction(1, 1 << 15)


@pytest.mark.parametrize(
    "real, m, c", [(0.5, 16384, 15), (0.0123456789, 25891, 21), (0.9999999999, 16384, 14), (1.5, 24576, 14)]
)
def test_dyadic_matches_the_15_bit_vectors(real, m, c):
    d = dyadic(torch.tensor(real, dtype=torch.float64), 0)
    assert (int(d.multiplier), int(d.right_shift) - d.left_shift + 15) == (m, c)


def test_dyadic_gives_one_left_shift_per_node_and_zero_for_vanishing_multipliers():
    d = dyadic(torch.tensor([3.0, 0.001, 0.0, 2.0**-60], dtype=torch.float64), 6)
    assert d.left_shift == 8 and d.right_shift.tolist()[0] == 0
    assert d.multiplier.tolist()[2:] == [0, 0] and d.right_shift.tolist()[2:] == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_multipliers_that_are_not_finite_raise(bad):
    for form in (lambda m: dyadic(m, 6), dyadic31):
        with pytest.raises(ValueError, match="finite"):
            form(torch.tensor(bad, dtype=torch.float64))


def test_the_16_bit_form_differs_from_exact_rounding_in_half_a_percent_by_one_step_and_without_bias():
    """Convolution-like multipliers: accumulators finer than a guard step. Coarser ones (M > 2^-6) reach 0.8 %."""
    generator = torch.Generator().manual_seed(1)
    real = torch.exp(torch.empty(2000, 1, dtype=torch.float64).uniform_(-12, -5, generator=generator))
    steps = torch.empty(2000, 50, dtype=torch.float64).uniform_(0, 255, generator=generator)
    acc = torch.floor(steps / real).to(torch.int32)
    got = requantize([(acc, dyadic(real, 6))], *(torch.tensor(0), 6, torch.tensor(0), torch.tensor(255)))
    exact = torch.floor(acc.double() * real + 0.5).clamp(0, 255)
    difference = got.double() - exact
    assert difference.abs().max() <= 1
    assert (difference != 0).double().mean() < 0.005
    assert difference.mean().abs() < 0.002  # 0.008 without the half unit in rounding_constant


@pytest.mark.parametrize(
    "real, b, c",
    [
        (0.5, 1073741824, 31),
        (0.0123456789, 1696777188, 37),
        (0.9999999999, 1073741824, 30),
        (1.5, 1610612736, 30),
        (3e-09, 1729382257, 59),
    ],
)
def test_dyadic31_matches_the_vectors(real, b, c):
    multiplier, shift = dyadic31(torch.tensor(real, dtype=torch.float64))
    assert (int(multiplier), int(shift)) == (b, c)


RESCALED = {
    0.5: ([-5, -3, -1, 0, 1, 3, 5], [-2, -1, 0, 0, 1, 2, 3]),
    0.0123456789: (
        [-2147483648, -100000, -10000, -121, -41, -40, 0, 40, 41, 121, 9999, 10000, 2147483647],
        [-26512144, -1235, -123, -1, -1, 0, 0, 0, 1, 1, 123, 123, 26512144],
    ),
}


@pytest.mark.parametrize("real", RESCALED)
def test_rescale31_matches_the_vectors(real):
    acc, expected = RESCALED[real]
    b, c = dyadic31(torch.tensor(real, dtype=torch.float64))
    assert rescale31([(torch.tensor(acc, dtype=torch.int32), b, c)]).tolist() == expected


@given(st.integers(-(1 << 31), INT32_MAX), st.floats(2.0**-40, 2.0**29), st.booleans())
def test_rescale31_rounds_half_up_and_saturates(acc, real, negative):
    b, c = (int(v) for v in dyadic31(torch.tensor(-real if negative else real, dtype=torch.float64)))
    exact = floor(Fraction(acc * b, 1 << c) + Fraction(1, 2))
    form = torch.tensor(acc, dtype=torch.int32), torch.tensor(b), torch.tensor(c)
    assert int(rescale31([form])) == clip(exact, -(1 << 31), INT32_MAX)


def test_dyadic31_vanishes_below_two_to_the_minus_32_and_refuses_two_to_the_30():
    b, _ = dyadic31(torch.tensor([0.0, 2.0**-40], dtype=torch.float64))
    assert b.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"below 2\^30"):
        dyadic31(torch.tensor(2.0**30, dtype=torch.float64))


def test_residual_add_vector_in_both_forms():
    """s1/sy = 0.7, s2/sy = 0.31; the 8-bit form with zero point 100."""
    q1, q2 = (torch.tensor(v, dtype=torch.int32) for v in ([10, 127, -128], [-3, 127, 5]))
    reals = [torch.tensor(r, dtype=torch.float64) for r in (0.7, 0.31)]
    expected = torch.tensor([6, 128, -88])
    wide = rescale31([(q, *dyadic31(r)) for q, r in zip((q1, q2), reals, strict=True)])
    assert torch.equal(wide, expected.int())
    narrow = requantize(
        [(q, dyadic(r, 6)) for q, r in zip((q1, q2), reals, strict=True)],
        *(torch.tensor(100), 6, torch.tensor(0), torch.tensor(255)),
    )
    assert torch.equal(narrow.int(), (expected + 100).int())


def test_guard_bits_keep_every_branch_inside_16_bits():
    for steps in (0.5, 1, 100, 255, 256, 257, 320, 5000, 16384):
        k = numerics.guard_bits(steps)
        assert 0 <= k <= 6 and steps * 2**k <= 1 << 14
        assert k == 6 or steps * 2 ** (k + 1) > 1 << 14  # no bit given away


# ---------------------------------------------------------------------------------------------------- the boundary


def test_quantize_rounds_half_to_even_and_saturates():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, float("inf"), float("-inf")])
    one, ten = torch.tensor(1.0, dtype=torch.float64), torch.tensor(10, dtype=torch.int32)
    assert numerics.quantize(x, one, ten, 0, 255).tolist() == [10, 12, 12, 10, 8, 255, 0, 255, 0]
    signed = numerics.quantize(x, one, ten - 10, -127, 127)
    assert signed.dtype == torch.int8 and signed.tolist() == [0, 2, 2, 0, -2, 127, -127, 127, -127]


def test_quantize_refuses_nan_and_multiplies_by_the_float32_reciprocal():
    scale, zero = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0, dtype=torch.int32)
    with pytest.raises(ValueError, match="NaN"):
        numerics.quantize(torch.tensor([0.0, float("nan")]), scale, zero, 0, 255)
    x = torch.rand(10000) * 25
    expected = torch.round(x * torch.tensor(1 / 0.1, dtype=torch.float64).float()).to(torch.uint8)
    assert torch.equal(numerics.quantize(x, scale, zero, 0, 255), expected)


def test_dequantize_inverts_quantize_on_codes_per_channel():
    q = torch.arange(256, dtype=torch.uint8).expand(3, 256)
    scale = torch.tensor([0.25, 0.5, 2.0], dtype=torch.float64).reshape(3, 1)
    zero = torch.tensor([0, 128, 255], dtype=torch.int32).reshape(3, 1)
    real = numerics.dequantize(q, scale, zero)
    assert real.dtype == torch.float32 and float(real[1, 0]) == -64.0
    assert torch.equal(numerics.quantize(real, scale, zero, 0, 255), q)


@given(st.floats(-100, 100), st.floats(-100, 100), st.sampled_from([2, 4, 8]))
def test_affine_codes_hold_zero_exactly_and_cover_the_range(a, b, bits):
    lo, hi = min(a, b), max(a, b)
    q = numerics.affine_qparams(lo, hi, bits)
    scale, zero = float(q.scale), int(q.zero_point)
    assert scale > 0 and 0 <= zero <= q.qmax == (1 << bits) - 1
    slack = scale / 2 * (1 + 1e-9)  # the zero point is rounded: either end may give half a step
    assert scale * (0 - zero) <= min(lo, 0) + slack and scale * (q.qmax - zero) >= max(hi, 0) - slack


def test_the_docstring_examples_hold():
    assert doctest.testmod(numerics).failed == 0
