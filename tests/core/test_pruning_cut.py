"""Masked equals shrunk, in float64: hand-made networks of every kind, and random ones with skips and concats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fxcompress.analysis.channel_groups import ChannelGroups
from fxcompress.pruning.costs import Costs, nothing
from fxcompress.pruning.cut import mask, shrink
from fxcompress.shapes import trace_shapes
from tests.support.graphs import MODELS, build, randomize
from tests.support.pruning import float_graph, masked_and_shrunk, random_cut
from tests.support.strategies import networks

EXACT = 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_every_structure(name):
    model, inputs = build(name)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    difference, _, _ = masked_and_shrunk(float_graph(model, *inputs), inputs)
    assert difference <= EXACT


class Constants(nn.Module):
    """Masked channels are constants other than 0 where they are read: biases take them up."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 5, 3, padding=1)
        self.d, self.e = nn.Linear(5, 7), nn.Linear(7, 2, bias=False)

    def forward(self, x):
        x = torch.exp(self.b(torch.sigmoid(self.a(x)) * 2 + 1))
        return self.e(F.softplus(self.d(self.c(x).mean((2, 3)))))


class Mixed(nn.Module):
    """Group norm, pixel shuffle, PReLU, transposed convolutions, embedding, flatten."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.shuffle = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(2, 4), nn.PixelShuffle(2)
        self.b, self.act, self.up = nn.Conv2d(4, 8, 3), nn.PReLU(8), nn.ConvTranspose2d(8, 8, 2, 2, groups=2)
        self.wide, self.embed = nn.ConvTranspose2d(8, 6, 3), nn.Embedding(10, 6)
        self.f, self.g = nn.Linear(6 * 25, 9), nn.Linear(9, 3)

    def forward(self, x, tokens):
        x = F.relu(self.norm(self.shuffle(self.a(x))))
        x = F.adaptive_avg_pool2d(self.wide(self.up(self.act(self.b(x)))), 5)
        return self.g(F.relu(self.f((x + self.embed(tokens).mean(1)[:, :, None, None]).flatten(1))))


class Shortcut(nn.Module):
    """The shortcut of the CIFAR ResNets: every second pixel, channels padded with zeros."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.b(F.relu(self.a(x)))
        return self.fc(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).mean((2, 3)))


class Shuffled(nn.Module):
    """Channel shuffle, grouped and depthwise convolution, chunks, one channel picked out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.shuffle = (
            nn.Conv2d(3, 24, 3, padding=1),
            nn.Conv2d(24, 24, 1, groups=2),
            nn.ChannelShuffle(2),
        )
        self.c, self.d, self.e = nn.Conv2d(24, 24, 3, 1, 1, groups=24), nn.Conv2d(12, 12, 1), nn.Conv2d(24, 4, 1)

    def forward(self, x):
        x = self.c(self.shuffle(self.b(F.relu(self.a(x)))))
        u, v = x.chunk(2, 1)
        return self.e(torch.cat([u, F.relu(self.d(v))], 1)) * x[:, 3][:, None]


class Tokens(nn.Module):
    """Attention of both layouts, a learned position, a class token."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Linear(5, 16), nn.Parameter(torch.randn(1, 7, 16))
        self.token, self.norm = nn.Parameter(torch.randn(1, 1, 16)), nn.LayerNorm(16)
        self.attention, self.layer = (
            nn.MultiheadAttention(16, 4),
            nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, activation="gelu"),
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1) + self.position
        y = self.norm(x).transpose(0, 1)
        return self.head(self.layer(x + self.attention(y, y, y, need_weights=False)[0].transpose(0, 1))[:, 0])


CASES = {
    "constants": (Constants, (torch.randn(2, 3, 9, 9),), 2),
    "mixed": (Mixed, (torch.randn(2, 3, 6, 6), torch.randint(0, 10, (2, 4))), 4),
    "shortcut": (Shortcut, (torch.randn(2, 3, 8, 8),), 3),
    "shuffled": (Shuffled, (torch.randn(2, 3, 8, 8),), 1),
    "tokens": (Tokens, (torch.randn(2, 6, 5),), 3),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_masked_equals_shrunk(name, seed):
    model, inputs, groups = CASES[name]
    gm = float_graph(randomize(model(), seed), *inputs)
    assert len(ChannelGroups(gm).groups) >= groups
    difference, moved, _ = masked_and_shrunk(gm, inputs, seed)
    assert difference <= EXACT
    assert moved > 1e-3  # the cut channels counted


@settings(deadline=None)
@given(networks(), st.integers(0, 9))
def test_random_networks(network, seed):
    model, x = network.build(seed)
    difference, _, _ = masked_and_shrunk(float_graph(model, x), (x,), seed)
    assert difference <= EXACT


@settings(deadline=None, max_examples=8)
@given(networks(), st.integers(0, 9))
def test_costs_are_those_of_the_smaller_network(network, seed):
    model, x = network.build(seed)
    groups = ChannelGroups(float_graph(model, x))
    removed = random_cut(groups, seed=seed)
    predicted = Costs(groups).without(removed)
    small = shrink(groups, removed)
    assert predicted == Costs(again := ChannelGroups(small)).without(nothing(again))


def test_nothing_removed_changes_nothing():
    model, inputs = build("classifier")
    gm = float_graph(model, *(inputs if isinstance(inputs, tuple) else (inputs,)))
    groups = ChannelGroups(gm)
    before = {n.name: (n.target, str(n.args)) for n in gm.graph.nodes}
    shrink(groups, nothing(groups))
    assert {n.name: (n.target, str(n.args)) for n in gm.graph.nodes} == before


def test_a_mask_leaves_the_graph_it_masks_alone():
    model, inputs = build("classifier")
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    gm = float_graph(model, *inputs)
    expected, groups = gm(*inputs)[0].clone(), ChannelGroups(gm)
    masked = mask(groups, random_cut(groups))
    assert torch.equal(gm(*inputs)[0], expected)
    assert not torch.equal(masked(*inputs)[0], expected)


def test_the_smaller_network_takes_any_batch():
    model, inputs = build("inverted_residual")
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    _, _, small = masked_and_shrunk(float_graph(model, *inputs), inputs)
    x = torch.randn(5, *inputs[0].shape[1:], dtype=torch.float64)
    assert torch.allclose(small(x)[0][:3], small(x[:3])[0])
    trace_shapes(small, (x,))
