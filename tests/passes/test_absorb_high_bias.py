"""High biases move through a ReLU into the next layers; the network stays the same wherever z >= c."""

import pytest
import torch

from fxcompress.dialects import CHANNEL_CLAMP
from fxcompress.graph import calls, constant
from fxcompress.meta import Statistics, describe, tensor_meta
from fxcompress.options import CompileOptions, Context
from fxcompress.passes.absorb_high_bias import AbsorbHighBias
from fxcompress.shapes import propagate
from tests.support.float_graphs import FloatGraph, aten, outputs

HIGH = torch.tensor([9.0, 0.5, 7.0, -2.0], dtype=torch.float64)


def finish(g, *results, **options):
    gm, inputs = g.finish(*results)
    gm.meta["fxcompress"] = Context(CompileOptions.build(absorb_bias=True, **options), inputs)
    return gm, inputs


def layer(g, x, bias=HIGH, std=0.25):
    """A 1x1 convolution with small weights and these biases, and the statistics that go with them."""
    weight = g.constant(0.05 * g.normal(len(bias), g.shape(x)[1], 1, 1), "small")
    node = g.call(aten.conv2d.default, x, weight, g.constant(bias, "high"), [1, 1], [0, 0], [1, 1], 1)
    spread = torch.full_like(bias, std)
    unbounded = torch.full_like(bias, torch.inf)
    describe(node, statistics=Statistics(bias.clone(), spread, -unbounded, unbounded, "batch_norm"))
    return node


def run(gm):
    plan = AbsorbHighBias().plan(gm)
    AbsorbHighBias().apply(plan)
    propagate(gm)
    gm.recompile()
    return plan


def pair(g, lo=0, hi=None, padding=0):
    x = g.call(aten.clamp.default, layer(g, g.input(2, 3, 6, 6)), lo, hi)
    return (g.conv(x, 2, 3, padding=padding),)


@pytest.mark.parametrize("hi", [None, 6, 9.25])
def test_the_function_stays_where_the_sum_is_above_what_was_absorbed(hi):
    """Weights are so small that no z falls below beta - 3 gamma; clipping from above happens in both networks."""
    g = FloatGraph()
    gm, inputs = finish(g, *pair(g, 0, hi))
    before = outputs(gm, inputs)[0]
    plan = run(gm)
    assert [str(m).split(": ")[-1] for m in plan.matches] == ["2 of 4 channels by up to 8.25"]
    assert (outputs(gm, inputs)[0] - before).abs().max() <= 1e-12 * before.abs().max()
    bias = constant(gm, next(calls(gm, aten.conv2d.default)).args[2])
    assert torch.equal(bias, HIGH - torch.tensor([8.25, 0, 6.25, 0]).double())
    if hi is not None:
        (clamp,) = calls(gm, CHANNEL_CLAMP)
        assert torch.equal(constant(gm, clamp.args[2]).flatten(), hi - torch.tensor([8.25, 0, 6.25, 0]).double())


def test_values_below_become_zero_and_the_error_is_at_most_what_was_absorbed():
    g = FloatGraph()
    gm, inputs = finish(g, *pair(g))
    low = (inputs[0] * 100,)  # far outside the three deviations
    z = layer_output(gm, low)
    before = outputs(gm, low)[0]
    run(gm)
    excess = torch.tensor([8.25, 0, 6.25, 0]).double().reshape(4, 1, 1)
    lost = (excess - z.relu()).clamp(min=0)
    second = constant(gm, list(calls(gm, aten.conv2d.default))[1].args[1])
    expected = torch.conv2d(lost, second)
    assert lost.max() > 1
    assert torch.allclose(outputs(gm, low)[0] - before, expected, atol=1e-9)


def layer_output(gm, inputs):
    first = next(calls(gm, aten.conv2d.default))
    return torch.conv2d(inputs[0], constant(gm, first.args[1]), constant(gm, first.args[2]))


def test_statistics_follow_and_a_second_plan_finds_nothing():
    g = FloatGraph()
    gm, _ = finish(g, *pair(g))
    run(gm)
    stats = tensor_meta(next(calls(gm, aten.conv2d.default))).statistics
    assert torch.equal(stats.mean, torch.tensor([0.75, 0.5, 0.75, -2.0]).double())
    assert torch.equal(stats.std, torch.full((4,), 0.25).double())
    assert not AbsorbHighBias().plan(gm).matches


def table_between(g):
    x = g.call(aten.sigmoid.default, g.relu(layer(g, g.input(2, 3, 6, 6))))
    return (g.conv(x, 2),)


def added(g):
    x = g.relu(layer(g, g.input(2, 3, 6, 6)))
    return (g.conv(g.add(x, g.conv(x, 4)), 2),)


def two_readers(g):
    z = layer(g, g.input(2, 3, 6, 6))
    return (g.conv(g.relu(z), 2), g.conv(z, 2))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda g: pair(g, padding=1), "its padding with 0 does not shift"),
        (table_between, "sigmoid.default does not commute"),
        (added, "another operand does not come through"),
        (two_readers, "also read by"),
    ],
)
def test_refuses(build, reason):
    g = FloatGraph()
    gm, _ = finish(g, *build(g))
    plan = AbsorbHighBias().plan(gm)
    assert not plan.matches
    assert reason in str(plan.rejects[0])


@pytest.mark.parametrize("lo", [None, -1.0])
def test_only_clamps_at_zero_are_meant(lo):
    g = FloatGraph()
    gm, _ = finish(g, *pair(g, lo, 6))
    plan = AbsorbHighBias().plan(gm)
    assert not plan.matches and not plan.rejects


def test_the_option_switches_it_off():
    g = FloatGraph()
    gm, _ = finish(g, *pair(g))
    gm.meta["fxcompress"] = Context(CompileOptions.build(absorb_bias=False, equalize=True))
    assert not AbsorbHighBias().plan(gm).matches
