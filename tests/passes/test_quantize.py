import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxcompress
from fxcompress import Level, PassManager, default_passes, numerics
from fxcompress.graph import calls, constant, is_constant
from fxcompress.meta import tensor_meta
from tests.support.graphs import build, images, randomize
from tests.support.levels import compile_levels

ops, aten = torch.ops.fxcompress, torch.ops.aten


def weight_codes(gm, conv):
    """(codes, scale) of a quantized weight, as float64."""
    dequantize = conv.args[1]
    return constant(gm, dequantize.args[0]).double(), constant(gm, dequantize.args[1])


def float_and_qdq(model, *inputs, **options):
    levels = compile_levels(model, inputs, **options)
    return levels[Level.FLOAT], levels[Level.QDQ]


@pytest.mark.parametrize("target", ["w8a8", "w6a8", "w4a8", "w3a8", "w2a8"])
@pytest.mark.parametrize("name", ["conv_bn_relu", "grouped", "depthwise", "mlp", "conv1d", "upsampling_block"])
def test_weights_are_within_half_a_step_per_output_channel(name, target):
    model, inputs = build(name)
    exact, rounded = float_and_qdq(model, *inputs, target=target, weight_quantizer="nearest")
    limit = numerics.weight_limit(int(target[1]))
    weighted = {aten.conv2d.default, aten.conv1d.default, aten.linear.default, aten.conv_transpose2d.input}
    pairs = zip(calls(exact, *weighted), calls(rounded, *weighted), strict=True)
    for before, after in pairs:
        weight = constant(exact, before.args[1]).double()
        codes, scale = weight_codes(rounded, after)
        assert codes.abs().max() <= limit and torch.equal(codes, codes.round())
        assert ((weight - codes * scale).abs() <= scale / 2 * (1 + 1e-9)).all()
        assert codes.abs().max() == limit


def test_zero_is_a_code_and_the_range_is_covered():
    model, inputs = build("residual_block")
    _, rounded = float_and_qdq(model, *inputs)
    for node in calls(rounded, ops.quantize.default):
        q, chosen = tensor_meta(node).qparams, tensor_meta(node).range
        zero = numerics.dequantize(q.zero_point.to(torch.uint8), q.scale, q.zero_point)
        assert float(zero) == 0.0
        lo, hi = chosen.bounds
        scale = float(q.scale)
        assert float(q.scale * (0 - q.zero_point)) <= min(lo, 0) + scale / 2
        assert float(q.scale * (255 - q.zero_point)) >= max(hi, 0) - scale / 2


def test_conv_add_clamp_is_cut_once():
    model, inputs = build("residual_block")
    _, rounded = float_and_qdq(model, *inputs)
    cut = {n.args[0].target for n in calls(rounded, ops.quantize.default) if n.args[0].op == "call_function"}
    assert cut == {aten.clamp.default}


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.c(F.max_pool2d(torch.cat([F.relu(self.a(x)), self.b(x)], 1), 2))


def test_concat_and_its_operands_share_one_scale():
    _, rounded = float_and_qdq(randomize(Concat()), images(2, 3, 8, 8))
    (cat,) = calls(rounded, aten.cat.default)
    tied = [tensor_meta(n).qparams for n in (*cat.args[0], next(iter(cat.users)))]
    assert all(q.same(tied[0]) for q in tied)


def test_graph_inputs_keep_eight_bits():
    model, inputs = build("residual_block")
    _, rounded = float_and_qdq(model, *inputs, target="w8a4")
    limits = {n.args[0].op: tensor_meta(n).qparams.qmax for n in calls(rounded, ops.quantize.default)}
    assert limits == {"placeholder": 255, "call_function": 15}


def test_a_small_row_is_raised_until_its_bias_and_shift_fit():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    randomize(model)
    with torch.no_grad():
        model[0].weight[0] = 1e-9
        model[0].bias[0] = 1.0
        model[0].weight[1] = 0
    exact, rounded = float_and_qdq(model, images(2, 3, 4, 4))
    conv = next(iter(calls(rounded, aten.conv2d.default)))
    _, s_w = weight_codes(rounded, conv)
    s_x = tensor_meta(conv.args[0]).qparams.scale
    clamp = next(iter(conv.users))
    s_y = tensor_meta(next(iter(clamp.users))).qparams.scale
    bias = constant(exact, next(iter(calls(exact, aten.conv2d.default))).args[2]).double()
    floor = torch.maximum(bias.abs() / numerics.MAX_BIAS_CODE, s_y * numerics.MIN_ACCUMULATOR_SCALE)
    assert (s_w.flatten() * s_x >= floor * (1 - 1e-12)).all()


def test_a_second_run_finds_nothing():
    model, inputs = build("classifier")
    levels = compile_levels(model, inputs)
    assert len(fxcompress.passes.Quantize().plan(levels[Level.QDQ])) == 0


def test_kept_modules_are_refused_with_the_reason():
    model, inputs = build("classifier")
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    levels = compile_levels(model, inputs, keep_float=(name,))
    plan = fxcompress.passes.Quantize().plan(levels[Level.FLOAT])
    assert any("keep_float names its module" in str(r) for r in plan.rejects)
    assert not any(is_constant(n) and "codes" in n.target and name in n.target for n in levels[Level.QDQ].graph.nodes)


def test_without_ranges_the_order_is_refused():
    with pytest.raises(fxcompress.errors.PipelineError, match="quantize needs RANGES"):
        PassManager(default_passes("int8").without("assign_ranges", "spiq"))
