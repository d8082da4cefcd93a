"""Equalized networks compute the same, and every channel takes the same share of both layers' ranges."""

import copy
import math

import pytest
import torch
from torch import nn

from fxcompress import Level, PassManager, default_passes
from fxcompress.analysis.layer_groups import LayerGroups
from fxcompress.analysis.layer_weights import largest_weights
from fxcompress.dialects import CHANNEL_CLAMP
from fxcompress.graph import calls, constant
from fxcompress.meta import Range, Statistics, describe, tensor_meta
from fxcompress.moments import propagate as propagate_moments
from fxcompress.options import CompileOptions, Context
from fxcompress.passes.equalize_cross_layer import NEGLIGIBLE, EqualizeCrossLayer
from fxcompress.shapes import propagate
from tests.support.float_graphs import FloatGraph, aten, outputs
from tests.support.graphs import images, randomize
from tests.support.levels import code_differences, compile_levels
from tests.support.real import workload

EXACT = 1e-12  # relative, float64


def finish(g, *results):
    gm, inputs = g.finish(*results)
    gm.meta["fxcompress"] = Context(CompileOptions.build(equalize=True, input_range=(-4, 4)), inputs)
    return gm, inputs


def run(gm):
    """Apply until nothing is left; returns the number of rounds with work."""
    rounds = 0
    while (plan := EqualizeCrossLayer().plan(gm)).matches:
        EqualizeCrossLayer().apply(plan)
        propagate(gm)
        gm.graph.lint()
        rounds += 1
    gm.recompile()
    return rounds


def uneven(g, *shape):
    """Weights whose rows and columns differ by factors of up to a thousand."""
    weight = g.normal(*shape)
    for dim in (0, 1):
        sizes = [-1 if d == dim else 1 for d in range(len(shape))]
        weight = weight * torch.exp(g.uniform(-3.5, 3.5, shape[dim])).reshape(sizes)
    return g.constant(weight, "uneven")


def conv(g, x, outputs_, kernel=1, groups=1, padding=0):
    inputs = g.shape(x)[1]
    weight = uneven(g, outputs_, inputs // groups, kernel, kernel)
    return g.conv(x, outputs_, kernel, groups=groups, padding=padding, weight=weight)


def clamp(g, x, lo, hi):
    return g.call(aten.clamp.default, x, lo, hi)


def pair(g, lo=0, hi=None):
    return (conv(g, clamp(g, conv(g, g.input(2, 3, 6, 6), 5), lo, hi), 4, 3, padding=1),)


def depthwise(g):
    x = clamp(g, conv(g, g.input(2, 3, 8, 8), 6), 0, 6)
    x = clamp(g, conv(g, x, 6, 3, groups=6, padding=1), 0, 6)
    return (conv(g, x, 4),)


def residual(g):
    x = g.relu(conv(g, g.input(2, 3, 6, 6), 4))
    for _ in range(2):
        x = clamp(g, g.add(conv(g, g.relu(conv(g, x, 5)), 4), x), 0, 6)
    return (conv(g, x, 2),)


def with_concat(g):
    x = g.input(2, 3, 6, 6)
    both = g.cat(conv(g, x, 2), clamp(g, conv(g, x, 3), -1.5, 2.5))
    pooled = g.call(aten.avg_pool2d.default, both, [2, 2], [2, 2], [1, 1])
    return (conv(g, pooled, 3),)


def with_constant(g):
    x = g.add(conv(g, g.input(2, 3, 6, 6), 4), g.constant(g.normal(4, 1, 1)))
    return (conv(g, g.relu(x), 3),)


def flattened(g):
    x = g.relu(conv(g, g.input(2, 3, 4, 4), 4))
    return (g.linear(g.call(aten.reshape.default, x, [-1, 64]), 5),)


def transposed(g):
    x = g.relu(conv(g, g.input(2, 3, 4, 4), 4))
    return (conv(g, g.relu(g.conv_transpose(x, 6, 2, stride=2, groups=2)), 3),)


GRAPHS = {
    "relu": pair, "relu6": lambda g: pair(g, 0, 6), "two-sided clamp": lambda g: pair(g, -0.5, 0.75), "depthwise": depthwise,
    "residual": residual, "concat": with_concat, "constant": with_constant, "flatten": flattened, "transposed": transposed,
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_the_function_stays(name):
    g = FloatGraph()
    gm, inputs = finish(g, *GRAPHS[name](g))
    before = outputs(gm, inputs)[0]
    parameters = {key: value.clone() for key, value in gm.named_buffers()}
    kept = dict(gm.named_buffers())
    assert run(gm) == 1
    assert (outputs(gm, inputs)[0] - before).abs().max() <= EXACT * before.abs().max()
    assert all(torch.equal(kept[key], value) for key, value in parameters.items())  # nobody wrote into a weight


def shares(gm, groups, group):
    """Per label, (written, read): largest weights over their layer's largest."""
    written, read = torch.zeros(2, groups.count, dtype=torch.float64)
    for node in group.writers:
        largest = largest_weights(node, constant(gm, node.args[1])).amax(2).flatten()
        written.scatter_reduce_(0, groups.outputs[node], largest / largest.max(), "amax")
    for node in group.readers:
        largest = largest_weights(node, constant(gm, node.args[1])).amax(1).flatten()
        read.scatter_reduce_(0, groups.inputs[node], largest / largest.max(), "amax")
    return written, read


@pytest.mark.parametrize("name", GRAPHS)
def test_every_channel_takes_the_same_share_of_both_ranges(name):
    g = FloatGraph()
    gm, _ = finish(g, *GRAPHS[name](g))
    run(gm)
    groups = LayerGroups(gm)
    for group in groups.groups:
        written, read = shares(gm, groups, group)
        free = (written > 0) & (read > 0)
        free[0] = False
        assert free.any()
        assert (written[free] / read[free]).log().abs().max() <= 2 * NEGLIGIBLE


@pytest.mark.parametrize("name", GRAPHS)
def test_a_second_plan_finds_nothing(name):
    g = FloatGraph()
    gm, _ = finish(g, *GRAPHS[name](g))
    EqualizeCrossLayer().apply(EqualizeCrossLayer().plan(gm))
    propagate(gm)
    assert not EqualizeCrossLayer().plan(gm).matches


def test_the_scales_of_a_pair_are_those_of_the_formula():
    """sqrt(r1 / r2) of Nagel et al., up to the common factor that makes shares of ranges."""
    g = FloatGraph()
    gm, _ = finish(g, *pair(g))
    first, second = (constant(gm, n.args[1]) for n in calls(gm, aten.conv2d.default))
    r1, r2 = first.abs().amax((1, 2, 3)), second.abs().amax((0, 2, 3))
    expected = (r1 / r2 * r2.max() / r1.max()).sqrt()
    run(gm)
    new = constant(gm, next(calls(gm, aten.conv2d.default)).args[1])
    found = (first / new).flatten(1)[:, 0]
    ratio = found / expected  # the layers' largest weights change, so the factor is not 1
    assert (ratio / ratio[0]).log().abs().max() <= 2 * NEGLIGIBLE


def test_relu6_becomes_a_clamp_with_one_bound_per_channel():
    g = FloatGraph()
    gm, _ = finish(g, *pair(g, 0, 6))
    old = constant(gm, next(calls(gm, aten.conv2d.default)).args[1])
    run(gm)
    (node,) = calls(gm, CHANNEL_CLAMP)
    scale = (old / constant(gm, next(calls(gm, aten.conv2d.default)).args[1]))[:, :1, :1, :1].reshape(5, 1, 1)
    assert not constant(gm, node.args[1]).any()
    assert torch.allclose(constant(gm, node.args[2]), 6 / scale, rtol=1e-12)


def dead_channels(g):
    """Channel 0 is never written, channel 1 hardly, channel 2 never read."""
    first, second = g.normal(4, 3, 1, 1), g.normal(2, 4, 1, 1)
    first[0], first[1], second[:, 2] = 0, 1e-9, 0
    x = g.relu(g.conv(g.input(2, 3, 4, 4), 4, weight=g.constant(first)))
    return (g.conv(x, 2, weight=g.constant(second)),)


def test_dead_channels_keep_their_scale():
    g = FloatGraph()
    gm, inputs = finish(g, *dead_channels(g))
    before = outputs(gm, inputs)[0]
    old = [constant(gm, n.args[2]) for n in calls(gm, aten.conv2d.default)]
    run(gm)
    new = constant(gm, next(calls(gm, aten.conv2d.default)).args[2])
    assert torch.equal(new[:3], old[0][:3]) and new[3] != old[0][3]
    assert (outputs(gm, inputs)[0] - before).abs().max() <= EXACT * before.abs().max()


def test_statistics_and_ranges_are_divided_with_their_tensors():
    g = FloatGraph()
    gm, inputs = finish(g, *pair(g, 0, 6))
    node = next(calls(gm, aten.conv2d.default))
    mean = outputs_of(gm, inputs, node)
    describe(node, statistics=Statistics(mean, mean.abs() + 1, mean - 9, mean + 9, "batch_norm"), range=Range(mean - 9, mean + 9, "test"))  # fmt: skip
    before = tensor_meta(node)
    estimate = propagate_moments(gm)[next(calls(gm, aten.clamp.default))].statistics
    run(gm)
    scale = mean / outputs_of(gm, inputs, node)
    after = tensor_meta(node)
    for name in ("mean", "std", "lo", "hi"):
        assert torch.allclose(getattr(after.statistics, name), getattr(before.statistics, name) / scale, rtol=1e-9)
    assert torch.allclose(after.range.hi, before.range.hi / scale, rtol=1e-9)
    # and what is propagated through the clamp with bounds per channel is what was propagated before, divided
    found = propagate_moments(gm)[next(calls(gm, CHANNEL_CLAMP))].statistics
    for name in ("mean", "std", "lo", "hi"):
        assert torch.allclose(getattr(found, name), getattr(estimate, name) / scale, rtol=1e-9)


def outputs_of(gm, inputs, node):
    """Per-channel mean of a node's value."""
    copied = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))
    target = next(n for n in copied.graph.nodes if n.name == node.name)
    next(n for n in copied.graph.nodes if n.op == "output").args = ((target,),)
    copied.recompile()
    return outputs(copied, inputs)[0].mean((0, 2, 3))


def test_refusals_name_the_obstacle():
    g = FloatGraph()
    x = g.call(aten.sigmoid.default, conv(g, g.input(2, 3, 6, 6), 5))
    gm, _ = finish(g, conv(g, x, 4))
    plan = EqualizeCrossLayer().plan(gm)
    assert not plan.matches
    assert "sigmoid.default does not commute with a scale" in str(plan.rejects[0])


def test_the_option_switches_it_off():
    g = FloatGraph()
    gm, _ = finish(g, *pair(g))
    gm.meta["fxcompress"] = Context(CompileOptions.build(equalize=False))
    assert not EqualizeCrossLayer().plan(gm).matches
    assert CompileOptions.build().equalize is False
    assert CompileOptions.build(weight_granularity="tensor").equalize is True


class Mobile(nn.Module):
    """Expand, depthwise, project around a shortcut, all ReLU6."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand, self.project = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = nn.functional.relu6(self.stem(x))
        y = nn.functional.relu6(self.depthwise(nn.functional.relu6(self.expand(x))))
        return self.head((x + self.project(y)).mean((2, 3)))


def test_clamps_per_channel_are_bounds_of_the_integer_rounding():
    """Every integer operator agrees with its qdq original within one step, and the network with the float one."""
    torch.manual_seed(1)
    model = randomize(Mobile())
    with torch.no_grad():
        model.expand.weight *= torch.exp(torch.empty(16, 1, 1, 1).uniform_(-2, 2))
    x = images(4, 3, 8, 8) * 4
    levels = compile_levels(model, (x,), calibrate=True, weight_granularity="tensor")
    assert len(list(calls(levels[Level.QDQ], CHANNEL_CLAMP))) == 3
    for name, difference in code_differences(levels, x).items():
        assert difference.steps <= 1, name
    exact, found = (levels[level](x)[0] for level in (Level.FLOAT, Level.INTEGER))
    assert torch.nn.functional.cosine_similarity(exact.flatten(), found.flatten(), 0) > 0.99


@pytest.mark.parametrize("name", ["resnet20", "vww"])
def test_real_networks_stay_what_they_are(name):
    """To 1e-5 of the logits' range, dead channels (vww has hundreds) included; the pass manager checks it, too."""
    work = workload(name, 8)
    from fxcompress.capture import capture

    x = next(work.batches(work.inputs))
    options = CompileOptions.build(equalize=True, absorb_bias=False, input_range=work.input_range, input_normalization=work.normalization)  # fmt: skip
    captured = capture(work.model, (x,), input_normalization=work.normalization)
    captured.graph_module.meta["fxcompress"] = Context(options, captured.example_inputs)
    passes = default_passes("int8")
    manager = PassManager(passes[: passes.index_of("absorb_high_bias")])
    gm = manager.run(captured.graph_module)
    record = manager.records[-1]
    assert record.name == "equalize_cross_layer" and record.rewrites >= 10
    with torch.no_grad():
        expected, found = work.run_float(x), gm(x)[0]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert math.isfinite(record.output_change)
