"""Zeros in weights: how many, where, what is stored and executed, and that nothing later fills them again."""

import copy

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.errors import CalibrationError, OptionError
from fxcompress.pruning.weights import WEIGHT_CRITERIA, along_inputs, from_inputs, lamp
from tests.support.graphs import ConvBnRelu, ResidualBlock, images, randomize
from tests.support.pruning import float_graph

X, DATA = images(4, 3, 8, 8), images(96, 3, 8, 8, seed=3)


class Classifier(nn.Module):
    """A stem of 3 channels, a residual block, a depthwise layer, a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = ConvBnRelu(3, 16), ResidualBlock(16)
        self.depthwise, self.head = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Linear(16, 12)

    def forward(self, x):
        return self.head(torch.relu(self.depthwise(self.block(self.stem(x)))).mean((2, 3)))


@pytest.fixture
def model():
    return randomize(Classifier(), seed=1)


def weights(network):
    return {name: p for name, p in network.named_parameters() if p.ndim > 1}


def share_of_zeros(network):
    total = sum(p.numel() for p in weights(network).values())
    return sum(int((p == 0).sum()) for p in weights(network).values()) / total


# ---------------------------------------------------------------------------------------------------------- unstructured


@pytest.mark.parametrize("budget", ["global", "uniform"])
@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_the_share_asked_for_is_zero(model, ratio, budget):
    small = fxcompress.prune(model, X, pruning_ratio=ratio, pruning_granularity="unstructured", pruning_budget=budget)
    assert share_of_zeros(small) == pytest.approx(ratio, abs=2e-3)
    assert small.meta["pruning"].saved == pytest.approx(ratio, abs=2e-3)
    assert {name: p.shape for name, p in weights(small).items()} == {
        name: p.shape for name, p in weights(model).items()
    }


def test_the_smallest_of_every_layer_go_and_the_others_stay_as_they_are(model):
    small = fxcompress.prune(model, X, pruning_ratio=0.6, pruning_granularity="unstructured", pruning_correction=None)
    for name, weight in weights(model).items():
        after = small.get_parameter(name)
        kept = after != 0
        assert torch.equal(after[kept], weight[kept])
        if bool((~kept).any()):
            assert weight[~kept].abs().max() <= weight[kept].abs().min()


def test_a_uniform_budget_takes_the_same_share_of_every_layer(model):
    small = fxcompress.prune(model, X, pruning_ratio=0.5, pruning_granularity="unstructured", pruning_budget="uniform")
    assert all(float((p == 0).float().mean()) == pytest.approx(0.5, abs=0.01) for p in weights(small).values())


def test_lamp_does_not_depend_on_the_scale_of_a_layer():
    score = torch.rand(50, dtype=torch.float64)
    assert torch.allclose(lamp(score), lamp(1000 * score))
    assert lamp(score).max() == 1 and torch.equal(lamp(score).argsort(), score.argsort())
    assert lamp(torch.tensor([3.0, 1.0, 2.0])).tolist() == pytest.approx([1, 1 / 14, 4 / 13])
    assert lamp(torch.zeros(3)).tolist() == [0, 0, 1]


def test_no_layer_loses_all_its_weights(model):
    small = fxcompress.prune(model, X, pruning_ratio=0.998, pruning_granularity="unstructured")
    assert all(bool((p != 0).any()) for p in weights(small).values())


@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
@pytest.mark.parametrize("granularity", ["unstructured", "2:4"])
def test_every_criterion(model, criterion, granularity):
    options = {"pruning_granularity": granularity, "pruning_criterion": criterion, "calibration_data": DATA}
    small, again = (fxcompress.prune(model, X, **options) for _ in range(2))
    assert share_of_zeros(small) > 0.25 and torch.equal(small(X), again(X))


def test_contribution_takes_weights_that_read_silent_channels_first():
    model = randomize(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), seed=0)
    with torch.no_grad():
        model[0].weight[:4], model[0].bias[:4] = 0, 1e-4
    small = fxcompress.prune(model, torch.randn(4, 6), pruning_ratio=0.5, pruning_granularity="unstructured", pruning_budget="uniform",
                             pruning_criterion="contribution", calibration_data=torch.randn(64, 6), pruning_correction=None)  # fmt: skip
    assert torch.equal(small.get_parameter("2.weight") == 0, torch.arange(8).expand(4, 8) < 4)


# ------------------------------------------------------------------------------------------------------------------- N:M


@pytest.mark.parametrize("kept, run", [(2, 4), (1, 4), (1, 2), (4, 8)])
def test_every_run_along_the_input_channels_keeps_its_largest(model, kept, run):
    small = fxcompress.prune(model, X, pruning_granularity=f"{kept}:{run}", pruning_correction=None)
    for name in ("block.first.0.weight", "head.weight"):
        before, after = (m.get_parameter(name).movedim(1, -1).unflatten(-1, (-1, run)) for m in (model, small))
        assert bool(((after != 0).sum(-1) == kept).all())
        assert torch.equal(after.abs().sort(-1).values[..., -kept:], before.abs().sort(-1).values[..., -kept:])


def test_layers_without_runs_stay_and_say_why(model):
    report = fxcompress.prune(model, X, pruning_granularity="2:4").meta["pruning"]
    assert [group["name"] for group in report.groups] == ["block.first.0", "block.second.0", "head"]
    reasons = " ".join(report.refusals)
    assert "each output reads 3 channels, no multiple of 4" in reasons and "each output reads 1 channels" in reasons
    assert report.saved == 0.5


def test_transposed_and_grouped_convolutions_have_their_runs_along_the_input():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.grouped = nn.ConvTranspose2d(16, 12, 2, stride=2, groups=2), nn.Conv2d(12, 6, 1, groups=3)

        def forward(self, x):
            return self.grouped(self.up(x))

    model, x = randomize(Net(), seed=0), torch.randn(2, 16, 4, 4)
    small = fxcompress.prune(model, x, pruning_granularity="2:4", pruning_correction=None)
    up = small.get_parameter("up.weight").reshape(2, 2, 4, 6, 2, 2)  # groups, runs, a run, ...
    assert bool(((up != 0).sum(2) == 2).all())
    assert bool(((small.get_parameter("grouped.weight").flatten(1) != 0).sum(1) == 2).all())


def test_the_layouts_are_inverse_to_each_other():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.conv = nn.ConvTranspose2d(16, 12, 2, groups=2), nn.Conv2d(12, 6, 3, groups=3)

        def forward(self, x):
            return self.conv(self.up(x))

    gm = float_graph(Net(), torch.randn(2, 16, 4, 4))
    for node in gm.graph.nodes:
        if node.op == "call_function":
            weight = getattr(gm, node.args[1].target.split(".")[0]).weight.detach()
            rows = along_inputs(node, weight)
            assert torch.equal(from_inputs(node, rows, weight), weight)
            picked = torch.zeros_like(rows)
            picked[0] = 1  # the first output reads its own group only
            x = torch.randn(1, 16 if "up" in node.args[1].target else 12, 5, 5)
            y = node.target(x, from_inputs(node, picked, weight), None, *node.args[3:])
            assert bool((y[:, 0] != 0).any()) and not bool(y[:, 1:].any())


# ---------------------------------------------------------------------------------------------------------------- report


def test_the_report_says_what_zeros_buy(model):
    small = fxcompress.prune(model, X, pruning_ratio=0.5, pruning_granularity="unstructured", pruning_budget="uniform")
    report = small.meta["pruning"]
    assert report.macs[0] == report.macs[1] and report.parameters[0] == report.parameters[1]
    assert report.nonzero[1] == sum(int((p != 0).sum()) for p in weights(small).values())
    by_hand = 64 * sum(int((p != 0).sum()) for name, p in weights(small).items() if name != "head.weight")
    assert report.nonzero_macs[1] == by_hand + int((small.get_parameter("head.weight") != 0).sum())
    text = str(report)
    assert "MACs executed per sample" in text and "Dense kernels multiply by zeros at full price" in text


def test_a_saved_int8_model_does_not_store_the_zeros(tmp_path):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    model, x = randomize(Wide(), seed=0), images(2, 3, 8, 8)
    options = {"example_inputs": x, "input_range": (-4, 4)}
    dense = fxcompress.compile(model, **options)
    sparse = fxcompress.compile(model, pruning_ratio=0.75, pruning_granularity="unstructured", **options)
    report = sparse.report()
    assert report.macs == dense.report().macs
    assert report.stored_bytes < 0.5 * dense.report().stored_bytes  # a bit each and a byte for every fourth
    assert "are executed all the same (unstructured, magnitude)" in report.pruning.summary()
    sparse.save(tmp_path / "m.fxc")
    dense.save(tmp_path / "d.fxc")
    saved = (tmp_path / "d.fxc").stat().st_size - (tmp_path / "m.fxc").stat().st_size
    assert saved == pytest.approx(dense.report().stored_bytes - report.stored_bytes, abs=3000)
    assert torch.equal(fxcompress.load(tmp_path / "m.fxc")(x), sparse(x))


# ------------------------------------------------------------------------------------------------- zeros stay zero


def integer_weights(compiled):
    return [t for t in compiled.graph_module.buffers() if t.dtype == torch.int8 and t.ndim >= 2]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"calibration_data": DATA}, {"target": "w4a8"}, {"target": "w4a8", "weight_quantizer": "squant"},
        {"target": "w4a8", "weight_quantizer": "power"}, {"equalize": True, "absorb_bias": True, "weight_granularity": "tensor"},
        {"spiq": True}, {"bias_correction": "analytic"},
    ],
    ids=str,
)  # fmt: skip
def test_zeros_are_zero_codes_whatever_else_is_done(model, options):
    compiled = fxcompress.compile(model, **{"target": "int8", "example_inputs": X, "input_range": (-4, 4), "pruning_granularity": "2:4",
                                            **options})  # fmt: skip
    runs = [w.movedim(1, -1).unflatten(-1, (-1, 4)) for w in integer_weights(compiled) if w.shape[1] % 4 == 0]
    assert len(runs) == 3 and all(int((run != 0).sum(-1).max()) == 2 for run in runs)


def test_a_residual_of_a_zero_is_zero(model):
    compiled = fxcompress.compile(
        model, "w4a8", example_inputs=X, input_range=(-4, 4), pruning_granularity="2:4", residual=1.0
    )
    runs = [w.movedim(1, -1).unflatten(-1, (-1, 4)) for w in integer_weights(compiled) if w.shape[1] % 4 == 0]
    assert all(int((run != 0).sum(-1).max()) <= 2 for run in runs)


def test_a_further_input_shape_has_the_same_zeros(model):
    compiled = fxcompress.compile(model, example_inputs=X, calibration_data=DATA, pruning_granularity="unstructured", pruning_ratio=0.5,
                                  pruning_criterion="taylor")  # fmt: skip
    compiled(images(2, 3, 12, 12))
    first, second = (e.graph_module for e in compiled._executables)
    found = [[t for t in gm.buffers() if t.dtype == torch.int8 and t.ndim >= 2] for gm in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_pruned_network_compiles_to_the_same_integers(model):
    options = {"pruning_granularity": "2:4", "pruning_correction": None}
    later = fxcompress.compile(fxcompress.prune(model, X, **options), example_inputs=X, input_range=(-4, 4))
    at_once = fxcompress.compile(model, example_inputs=X, input_range=(-4, 4), **options)
    assert torch.equal(later(X), at_once(X))


def test_fine_tuning_keeps_zeros(model):
    small = fxcompress.prune(model, X, pruning_ratio=0.7, pruning_granularity="unstructured")
    tuned = fxcompress.fine_tune(small, DATA, teacher=model, steps=3, batch_size=16, learning_rate=0.1)
    for name, weight in weights(small).items():
        assert torch.equal(tuned.get_parameter(name) == 0, weight == 0)
    assert not torch.equal(tuned.get_parameter("head.weight"), small.get_parameter("head.weight"))


# ------------------------------------------------------------------------------------------------------------ correction


def test_biases_take_up_what_the_weights_gave_on_average():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 8, 1))
    x = images(256, 3, 8, 8)
    model[1].momentum = None
    model.train()(x)
    model.eval()
    options = {"pruning_granularity": "unstructured", "pruning_ratio": 0.6, "ignored_layers": ["0"]}
    plain = fxcompress.prune(model, X, pruning_correction=None, **options)
    corrected = fxcompress.prune(model, X, pruning_correction="analytic", **options)
    means = [float((m(x).mean((0, 2, 3)) - model(x).mean((0, 2, 3))).norm()) for m in (corrected, plain)]
    assert means[0] < 0.3 * means[1]


def test_the_model_is_not_modified(model):
    before = copy.deepcopy(model.state_dict())
    fxcompress.prune(model, X, pruning_granularity="2:4", calibration_data=DATA)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_ignored_layers_keep_their_weights(model):
    small = fxcompress.prune(
        model, X, pruning_ratio=0.5, pruning_granularity="unstructured", ignored_layers=["block", "head"]
    )
    assert torch.equal(small.get_parameter("head.weight"), model.head.weight)
    assert bool((small.get_parameter("block.first.0.weight") != 0).all())
    assert any("ignored_layers names it" in refusal for refusal in small.meta["pruning"].refusals)


# -------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"pruning_granularity": "3:2"},
            r'pruning_granularity="3:2" keeps 3 of every 2 weights; expected "N:M" with N < M',
        ),
        ({"pruning_granularity": "row"}, r"unknown pruning_granularity 'row'"),
        (
            {"pruning_granularity": "2:4", "pruning_ratio": 0.3},
            r'pruning_ratio is 0.3, but pruning_granularity="2:4" removes 0.5',
        ),
        (
            {"pruning_granularity": "2:4", "pruning_budget": "uniform"},
            r'pruning_budget has no effect with pruning_granularity="2:4"',
        ),
        ({"pruning_granularity": "unstructured", "round_to": 4}, r"round_to has no effect"),
        ({"pruning_granularity": "unstructured", "pruning_measure": "macs"}, r"pruning_measure has no effect"),
        (
            {"pruning_granularity": "unstructured", "pruning_budget": "importance"},
            r'pruning_budget="importance" does not go with',
        ),
        (
            {"pruning_granularity": "2:4", "pruning_criterion": "outgoing"},
            r'pruning_criterion="outgoing" does not go with',
        ),
        (
            {"pruning_granularity": "unstructured", "pruning_ratio": 0.9999},
            r"but at most 0\.\d+ of the weights can be removed",
        ),
    ],
)
def test_mistakes(model, options, message):
    with pytest.raises(OptionError, match=message):
        fxcompress.prune(model, X, **options)


def test_a_criterion_that_needs_data_says_so(model):
    with pytest.raises(CalibrationError, match="looks at data, and there are none"):
        fxcompress.prune(model, X, pruning_granularity="unstructured", pruning_criterion="taylor")
