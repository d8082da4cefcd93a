"""Every method on every distribution gives an interval; the error it minimizes is the real one."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fxcompress.numerics import affine_qparams, dequantize, quantize_offline
from fxcompress.observers import Histogram
from fxcompress.options import RANGE_METHODS
from fxcompress.range_methods import METHODS, choose_range, minmax_range, quantization_error


def observed(x):
    h = Histogram()
    h.update(x)
    return h


def gaussian(count=20000, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def real_error(x, lo, hi, bits):
    q = affine_qparams(lo, hi, bits)
    return float(
        (
            (dequantize(quantize_offline(x, q.scale, q.zero_point, q.qmin, q.qmax), q.scale, q.zero_point) - x) ** 2
        ).mean()
    )


def test_the_methods_are_those_of_the_options():
    assert set(METHODS) == set(RANGE_METHODS)


values = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1e-30, -1e-30])


@given(st.lists(values, min_size=1, max_size=40), st.sampled_from(RANGE_METHODS), st.integers(2, 8))
@example([0.0], "kl", 8)
@example([0.0] * 39 + [1e-30], "percentile", 8)
@example([5.0], "mse", 2)
@example([-3.0, -3.0], "kl", 4)
def test_the_interval_holds_zero_and_stays_inside_the_values(data, method, bits):
    x = torch.tensor(data)
    lo, hi = choose_range(observed(x), method, bits, 99.0)
    assert min(float(x.min()), 0.0) <= lo <= 0 <= hi <= max(float(x.max()), 0.0)
    assert lo < hi or not x.any()


def test_minmax():
    assert minmax_range(observed(torch.tensor([1.0, 4.0]))) == (0.0, 4.0)
    assert minmax_range(observed(torch.tensor([-2.0, 4.0]))) == (-2.0, 4.0)


# ------------------------------------------------------------------------------------------------------------ percentile


def test_percentile_cuts_its_share_from_both_sides():
    x = gaussian()
    lo, hi = choose_range(observed(x), "percentile", percentile=99)
    width = 2 * float(x.abs().max()) / 4096  # one bin
    assert lo == pytest.approx(float(x.double().quantile(0.005)), abs=2 * width)
    assert hi == pytest.approx(float(x.double().quantile(0.995)), abs=2 * width)


def test_percentile_of_a_one_sided_tensor_counts_its_zeros():
    x = gaussian().clamp(min=0)
    lo, hi = choose_range(observed(x), "percentile", percentile=99)
    assert lo == 0 and float((x > hi).double().mean()) == pytest.approx(0.01, abs=1e-3)


def test_percentile_100_is_minmax():
    h = observed(gaussian())
    assert choose_range(h, "percentile", percentile=100) == pytest.approx(minmax_range(h))


def test_percentile_keeps_what_little_is_not_zero():
    x = torch.zeros(100_000)
    x[0] = 3.0
    assert choose_range(observed(x), "percentile", percentile=99.9) == (0.0, 3.0)


# ------------------------------------------------------------------------------------------------- mean squared error


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("lo, hi", [(-4.5, 4.5), (-1.0, 2.0), (-0.3, 0.3)])
def test_the_expected_error_is_the_real_one(bits, lo, hi):
    x = gaussian()
    got = float(quantization_error(observed(x), torch.tensor(lo).double(), torch.tensor(hi).double(), bits))
    # A value moves by less than a bin (width 2 limit / 4096) inside its bin, its error by that much and no more.
    real = real_error(x, lo, hi, bits)
    width = 2 * float(x.abs().max()) / 4096
    assert got == pytest.approx(real, abs=2 * width * real**0.5 + width**2)


def test_exact_zeros_cost_nothing():
    x = gaussian().clamp(min=0)
    top = x.max().double()
    got = float(quantization_error(observed(x), torch.zeros(()).double(), top, 8))
    assert got == pytest.approx(real_error(x, 0.0, float(top), 8), rel=0.05)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["gaussian", "relu", "outlier", "shifted"])
def test_mse_is_close_to_the_best_clip_on_a_grid(bits, kind):
    x = gaussian(4000)
    x = {"gaussian": x, "relu": x.clamp(min=0), "outlier": torch.cat([x, torch.tensor([50.0])]), "shifted": x + 1.5}[
        kind
    ]
    h = observed(x)
    lo, hi = choose_range(h, "mse", bits)
    bottom, top = minmax_range(h)
    shares = [0.02 * i for i in range(1, 51)]
    best = min(
        real_error(x, bottom * a, top * b, bits) for a in (shares if bottom < 0 else [1.0]) for b in shares
    )  # fmt: skip
    assert real_error(x, lo, hi, bits) <= 1.1 * best
    assert real_error(x, lo, hi, bits) <= real_error(x, bottom, top, bits) * 1.0001


def test_mse_clips_more_at_fewer_bits():
    h = observed(gaussian())
    widths = [hi - lo for lo, hi in (choose_range(h, "mse", bits) for bits in (2, 3, 4, 6, 8))]
    assert widths == sorted(widths) and widths[0] < 0.6 * widths[-1]


# ------------------------------------------------------------------------------------------------------- KL divergence


def test_kl_clips_an_outlier_and_keeps_a_uniform_tensor():
    x = gaussian()
    lo, hi = choose_range(observed(torch.cat([x, torch.tensor([400.0])])), "kl")
    assert -5 < lo < -2.5 and 2.5 < hi < 60
    flat = torch.linspace(0, 1, 50_000)
    assert choose_range(observed(flat), "kl") == (0.0, 1.0)
