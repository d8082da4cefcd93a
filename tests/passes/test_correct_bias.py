"""Bias correction: the means of a quantized network's layers are those of the float network."""

import copy

import pytest
import torch
from cifar_resnet import PIXEL_MEAN, PIXEL_STD, load_images, load_resnet20
from torch import nn

import fxcompress
from fxcompress import Level
from fxcompress.capture import capture
from fxcompress.dialects import ADD, CLAMP, WEIGHTED
from fxcompress.errors import CalibrationError
from fxcompress.graph import calls, constant, is_call
from fxcompress.lockstep import Lockstep, record_inputs
from fxcompress.meta import along_axis, tensor_meta
from fxcompress.passes.correct_bias import CorrectBias
from fxcompress.report import sqnr_db
from tests.support.graphs import build, images, randomize
from tests.support.levels import compile_levels


def layer_means(gm, inputs):
    """Per-channel mean of the output of every layer with a weight, float64, by name."""
    return {name: mean(value, axis) for name, value, axis in layer_outputs(gm, inputs)}


def layer_outputs(gm, inputs):
    walk = Lockstep(gm, [inputs])
    for node in calls(gm, *WEIGHTED):
        (value,) = walk.run_to(node.name)
        yield node.name, value.double(), value.ndim - 1 if node.target is torch.ops.aten.linear.default else 1


def mean(value, axis):
    return value.mean([d for d in range(value.ndim) if d != axis])


def by_both(name, target="w4a8"):
    """Calibrated levels of a network without and with the empirical correction, and its inputs."""
    model, inputs = build(name)
    plain, corrected = (
        compile_levels(model, inputs, calibrate=True, target=target, bias_correction=how) for how in (None, "empirical")
    )
    return plain, corrected, inputs


@pytest.mark.parametrize("name", ["classifier", "mlp", "pre_activation"])
def test_the_empirical_correction_removes_the_measured_shift(name):
    """On the calibration data the mean of a sum that no clamp reads is right up to float32 rounding; without correction it is not."""
    plain, corrected, inputs = by_both(name)
    exact, before, after = (
        layer_means(level, inputs) for level in (corrected[Level.FLOAT], plain[Level.QDQ], corrected[Level.QDQ])
    )
    whole = [
        n.name for n in calls(corrected[Level.QDQ], *WEIGHTED) if not any(is_call(user, CLAMP, ADD) for user in n.users)
    ]
    assert whole
    for layer in whole:
        size = exact[layer].square().mean().sqrt() + 1e-6
        assert (exact[layer] - before[layer]).abs().max() > 1e-3 * size
        assert (exact[layer] - after[layer]).abs().max() < 1e-5 * size


@pytest.mark.parametrize("name", ["conv_bn_relu", "depthwise", "classifier", "mlp"])
def test_behind_a_clamp_only_the_sums_that_are_seen_count(name):
    """b moves by mean(float - quantized) over the positions that are positive in either network, and by nothing else."""
    plain, corrected, inputs = by_both(name)
    exact = {layer: value for layer, value, _ in layer_outputs(corrected[Level.FLOAT], inputs)}
    clamped = {
        n.name: n for n in calls(corrected[Level.QDQ], *WEIGHTED) if all(is_call(user, CLAMP) for user in n.users)
    }
    assert clamped
    for layer, value, axis in layer_outputs(corrected[Level.QDQ], inputs):
        if layer in clamped:
            biases = [constant(level[Level.QDQ], next(n for n in level[Level.QDQ].graph.nodes if n.name == layer).args[2]).double()
                      for level in (plain, corrected)]  # fmt: skip
            moved = along_axis(biases[1] - biases[0], axis, value.ndim)
            seen = ((exact[layer] > 0) | (value - moved > 0)).double()
            assert mean((exact[layer] - value) * seen, axis).abs().max() < 1e-5 * exact[layer].abs().max()


def test_a_layer_answers_for_the_sum_it_is_added_to():
    """conv(x) + x behind a ReLU: the sum's seen positions count, the error of x among what is corrected."""
    plain, corrected, inputs = by_both("residual_block")
    exact, before, after = (
        Lockstep(gm, [inputs]) for gm in (corrected[Level.FLOAT], plain[Level.QDQ], corrected[Level.QDQ])
    )
    total = next(n.name for n in corrected[Level.QDQ].graph.nodes if is_call(n, ADD))
    (wanted,), (rounded,), (right,) = (walk.run_to(total) for walk in (exact, before, after))
    error, left = ((mean((wanted - y).double() * ((wanted > 0) | (y > 0)), 1)).abs().max() for y in (rounded, right))
    assert left < 0.2 * error


class Interleaved(nn.Module):
    """The sum of the first layer comes after the second layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x):
        x = x.relu()
        a, b = self.first(x), self.second(x).relu()
        return self.last((a + x).relu() + b)


def test_sums_may_follow_further_layers():
    model, inputs = randomize(Interleaved()), (images(4, 4, 8, 8),)
    plain, corrected = (
        compile_levels(model, inputs, calibrate=True, target="w4a8", bias_correction=how) for how in (None, "empirical")
    )
    exact, before, after = (
        layer_means(level, inputs) for level in (corrected[Level.FLOAT], plain[Level.QDQ], corrected[Level.QDQ])
    )
    layer = list(exact)[-1]
    assert (exact[layer] - after[layer]).abs().max() < 1e-3 * (exact[layer] - before[layer]).abs().max()


def test_narrow_activations_keep_the_size_of_the_logits():
    """Correcting the sums that nobody sees as well shrank the logits of ResNet-20 to 0.6 of their size (7.5 dB; 9 dB without)."""
    pixels, _ = load_images("test")
    calibration, _ = load_images("calibration")
    model, sqnr = load_resnet20(), {}
    normalized = (pixels[:200] - torch.as_tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.as_tensor(PIXEL_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = model(normalized)
    for how in (None, "empirical"):
        net = fxcompress.compile(model, "w8a4", calibration_data=calibration, input_range=(0, 255),
                                 input_normalization=(PIXEL_MEAN, PIXEL_STD), bias_correction=how)  # fmt: skip
        sqnr[how] = sqnr_db(expected, net(pixels[:200]))
    assert sqnr["empirical"] > sqnr[None] + 1


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
