"""Kernels removed in blocks: a grouped convolution that computes the dense one with these kernels zeroed."""

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.errors import OptionError, PassContractError
from fxcompress.graph import set_constant
from fxcompress.pruning import grouping
from fxcompress.pruning.kernels import choose_groups, find_blocks
from tests.support.graphs import ConvBnRelu, ResidualBlock, images, randomize

X, DATA = images(4, 3, 8, 8), images(96, 3, 8, 8, seed=3)
KERNELS = {"pruning_granularity": "kernels", "pruning_correction": None}


class Classifier(nn.Module):
    """conv, two residual blocks, an unpooled head; 32 channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = ConvBnRelu(3, 32), ResidualBlock(32), ResidualBlock(32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))


@pytest.fixture
def model():
    return randomize(Classifier(), seed=1)


def operators(network, name):
    return [n for n in network.graph.nodes if n.op == "call_function" and name in str(n.target)]


def groups_of(network):
    return [n.args[6] if len(n.args) > 6 else n.kwargs.get("groups", 1) for n in operators(network, "conv2d")]


# ---------------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_blocks_that_are_there_are_found(groups, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(16, generator=generator) * groups // 16 for _ in range(2))
    values = (rows[:, None] == columns[None, :]) * (torch.rand(16, 16, generator=generator, dtype=torch.float64) + 0.5)
    blocks = find_blocks(values + 1e-3, groups)
    assert blocks.lost < 0.02
    assert bool((values[blocks.removed(values.shape)] == 0).all())


def test_parts_are_equal_and_every_channel_is_in_one():
    values = torch.rand(24, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = find_blocks(values, 4)
    assert blocks.rows.sort().values.tolist() == list(range(24)) and blocks.columns.sort().values.tolist() == list(
        range(16)
    )
    kept = ~blocks.removed(values.shape)
    assert kept.sum(0).tolist() == [6] * 16 and kept.sum(1).tolist() == [4] * 24
    assert blocks.lost == pytest.approx(float(values[~kept].sum() / values.sum()))
    assert blocks.lost < 0.75  # what any order of the channels would lose


def test_layers_that_lose_least_go_first():
    block = torch.block_diag(torch.ones(8, 8), torch.ones(8, 8)).double()
    chosen = choose_groups(
        {"dense": torch.ones(16, 16).double(), "block": block}, {"dense": 0.5, "block": 0.5}, 0.2, narrowest=8
    )
    assert list(chosen) == ["block"] and chosen["block"].groups == 2 and chosen["block"].lost == 0


# ------------------------------------------------------------------------------------------------------------------ pass


def test_becomes_grouped_and_differs_from_the_masked_network_by_rounding_only(model):
    small = fxcompress.prune(model, X, pruning_ratio=0.4, **KERNELS)
    report = small.meta["pruning"]
    assert report.difference < 1e-9 and max(groups_of(small)) >= 2
    for group in report.groups:
        before, after = (m.get_parameter(f"{group['name']}.weight") for m in (model, small))
        assert after.numel() == before.numel() * (group["units"] - group["removed"]) // group["units"]
        assert torch.isin(after, before).all()
    assert not torch.allclose(small(X), model(X), atol=1e-3)


def test_blocks_that_are_there_cost_nothing():
    """A convolution that is block-diagonal in some order of its channels loses nothing by becoming grouped."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )
    randomize(model, seed=0)
    rows, columns = torch.randperm(16) % 2, torch.randperm(16) % 2
    with torch.no_grad():
        model[2].weight *= (rows[:, None] == columns[None, :])[..., None, None]
    small = fxcompress.prune(model, X, pruning_ratio=0.2, **KERNELS)
    assert torch.allclose(small(X), model(X), atol=1e-5)
    assert groups_of(small) == [1, 2, 1] and not operators(small, "index_select")  # its neighbors took up the order


def test_where_no_neighbor_takes_the_order_up_channels_are_selected(model):
    small = fxcompress.prune(model, X, pruning_ratio=0.4, **KERNELS)
    assert operators(small, "index_select")
    assert torch.equal(small(X[:1]).isfinite(), torch.ones(1, 5, dtype=torch.bool))


def test_two_grouped_convolutions_in_a_row_share_one_shuffle():
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3),
                          nn.ReLU(), nn.Conv2d(32, 4, 1))  # fmt: skip
    small = fxcompress.prune(randomize(model, seed=0), X, pruning_ratio=0.45, **KERNELS)
    assert [g > 1 for g in groups_of(small)] == [False, True, True, False]
    assert len(operators(small, "index_select")) == 1


def test_parameters_keep_their_names_and_train(model):
    small = fxcompress.prune(model, X, pruning_ratio=0.4, **KERNELS)
    assert dict(small.named_parameters()).keys() == dict(model.named_parameters()).keys()
    small(X).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("measure", ["macs", "parameters"])
def test_the_share_asked_for_goes(model, measure):
    small = fxcompress.prune(
        model, X, pruning_ratio=0.3, pruning_measure=measure, pruning_granularity="kernels", calibration_data=DATA
    )
    report = small.meta["pruning"]
    before, after = getattr(report, measure)
    assert report.saved == pytest.approx(1 - after / before) and report.saved >= 0.3
    assert report.correction == "measured" and "kernels pruning by magnitude" in str(report)


def test_groups_are_no_narrower_than_round_to(model):
    small = fxcompress.prune(model, X, pruning_ratio=0.4, round_to=16, **KERNELS)
    assert max(groups_of(small)) == 2


@pytest.mark.parametrize("options", [{}, {"pruning_criterion": "contribution", "calibration_data": DATA}])
def test_compile_groups_executes_less_and_repeats_it_for_another_shape(model, options):
    options = {"example_inputs": X, "input_range": (-4, 4)} | options
    compiled = fxcompress.compile(model, pruning_ratio=0.4, pruning_granularity="kernels", **options)
    report = compiled.report()
    assert report.macs == report.pruning.macs[1] <= 0.6 * report.pruning.macs[0]
    assert compiled.verify_integer_only().integer_only
    compiled(images(2, 3, 12, 12))
    first, second = (e.graph_module for e in compiled._executables)
    found = [[t for t in gm.buffers() if t.dtype == torch.int8 and t.ndim >= 2] for gm in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_mistake_in_the_grouping_is_never_silent(model, monkeypatch):
    grouped = grouping._grouped

    def wrong(gm, node, blocks):
        selections = grouped(gm, node, blocks)
        set_constant(gm, selections[1].args[2].target, torch.arange(32))  # forgets to put the rows back
        return selections

    monkeypatch.setattr(grouping, "_grouped", wrong)
    with pytest.raises(PassContractError, match=r"differs by .* from the one with the kernels zeroed"):
        fxcompress.prune(model, X, pruning_ratio=0.4, **KERNELS)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pruning_ratio": 0.95}, r"at most 0\.\d+ of the macs can be removed as kernels of 5 dense convolutions"),
        ({"pruning_measure": "latency"}, r'pruning_measure="latency" does not go with pruning_granularity="kernels"'),
        ({"pruning_budget": "uniform"}, r"pruning_budget has no effect"),
    ],
)
def test_mistakes(model, options, message):
    with pytest.raises(OptionError, match=message):
        fxcompress.prune(model, X, pruning_granularity="kernels", **options)
