"""Scaling the channels of a weight is scaling the tensors around the layer."""

import pytest
import torch

from fxcompress.analysis.layer_weights import layer_channels, scale_inputs, scale_outputs
from fxcompress.graph import constant
from tests.support.float_graphs import FloatGraph


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_scaling_the_channels_of_a_weight(transposed, groups):
    g = FloatGraph()
    x = g.input(2, 4, 6, 6)
    layer = g.conv_transpose(x, 8, 3, groups=groups) if transposed else g.conv(x, 8, 3, groups=groups)
    gm, _ = g.finish(layer)
    weight, bias = (constant(gm, a) for a in layer.args[1:3])
    assert layer_channels(layer, weight) == (4, 8)
    a, s, x = g.normal(4), g.normal(8), g.inputs[0]

    def apply(x, weight, bias):
        return layer.target(x, weight, bias, *layer.args[3:])

    expected = s.reshape(1, 8, 1, 1) * apply(a.reshape(1, 4, 1, 1) * x, weight, bias)
    actual = apply(x, scale_outputs(layer, scale_inputs(layer, weight, a), s), s * bias)
    torch.testing.assert_close(actual, expected)


def test_a_linear_has_one_group():
    g = FloatGraph()
    layer = g.linear(g.input(2, 5, 3), 4)
    gm, _ = g.finish(layer)
    weight = constant(gm, layer.args[1])
    assert layer_channels(layer, weight) == (3, 4)
    assert torch.equal(scale_inputs(layer, weight, g.inputs[0][0, 0]), weight * g.inputs[0][0, 0])
    assert torch.equal(scale_outputs(layer, weight, weight[:, 0]), weight * weight[:, :1])
