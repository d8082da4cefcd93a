"""The pass in the pipeline, and ``fxcompress.prune``: what users ask for, get and are told."""

import copy

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.errors import CalibrationError, OptionError, PassContractError
from fxcompress.passes import prune_channels
from fxcompress.pruning.criteria import CRITERIA
from tests.support.graphs import ConvBnRelu, ResidualBlock, images, randomize


class Classifier(nn.Module):
    """conv, two residual blocks, an unpooled head; 16 channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = ConvBnRelu(3, 16), ResidualBlock(16), ResidualBlock(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))


@pytest.fixture
def model():
    return randomize(Classifier(), seed=1)


X = images(4, 3, 8, 8)
DATA = images(96, 3, 8, 8, seed=3)


def mac_share(network):
    before, after = network.meta["pruning"].macs
    return 1 - after / before


@pytest.mark.parametrize("measure", ["macs", "parameters"])
@pytest.mark.parametrize("budget", ["global", "uniform"])
def test_removes_what_was_asked_for(model, measure, budget):
    small = fxcompress.prune(model, X, pruning_ratio=0.3, pruning_measure=measure, pruning_budget=budget)
    report = small.meta["pruning"]
    before, after = getattr(report, measure)
    assert 0.3 <= 1 - after / before < 0.4
    assert report.saved == pytest.approx(1 - after / before)


def test_the_result_is_a_plain_module_with_smaller_parameters_of_the_same_names(model):
    small = fxcompress.prune(model, X)
    assert type(small).__mro__[1] is torch.fx.GraphModule
    own, given = dict(small.named_parameters()), dict(model.named_parameters())
    assert own.keys() == given.keys()
    assert sum(p.numel() for p in own.values()) < sum(p.numel() for p in given.values())
    assert small(X).shape == model(X).shape
    assert small(X[:1]).shape == (1, 5)
    small(X).sum().backward()
    assert all(p.grad is not None for p in own.values())


class Computed(nn.Module):
    """Weights that are computed from parameters, and constants that are not."""

    def __init__(self):
        super().__init__()
        self.norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 3))
        self.scale, self.slope = nn.Parameter(torch.rand(16) + 0.5), nn.PReLU(16)
        self.tied = nn.Parameter(torch.randn(16, 16) / 4)
        self.register_buffer("blur", torch.ones(16, 1, 3, 3) / 9)

    def forward(self, x):
        x = self.slope(self.norm(x)) * self.scale[:, None, None]
        x = nn.functional.conv2d(x, self.blur * 0.5, groups=16).mean((2, 3))
        return nn.functional.linear(nn.functional.linear(x, self.tied).relu(), self.tied.t())


def test_what_is_computed_from_parameters_can_be_trained():
    """Weight norm, a slope in another shape, a transposed weight: constants of the graph, but parameters were behind them."""
    model = randomize(Computed(), seed=1)
    with torch.no_grad():
        small = fxcompress.prune(model, X, pruning_ratio=0.2)
    trained = {tuple(p.shape[1:]) for p in small.parameters() if p.requires_grad}
    assert {(3, 3, 3), (1, 1), ()} <= trained  # the convolution, scale and slope, its bias
    assert sum(p.ndim == 2 for p in small.parameters()) == 2
    blurs = [b for b in small.buffers() if b.ndim == 4]  # was no parameter, and is none
    assert len(blurs) == 1 and blurs[0].shape[1:] == (1, 3, 3)
    small(X).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    tuned = fxcompress.fine_tune(small, DATA, teacher=model, loss=nn.functional.mse_loss, steps=2)
    after = dict(tuned.named_parameters())
    assert not any(torch.equal(p, after[name]) for name, p in small.named_parameters())


def test_frozen_parameters_stay_frozen(model):
    model.stem.requires_grad_(False)
    small = fxcompress.prune(model, X)
    assert {n for n, p in small.named_parameters() if not p.requires_grad} == {
        n for n, p in model.named_parameters() if n.startswith("stem.")
    }
    tuned = fxcompress.fine_tune(small, DATA, teacher=model, steps=2)
    assert torch.equal(tuned.get_parameter("stem.0.weight"), small.get_parameter("stem.0.weight"))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float64])
def test_the_result_has_the_precision_of_the_model(model, precision):
    small = fxcompress.prune(model.to(precision), X.to(precision), pruning_ratio=0.3)
    assert small(X.to(precision)).dtype == precision
    assert {t.dtype for t in small.state_dict().values() if t.is_floating_point()} == {precision}


def test_the_model_is_not_modified(model):
    before = copy.deepcopy(model.state_dict())
    fxcompress.prune(model, X, calibration_data=DATA)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_computes_the_model_with_the_channels_zeroed(model):
    small = fxcompress.prune(model, X, pruning_correction=None)
    masked = copy.deepcopy(model).double()
    for cut in small.meta["pruning"].slices:
        if cut["writes"]:
            masked.state_dict()[cut["target"]].index_fill_(cut["axis"], torch.tensor(cut["indices"]), 0)
    assert torch.allclose(small.double()(X.double()), masked(X.double()), atol=1e-9)
    assert not torch.allclose(model.double()(X.double()), masked(X.double()), atol=1e-3)


def test_a_mistake_in_the_cut_is_never_silent(model, monkeypatch):
    shrink = prune_channels.shrink

    def wrong(groups, removed, *arguments, **more):
        gm = shrink(groups, removed, *arguments, **more)
        gm.head.bias = gm.head.bias + 1
        return gm

    monkeypatch.setattr(prune_channels, "shrink", wrong)
    with pytest.raises(PassContractError, match=r"differs by .* from the one with the channels zeroed"):
        fxcompress.prune(model, X)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion(model, criterion):
    small = fxcompress.prune(model, X, pruning_criterion=criterion, calibration_data=DATA)
    again = fxcompress.prune(model, X, pruning_criterion=criterion, calibration_data=DATA)
    assert mac_share(small) >= 0.3
    assert torch.equal(small(X), again(X))


def test_channels_that_do_nothing_go_first(model):
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(model.first.first[1], name)[:6] = 0
    small = fxcompress.prune(model, X, pruning_ratio=0.05, round_to=1, pruning_criterion="contribution", calibration_data=DATA,
                             pruning_correction=None)  # fmt: skip
    cut = next(c for c in small.meta["pruning"].slices if c["target"] == "first.first.0.weight")
    assert set(cut["indices"]) <= set(range(6))
    assert torch.allclose(small(X), model(X), atol=1e-4)


def test_statistics_are_measured_again_with_data(model):
    options = {"pruning_ratio": 0.5, "pruning_correction": "measured"}
    small = fxcompress.prune(model, X, calibration_data=DATA, **options)
    assert small.meta["pruning"].correction == "measured"
    first = torch.nn.functional.conv2d(DATA, small.get_parameter("stem.0.weight"), padding=1)
    batches = torch.stack([part.mean((0, 2, 3)) for part in first.split(32)])
    assert torch.allclose(small.get_buffer("stem.1.running_mean"), batches.mean(0), atol=1e-5)


@pytest.mark.parametrize("data, expected", [(None, "analytic"), (DATA, "measured")])
def test_correction_by_default(model, data, expected):
    assert fxcompress.prune(model, X, calibration_data=data).meta["pruning"].correction == expected


def test_analytic_correction_keeps_means():
    """Linear layers behind batch norm and ReLU: the mean of what is read is kept up to the Gaussian model of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 8, 1))
    x = images(256, 3, 8, 8)
    model[1].momentum = None
    model.train()(x)
    model.eval()
    plain = fxcompress.prune(model, X, pruning_ratio=0.5, pruning_correction=None)
    corrected = fxcompress.prune(model, X, pruning_ratio=0.5, pruning_correction="analytic")
    exact = model(x).mean((0, 2, 3))
    assert (corrected(x).mean((0, 2, 3)) - exact).norm() < 0.1 * (plain(x).mean((0, 2, 3)) - exact).norm()


def test_round_to_keeps_multiples(model):
    small = fxcompress.prune(model, X, pruning_ratio=0.5, round_to=4)
    sizes = {
        p.shape[0] for name, p in small.named_parameters() if name != "head.weight" and not name.startswith("head")
    }
    assert all(size % 4 == 0 for size in sizes) and min(sizes) < 16


def test_ignored_layers_keep_their_outputs(model):
    small = fxcompress.prune(model, X, ignored_layers=["stem", "first"])
    shapes = {name: p.shape[0] for name, p in small.named_parameters()}
    assert shapes["stem.0.weight"] == shapes["first.first.0.weight"] == 16
    assert shapes["second.first.0.weight"] < 16


def test_no_layer_is_ever_empty(model):
    small = fxcompress.prune(model, X, pruning_ratio=0.9, round_to=1)
    assert all(min(p.shape) >= 1 for p in small.parameters())
    assert small(X).shape == (4, 5)


def test_any_signature():
    class Signature(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x, scale=None, *, y, flag=True):
            z = self.b(torch.relu(self.a(x + y if flag else x)))
            return {"out": z, "pair": (z * 2, None)}

    model = Signature().eval()
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    small = fxcompress.prune(model, {"x": x, "y": y, "flag": True})
    found, expected = small(x=x, y=y, flag=True), model(x, y=y)
    assert found.keys() == expected.keys() and found["pair"][1] is None
    assert found["pair"][0].shape == (4, 3)


# -------------------------------------------------------------------------------------------------------- in the pipeline


def test_compile_prunes_and_reports(model):
    compiled = fxcompress.compile(model, example_inputs=X, calibration_data=DATA, pruning_ratio=0.3)
    plain = fxcompress.compile(model, example_inputs=X, calibration_data=DATA)
    report = compiled.report()
    assert report.pruning.saved >= 0.3
    assert report.macs == report.pruning.macs[1] < plain.report().macs
    record = next(p for p in report.passes if p["name"] == "prune_channels")
    assert record["rewrites"] == sum(group["removed"] > 0 for group in report.pruning.groups)
    assert any("it is a graph output" in refusal for refusal in record["refusals"])
    assert "of the MACs (outgoing, global)" in str(report)
    assert type(report).from_dict(report.to_dict()).pruning == report.pruning
    assert compiled.verify_integer_only().integer_only


def test_compile_does_not_prune_unless_asked(model):
    report = fxcompress.compile(model, example_inputs=X).report()
    assert report.pruning is None
    assert next(p for p in report.passes if p["name"] == "prune_channels")["rewrites"] == 0


def test_a_pruned_network_compiles_to_the_same_integers(model):
    small = fxcompress.prune(model, X, pruning_correction=None)
    later = fxcompress.compile(small, example_inputs=X, input_range=(-4, 4))
    at_once = fxcompress.compile(
        model, example_inputs=X, input_range=(-4, 4), pruning_ratio=0.3, pruning_correction=None
    )
    assert torch.equal(later(X), at_once(X))


@pytest.mark.parametrize("options", [{}, {"calibration_data": DATA, "pruning_criterion": "taylor"}])
def test_a_further_input_shape_keeps_the_same_channels(model, options):
    compiled = fxcompress.compile(model, example_inputs=X, input_range=(-4, 4), pruning_ratio=0.3, **options)
    compiled(images(2, 3, 12, 12))
    first, second = (e.graph_module for e in compiled._executables)
    weights = [[t for t in gm.buffers() if t.dtype == torch.int8 and t.ndim >= 2] for gm in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


# ---------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pruning_ratio": 1.0}, r"pruning_ratio is 1.0; expected a number with 0 <= pruning_ratio < 1"),
        ({"pruning_ratio": 0.3, "pruning_criterion": "l3"}, r"unknown pruning_criterion 'l3'. Did you mean 'l[12]'"),
        ({"pruning_ratio": 0.3, "pruning_budget": "even"}, r"unknown pruning_budget 'even'"),
        ({"pruning_ratio": 0, "pruning_criterion": "l1"}, r"pruning_criterion has no effect with pruning_ratio=0"),
        ({"pruning_ratio": 0.3, "round_to": 0}, r"round_to is 0; expected None or a whole number >= 1"),
        ({"pruning_ratio": 0.3, "ignored_layers": ["stm"]}, r"ignored_layers: no submodule 'stm'. Did you mean 'stem'"),
        (
            {"pruning_ratio": 0.99},
            r"pruning_ratio is 0.99, but at most 0\.\d+ of the macs can be removed .*graph output",
        ),
    ],
)
def test_mistakes(model, options, message):
    with pytest.raises(OptionError, match=message):
        fxcompress.prune(model, X, **options)


def test_a_network_that_cannot_be_pruned_says_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softmax(1)).eval()
    with pytest.raises(
        OptionError, match=r"at most 0\.000 of the macs can be removed \(1 layers stay: .*sum over the channels"
    ):
        fxcompress.prune(model, X)


def test_a_correction_that_needs_data_says_so(model):
    with pytest.raises(CalibrationError, match='pruning_correction="measured" needs data, and there are none'):
        fxcompress.prune(model, X, pruning_correction="measured")


def test_a_criterion_that_needs_data_says_so(model):
    with pytest.raises(
        CalibrationError, match="this pruning_criterion or pruning_budget looks at data, and there are none"
    ):
        fxcompress.prune(model, X, pruning_criterion="taylor")
