"""Input expansion: layers read the codes of their input and, a second time, what these codes lost."""

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import Level
from fxcompress.dialects import SUB
from fxcompress.graph import calls
from fxcompress.meta import tensor_meta
from fxcompress.passes.expand_inputs import ExpandInputs
from tests.support.graphs import build, images, randomize
from tests.support.levels import code_differences, compile_levels

ops = torch.ops.fxcompress
NETWORKS = ["residual_block", "upsampling_block", "inverted_residual", "mlp"]


def values(gm, inputs):
    """The value of every node, by name."""
    found = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            found[node.name] = super().run_node(node)
            return found[node.name]

    Recorder(gm).run(*inputs)
    return found


@pytest.mark.parametrize("target", ["int8", "w8a4"])
@pytest.mark.parametrize("name", NETWORKS)
def test_codes_and_residual_together_are_finer(name, target):
    """|x - x^ - r^| is at most half a step of the residual, 8 (w8a4) or 64 times less than a step of the codes."""
    model, inputs = build(name)
    levels = compile_levels(model, inputs, calibrate=True, range_method="minmax", target=target, residual_inputs=True)
    gm = levels[Level.QDQ]
    found = values(gm, inputs)
    rests = list(calls(gm, SUB))
    assert rests
    for rest in rests:
        x, rounded = (found[a.name] for a in rest.args)
        codes = next(iter(rest.users))
        fine, coarse = tensor_meta(codes).qparams, tensor_meta(rest.args[1]).qparams
        assert float(coarse.scale / fine.scale) == min((coarse.qmax + 1) // 2, 64)
        residual = found[next(iter(codes.users)).name]
        inside = (x - rounded).abs() <= coarse.scale / 2  # the others were clipped
        left = (x - rounded - residual).abs()[inside]
        assert inside.float().mean() > 0.9 and left.max() <= float(fine.scale) / 2 * 1.01 + 1e-6


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_runs_on_it_bit_for_bit_and_is_closer(name):
    model, inputs = build(name)
    options = {"example_inputs": inputs, "input_range": (-4.0, 4.0), "target": "w8a4"}
    plain = fxcompress.compile(model, **options)
    net, reference = (
        fxcompress.compile(model, backend=b, residual_inputs=True, **options) for b in ("native", "reference")
    )
    assert torch.equal(net(*inputs), reference(*inputs))
    assert net.report().output_sqnr[0] > plain.report().output_sqnr[0] + 3
    net.verify_integer_only()


@pytest.mark.parametrize("name", NETWORKS)
def test_lowering_keeps_it(name):
    """Residual codes, without guard bits, are right within two of them, others within one."""
    model, inputs = build(name)
    levels = compile_levels(model, inputs, calibrate=True, range_method="minmax", residual_inputs=True)
    for source, difference in code_differences(levels, *inputs).items():
        assert difference.steps <= (2 if source.endswith("_rest") else 1)


def test_inputs_that_were_never_finer_are_refused():
    model, inputs = build("conv_bn_relu")
    net = fxcompress.compile(model, example_inputs=inputs, input_range=(-4.0, 4.0), residual_inputs=True)
    (record,) = [p for p in net.report().passes if p["name"] == "expand_inputs"]
    assert record["rewrites"] == 0 and "its input is a graph input" in record["refusals"][0]
    pooled = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)))
    x = images(2, 3, 8, 8)
    net = fxcompress.compile(pooled, example_inputs=x, input_range=(-4.0, 4.0), residual_inputs=True)
    (record,) = [p for p in net.report().passes if p["name"] == "expand_inputs"]
    assert any("only moves codes" in refusal for refusal in record["refusals"])


def test_a_second_plan_finds_nothing_and_it_is_off_by_default():
    model, inputs = build("residual_block")
    levels = compile_levels(model, inputs, residual_inputs=True, input_range=(-4.0, 4.0))
    assert not ExpandInputs().plan(levels[Level.QDQ]).matches
    levels = compile_levels(model, inputs, input_range=(-4.0, 4.0))
    assert not ExpandInputs().plan(levels[Level.QDQ]).matches and not any(calls(levels[Level.QDQ], SUB))


def test_it_joins_with_residuals_of_weights():
    """k1 + k2 <= 3: of the last layer three products, because only its first int8 weight meets the residual of the input."""
    model, inputs = build("mlp")
    options = {"input_range": (-4.0, 4.0), "residual": 1.0, "residual_inputs": True}
    gm = compile_levels(model, inputs, **options)[Level.INTEGER]
    assert [len(n.args[0]) for n in calls(gm, ops.rescale.default)] == [2, 3]
