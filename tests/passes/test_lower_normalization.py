"""Softmax, normalizations, attention and embeddings from float to integers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress
from fxcompress import Level
from fxcompress.errors import UnsupportedOperatorError
from fxcompress.report import sqnr_db
from tests.support.levels import code_differences, compile_levels


class Model(nn.Module):
    """A function of itself and its inputs; parameters random, none of them special."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)
            for parameter in module.parameters():
                if parameter.ndim == 1:
                    nn.init.normal_(parameter, std=0.5)
        self.eval()

    def forward(self, *args):
        return self.function(self, *args)


def linear(outputs=32):
    return nn.Linear(32, outputs)


def attention(m, x):
    heads = [layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (m.q, m.k, m.v)]
    return m.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


X = torch.randn(6, 10, 32)
IMAGES = torch.randn(4, 3, 12, 12)
MODELS = {
    "layer norm": (Model(lambda m, x: m.out(m.norm(m.lin(x))), lin=linear(), norm=nn.LayerNorm(32), out=linear()), X),
    "layer norm over two dimensions": (Model(lambda m, x: m.norm(m.lin(x)) + x, lin=linear(), norm=nn.LayerNorm([10, 32])), X),
    "layer norm without affine": (Model(lambda m, x: m.out(m.norm(x)), norm=nn.LayerNorm(32, elementwise_affine=False), out=linear()), X),
    "rms norm": (Model(lambda m, x: m.out(m.norm(x)), norm=nn.RMSNorm(32), out=linear()), X),
    "group norm": (Model(lambda m, x: F.relu(m.norm(m.conv(x))), conv=nn.Conv2d(3, 8, 3), norm=nn.GroupNorm(2, 8)), IMAGES),
    "instance norm": (Model(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv2d(3, 8, 3), norm=nn.InstanceNorm2d(8, affine=True)), IMAGES),
    "unit length": (Model(lambda m, x: F.normalize(m.lin(x), dim=-1), lin=linear()), X),
    "softmax": (Model(lambda m, x: torch.softmax(m.lin(x), 1), lin=linear()), X),
    "attention": (Model(attention, q=linear(), k=linear(), v=linear(), out=linear()), X),
    "multihead attention": (Model(lambda m, x: m.mha(x, x, x)[0], mha=nn.MultiheadAttention(32, 4, batch_first=True)), X),
    "encoder layer": (Model(lambda m, x: m.layer(x), layer=nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)), X),
}  # fmt: skip


def operators(net):
    return net.verify_integer_only().operators


@pytest.mark.parametrize("name", MODELS)
def test_integers_stay_close_to_the_float_model(name):
    model, x = MODELS[name]
    levels = compile_levels(model, (x,), calibrate=True)
    exact, integer = (torch.cat([y.flatten() for y in levels[level](x)]) for level in (Level.FLOAT, Level.INTEGER))
    assert sqnr_db(exact, integer) > 25
    for tensor, difference in code_differences(levels, x).items():  # every operator on its own, fed the same codes
        assert difference.steps <= 1, tensor
        assert difference.count <= 1 + 0.03 * difference.size, tensor


@pytest.mark.parametrize("name", ["layer norm", "group norm", "attention", "encoder layer"])
def test_no_data_is_needed(name):
    model, x = MODELS[name]
    net = fxcompress.compile(model, example_inputs=x, input_range=(-4, 4))
    assert net.verify_integer_only().integer_only
    assert sqnr_db(model(x), net(x)) > 15


def test_the_affine_of_a_normalization_joins_its_rounding():
    model, x = MODELS["layer norm"]
    assert operators(fxcompress.compile(model, example_inputs=x)) == {
        "linear": 2, "requantize": 2, "quantize": 1, "layer_norm": 1, "dequantize": 1
    }  # fmt: skip


def test_the_scale_of_attention_joins_the_rounding_of_the_scores():
    model, x = MODELS["attention"]
    found = operators(fxcompress.compile(model, example_inputs=x))
    assert found["requantize"] == 6 and found["matmul"] == 2 and "table" not in found


def test_excluded_scores_do_not_widen_the_range():
    """A causal mask of -1e4 with a code for it would leave one code for all scores."""
    causal = torch.full((10, 10), -1e4).triu(1)

    def attend(m, x):
        return m.out(torch.softmax(m.q(x) @ m.k(x).mT / 32**0.5 + causal, -1) @ m.v(x))

    model = Model(attend, q=linear(), k=linear(), v=linear(), out=linear())
    net = fxcompress.compile(model, example_inputs=X, calibration_data=X)
    assert net.verify_integer_only().integer_only
    assert sqnr_db(model(X), net(X)) > 25


def test_normalized_values_below_eps_keep_their_resolution():
    """Where eps dominates the variance, all results are small: their unit is, too."""
    model = Model(lambda m, x: m.norm(x), norm=nn.LayerNorm(32, eps=1.0, elementwise_affine=False))
    x = X * 1e-3
    assert sqnr_db(model(x), fxcompress.compile(model, example_inputs=x)(x)) > 35


def test_token_ids_are_not_quantized():
    model = Model(
        lambda m, ids: m.out(m.norm(m.table(ids))), table=nn.Embedding(50, 32), norm=nn.LayerNorm(32), out=linear()
    )
    ids = torch.randint(0, 50, (4, 7))
    net = fxcompress.compile(model, example_inputs=ids)
    assert operators(net) == {"requantize": 1, "embedding": 1, "layer_norm": 1, "linear": 1, "dequantize": 1}
    assert sqnr_db(model(ids), net(ids)) > 30
    assert torch.equal(net(ids[1:2]), net(ids)[1:2])


def test_rows_too_long_for_the_sum_of_exponentials_are_refused():
    model = Model(lambda m, x: torch.softmax(x * 2, -1))
    with pytest.raises(UnsupportedOperatorError, match="over rows of 40000 elements; expected at most 32768"):
        fxcompress.compile(model, example_inputs=torch.randn(2, 40000))
