"""What passes did to layers and what that won: numbers with a value that can be derived, and what is left unmeasured and why."""

import math

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import Effect, Level, RewriteRule
from fxcompress.effects import nearest_sqnr
from fxcompress.noise import ChannelNoise, ratio_db
from fxcompress.options import CompileOptions
from tests.support.graphs import build, images, randomize

PER_TENSOR = CompileOptions.build(weight_granularity="tensor")


def rows_of(report, name: str) -> dict:
    return {e.node: e for e in report.effects if e.pass_name == name}


def record_of(report, name: str) -> dict:
    return next(p for p in report.passes if p["name"] == name)


def balanced(rows: int, columns: int) -> torch.Tensor:
    """A weight whose every row and every column has the largest magnitude 1, which no rescaling can improve."""
    weight = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) * 1.8 - 0.9
    return weight.index_put((torch.arange(rows), torch.arange(rows) % columns), torch.ones(())).index_put(
        (torch.arange(columns) % rows, torch.arange(columns)), torch.ones(())
    )


@pytest.fixture(scope="module")
def unbalanced():
    """Two layers; what writes channel i is 2^i times larger than what reads it: balanced by undoing that."""
    first, second = balanced(8, 8), balanced(8, 8)
    factor = 2.0 ** torch.arange(8)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    model[0].weight.data, model[2].weight.data = first * factor[:, None], second / factor
    inputs = torch.rand(16, 8, generator=torch.Generator().manual_seed(5))
    report = fxcompress.compile(
        model.eval(), example_inputs=inputs, input_range=(0, 1), weight_granularity="tensor", measure_passes=True,
        calibration_data=[inputs], bias_correction=None,
    ).report()  # fmt: skip
    return report, first, second


def test_equalizing_brings_back_what_unbalancing_took(unbalanced):
    report, *weights = unbalanced
    effects = rows_of(report, "equalize_cross_layer")
    assert list(effects) == ["linear", "linear_1"]
    for effect, weight in zip(effects.values(), weights, strict=True):
        assert effect.weight_after == pytest.approx(nearest_sqnr(weight, PER_TENSOR), abs=0.2)
        assert effect.weight_before < effect.weight_after - 3


def test_equalizing_wins_at_the_output(unbalanced):
    report = unbalanced[0]
    record, last = record_of(report, "equalize_cross_layer"), rows_of(report, "equalize_cross_layer")["linear_1"]
    assert record["without"] == "left out"
    assert last.sqnr > last.sqnr_without + 3
    # The last layer is the output: the same number, by the way of the layers and by the way of the outputs.
    assert record["output_sqnr_without"] == pytest.approx([last.sqnr_without], abs=0.05)
    assert record_of(report, "quantize")["output_sqnr"] == pytest.approx([last.sqnr], abs=0.05)


def compiled(model, x):
    """Corrected on the very data that the effects are measured on."""
    return fxcompress.compile(model, "w4a8", example_inputs=x, calibration_data=[x], measure_passes=True).report()


@pytest.fixture(scope="module")
def corrected():
    model, (x,) = build("classifier")
    return compiled(model, x)


@pytest.fixture(scope="module")
def without_clamp():
    """Every sum is seen, so that the whole shift is corrected."""
    return compiled(randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))), images(2, 3, 12, 12))


def test_the_mean_shift_goes(without_clamp):
    effects = rows_of(without_clamp, "correct_bias")
    assert len(effects) == len(without_clamp.weights)
    for effect in effects.values():
        assert effect.shift_without > 0.001 and effect.shift < 1e-6
        assert effect.weight_after is None and any("empirical: moves by" in text for text in effect.done)


def test_the_first_layer_wins_exactly_its_shift(without_clamp):
    """Nothing before it changes: what is left of its noise is all but the shift."""
    first = next(iter(rows_of(without_clamp, "correct_bias").values()))
    assert first.sqnr == pytest.approx(first.sqnr_without - 10 * math.log10(1 - first.shift_without), abs=1e-4)


def test_the_quantizer_is_compared_with_nearest(corrected):
    record = record_of(corrected, "quantize")
    assert record["without"] == 'weight_quantizer="nearest"' and len(record["output_sqnr_without"]) == 1
    effects = rows_of(corrected, "quantize")
    # Nearest has the smallest error of each weight; flips cost some of it, and win in sums.
    assert all(e.weight_after <= e.weight_before + 1e-3 for e in effects.values())
    assert any(e.weight_after < e.weight_before - 0.1 for e in effects.values())


@pytest.mark.parametrize("bits", [3, 4])
def test_every_order_of_residuals_adds_its_bits(bits):
    """A step 2^(b-1) times finer is 20 (b-1) log10(2) dB, if errors are uniform within a step."""
    torch.manual_seed(0)
    model = nn.Linear(256, 16, bias=False)
    x = torch.rand(4, 256)
    report = fxcompress.compile(
        model.eval(), f"w{bits}a8", example_inputs=x, input_range=(0, 1), residual=1.0, weight_quantizer="nearest"
    ).report()
    (effect,) = rows_of(report, "expand_residuals").values()
    assert effect.weight_after - effect.weight_before == pytest.approx(20 * (bits - 1) * math.log10(2), abs=0.5)


def test_the_last_pass_is_what_the_report_says_of_the_output(corrected):
    last = [p["output_sqnr"] for p in corrected.passes if p["output_sqnr"] is not None][-1]
    assert last == pytest.approx(corrected.output_sqnr, abs=0.01)


def test_passes_that_cannot_be_left_out_say_why():
    model, (x,) = build("residual_block")
    report = fxcompress.compile(model, example_inputs=x, input_range=(-3, 3), measure_passes=True).report()
    assert "needs RANGES, which no earlier pass establishes" in record_of(report, "assign_ranges")["without"]
    assert record_of(report, "spiq")["without"] == ""  # did nothing
    assert report.seconds["measuring passes"] > 0


class Nudge(RewriteRule):
    """Halves every weight of a linear layer and doubles what comes out: exact, and of no use."""

    name, level, effect, source = "nudge", Level.FLOAT, Effect.LOSSY, "a test"

    def match(self, node):
        if node.target is torch.ops.aten.linear.default and "nudged" not in node.meta:
            return fxcompress.Match(node, "nudged")

    def rewrite(self, match, gm):
        from fxcompress.graph import add_constant, constant

        node = match.node
        node.meta["nudged"] = True
        with gm.graph.inserting_before(node):
            node.update_arg(1, add_constant(gm, "nudged", constant(gm, node.args[1]) * (1 + 1e-3), node))


def test_a_pass_of_ones_own_is_measured_like_the_others():
    model, (x,) = build("mlp")
    passes = fxcompress.default_passes().insert_before("assign_ranges", Nudge())
    report = fxcompress.compile(model, example_inputs=x, passes=passes, measure_passes=True).report()
    effects = rows_of(report, "nudge")
    assert [e.done for e in effects.values()] == [["nudged"]] * len(effects) and effects
    assert all(e.weight_after == pytest.approx(e.weight_before, abs=0.01) for e in effects.values())
    assert record_of(report, "nudge")["without"] == "left out"


# ------------------------------------------------------------------------------------------------------------- layers


def test_the_noise_of_the_first_layer_is_its_own():
    model, (x,) = build("classifier")
    first, *others = fxcompress.compile(model, example_inputs=x, measure_passes=True).report().noise
    assert first.sqnr == first.own_sqnr
    assert all(layer.own_sqnr > layer.sqnr for layer in others)


def test_own_noise_is_that_of_the_rounded_input():
    """Weights that are codes exactly: a sum of 16 inputs rounded to steps of 1/255, uniform errors of variance 1/12 steps."""
    model = nn.Linear(16, 1, bias=False)
    model.weight.data.fill_(1.0)
    x = torch.rand(2000, 16, generator=torch.Generator().manual_seed(0))
    (layer,) = fxcompress.compile(model.eval(), example_inputs=x[:4], calibration_data=[x], input_range=(0, 1),
                                  bias_correction=None, measure_passes=True).report().noise  # fmt: skip
    signal, noise = (16 / 2) ** 2 + 16 / 12, 16 / 12 / 255**2
    assert layer.own_sqnr == layer.sqnr == pytest.approx(ratio_db(signal, noise), abs=6)  # of four samples


def test_units_of_channels_are_no_gain():
    torch.manual_seed(0)
    signal, noise = torch.randn(4, 1000).double(), torch.randn(4, 1000).double() / 100
    unit = torch.tensor([1.0, 4.0, 0.1, 30.0])[:, None]

    def measured(factor):
        y, d = signal * factor, noise * factor
        energy = d.square().sum(1)
        return ChannelNoise(y.square().sum(1), y.std(1, correction=0), energy, d.mean(1).square() * 1000, energy)

    one, other = measured(1.0), measured(unit)
    assert abs(other.sqnr - one.sqnr) > 0.01
    assert other.in_units_of(one).sqnr == pytest.approx(one.sqnr)
    assert other.in_units_of(one).shift_share == pytest.approx(one.shift_share)


def test_layers_that_read_residuals_are_measured_whole():
    model, (x,) = build("mlp")
    report = fxcompress.compile(
        model, example_inputs=x, residual_inputs=True, residual=1.0, measure_passes=True
    ).report()
    plain = fxcompress.compile(model, example_inputs=x, measure_passes=True).report()
    assert record_of(report, "expand_inputs")["rewrites"]
    assert report.noise[-1].own_sqnr > plain.noise[-1].own_sqnr + 20 and report.noise[-1].sqnr > plain.noise[-1].sqnr
    assert rows_of(report, "expand_inputs")["linear_1"].sqnr > rows_of(report, "expand_inputs")["linear_1"].sqnr_without


# ------------------------------------------------------------------------------------------------------------- on request


def test_weights_are_always_known_and_outputs_on_request(tmp_path):
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    x = images(2, 3, 8, 8)
    report = fxcompress.compile(model, example_inputs=x).report()
    assert {e.pass_name for e in report.effects} == {"fold_batch_norm", "quantize", "correct_bias"}
    assert all(e.sqnr is None for e in report.effects) and report.noise == []
    assert fxcompress.compile(model, example_inputs=x, debug=tmp_path / "on").report().noise
    assert not fxcompress.compile(model, example_inputs=x, debug=tmp_path / "off", measure_passes=False).report().noise


def test_what_a_fold_did_is_told_at_its_layer():
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    report = fxcompress.compile(model, example_inputs=images(2, 3, 8, 8)).report()
    (effect,) = rows_of(report, "fold_batch_norm").values()
    assert effect.origin == "0" and effect.weight_before and effect.weight_after
    # One scale per row: a factor per row changes no row's SQNR, only what the rows count for.
    assert effect.weight_after == pytest.approx(effect.weight_before, abs=3)


def test_the_tables_name_layers_and_passes(corrected):
    text = str(corrected)
    for fragment in (
        "each layer's rounded weight, before and after",
        "each layer's output, without and with",
        "correct_bias",
    ):
        assert fragment in text
