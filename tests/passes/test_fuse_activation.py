"""Clamps end up right behind what accumulates; the function stays."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxcompress.graph import calls
from fxcompress.meta import Origin, Statistics, describe, tensor_meta
from fxcompress.passes.fuse_activation import FuseActivation, merged
from fxcompress.shapes import propagate
from tests.support.float_graphs import FloatGraph, aten, outputs

CLAMP = aten.clamp.default


def image(g):
    return g.conv(g.input(2, 4, 6, 6), 4)


def max_pool(g, x, padding=0):
    return g.call(aten.max_pool2d.default, x, [3, 3], [2, 2], [padding] * 2, [1, 1], False)


def clamp(g, x, lo=-0.25, hi=0.5):
    return g.call(CLAMP, x, lo, hi)


def run(gm):
    rewrites = 0
    while (plan := FuseActivation().plan(gm)).matches:
        FuseActivation().apply(plan)
        propagate(gm)
        gm.graph.lint()
        rewrites += plan.applied
    gm.recompile()
    return rewrites, plan


def called(gm):
    return [n.target._schema.name.removeprefix("aten::") for n in gm.graph.nodes if n.op == "call_function"]


#: name -> (what stands between convolution and clamp, operators afterwards)
MOVED = {
    "max pool": (lambda g, x: max_pool(g, x), ["conv2d", "clamp", "max_pool2d"]),
    "padded max pool": (lambda g, x: max_pool(g, x, 1), ["conv2d", "clamp", "max_pool2d"]),
    "reshape": (lambda g, x: g.call(aten.reshape.default, x, [-1, 144]), ["conv2d", "clamp", "reshape"]),
    "permute": (lambda g, x: g.call(aten.permute.default, x, [0, 2, 3, 1]), ["conv2d", "clamp", "permute"]),
    "slice": (lambda g, x: g.call(aten.slice.Tensor, x, 1, 0, 2, 1), ["conv2d", "clamp", "slice"]),
    "index_select": (lambda g, x: g.call(aten.index_select.default, x, 1, g.constant(torch.tensor([2, 0]))), ["conv2d", "clamp", "index_select"]),
    "pad": (lambda g, x: g.call(aten.constant_pad_nd.default, x, [1, 1], -3.0), ["conv2d", "clamp", "constant_pad_nd"]),
    "cat": (lambda g, x: g.cat(x, g.conv(g.input(2, 3, 6, 6), 2)), ["conv2d", "conv2d", "clamp", "clamp", "cat"]),
    "cat of one twice": (lambda g, x: g.cat(x, x), ["conv2d", "clamp", "cat"]),
    "two steps": (lambda g, x: max_pool(g, g.call(aten.permute.default, x, [0, 1, 3, 2])), ["conv2d", "clamp", "permute", "max_pool2d"]),
    "batch norm": (lambda g, x: max_pool(g, g.batch_norm(x)), ["conv2d", "batch_norm", "clamp", "max_pool2d"]),
    "sum": (lambda g, x: max_pool(g, g.add(x, x)), ["conv2d", "add", "clamp", "max_pool2d"]),
    "another clamp": (lambda g, x: max_pool(g, clamp(g, x, -1.0, 0.3)), ["conv2d", "clamp", "max_pool2d"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_moves_behind_the_accumulation(name):
    between, expected = MOVED[name]
    g = FloatGraph()
    gm, inputs = g.finish(clamp(g, between(g, image(g))))
    before = outputs(gm, inputs)
    rewrites, _ = run(gm)
    assert rewrites > 0
    assert sorted(called(gm)) == sorted(expected)
    for node in calls(gm, CLAMP):
        assert node.args[0].target in (aten.conv2d.default, aten.batch_norm.default, aten.add.Tensor)
    assert torch.equal(outputs(gm, inputs)[0], before[0])


def other_user(g):
    x = image(g)
    return clamp(g, max_pool(g, x)), x


def pool_other_user(g):
    pool = max_pool(g, image(g))
    return clamp(g, pool), pool


def cat_other_user(g):
    x, y = image(g), image(g)
    return clamp(g, g.cat(x, y)), y


def behind_input(g):
    return (clamp(g, max_pool(g, g.input(2, 4, 6, 6))),)


def behind_table(g):
    return (clamp(g, max_pool(g, g.call(aten.tanh.default, image(g)))),)


def inner_other_user(g):
    inner = clamp(g, image(g))
    return clamp(g, inner, 0.0, 1.0), inner


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (other_user, "2 users"), (pool_other_user, "2 users"), (cat_other_user, "2 users"),
        (inner_other_user, "2 users"), (behind_input, "does not accumulate"), (behind_table, "does not accumulate"),
    ],
)  # fmt: skip
def test_refuses(build, reason):
    g = FloatGraph()
    gm, _ = g.finish(*build(g))
    plan = FuseActivation().plan(gm)
    assert not plan.matches
    assert reason in str(plan.rejects[0])


def test_keep_float_regions_are_not_mixed():
    g = FloatGraph()
    gm, _ = g.finish(clamp(g, max_pool(g, image(g))))
    next(calls(gm, CLAMP)).meta["keep_float"] = True
    plan = FuseActivation().plan(gm)
    assert not plan.matches
    assert "kept in float" in str(plan.rejects[0])


BOUNDS = [None, -2.0, -0.5, 0.0, 0.5, 2.0]


def test_merged_bounds_equal_the_composition():
    """All pairs of bounds, empty intervals (min > max gives max) included."""
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)
    intervals = [(a, b) for a, b in itertools.product(BOUNDS, BOUNDS) if (a, b) != (None, None)]
    for inner, outer in itertools.product(intervals, intervals):
        assert torch.equal(x.clamp(*merged(inner, outer)), x.clamp(*inner).clamp(*outer)), (inner, outer)


def test_statistics_stay_on_the_tensor_they_describe():
    g = FloatGraph()
    gm, _ = g.finish(clamp(g, max_pool(g, image(g))))
    node, pool = next(calls(gm, CLAMP)), next(calls(gm, aten.max_pool2d.default))
    ones = torch.ones(4, dtype=torch.float64)
    describe(node, statistics=Statistics(ones, ones, -ones, ones, "calibrated"), origin=Origin("relu"))
    describe(pool, origin=Origin("pool"))
    statistics = tensor_meta(node).statistics
    run(gm)
    assert tensor_meta(pool).statistics is statistics
    assert tensor_meta(pool).origin.module == "pool"
    moved = next(calls(gm, CLAMP))
    assert tensor_meta(moved).statistics is None
    assert tensor_meta(moved).origin.module == "relu"
    assert tensor_meta(moved).channel_axis == 1


steps = st.lists(
    st.sampled_from([n for n in MOVED if n not in ("sum", "batch norm", "another clamp", "reshape", "permute")]),
    max_size=3,
)


@given(steps, st.sampled_from([(0.0, None), (0.0, 6.0), (None, 0.2), (-0.3, 0.3)]))
def test_chains_keep_the_function(names, bounds):
    g = FloatGraph()
    x = image(g)
    for name in names:
        if g.shape(x)[2] >= 3 and not (name == "cat" and g.shape(x)[2:] != (6, 6)):
            x = MOVED[name][0](g, x)
    gm, inputs = g.finish(clamp(g, x, *bounds))
    before = outputs(gm, inputs)
    run(gm)
    assert torch.equal(outputs(gm, inputs)[0], before[0])
    assert all(n.args[0].target is aten.conv2d.default for n in calls(gm, CLAMP))
