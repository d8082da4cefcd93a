"""Propagation through the graph: exact against brute force where independence holds, sound bounds everywhere."""

import math

import pytest
import torch
from hypothesis import given, settings

from fxcompress.capture import capture
from fxcompress.dialects import level_targets
from fxcompress.errors import InputError, OptionError
from fxcompress.graph import is_float, placeholders
from fxcompress.meta import Range, Statistics, along_axis, describe, tensor_meta
from fxcompress.moment_rules import RULES
from fxcompress.moments import gaussian_range, propagate
from fxcompress.options import CompileOptions, Context
from fxcompress.passes.harvest_statistics import HarvestStatistics
from fxcompress.passes.normalize import Normalize
from fxcompress.rewrite import Level
from fxcompress.shapes import propagate as propagate_shapes
from tests.support.float_graphs import FloatGraph, aten
from tests.support.strategies import networks

RANGE = (-1000.0, 1001.0)  # wide, so that the interval arithmetic of a small convolution does not cut its 6 sigma


def finish(g, *nodes, **options):
    """The graph with a declared input range, and its estimates in the order of ``nodes``."""
    gm, inputs = g.finish(*nodes)
    gm.meta["fxcompress"] = Context(CompileOptions(**{"input_range": RANGE, **options}), inputs)
    estimates = propagate(gm)
    return gm, [estimates.get(n) for n in nodes]


def known(node, mean, std, lo=-math.inf, hi=math.inf):
    mean, std = (torch.tensor(t, dtype=torch.float64) for t in (mean, std))
    describe(node, statistics=Statistics(mean, std, mean * 0 + lo, mean * 0 + hi, "batch_norm"))
    return node


def measured(g, channels=3, size=4):
    """A tensor with batch-norm statistics: channel c ~ N(c - 1, (1 + c)^2)."""
    x = g.conv(g.input(2, channels, size, size), channels)
    return known(x, [c - 1.0 for c in range(channels)], [1.0 + c for c in range(channels)])


def moments(estimate):
    return estimate.statistics.mean, estimate.statistics.std


def close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_every_operator_of_the_float_dialect_has_a_rule():
    assert level_targets(Level.FLOAT) <= RULES.keys()


# ------------------------------------------------------------------------------------------------ batch norm and clamp


def test_relu_behind_batch_norm_ends_at_beta_plus_six_gamma():
    g = FloatGraph()
    bn = measured(g)
    relu = g.relu(bn)
    _, (before, after) = finish(g, bn, relu)
    close(before.range.lo, [-1 - 6, 0 - 12, 1 - 18])
    close(after.range.hi, [-1 + 6, 0 + 12, 1 + 18])
    close(after.range.lo, [0, 0, 0])
    close(after.statistics.lo, [0, 0, 0])
    assert before.range.provenance == "batch_norm 6 sigma" and after.range.provenance == "propagated 6 sigma"
    assert before.statistics.provenance == "batch_norm" and after.statistics.provenance == "propagated"
    assert float(after.statistics.mean[1]) == pytest.approx(2 * 0.39894228)


def test_range_sigmas_scales_the_range():
    g = FloatGraph()
    bn = measured(g)
    _, (estimate,) = finish(g, bn, range_sigmas=2.0)
    close(estimate.range.hi, [1, 4, 7])
    assert estimate.range.provenance == "batch_norm 2 sigma"


def test_relu6_ends_at_six():
    g = FloatGraph()
    clamp = g.call(aten.clamp.default, measured(g), 0, 6)
    _, (estimate,) = finish(g, clamp)
    close(estimate.range.hi, [5, 6, 6])
    close(estimate.statistics.hi, [6, 6, 6])


def test_statistics_behind_a_relu_learn_its_support():
    """A batch norm that reads a ReLU knows mean and deviation, but not that nothing is negative."""
    g = FloatGraph()
    relu = known(g.relu(measured(g)), [0.1, 0.5, 2.0], [1.0, 1.0, 1.0])
    _, (estimate,) = finish(g, relu)
    close(estimate.statistics.mean, [0.1, 0.5, 2.0])
    close(estimate.range.lo, [0, 0, 0])
    close(estimate.range.hi, [6.1, 6.5, 8.0])


def test_batch_norm_without_statistics_is_an_affine_map():
    g = FloatGraph()
    x = measured(g)
    options = {"mean": torch.tensor([1.0, 0, 2]), "var": torch.tensor([1.0, 4, 1]), "eps": 0.0}
    bn = g.batch_norm(x, gamma=torch.tensor([1.0, -2, 0]), beta=torch.tensor([0.0, 1, 5]), **options)
    _, (estimate,) = finish(g, bn)
    close(estimate.statistics.mean, [-2, 1, 5])
    close(estimate.statistics.std, [1, 2, 0])
    close(estimate.range.lo, [-8, 1 - 12, 5])
    close(estimate.range.hi, [4, 1 + 12, 5])


def test_harvested_statistics_win_over_propagation():
    g = FloatGraph()
    bn = g.batch_norm(g.input(2, 3, 4, 4), beta=torch.tensor([0.0, 1, 2]), gamma=torch.tensor([1.0, -2, 3]))
    conv = g.batch_norm(g.conv(bn, 3), beta=torch.tensor([0.0, 1, 2]), gamma=torch.tensor([1.0, -2, 3]))
    gm, _ = g.finish(conv)
    gm.meta["fxcompress"] = Context(CompileOptions(input_range=RANGE))
    HarvestStatistics().apply(HarvestStatistics().plan(gm))
    statistics = propagate(gm)[conv].statistics
    close(statistics.mean, [0, 1, 2])
    close(statistics.std, [1, 2, 3])


def test_gaussian_range_respects_the_support():
    two = torch.ones(2).double()
    lo, hi = gaussian_range(Statistics(two, two, torch.zeros(2).double(), torch.tensor([3.0, 99]).double(), "x"), 6)
    assert lo.tolist() == [0, 0] and hi.tolist() == [3, 7]


# ---------------------------------------------------------------------------------------------------------- weights


def brute_force(g, node, x_mean, x_var):
    """Moments of a linear operator of independent inputs: run it on the mean image, and squared on the variances."""
    values = dict(g.values)

    def run(image, power):
        source, weight, bias, *rest = node.args
        shaped = along_axis(image, 1, g.shape(source).numel() and len(g.shape(source))).expand(g.shape(source))
        offset = None if bias is None or power == 2 else values[bias]
        return node.target(shaped, values[weight] ** power, offset, *rest)

    mean, var = run(x_mean, 1), run(x_var, 2)
    dims = [d for d in range(mean.ndim) if d != 1]
    return mean.mean(dims), (var.mean(dims) + mean.var(dims, correction=0)).sqrt()


@pytest.mark.parametrize(
    "outputs, options",
    [
        (5, {"kernel": 3}),
        (6, {"kernel": 3, "groups": 3, "stride": 2}),
        (3, {"kernel": 3, "groups": 3, "dilation": 2}),
        (4, {"kernel": 1, "bias": False}),
    ],
)
def test_convolution_without_batch_norm_is_exact_for_independent_inputs(outputs, options):
    g = FloatGraph()
    x = measured(g, size=7)
    conv = g.conv(x, outputs, **options)
    _, (source, estimate) = finish(g, x, conv)
    mean, std = brute_force(g, conv, source.statistics.mean, source.statistics.std**2)
    close(estimate.statistics.mean, mean)
    close(estimate.statistics.std, std)
    close(estimate.range.hi, mean + 6 * std)


@pytest.mark.parametrize("kernel, stride, groups", [(2, 2, 1), (3, 2, 3), (3, 1, 1), (1, 2, 1), (4, 2, 1)])
def test_transposed_convolution_averages_over_the_phases_of_its_stride(kernel, stride, groups):
    g = FloatGraph()
    x = measured(g, size=200)
    up = g.conv_transpose(x, 3, kernel, stride=stride, padding=kernel - 1, groups=groups)
    _, (source, estimate) = finish(g, x, up)
    mean, std = brute_force(g, up, source.statistics.mean, source.statistics.std**2)
    border = 4 * kernel / 200  # share of output pixels near the border, whose sums may differ
    scale = float((mean.abs() + std).max())
    torch.testing.assert_close(estimate.statistics.mean, mean, rtol=0, atol=border * scale)
    torch.testing.assert_close(estimate.statistics.std, std, rtol=0, atol=border * scale)


def test_linear_bounds_are_attained():
    g = FloatGraph()
    x = g.input(2, 6)
    y = g.linear(x, 4)
    _, (estimate,) = finish(g, y)
    weight, bias = (g.values[n] for n in y.args[1:])
    corner = torch.where(weight > 0, RANGE[1], RANGE[0])
    close(estimate.statistics.hi, (weight * corner).sum(1) + bias)
    close(estimate.statistics.mean, 0.5 * weight.sum(1) + bias)
    close(estimate.statistics.std, (weight**2).sum(1).sqrt() * 2001 / math.sqrt(12))


def test_padding_brings_zero_into_the_bounds():
    g = FloatGraph()
    x = g.input(2, 1, 4, 4)
    ones = g.constant(torch.ones(1, 1, 1, 1))
    plain = g.conv(x, 1, bias=False, weight=ones)
    padded = g.conv(x, 1, bias=False, weight=ones, padding=1)
    _, (a, b) = finish(g, plain, padded, input_range=(1.0, 3.0))
    assert a.range.bounds == pytest.approx((1, 3)) and b.range.bounds == pytest.approx((0, 3))


def test_computed_weights_have_no_estimate():
    g = FloatGraph()
    x = g.input(2, 3, 4, 4)
    weight = g.call(aten.neg.default, g.input(5, 3, 1, 1))
    conv = g.conv(x, 5, weight=weight)
    _, (estimate,) = finish(g, conv)
    assert estimate is None


def test_matmul_sums_independent_products():
    g = FloatGraph()
    a, b = g.input(2, 4, 8), g.input(2, 8, 5)
    _, (estimate,) = finish(g, g.call(aten.matmul.default, a, b), input_range=[(-1.0, 1.0), (0.0, 2.0)])
    variance = 4 / 12  # both are uniform of width 2
    assert float(estimate.statistics.mean) == 0
    assert float(estimate.statistics.std) ** 2 == pytest.approx(8 * (variance**2 + variance * 1**2))
    assert float(estimate.statistics.hi) == 8 * 2


# ------------------------------------------------------------------------------------------------------ elementwise


def test_addition_of_branches():
    g = FloatGraph()
    a, b = measured(g), measured(g)
    _, (estimate,) = finish(g, g.add(a, b))
    close(estimate.statistics.mean, [-2, 0, 2])
    close(estimate.statistics.std, torch.tensor([1.0, 2, 3]).double() * math.sqrt(2))
    close(estimate.range.hi, estimate.statistics.mean + 6 * estimate.statistics.std)


def test_subtraction_and_multiplication_by_constants():
    g = FloatGraph()
    x = measured(g)
    shift = g.constant(torch.tensor([1.0, 2, 3]).reshape(1, 3, 1, 1))
    position = g.constant(torch.tensor([[0.0, 2.0, 0.0, 2.0]]).expand(4, 4))  # varies over pixels, not over channels
    sub, mul, add = (
        g.call(aten.sub.Tensor, x, shift),
        g.call(aten.mul.Tensor, x, -2.0),
        g.call(aten.add.Tensor, x, position),
    )
    _, (a, b, c) = finish(g, sub, mul, add)
    close(a.statistics.mean, [-2, -2, -2])
    close(b.statistics.mean, [2, 0, -2])
    close(b.statistics.std, [2, 4, 6])
    close(b.range.hi, [2 + 12, 24, -2 + 36])
    close(c.statistics.mean, [0, 1, 2])
    close(c.statistics.std, torch.tensor([1.0, 4, 9]).double().add(1).sqrt())


def test_a_gate_broadcasts_over_the_pixels():
    g = FloatGraph()
    x = measured(g)
    gate = g.call(aten.sigmoid.default, g.call(aten.mean.dim, x, [2, 3], True))
    _, (estimate,) = finish(g, g.call(aten.mul.Tensor, x, gate))
    assert estimate.statistics.mean.shape == (3,)
    assert (estimate.range.hi <= torch.tensor([-1 + 6, 12, 1 + 18])).all()
    assert (estimate.range.lo >= torch.tensor([-1 - 6, -12, 1 - 18])).all()


def test_a_square_is_not_the_product_of_independent_tensors():
    g = FloatGraph()
    x = known(g.conv(g.input(2, 1, 2, 2), 1), [0.5], [2.0])
    _, (estimate,) = finish(g, g.call(aten.mul.Tensor, x, x))
    assert float(estimate.statistics.mean) == pytest.approx(4.25)
    assert float(estimate.statistics.std) ** 2 == pytest.approx(2 * 16 + 4 * 4 * 0.25)
    assert float(estimate.statistics.lo) == pytest.approx(0, abs=1e-3)


def test_a_gate_of_the_tensor_itself_is_one_function():
    g = FloatGraph()
    x = measured(g)
    silu = g.call(aten.mul.Tensor, x, g.call(aten.sigmoid.default, x))
    shifted = g.call(aten.clamp.default, g.call(aten.add.Tensor, x, 3.0), 0, 6)
    hardswish = g.call(aten.mul.Tensor, g.call(aten.mul.Tensor, shifted, 1 / 6), x)
    alike = [g.call(aten.silu.default, x), g.call(aten.hardswish.default, x)]
    _, found = finish(g, silu, hardswish, *alike)
    for a, b in zip(found[:2], found[2:]):
        close(a.statistics.mean, b.statistics.mean)
        close(a.range.lo, b.range.lo)
    assert found[0].range.bounds[0] == pytest.approx(-0.27846, abs=1e-3)


def test_a_function_with_number_arguments():
    g = FloatGraph()
    x = measured(g)
    elu, power = g.call(aten.elu.default, x, 2.0), g.call(aten.pow.Tensor_Scalar, x, 2)
    _, (a, b) = finish(g, elu, power)
    assert (a.statistics.lo >= -2).all() and (a.statistics.lo < -1.98).all()
    close(b.statistics.mean, [1 + 1, 4, 1 + 9])


# --------------------------------------------------------------------------------------------------- data movement


def test_flatten_repeats_each_channel():
    g = FloatGraph()
    x = measured(g, size=2)
    flat = g.call(aten.reshape.default, x, [-1, 12])
    _, (estimate,) = finish(g, flat)
    close(estimate.statistics.mean, torch.tensor([-1.0, 0, 1]).repeat_interleave(4))
    close(estimate.range.hi, torch.tensor([5.0, 12, 19]).repeat_interleave(4))


def test_concat_slice_and_select_follow_the_channels():
    g = FloatGraph()
    x = measured(g)
    both = g.cat(x, g.relu(x))
    part = g.call(aten.slice.Tensor, both, 1, 2, 5)
    chosen = g.call(aten.index_select.default, both, 1, g.constant(torch.tensor([4, 0])))
    gone = g.call(aten.select.int, both, 1, 1)
    _, (a, b, c, d) = finish(g, both, part, chosen, gone)
    close(a.range.lo, [-7, -12, -17, 0, 0, 0])
    close(b.range.lo, [-17, 0, 0])
    close(c.range.hi, [12, 5])
    assert d.statistics.mean.ndim == 0 and d.range.bounds == pytest.approx((-12, 12))


def test_concat_along_pixels_is_a_mixture():
    g = FloatGraph()
    x, y = measured(g), known(g.conv(g.input(2, 3, 4, 12), 3), [0.0, 4.0, 1.0], [0.0, 0.0, 1.0])
    _, (estimate,) = finish(g, g.cat(x, y, dim=3))
    close(estimate.statistics.mean, [-0.25, 3, 1])  # 4 of 16 columns are x
    close(estimate.statistics.std[1] ** 2, 0.25 * 4 + 0.25 * 0.75 * 16)


def test_permute_and_space_to_depth():
    g = FloatGraph()
    x = measured(g)
    last = g.call(aten.permute.default, x, [0, 2, 3, 1])
    split = g.call(aten.reshape.default, x, [-1, 3, 2, 2, 4])
    _, (a, b) = finish(g, last, split)
    close(a.statistics.mean, [-1, 0, 1])
    close(b.statistics.std, [1, 2, 3])


def test_padding_is_part_of_the_tensor():
    g = FloatGraph()
    x = known(g.conv(g.input(2, 1, 2, 2), 1), [4.0], [1.0], lo=1.0)
    zeros = g.call(aten.constant_pad_nd.default, x, [1, 1, 0, 0], 0.0)
    ones = g.call(torch.ops.fxcompress.pad.default, x, [0, 0, 1, 1], g.constant(torch.tensor([1.0])))
    _, (a, b) = finish(g, zeros, ones)
    assert float(a.statistics.mean) == pytest.approx(2) and a.range.bounds == pytest.approx((0, 10))
    assert float(a.statistics.std) ** 2 == pytest.approx(0.5 + 4)
    assert float(b.statistics.mean) == pytest.approx(2.5) and b.range.bounds == pytest.approx((1, 10))


# ---------------------------------------------------------------------------------------------------------- pooling


def test_averages_keep_mean_and_deviation():
    g = FloatGraph()
    x = measured(g)
    window = ([2, 2], [2, 2], [1, 1])
    nodes = [
        g.call(aten.mean.dim, x, [2, 3]),
        g.call(aten.adaptive_avg_pool2d.default, x, [1, 1]),
        g.call(aten.avg_pool2d.default, x, *window),
    ]
    _, estimates = finish(g, *nodes)
    for estimate in estimates:
        close(estimate.statistics.mean, [-1, 0, 1])
        close(estimate.statistics.std, [1, 2, 3])


def test_an_average_of_rectified_values_is_gaussian_again():
    g = FloatGraph()
    pooled = g.call(aten.mean.dim, g.relu(measured(g)), [2, 3])
    _, (estimate,) = finish(g, pooled)
    mean, std = moments(estimate)
    close(estimate.range.hi, torch.minimum(mean + 6 * std, torch.tensor([5.0, 12, 19]).double()))


def test_mean_over_channels_pools_them():
    g = FloatGraph()
    _, (estimate,) = finish(g, g.call(aten.mean.dim, measured(g), [1], True))
    assert estimate.statistics.mean.ndim == 0 and float(estimate.statistics.mean) == 0


def test_max_pool_and_resize_keep_the_bounds():
    g = FloatGraph()
    x = measured(g)
    pooled = g.call(aten.max_pool2d.default, x, [2, 2], [2, 2], [1, 1])
    resized = g.call(aten.upsample_bilinear2d.vec, x, [8, 8], False, None)
    _, estimates = finish(g, pooled, resized)
    for estimate in estimates:
        close(estimate.range.hi, [5, 12, 19])


# ------------------------------------------------------------------------------------------------------ graph inputs


def inputs_of(**options):
    g = FloatGraph()
    x, y = g.input(2, 3, 4, 4), g.input(2, 3, 4, 4)
    gm, examples = g.finish(g.add(x, y))
    gm.meta["fxcompress"] = Context(CompileOptions(**options), options.pop("examples", examples))
    return gm, examples


def test_a_declared_range_is_uniform_and_hard():
    gm, _ = inputs_of(input_range=(0.0, 6.0))
    estimate = propagate(gm)[placeholders(gm)[0]]
    s = estimate.statistics
    assert (float(s.mean), float(s.lo), float(s.hi)) == (3, 0, 6) and float(s.std) == pytest.approx(6 / math.sqrt(12))
    assert s.provenance == estimate.range.provenance == "declared"


def test_a_range_per_input_and_per_channel():
    gm, examples = inputs_of(input_range=[([0, 1, 2], [3, 3, 3]), None])
    first, second = (propagate(gm)[n].range for n in placeholders(gm))
    assert first.lo.tolist() == [0, 1, 2] and first.provenance == "declared"
    low, high = float(examples[1].min()), float(examples[1].max())
    assert second.bounds == pytest.approx((low - 0.1 * (high - low), high + 0.1 * (high - low)))
    assert second.provenance == "guessed"


@pytest.mark.parametrize(
    "given, message",
    [
        ((1.0, 1.0), "lo < hi"),
        ((0.0, math.inf), "finite"),
        ((0.0, math.nan), "finite"),
        ("pixels", "finite"),
        (([0, 0], [1, 1]), "one for each channel"),
        ([(0, 1)], "lists 1 ranges, the model has 2"),
    ],
)
def test_an_impossible_range_is_refused(given, message):
    with pytest.raises(OptionError, match=message):
        propagate(inputs_of(input_range=given)[0])


def test_an_input_without_any_range_is_refused():
    gm, _ = inputs_of()
    gm.meta["fxcompress"] = Context()
    with pytest.raises(InputError, match=r"x0: the range of this input is unknown.*input_range=\(lo, hi\)"):
        propagate(gm)


@pytest.mark.parametrize("example", [torch.zeros(2, 3), torch.full((2, 3), math.nan), torch.zeros(0, 3)])
def test_a_useless_example_is_refused(example):
    g = FloatGraph()
    gm, _ = g.finish(g.relu(g.input(2, 3)))
    gm.meta["fxcompress"] = Context(example_inputs=(example,))
    with pytest.raises(InputError, match="cannot be guessed"):
        propagate(gm)


def test_calibrated_inputs_need_no_declaration():
    g = FloatGraph()
    x = known(g.input(2, 3), [0.0, 0, 0], [1.0, 1, 1], lo=-3, hi=3)
    describe(
        x,
        statistics=Statistics(
            *(getattr(tensor_meta(x).statistics, k) for k in ("mean", "std", "lo", "hi")), "calibrated"
        ),
    )
    describe(x, range=Range(torch.tensor(-2.5), torch.tensor(2.5), "calibrated minmax"))
    gm, _ = g.finish(g.relu(x))
    assert propagate(gm)[x].range.bounds == (-2.5, 2.5)


# --------------------------------------------------------------------------------------------- where knowledge ends


def test_what_is_behind_an_unknown_operator_is_unknown_until_a_batch_norm():
    g = FloatGraph()
    odd = g.call(aten.flip.default, g.input(2, 3, 4, 4), [3])
    relu = g.relu(odd)
    again = known(g.conv(relu, 3), [0.0, 0, 0], [1.0, 1, 1])
    _, estimates = finish(g, odd, relu, again, g.relu(again))
    assert [e is None for e in estimates] == [True, True, False, False]


def test_a_pole_in_the_range_leaves_no_estimate():
    g = FloatGraph()
    log = g.call(aten.log.default, measured(g))
    _, estimates = finish(g, log, g.call(aten.reciprocal.default, g.relu(measured(g))))
    assert estimates == [None, None]


def test_known_estimates_win():
    g = FloatGraph()
    x = g.input(2, 3)
    relu = g.relu(x)
    gm, (first,) = finish(g, relu)
    assert propagate(gm, {relu: first})[relu] is first


@settings(max_examples=10)  # an export each
@given(networks())
def test_hard_bounds_hold_on_random_networks(network):
    """Without harvested statistics every support follows from the input range: no value may leave it."""
    model, x = network.build()
    captured = capture(model, (x,))
    gm = captured.graph_module
    while (plan := Normalize().plan(gm)).matches:
        Normalize().apply(plan)
        propagate_shapes(gm)
    lo, hi = float(x.min()), float(x.max())
    gm.meta["fxcompress"] = Context(CompileOptions(input_range=(lo, hi)))
    estimates = propagate(gm)
    values = Recorder(gm).record(x)
    for node, value in values.items():
        s = estimates[node].statistics
        axis = tensor_meta(node).channel_axis
        low, high = (along_axis(t, axis, value.ndim) for t in (s.lo, s.hi))
        slack = 1e-4 * (1 + value.abs().max())  # float32 values, and the grid on which functions are bounded
        assert (value >= low - slack).all() and (value <= high + slack).all(), node
        assert (s.std >= 0).all() and (s.mean >= s.lo - 1e-9).all() and (s.mean <= s.hi + 1e-9).all()
        r = estimates[node].range
        assert (r.lo <= r.hi).all() and (r.lo >= s.lo).all() and (r.hi <= s.hi).all()


class Recorder(torch.fx.Interpreter):
    def record(self, *inputs):
        self.seen = {}
        with torch.no_grad():
            self.run(*inputs)
        return self.seen

    def run_node(self, node):
        value = super().run_node(node)
        if node.op in ("placeholder", "call_function") and is_float(node):
            self.seen[node] = value
        return value
