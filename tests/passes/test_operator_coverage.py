"""Every operator and structure that networks in the wild are made of compiles to integers, or is refused with its reason.

The cases of a group are the named outputs of one network, so that a group is one compilation: each takes 8-bit codes
``x`` (a convolution and a ReLU), ``y`` (a convolution alone), both (N, 8, 6, 8), and must come out close to the float model.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fxcompress
from fxcompress.errors import UnsupportedOperatorError
from fxcompress.report import sqnr_db
from tests.support.graphs import images, randomize

#: 8-bit codes of the operands come with 35-40 dB, a second rounding and a nonlinearity take some of it.
GOOD = 25.0


class Cases(nn.Module):
    """Named functions of two tensors of codes."""

    def __init__(self, cases, **layers):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleDict(layers)
        self.cases = cases

    def forward(self, image):
        x, y = F.relu(self.first(image)), self.second(image)
        return {name: case(x, y, self.layers) for name, case in self.cases.items()}


def compile_cases(model, *, shape=(3, 6, 8), keep_weights=False):
    """(outputs of the float model, of the compiled one) on inputs that were not calibrated on."""
    model = model.eval() if keep_weights else randomize(model)
    net = fxcompress.compile(
        model, example_inputs=images(2, *shape), calibration_data=[images(8, *shape, seed=1)], range_method="minmax"
    )
    assert net.verify_integer_only().integer_only
    fresh = images(8, *shape, seed=1)[2:5]
    with torch.no_grad():
        return model(fresh), net(fresh)


GROUPS = {
    "activations": {
        "relu6": lambda x, y, m: F.relu6(y * 2),
        "leaky_relu": lambda x, y, m: F.leaky_relu(y, 0.1),
        "elu": lambda x, y, m: F.elu(y),
        "selu": lambda x, y, m: F.selu(y),
        "celu": lambda x, y, m: F.celu(y, 0.7),
        "gelu": lambda x, y, m: F.gelu(y),
        "silu": lambda x, y, m: F.silu(y),
        "swish written out": lambda x, y, m: y * torch.sigmoid(y),
        "mish": lambda x, y, m: F.mish(y),
        "hardswish": lambda x, y, m: F.hardswish(y),
        "hardswish written out": lambda x, y, m: y * F.relu6(y + 3) / 6,
        "hardsigmoid": lambda x, y, m: F.hardsigmoid(y),
        "hardtanh": lambda x, y, m: F.hardtanh(y, -0.5, 0.75),
        "softplus": lambda x, y, m: F.softplus(y),
        "log_sigmoid": lambda x, y, m: F.logsigmoid(y),
        "glu": lambda x, y, m: F.glu(y, 1),
        "sqrt": lambda x, y, m: torch.sqrt(x + 1),
        "pow": lambda x, y, m: y**3,
        "exp": lambda x, y, m: torch.exp(-x),
    },
    "arithmetic": {
        "constant factor and term": lambda x, y, m: 0.3 * x - 1.7,
        "number minus tensor": lambda x, y, m: 2 - x,
        "difference": lambda x, y, m: x - y,
        "three terms": lambda x, y, m: x + y + 2 * x,
        "product": lambda x, y, m: x * y,
        "gate per channel": lambda x, y, m: x * torch.sigmoid(y.mean((2, 3), keepdim=True)),
        "gate per place": lambda x, y, m: x * torch.sigmoid(y.mean(1, keepdim=True)),
        "gate, expanded": lambda x, y, m: x * torch.sigmoid(y.mean((2, 3), keepdim=True)).expand_as(x),
        "quotient": lambda x, y, m: y / (x + 2),
        "maximum": lambda x, y, m: torch.maximum(x, y),
        "minimum": lambda x, y, m: torch.minimum(x, y),
        "zeros of the same shape": lambda x, y, m: torch.cat([torch.zeros_like(x[:, :2]) + y[:, :2], x], 1),
        "zeros in a product": lambda x, y, m: y + x * torch.zeros_like(x),
    },
    "reductions": {
        "mean over places": lambda x, y, m: x.mean((2, 3)),
        "mean over channels": lambda x, y, m: y.mean(1, keepdim=True),
        "sum over places": lambda x, y, m: x.sum((2, 3)),
        "sum over channels": lambda x, y, m: x.sum(1),
        "largest of the channels": lambda x, y, m: y.max(dim=1, keepdim=True)[0],
        "largest of the places": lambda x, y, m: y.amax((2, 3)),
        "largest of the rows": lambda x, y, m: y.amax(2),
        "smallest of the channels": lambda x, y, m: y.min(1)[0],
        "smallest of the places": lambda x, y, m: y.amin((2, 3), keepdim=True),
    },
    "pooling and resizing": {
        "max pool": lambda x, y, m: F.max_pool2d(x, 3, 2, 1),
        "dilated max pool": lambda x, y, m: F.max_pool2d(x, 2, 1, dilation=2),
        "average pool": lambda x, y, m: F.avg_pool2d(y, 3, 2, 1),
        "average pool without the border": lambda x, y, m: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False),
        "average pool, rounded up": lambda x, y, m: F.avg_pool2d(y, 3, 2, ceil_mode=True),
        "unpooling": lambda x, y, m: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
        "adaptive average pool": lambda x, y, m: F.adaptive_avg_pool2d(y, (4, 3)),
        "adaptive max pool": lambda x, y, m: F.adaptive_max_pool2d(y, (4, 3)),
        "nearest, factor": lambda x, y, m: F.interpolate(y, scale_factor=2),
        "nearest, size": lambda x, y, m: F.interpolate(y, size=(9, 5)),
        "bilinear, factor": lambda x, y, m: F.interpolate(y, scale_factor=2, mode="bilinear"),
        "bilinear, size": lambda x, y, m: F.interpolate(y, size=(9, 5), mode="bilinear", align_corners=True),
    },
    "parts": {
        "chunk": lambda x, y, m: torch.cat(y.chunk(2, 1)[::-1], 1),
        "split": lambda x, y, m: y.split([3, 5], 1)[1],
        "slice": lambda x, y, m: y[:, 1:7:2, ::2],
        "select": lambda x, y, m: y[:, 3],
        "stack": lambda x, y, m: torch.stack([x, y], 2),
        "unbind": lambda x, y, m: y.unbind(1)[2],
        "index": lambda x, y, m: y[:, torch.tensor([2, 0, 1])],
        "repeat": lambda x, y, m: y.repeat(1, 2, 1, 1),
        "expand": lambda x, y, m: y.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4),
        "flip": lambda x, y, m: y.flip(3),
        "roll": lambda x, y, m: torch.roll(y, 2, 2),
        "pixel shuffle": lambda x, y, m: F.pixel_shuffle(y, 2),
        "pixel unshuffle": lambda x, y, m: F.pixel_unshuffle(y, 2),
        "channel shuffle": lambda x, y, m: y.reshape(-1, 2, 4, 6, 8).transpose(1, 2).reshape(-1, 8, 6, 8),
        "reflected border": lambda x, y, m: F.pad(y, (1, 2, 1, 0), mode="reflect"),
        "permutation": lambda x, y, m: y.permute(0, 2, 3, 1).flatten(1, 2),
    },
    "products": {
        "batched": lambda x, y, m: torch.bmm(x.flatten(2), y.flatten(2).transpose(1, 2)),
        "matmul": lambda x, y, m: x @ y.transpose(2, 3),
        "einsum": lambda x, y, m: torch.einsum("nchw,nkhw->nck", x, y),
    },
}  # fmt: skip

LAYERS = {
    "dilated": nn.Conv2d(8, 6, 3, padding=2, dilation=2),
    "grouped": nn.Conv2d(8, 6, 3, groups=2),
    "asymmetric": nn.Conv2d(8, 6, (1, 5), padding=(0, 2)),
    "same": nn.Conv2d(8, 6, 3, padding="same"),
    "transposed": nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed, grouped, dilated": nn.ConvTranspose2d(8, 6, 3, groups=2, dilation=2),
    "slopes": nn.PReLU(8),
    "slope": nn.PReLU(),
    "batch norm alone": nn.BatchNorm2d(8),
    "linear on the last dimension": nn.Linear(8, 5),
}


def assert_close(expected, found):
    low = {name: round(sqnr_db(expected[name], found[name]), 1) for name in expected}
    assert {name: sqnr for name, sqnr in low.items() if not sqnr > GOOD} == {}


@pytest.mark.parametrize("group", GROUPS)
def test_operators(group):
    assert_close(*compile_cases(Cases(GROUPS[group])))


def test_layers():
    cases = {name: lambda x, y, m, i=i: m[str(i)](y) for i, name in enumerate(LAYERS)}
    assert_close(*compile_cases(Cases(cases, **{str(i): layer for i, layer in enumerate(LAYERS.values())})))


# ---------------------------------------------------------------------------------------------------------- structures


class Signal(nn.Sequential):
    """1d: convolution, transposed convolution, pooling, resizing."""

    def __init__(self):
        super().__init__(
            nn.Conv1d(2, 6, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool1d(2), nn.ConvTranspose1d(6, 4, 4, stride=2),
            nn.Upsample(scale_factor=1.5, mode="linear"), nn.AdaptiveAvgPool1d(3),
        )  # fmt: skip


class Volume(nn.Sequential):
    """3d: convolution, batch norm, pooling, transposed convolution."""

    def __init__(self):
        super().__init__(
            nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2),
            nn.ConvTranspose3d(6, 4, 2, stride=2), nn.AvgPool3d(2),
        )  # fmt: skip


class Shared(nn.Module):
    """One module called three times, and a second one that holds the same weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.tied = (nn.Conv2d(i, 6, 3, padding=1) for i in (3, 6, 6))
        self.tied.weight = self.block.weight

    def forward(self, x):
        x = self.stem(x)
        for _ in range(3):
            x = F.relu(self.block(x))
        return self.tied(x)


class Reparameterized(nn.Module):
    """Weights that are computed from parameters."""

    def __init__(self):
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
        self.second = parametrizations.spectral_norm(nn.Conv2d(6, 6, 3))
        self.third = nn.utils.weight_norm(nn.Conv2d(6, 4, 1))

    def forward(self, x):
        return self.third(F.relu(self.second(F.relu(self.first(x)))))


class Recurrent(nn.Module):
    """A cell that starts from a state of zeros, unrolled over the channels of an image."""

    def __init__(self):
        super().__init__()
        self.stem, self.gates, self.state = nn.Conv2d(3, 4, 3), nn.Linear(4, 24), nn.Linear(6, 24)

    def forward(self, x):
        x = F.relu(self.stem(x)).mean((2, 3))
        h = c = torch.zeros(x.shape[0], 6)
        for _ in range(3):
            i, f, g, o = (self.gates(x) + self.state(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h


STRUCTURES = {
    "1d": (Signal, (2, 24)),
    "3d": (Volume, (2, 4, 6, 6)),
    "shared and tied": (Shared, (3, 8, 8)),
    "reparameterized": (Reparameterized, (3, 8, 8)),
    "state of zeros": (Recurrent, (3, 8, 8)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name):
    model, shape = STRUCTURES[name]
    torch.manual_seed(0)
    expected, found = compile_cases(model(), shape=shape, keep_weights=name == "reparameterized")
    assert sqnr_db(expected, found) > GOOD


class Several(nn.Module):
    """Two inputs of different shape, nested outputs."""

    def __init__(self):
        super().__init__()
        self.image, self.facts, self.head = nn.Conv2d(3, 6, 3), nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, image, facts):
        features = F.relu(self.image(image))
        both = features.mean((2, 3)) * torch.sigmoid(self.facts(facts))
        return {"class": self.head(both), "maps": [features, features.amax(1)]}


def test_several_inputs_and_outputs():
    model = randomize(Several())
    inputs = images(4, 3, 8, 8), images(4, 5, seed=1)
    net = fxcompress.compile(model, example_inputs=inputs, calibration_data=[inputs])
    assert net.verify_integer_only().integer_only
    with torch.no_grad():
        expected, found = model(*inputs), net(*inputs)
    assert sqnr_db(expected["class"], found["class"]) > GOOD
    for a, b in zip(expected["maps"], found["maps"], strict=True):
        assert sqnr_db(a, b) > GOOD


# ------------------------------------------------------------------------------------------------------------ refusals


class Within(nn.Module):
    """A function in a submodule called "inner", behind a convolution."""

    def __init__(self, function):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.inner = _Function(function)

    def forward(self, x):
        return self.inner(self.stem(x))


class _Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


LINE = f"[inner (test_operator_coverage.py:{_Function.forward.__code__.co_firstlineno + 1})]"

#: name -> (function, one line of the message per operator)
REFUSED = {
    "argmax": (lambda x: x.argmax(1), [f"aten.argmax.default at argmax {LINE}"]),
    "positions of the largest": (lambda x: x.max(1)[1], [f"aten.max.dim at max_1 {LINE}"]),
    "topk": (lambda x: x.topk(2, 1)[0], [f"aten.topk.default at topk {LINE}"]),
    "sort": (lambda x: x.sort(1)[0], [f"aten.sort.default at sort {LINE}"]),
    "cumsum": (lambda x: x.cumsum(1), [f"aten.cumsum.default at cumsum {LINE}"]),
    "maximum over separate dimensions": (
        lambda x: x.amax((1, 3)),
        [f"aten.amax.default at amax {LINE}: it takes the maximum over dimensions that are not adjacent"],
    ),
    "choice by value": (
        lambda x: torch.where(x > 0, x, 0.1 * x),
        [f"aten.gt.Scalar at gt {LINE}", f"aten.where.self at where {LINE}"],
    ),
    "index by value": (
        lambda x: x[x > 0],
        [
            f"aten.gt.Scalar at gt {LINE}",
            f"aten.index.Tensor at index {LINE}: only one constant index behind the batch is supported",
        ],
    ),
    "number read from a tensor": (
        lambda x: x * x.sum().item(),
        [
            f"aten.sum.default at sum_1 {LINE}: it reduces the batch",
            f"aten.item.default (a number read from a tensor) at item {LINE}",
        ],
    ),
}


def refusal(function) -> str:
    with pytest.raises(UnsupportedOperatorError) as caught:
        fxcompress.compile(Within(function).eval(), example_inputs=images(4, 3, 8, 8))
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_integer_form_is_refused_by_name(name):
    function, operators = REFUSED[name]
    count = f"{len(operators)} operators have" if len(operators) > 1 else "1 operator has"
    assert refusal(function) == (
        f"normalize: {count} no integer lowering:\n  " + "\n  ".join(operators) + ". \n"
        "Keep them in float with keep_float=['inner'], or write them with supported operators."
    )


def test_assignment_to_a_part_is_refused():
    def first_channel_zero(x):
        y = x.clone()
        y[:, 0] = 0
        return y

    assert refusal(first_channel_zero) == (
        f"model check: fill_ {LINE}: aten.fill_.Tensor changes memory that output reads through another view. Write the "
        "change out of place: torch.cat of the parts for an assignment to a part."
    )


def test_what_is_refused_can_stay_in_float():
    x = images(4, 3, 8, 8)
    model = randomize(Within(lambda x: x.topk(2, 1)[0]))
    net = fxcompress.compile(model, example_inputs=x, keep_float=["inner"])
    assert net.verify_integer_only().exceptions == ("inner",)
    with torch.no_grad():
        assert sqnr_db(model(x), net(x)) > GOOD
