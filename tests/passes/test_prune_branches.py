"""Whole residual branches go: what is left is the user's own module with those branches zeroed."""

import math

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import LatencyTable
from fxcompress.errors import OptionError
from fxcompress.passes.prune_branches import branches
from fxcompress.promises import relative_change
from tests.support.graphs import ConvBnRelu, ResidualBlock, images, randomize
from tests.support.pruning import float_graph

X = images(4, 3, 8, 8)


class Blocks(nn.Module):
    def __init__(self, count=4):
        super().__init__()
        self.stem = ConvBnRelu(3, 8)
        self.blocks = nn.Sequential(*(ResidualBlock(8) for _ in range(count)))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class PreActivation(nn.Module):
    """Sums feed sums, without anything in between."""

    def __init__(self, count=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(count))

    def forward(self, x):
        x = self.stem(x)
        for conv in self.convs:
            x = x + conv(x.relu())
        return x.mean((2, 3))


@pytest.fixture
def model():
    return randomize(Blocks(), seed=2)


def dropped(network):
    return [group["name"] for group in network.meta["pruning"].groups if group["removed"]]


def last_norms(model):
    """The last batch norm of every block's branch."""
    return {name: [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)][-1]
            for name, block in model.named_modules() if isinstance(block, ResidualBlock)}  # fmt: skip


@torch.no_grad()
def test_what_is_left_is_the_model_with_those_branches_zeroed(model):
    small = fxcompress.prune_branches(model, X, pruning_ratio=0.4)
    assert len(dropped(small)) == 2
    for name, norm in last_norms(model).items():
        if name in dropped(small):
            norm.weight.zero_(), norm.bias.zero_()
    assert relative_change(model.double()(X.double()), small.double()(X.double())) < 1e-9


def test_a_branch_that_does_nothing_goes_first(model):
    norm = last_norms(model)["blocks.2"]
    with torch.no_grad():
        norm.weight.mul_(1e-4), norm.bias.mul_(1e-4)
    small = fxcompress.prune_branches(model, X, pruning_ratio=0.1)
    assert dropped(small) == ["blocks.2"]
    before, after = small.meta["pruning"].macs
    assert after == pytest.approx(before - 2 * 8 * 8 * 9 * 64)
    assert "blocks.2" in str(small.meta["pruning"])
    assert not [name for name, _ in small.named_parameters() if name.startswith("blocks.2.")]


@torch.no_grad()
def test_sums_of_sums():
    model = randomize(PreActivation(), seed=3)
    small = fxcompress.prune_branches(model, X, pruning_ratio=0.5)
    gone = [i for i in range(3) if not any(name.startswith(f"convs.{i}.") for name, _ in small.named_parameters())]
    assert len(gone) == 2
    for i in gone:
        model.convs[i].weight.zero_(), model.convs[i].bias.zero_()
    assert relative_change(model(X), small(X)) < 1e-5


class Narrowing(nn.Module):
    """Two branches of equal MACs: the first has four times the positions of the second, and a quarter of its parameters."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide = ConvBnRelu(3, 8), ResidualBlock(8)
        self.down, self.deep = ConvBnRelu(8, 16, stride=2), ResidualBlock(16)

    def forward(self, x):
        return self.deep(self.down(self.wide(self.stem(x)))).mean((2, 3))


@torch.no_grad()
def scaled(norm, factor):
    norm.weight.mul_(factor), norm.bias.mul_(factor)


@torch.no_grad()
def change_without(model, norm):
    before, saved = model(X), (norm.weight.clone(), norm.bias.clone())
    scaled(norm, 0.0)
    change = (model(X) - before).norm()
    norm.weight.copy_(saved[0]), norm.bias.copy_(saved[1])
    return float(change)


@pytest.mark.parametrize("measure, expected", [("parameters", "deep"), ("latency", "wide")])
def test_a_branch_is_worth_what_it_costs_by_the_measure(measure, expected):
    model = randomize(Narrowing(), seed=4)
    norms = last_norms(model)
    for norm in norms.values():
        scaled(norm, 1e-3)
    scaled(
        norms["deep"], change_without(model, norms["wide"]) / change_without(model, norms["deep"])
    )  # now they change as much
    table = LatencyTable(measure=lambda shape: 1000.0 * math.prod(shape.size)) if measure == "latency" else None
    options = {"latency_table": table} if table else {}
    small = fxcompress.prune_branches(model, X, pruning_ratio=0.05, pruning_measure=measure, **options)
    report = small.meta["pruning"]
    assert dropped(small) == [expected]
    assert (
        report.measure == measure
        and report.saved == pytest.approx(1 - report.cost[1] / report.cost[0])
        and report.saved >= 0.05
    )


def test_an_option_of_prune_alone(model):
    with pytest.raises(OptionError, match="round_to is no option of prune_branches"):
        fxcompress.prune_branches(model, X, round_to=8)


def test_statistics_are_measured_again_with_data(model):
    data = images(64, 3, 8, 8, seed=5)
    plain, measured = (fxcompress.prune_branches(model, X, pruning_ratio=0.3, calibration_data=d) for d in (None, data))
    assert plain.meta["pruning"].correction is None and measured.meta["pruning"].correction == "measured"
    with torch.no_grad():
        features = measured(data).mean()
    assert torch.isfinite(features)


def test_the_result_compiles_prunes_and_trains(model):
    small = fxcompress.prune_branches(model, X, pruning_ratio=0.3)
    smaller = fxcompress.prune(small, X, pruning_ratio=0.2)
    tuned = fxcompress.fine_tune(smaller, (images(8, 3, 8, 8), torch.arange(8) % 5), steps=2, batch_size=4)
    net = fxcompress.compile(tuned, example_inputs=X, calibration_data=X)
    assert net.verify_integer_only().integer_only and net(X).shape == (4, 5)


def test_ratio_zero_and_ignored_layers(model):
    assert not dropped_or_none(fxcompress.prune_branches(model, X, pruning_ratio=0.0))
    kept = ["blocks.0", "blocks.1", "blocks.3"]
    assert dropped(fxcompress.prune_branches(model, X, pruning_ratio=0.1, ignored_layers=kept)) == ["blocks.2"]


def dropped_or_none(network):
    return dropped(network) if "pruning" in network.meta else []


@pytest.mark.parametrize("ratio", [0.97, -0.1, 1.0, "all"])
def test_a_ratio_that_cannot_be_reached(model, ratio):
    with pytest.raises(OptionError, match="pruning_ratio"):
        fxcompress.prune_branches(model, X, pruning_ratio=ratio)


def test_no_branch_where_the_shortcut_is_computed():
    class Projection(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.a(x) + self.b(x)

    gm = float_graph(randomize(Projection()), X)
    assert branches(gm) == []
    plan = fxcompress.passes.PruneBranches(0.0).plan(gm)
    assert len(plan.rejects) == 1 and "no operand" in str(plan)
