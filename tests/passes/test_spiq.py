import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxcompress
from fxcompress import Level, numerics
from fxcompress.graph import argument, calls, constant, is_call
from fxcompress.meta import tensor_meta
from fxcompress.report import sqnr_db
from tests.support.graphs import MODELS, build, images, randomize
from tests.support.levels import code_differences, compile_levels

ops, aten = torch.ops.fxcompress, torch.ops.aten


class Block(nn.Module):
    """Signed and rectified tensors, padded and depthwise layers, a residual addition, a flattened linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project, self.head = nn.Conv2d(12, 6, 1), nn.Linear(6 * 9, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(F.relu6(self.depthwise(F.relu(self.expand(x)))))
        return self.head(F.max_pool2d(x, 2).flatten(1))


def levels(model, *inputs, **options):
    return compile_levels(model, inputs, **({"spiq": True} | options))


def block():
    return randomize(Block()), images(2, 3, 6, 6)


def qparams(gm) -> dict:
    """Of the codes of every tensor, by the name of the tensor."""
    return {n.args[0].name: tensor_meta(n).qparams for n in calls(gm, ops.quantize.default)}


def weight_codes(gm) -> list[torch.Tensor]:
    weighted = (aten.conv2d.default, aten.linear.default, aten.conv_transpose2d.input)
    return [constant(gm, n.args[1].args[0]) for n in calls(gm, *weighted)]


def test_every_tensor_but_the_input_gets_a_scale_per_channel():
    found = qparams(levels(*block())[Level.QDQ])
    scalars = {name for name, q in found.items() if q.axis is None}
    assert scalars == {"x"}
    assert all((q.scale > 0).all() for q in found.values())
    assert all(found[name].axis == 1 and found[name].scale.unique().numel() > 1 for name in ("conv2d", "relu", "add"))


def test_off_changes_nothing():
    assert all(q.axis is None for q in qparams(levels(*block(), spiq=False)[Level.QDQ]).values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", ["w8a8", "w4a4"])
def test_every_operator_agrees_with_the_qdq_level_within_one_step(name, target):
    model, inputs = build(name)
    found = levels(model, *inputs, target=target)
    for tensor, difference in code_differences(found, *inputs).items():
        assert difference.steps <= 1, tensor
        assert difference.count <= 1 + 0.03 * difference.size, tensor


@pytest.mark.parametrize("name", MODELS)
def test_the_native_plan_has_the_same_operations(name):
    """Free at run time: the same steps with and without, the same bits as the reference, and a certificate."""
    model, inputs = build(name)
    plans = []
    for spiq in (True, False):
        net = fxcompress.compile(model, example_inputs=inputs, spiq=spiq)
        assert net.verify_integer_only().integer_only
        reference = fxcompress.compile(model, example_inputs=inputs, spiq=spiq, backend="reference")
        with torch.no_grad():
            a, b = (torch.utils._pytree.tree_leaves(n(*inputs)) for n in (net, reference))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        operators = [n.target for n in net.graph_module.graph.nodes if n.op == "call_function"]
        plans.append((operators, steps(net, inputs)))
    assert plans[0] == plans[1]


def steps(net, inputs) -> list[str]:
    """Names of the kernels of the plan."""
    from fxcompress.backends.native.packing import PackedWeights
    from fxcompress.backends.native.planner import Planner

    shapes = [torch.empty(x.shape, dtype=x.dtype, device="meta") for x in inputs]
    return [step.kernel.name for step in Planner(net.graph_module, shapes, PackedWeights()).steps]


def test_the_layer_is_s_w_times_the_sum_of_code_products():
    """sum q_w (q_x - z_x) s_w equals the layer on fake-quantized input and weight; padding, depthwise and linear included."""
    model, x = block()
    qdq = levels(model, x)[Level.QDQ]
    values = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            values[node.name] = result = super().run_node(node)
            return result

    Recorder(qdq).run(x)
    for layer in list(calls(qdq, aten.conv2d.default, aten.linear.default))[1:]:
        source, weight = layer.args[0], layer.args[1]
        while not is_call(source, ops.dequantize.default):
            source = source.args[0]
        q, s_w = tensor_meta(layer.args[0]).qparams, tensor_meta(weight).qparams.scale
        scale, _ = q.broadcast(values[layer.args[0].name].ndim)
        centered = torch.round(values[layer.args[0].name].double() / scale)
        codes = constant(qdq, weight.args[0]).double()
        product = layer.target(centered, codes, None, *layer.args[3:])
        bias = constant(qdq, layer.args[2]).double()
        shape = [-1] + [1] * (product.ndim - 2)
        expected = product * s_w.reshape(shape) + bias.reshape(shape) if product.ndim > 2 else product * s_w + bias
        found = values[layer.name].double()
        assert (expected - found).abs().max() <= 1e-5 * found.abs().max()


def rescaled(model: Block, generator: torch.Generator) -> Block:
    """The same function with channels scaled against each other by powers of two, which rounding does not see."""
    model = copy.deepcopy(model)

    def factors(n):
        return 2.0 ** torch.randint(-3, 4, (n,), generator=generator).float()

    with torch.no_grad():
        wide, stream = factors(12), factors(6)
        for layer, rows in ((model.expand, wide), (model.stem, stream), (model.project, stream)):
            layer.weight /= rows.reshape(-1, 1, 1, 1)
            layer.bias /= rows
        for layer, columns in ((model.expand, stream), (model.depthwise, None)):
            if columns is not None:
                layer.weight *= columns.reshape(1, -1, 1, 1)
        model.depthwise.weight *= wide.reshape(-1, 1, 1, 1)
        model.head.weight *= stream.repeat_interleave(9)
    return model


@pytest.mark.parametrize("target", ["w8a8", "w4a4"])
def test_codes_do_not_depend_on_how_channels_are_scaled(target):
    """Equalization changes neither weight nor activation codes: exactly, for factors that floats hold exactly."""
    model, x = block()
    other = rescaled(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x), rtol=1e-5, atol=1e-5)
    options = {"target": target, "bias_correction": None, "input_range": (-3.0, 3.0)}
    a, b = (levels(m, x, **options) for m in (model, other))
    assert all(torch.equal(p, q) for p, q in zip(*(weight_codes(found[Level.QDQ]) for found in (a, b)), strict=True))
    assert not torch.equal(*(qparams(found[Level.QDQ])["add"].scale for found in (a, b)))
    assert torch.equal(a[Level.INTEGER](x)[0], b[Level.INTEGER](x)[0])
    without = [weight_codes(compile_levels(m, (x,), **options)[Level.QDQ]) for m in (model, other)]
    assert not all(torch.equal(p, q) for p, q in zip(*without, strict=True)), "the test must be able to fail"


def test_depthwise_codes_are_those_of_the_plain_weight():
    """The input scale of a channel cancels in the row that reads it alone."""
    model, x = block()
    a, b = (weight_codes(levels(model, x, spiq=on)[Level.QDQ]) for on in (True, False))
    assert torch.equal(a[2], b[2]) and not torch.equal(a[1], b[1])


def test_narrow_channels_keep_their_resolution():
    """One channel a hundred times as wide as the others: alone it would decide the scale of all."""
    model, x = block()
    with torch.no_grad():
        model.stem.weight[0] *= 100
        model.expand.weight[:, 0] /= 100
        model.project.weight[0] *= 100
        model.head.weight[:, :9] /= 100
        with_spiq, without = (
            levels(model, x, spiq=on, bias_correction=None, calibrate=True)[Level.INTEGER](x)[0] for on in (True, False)
        )
        assert sqnr_db(model(x), with_spiq) > sqnr_db(model(x), without) + 6


def test_sums_without_data_have_room_for_correlated_branches():
    """Two layers of the same weights have twice the deviation of one, which propagation (sqrt(2), as if independent) does not know."""

    class Net(nn.Module):
        def __init__(self, branches):
            super().__init__()
            self.norm, self.branches = nn.BatchNorm2d(4), nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(branches))
            self.head = nn.Conv2d(4, 2, 1)
            for branch in self.branches[1:]:
                branch.load_state_dict(self.branches[0].state_dict())

        def forward(self, x):
            x = self.norm(x)
            return self.head(sum(branch(x) for branch in self.branches))

    torch.manual_seed(0)
    one, two = Net(1).eval(), Net(2).eval()
    two.load_state_dict(
        one.state_dict() | {f"branches.1.{name}": value for name, value in one.branches[0].state_dict().items()}
    )
    example = images(2, 4, 6, 6)
    single, double = (qparams(levels(net, example)[Level.QDQ]) for net in (one, two))
    assert torch.allclose(double["add_1"].scale, 2 * single["conv2d"].scale, rtol=1e-6)


def test_zero_points_pad_per_channel():
    """The border of a padded convolution of a signed tensor holds the code of 0 of every channel."""
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1)))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-1.0, -0.3, 0.3, 1.0]))
    x = images(2, 3, 5, 5)
    found = levels(model, x)
    conv = list(calls(found[Level.INTEGER], ops.conv.default))[1]
    codes = constant(found[Level.INTEGER], argument(conv, "pad_value"))
    assert codes.shape == (4,) and codes.unique().numel() > 1
    assert sqnr_db(found[Level.FLOAT](x)[0], found[Level.INTEGER](x)[0]) > 30


def test_dead_channels_fit_and_contribute_nothing():
    model, x = block()
    with torch.no_grad():
        model.expand.weight[0], model.expand.bias[0] = 0, -1.0  # never open
        model.expand.weight[1], model.expand.bias[1] = 0, 0.5  # constant
        model.expand.weight[2] *= 1e-12
        model.depthwise.weight[3] = 0
    net = fxcompress.compile(model, example_inputs=x, spiq=True, input_range=(-4.0, 4.0))
    assert net.verify_integer_only().integer_only
    with torch.no_grad():
        assert sqnr_db(model(x), net(x)) > 25


def test_another_input_shape_takes_the_same_scales():
    class Convolutional(Block):
        def forward(self, x):
            x = self.stem(x)
            return x + self.project(F.relu6(self.depthwise(F.relu(self.expand(x)))))

    model, x = randomize(Convolutional()), images(4, 3, 8, 8)
    net = fxcompress.compile(model, example_inputs=x, calibration_data=[x], spiq=True)
    small = x[:, :, :6, :6].contiguous()
    inside = (slice(None), slice(None), slice(1, 4), slice(1, 4))  # away from the borders it is the same computation
    assert torch.equal(net(small)[inside], net(x)[inside])


class Refused(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.conv, self.other = function, nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.function(self, self.conv(x))


REFUSALS = {
    "elementwise function": lambda m, x: m.other(torch.sigmoid(x)),
    "table of its input": lambda m, x: m.other(torch.sigmoid(x)),
    "takes one scale": lambda m, x: torch.matmul(x, m.other(x)),
    "concatenates along another dimension": lambda m, x: m.other(torch.cat([x, F.relu(m.other(x))], 2)),
    "averages over the channels": lambda m, x: x.mean(1, keepdim=True) + m.other(x),
    "different divisors": lambda m, x: m.other(F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    "pads channels with 2": lambda m, x: (
        F.max_pool2d(F.pad(x, (0, 0, 0, 0, 0, 2), value=2.0), 2)[:, :4] + m.other(x)[:, :, :3, :3]
    ),
    "sums over another dimension": lambda m, x: F.linear(x, torch.ones(2, 6)) + F.linear(m.other(x), torch.ones(2, 6)),
    "it is a graph output": lambda m, x: (lambda y: (F.max_pool2d(y, 2), m.other(y)))(F.relu(x)),
    "it is a graph input": lambda m, x: m.other(x),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals(reason):
    model, x = randomize(Refused(REFUSALS[reason])), images(2, 3, 6, 6)
    compiled = fxcompress.compile(model, example_inputs=x, spiq=True)
    rejects = next(p for p in compiled.report().passes if p["name"] == "spiq")["refusals"]
    assert any(reason in str(r) for r in rejects), rejects
    with torch.no_grad():
        expected, found = (torch.utils._pytree.tree_leaves(n(x)) for n in (model, compiled))
    assert all(sqnr_db(a, b) > 20 for a, b in zip(expected, found, strict=True))


def test_codes_that_move_carry_their_channels():
    """Concatenated, sliced, permuted and flattened codes keep the scales of where they come from."""

    class Moves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1), nn.Linear(5, 3)

        def forward(self, x):
            y = torch.cat([F.relu(self.a(x)), self.b(x)], 1)[:, 1:]
            return self.head(y.permute(0, 2, 3, 1).flatten(1, 2))

    x = images(2, 3, 4, 4)
    qdq = levels(randomize(Moves()), x)[Level.QDQ]
    found = qparams(qdq)
    (cat,) = calls(qdq, aten.cat.default)
    parts = torch.cat([tensor_meta(a).qparams.scale for a in cat.args[0]])
    last = [q for q in found.values() if q.axis == 2][-1]
    assert torch.equal(last.scale, parts[1:]) and torch.equal(found[cat.name].scale, parts)
    assert int(last.zero_point[:3].max()) == 0 and int(last.zero_point[3:].min()) > 0


def test_a_second_run_finds_nothing():
    found = levels(*block())
    assert len(fxcompress.passes.Spiq().plan(found[Level.FLOAT])) == 0


def test_without_ranges_the_order_is_refused():
    with pytest.raises(fxcompress.errors.PipelineError, match="needs RANGES"):
        fxcompress.PassManager(fxcompress.default_passes("int8").without("assign_ranges"))


def test_four_bit_codes_use_their_range():
    model, x = block()
    found = qparams(levels(model, x, target="w8a4")[Level.QDQ])
    assert {q.qmax for name, q in found.items() if name != "x"} == {15}
    assert numerics.weight_limit(4) == 7
