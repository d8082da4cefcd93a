"""Softmax and normalized rows: bit for bit the formulas of the docstring in Python integers, and close to the real functions."""

import doctest
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxcompress import reference_normalization as normalization
from fxcompress.errors import AccumulatorError, VerificationError
from fxcompress.reference_normalization import exp_table, exp_table_bits, fraction_bits, layer_norm_bound
from fxcompress.verify import verify
from tests.support.integer_graphs import codes, int32, integer_graph, ops

LENGTHS = [1, 2, 3, 7, 64, 197, 300]


# ------------------------------------------------------------------------------------------------------------ softmax


def softmax_in_integers(q, table, table_bits, mask):
    """One row, Python integers."""
    seen = [code for code, kept in zip(q, mask, strict=True) if kept]
    if not seen:
        return [0] * len(q)
    e = [table[max(seen) - code] if kept else 0 for code, kept in zip(q, mask, strict=True)]
    bits = sum(e).bit_length()
    m = (1 << (bits + 14)) // sum(e)
    shift = bits + 5 - table_bits
    assert sum(e) < 1 << 31 and 1 << 14 <= m <= 1 << 15 and 6 <= shift <= 21
    coarse = table_bits - 15
    t = [(v + ((1 << coarse) >> 1)) >> coarse for v in e]
    assert max(t) * m <= 1 << 30
    return [(v * m + (1 << (shift - 1))) >> shift for v in t]


@given(st.sampled_from(LENGTHS), st.floats(1e-4, 4), st.integers(0, 2**20), st.booleans())
def test_softmax_is_the_formula_in_python_integers(n, scale, seed, masked):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 256, (5, n), generator=generator).to(torch.uint8)
    mask = torch.rand(5, n, generator=generator) < 0.6 if masked else torch.ones(5, n, dtype=torch.bool)
    bits = exp_table_bits(n)
    table = exp_table(torch.tensor(scale, dtype=torch.float64), bits)
    p = ops.softmax(q, table, bits, mask if masked else None)
    expected = [softmax_in_integers(a, table.tolist(), bits, b) for a, b in zip(q.tolist(), mask.tolist(), strict=True)]
    assert p.dtype == torch.int32 and p.tolist() == expected
    assert p.min() >= 0 and p.max() <= 1 << normalization.PROBABILITY_BITS


@pytest.mark.parametrize("n", [*LENGTHS, 1000, 4096])
def test_softmax_is_close_to_the_real_one(n):
    """The reciprocal is short by at most 2^-14, exponentials are rounded to 2^-16, in the sum to 2^-(B+1); 1 % for their products."""
    for scale in (0.003, 0.03, 0.3):
        q = codes(20, n)
        bits = exp_table_bits(n)
        p = ops.softmax(q, exp_table(torch.tensor(scale, dtype=torch.float64), bits), bits, None).double() * 2.0**-24
        exact = torch.softmax(q.double() * scale, -1)
        largest = exact.amax(-1, keepdim=True)
        relative = 2.0**-14 + n * 2.0 ** -(bits + 1) * largest
        bound = 1.01 * (relative * exact + (2.0**-16 + 2.0 ** -(bits + 1)) * largest) + 2.0**-25
        assert bool(((p - exact).abs() <= bound).all())


def test_excluded_elements_do_not_move_the_others():
    q = codes(4, 9)
    mask = torch.tensor([True] * 5 + [False] * 4)
    bits = exp_table_bits(9)
    table = exp_table(torch.tensor(0.05), bits)
    p = ops.softmax(q, table, bits, mask)
    assert torch.equal(p[:, :5], ops.softmax(q[:, :5].contiguous(), table, bits, None))
    assert not p[:, 5:].any()
    assert torch.equal(p, ops.softmax(q, table, bits, mask.to(torch.uint8)))


def test_a_row_without_any_element_is_zero():
    mask = torch.tensor([[True] * 4, [False] * 4])
    p = ops.softmax(codes(2, 4), exp_table(torch.tensor(0.1), 22), 22, mask)
    assert p[0].any() and not p[1].any()


def test_softmax_does_not_see_a_shift_and_keeps_the_order():
    q = codes(8, 30, lo=20, hi=200)
    table = exp_table(torch.tensor(0.04), 22)
    p = ops.softmax(q, table, 22, None)
    assert torch.equal(p, ops.softmax(q + 37, table, 22, None))
    order = q.long().argsort(-1)
    assert (p.gather(1, order).diff(dim=-1) >= 0).all()


def test_the_table_is_closer_than_the_polynomial_of_i_bert():
    """i-exp: 0.3585 (p + 1.353)^2 + 0.344 on (-ln 2, 0], halved z times; here with exact arithmetic, at its best."""
    x = torch.arange(0, 256, dtype=torch.float64) * -0.05
    z = torch.floor(-x / math.log(2))
    polynomial = (0.3585 * (x + z * math.log(2) + 1.353) ** 2 + 0.344) * 0.5**z
    table = exp_table(torch.tensor(0.05, dtype=torch.float64), 22).double() * 2.0**-22
    assert float((table - x.exp()).abs().max()) <= 2.0**-23
    assert float((polynomial - x.exp()).abs().max()) > 1e-3


# ---------------------------------------------------------------------------------------------------------- layer norm


def layer_norm_in_integers(q, zero_point, epsilon, f):
    """One row, Python integers: returns (values, largest product)."""
    n = len(q)
    if zero_point is None:
        mean = (128 * sum(q) + n // 2) // n
        d, v = [128 * code - mean for code in q], n * sum(c * c for c in q) - sum(q) ** 2
    else:
        d = [128 * (code - zero_point) for code in q]
        v = n * sum((code - zero_point) ** 2 for code in q)
    v += epsilon
    if v == 0:
        return [0] * n
    half = (62 - v.bit_length()) // 2
    root = math.isqrt(v << (2 * half))
    c = 62 - n.bit_length()
    g = (n << c) // root
    assert 1 << 30 <= root < 1 << 31 and 1 << 30 <= g < 1 << 32
    excess = g.bit_length() - 15
    m, s = (g + (1 << (excess - 1))) >> excess, c - half - (f - 7) - excess
    m, s = (m >> 1, s - 1) if m == 1 << 15 else (m, s)
    if not 1 <= s <= 31:
        m, s = 0, 1
    assert max(map(abs, d)) <= 32640
    return [(value * m + (1 << (s - 1))) >> s for value in d]


@given(
    st.sampled_from(LENGTHS),
    st.integers(1, 256),
    st.sampled_from([0, 1, 1000, 10**9, 2**59]),
    st.sampled_from([None, 0, 77, 255]),
    st.integers(0, 2**20),
)
def test_layer_norm_is_the_formula_in_python_integers(n, spread, epsilon, zero_point, seed):
    q = torch.randint(0, spread, (6, n), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    f = fraction_bits(n, epsilon)
    y = ops.layer_norm(q, None if zero_point is None else int32(zero_point), epsilon, f)
    assert y.dtype == torch.int32
    assert y.tolist() == [layer_norm_in_integers(row, zero_point, epsilon, f) for row in q.tolist()]
    assert int(y.abs().max()) <= layer_norm_bound(n, epsilon, f)


@pytest.mark.parametrize("n", [2, 3, 64, 197, 1000, 4096])
@pytest.mark.parametrize("zero_point", [None, 100])
def test_layer_norm_is_close_to_the_real_one(n, zero_point):
    """The mean is rounded to 1/128 code, half of it is 2^-8 / deviation; the multiplier to 2^-15; the result to 2^-F."""
    q = codes(20, n)
    f = fraction_bits(n, 0)
    y = ops.layer_norm(q, None if zero_point is None else int32(zero_point), 0, f).double() * 2.0**-f
    x = q.double() - (q.double().mean(-1, keepdim=True) if zero_point is None else zero_point)
    deviation = x.square().mean(-1, keepdim=True).sqrt()
    exact = x / deviation
    bound = 2.0**-8 / deviation + exact.abs() * 2.0**-14 + 2.0**-f
    assert bool(((y - exact).abs() <= bound).all())


def test_eps_counts_in_units_of_the_code():
    """(x - mean) / sqrt(var + eps) of x = s q is the same with E = n^2 eps / s^2."""
    q, scale, eps, n = codes(10, 64, lo=100, hi=104), 0.003, 1e-5, 64
    epsilon = round(n**2 * eps / scale**2)
    f = fraction_bits(n, epsilon)
    y = ops.layer_norm(q, None, epsilon, f).double() * 2.0**-f
    exact = torch.nn.functional.layer_norm(q.double() * scale, [n], eps=eps)
    assert float((y - exact).abs().max()) <= 0.01


def test_rows_that_do_not_vary_are_zero():
    for epsilon in (0, 1, 2**59):
        f = fraction_bits(9, epsilon)
        assert not ops.layer_norm(torch.full((3, 9), 200, dtype=torch.uint8), None, epsilon, f).any()
        assert not ops.layer_norm(torch.full((3, 9), 77, dtype=torch.uint8), int32(77), epsilon, f).any()


@given(st.integers(0, 2**62 - 1))
def test_square_root_and_bit_length_are_exact(v):
    assert int(normalization.isqrt(torch.tensor([v]))) == math.isqrt(v)
    assert int(normalization.bit_length(torch.tensor([v]))) == v.bit_length()


@pytest.mark.parametrize("n", [1, 2, 3, 96, 4097, 1 << 21])
@pytest.mark.parametrize("epsilon", [0, 5, 10**12, 2**60 - 1])
def test_the_shift_is_positive_for_the_flattest_row(n, epsilon):
    """One code apart from the others, the smallest spread there is."""
    f = fraction_bits(n, epsilon)
    assert normalization.MIN_FRACTION_BITS <= f <= normalization.MAX_FRACTION_BITS
    m, s = normalization.inverse_root(torch.tensor([max(n - 1, 1) + epsilon]), n, f)
    assert int(s) >= 1 and (int(m) >= 1 << 14 or int(s) == 1)


def test_the_docstring_examples_hold():
    assert doctest.testmod(normalization).failed == 0


# ------------------------------------------------------------------------------------------------------ the certificate


def softmax_graph(row=40, bits=22, table=None):
    constants = {"t": exp_table(torch.tensor(0.1), bits) if table is None else table}
    return integer_graph(lambda m, x: ops.softmax.default(x, m.t, bits), constants, codes(3, row))


def layer_norm_graph(epsilon=5, bits=16, zero_point=100):
    return integer_graph(
        lambda m, x: ops.layer_norm.default(x, m.z, epsilon, bits), {"z": int32(zero_point)}, codes(3, 64)
    )


def test_both_are_proven():
    assert list(verify(softmax_graph()).accumulators.values()) == [26]
    assert list(verify(layer_norm_graph()).accumulators.values()) == [21]


@pytest.mark.parametrize(
    "gm, message",
    [
        (lambda: softmax_graph(table=exp_table(torch.tensor(0.1), 20)), r"table\[0\] spans"),
        (lambda: softmax_graph(table=exp_table(torch.tensor(0.1), 22).flip(0).clone()), r"table\[0\] spans"),
        (lambda: softmax_graph(bits=14), "table_bits spans 14"),
        (lambda: layer_norm_graph(epsilon=-1), "epsilon spans"),
        (lambda: layer_norm_graph(bits=20), "20 fraction_bits for rows of 64"),
        (lambda: layer_norm_graph(zero_point=300), "zero_point spans 300"),
    ],
)
def test_parameters_outside_the_kernels_ranges_are_refused(gm, message):
    with pytest.raises(VerificationError, match=message):
        verify(gm())


def test_a_sum_of_exponentials_that_could_overflow_is_refused():
    with pytest.raises(AccumulatorError, match="as the sum of a row of exponentials reaches 4294967296"):
        verify(softmax_graph(row=1024))


def token_graph(function):
    return integer_graph(lambda m, x: function(x), {}, torch.ones(2, 4, dtype=torch.int64))


def test_arithmetic_on_token_ids_is_allowed_and_on_codes_is_not():
    aten = torch.ops.aten
    assert verify(token_graph(lambda x: aten.mul.Tensor(aten.cumsum.default(x, 1), x))).integer_only
    on_codes = integer_graph(lambda m, x: aten.mul.Tensor(ops.widen.default(x, m.z), 2), {"z": int32(1)}, codes(2, 4))
    with pytest.raises(VerificationError, match=r"mul\.Tensor is not an integer operator"):
        verify(on_codes)


def test_embeddings_take_rows_of_any_shape():
    table = codes(10, 3)
    index = torch.randint(0, 10, (2, 4, 5))
    assert torch.equal(ops.embedding(table, index), table[index])
