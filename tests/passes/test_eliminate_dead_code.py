"""Nothing remains that no output depends on; graph inputs do."""

import torch

from fxcompress.graph import placeholders
from fxcompress.passes.eliminate_dead_code import EliminateDeadCode
from tests.support.float_graphs import FloatGraph, outputs


def dead_branch():
    g = FloatGraph()
    x, unused = g.input(2, 3, 4, 4), g.input(2, 3)
    y = g.conv(x, 4)
    g.relu(g.conv(y, 5))  # read by nobody
    del unused
    return g.finish(y)


def test_removes_the_branch_and_its_weights():
    gm, inputs = dead_branch()
    expected = outputs(gm, inputs)
    gm.register_buffer("forgotten", torch.zeros(1))
    plan = EliminateDeadCode().plan(gm)
    assert {m.node.name for m in plan.matches} >= {
        "conv2d_default_1",
        "clamp_default",
        "conv_weight1",
        "conv_bias1",
        "output",
    }
    assert "drop the unread constant forgotten" in str(plan)
    EliminateDeadCode().apply(plan)
    gm.recompile()
    assert sorted(dict(gm.named_buffers())) == ["conv_bias0", "conv_weight0"]
    assert len(placeholders(gm)) == 2
    assert torch.equal(outputs(gm, inputs)[0], expected[0])
    assert plan.applied == len(plan.matches) == 5


def test_plan_changes_nothing_and_a_second_plan_is_empty():
    gm, _ = dead_branch()
    nodes = len(gm.graph.nodes)
    EliminateDeadCode().plan(gm)
    assert len(gm.graph.nodes) == nodes
    EliminateDeadCode().apply(EliminateDeadCode().plan(gm))
    assert not EliminateDeadCode().plan(gm).matches


def test_a_live_graph_is_left_alone():
    g = FloatGraph()
    gm, _ = g.finish(g.relu(g.conv(g.input(2, 3, 4, 4), 4)))
    assert not EliminateDeadCode().plan(gm).matches
