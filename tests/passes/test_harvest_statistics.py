"""What batch norm tells about its tensors, and where it tells nothing."""

import pytest
import torch

from fxcompress.errors import ModelError
from fxcompress.graph import calls
from fxcompress.meta import Statistics, describe, tensor_meta
from fxcompress.passes.canonicalize_affine import CanonicalizeAffine
from fxcompress.passes.harvest_statistics import HarvestStatistics
from fxcompress.shapes import propagate
from tests.support.float_graphs import FloatGraph, aten


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def harvest(gm):
    plan = HarvestStatistics().plan(gm)
    HarvestStatistics().apply(plan)
    return plan


def statistics(node):
    return tensor_meta(node).statistics


def test_input_and_output_of_a_batch_norm():
    g = FloatGraph(dtype=torch.float32)
    conv = g.conv(g.input(2, 3, 4, 4), 2)
    bn = g.batch_norm(conv, gamma=vector(2, -3), beta=vector(0.5, 1), mean=vector(4, 5), var=vector(9, 16), eps=0.25)
    gm, _ = g.finish(bn)
    assert len(harvest(gm)) == 1
    after, before = statistics(bn), statistics(conv)
    assert after.mean.tolist() == [0.5, 1] and after.std.tolist() == [2, 3]
    assert before.mean.tolist() == [4, 5]
    torch.testing.assert_close(before.std, vector(9.25, 16.25).sqrt())
    for s in (before, after):
        assert s.provenance == "batch_norm" and s.mean.dtype == s.lo.dtype == torch.float64
        assert s.lo.tolist() == [-torch.inf] * 2 and s.hi.tolist() == [torch.inf] * 2


def test_without_affine_parameters_the_output_is_standard_normal():
    g = FloatGraph()
    gm, _ = g.finish(bn := g.batch_norm(g.conv(g.input(2, 3, 4, 4), 2), affine=False))
    harvest(gm)
    assert statistics(bn).mean.tolist() == [0, 0] and statistics(bn).std.tolist() == [1, 1]


def test_statistics_match_what_training_mode_measures():
    torch.manual_seed(0)
    bn = torch.nn.BatchNorm2d(3, momentum=None).train()
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([2.0, -0.5, 1.0]))
        bn.bias.copy_(torch.tensor([0.1, 3.0, -1.0]))
    g = FloatGraph(seed=3, dtype=torch.float32)
    conv = g.conv(g.input(16, 2, 16, 16), 3, 3)
    with torch.no_grad():
        bn(g.values[conv])
    node = g.batch_norm(conv, gamma=bn.weight, beta=bn.bias, mean=bn.running_mean, var=bn.running_var)
    gm, _ = g.finish(node)
    harvest(gm)
    for n in (conv, node):
        rows = g.values[n].double().movedim(1, 0).flatten(1)
        torch.testing.assert_close(statistics(n).mean, rows.mean(1), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(statistics(n).std, rows.std(1), atol=1e-4, rtol=1e-3)


def test_an_input_that_is_known_already_keeps_its_statistics():
    g = FloatGraph()
    first = g.batch_norm(g.conv(g.input(2, 3, 4, 4), 2))
    second = g.batch_norm(first)
    gm, _ = g.finish(second)
    known = Statistics(*(vector(7, 7) for _ in range(4)), "calibrated")
    describe(first, statistics=known)
    assert [m.node for m in harvest(gm).matches] == [second]
    assert statistics(first) is known


def test_the_batch_norm_behind_a_graph_input_says_nothing():
    g = FloatGraph()
    x = g.input(2, 3, 4, 4)
    gm, _ = g.finish(g.batch_norm(x))
    assert not harvest(gm).matches and statistics(x) is None


def test_affines_that_were_not_trained_say_nothing():
    g = FloatGraph()
    gm, _ = g.finish(g.call(aten.mul.Tensor, g.conv(g.input(2, 3, 4, 4), 2), 0.5))
    CanonicalizeAffine().apply(CanonicalizeAffine().plan(gm))
    propagate(gm)
    assert len(list(calls(gm, aten.batch_norm.default))) == 1
    assert not HarvestStatistics().plan(gm).matches


def test_an_input_with_channels_elsewhere_is_left_undescribed():
    g = FloatGraph()
    linear = g.linear(g.input(2, 5, 3), 4)  # channels last; batch norm takes axis 1
    gm, _ = g.finish(bn := g.batch_norm(linear))
    harvest(gm)
    assert statistics(linear) is None and statistics(bn).channels == 5


def test_harvesting_twice_finds_nothing():
    g = FloatGraph()
    gm, _ = g.finish(g.batch_norm(g.conv(g.input(2, 3, 4, 4), 2)))
    code = str(gm.graph)
    harvest(gm)
    assert not HarvestStatistics().plan(gm).matches and str(gm.graph) == code


@pytest.mark.parametrize("var", [-1.0, torch.nan])
def test_a_broken_variance_raises(var):
    g = FloatGraph()
    gm, _ = g.finish(g.batch_norm(g.conv(g.input(2, 3, 4, 4), 2), var=vector(1, var)))
    with pytest.raises(ModelError, match=r"batch norm: .*bn0.*running_var"):
        HarvestStatistics().plan(gm)
