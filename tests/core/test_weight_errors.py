"""Bounds on what rounded weights do: each holds, and none is far from what it bounds where it can be reached."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxcompress
from fxcompress import Level
from fxcompress.capture import capture
from fxcompress.dialects import WEIGHTED
from fxcompress.graph import add_constant, calls, constant
from fxcompress.weight_errors import network_bound, operator_norm, weight_errors
from tests.support.graphs import build, images, randomize
from tests.support.levels import compile_levels

OPTIONS = [
    {"target": "int8"},
    {"target": "w4a8"},
    {"target": "w4a8", "weight_quantizer": "squant"},
    {"target": "w3a8", "weight_quantizer": "power"},
    {"target": "w4a8", "residual": 0.5},
    {"target": "w4a8", "residual": 0.3, "weight_granularity": "tensor"},
    {"target": "w2a8", "residual": 0.5, "residual_orders": 4},
    {"target": "w8a8", "residual": 1.0},
    {"target": "w4a8", "residual": 0.5, "weight_quantizer": "squant"},
    {"target": "w4a8", "residual": 1.0, "weight_quantizer": "power"},
    {"target": "w4a8", "residual": "outliers"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["residual_block", "upsampling_block"])
def test_no_weight_is_farther_off_than_proven(name, options):
    model, inputs = build(name)
    levels = compile_levels(model, inputs, input_range=(-4.0, 4.0), **options)
    errors = weight_errors(levels[Level.FLOAT], levels[Level.QDQ])
    assert errors
    for error in errors:
        assert 0 < error.largest_error <= error.bound * (1 + 1e-9)


@pytest.mark.parametrize("stride, padding, groups", [(1, 0, 1), (1, 1, 1), (2, 1, 1), (1, 1, 4), (1, 2, 2)])
def test_the_norm_of_a_convolution_is_bounded(stride, padding, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, stride, padding, groups=groups, bias=False)
    gm = capture(conv.eval(), (images(2, 4, 6, 6),)).graph_module
    (node,) = calls(gm, *WEIGHTED)
    matrix = torch.autograd.functional.jacobian(lambda x: conv(x)[0].flatten(), images(1, 4, 6, 6)).flatten(1)
    true, bound = float(torch.linalg.matrix_norm(matrix, 2)), operator_norm(node, conv.weight.detach())
    assert true <= bound


def test_the_norm_is_reached_where_all_weights_are_equal():
    gm = capture(nn.Linear(9, 4, bias=False).eval(), (images(2, 9),)).graph_module
    (node,) = calls(gm, *WEIGHTED)
    assert operator_norm(node, torch.full((4, 9), 0.5)) == pytest.approx(3.0)  # of the matrix: 0.5 sqrt(4 * 9)


class Branches(nn.Module):
    """Sums, a concatenation, pools; no bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 6, 3, padding=1, bias=False) for _ in range(2))
        self.c, self.d = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.Linear(12, 5, bias=False)

    def forward(self, x):
        x = F.relu(self.a(x) + self.b(x))
        x = torch.cat([F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(F.relu6(self.c(x)), 2)], 1)
        return self.d(x.mean((2, 3)))


@pytest.mark.parametrize("target", ["w8a8", "w4a8", "w2a8"])
@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False)), Branches()]
)
def test_the_network_moves_less_than_proven(model, target):
    """Both networks in floating point, the second with the integer weights: |F(x) - F^(x)| <= bound |x|."""
    model = randomize(model)
    x = images(16, 8) if isinstance(model, nn.Sequential) else images(16, 3, 8, 8)
    levels = compile_levels(model, (x,), input_range=(-4.0, 4.0), target=target, bias_correction=None)
    exact, rounded = levels[Level.FLOAT], levels[Level.QDQ]
    bound = network_bound(exact, weight_errors(exact, rounded))
    weights = {n.name: n.args[1] for n in calls(rounded, *WEIGHTED)}
    moved = compile_levels(model, (x,), input_range=(-4.0, 4.0), target=target, bias_correction=None)[Level.FLOAT]
    for node in calls(moved, *WEIGHTED):
        codes, scale = (constant(rounded, a) for a in weights[node.name].args[:2])
        with moved.graph.inserting_before(node):
            node.update_arg(1, add_constant(moved, "rounded", (codes * scale).float(), node))
    moved.recompile()
    y, z = exact(x)[0], moved(x)[0]
    norms = x.flatten(1).norm(dim=1)
    assert ((y - z).norm(dim=1) <= bound.absolute * norms).all()
    assert (y.norm(dim=1) <= bound.gain * norms).all()
    assert bound.relative == pytest.approx(bound.absolute / bound.gain) and (y - z).abs().max() > 0


def test_a_chain_has_the_closed_form():
    model = randomize(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    levels = compile_levels(model, (images(2, 8),), input_range=(-4.0, 4.0), target="w4a8")
    errors = weight_errors(levels[Level.FLOAT], levels[Level.QDQ])
    (s1, e1), (s2, e2) = ((e.sigma, e.error) for e in errors)
    assert network_bound(levels[Level.FLOAT], errors).absolute == pytest.approx((s1 + e1) * (s2 + e2) - s1 * s2)


def test_an_operator_without_a_bound_is_named():
    model, inputs = build("squeeze_excite")
    report = fxcompress.compile(model, example_inputs=inputs, input_range=(-4.0, 4.0)).report()
    assert report.weight_bound.relative is None and "has no bound" in report.weight_bound.reason


def test_the_report_holds_what_was_measured_and_survives_saving(tmp_path):
    model, inputs = build("residual_block")
    net = fxcompress.compile(model, "w4a8", example_inputs=inputs, residual=0.5, weight_quantizer="power")
    net.save(tmp_path / "m")
    report = net.report()
    assert fxcompress.load(tmp_path / "m").report().to_dict() == report.to_dict()
    assert len(report.weights) == 2 and all(
        w.residuals == -(-w.rows // 2) and w.accumulators == 2 for w in report.weights
    )
    assert report.exponents.best_error <= report.exponents.half_error
    text = str(report)
    assert "residuals" in text and "power exponent" in text and "rounded weights move the network by" in text


# ------------------------------------------------------------------------------------------------------- in the report


def moved(model, x, **options) -> tuple:
    report = fxcompress.compile(model, example_inputs=x, input_range=(-4, 4), **options).report()
    return report.weight_bound, str(report)


def test_a_tight_bound_is_shown_as_a_share_of_the_outputs():
    model = randomize(nn.Linear(8, 4, bias=False))
    x = images(2, 8)
    bound, text = moved(model, x)
    norms = x.norm(dim=1) / model(x).norm(dim=1)
    assert bound.share == pytest.approx(bound.absolute * float(norms.max().detach()), rel=1e-4) and bound.share < 1
    assert f"at most {bound.share:.2g} of the outputs on the example (proven)" in text


def test_a_loose_bound_is_not_shown_but_kept():
    model = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())))
    bound, text = moved(randomize(model), images(2, 6, 8, 8))
    assert bound.share >= 1 and bound.absolute > 0 and bound.gain > 0
    assert "an unknown amount: what can be proven" in text and f"{bound.gain:.3g}" not in text
