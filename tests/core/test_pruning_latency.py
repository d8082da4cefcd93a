"""Latency as a cost: tables of times, what is interpolated between them, and pruning by it. No test depends on a real time."""

import json
import math

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import LatencyTable
from fxcompress.analysis.channel_groups import ChannelGroups
from fxcompress.errors import OptionError
from fxcompress.pruning import layer_times
from fxcompress.pruning.costs import Costs, nothing
from fxcompress.pruning.latency import Latency, Surface, channel_points
from fxcompress.pruning.layer_times import LayerShape, layer_graph, time_layer
from tests.support.graphs import ConvBnRelu, ResidualBlock, images, randomize
from tests.support.pruning import float_graph, random_cut

X = images(4, 3, 8, 8)
CONV = LayerShape("conv", 16, 16, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block = ConvBnRelu(3, 16), ResidualBlock(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.depthwise(self.block(self.stem(x))).mean((2, 3)))


@pytest.fixture
def model():
    return randomize(Classifier(), seed=1)


def macs(shape: LayerShape) -> float:
    """A machine whose time is its multiplications: the prediction must then be their number."""
    positions = math.prod(shape.size)
    return positions * shape.inputs * shape.outputs / shape.groups * math.prod(shape.kernel) / math.prod(shape.stride)


# ----------------------------------------------------------------------------------------------------------------- surface


def test_between_points_it_is_bilinear():
    surface = Surface([2, 4], [10, 30], [[1.0, 2.0], [3.0, 8.0]])
    assert [surface(i, o) for i, o in ((2, 10), (4, 30), (3, 10), (2, 20), (3, 20))] == [1, 8, 2, 1.5, 3.5]
    assert surface(1, 1) == 1 and surface(9, 99) == 8  # constant outside


def test_a_layer_never_takes_longer_than_a_larger_one():
    noisy = Surface([1, 2, 3], [1, 2], [[9.0, 1.0], [2.0, 3.0], [4.0, 2.5]])
    found = [[noisy(i, o) for o in (1, 2)] for i in (1, 2, 3)]
    assert found == [[1, 1], [2, 2.5], [2.5, 2.5]]


def test_a_layer_is_measured_at_quarters_of_its_channels():
    assert channel_points(64) == [8, 16, 32, 48, 64]
    assert channel_points(3) == [1, 2, 3]
    assert channel_points(1000) == [16, 256, 512, 752, 1000]


# ------------------------------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("seed", range(4))
def test_predicts_a_machine_that_only_multiplies_exactly_on_the_grid(model, seed):
    """Multiplications are bilinear in the channels: linear interpolation is exact above the smallest point of the grid."""
    groups = ChannelGroups(float_graph(model, X))
    latency = Latency(groups, LatencyTable(measure=macs))
    for removed in (nothing(groups), random_cut(groups, seed=seed)):
        assert latency.without(removed) == pytest.approx(Costs(groups).without(removed).macs)


def test_falls_with_every_unit_even_if_times_are_noise(model):
    generator = torch.Generator().manual_seed(0)
    table = LatencyTable(measure=lambda shape: macs(shape) * float(torch.rand((), generator=generator)) + 1)
    groups = ChannelGroups(float_graph(model, X))
    latency, removed = Latency(groups, table), nothing(groups)
    costs = [latency.without(removed)]
    for unit in torch.randperm(groups.count - 1, generator=generator)[:20] + 1:
        removed[unit] = True
        costs.append(latency.without(removed))
    assert costs == sorted(costs, reverse=True)


def test_counts_products_of_activations():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x):
            q, k, v = self.qkv(x).reshape(-1, 6, 3, 4, 8).permute(2, 0, 3, 1, 4)
            return self.out(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(-1, 6, 32))

    groups = ChannelGroups(float_graph(randomize(Attention()), torch.randn(2, 6, 32)))
    latency = Latency(groups, LatencyTable(measure=macs))
    head = torch.zeros(groups.count, dtype=torch.bool)
    head[groups.groups[0].units[0]] = True
    whole, parts = 6 * 32 * 96 + 6 * 32 * 32, 2 * 4 * 6 * 6 * 8
    assert latency.without(nothing(groups)) == whole + parts
    assert latency.without(head) == pytest.approx((whole + parts) * 3 / 4)


# ------------------------------------------------------------------------------------------------------------------- table


def test_prune_by_latency_removes_that_share_of_the_table(model):
    small = fxcompress.prune(
        model, X, pruning_ratio=0.3, pruning_measure="latency", latency_table=LatencyTable(measure=macs)
    )
    by_macs = fxcompress.prune(model, X, pruning_ratio=0.3, pruning_measure="macs")
    report = small.meta["pruning"]
    assert report.saved == pytest.approx(by_macs.meta["pruning"].saved) and report.cost == pytest.approx(report.macs)
    assert torch.equal(small(X), by_macs(X))
    assert "nanoseconds of the layers (table)" in str(report)


def test_the_machine_decides_where_channels_go(model):
    """Where only depthwise layers take time, only the channels that they read are removed."""
    slow_depthwise = LatencyTable(measure=lambda shape: float(shape.inputs) if shape.groups > 1 else 1e-9)
    small = fxcompress.prune(model, X, pruning_ratio=0.24, pruning_measure="latency", pruning_budget="uniform", round_to=1,
                             latency_table=slow_depthwise)  # fmt: skip
    assert small.get_parameter("depthwise.weight").shape[0] == 12


def test_a_file_is_written_completed_and_repeated(model, tmp_path, monkeypatch):
    path, calls = tmp_path / "times.json", []

    def fake(shape):
        calls.append(shape)
        return macs(shape)

    monkeypatch.setattr(LatencyTable.__init__, "__defaults__", (None, None, fake))
    options = {"pruning_ratio": 0.3, "pruning_measure": "latency", "latency_table": path}
    first = fxcompress.prune(model, X, **options)
    assert len(calls) == len(set(calls)) == len(LatencyTable.load(path).times) > 0
    measured = len(calls)
    again = fxcompress.prune(model, X, **options)
    assert len(calls) == measured and torch.equal(first(X), again(X))
    fxcompress.prune(model, images(4, 3, 12, 12), **options)
    assert len(LatencyTable.load(path).times) == len(calls) > measured


def test_what_is_saved_is_loaded(tmp_path):
    table = LatencyTable({CONV: 12.5, LayerShape("linear", 8, 4, (1,)): 3.0}, "a machine")
    table.save(tmp_path / "t.json")
    loaded = LatencyTable.load(tmp_path / "t.json")
    assert loaded.times == table.times and loaded.machine == "a machine"


def test_a_table_of_another_machine_is_used_but_not_completed(model, tmp_path):
    table = LatencyTable(measure=macs)
    groups = ChannelGroups(float_graph(model, X))
    Latency(groups, table)
    elsewhere = LatencyTable(table.times, "an abacus")
    Latency(groups, elsewhere)
    del elsewhere.times[next(iter(elsewhere.times))]
    with pytest.raises(
        OptionError, match="1 layer shapes are missing from the table, which was measured on 'an abacus'"
    ):
        Latency(groups, elsewhere)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", json.dumps({"format": "fxcompress latency table", "version": 9, "layers": []})]
)
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(OptionError, match=r"t.json' cannot be read: it is no latency table \("):
        LatencyTable.load(tmp_path / "t.json")


@pytest.mark.parametrize("spent", [0, -1, math.nan, math.inf, "soon"])
def test_times_that_are_none_are_refused(tmp_path, spent):
    LatencyTable({CONV: spent}).save(tmp_path / "t.json")
    with pytest.raises(OptionError, match="cannot be read: it is no latency table"):
        LatencyTable.load(tmp_path / "t.json")


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(OptionError, match="cannot be written: No such file or directory"):
        LatencyTable().save(tmp_path / "missing" / "t.json")


def test_options_that_have_no_effect_are_refused(model):
    with pytest.raises(OptionError, match='latency_table has no effect with pruning_measure="macs"'):
        fxcompress.prune(model, X, pruning_ratio=0.3, latency_table="times.json")
    with pytest.raises(OptionError, match="latency_table is a int"):
        fxcompress.prune(model, X, pruning_ratio=0.3, pruning_measure="latency", latency_table=3)


# -------------------------------------------------------------------------------------------------------------- real times

SHAPES = [
    CONV, CONV.resized(16, 16, 16), CONV.resized(7, 5), LayerShape("conv", 8, 8, (9,), (3,), (2,), (1,), (1,)),
    LayerShape("conv", 4, 4, (4, 4, 4), (3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3),
    LayerShape("conv_transpose", 16, 8, (4, 4), (4, 4), (2, 2), (1, 1), (1, 1), (0, 0)),
    LayerShape("linear", 16, 10, (1,)), LayerShape("linear", 16, 48, (7,)), LayerShape("matmul", 8, 7, (2, 7)),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kind_of_layer_is_timed(shape, monkeypatch):
    monkeypatch.setattr(layer_times, "SECONDS", 0)
    assert 0 < time_layer(shape) < 1e9


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_graph_that_is_timed_has_the_shape_of_the_layer(shape):
    gm, inputs = layer_graph(shape)
    (y,) = gm(*inputs)
    assert y.dtype == torch.uint8 and y.shape[1 if shape.operator.startswith("conv") else -1] == shape.outputs


def test_a_further_input_shape_of_a_compiled_model_measures_nothing(model):
    table = LatencyTable(measure=macs)
    compiled = fxcompress.compile(
        model, example_inputs=X, input_range=(-4, 4), pruning_ratio=0.3, pruning_measure="latency", latency_table=table
    )
    known = len(table.times)
    compiled(images(2, 3, 12, 12))
    first, second = (e.report.pruning for e in compiled._executables)
    assert first.slices == second.slices and first.cost == second.cost and len(table.times) == known
