"""Shapes follow every change, cost nothing when nothing changed, and channels are followed where they can be."""

import pytest
import torch
from torch import fx, nn

from fxcompress import shapes
from fxcompress.capture import capture
from fxcompress.errors import InternalError
from fxcompress.graph import calls, placeholders, shape
from fxcompress.meta import tensor_meta
from fxcompress.shapes import channel_axis, compute, propagate, trace_shapes
from tests.support.float_graphs import FloatGraph, aten
from tests.support.graphs import build


def image(g, *tail):
    return g.input(2, *(tail or (4, 6, 8)))


def conv_chain():
    g = FloatGraph()
    return g.finish(g.relu(g.conv(g.conv(image(g), 5, 3), 6)))


def evaluations(monkeypatch):
    """Names of the nodes that are computed from now on."""
    seen, original = [], shapes._evaluate
    monkeypatch.setattr(
        shapes, "_evaluate", lambda gm, node, mode: (seen.append(node.name), original(gm, node, mode))[1]
    )
    return seen


def test_an_unchanged_graph_is_not_computed_again(monkeypatch):
    gm, _ = conv_chain()
    seen = evaluations(monkeypatch)
    propagate(gm)
    assert seen == []


def test_a_new_argument_recomputes_until_shapes_agree_again(monkeypatch):
    gm, _ = conv_chain()
    first, second = calls(gm, aten.conv2d.default)
    seen = evaluations(monkeypatch)
    first.args = (*first.args[:4], [1, 1], *first.args[5:])  # padding: a larger image
    propagate(gm)
    assert seen == [n.name for n in gm.graph.nodes if n.op == "call_function"]
    assert shape(second)[2:] == (6, 8)
    seen.clear()
    first.args = (*first.args[:3], [2, 2], [3, 4], *first.args[5:])
    first.args = (*first.args[:3], [1, 1], [1, 1], *first.args[5:])
    propagate(gm)
    assert seen == []


def test_an_inserted_node_is_the_only_one_computed(monkeypatch):
    gm, _ = conv_chain()
    first = next(calls(gm, aten.conv2d.default))
    seen = evaluations(monkeypatch)
    with gm.graph.inserting_after(first):
        new = gm.graph.call_function(aten.abs.default, (first,))
    first.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    propagate(gm)
    assert seen == [new.name]


def test_a_weight_of_another_shape_is_noticed():
    gm, _ = conv_chain()
    second = list(calls(gm, aten.conv2d.default))[1]
    gm.conv_weight1, gm.conv_bias1 = torch.zeros(9, 5, 1, 1).double(), torch.zeros(9).double()
    propagate(gm)
    assert shape(second)[1] == 9


def test_integers_and_floats_are_different_arguments():
    g = FloatGraph()
    gm, _ = g.finish(g.call(aten.mul.Tensor, g.constant(torch.tensor([1, 2])), 2), g.input(2, 3))
    node = next(calls(gm, aten.mul.Tensor))
    assert node.meta["val"].dtype == torch.int64
    node.args = (node.args[0], 2.0)
    propagate(gm)
    assert node.meta["val"].dtype == torch.float32


def test_the_batch_stays_symbolic():
    gm, _ = conv_chain()
    for node in calls(gm, aten.conv2d.default, aten.clamp.default):
        assert isinstance(shape(node)[0], torch.SymInt)
    assert shape(placeholders(gm)[0])[0].node.expr == shape(node)[0].node.expr


def test_inputs_of_equal_batch_share_the_symbol_and_others_do_not():
    g = FloatGraph()
    a, b, c = g.input(2, 3), g.input(2, 5), g.input(7, 3)
    gm, _ = g.finish(a, b, c)
    x, y, z = (shape(n)[0].node.expr for n in placeholders(gm))
    assert x == y != z


def test_shapes_agree_with_the_tensors():
    """Every node of some models: FakeTensor shape at batch 2 = shape of the real tensor."""
    for name in ("downsampling_block", "concat_block", "upsampling_block", "conv1d", "dict_output"):
        model, inputs = build(name)
        gm = capture(model, inputs).graph_module
        for node in gm.graph.nodes:
            node.meta.pop("shape_key", None)
            if node.op != "placeholder":
                node.meta.pop("val", None)
        propagate(gm)
        recorder = _Recorder(gm)
        recorder.run(*inputs)
        for node, real in recorder.values.items():
            fake = node.meta["val"]
            if isinstance(real, torch.Tensor):
                assert fake.dtype == real.dtype
                assert [s.node.hint if isinstance(s, torch.SymInt) else s for s in fake.shape] == list(real.shape)


class _Recorder(fx.Interpreter):
    def __init__(self, gm):
        super().__init__(gm)
        self.values = {}

    def run_node(self, node):
        value = super().run_node(node)
        if node.op != "output":
            self.values[node] = value
        return value


def test_known_shapes_are_taken_as_they_are(monkeypatch):
    gm, _ = conv_chain()
    conv = next(calls(gm, aten.conv2d.default))
    with gm.graph.inserting_after(conv):
        new = gm.graph.call_function(aten.neg.default, (conv,))
    new.meta["val"] = conv.meta["val"]
    seen = evaluations(monkeypatch)
    compute(gm, new, known=True)
    propagate(gm)
    assert seen == []
    assert tensor_meta(new).channel_axis == 1


def test_errors_name_the_node():
    gm, _ = conv_chain()
    conv = next(calls(gm, aten.conv2d.default))
    gm.conv_weight0 = torch.zeros(5, 3, 3, 3)
    with pytest.raises(
        InternalError, match=r"propagate: conv2d_default \[conv0\]: aten.conv2d.default does not accept"
    ):
        propagate(gm)
    del conv.meta["val"]
    for node in placeholders(gm):
        del node.meta["val"]
    with pytest.raises(InternalError, match="placeholder x0 has no shape"):
        propagate(gm)
    with pytest.raises(InternalError, match="2 example inputs for 1 placeholders"):
        trace_shapes(gm, (torch.zeros(2, 4), torch.zeros(2)))


def reshape(*sizes):
    return lambda g: g.call(aten.reshape.default, image(g), [-1, *sizes])


def on_image(target, *args):
    return lambda g: g.call(target, image(g), *args)


#: name -> (graph, channel axis of its output)
AXES = {
    "vector": (lambda g: g.input(7), None),
    "features": (lambda g: g.input(2, 5), 1),
    "sequence": (lambda g: g.input(2, 5, 9), 1),
    "image": (image, 1),
    "conv": (lambda g: g.conv(image(g), 3), 1),
    "conv_transpose": (lambda g: g.conv_transpose(image(g), 3), 1),
    "batch norm": (lambda g: g.batch_norm(image(g)), 1),
    "linear": (lambda g: g.linear(image(g), 3), 3),
    "relu": (lambda g: g.relu(image(g)), 1),
    "max pool": (on_image(aten.max_pool2d.default, [2, 2], [2, 2], [0, 0], [1, 1], False), 1),
    "add of a constant": (lambda g: g.add(g.constant(g.normal(4, 6, 8)), image(g)), 1),
    "gate": (lambda g: g.call(aten.mul.Tensor, image(g), g.call(aten.mean.dim, image(g), [2, 3], True)), 1),
    "broadcast of a lower rank": (lambda g: g.add(g.call(aten.mean.dim, image(g), [0, 1, 2]), image(g)), 1),
    "cat": (lambda g: g.cat(image(g), image(g), dim=2), 1),
    "permute": (on_image(aten.permute.default, [0, 2, 3, 1]), 3),
    "mean, kept": (on_image(aten.mean.dim, [2, 3], True), 1),
    "mean, dropped": (on_image(aten.mean.dim, [-1, -2]), 1),
    "mean of channels": (on_image(aten.mean.dim, [1]), None),
    "mean behind permute": (lambda g: g.call(aten.mean.dim, g.call(aten.permute.default, image(g), [0, 2, 3, 1]), [1, 2]), 1),
    "select": (on_image(aten.select.int, 2, 0), 1),
    "select a channel": (on_image(aten.select.int, 1, 0), None),
    "flatten": (reshape(192), 1),
    "flatten the space": (reshape(4, 48), 1),
    "split the channels": (reshape(2, 2, 6, 8), None),
    "merge batch and channels": (reshape(6, 8), None),
    "behind a lost axis": (lambda g: g.relu(reshape(2, 2, 6, 8)(g)), None),
    "matmul": (lambda g: g.call(aten.matmul.default, image(g, 3, 5), image(g, 5, 3)), None),
    "expand to a higher rank": (lambda g: g.call(aten.expand.default, image(g), [2, -1, -1, -1, -1]), None),
}  # fmt: skip


@pytest.mark.parametrize("name", AXES)
def test_channel_axis(name):
    make, expected = AXES[name]
    g = FloatGraph()
    gm, _ = g.finish(make(g))
    node = next(n for n in gm.graph.nodes if n.op == "output").args[0][0]
    assert channel_axis(node) == expected
    assert tensor_meta(node).channel_axis == expected


def test_channel_blocks_of_a_flattened_image():
    """The documented order: feature c * S + s of the flattened tensor is channel c at place s."""
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert torch.equal(x.reshape(1, 24)[:, 12:], x[:, 1].reshape(1, 12))


def test_constants_have_no_channel_axis():
    gm = capture(nn.Conv2d(3, 4, 1).eval(), (torch.randn(2, 3, 4, 4),)).graph_module
    assert all(tensor_meta(n).channel_axis is None for n in gm.graph.nodes if n.op == "get_attr")
