"""Bias correction: the means of a quantized network's layers are those of the float network."""

import copy

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import Level
from fxcompress.capture import capture
from fxcompress.dialects import WEIGHTED
from fxcompress.errors import CalibrationError
from fxcompress.graph import calls, constant
from fxcompress.lockstep import Lockstep, record_inputs
from fxcompress.meta import tensor_meta
from fxcompress.passes.correct_bias import CorrectBias
from tests.support.graphs import build, images, randomize
from tests.support.levels import compile_levels

NETWORKS = ["conv_bn_relu", "residual_block", "depthwise", "classifier", "mlp"]


def layer_means(gm, inputs):
    """Per-channel mean of the output of every layer with a weight, float64, by name."""
    walk, means = Lockstep(gm, [inputs]), {}
    for node in calls(gm, *WEIGHTED):
        (value,) = walk.run_to(node.name)
        axis = value.ndim - 1 if node.target is torch.ops.aten.linear.default else 1
        means[node.name] = value.double().mean([d for d in range(value.ndim) if d != axis])
    return means


def worst_shift(levels, inputs):
    """The largest shift of a mean, in deviations of all means of that layer's float output."""
    exact, rounded = (layer_means(levels[level], inputs) for level in (Level.FLOAT, Level.QDQ))
    return max(float((exact[n] - rounded[n]).abs().max() / (exact[n].square().mean().sqrt() + 1e-6)) for n in exact)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_empirical_correction_removes_the_measured_shift(name):
    """On the calibration data every mean is right up to float32 rounding; without correction it is not."""
    model, inputs = build(name)
    plain = compile_levels(model, inputs, calibrate=True, target="w4a8", bias_correction=None)
    corrected = compile_levels(model, inputs, calibrate=True, target="w4a8", bias_correction="empirical")
    assert worst_shift(plain, inputs) > 1e-3
    assert worst_shift(corrected, inputs) < 1e-5


class Positive(nn.Module):
    """Weights that round badly in one direction, on inputs that are never negative."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_the_analytic_correction_is_exact_for_an_input_that_equals_its_mean():
    """With x = E[x] everywhere the corrected layer gives the float output on average: zero padding is counted."""
    model = randomize(Positive())
    x = torch.full((2, 3, 8, 8), 0.5)
    options = {"input_range": (0.0, 1.0), "target": "w4a8", "weight_quantizer": "nearest"}
    levels = compile_levels(model, (x,), calibrate=True, bias_correction="analytic", **options)
    plain = compile_levels(model, (x,), calibrate=True, bias_correction=None, **options)
    first = next(calls(levels[Level.QDQ], *WEIGHTED)).name
    exact, corrected, before = (
        layer_means(gm, (x,))[first] for gm in (levels[Level.FLOAT], levels[Level.QDQ], plain[Level.QDQ])
    )
    step = 1 / 255  # the input itself is rounded: 0.5 lies between two codes
    reach = (
        constant(levels[Level.FLOAT], next(calls(levels[Level.FLOAT], *WEIGHTED)).args[1]).abs().sum((1, 2, 3)).double()
    )
    assert ((exact - corrected).abs() <= step / 2 * reach).all()
    assert (exact - before).abs().max() > 3 * (exact - corrected).abs().max()


@pytest.mark.parametrize("name", ["conv_bn_relu", "residual_block", "depthwise"])
def test_the_analytic_correction_needs_no_data(name):
    model, inputs = build(name)
    levels = compile_levels(model, inputs, target="w3a8", input_range=(-1.0, 4.0))
    corrected = [n for n in calls(levels[Level.QDQ], *WEIGHTED) if "bias_corrected" in n.meta]
    assert corrected and all(n.meta["bias_corrected"] == "analytic" for n in corrected)


def test_a_layer_without_bias_gets_one():
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False)))
    levels = compile_levels(model, (images(4, 3, 6, 6),), calibrate=True, target="w4a8")
    for node in calls(levels[Level.QDQ], *WEIGHTED):
        assert constant(levels[Level.QDQ], node.args[2]).any()


def test_a_second_plan_finds_nothing():
    model, inputs = build("residual_block")
    levels = compile_levels(model, inputs, calibrate=True, target="w4a8")
    assert not CorrectBias().plan(levels[Level.QDQ]).matches


def test_it_can_be_switched_off():
    model, inputs = build("residual_block")
    levels = compile_levels(model, inputs, target="w4a8", bias_correction=None, input_range=(-4.0, 4.0))
    assert not any("bias_corrected" in n.meta for n in levels[Level.QDQ].graph.nodes)


def test_the_empirical_correction_asks_for_data():
    model, inputs = build("residual_block")
    with pytest.raises(CalibrationError, match="no calibration data"):
        fxcompress.compile(model, example_inputs=inputs, input_range=(-4.0, 4.0), bias_correction="empirical")


def test_kept_modules_are_not_touched():
    model, inputs = build("classifier")
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    levels = compile_levels(model, inputs, calibrate=True, target="w4a8", keep_float=(name,))
    kept = [n for n in calls(levels[Level.QDQ], torch.ops.aten.linear.default) if tensor_meta(n).origin.module == name]
    assert kept and not any("bias_corrected" in n.meta for n in kept)


def test_a_further_input_shape_reuses_the_biases():
    """Both shapes are one network: the same integers in every layer."""
    torch.manual_seed(2)
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    net = fxcompress.compile(model, "w4a8", calibration_data=images(16, 3, 8, 8))
    net(images(1, 3, 12, 12))
    first, second = (e.graph_module for e in net._executables)
    biases = [[constant(gm, n.args[2]) for n in calls(gm, torch.ops.fxcompress.conv.default)] for gm in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*biases, strict=True))


# ------------------------------------------------------------------------------------------------------------- lockstep


def test_lockstep_computes_what_the_graph_does_and_lets_a_value_be_replaced():
    model, (x,) = build("residual_block")
    gm = capture(model, (x,)).graph_module
    batches = record_inputs(gm, lambda module: [module(part) for part in x.split(1)], examples=x.shape[0])
    assert torch.equal(torch.cat([b[0] for b in batches]), x)
    walk = Lockstep(gm, batches)
    last = next(n for n in reversed(gm.graph.nodes) if n.op == "call_function").name
    assert torch.allclose(torch.cat(walk.run_to(last)), gm(x)[0], atol=1e-5)
    walk = Lockstep(copy.deepcopy(gm), batches)
    first = next(n for n in gm.graph.nodes if n.op == "call_function").name
    walk.replace(first, [torch.zeros_like(v) for v in walk.run_to(first)])
    assert not torch.allclose(torch.cat(walk.run_to(last)), gm(x)[0], atol=1e-3)


def test_only_as_many_examples_are_kept_as_asked_for():
    model, (x,) = build("residual_block")
    gm = capture(model, (x,)).graph_module
    batches = record_inputs(gm, lambda module: [module(x) for _ in range(3)], examples=x.shape[0] + 1)
    assert [b[0].shape[0] for b in batches] == [x.shape[0], 1]
