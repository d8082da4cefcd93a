"""Redundant neurons merged: exactly where they are copies, and refused where a copy is not enough."""

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.analysis.channel_groups import ChannelGroups
from fxcompress.pruning.merging import find_merges, neurons
from tests.support.graphs import ConvBnRelu, ResidualBlock, images, randomize
from tests.support.pruning import float_graph, random_cut

X = images(4, 3, 8, 8)
OPTIONS = {"pruning_criterion": "redundancy", "pruning_correction": None, "round_to": 1}


def copied(module: nn.Module, pairs: dict[int, int], factor: float = 1.0) -> None:
    """Output ``r`` of a layer, or channel of a batch norm, becomes ``factor`` times output ``t``."""
    with torch.no_grad():
        for r, t in pairs.items():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if tensor.ndim:
                    tensor[r] = tensor[t] * (factor if name in ("weight", "bias") else 1.0)


class Chain(nn.Module):
    def __init__(self, act=torch.relu):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 3, padding=1)
        self.act = act

    def forward(self, x):
        return self.b(self.act(self.norm(self.a(x))))


class Stream(nn.Module):
    """A residual stream behind a depthwise layer, flattened."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = ConvBnRelu(3, 16), ResidualBlock(16)
        self.depthwise, self.head = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Linear(16 * 64, 5)

    def forward(self, x):
        return self.head(torch.sigmoid(self.depthwise(self.block(self.stem(x)))).flatten(1))


@pytest.mark.parametrize("act", [torch.relu, torch.tanh, nn.functional.silu, lambda x: x.clamp(0, 6)])
def test_copies_are_merged_exactly(act):
    """Whatever the activation."""
    model = randomize(Chain(act), seed=0)
    for layer in (model.a, model.norm):
        copied(layer, {1: 9, 2: 9, 5: 12, 14: 3})
    small = fxcompress.prune(model, X, pruning_ratio=0.2, **OPTIONS)
    report = small.meta["pruning"]
    assert report.merged == 4 and report.merge_error < 1e-6 and report.difference < 1e-9
    assert small.get_parameter("a.weight").shape[0] == 12
    assert torch.allclose(small(X), model(X), atol=1e-5)
    assert "4 merged into similar ones" in str(report)


def test_the_scale_of_a_weight_that_batch_norm_takes_back_does_not_matter():
    model = randomize(Chain(), seed=0)
    copied(model.a, {1: 9})
    copied(model.norm, {1: 9})
    with torch.no_grad():  # the same function: twice the weight, twice the statistics' deviation
        model.a.weight[1] *= 2
        model.a.bias[1] *= 2
        model.norm.running_mean[1] *= 2
        model.norm.running_var[1] = 4 * (model.norm.running_var[9] + model.norm.eps) - model.norm.eps
    small = fxcompress.prune(model, X, pruning_ratio=0.05, **OPTIONS)
    assert small.meta["pruning"].merged == 1 and torch.allclose(small(X), model(X), atol=1e-5)


def test_channels_of_a_stream_merge_where_all_its_layers_agree():
    model = randomize(Stream(), seed=0)
    layers = [model.stem[0], model.stem[1], model.block.second[0], model.block.second[1], model.depthwise]
    for layer in layers:
        copied(layer, {3: 8, 11: 2})
    small = fxcompress.prune(model, X, pruning_ratio=0.08, ignored_layers=["block.first"], **OPTIONS)
    assert small.meta["pruning"].merged == 2
    assert torch.allclose(small(X), model(X), atol=1e-5)
    copied(model.stem[0], {3: 4})  # one layer disagrees
    groups = ChannelGroups(float_graph(model, X))
    stream = next(group for group in groups.groups if len(group.layers) > 1)
    removed = torch.zeros(groups.count, dtype=torch.bool)
    removed[[stream.units[3], stream.units[11]]] = True
    error = find_merges(groups, removed).error
    assert error[stream.units[3]] > 1e-2 and error[stream.units[11]] == 0


def _negative_part(x):
    return x.clamp(max=0)


def test_multiples_are_merged_by_angle_where_operators_are_homogeneous():
    operators = {torch.relu: True, torch.abs: True, _negative_part: True, nn.functional.silu: False}
    for act, exact in operators.items():
        model = randomize(Chain(act), seed=0)
        copied(model.a, {1: 9, 5: 12})
        copied(model.norm, {1: 9, 5: 12}, factor=3.0)
        small = fxcompress.prune(model, X, pruning_ratio=0.1, **OPTIONS | {"pruning_criterion": "angular"})
        report = small.meta["pruning"]
        assert report.merged == 2 and report.difference < 1e-9  # what was merged is what was promised, exact or not
        assert torch.allclose(small(X), model(X), atol=1e-4) == exact
        assert (report.merge_error < 1e-6) == exact


def test_identical_heads_merge_and_features_of_queries_do_not():
    class Attention(nn.Module):
        def __init__(self, heads):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
            self.heads = heads

        def forward(self, x):
            q, k, v = (
                layer(x).reshape(-1, 6, self.heads, 32 // self.heads).transpose(1, 2)
                for layer in (self.q, self.k, self.v)
            )
            return self.out(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(-1, 6, 32))

    x = torch.randn(2, 6, 32)
    model = randomize(Attention(4), seed=0)
    for layer in (model.q, model.k, model.v):
        copied(layer, {8 + i: 24 + i for i in range(8)})
    small = fxcompress.prune(model, x, pruning_ratio=0.2, **OPTIONS)
    assert small.meta["pruning"].merged == 1 and torch.allclose(small(x), model(x), atol=1e-5)
    model = randomize(Attention(1), seed=0)
    for layer in (model.q, model.k):
        copied(layer, {3: 8})
    groups = ChannelGroups(float_graph(model, x))
    queries = next(group for group in groups.groups if len(group.layers) == 2)
    removed = torch.zeros(groups.count, dtype=torch.bool)
    removed[queries.units[3]] = True
    assert find_merges(groups, removed).count == 0


@pytest.mark.parametrize("criterion", ["redundancy", "angular"])
def test_grouped_transposed_convolutions_are_compared_with_their_biases(criterion):
    """A row of such a weight computes a channel of every group, so that the bias has more elements than there are rows."""
    up = nn.ConvTranspose2d(16, 32, 2, stride=2, groups=2)
    model = randomize(nn.Sequential(nn.Conv2d(3, 16, 3), up, nn.ReLU(), nn.Conv2d(32, 4, 1)), seed=0)
    small = fxcompress.prune(model, X, pruning_ratio=0.2, **OPTIONS | {"pruning_criterion": criterion})
    assert small.meta["pruning"].merged and small.meta["pruning"].difference < 1e-9


def test_channels_of_different_tensors_are_not_merged():
    """Both halves are alike, but each is read by a layer of its own."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = torch.relu(self.a(x))
            return self.b(y[:, :8]) + self.c(2 * y[:, 8:])

    model = randomize(Halves(), seed=0)
    copied(model.a, {1: 9, 2: 5})
    groups = ChannelGroups(float_graph(model, X))
    units = groups.layers[0].rows.units
    removed = torch.zeros(groups.count, dtype=torch.bool)
    removed[units[[1, 2]]] = True
    merges = find_merges(groups, removed)
    assert merges.error[units[1]] > 1e-2 and merges.error[units[2]] == 0 and merges.into[units[2]] == units[5]


@pytest.mark.parametrize("seed", range(4))
def test_any_cut_computes_the_network_with_copies(seed):
    """Approximate merges are still exactly what they say: the network whose neurons were replaced by similar ones."""
    model = randomize(Stream(), seed=seed)
    groups = ChannelGroups(float_graph(model, X))
    merges = find_merges(groups, random_cut(groups, seed=seed))
    assert merges.count > 0 and float(merges.error.max()) > 0.1
    small = fxcompress.prune(model, X, pruning_ratio=0.4, **OPTIONS)
    assert small.meta["pruning"].merged > 0 and small.meta["pruning"].difference < 1e-9


def test_merging_loses_less_than_removing():
    model = randomize(Chain(), seed=0)
    for layer in (model.a, model.norm):
        copied(layer, {i: i + 8 for i in range(8)})
    with torch.no_grad():
        model.a.weight += 0.02 * torch.randn(model.a.weight.shape, generator=torch.Generator().manual_seed(0))
    merged = fxcompress.prune(model, X, pruning_ratio=0.4, **OPTIONS)
    removed = fxcompress.prune(model, X, pruning_ratio=0.4, **OPTIONS | {"pruning_criterion": "l2"})
    assert (merged(X) - model(X)).norm() < 0.3 * (removed(X) - model(X)).norm()


def test_a_compiled_network_merges_again_for_another_shape():
    model = randomize(Chain(), seed=0)
    copied(model.a, {1: 9})
    copied(model.norm, {1: 9})
    compiled = fxcompress.compile(
        model, example_inputs=X, input_range=(-4, 4), pruning_ratio=0.2, pruning_criterion="redundancy"
    )
    compiled(images(2, 3, 12, 12))
    first, second = (e.graph_module for e in compiled._executables)
    found = [[t for t in gm.buffers() if t.dtype == torch.int8 and t.ndim >= 2] for gm in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and compiled.report().pruning.merged > 0


def test_neurons_hold_what_batch_norm_folds_to():
    model = randomize(Chain(), seed=0)
    groups = ChannelGroups(float_graph(model, X))
    found = neurons(groups, groups.groups[0])
    factor = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    rows = torch.cat([(model.a.weight * factor[:, None, None, None]).flatten(1),
                      ((model.a.bias - model.norm.running_mean) * factor + model.norm.bias)[:, None]], 1).double()  # fmt: skip
    assert torch.allclose(found, rows / rows.norm(dim=1).mean(), atol=1e-5)
