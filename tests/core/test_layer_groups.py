"""Labels: which channels must be scaled alike, which cannot be scaled, and why."""

import pytest
import torch

from fxcompress.analysis.layer_groups import FIXED, LayerGroups
from tests.support.float_graphs import FloatGraph, aten


def groups_of(build):
    g = FloatGraph()
    gm, _ = g.finish(*build(g))
    return LayerGroups(gm)


def labels(groups, name):
    node = next(n for n in groups.labels if n.name.replace("_default", "").replace("_tensor", "") == name)
    return groups.labels[node].flatten().tolist()


def image(g, channels=3):
    return g.input(2, channels, 8, 8)


def relu6(g, x):
    return g.call(aten.clamp.default, x, 0, 6)


def chain(g):
    x = g.relu(g.conv(image(g), 4, 3))
    x = relu6(g, g.conv(x, 4, 3, groups=4))
    return (g.conv(x, 2),)


def test_every_link_of_a_chain_is_a_group_with_its_own_labels():
    groups = groups_of(chain)
    assert [str(group) for group in groups.groups] == ["conv0 -> conv1", "conv1 -> conv2"]
    first, second = (set(labels(groups, name)) for name in ("conv2d", "conv2d_1"))
    assert len(first) == len(second) == 4
    assert not first & second and FIXED not in first | second
    assert labels(groups, "clamp") == labels(groups, "conv2d")
    assert {*labels(groups, "x0"), *labels(groups, "conv2d_2")} == {FIXED}


def residual(g):
    x = g.relu(g.conv(image(g), 4))
    for _ in range(2):
        x = g.relu(g.add(g.conv(g.relu(g.conv(x, 5)), 4), x))
    return (g.conv(x, 2),)


def test_a_residual_stream_is_one_group_of_all_writers_and_readers():
    groups = groups_of(residual)
    stream = groups.groups[0]
    assert str(stream) == "conv0, conv2, conv4 -> conv1, conv3, conv5"
    assert stream.blocked is None
    assert labels(groups, "conv2d") == labels(groups, "conv2d_2") == labels(groups, "add_1")
    assert len(groups.groups) == 3


def test_concatenation_joins_labels():
    def build(g):
        x = image(g)
        return (g.conv(g.cat(g.conv(x, 2), g.conv(x, 3)), 2),)

    groups = groups_of(build)
    assert labels(groups, "cat") == labels(groups, "conv2d") + labels(groups, "conv2d_1")
    assert len(groups.groups) == 1


def test_channels_that_meet_a_graph_input_stay_and_the_others_are_free():
    groups = groups_of(lambda g: (g.conv(g.cat(x := image(g), g.conv(x, 2)), 2),))
    assert labels(groups, "cat")[:3] == [FIXED] * 3
    assert FIXED not in labels(groups, "cat")[3:]
    assert groups.groups[0].blocked is None


def test_flattening_repeats_labels():
    def build(g):
        x = g.conv(image(g), 3)
        return (g.linear(g.call(aten.reshape.default, x, [-1, 3 * 64]), 5),)

    groups = groups_of(build)
    assert labels(groups, "reshape") == [n for n in labels(groups, "conv2d") for _ in range(64)]


def test_a_pixel_shuffle_ties_the_channels_it_mixes():
    def build(g):
        x = g.call(aten.reshape.default, g.conv(image(g), 8), [-1, 2, 2, 2, 8, 8])
        x = g.call(aten.permute.default, x, [0, 1, 4, 2, 5, 3])
        return (g.conv(g.call(aten.reshape.default, x, [-1, 2, 16, 16]), 3),)

    groups = groups_of(build)
    tied = labels(groups, "conv2d")
    assert tied == [tied[0]] * 4 + [tied[4]] * 4
    assert tied[0] != tied[4] and FIXED not in tied


def test_padding_with_new_channels_gives_them_labels_of_their_own():
    """The shortcut of CIFAR ResNets: subsample, then append channels of zeros."""

    def build(g):
        x = g.relu(g.conv(image(g), 4))
        wide = g.call(aten.constant_pad_nd.default, x, [0, 0, 0, 0, 1, 1], 0.0)
        return (g.conv(g.add(g.conv(x, 6), wide), 2),)

    groups = groups_of(build)
    assert labels(groups, "constant_pad_nd")[1:5] == labels(groups, "conv2d")
    assert FIXED not in labels(groups, "add")


def branch(between):
    def build(g):
        return (g.conv(between(g, g.conv(image(g), 4)), 2),)

    return build


def shared(g):
    x = g.conv(image(g, 4), 4, weight=(w := g.constant(g.normal(4, 4, 1, 1))))
    return (g.conv(g.relu(x), 4, weight=w),)


def broadcast(g):
    x = g.conv(image(g), 4)
    return (g.conv(g.add(x, g.call(aten.mean.dim, x, [2, 3], True)), 2),)


def also_output(g):
    x = g.conv(image(g), 4)
    return g.conv(g.relu(x), 2), x


BLOCKED = {
    "table": (branch(lambda g, x: g.call(aten.sigmoid.default, x)), "sigmoid.default does not commute"),
    "product": (branch(lambda g, x: g.call(aten.mul.Tensor, x, x)), "mul.Tensor does not commute"),
    "number": (branch(lambda g, x: g.call(aten.add.Tensor, x, 3.0)), "it adds a number"),
    "padding": (branch(lambda g, x: g.call(aten.constant_pad_nd.default, x, [1, 1], 2.0)), "it pads with 2"),
    "shared weight": (shared, "weight shared with conv2d_default_1"),
    "broadcast": (broadcast, "it broadcasts an operand"),
    "graph output": (also_output, "it is a graph output"),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_what_does_not_commute_blocks_the_group_and_says_so(name):
    build, reason = BLOCKED[name]
    assert reason in str(groups_of(build).groups[0].blocked)


def test_kept_modules_are_left_alone():
    g = FloatGraph()
    gm, _ = g.finish(*chain(g))
    next(n for n in gm.graph.nodes if n.name == "conv2d_default_1").meta["keep_float"] = True
    groups = LayerGroups(gm)
    assert all("keep_float names its module" in str(group.blocked) for group in groups.groups)


def test_labels_have_the_rank_of_their_tensor():
    groups = groups_of(residual)
    for node, own in groups.labels.items():
        assert own.ndim == node.meta["val"].ndim
        assert torch.all(own < groups.count)
