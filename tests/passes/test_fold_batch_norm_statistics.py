"""What folding does to statistics: they move with their tensors, also in random graphs, whose function stays."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.graph import calls
from fxcompress.meta import Statistics, describe, tensor_meta
from fxcompress.passes.canonicalize_affine import CanonicalizeAffine
from fxcompress.passes.fold_batch_norm import FoldBatchNorm
from fxcompress.passes.harvest_statistics import HarvestStatistics
from tests.support.float_graphs import (
    FloatGraph,
    aten,
    batch_norms,
    blocked,
    graph,
    image,
    max_pool,
    outputs,
    positive,
    relative_error,
    run,
    shuffle,
    zero_pad,
)

BATCH_NORM = aten.batch_norm.default


def trained(g, x):
    """A batch norm with the statistics that training on exactly this data would have left."""
    value = g.values[x]
    dims = [d for d in range(value.ndim) if d != 1]
    gamma = g.uniform(0.5, 1.5, value.shape[1]) * g.uniform(-1, 1, value.shape[1]).sign()
    return g.batch_norm(x, gamma=gamma, mean=value.mean(dims), var=value.var(dims, unbiased=False), eps=1e-9)


def check_statistics(gm, inputs):
    """Every tensor that carries statistics has them; returns the names of these nodes."""
    described = []

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            meta = tensor_meta(node)
            if meta.statistics is not None:
                described.append(node)
                rows = value.movedim(meta.channel_axis, 0).flatten(1)
                torch.testing.assert_close(meta.statistics.mean, rows.mean(1), atol=1e-6, rtol=1e-6)
                torch.testing.assert_close(meta.statistics.std, rows.std(1, unbiased=False), atol=1e-6, rtol=1e-6)
                assert (meta.statistics.lo <= rows.amin(1) + 1e-9).all() and (
                    rows.amax(1) <= meta.statistics.hi + 1e-9
                ).all()
            return value

    Recorder(gm).run(*inputs)
    return [n.name for n in described]


def test_the_layer_takes_over_the_statistics_of_the_batch_norm():
    gm, inputs = graph(lambda g: g.relu(trained(g, g.conv(image(g), 3))))
    run(HarvestStatistics(), gm)
    assert check_statistics(gm, inputs) == ["conv2d_default", "batch_norm_default"]
    (bn,) = calls(gm, BATCH_NORM)
    harvested = tensor_meta(bn).statistics
    run(FoldBatchNorm(), gm)
    assert check_statistics(gm, inputs) == ["conv2d_default"]
    (conv,) = calls(gm, aten.conv2d.default)
    assert tensor_meta(conv).statistics is harvested and tensor_meta(conv).origin.module == "conv0"


def test_statistics_inside_the_region_follow():
    def build(g):
        a, b = trained(g, g.conv(x := image(g), 2)), trained(g, g.conv(x, 2))
        return trained(g, g.cat(g.add(a, b), g.conv(x, 3)))

    gm, inputs = graph(build)
    run(HarvestStatistics(), gm)
    run(FoldBatchNorm(), gm)
    assert batch_norms(gm) == 0
    assert check_statistics(gm, inputs) == ["conv2d_default", "conv2d_default_1", "cat_default"]


def test_statistics_of_tensors_between_lose_the_map_in_a_forward_fold():
    def build(g):
        return g.conv(max_pool(g, positive(g, blocked(g))), 3)

    gm, inputs = graph(build)
    (pool,) = calls(gm, aten.max_pool2d.default)
    value = fx_value(gm, inputs, pool)
    describe(
        pool,
        statistics=Statistics(
            value.mean((0, 2, 3)),
            value.std((0, 2, 3), unbiased=False),
            value.amin((0, 2, 3)),
            value.amax((0, 2, 3)),
            "calibrated",
        ),
    )
    run(FoldBatchNorm(), gm)
    assert batch_norms(gm) == 0
    assert check_statistics(gm, inputs) == [pool.name]


def fx_value(gm, inputs, node):
    """The value of one node."""
    values = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            return values[n]

    Recorder(gm).run(*inputs)
    return values[node]


def test_statistics_that_cannot_follow_are_dropped():
    gm, _ = graph(lambda g: g.conv(g.batch_norm(blocked(g), gamma=torch.tensor([1.0, 0, 1, 1])), 3))
    run(HarvestStatistics(), gm)
    gm_pool = next(calls(gm, BATCH_NORM))
    assert tensor_meta(gm_pool).statistics is not None
    run(FoldBatchNorm(), gm)
    assert tensor_meta(next(calls(gm, aten.tanh.default))).statistics is not None  # its meaning did not change
    assert tensor_meta(next(calls(gm, aten.conv2d.default))).statistics is None


# ------------------------------------------------------------------------------------------------------- random graphs

STEPS = ("conv", "strided", "bn", "positive", "relu", "add", "cat", "max", "avg", "shuffle", "mul", "affine", "pad")


def grow(g, x, step, pick):
    """Apply one step to tensors of one size; ``pick`` chooses among those made so far."""
    if step == "conv":
        return g.conv(x, 4, 3, padding=1, groups=2)
    if step == "strided":
        return g.conv(x, 4, 1)
    if step == "bn":
        return trained(g, x)
    if step == "positive":
        return positive(g, x)
    if step == "relu":
        return g.relu(x)
    if step == "add":
        return g.add(x, pick)
    if step == "cat":
        return g.conv(trained(g, g.cat(x, pick)), 4)
    if step == "max":
        return g.call(aten.max_pool2d.default, x, [3, 3], [1, 1], [1, 1], [1, 1], False)
    if step == "avg":
        return g.call(aten.avg_pool2d.default, x, [3, 3], [1, 1], [1, 1], False, False, None)
    if step == "shuffle":
        return shuffle(g, x)
    if step == "mul":
        return g.call(aten.mul.Tensor, x, g.call(aten.sigmoid.default, pick))
    if step == "affine":
        return g.add(g.call(aten.mul.Tensor, x, g.constant(g.normal(4, 1, 1))), 0.5)
    return g.conv(zero_pad(g, x), 4, 3)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=14),
    seed=st.integers(0, 2**16),
)
def test_random_graphs_keep_their_function(steps, seed):
    g = FloatGraph(seed)
    tensors = [g.conv(g.input(2, 4, 5, 5), 4)]
    for step, at, other in steps:
        tensors.append(grow(g, tensors[-1 - at % min(2, len(tensors))], step, tensors[other % len(tensors)]))
    gm, inputs = g.finish(tensors[-1])
    expected = outputs(gm, inputs)
    run(HarvestStatistics(), gm)
    run(CanonicalizeAffine(), gm)
    before = batch_norms(gm)
    removed = run(FoldBatchNorm(), gm)
    assert batch_norms(gm) == before - removed
    assert relative_error(expected, outputs(gm, inputs)) < 1e-9
    if "positive" not in {step for step, *_ in steps}:  # its parameters are not those of the data
        check_statistics(gm, inputs)
    assert not FoldBatchNorm().plan(gm).matches
