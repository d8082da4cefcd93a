import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxcompress
from fxcompress import Level
from fxcompress.errors import UnsupportedOperatorError
from fxcompress.graph import calls
from fxcompress.report import sqnr_db
from tests.support.graphs import MODELS, build, images, randomize
from tests.support.levels import code_differences, compile_levels

ops = torch.ops.fxcompress


@pytest.mark.parametrize("name", MODELS)
def test_every_operator_agrees_with_the_qdq_level_within_one_step(name):
    """The two levels differ in the rounding rule and in the 16-bit form only: rarely, and by one step."""
    model, inputs = build(name)
    levels = compile_levels(model, inputs)
    for tensor, difference in code_differences(levels, *inputs).items():
        assert difference.steps <= 1, tensor
        assert difference.count <= 1 + 0.03 * difference.size, tensor


@pytest.mark.parametrize("name", MODELS)
def test_the_integer_network_is_as_close_to_the_float_model_as_the_qdq_network(name):
    model, inputs = build(name)
    levels = compile_levels(model, inputs)
    exact, rounded, integer = (levels[level](*inputs) for level in Level)
    for a, b, c in zip(exact, rounded, integer, strict=True):
        assert sqnr_db(a, c) > 25
        assert sqnr_db(a, c) > sqnr_db(a, b) - 2


def integer_graph(function, *inputs, **options):
    return compile_levels(_Module(function), inputs, **options)


class _Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 1)
        randomize(self)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def counts(levels) -> dict[str, int]:
    names = [n.target._opname for n in levels[Level.INTEGER].graph.nodes if n.op == "call_function"]
    return {name: names.count(name) for name in names}


def test_conv_add_relu_is_rounded_once():
    levels = integer_graph(lambda m, x: F.max_pool2d(F.relu(m.conv(x) + m.other(x) + x), 2), images(2, 4, 6, 6))
    found = counts(levels)
    assert found["requantize"] == 1 and found["conv"] == 2 and found["widen"] == 1
    (node,) = calls(levels[Level.INTEGER], ops.requantize.default)
    assert len(node.args[0]) == 3


def test_two_branches_that_cancel_do_not_saturate_early():
    """Branches far larger than their sum: fewer guard bits make room for them."""

    class Cancel(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return F.max_pool2d(F.relu(self.a(x) - self.b(x) + x), 2)

    model = randomize(Cancel())
    with torch.no_grad():
        model.a.weight *= 40
        model.b.load_state_dict(model.a.state_dict())
    x = images(2, 4, 6, 6)
    levels = compile_levels(model, (x,), calibrate=True)
    (node,) = calls(levels[Level.INTEGER], ops.requantize.default)
    assert node.args[5] < 6
    assert sqnr_db(levels[Level.QDQ](x)[0], levels[Level.INTEGER](x)[0]) > 20


def test_subtraction_is_a_negative_branch():
    x = images(2, 4, 6, 6)
    levels = integer_graph(lambda m, x: F.relu(x - m.conv(x)) + x, x)
    assert sqnr_db(levels[Level.FLOAT](x)[0], levels[Level.INTEGER](x)[0]) > 28
    node = next(iter(calls(levels[Level.INTEGER], ops.requantize.default)))
    multipliers = [getattr(levels[Level.INTEGER], m.target) for m in node.args[1]]
    assert (multipliers[0] > 0).all() and (multipliers[1] < 0).all()


FUNCTIONS = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "tanh": torch.tanh,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": F.elu,
    "softplus": F.softplus,
    "mish": F.mish,
    "relu6": F.relu6,
    "abs": torch.abs,
    "square": lambda x: x**2,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_activation_is_a_table_that_equals_the_rounded_function(name):
    x = images(2, 4, 6, 6)
    levels = integer_graph(lambda m, x: m.other(FUNCTIONS[name](m.conv(x) + 0)), x)
    if name == "relu6":
        assert "table" not in counts(levels)
    else:
        assert counts(levels)["table"] == 1
        worst = [d for t, d in code_differences(levels, x).items() if name.split("_")[0] in t or "pow" in t]
        assert worst and all(
            d.steps <= 1 and d.count < 0.01 * d.size for d in worst
        )  # float32 against float64 on a tie
    assert sqnr_db(levels[Level.FLOAT](x)[0], levels[Level.INTEGER](x)[0]) > 25


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.avg_pool2d(x, 3, 2, 1),
        lambda m, x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        lambda m, x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
        lambda m, x: F.adaptive_avg_pool2d(x, 3),
        lambda m, x: F.adaptive_avg_pool2d(x, 5),
        lambda m, x: x.mean((2, 3)),
        lambda m, x: x.mean(1, keepdim=True),
        lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
        lambda m, x: F.interpolate(x, size=(11, 5), mode="bilinear", align_corners=True),
        lambda m, x: x * m.conv(x),
        lambda m, x: torch.matmul(x, m.conv(x).transpose(2, 3)),
    ],
)
def test_sums_and_products_as_graph_outputs_are_exact_accumulators(function):
    """Nothing but the input's rounding (and the operand's) stands between the output and the float model."""
    x = images(2, 4, 8, 8)
    levels = integer_graph(function, x)
    assert sqnr_db(levels[Level.QDQ](x)[0], levels[Level.INTEGER](x)[0]) > 40
    assert sqnr_db(levels[Level.FLOAT](x)[0], levels[Level.INTEGER](x)[0]) > 30


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.max_pool2d(x, 3, 2, 1),
        lambda m, x: F.max_pool2d(x, 2, 2, ceil_mode=True),
        lambda m, x: F.adaptive_max_pool2d(x, (3, 5)),
        lambda m, x: F.adaptive_max_pool2d(x, 1),
        lambda m, x: F.pad(x, (1, 2, 0, 1)),
        lambda m, x: F.pad(x, (0, 0, 0, 0, 2, 2)),
        lambda m, x: F.interpolate(x, scale_factor=2),
        lambda m, x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1),
        lambda m, x: torch.cat([x[:, :2], x[:, 1:]], 1),
        lambda m, x: x.chunk(2, 1)[1],
    ],
)
def test_movement_and_selection_keep_the_codes(function):
    """Exact: the output is the rounded input, moved."""
    x = images(2, 4, 7, 7)
    levels = integer_graph(function, x)
    assert "requantize" not in counts(levels)
    assert torch.equal(levels[Level.QDQ](x)[0], levels[Level.INTEGER](x)[0])


def test_graph_outputs_are_not_rounded_to_eight_bits():
    """conv -> flatten -> output stays int32 with a per-channel scale; so do sums and concatenations of them."""
    x = images(2, 4, 6, 6)
    for function in (
        lambda m, x: m.conv(x),
        lambda m, x: m.conv(x).flatten(1),
        lambda m, x: F.relu(m.conv(x)),
        lambda m, x: m.conv(x) + m.other(x),
        lambda m, x: torch.cat([m.conv(x), m.other(x)], 1).flatten(1),
        lambda m, x: (m.conv(x), m.conv(x).relu()),
    ):
        levels = integer_graph(function, x)
        for a, b in zip(levels[Level.QDQ](x), levels[Level.INTEGER](x), strict=True):
            assert sqnr_db(a, b) > 70


def test_functions_in_front_of_an_output_are_tables_of_int32():
    """Composed functions are one table; only the codes of their input were rounded to 8 bits."""
    x = images(2, 4, 6, 6)
    levels = integer_graph(lambda m, x: torch.sigmoid(m.conv(x)).clamp(0.2, 0.8).flatten(1), x)
    assert counts(levels)["table"] == 1 and counts(levels)["requantize"] == 1
    (node,) = calls(levels[Level.INTEGER], ops.table.default)
    assert node.meta["val"].dtype == torch.int32
    assert sqnr_db(levels[Level.QDQ](x)[0], levels[Level.INTEGER](x)[0]) > 45


def test_codes_outside_the_domain_of_a_function_hold_the_nearest_value_inside():
    """The codes of |x| + 1 cover 0 too, where its logarithm and its inverse root are infinite."""
    x = images(2, 4, 6, 6)
    for function in (
        lambda m, x: torch.log(m.conv(x).abs() + 1),
        lambda m, x: m.other(torch.rsqrt(m.conv(x) ** 2 + 1)),
        lambda m, x: 1 / (m.conv(x).abs() + 0.5),
    ):
        levels = integer_graph(function, x)
        found = levels[Level.INTEGER](x)[0]
        assert found.isfinite().all()
        assert sqnr_db(levels[Level.FLOAT](x)[0], found) > 25


def test_a_dead_row_keeps_its_bias():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.relu(self.conv(x)).mean((2, 3))

    model = randomize(Dead())
    with torch.no_grad():
        model.conv.weight[1] = 0
        model.conv.weight[2] *= 1e-12
        model.conv.bias[1], model.conv.bias[2] = 0.25, 2.0
    x = images(4, 3, 8, 8)
    net = fxcompress.compile(model, example_inputs=x)
    assert net.verify_integer_only().integer_only
    step = net.report().layers[1].scale
    with torch.no_grad():
        assert (model(x) - net(x)).abs().max() < step


def test_what_has_no_lowering_is_refused_with_the_way_out():
    class Sort(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = _Module(lambda m, x: torch.sort(m.conv(x), dim=1).values)

        def forward(self, x):
            return self.inner(x)

    x = images(2, 4, 6, 6)
    with pytest.raises(UnsupportedOperatorError, match=r"(?s)sort.*inner.*keep_float=\['inner'\]"):
        fxcompress.compile(Sort().eval(), example_inputs=x)
