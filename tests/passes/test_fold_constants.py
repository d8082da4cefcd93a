"""What is computed from constants alone becomes its value; everything else stays."""

import operator

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.graph import calls, constant
from fxcompress.meta import tensor_meta
from fxcompress.passes import fold_constants
from fxcompress.passes.fold_constants import FoldConstants
from tests.support.float_graphs import FloatGraph, aten, outputs


def fold(gm):
    plan = FoldConstants().plan(gm)
    FoldConstants().apply(plan)
    gm.graph.lint()
    gm.recompile()
    assert not FoldConstants().plan(gm).matches
    return plan


def weight_norm_model():
    torch.manual_seed(0)
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)).eval()


def test_weight_norm_becomes_a_weight():
    model, x = weight_norm_model(), torch.randn(2, 3, 6, 6)
    gm = capture(model, (x,)).graph_module
    assert len(fold(gm).matches) == 1
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [aten.conv2d.default]
    weight = constant(gm, next(calls(gm, aten.conv2d.default)).args[1])
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, model.weight)
    torch.testing.assert_close(gm(x)[0], model(x))
    assert len(dict(gm.named_buffers())) == 2  # the direction and the length are gone


def test_only_the_end_of_a_chain_becomes_a_constant():
    g = FloatGraph()
    x, c = g.input(2, 4), g.constant(g.normal(4))
    gm, inputs = g.finish(g.add(x, g.call(aten.exp.default, g.call(aten.neg.default, c))))
    before = outputs(gm, inputs)
    plan = fold(gm)
    assert [m.node.target for m in plan.matches] == [aten.exp.default]
    assert torch.equal(outputs(gm, inputs)[0], before[0])


def test_one_rounding():
    """exp(-c) of a float32 c, computed in float64 and rounded once."""
    g = FloatGraph(dtype=torch.float32)
    x, c = g.input(2, 64), g.constant(g.normal(64))
    gm, _ = g.finish(g.add(x, g.call(aten.exp.default, g.call(aten.neg.default, c))))
    expected = constant(gm, gm.graph.find_nodes(op="get_attr")[0]).double().neg().exp().float()
    fold(gm)
    assert torch.equal(constant(gm, gm.graph.find_nodes(op="get_attr")[0]), expected)


def test_calls_without_inputs_fold():
    g = FloatGraph()
    x = g.input(2, 4)
    ramp = g.call(aten.arange.default, 4)
    gm, inputs = g.finish(g.call(aten.index_select.default, x, 1, ramp))
    fold(gm)
    assert constant(gm, next(calls(gm, aten.index_select.default)).args[2]).dtype == torch.int64
    assert torch.equal(outputs(gm, inputs)[0], inputs[0])


def test_parts_of_a_list_fold():
    g = FloatGraph()
    x, c = g.input(2, 4), g.constant(g.normal(8))
    half = g.call(aten.chunk.default, c, 2)
    gm, inputs = g.finish(g.add(x, g.call(operator.getitem, half, 1)))
    before = outputs(gm, inputs)
    fold(gm)
    assert torch.equal(outputs(gm, inputs)[0], before[0])
    assert len(list(gm.graph.nodes)) == 4


def test_expanded_constant_owns_its_memory():
    g = FloatGraph()
    x, c = g.input(2, 4), g.constant(g.normal(1))
    gm, _ = g.finish(g.add(x, g.call(aten.expand.default, c, [4])))
    fold(gm)
    folded = constant(gm, gm.graph.find_nodes(op="get_attr")[0])
    assert folded.is_contiguous()
    assert folded.untyped_storage().nbytes() == 4 * 8


def test_inplace_on_a_constant_leaves_the_constant():
    g = FloatGraph()
    x, c = g.input(2, 4), g.constant(torch.tensor([-1.0, 2.0, -3.0, 4.0]))
    kept = g.root.constant0
    gm, inputs = g.finish(g.add(x, g.call(aten.relu_.default, g.call(aten.detach.default, c))))
    kept.copy_(torch.tensor([-1.0, 2.0, -3.0, 4.0]))  # building the graph ran it
    fold(gm)
    assert kept.tolist() == [-1, 2, -3, 4]
    torch.testing.assert_close(outputs(gm, inputs)[0], inputs[0] + torch.tensor([0.0, 2, 0, 4], dtype=torch.float64))


def test_refuses_to_grow(monkeypatch):
    g = FloatGraph()
    x, c = g.input(2, 4), g.constant(g.normal(1))
    gm, _ = g.finish(g.add(x, g.call(aten.expand.default, c, [4])))
    monkeypatch.setattr(fold_constants, "MAX_GROWTH", 23)  # 4 float64 from 1: 24 bytes more
    plan = FoldConstants().plan(gm)
    assert not plan.matches
    assert "more than its inputs" in str(plan.rejects[0])
    monkeypatch.setattr(fold_constants, "MAX_GROWTH", 24)
    assert len(FoldConstants().plan(gm).matches) == 1


@pytest.mark.parametrize("target", [aten.rand.default, aten.randn.default])
def test_random_numbers_stay(target):
    g = FloatGraph()
    gm, _ = g.finish(g.add(g.input(2, 4), g.call(target, [4])))
    assert not FoldConstants().plan(gm).matches


def test_what_depends_on_an_input_stays():
    g = FloatGraph()
    x = g.input(2, 4)
    gm, _ = g.finish(g.add(x, g.call(aten.zeros_like.default, x)))
    assert not FoldConstants().plan(gm).matches


def test_the_folded_constant_knows_its_origin():
    gm = capture(nn.Sequential(weight_norm_model()).eval(), (torch.randn(2, 3, 6, 6),)).graph_module
    fold(gm)
    weight = next(calls(gm, aten.conv2d.default)).args[1]
    assert tensor_meta(weight).origin.module.startswith("0")
