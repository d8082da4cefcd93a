"""Batch norm that stayed becomes a depthwise 1x1 convolution of any rank."""

import pytest
import torch

from fxcompress.graph import calls, constant
from fxcompress.meta import tensor_meta
from fxcompress.passes.expand_batch_norm import ExpandBatchNorm
from fxcompress.passes.harvest_statistics import HarvestStatistics
from fxcompress.shapes import propagate
from tests.support.float_graphs import FloatGraph, aten, batch_norms, outputs

CONV = {2: aten.conv1d.default, 3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}


def expand(gm):
    plan = ExpandBatchNorm().plan(gm)
    ExpandBatchNorm().apply(plan)
    propagate(gm)
    gm.graph.lint()
    gm.recompile()
    return plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_every_rank(rank, dtype):
    g = FloatGraph(dtype=dtype)
    x = g.call(aten.tanh.default, g.input(2, 3, *[4] * (rank - 2)))
    gm, inputs = g.finish(g.relu(g.batch_norm(x)))
    expected, (bn,) = outputs(gm, inputs), calls(gm, aten.batch_norm.default)
    shape, origin = tuple(bn.meta["val"].shape), tensor_meta(bn).origin
    assert len(expand(gm)) == 1 and batch_norms(gm) == 0
    (conv,) = calls(gm, CONV[rank])
    assert conv.args[6] == 3 and constant(gm, conv.args[1]).shape == (3, *[1] * (max(rank, 3) - 1))
    last = conv if rank > 2 else next(iter(conv.users))
    assert tuple(last.meta["val"].shape) == shape and tensor_meta(conv).origin == origin
    tolerance = 1e-6 if dtype is torch.float32 else 1e-14
    torch.testing.assert_close(outputs(gm, inputs), expected, rtol=tolerance, atol=tolerance)
    assert outputs(gm, tuple(x.repeat(3, *[1] * (rank - 1)) for x in inputs))[0].shape[0] == 6  # the batch stays free
    assert not ExpandBatchNorm().plan(gm).matches


@pytest.mark.parametrize("rank", [2, 4])
def test_statistics_are_carried(rank):
    g = FloatGraph()
    bn = g.batch_norm(g.call(aten.tanh.default, g.input(2, 3, *[4] * (rank - 2))))
    gm, _ = g.finish(bn)
    HarvestStatistics().apply(HarvestStatistics().plan(gm))
    harvested = tensor_meta(bn).statistics
    expand(gm)
    described = [n for n in gm.graph.nodes if tensor_meta(n).statistics is harvested]
    assert len(described) == 1 and described[0].users.keys() == {next(iter(reversed(gm.graph.nodes)))}


def test_two_in_a_row():
    g = FloatGraph()
    gm, inputs = g.finish(g.batch_norm(g.relu(g.batch_norm(g.input(2, 3)))))
    expected = outputs(gm, inputs)
    assert expand(gm).applied == 2
    torch.testing.assert_close(outputs(gm, inputs), expected, rtol=1e-14, atol=1e-14)


def test_a_rank_without_convolution_is_refused():
    g = FloatGraph()
    gm, _ = g.finish(g.batch_norm(g.input(2, 3, 2, 2, 2, 2)))
    plan = expand(gm)
    assert not plan.matches and "rank 6" in plan.rejects[0].reason


def test_what_the_user_keeps_in_float_stays():
    g = FloatGraph()
    bn = g.batch_norm(g.input(2, 3, 4, 4))
    bn.meta["keep_float"] = True
    gm, _ = g.finish(bn)
    assert not ExpandBatchNorm().plan(gm).matches
