"""Every operator of the integer dialect against loops of Python integers, and against float64 torch where it has one."""

import doctest
import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxcompress import integer_ops, numerics, reference_kernels
from fxcompress import reference_normalization as normalization
from fxcompress.bilinear import WINOGRAD
from fxcompress.float_ops import MASKED_SOFTMAX
from fxcompress.integer_ops import INTEGER_OPS
from fxcompress.reference_bilinear import weight_sums
from tests.support.integer_graphs import codes, int32, ops, weights

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def positions(sizes):
    return itertools.product(*map(range, sizes))


def inside(position, sizes) -> bool:
    return all(0 <= p < n for p, n in zip(position, sizes, strict=True))


def ints(tensor):
    """A dict from index to Python integer: what the loops below read."""
    return {i: int(tensor[i]) for i in positions(tensor.shape)}


def filled(shape, function):
    """int64 tensor of function(index)."""
    return torch.tensor([function(i) for i in positions(shape)], dtype=torch.int64).reshape(shape)


# ------------------------------------------------------------------------------------------------ convolutions


@st.composite
def geometry(draw):
    """kernel, stride, (before, after) padding, dilation per dimension, groups, channels per group in and out."""
    nd = draw(st.integers(1, 3))

    def each(lo, hi):
        return draw(st.lists(st.integers(lo, hi), min_size=nd, max_size=nd))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 3 if nd < 3 else 2)
    padding = draw(st.lists(st.integers(0, 2), min_size=2 * nd, max_size=2 * nd))
    size = [d * (k - 1) + 1 + extra for d, k, extra in zip(dilation, kernel, each(0, 3), strict=True)]
    return (
        nd,
        kernel,
        stride,
        padding,
        dilation,
        size,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
    )


def convolve_in_loops(x, weight, bias, stride, padding, dilation, groups, pad_value, size):
    values, w = ints(x), ints(weight)
    per_group, outputs = weight.shape[1], weight.shape[0] // groups
    pad_value = pad_value.expand(x.shape[1]).tolist()

    def element(index):
        n, o, *at = index
        total = int(bias[o])
        for c, *tap in positions(weight.shape[1:]):
            channel = o // outputs * per_group + c
            where = tuple(
                a * s + t * d - p for a, s, t, d, p in zip(at, stride, tap, dilation, padding[::2], strict=True)
            )
            code = values[(n, channel, *where)] if inside(where, x.shape[2:]) else pad_value[channel]
            total += w[(o, c, *tap)] * code
        return total

    return filled((x.shape[0], weight.shape[0], *size), element)


@given(geometry(), st.booleans(), st.booleans())
def test_conv_is_the_sum_over_taps(g, per_channel_padding, strided):
    nd, kernel, stride, padding, dilation, size, groups, inputs, outputs = g
    x, weight = codes(2, groups * inputs, *size), weights(groups * outputs, inputs, *kernel)
    if strided:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    bias = codes(groups * outputs, lo=-9999, hi=9999, dtype=torch.int32)
    pad_value = codes(groups * inputs, dtype=torch.int32) if per_channel_padding else int32(77)
    y = ops.conv(x, weight, bias, stride, padding, dilation, groups, pad_value)
    expected = convolve_in_loops(x, weight, bias, stride, padding, dilation, groups, pad_value, y.shape[2:])
    assert y.dtype == torch.int32 and torch.equal(y.long(), expected)
    if not per_channel_padding and padding[::2] == padding[1::2]:
        centered = CONV[nd](x.double() - 77, weight.double(), None, stride, padding[::2], dilation, groups)
        zero_point_fold = 77 * weight.double().flatten(1).sum(1) + bias
        assert torch.equal(y.double(), centered + zero_point_fold.reshape(-1, *[1] * nd))


@given(geometry(), st.integers(0, 255), st.booleans(), st.data())
def test_conv_transpose_is_the_gradient_of_convolution(g, zero_point, with_bias, data):
    nd, kernel, stride, _, dilation, size, groups, inputs, outputs = g
    extents = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = [data.draw(st.integers(0, min(2, e))) for e in extents]
    extra = [data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    x, weight = codes(2, groups * inputs, *size), weights(groups * inputs, outputs, *kernel)
    bias = codes(groups * outputs, lo=-9999, hi=9999, dtype=torch.int32) if with_bias else None
    both = [p for p in padding for _ in range(2)]
    y = ops.conv_transpose(x, int32(zero_point), weight, bias, stride, both, extra, dilation, groups)
    float_bias = bias.double() if with_bias else None
    expected = CONV_TRANSPOSE[nd](
        x.double() - zero_point, weight.double(), float_bias, stride, padding, extra, groups, dilation
    )
    assert y.dtype == torch.int32 and torch.equal(y.double(), expected)


def test_conv_transpose_scatters_by_hand_with_a_zero_point_per_channel():
    """One row 0 1 2 over two channels: y[i * 2 + k - 1] += w[c, k] * (q[c, i] - z[c]), one element cropped in front."""
    x, zero = torch.tensor([[[5, 6, 7], [1, 1, 2]]], dtype=torch.uint8), int32(5, 1).reshape(2, 1)
    weight = torch.tensor([[[1, 2, 3]], [[10, 20, 30]]], dtype=torch.int8)
    y = ops.conv_transpose(x, zero, weight, int32(100).reshape(1), [2], [1, 0], [0], [1], 1)
    full = [0] * 7
    for c, i, k in positions((2, 3, 3)):
        full[2 * i + k] += int(weight[c, 0, k]) * (int(x[0, c, i]) - int(zero[c, 0]))
    assert y.flatten().tolist() == [v + 100 for v in full[1:]]


# --------------------------------------------------------------------------------------------- linear and products


def test_linear_and_the_zero_point_fold_vector():
    q_x, q_w = torch.tensor([3, 200, 0], dtype=torch.uint8), torch.tensor([[5, -7, 3]], dtype=torch.int8)
    assert ops.linear(q_x, q_w, None).tolist() == [-1385]
    assert ops.linear(q_x, q_w, int32(-37).reshape(1)).tolist() == [-1422]  # z_x = 37, bias = -z_x * sum(q_w)


@given(st.lists(st.integers(1, 3), min_size=0, max_size=2), st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_linear_is_the_sum_over_inputs(batch, inputs, outputs, with_bias):
    x, weight = codes(*batch, inputs), weights(outputs, inputs)
    bias = codes(outputs, lo=-999, hi=999, dtype=torch.int32) if with_bias else None
    expected = filled(
        (*batch, outputs),
        lambda i: (
            sum(int(weight[i[-1], k]) * int(x[(*i[:-1], k)]) for k in range(inputs))
            + (int(bias[i[-1]]) if with_bias else 0)
        ),
    )
    y = ops.linear(x, weight, bias)
    assert y.dtype == torch.int32 and torch.equal(y.long(), expected)


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 255), st.integers(0, 255)
)
def test_matmul_and_mul_subtract_zero_points_first(heads, m, k, n, za, zb):
    a, b = codes(2, heads, m, k), codes(heads, k, n)
    expected = filled(
        (2, heads, m, n),
        lambda i: sum((int(a[i[0], i[1], i[2], j]) - za) * (int(b[i[1], j, i[3]]) - zb) for j in range(k)),
    )
    assert torch.equal(ops.matmul(a, int32(za), b, int32(zb)).long(), expected)
    c = codes(heads, 1, k)
    expected = filled((2, heads, m, k), lambda i: (int(a[i]) - za) * (int(c[i[1], 0, i[3]]) - zb))
    product = ops.mul(a, int32(za), c, int32(zb))
    assert product.dtype == torch.int32 and torch.equal(product.long(), expected)
    assert torch.equal(ops.widen(a, int32(za)).long(), a.long() - za)


# -------------------------------------------------------------------------------------------------------- pooling


@st.composite
def pooling(draw):
    nd = draw(st.integers(1, 3))

    def each(lo, hi):
        return draw(st.lists(st.integers(lo, hi), min_size=nd, max_size=nd))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    padding = [draw(st.integers(0, k // 2)) for k in kernel for _ in range(2)]
    size = [d * (k - 1) + 1 + extra for d, k, extra in zip(dilation, kernel, each(0, 3), strict=True)]
    return nd, kernel, stride, padding, dilation, size


def windows_of(x, kernel, stride, padding, dilation, at):
    """Values of the codes in one window, those in the padding left out."""
    n, c, *at = at
    for tap in positions(kernel):
        where = tuple(a * s + t * d - p for a, s, t, d, p in zip(at, stride, tap, dilation, padding[::2], strict=True))
        if inside(where, x.shape[2:]):
            yield int(x[(n, c, *where)])


@given(pooling(), st.integers(0, 255))
def test_sum_pool_adds_what_is_inside(g, zero_point):
    nd, kernel, stride, padding, _, size = g
    x, ones = codes(2, 2, *size), [1] * nd
    y = ops.sum_pool(x, int32(zero_point), kernel, stride, padding)
    expected = filled(y.shape, lambda i: sum(v - zero_point for v in windows_of(x, kernel, stride, padding, ones, i)))
    assert y.dtype == torch.int32 and torch.equal(y.long(), expected)
    if padding[::2] == padding[1::2]:
        average = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[nd]
        means = average(x.double() - zero_point, kernel, stride, padding[::2])
        assert torch.allclose(y.double(), means * math.prod(kernel), rtol=0, atol=1e-9)


@given(pooling(), st.sampled_from([torch.uint8, torch.int8, torch.int32]))
def test_max_pool_takes_the_largest_code(g, dtype):
    nd, kernel, stride, padding, dilation, size = g
    x = codes(2, 2, *size, lo=0 if dtype == torch.uint8 else -128, hi=127, dtype=dtype)
    y = ops.max_pool(x, kernel, stride, padding, dilation)
    expected = filled(y.shape, lambda i: max(windows_of(x, kernel, stride, padding, dilation, i)))
    assert y.dtype == dtype and torch.equal(y.long(), expected)
    if padding[::2] == padding[1::2]:
        pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[nd]
        assert torch.equal(y.double(), pool(x.double(), kernel, stride, padding[::2], dilation))


def test_ceil_mode_is_padding_behind():
    x = codes(1, 2, 6, 6)
    y = ops.max_pool(x, [3, 3], [2, 2], [1, 2, 1, 2], [1, 1])
    assert torch.equal(y.double(), F.max_pool2d(x.double(), 3, 2, 1, ceil_mode=True))
    x = codes(1, 2, 7, 7)
    y = ops.sum_pool(x, int32(9), [2, 2], [2, 2], [0, 1, 0, 1])
    mean = F.avg_pool2d(x.double() - 9, 2, 2, ceil_mode=True, divisor_override=1)
    assert torch.equal(y.double(), mean)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=3), st.integers(0, 255))
def test_adaptive_pools_use_the_windows_of_torch(dims, zero_point):
    sizes, outputs = zip(*dims, strict=True)
    x = codes(2, 2, *sizes)
    # adaptive_max_pool of torch has the same windows as its average pool, and its maximum is exact in float64
    pool = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[len(dims)]
    assert torch.equal(ops.adaptive_max_pool(x, outputs).double(), pool(x.double(), outputs))
    average = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(dims)]
    counts = ops.adaptive_sum_pool(torch.ones_like(x), int32(0), outputs).double()
    sums = ops.adaptive_sum_pool(x, int32(zero_point), outputs)
    assert sums.dtype == torch.int32
    assert torch.allclose(sums.double() / counts, average(x.double() - zero_point, outputs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dims, keepdim", [([2, 3], False), ([2, 3], True), ([-1], False), ([1], True)])
def test_sum_over_dimensions(dims, keepdim):
    x = codes(2, 3, 4, 5)
    y = ops.sum(x, int32(7), dims, keepdim)
    assert y.dtype == torch.int32 and torch.equal(y.long(), (x.long() - 7).sum(dims, keepdim=keepdim))


# --------------------------------------------------------------------------------------------- movement and resizing


@given(
    st.lists(st.integers(-1, 3), min_size=2, max_size=6).filter(lambda p: len(p) % 2 == 0), st.booleans(), st.booleans()
)
def test_pad_surrounds_and_crops(sides, per_channel, as_float):
    nd = len(sides) // 2
    x = codes(2, 3, *[4, 3, 5][:nd])
    x = x.float() / 8 if as_float else x
    value = torch.tensor([11, 0, 200], dtype=torch.int32) if per_channel else int32(40)
    y = ops.pad(x, sides, value)
    reversed_sides = [s for d in reversed(range(nd)) for s in sides[2 * d : 2 * d + 2]]
    expected = [F.pad(x[:, c : c + 1].double(), reversed_sides, value=int(v)) for c, v in enumerate(value.expand(3))]
    assert y.dtype == x.dtype and torch.equal(y.double(), torch.cat(expected, 1))


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9), st.booleans()), min_size=1, max_size=2),
    st.integers(0, 255),
)
def test_resize_interpolates_in_loops(dims, zero_point):
    f = 5
    tables = [reference_kernels.linear_resize_tables(n, out, align, None, f) for n, out, align in dims]
    x = codes(2, 2, *(n for n, _, _ in dims))
    y = ops.resize(x, int32(zero_point), *(list(column) for column in zip(*tables, strict=True)), f)

    def element(index):
        n, c, *at = index
        total = 0
        for corner in positions([2] * len(at)):
            gain, where = 1, []
            for (first, second, weight), i, upper in zip(tables, at, corner, strict=True):
                gain *= int(weight[i]) if upper else (1 << f) - int(weight[i])
                where.append(int((second if upper else first)[i]))
            total += gain * (int(x[(n, c, *where)]) - zero_point)
        return total

    assert y.dtype == torch.int32 and torch.equal(y.long(), filled(y.shape, element))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size, out, factor", [((7, 5), (14, 10), 2.0), ((7, 5), (3, 9), None), ((4, 4), (9, 9), 2.3)])
def test_resize_matches_upsample_bilinear2d(align_corners, size, out, factor):
    """Each weight is off by at most 2^-(f+1): the result by at most the range of x times one rounding per dimension."""
    f = 10
    tables = [
        reference_kernels.linear_resize_tables(n, o, align_corners, factor, f) for n, o in zip(size, out, strict=True)
    ]
    x = codes(1, 2, *size)
    y = ops.resize(x, int32(3), *(list(column) for column in zip(*tables, strict=True)), f)
    expected = torch.ops.aten.upsample_bilinear2d.vec(
        x.double() - 3, None if factor else list(out), align_corners, [factor, factor] if factor else None
    )
    assert y.shape == expected.shape
    assert (y.double() / 2 ** (2 * f) - expected).abs().max() <= 255 * 2 * 2.0 ** -(f + 1)


# ----------------------------------------------------------------------------------------- elementwise and rounding


def test_table_reads_one_row_or_one_per_channel():
    x = codes(2, 3, 4)
    lut = codes(256)
    assert torch.equal(ops.table(x, lut), filled(x.shape, lambda i: int(lut[int(x[i])])).to(torch.uint8))
    wide = codes(3, 256, lo=-(1 << 30), hi=1 << 30, dtype=torch.int32)
    y = ops.table(x, wide)
    assert y.dtype == torch.int32 and torch.equal(y.long(), filled(x.shape, lambda i: int(wide[i[1], int(x[i])])))
    assert torch.equal(ops.table(x.transpose(1, 2), wide, -1), y.transpose(1, 2))


def test_clamp_per_channel():
    acc, lo, hi = (
        codes(2, 3, 4, lo=-999, hi=999, dtype=torch.int32),
        int32(-5, 0, 7)[:, None],
        int32(5, 100, 7)[:, None],
    )
    expected = filled(acc.shape, lambda i: min(max(int(acc[i]), int(lo[i[1], 0])), int(hi[i[1], 0])))
    assert torch.equal(ops.clamp(acc, lo, hi).long(), expected)


def test_requantize_and_rescale_are_the_functions_of_numerics():
    a, b = (codes(2, 3, 4, lo=-90000, hi=90000, dtype=torch.int32) for _ in range(2))
    reals = [torch.tensor(v, dtype=torch.float64).reshape(3, 1) for v in ([0.001, 0.002, 0.0005], [0.7, -0.3, 1e-5])]
    forms = [numerics.dyadic(r, 5) for r in reals]
    got = ops.requantize([a, b], [d.multiplier for d in forms], [d.right_shift for d in forms],
                         [d.left_shift for d in forms], int32(20), 5, int32(20), int32(250))  # fmt: skip
    assert torch.equal(
        got, numerics.requantize(list(zip((a, b), forms, strict=True)), int32(20), 5, int32(20), int32(250))
    )
    wide = [numerics.dyadic31(r) for r in reals]
    got = ops.rescale([a, b], [m for m, _ in wide], [c for _, c in wide])
    exact = a.double() * reals[0] + b.double() * reals[1]
    assert got.dtype == torch.int32 and (got.double() - exact).abs().max() <= 1  # half a step per branch


def test_the_boundary_operators_are_those_of_numerics():
    scale, zero, x = torch.tensor(0.05, dtype=torch.float64), int32(100), torch.randn(2, 3)
    q = ops.quantize(x, scale, zero, 0, 255)
    assert torch.equal(q, numerics.quantize(x, scale, zero, 0, 255))
    assert torch.equal(ops.dequantize(q, scale, zero), numerics.dequantize(q, scale, zero))
    assert (ops.dequantize(q, scale, zero) - x).abs().max() <= 0.025 * (1 + 1e-6)


# ------------------------------------------------------------------------------------------------ the table as a whole

_LUT = codes(3, 256)
_TABLES = [list(t) for t in zip(*[reference_kernels.linear_resize_tables(5, 8, False, None, 6)] * 2, strict=True)]


def _FLOAT64(v):
    return torch.tensor(v, dtype=torch.float64)


#: Arguments behind the activation (N, 3, 5, 5) that each operator is called with below.
_ROWS = codes(256, 2)
_PROGRAMS = [program.tensor for program in WINOGRAD.schedules]
_BLOCKS = (WINOGRAD.size, WINOGRAD.products)
_SUMS = weight_sums(weights(3, 5), WINOGRAD.schedules[0], WINOGRAD.size).to(torch.int16)
CALLS = {
    "quantize": (_FLOAT64([0.5, 1, 2]).reshape(3, 1, 1), int32(7), 0, 255),
    "dequantize": (_FLOAT64([0.5, 1, 2]).reshape(3, 1, 1), int32(7)),
    "conv": (weights(4, 3, 3, 3), int32(1, 2, 3, 4), [2, 1], [1, 2, 0, 1], [1, 2], 1, int32(7)),
    "conv_transpose": (int32(7), weights(3, 4, 3, 3), None, [2, 1], [1, 1, 0, 1], [1, 0], [1, 2], 1),
    "linear": (weights(4, 5), int32(1, 2, 3, 4)),
    "matmul": (int32(7), codes(3, 5, 2), int32(9)),
    "bilinear_linear": (int32(7), _SUMS, int32(1, 2, 3), *_PROGRAMS[1:], WINOGRAD.size, 3),
    "bilinear_matmul": (int32(7), codes(3, 5, 2), int32(9), *_PROGRAMS, *_BLOCKS),
    "mul": (int32(7), codes(3, 1, 1), int32(9)),
    "widen": (int32(7),),
    "sum_pool": (int32(7), [3, 2], [2, 1], [1, 1, 0, 1]),
    "adaptive_sum_pool": (int32(7), [3, 2]),
    "sum": (int32(7), [2, 3], False),
    "max_pool": ([3, 2], [2, 1], [1, 1, 0, 1], [2, 1]),
    "adaptive_max_pool": ([3, 2],),
    "pad": ([1, 2, -1, 3], int32(1, 2, 3)),
    "resize": (int32(7), *_TABLES, 6),
    "requantize": ([int32(20000).expand(3, 1, 1)], [int32(4)], [1], int32(7), 6, int32(0), int32(255)),
    "rescale": ([torch.tensor(1 << 30)], [torch.tensor(30)]),
    "clamp": (int32(-5), int32(100).expand(3, 1, 1)),
    "table": (_LUT,),
    "softmax": (normalization.exp_table(torch.tensor(0.1), 22), 22),
    "layer_norm": (None, 3, 16),
    "embedding": (),
}


def activation(name: str, batch: int):
    if name == "quantize":
        return torch.randn(batch, 3, 5, 5)
    wide = name in ("requantize", "rescale", "clamp")
    return codes(batch, 3, 5, 5, lo=-999 if wide else 0, hi=255, dtype=torch.int32 if wide else torch.uint8)


def call(name: str, x):
    return INTEGER_OPS[name].overload(*arguments(name, x))


def arguments(name: str, x) -> tuple:
    """All arguments of a call; what varies with the batch of an embedding is its index."""
    if name == "embedding":
        return (_ROWS, x.to(torch.int64))
    return ([x] if name in ("requantize", "rescale") else x, *CALLS[name])


def test_every_operator_of_the_table_is_called_here():
    assert CALLS.keys() == INTEGER_OPS.keys()


@pytest.mark.parametrize("name", INTEGER_OPS)
def test_fake_kernel_agrees_and_the_batch_stays_symbolic(name):
    x = activation(name, 3)
    real = call(name, x)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    dynamic = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * 3
    with mode:
        fake = call(name, mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic)))
    assert isinstance(fake.shape[0], torch.SymInt)
    assert tuple(fake.shape[1:]) == tuple(real.shape[1:]) and fake.dtype == real.dtype
    assert not mode.shape_env.guards


@pytest.mark.parametrize("name", INTEGER_OPS)
def test_batches_are_independent_and_may_be_empty_or_strided(name):
    x = activation(name, 3)
    whole = call(name, x)
    assert call(name, x[:0]).shape == (0, *whole.shape[1:])
    assert torch.equal(call(name, x[1:2]), whole[1:2])
    assert torch.equal(call(name, x.to(memory_format=torch.channels_last)), whole)


@pytest.mark.parametrize("name", INTEGER_OPS)
def test_no_operator_returns_its_input(name):
    x = activation(name, 2)
    y = call(name, x)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "y",
    [
        lambda x: ops.pad(x, [0, 0], int32(1)),
        lambda x: ops.widen(x, int32(0)),
        lambda x: ops.max_pool(x, [1], [1], [0, 0], [1]),
        lambda x: ops.clamp(x, int32(-9999), int32(9999)),
        lambda x: ops.sum_pool(x, int32(0), [1], [1], [0, 0]),
    ],
)
def test_an_operator_that_changes_nothing_still_copies(y):
    x = codes(2, 3, 4, dtype=torch.int32)
    assert torch.equal(y(x), x) and y(x).data_ptr() != x.data_ptr()


def test_rows_of_the_table_are_consistent():
    for name, row in INTEGER_OPS.items():
        arguments = [a.name for a in row.overload._schema.arguments]
        assert row.name == name and row.meaning
        assert list(inspect.signature(row.reference).parameters) == arguments
        assert integer_ops.integer_op(row.overload) is row
    assert integer_ops.integer_op(torch.ops.aten.add.Tensor) is None
    assert integer_ops.integer_op(len) is None


def test_levels_nest_as_documented():
    assert integer_ops.BOUNDARY == {ops.quantize.default, ops.dequantize.default} == integer_ops.QDQ_LEVEL
    assert {ops.pad.default, MASKED_SOFTMAX} == integer_ops.FLOAT_LEVEL
    assert {row.overload for row in INTEGER_OPS.values()} < integer_ops.INTEGER_LEVEL
    assert torch.ops.aten.cat.default in integer_ops.INTEGER_LEVEL
    assert torch.ops.aten.add.Tensor not in integer_ops.INTEGER_LEVEL


def test_the_docstring_examples_hold():
    assert doctest.testmod(reference_kernels).failed == 0
