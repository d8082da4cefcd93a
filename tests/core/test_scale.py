"""The compiler's work grows with the network and no faster: counts of what is expensive, and no recursion along a chain."""

import contextlib
import inspect
import sys

import pytest
import torch
from torch import fx, nn

from fxcompress import default_passes, promises, shapes
from fxcompress.analysis.affine import Affine
from fxcompress.analysis.affine_regions import Region, backward_region
from fxcompress.capture import capture
from fxcompress.graph import add_constant, calls, copy_graph_module, erase_dead, twins
from fxcompress.options import CompileOptions, Context
from fxcompress.pass_manager import PassManager
from fxcompress.passes.fold_batch_norm import FoldBatchNorm
from fxcompress.passes.fold_constants import FoldConstants
from fxcompress.verify import verify
from tests.support.float_graphs import FloatGraph, aten, outputs
from tests.support.graphs import images, randomize

FRAMES = (
    250  # what torch needs for one operator, with room; a chain of 400 blocks needs more if anything recurses along it
)


@contextlib.contextmanager
def few_frames():
    """Recursion may go ``FRAMES`` deeper than here."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + FRAMES)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def chain(blocks: int) -> tuple[fx.GraphModule, tuple]:
    """``blocks`` residual blocks relu(x + conv(x)) on tiny images: 5 nodes each."""
    g = FloatGraph(dtype=torch.float32)
    x = g.input(2, 2, 2, 2)
    for _ in range(blocks):
        weight = g.constant(0.1 * g.normal(2, 2, 1, 1), "weight")
        x = g.relu(g.add(x, g.conv(x, 2, weight=weight)))
    gm, inputs = g.finish(x)
    gm.meta["fxcompress"] = Context(CompileOptions(input_range=(-4.0, 4.0)), inputs)
    return gm, inputs


class Stack(nn.Module):
    """Blocks in one container, as models stack them."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)) for _ in range(blocks)])

    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return x


class Counts:
    """How often each of the named functions is called."""

    def __init__(self, monkeypatch, **functions):
        self.calls = dict.fromkeys(functions, 0)
        for name, (owner, attribute) in functions.items():
            monkeypatch.setattr(owner, attribute, self._counted(name, getattr(owner, attribute)))

    def _counted(self, name, function):
        def counted(*args, **kwargs):
            self.calls[name] += 1
            return function(*args, **kwargs)

        return counted


def work(blocks: int) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        counts = Counts(
            patch,
            code=(fx.Graph, "python_code"),
            copies=(promises, "copy_graph_module"),
            runs=(promises._Recorder, "run"),
            shapes=(shapes, "_evaluate"),
            searches=(fx.Graph, "find_nodes"),
        )
        captured = capture(randomize(Stack(blocks)), (images(2, 2, 2, 2),))
        gm = captured.graph_module
        counts.calls["code"] = 0  # of torch.export
        gm.meta["fxcompress"] = Context(CompileOptions(input_range=(-4.0, 4.0)), captured.example_inputs)
        manager = PassManager(default_passes("int8"))
        manager.run(gm)
    return counts.calls | {"changed": [r.name for r in manager.records if r.rewrites]}


def test_what_is_expensive_is_done_once_per_pass_and_not_once_per_rewrite():
    small, large = work(3), work(9)
    assert small["code"] == large["code"] == 0  # nobody called a graph: everything was read or interpreted
    assert large["copies"] == small["copies"] <= 1 + 2 * len(small["changed"])
    assert large["runs"] == small["runs"]
    assert large["searches"] - small["searches"] <= 6  # at most once per block added
    assert large["shapes"] < 1.5 * small["shapes"]  # equal operators on equal shapes; only guard bits and shifts vary


def test_a_chain_of_2000_nodes_compiles_without_recursion():
    gm, inputs = chain(400)
    assert len(gm.graph.nodes) > 2000
    expected = outputs(gm, inputs)[0]
    with few_frames():
        gm = PassManager(default_passes("int8")).run(gm)
        certificate = verify(gm)
    assert certificate.integer_only and len(list(calls(gm, torch.ops.fxcompress.conv.default))) == 400
    assert outputs(gm, inputs)[0].shape == expected.shape


def test_a_long_sum_absorbs_a_map_without_recursion():
    g = FloatGraph()
    x = g.input(2, 2, 1, 1)
    first = total = g.conv(x, 2)
    for _ in range(400):
        total = g.add(g.conv(x, 2), total)
    reader = g.batch_norm(total)
    g.finish(reader)
    with few_frames():
        region = backward_region(total, reader, Affine.per_channel(torch.ones(2), torch.ones(2), ndim=4))
    assert isinstance(region, Region) and len(region.layers) == 401 and first in region.layers


def test_a_long_constant_computation_folds_without_recursion():
    g = FloatGraph()
    value = g.constant(torch.ones(2))
    for _ in range(400):
        value = g.call(aten.add.Tensor, value, value if g.values[value].max() < 8 else g.constant(torch.ones(2)))
    gm, inputs = g.finish(g.add(g.input(2, 2), value))
    expected = outputs(gm, inputs)[0]
    with few_frames():
        plan = FoldConstants().plan(gm)
        FoldConstants().apply(plan)
    gm.recompile()
    assert plan.applied == 1 and torch.equal(outputs(gm, inputs)[0], expected)


def test_constants_that_ask_for_one_name_are_numbered_in_order():
    gm, _ = chain(1)
    like = next(iter(gm.graph.nodes))
    with gm.graph.inserting_after(like):
        names = [add_constant(gm, "a.b", torch.zeros(1), like).target for _ in range(40)]
    assert names == ["a_b", *[f"a_b_{i}" for i in range(1, 40)]]


def test_unread_tensors_and_empty_modules_go():
    gm = capture(randomize(Stack(2)), (images(2, 2, 2, 2),)).graph_module
    conv = next(calls(gm, aten.conv2d.default))
    conv.replace_all_uses_with(conv.args[0])
    erase_dead(gm)
    left = {name for name, _ in gm.named_buffers()}
    assert not any(name.startswith("blocks.0.0.") for name in left) and "blocks.0.1.weight" in left
    assert {n.target for n in gm.graph.nodes if n.op == "get_attr"} == left
    assert "blocks.0.0" not in dict(gm.named_modules()) and "blocks.0.1" in dict(gm.named_modules())


def test_a_copied_graph_shares_tensors_and_generates_code_when_called():
    gm, inputs = chain(2)
    copied = copy_graph_module(gm)
    assert dict(copied.named_buffers())["weight0"] is dict(gm.named_buffers())["weight0"]
    next(calls(gm, aten.clamp.default)).args = (next(calls(gm, aten.add.Tensor)), 5, None)
    gm.recompile()
    assert not torch.equal(outputs(copied, inputs)[0], outputs(gm, inputs)[0])
    assert "clamp" in copied.code


def test_twins_are_the_nodes_that_name_one_constant():
    g = FloatGraph()
    weight = g.constant(g.normal(2, 2, 1, 1))
    again = g.graph.get_attr(weight.target)
    assert twins(g.graph) == {weight.target: [weight, again]}
    assert FoldBatchNorm._shared is None
