"""Residual expansion: what it leaves, in how many int8 weights, and that the network runs on them."""

import itertools
import math

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import Level, numerics
from fxcompress.analysis.encoded_weights import EXPANSION, decode, summands
from fxcompress.dialects import WEIGHTED
from fxcompress.errors import OptionError
from fxcompress.graph import calls, constant
from fxcompress.lockstep import Lockstep
from fxcompress.meta import tensor_meta
from fxcompress.passes.expand_residuals import ExpandResiduals, Rounding, expand_outliers, expand_rows
from fxcompress.weight_quantizers import QUANTIZERS
from tests.support.graphs import build, images, randomize
from tests.support.levels import code_differences, compile_levels

NETWORKS = ["residual_block", "depthwise", "upsampling_block", "mlp"]
CASES = [(name, bits) for name, q in QUANTIZERS.items() for bits in range(2, q.widest + 1)]


def expand(v, bits, *, quantizer="nearest", share=1.0, orders=2, alike=False, smallest=0.0):
    """(parts, expansion) of rows (O, K) whose largest weight is the largest code."""
    rounding = Rounding(QUANTIZERS[quantizer], bits, 1)
    rows = torch.ones(len(v), dtype=torch.float64)
    return expand_rows(v, rounding(v), rows, rounding, rows * smallest, share, orders, alike)


def total(parts):
    return sum(p.codes * p.step[:, None] for p in parts)


def random_rows(bits, quantizer="nearest", count=16, length=40, seed=0):
    w = torch.randn(count, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return w / w.abs().amax(1, keepdim=True) * QUANTIZERS[quantizer].largest(bits)


@pytest.mark.parametrize("quantizer, bits", CASES)
def test_the_rest_shrinks_at_the_proven_rate(quantizer, bits):
    """|w - w^| <= error * 2^(-(bits-1)(K-1)) steps, for any quantizer."""
    v = random_rows(bits, quantizer)
    errors = [float((v - total(expand(v, bits, quantizer=quantizer, orders=k)[0])).abs().max()) for k in range(2, 6)]
    bounds = [QUANTIZERS[quantizer].error(bits) / 2.0 ** ((bits - 1) * (k - 1)) for k in range(2, 6)]
    assert all(e <= b * (1 + 1e-9) for e, b in zip(errors, bounds, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_weight_gets_worse_with_a_further_order(bits):
    v = random_rows(bits)
    rest = [(v - total(expand(v, bits, orders=k)[0])).abs() for k in range(2, 6)]
    assert all((b <= a + 1e-12).all() for a, b in itertools.pairwise(rest))


def test_reference_values():
    """Shift-aligned orders of w = [1, -0.37, 0.052, 0.9] at 4 bits: one integer at scale 1/448."""
    w = torch.tensor([[1.0, -0.37, 0.052, 0.9]], dtype=torch.float64)
    two, _ = expand(w * 7, 4)
    assert len(two) == 1 and two[0].codes.tolist() == [[56, -21, 3, 50]] and float(two[0].step) == 1 / 8
    three, _ = expand(w * 7, 4, orders=3)
    merged = three[0].codes * 8 + three[1].codes
    assert merged.tolist() == [[448, -166, 23, 403]] and float(three[1].step) == 1 / 64


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_the_share_of_rows_with_the_largest_rest_is_expanded(share):
    v = random_rows(4, count=10)
    parts, expansion = expand(v, 4, share=share)
    assert int(expansion.residuals.sum()) == math.ceil(share * 10)
    norms = (v - v.round()).abs().sum(1)
    chosen = expansion.residuals > 0
    if 0 < share < 1:
        assert norms[chosen].min() >= norms[~chosen].max()
    assert torch.equal(total(parts)[~chosen], v.round()[~chosen])


def test_a_row_left_out_competes_again():
    v = random_rows(4, count=10)
    _, expansion = expand(v, 4, share=0.5, orders=3)
    assert expansion.residuals.sum() == 10 and expansion.residuals.min() == 1  # the other half has the larger rest now


@pytest.mark.parametrize(
    "bits, orders, parts", [(2, 7, 1), (3, 3, 1), (4, 2, 1), (4, 3, 2), (4, 4, 2), (5, 2, 2), (8, 2, 2), (8, 3, 3)]
)
def test_orders_share_an_int8_weight_where_they_fit(bits, orders, parts):
    result, _ = expand(random_rows(bits), bits, orders=orders)
    assert len(result) == parts
    assert all(p.codes.abs().max() <= 127 and torch.equal(p.codes, p.codes.round()) for p in result)


def test_rows_alike_keep_one_step():
    v = random_rows(3)
    parts, expansion = expand(v, 3, share=0.4, orders=3, alike=True)
    assert all((p.step == p.step[0]).all() for p in parts)
    assert ((v - total(parts)).abs() <= expansion.error[:, None] * parts[0].step[:, None] + 1e-12).all()


def test_a_row_that_cannot_carry_a_finer_scale_keeps_one_order():
    _, expansion = expand(random_rows(4), 4, smallest=0.2)
    assert not expansion.residuals.any()
    _, expansion = expand(random_rows(4), 4, smallest=0.125)
    assert expansion.residuals.all()


# -------------------------------------------------------------------------------------------------------------- outliers


def with_outliers(bits, size, count=8, length=400):
    """Rows of unit deviation, one weight of ``size`` in each even row, scaled to the codes of ``bits``."""
    w = torch.randn(count, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(-3, 3)
    w[::2, 7] = size
    return w / w.abs().amax(1, keepdim=True) * numerics.weight_limit(bits)


@pytest.mark.parametrize("bits, parts", [(4, 1), (8, 2)])
@pytest.mark.parametrize("alike", [False, True])
def test_outliers_no_longer_set_the_scale_of_their_row(bits, parts, alike):
    v = with_outliers(bits, 30.0)
    rounding, ones = Rounding(QUANTIZERS["nearest"], bits, 1), torch.ones(len(v), dtype=torch.float64)
    if alike:
        v = v / v.abs().amax(1, keepdim=True) * torch.tensor([30.0, 3.0] * 4, dtype=torch.float64)[:, None]
        v = v / 30 * numerics.weight_limit(bits)
    result, expansion = expand_outliers(v, rounding(v), rounding, ones * 0, alike)
    assert len(result) == parts and all(p.codes.abs().max() <= 127 for p in result)
    assert expansion.residuals.tolist() == [1, 0] * 4
    before, after = (v - v.round())[::2].square().mean(), (v - total(result))[::2].square().mean()
    assert after < before / 10
    assert ((v - total(result)).abs() <= (expansion.error * result[0].step)[:, None] + 1e-9).all()


def test_without_outliers_nothing_is_to_do():
    model, inputs = build("mlp")
    levels = compile_levels(model, inputs, input_range=(-4.0, 4.0), target="w4a8", residual="outliers")
    assert not any(EXPANSION in n.meta for n in levels[Level.QDQ].graph.nodes)


# ----------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("options", [
    {"target": "w4a8", "residual": 0.5},
    {"target": "w8a8", "residual": 0.5},
    {"target": "w4a8", "residual": 1.0, "residual_orders": 3, "weight_quantizer": "squant"},
    {"target": "w4a8", "residual": 0.5, "weight_quantizer": "power"},
    {"target": "w4a8", "residual": 0.5, "weight_granularity": "tensor"},
    {"target": "w4a8", "residual": 0.5, "spiq": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_runs_on_it_bit_for_bit(name, options):
    model, inputs = build(name)
    options = {"example_inputs": inputs, "input_range": (-4.0, 4.0), **options}
    net, reference = (fxcompress.compile(model, backend=b, **options) for b in ("native", "reference"))
    assert torch.equal(net(*inputs), reference(*inputs))
    net.verify_integer_only()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("target", ["w4a8", "w8a8"])
def test_lowering_keeps_the_sum_of_the_parts(name, target):
    """Integer codes against the qdq level, tensor by tensor: rare differences of one step, as without residuals."""
    model, inputs = build(name)
    levels = compile_levels(model, inputs, target=target, residual=1.0, input_range=(-4.0, 4.0))
    for difference in code_differences(levels, *inputs).values():
        assert difference.steps <= 1 and difference.count <= max(4, 0.03 * difference.size)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_weights_are_those_of_the_float_network_up_to_the_bound(name):
    model, inputs = build(name)
    options = {"residual": 1.0, "weight_quantizer": "nearest"}
    levels = compile_levels(model, inputs, target="w4a8", input_range=(-4.0, 4.0), **options)
    exact = {n.name: n for n in calls(levels[Level.FLOAT], *WEIGHTED)}
    for node in calls(levels[Level.QDQ], *WEIGHTED):
        weight = constant(levels[Level.FLOAT], exact[node.name].args[1]).double()
        scale = constant(levels[Level.QDQ], summands(node.args[1])[-1].args[1])
        assert ((decode(levels[Level.QDQ], node.args[1]) - weight).abs() <= scale / 2 * (1 + 1e-9)).all()
        assert tensor_meta(summands(node.args[1])[0]).qparams.scale.shape == (len(node.meta[EXPANSION].residuals),)


def test_a_second_plan_finds_nothing_and_no_residual_plans_nothing():
    model, inputs = build("residual_block")
    levels = compile_levels(model, inputs, target="w4a8", residual=0.5, input_range=(-4.0, 4.0))
    assert not ExpandResiduals().plan(levels[Level.QDQ]).matches
    levels = compile_levels(model, inputs, target="w4a8", input_range=(-4.0, 4.0))
    assert not ExpandResiduals().plan(levels[Level.QDQ]).matches


def test_a_layer_of_dead_rows_is_refused_with_the_reason():
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        model[0].weight.mul_(1e-9)
        model[0].bias.fill_(1.0)
    net = fxcompress.compile(model, "w4a8", example_inputs=images(2, 3, 4, 4), input_range=(-4.0, 4.0), residual=1.0)
    record = next(p for p in net.report().passes if p["name"] == "expand_residuals")
    assert (
        record["rewrites"] == 1 and "no row of its weight needs a residual and can carry one" in record["refusals"][0]
    )


def test_the_biases_answer_for_the_final_weights():
    """A correction before the expansion would leave the means of the first rounding in every layer."""
    model, inputs = build("classifier")
    means = {}
    for method in (None, "empirical"):
        levels = compile_levels(model, inputs, calibrate=True, target="w4a8", residual=0.5, bias_correction=method)
        last = list(calls(levels[Level.QDQ], *WEIGHTED))[-1].name  # no clamp behind it: every sum counts
        exact, rounded = (Lockstep(levels[level], [inputs]).run_to(last)[0] for level in (Level.FLOAT, Level.QDQ))
        means[method] = float((exact.double() - rounded.double()).mean(0).abs().max())
    assert means["empirical"] < 1e-5 < means[None]


def test_accuracy_grows_with_the_share():
    model, inputs = build("classifier")
    options = {"example_inputs": inputs, "input_range": (-4.0, 4.0), "bias_correction": None}
    sqnr = [fxcompress.compile(model, "w4a8", residual=r, **options).report().output_sqnr[0] for r in (0, 0.5, 1.0)]
    assert sqnr[0] + 3 < sqnr[1] < sqnr[2]


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "outlier", None])
def test_an_impossible_share_is_refused(value):
    model, inputs = build("mlp")
    with pytest.raises(OptionError, match="residual is"):
        fxcompress.compile(model, example_inputs=inputs, residual=value)


def test_orders_without_a_share_are_refused():
    model, inputs = build("mlp")
    with pytest.raises(OptionError, match="residual_orders=3 has no effect"):
        fxcompress.compile(model, example_inputs=inputs, residual_orders=3)
