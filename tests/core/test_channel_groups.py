"""Channel groups: which channels go together, which stay and why, on graphs of every kind."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.analysis.channel_groups import ChannelGroups
from tests.support.float_graphs import FloatGraph, aten
from tests.support.pruning import float_graph


def groups_of(build, shape=(2, 3, 8, 8)):
    g = FloatGraph()
    gm, _ = g.finish(build(g, g.input(*shape)))
    return ChannelGroups(gm)


def names(groups):
    return [group.name for group in groups.groups]


def sizes(groups):
    return [len(group.units) for group in groups.groups]


def reasons(groups):
    return " | ".join(map(str, groups.refusals))


# ---------------------------------------------------------------------------------------------------- what goes together


def test_a_group_prints_what_a_cut_takes():
    groups = groups_of(lambda g, x: g.conv(g.relu(g.batch_norm(g.conv(x, 4, 3))), 2))
    assert str(groups.groups[0]).splitlines() == [
        "conv0: 4 units",
        "  conv_weight0  axis 0  writes  0-3",
        "  conv_bias0    axis 0  writes  0-3",
        "  bn_weight0    axis 0  writes  0-3",
        "  bn_bias0      axis 0  writes  0-3",
        "  bn_mean0      axis 0  reads   0-3",
        "  bn_var0       axis 0  reads   0-3",
        "  conv_weight1  axis 1  reads   0-3",
    ]
    assert reasons(groups) == "not applied at conv2d_default_1 [conv1] because output: it is a graph output"


def residual(g, x):
    x = g.relu(g.conv(x, 4))
    for _ in range(2):
        x = g.relu(g.add(g.conv(g.relu(g.conv(x, 5)), 4), x))
    return g.conv(x, 2)


def test_writers_of_a_residual_stream_go_together():
    groups = groups_of(residual)
    assert names(groups) == ["conv0, conv2, conv4", "conv1", "conv3"]
    assert sizes(groups) == [4, 5, 5]


def test_channels_of_a_concat_stay_apart():
    def build(g, x):
        a, b = g.conv(x, 3), g.conv(x, 5)
        return g.conv(g.batch_norm(g.cat(a, b)), 2)

    groups = groups_of(build)
    assert names(groups) == ["conv0", "conv1"]
    gamma = next(axis for axis in groups.axes if axis.target == "bn_weight0")
    assert gamma.units.tolist() == [*groups.groups[0].units, *groups.groups[1].units]


def test_depthwise_channels_go_with_their_input():
    groups = groups_of(lambda g, x: g.conv(g.conv(g.conv(x, 6), 12, 3, groups=6), 2))
    assert names(groups) == ["conv0, conv1"] and sizes(groups) == [6]


def test_few_groups_lose_the_same_positions():
    groups = groups_of(lambda g, x: g.conv(g.conv(g.conv(x, 8), 12, groups=2), 2))
    assert sizes(groups) == [4, 6]  # each two channels, one of either half


def test_many_groups_go_as_a_whole():
    groups = groups_of(lambda g, x: g.conv(g.conv(g.conv(x, 16), 32, groups=8), 2))
    assert names(groups) == ["conv0, conv1"] and sizes(groups) == [8]


def test_groups_of_a_group_norm_go_as_a_whole():
    def build(g, x):
        weight, bias = (g.constant(g.normal(8), name) for name in ("gn_weight", "gn_bias"))
        return g.conv(g.call(aten.group_norm.default, g.conv(x, 8), 4, weight, bias), 2)

    assert sizes(groups_of(build)) == [4]


def test_features_behind_a_flatten_go_in_blocks():
    groups = groups_of(lambda g, x: g.linear(g.call(aten.reshape.default, g.conv(x, 3), [-1, 3 * 64]), 2))
    columns = next(axis for axis in groups.axes if axis.target == "linear_weight0")
    assert columns.units.tolist() == [unit for unit in groups.groups[0].units for _ in range(64)]


def test_a_gate_goes_with_what_it_gates():
    def build(g, x):
        x = g.conv(x, 6)
        gate = g.call(aten.sigmoid.default, g.conv(g.conv(g.call(aten.mean.dim, x, [2, 3], True), 3), 6))
        return g.conv(g.call(aten.mul.Tensor, x, gate), 2)

    assert names(groups_of(build)) == ["conv0, conv2", "conv1"]


def test_channels_padded_to_a_shortcut_belong_to_the_layers_they_are_added_to():
    def build(g, x):
        x = g.conv(x, 4)
        return g.conv(g.add(g.call(aten.constant_pad_nd.default, x, [0, 0, 0, 0, 2, 2]), g.conv(x, 8)), 2)

    groups = groups_of(build)
    assert names(groups) == ["conv0, conv1", "conv1"] and sizes(groups) == [4, 4]


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


@pytest.mark.parametrize("module", [Attention(24, 3), nn.TransformerEncoderLayer(24, 3, 8, batch_first=True)])
def test_heads_go_as_a_whole(module):
    groups = ChannelGroups(float_graph(module, torch.randn(2, 5, 24)))
    assert len(groups.groups[0].units) == 3
    rows = groups.groups[0].layers[0].rows.units.reshape(3, 3, 8)
    assert all(len(rows[:, head].unique()) == 1 for head in range(3))


def test_features_of_a_single_head_are_its_units():
    assert sizes(ChannelGroups(float_graph(Attention(24, 1), torch.randn(2, 5, 24)))) == [24]


def test_layers_that_share_a_weight_cut_it_alike():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.last(self.twice(self.twice(self.first(x))))

    assert sizes(ChannelGroups(float_graph(Shared(), torch.randn(2, 3, 4, 4)))) == [6]


# ------------------------------------------------------------------------------------------------------------- what stays


@pytest.mark.parametrize(
    "build, reason",
    [
        (lambda g, x: g.add(g.conv(x, 3), x), "its channels are tied to others that stay"),
        (lambda g, x: g.conv(g.call(aten.mean.dim, g.conv(x, 4), [1], True), 2), "it averages over the channels"),
        (lambda g, x: g.conv(g.call(aten.softmax.int, g.conv(x, 4), 1), 2), "it divides by a sum over the channels"),
        (lambda g, x: g.conv(g.call(aten.cumsum.default, g.conv(x, 4), 1), 2), "nothing is known about aten.cumsum"),
        (lambda g, x: g.conv(g.call(aten.sigmoid.default, g.conv(x, 4)), 2, 3, padding=1), "it pads with zeros"),
        (lambda g, x: g.conv(g.call(aten.mul.Tensor, g.conv(x, 1), g.conv(x, 4)), 2), "it is broadcast over channels"),
    ],
    ids=["graph input", "mean", "softmax", "unknown", "constant and padding", "one channel"],
)  # fmt: skip
def test_a_layer_that_stays_says_why(build, reason):
    assert reason in reasons(groups_of(build))


def test_residual_width_of_a_layer_norm_stays():
    model = nn.Sequential(nn.Linear(7, 24), nn.TransformerEncoderLayer(24, 3, 8, batch_first=True))
    groups = ChannelGroups(float_graph(model, torch.randn(2, 5, 7)))
    assert names(groups) == ["1.self_attn", "1.linear1"]
    assert "it normalizes over the channels" in reasons(groups)


def test_one_channel_that_is_everything_stays():
    groups = groups_of(lambda g, x: g.conv(g.relu(g.conv(x, 1)), 2))
    assert names(groups) == [] and "its channels can only go all together" in reasons(groups)


def test_ignored_layers_stay():
    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(
                nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 2, 1)
            )

    gm = float_graph(Net(), torch.randn(2, 3, 4, 4))
    assert names(ChannelGroups(gm, ["1"])) == ["0"]
    assert names(ChannelGroups(gm, ["1.0"])) == ["0", "1.1"]


def test_a_constant_that_another_use_reads_whole_stays():
    def build(g, x):
        scale = g.constant(g.normal(4, 1, 1))
        scaled = g.conv(g.call(aten.mul.Tensor, g.conv(x, 4), scale), 4)
        return g.add(scaled, g.call(aten.mul.Tensor, g.call(aten.mean.dim, x, [1], True), scale))

    groups = groups_of(build)
    assert names(groups) == []
    assert "constant0 is shared with another use" in reasons(groups)
