"""The algebra against numerical integration, closed forms and brute force."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxcompress import gaussian as g

aten = torch.ops.aten
INF = math.inf


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def gaussian(mean, std, sigmas=6.0, lo=-INF, hi=INF):
    mean = vector(*mean)
    return g.normal(mean, vector(*std), torch.full_like(mean, lo), torch.full_like(mean, hi), sigmas)


def integrated(mean, std, f):
    """Mean and variance of f(X) by a fine Riemann sum over +-10 sigma."""
    z = torch.linspace(-10, 10, 400_001, dtype=torch.float64)
    density = torch.softmax(-0.5 * z**2, 0)
    y = f(mean + std * z)
    first = (y * density).sum()
    return float(first), float(((y - first) ** 2 * density).sum())


@pytest.mark.parametrize(
    "beta, gamma, expected",
    [(0, 1, 0.39894228), (1, 1, 1.08331547), (-1, 2, 0.39559311), (0.3, 1.2, 0.64361364)],
)
def test_mean_of_relu_of_a_gaussian(beta, gamma, expected):
    mean, _ = g.clipped_normal(vector(beta), vector(gamma), 0.0, INF)
    assert abs(float(mean) - expected) < 1e-8


@given(
    st.floats(-5, 5), st.floats(0.01, 4), st.floats(-6, 6) | st.just(-INF), st.floats(0.01, 8) | st.just(INF)
)  # fmt: skip
def test_clipped_moments_equal_the_integral(mean, std, lo, width):
    hi = 1.5 if lo == -INF and width < INF else lo + width
    if lo == -INF and width == INF:
        hi = INF
    got = g.clipped_normal(vector(mean), vector(std), lo, hi)
    want = integrated(mean, std, lambda x: x.clamp(lo, hi))
    assert float(got[0]) == pytest.approx(want[0], abs=1e-6 * std)
    assert float(got[1]) == pytest.approx(want[1], abs=1e-6 * std**2)


def test_clipping_a_constant_is_exact():
    mean, var = g.clipped_normal(vector(-2, 0.5, 9), vector(0, 0, 0), 0.0, 6.0)
    assert mean.tolist() == [0, 0.5, 6] and var.tolist() == [0, 0, 0]


def test_clipping_far_outside_leaves_the_bound():
    mean, var = g.clipped_normal(vector(-1e6, 1e6), vector(1e-3, 1e-3), 0.0, 6.0)
    assert mean.tolist() == [0, 6] and var.tolist() == [0, 0]


def test_the_range_behind_a_clamp_is_the_image_of_the_range_before_it():
    m = g.clamp(gaussian([1.0, -9.0], [0.5, 1.0]), 0.0, INF)
    assert m.hi[g.RANGE].tolist() == [4.0, 0.0]  # max(0, beta + 6 gamma), not a multiple of the clipped deviation
    assert m.lo[g.SUPPORT].tolist() == [0, 0] and m.hi[g.SUPPORT].tolist() == [INF, INF]


def test_lognormal_moments():
    m = g.function(gaussian([0.3], [0.5]), torch.exp)
    mean = math.exp(0.3 + 0.125)
    assert float(m.mean) == pytest.approx(mean, rel=1e-10)
    assert float(m.var) == pytest.approx((math.exp(0.25) - 1) * mean**2, rel=1e-10)


def test_moments_across_a_kink():
    m = g.function(gaussian([0.2], [1.0]), lambda x: aten.leaky_relu.default(x, 0.1))
    want = integrated(0.2, 1.0, lambda x: torch.where(x > 0, x, 0.1 * x))
    assert float(m.mean) == pytest.approx(want[0], abs=1e-4)  # h^2/8 * slope jump * density, h = 1/64
    assert float(m.var) == pytest.approx(want[1], abs=1e-4)


@pytest.mark.parametrize("std", [0.5, 3.0, 200.0])
def test_the_minimum_of_silu_and_gelu_is_found_at_any_scale(std):
    silu = g.function(gaussian([0.0], [std]), aten.silu.default)
    gelu = g.function(gaussian([0.0], [std]), aten.gelu.default)
    assert silu.lo.flatten().tolist() == pytest.approx([-0.27846, -0.27846], abs=1e-3)
    assert gelu.lo.flatten().tolist() == pytest.approx([-0.16997, -0.16997], abs=1e-3)


def test_sigmoid_has_a_hard_support():
    m = g.function(gaussian([0.0], [5.0]), torch.sigmoid)
    assert m.lo[g.SUPPORT] >= 0 and m.hi[g.SUPPORT] <= 1
    assert float(m.mean) == pytest.approx(0.5, abs=1e-12)


def test_a_function_of_a_bounded_tensor_uses_its_whole_support():
    wide = g.interval(vector(0.0), vector(0.1), vector(-50.0), vector(70.0))
    m = g.function(wide, torch.tanh)
    assert m.hi.flatten().tolist() == pytest.approx([1, 1]) and m.lo.flatten().tolist() == pytest.approx([-1, -1])


def test_a_pole_inside_the_range_is_not_finite():
    assert not g.function(gaussian([0.0], [1.0]), torch.log).is_finite
    assert g.function(gaussian([20.0], [1.0]), torch.log).is_finite


def test_adding_gaussians():
    m = g.add(gaussian([1.0], [3.0]), gaussian([2.0], [4.0]))
    assert (float(m.mean), float(m.var)) == (3.0, 25.0)
    assert (float(m.lo[g.RANGE]), float(m.hi[g.RANGE])) == (3.0 - 30, 3.0 + 30)


def test_subtracting_mirrors_the_second_operand():
    relu = g.clamp(gaussian([0.0], [1.0]), 0.0, INF)
    m = g.add(g.interval(vector(1.0), vector(0), vector(1.0), vector(1.0)), relu, -1.0)
    assert m.lo.flatten().tolist() == pytest.approx([-INF, -5.0])
    assert m.hi.flatten().tolist() == pytest.approx([1.0, 1.0])


def test_adding_a_constant_shifts_the_range_without_recentring_it():
    relu = g.clamp(gaussian([0.0], [1.0]), 0.0, INF)
    m = g.add(relu, g.constant_moments(torch.tensor(2.0)))
    assert (float(m.lo[g.RANGE]), float(m.hi[g.RANGE])) == pytest.approx((2.0, 8.0))


def test_a_scalar_operand_meets_every_channel():
    two = gaussian([0.0, 1.0], [1.0, 2.0])  # two channels: the rows of lo and hi must not be taken for them
    shift = g.constant_moments(torch.tensor(10.0))
    for m in (g.add(two, shift), g.add(shift, two)):
        assert m.mean.tolist() == [10, 11] and m.hi[g.RANGE].tolist() == [16, 23]
    assert g.mul(two, shift).hi[g.RANGE].tolist() == [60, 130]


def test_product_moments_by_enumeration():
    a, b = vector(-1, 0, 4), vector(2, 5)  # independent, uniform on these values
    every = torch.outer(a, b).flatten()
    m = g.mul(*(g.constant_moments(t) for t in (a, b)))
    assert float(m.mean) == pytest.approx(float(every.mean()))
    assert float(m.var) == pytest.approx(float(every.var(correction=0)))
    assert (float(m.lo[0]), float(m.hi[0])) == (float(every.min()), float(every.max()))


def test_pooled_is_the_mixture():
    samples = [vector(1, 3, 5), vector(-4, 0, 10)]
    channels = g.constant_moments(torch.stack(samples), (0,))
    whole = g.constant_moments(torch.cat(samples))
    m = g.pooled(channels)
    for got, want in zip((m.mean, m.var, m.lo, m.hi), (whole.mean, whole.var, whole.lo, whole.hi)):
        torch.testing.assert_close(got, want)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9))
def test_weighted_sum_equals_the_loops(groups, outputs, inputs, taps, seed):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, outputs, inputs, taps, generator=random, dtype=torch.float64)
    weight[0, 0, 0] = 0  # the infinite support of this input must not reach output 0
    mean, std = torch.randn(2, groups * inputs, generator=random, dtype=torch.float64)
    lo, hi = mean - 1, mean + 1
    lo[0], hi[0] = -INF, INF
    m = g.weighted_sum(g.normal(mean, std.abs(), lo, hi, 2.0), weight, torch.zeros(()).double())
    for group in range(groups):
        for o in range(outputs):
            terms = [(float(weight[group, o, i, t]), group * inputs + i) for i in range(inputs) for t in range(taps)]
            at = group * outputs + o
            assert float(m.mean[at]) == pytest.approx(sum(w * float(mean[i]) for w, i in terms))
            assert float(m.var[at]) == pytest.approx(sum(w * w * float(std[i]) ** 2 for w, i in terms))
            top = sum(max(w * float(lo[i]), w * float(hi[i])) for w, i in terms if w)
            assert float(m.hi[g.SUPPORT, at]) == pytest.approx(top)


def test_weighted_sum_in_blocks_is_the_same(monkeypatch):
    weight = torch.randn(2, 7, 3, 2)
    m = gaussian(range(6), [1.0] * 6)
    whole = g.weighted_sum(m, weight, torch.ones(14))
    monkeypatch.setattr(g, "_BLOCK", 13)
    parts = g.weighted_sum(m, weight, torch.ones(14))
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.hi, whole.hi)


def test_consistent_moves_moments_into_the_support():
    m = g.consistent(g.interval(vector(2.0, 0.5), vector(9.0, 9.0), vector(0.0, 0.0), vector(1.0, 1.0)))
    assert m.mean.tolist() == [1.0, 0.5] and m.var.tolist() == [0.0, 0.25]  # Bhatia-Davis: var <= (hi - m)(m - lo)
