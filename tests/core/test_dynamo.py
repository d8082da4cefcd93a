"""``torch.compile(model, backend="fxcompress")``: the network of ``fxcompress.compile``, bit for bit."""

import importlib
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.dynamo import compile_graph, freeze
from fxcompress.errors import CaptureError, OptionError
from tests.support.graphs import build

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Counting:
    """The backend, counting how often it compiles."""

    def __init__(self):
        self.graphs = []

    def __call__(self, gm, example_inputs, **kwargs):
        self.graphs.append(gm)
        return compile_graph(gm, example_inputs, **kwargs)


@pytest.mark.parametrize("name", ["classifier", "two_inputs", "dict_output"])
def test_the_answers_are_those_of_compile(name):
    model, inputs = build(name)
    found = torch.compile(model, backend=compile_graph, fullgraph=True)(*inputs)
    expected = fxcompress.compile(model, example_inputs=inputs)(*inputs)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        expected, found = torch.cat([*expected.values()], 1), torch.cat([*found.values()], 1)
    assert torch.equal(found, expected)


def test_options_are_those_of_compile():
    model, (x,) = build("classifier")
    options = {"target": "w4a8", "calibration_data": [x], "input_range": (-5, 5), "backend": "reference"}
    found = torch.compile(model, backend=compile_graph, options=options)(x)
    expected = fxcompress.compile(model, example_inputs=x, **options)(x)
    assert torch.equal(found, expected)


def test_a_dynamic_batch_compiles_once_more():
    model, (x,) = build("classifier")
    counting = Counting()
    fast = torch.compile(model, backend=counting, options={"input_range": (-3, 3)})
    net = fxcompress.compile(model, example_inputs=x, input_range=(-3, 3))
    for batch in (2, 6, 8, 10):
        images = torch.randn(batch, *x.shape[1:])
        assert torch.equal(fast(images), net(images))
    assert len(counting.graphs) == 2


class Flattened(nn.Module):
    """Uses the size of the batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)).view(x.shape[0], 4))


def test_symbolic_sizes_are_taken_from_the_tensor():
    model, options = Flattened().eval(), {"input_range": (0, 1), "calibration_data": [torch.rand(4, 3, 5, 5)]}
    fast = torch.compile(model, backend=compile_graph, dynamic=True, fullgraph=True, options=options)
    net = fxcompress.compile(model, **options)
    for batch in (3, 5):
        x = torch.rand(batch, 3, 5, 5)
        assert torch.equal(fast(x), net(x))


def test_weights_are_frozen_and_the_model_is_unchanged():
    model, (x,) = build("classifier")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast = torch.compile(model, backend=compile_graph)
    y = fast(x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(fast(x), y)  # a snapshot, like that of fxcompress.compile


def test_a_graph_break_makes_two_networks():
    first, (x,) = build("conv_bn_relu")
    head = nn.Conv2d(8, 2, 1).eval()

    def forward(x):
        y = first(x)
        torch._dynamo.graph_break()
        return head(y)

    counting = Counting()
    y = torch.compile(forward, backend=counting)(x)
    assert len(counting.graphs) == 2
    assert (y - forward(x)).abs().max() < 0.05 * forward(x).abs().max()


def test_mistakes_are_named():
    model, (x,) = build("classifier")
    for arguments, message in (
        ({"options": {"tarket": "int8"}}, "unknown option 'tarket'"),
        ({"options": {"example_inputs": x}}, "options contain example_inputs"),
        ({"mode": "max-autotune"}, "torch.compile was given mode='max-autotune'"),
    ):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message) as error:
            torch.compile(model, backend=compile_graph, **arguments)(x)
        assert isinstance(error.value.inner_exception, OptionError)


def test_a_number_among_the_inputs_is_refused():
    graph = torch.fx.Graph()
    x, scale = graph.placeholder("x"), graph.placeholder("scale")
    x.meta["example_value"], scale.meta["example_value"] = torch.ones(2), 3
    graph.output((graph.call_function(torch.mul, (x, scale)),))
    with pytest.raises(CaptureError, match="the graph takes a number, scale"):
        freeze(torch.fx.GraphModule(nn.Module(), graph), (torch.ones(2), 3))


def test_the_package_announces_the_backend():
    name, target = re.search(r"torch_dynamo_backends\]\n(\w+) = \"(.+)\"", PYPROJECT.read_text()).groups()
    module, function = target.split(":")
    assert name == "fxcompress" and getattr(importlib.import_module(module), function) is compile_graph


def test_torch_finds_the_backend_by_name():
    if "fxcompress" not in metadata.entry_points(group="torch_dynamo_backends").names:
        pytest.skip("the installed package does not announce the backend: install it again")
    model, (x,) = build("mlp")
    assert torch.equal(torch.compile(model, backend="fxcompress")(x), fxcompress.compile(model, example_inputs=x)(x))
