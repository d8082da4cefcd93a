"""A model that cannot be compiled is refused before any work, with the module and the remedy."""

import operator
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.capture import capture
from fxcompress.errors import ModelError, OptionError, UnsupportedOperatorError
from fxcompress.graph import calls
from fxcompress.model_checks import check_aliasing, check_model, check_supported, mark_keep_float
from fxcompress.passes.normalize import Normalize
from tests.support.float_graphs import FloatGraph, aten
from tests.support.graphs import MODELS, build


def network():
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()), nn.ReLU()).eval()


def refused(model, *parts):
    with pytest.raises(ModelError) as error:
        check_model(model)
    for part in parts:
        assert part in str(error.value), str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_accepts_the_models(name):
    check_model(build(name)[0])


def test_training_mode():
    refused(network().train(), "Sequential is in training mode", "Call model.eval() first.")
    for path, kind in (("0.1", "BatchNorm2d"), ("0.2", "Dropout")):
        model = network()
        model.get_submodule(path).train()
        refused(model, f"model check: {path}: {kind} is in training mode")


def test_training_flag_of_other_layers_does_not_matter():
    model = network()
    model[1].train()
    check_model(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_weights(value):
    model = network()
    with torch.no_grad():
        model[0][0].weight[1, 2, :2, 0] = value
    refused(model, "0.0: parameter weight has 2 NaN or Inf of 108 values", "checkpoint")


def test_broken_buffer():
    model = network()
    model[0][1].running_mean[0] = float("nan")
    refused(model, "0.1: buffer running_mean has 1 NaN or Inf of 4 values")


def test_batch_norm_without_statistics():
    refused(
        nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)).eval(), "0: batch norm without running statistics"
    )


def test_negative_variance():
    model = network()
    model[0][1].running_var[1:3] = -1.0
    refused(model, "0.1: running_var is negative in 2 channels")


def test_dtypes():
    model = network()
    model[0][0].register_parameter("codes", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    refused(model, "0.0: parameter codes has dtype int8")
    model = network()
    model.register_buffer("spectrum", torch.zeros(3, dtype=torch.complex64))
    refused(model, "buffer spectrum has dtype complex64")
    model = network()
    model.register_buffer("table", torch.zeros(3, dtype=torch.int64))
    check_model(model)


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: F.dropout(x, 0.5), "dropout is active"),
        (lambda x: F.batch_norm(x, None, None, training=True), "computes batch statistics"),
    ],
)
def test_functional_training_mode_shows_in_the_graph(function, found):
    with pytest.raises(ModelError, match=found):
        capture(Functional(function).eval(), (torch.randn(2, 3, 4, 4),))


@pytest.mark.parametrize(
    "function",
    [lambda x: _assign(x.clone()), lambda x: _stale_view(x * 2)],
)
def test_memory_changed_behind_a_view(function):
    with pytest.raises(UnsupportedOperatorError, match=r"through another view.*torch\.cat"):
        capture(Functional(function).eval(), (torch.randn(2, 3, 4),))


def _assign(x):
    x[:, 0] = 0
    return x


def _stale_view(x):
    part = x[:, 0]
    x.relu_()
    return part


def test_in_place_without_a_second_view_is_accepted():
    def function(x):
        y = (x * 2).view(-1, 12)
        y += 1
        return F.relu(F.dropout(y, training=False), inplace=True)

    model, x = Functional(function).eval(), torch.randn(2, 3, 4)
    gm = capture(model, (x,)).graph_module
    check_aliasing(gm)
    assert torch.equal(gm(x)[0], model(x))


# ---------------------------------------------------------------------------------------------- unsupported operators


class Attention(nn.Module):
    def forward(self, x):
        return torch.logcumsumexp(x, -1).cumsum(1)


class Unsupported(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.attention, self.out = nn.Conv1d(3, 3, 1), Attention(), nn.LogSoftmax(1)

    def forward(self, x):
        return self.out(self.attention(self.stem(x)))


def unsupported_graph():
    gm = capture(Unsupported().eval(), (torch.randn(2, 3, 5),)).graph_module
    Normalize().apply(Normalize().plan(gm))
    return gm


def test_every_unsupported_operator_is_named_at_once():
    with pytest.raises(UnsupportedOperatorError) as error:
        check_supported(unsupported_graph())
    text = str(error.value)
    assert "3 operators have no integer lowering" in text
    assert re.search(r"aten.logcumsumexp.default at logcumsumexp \[attention \(test_model_checks.py:\d+\)\]", text)
    assert "aten.cumsum.default" in text
    assert re.search(r"aten.log_softmax.int at log_softmax \[out \(test_model_checks.py:\d+\)\]", text)
    assert "keep_float=['attention', 'out']" in text


def test_named_modules_are_excepted():
    gm = unsupported_graph()
    with pytest.raises(UnsupportedOperatorError, match=r"1 operator has.*\n.*log_softmax"):
        check_supported(gm, keep_float=["attention"])
    check_supported(gm, keep_float=["attention", "out"])


def test_marked_nodes_are_excepted():
    gm = unsupported_graph()
    assert mark_keep_float(gm, ["attention"]) == 2
    assert [n.name for n in gm.graph.nodes if n.meta.get("keep_float")] == ["logcumsumexp", "cumsum"]
    mark_keep_float(gm, ["out"])
    check_supported(gm)


def test_a_module_is_marked_with_everything_below_it():
    gm = capture(network(), (torch.randn(2, 3, 8, 8),)).graph_module
    assert mark_keep_float(gm, ["0"]) == 3
    assert not next(calls(gm, aten.relu.default)).meta.get("keep_float")


def test_unknown_module_name():
    with pytest.raises(OptionError, match=r"no submodule 'atention'. Did you mean 'attention'\?"):
        mark_keep_float(unsupported_graph(), ["atention"])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda g, x: g.call(aten.conv1d.default, x, g.relu(g.constant(g.normal(4, 4, 1)))), "conv1d.default with computed weights"),
        (lambda g, x: g.call(aten.mul.Tensor, x, g.constant(torch.arange(6))), "mul.Tensor of a torch.int64 tensor"),
        (lambda g, x: g.call(aten.argmax.default, x, 1), "aten.argmax.default"),
        (lambda g, x: g.call(operator.getitem, g.call(aten.max.dim, x, 1), 0), "aten.max.dim"),
    ],
)  # fmt: skip
def test_what_else_is_refused(make, reason):
    g = FloatGraph()
    gm, _ = g.finish(make(g, g.input(2, 4, 6)))
    with pytest.raises(UnsupportedOperatorError, match=f"1 operator has(.|\n)*{reason}"):
        check_supported(gm)
