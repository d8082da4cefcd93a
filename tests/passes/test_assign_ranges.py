"""Ranges: declared, propagated, calibrated and reused; who is observed, who is clipped, who is refused."""

import math
from types import SimpleNamespace as Nodes

import pytest
import torch

from fxcompress.analysis.quantization import ranged_nodes
from fxcompress.errors import CalibrationError, InputError
from fxcompress.meta import Range, Statistics, describe, tensor_meta
from fxcompress.options import RANGE_METHODS, Choices, CompileOptions, Context
from fxcompress.passes.assign_ranges import AssignRanges
from tests.support.float_graphs import FloatGraph, aten


def network(build, calibrate=None, ranges=None, examples=True, **options):
    g = FloatGraph(dtype=torch.float32)
    nodes = build(g)
    gm, inputs = g.finish(list(vars(nodes).values())[-1])
    gm.meta["fxcompress"] = Context(
        CompileOptions(**options), inputs if examples else (), calibrate, Choices(ranges or {})
    )
    return gm, inputs, nodes


def block(g):
    """x -> first (conv with batch-norm statistics) -> relu -> second (conv) -> + relu -> joined (relu) -> mean -> head"""
    x = g.input(2, 3, 6, 6)
    first = g.conv(x, 4, 3, padding=1)
    normal = torch.tensor([0.0, 1.0, -1.0, 2.0]).double(), torch.tensor([1.0, 0.5, 2.0, 0.1]).double()
    describe(
        first, statistics=Statistics(*normal, torch.full((4,), -math.inf), torch.full((4,), math.inf), "batch_norm")
    )
    relu = g.relu(first)
    second = g.conv(relu, 4, 3, padding=1)
    joined = g.relu(g.add(second, relu))
    head = g.linear(g.call(aten.mean.dim, joined, [2, 3]), 5)
    return Nodes(x=x, first=first, relu=relu, second=second, joined=joined, head=head)


def assign(gm):
    plan = AssignRanges().plan(gm)
    AssignRanges().apply(plan)
    return plan


def range_of(node):
    return tensor_meta(node).range


def feed(*batches):
    return lambda module: [module(b) for b in batches]


def observed(gm, inputs, node):
    values = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Recorder(gm).run(*inputs)
    return values[node].double()


# ------------------------------------------------------------------------------------------------------------ data-free


def test_every_activation_gets_statistics_and_a_range():
    gm, _, n = network(block, input_range=(-4, 4))
    plan = assign(gm)
    activations = [node for node in gm.graph.nodes if node.op in ("placeholder", "call_function")]
    assert [m.node for m in plan.matches] == activations and plan.applied == len(activations)
    assert all(range_of(node) is not None and tensor_meta(node).statistics is not None for node in activations)
    assert range_of(n.x).bounds == (-4, 4) and range_of(n.x).provenance == "declared"
    assert range_of(n.first).provenance == "batch_norm 6 sigma"
    assert range_of(n.relu).lo.tolist() == pytest.approx([0, 0, 0, 1.4])
    assert range_of(n.relu).hi.tolist() == pytest.approx([6, 4, 11, 2.6])
    assert {range_of(node).provenance for node in (n.second, n.joined, n.head)} == {"propagated 6 sigma"}
    assert f"{n.x.name}: [-4, 4] declared" in str(plan)


def test_values_do_not_change_and_nothing_is_left_to_do():
    gm, inputs, _ = network(block, input_range=(-4, 4))
    before = gm(*inputs)[0]
    code = gm.code
    assign(gm)
    assert torch.equal(gm(*inputs)[0], before) and gm.code == code
    second = AssignRanges().plan(gm)
    assert len(second) == 0 and not AssignRanges().apply(second).modified


def test_planning_changes_nothing():
    gm, _, nodes = network(block, feed(torch.randn(3, 3, 6, 6)))
    AssignRanges().plan(gm)
    assert all(range_of(n) is None for n in vars(nodes).values())


def test_a_guessed_input_is_told():
    gm, (example,), n = network(block)
    assign(gm)
    width = float(example.max() - example.min())
    assert range_of(n.x).provenance == "guessed"
    assert range_of(n.x).bounds[1] == pytest.approx(float(example.max()) + 0.1 * width)


def test_no_range_for_the_input_is_an_error():
    gm, _, _ = network(block, examples=False)
    with pytest.raises(InputError, match="calibration_data"):
        AssignRanges().plan(gm)


def odd(g):
    """An operator without a rule, in the way of the data."""
    x = g.input(2, 3, 6, 6)
    flipped = g.call(aten.flip.default, x, [3])
    return Nodes(flipped=flipped, out=g.relu(g.conv(g.relu(flipped), 4)))


def test_without_statistics_calibration_is_asked_for():
    gm, _, n = network(odd, input_range=(-4, 4))
    with pytest.raises(CalibrationError, match=rf"{n.flipped.name}.*no statistics reach.*Pass calibration_data"):
        AssignRanges().plan(gm)


def test_with_calibration_the_same_graph_passes():
    gm, _, n = network(odd, feed(torch.randn(8, 3, 6, 6)))
    assign(gm)
    assert range_of(n.flipped).provenance == "calibrated mse"


def test_what_needs_no_range_is_refused_quietly():
    def build(g):
        x, unused = g.input(2, 3), g.input(2, 3)
        return Nodes(unused=unused, relu=g.relu(x))

    gm, _, n = network(build, input_range=(-1, 1))
    plan = assign(gm)
    assert [r.node for r in plan.rejects] == [n.unused] and "needs no range" in str(plan)
    assert len(AssignRanges().plan(gm)) == 0


# ----------------------------------------------------------------------------------------------------------- calibrated


def test_observed_tensors_get_the_chosen_range_and_the_others_the_propagated_one():
    data = torch.randn(64, 3, 6, 6)
    gm, _, n = network(block, feed(data), range_method="minmax")
    needed = ranged_nodes(gm)
    assign(gm)
    for node in needed:
        s, r, value = tensor_meta(node).statistics, range_of(node), observed(gm, [data], node)
        assert s.provenance == "calibrated" and r.provenance == "calibrated minmax"
        assert r.bounds == pytest.approx((float(value.min()), float(value.max())))
        torch.testing.assert_close(s.mean, value.movedim(1, 0).flatten(1).mean(1), rtol=1e-5, atol=1e-6)
    assert n.first not in needed and range_of(n.first).provenance == "batch_norm 6 sigma"
    assert n.head not in needed and range_of(n.head).provenance == "propagated 6 sigma"
    assert tensor_meta(n.first).statistics.provenance == "batch_norm"


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_every_method_assigns_every_range(method):
    data = torch.cat([torch.randn(32, 3, 6, 6), 30 * torch.randn(1, 3, 6, 6)])
    gm, _, n = network(block, feed(data), range_method=method, percentile=99.0)
    assign(gm)
    assert range_of(n.relu).provenance == f"calibrated {method}"
    top = float(observed(gm, [data], n.relu).max())
    assert 0 < range_of(n.relu).bounds[1] <= top * 1.0001
    assert method in ("minmax", "mse") or range_of(n.relu).bounds[1] < 0.9 * top
    assert range_of(n.x).provenance == "calibrated minmax"  # graph inputs are never clipped
    assert range_of(n.second).provenance == "calibrated minmax"  # a branch stays unrounded: its extremes are asked for


def test_fewer_bits_clip_more():
    data = torch.randn(32, 3, 6, 6)
    tops = []
    for target in ("w8a8", "w8a4"):
        gm, _, n = network(block, feed(data), target=target)
        assign(gm)
        tops.append(range_of(n.relu).bounds[1])
    assert tops[1] < 0.8 * tops[0]


def test_a_channel_is_not_given_more_than_it_took():
    data = torch.randn(32, 3, 6, 6)
    gm, _, n = network(block, feed(data))
    assign(gm)
    r, value = range_of(n.relu), observed(gm, [data], n.relu)
    highest = value.movedim(1, 0).flatten(1).amax(1)
    torch.testing.assert_close(r.hi, torch.clamp(highest, max=r.bounds[1]), rtol=1e-5, atol=1e-6)
    assert r.hi.min() < r.hi.max()


def test_a_channel_beyond_the_clip_keeps_a_legal_interval():
    def build(g):
        x = g.input(2, 2, 4, 4)
        weight = g.constant(torch.eye(2).reshape(2, 2, 1, 1))
        return Nodes(out=g.conv(g.relu(g.conv(x, 2, weight=weight, bias=False)), 2))

    data = torch.rand(512, 2, 4, 4)
    data[:, 1] = 0
    data[0, 1] = 1000.0  # one example; its channel is 0 otherwise
    gm, _, _ = network(build, feed(data), range_method="percentile", percentile=99.0)
    assign(gm)
    relu = next(n for n in gm.graph.nodes if n.target is aten.clamp.default)
    assert (range_of(relu).lo <= range_of(relu).hi).all() and range_of(relu).bounds[1] < 2


def test_a_declared_input_range_wins_over_the_data():
    gm, _, n = network(block, feed(torch.rand(8, 3, 6, 6)), input_range=(0.0, 1.0))
    assign(gm)
    assert range_of(n.x).bounds == (0, 1) and range_of(n.x).provenance == "declared"
    assert tensor_meta(n.x).statistics.provenance == "calibrated"


def test_data_far_outside_the_declared_range_are_a_mistake():
    gm, _, _ = network(block, feed(255 * torch.rand(8, 3, 6, 6)), input_range=(0.0, 1.0))
    with pytest.raises(CalibrationError, match=r"calibration inputs span \[0.*expected values in input_range \[0, 1\]"):
        AssignRanges().plan(gm)


def test_data_slightly_outside_are_not():
    gm, _, _ = network(block, feed(1.05 * torch.rand(8, 3, 6, 6)), input_range=(0.0, 1.0))
    assert len(AssignRanges().plan(gm)) > 0


def test_nan_in_the_data_names_the_node():
    bad = torch.full((2, 3, 6, 6), math.nan)
    gm, _, n = network(block, feed(bad))
    with pytest.raises(CalibrationError, match=rf"{n.x.name}.*NaN"):
        AssignRanges().plan(gm)


def test_the_data_are_run_once():
    runs = []

    def run(module):
        runs.append(1)
        module(torch.randn(4, 3, 6, 6))

    gm, _, _ = network(block, run)
    assign(gm)
    AssignRanges().plan(gm)
    assert len(runs) == 1


# --------------------------------------------------------------------------------------------------------------- reused


def test_ranges_of_an_earlier_compilation_are_reused_without_data():
    first, _, _ = network(block, feed(torch.randn(16, 3, 6, 6)))
    assign(first)
    ranges = {n.name: range_of(n) for n in first.graph.nodes if range_of(n) is not None}
    again, _, _ = network(block, ranges=ranges, examples=True)
    assign(again)
    for old, new in zip(first.graph.nodes, again.graph.nodes):
        assert range_of(old) is range_of(new)
    assert tensor_meta(next(iter(again.graph.nodes))).statistics is not None


def test_a_range_set_by_hand_is_kept():
    gm, _, n = network(block, input_range=(-4, 4))
    mine = Range(torch.tensor(0.0), torch.tensor(1.0), "by hand")
    describe(n.relu, range=mine)
    plan = assign(gm)
    assert range_of(n.relu) is mine and n.relu not in [m.node for m in plan.matches]
