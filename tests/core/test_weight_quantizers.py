"""Weight quantizers: codes, error bounds and the sums that SQuant balances."""

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import Level, numerics
from fxcompress.analysis.encoded_weights import from_rows, layer_quantizer, rows
from fxcompress.dialects import WEIGHTED
from fxcompress.errors import OptionError
from fxcompress.graph import calls, constant
from fxcompress.weight_quantizers import QUANTIZERS
from tests.support.graphs import build, images, randomize
from tests.support.levels import compile_levels

CASES = [(name, bits) for name, q in QUANTIZERS.items() for bits in range(2, q.widest + 1)]


def steps(quantizer, bits, rows=24, inputs=20, taps=9, seed=0):
    """Random rows (O, K) float64 in steps: the largest of each row is the largest code."""
    w = torch.randn(rows, inputs * taps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return w / w.abs().amax(1, keepdim=True) * quantizer.largest(bits)


@pytest.mark.parametrize("name, bits", CASES)
@pytest.mark.parametrize("taps", [1, 9])
def test_codes_stay_in_range_and_within_the_error_bound(name, bits, taps):
    quantizer = QUANTIZERS[name]
    v = steps(quantizer, bits, taps=taps)
    v = torch.cat([v, torch.linspace(-1, 1, v.shape[1], dtype=torch.float64)[None] * quantizer.largest(bits)])
    codes = quantizer.encode(v, taps, bits)
    assert codes.dtype == torch.int8 and codes.abs().max() <= quantizer.largest(bits) <= 127
    assert (codes - v).abs().max() <= quantizer.error(bits)
    assert torch.equal(quantizer.encode(-v, taps, bits), -codes)
    assert not quantizer.encode(torch.zeros(2, 9, dtype=torch.float64), taps, bits).any()


def test_nearest_is_the_offline_rounding():
    v = steps(QUANTIZERS["nearest"], 8) * 1.01
    zero = torch.zeros((), dtype=torch.int32)
    expected = numerics.quantize_offline(v, torch.ones(()), zero, -127, 127)
    assert torch.equal(QUANTIZERS["nearest"].encode(v, 9, 8).int(), expected)


# --------------------------------------------------------------------------------------------------------------- squant


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("taps", [1, 4, 9])
def test_squant_balances_kernels_and_rows(bits, taps):
    quantizer = QUANTIZERS["squant"]
    v = steps(quantizer, bits, taps=taps)
    error = quantizer.encode(v, taps, bits) - v
    assert error.abs().max() < 1
    assert error.sum(1).abs().max() <= 0.5 + 1e-9
    assert error.reshape(len(v), -1, taps).sum(2).abs().max() <= 1 + 1e-9
    plain = QUANTIZERS["nearest"].encode(v, taps, bits) - v
    assert plain.sum(1).abs().max() > 1


def squant_by_loops(v, taps, limit):
    """Guo et al. 2022 as it is written down: one row, one kernel, one flip at a time."""
    codes = v.round().clamp(-limit, limit)
    for row, real in zip(codes, v, strict=True):
        kernels = range(0, len(row), taps)
        for k in kernels:
            flip(row, real, range(k, k + taps), limit)
        total = float((row - real).sum())
        candidates = {}
        for k in kernels:
            error = row[k : k + taps] - real[k : k + taps]
            wrong = [float(e) * (1 if total > 0 else -1) for e in error]
            wrong = [
                w if abs(float(row[k + i]) - (1 if total > 0 else -1)) <= limit else 0 for i, w in enumerate(wrong)
            ]
            balance = float(error.sum()) * (1 if total > 0 else -1)
            if max(wrong) > 0 and balance > 0:
                candidates[k + max(range(taps), key=wrong.__getitem__)] = balance
        for i in sorted(candidates, key=candidates.get, reverse=True)[: round(abs(total))]:
            row[i] -= 1 if total > 0 else -1
    return codes


def flip(row, real, indices, limit):
    total = float(sum(row[i] - real[i] for i in indices))
    direction = 1 if total > 0 else -1
    wrong = {i: float(row[i] - real[i]) * direction for i in indices if abs(float(row[i]) - direction) <= limit}
    for i in sorted((i for i in wrong if wrong[i] > 0), key=wrong.get, reverse=True)[: round(abs(total))]:
        row[i] -= direction


@pytest.mark.parametrize("bits, taps", [(2, 9), (4, 9), (4, 1), (8, 3)])
def test_squant_is_the_published_algorithm(bits, taps):
    v = steps(QUANTIZERS["squant"], bits, rows=6, inputs=12, taps=taps)
    expected = squant_by_loops(v.clone(), taps, numerics.weight_limit(bits))
    assert torch.equal(QUANTIZERS["squant"].encode(v, taps, bits).double(), expected)


def test_squant_reference_values():
    v = torch.tensor([[0.8, 0.8, 0.7]], dtype=torch.float64)
    assert QUANTIZERS["squant"].encode(v, 3, 4).tolist() == [[1, 1, 0]]


def test_squant_never_leaves_the_codes():
    """Every weight wants to be rounded up, and the largest code is the end."""
    v = torch.full((1, 9), 6.6, dtype=torch.float64)
    assert QUANTIZERS["squant"].encode(v, 9, 4).max() <= 7
    v = torch.full((1, 9), 7.4, dtype=torch.float64)
    assert QUANTIZERS["squant"].encode(v, 9, 4).tolist() == [[7] * 9]


# ---------------------------------------------------------------------------------------------------------------- power


def test_power_reference_values():
    w = torch.tensor([[0.05, -0.2, 0.45, 1.0]], dtype=torch.float64)
    assert QUANTIZERS["power"].encode(w * 49, 1, 4).tolist() == [[4, -9, 25, 49]]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_power_codes_are_signed_squares_that_keep_the_order(bits):
    quantizer = QUANTIZERS["power"]
    v = torch.linspace(-1, 1, 501, dtype=torch.float64)[None] * quantizer.largest(bits)
    codes = quantizer.encode(v, 1, bits)[0].int()
    assert (codes.diff() >= 0).all() and int(codes[-1]) == numerics.weight_limit(bits) ** 2
    assert set(codes.abs().tolist()) == {q * q for q in range(numerics.weight_limit(bits) + 1)}


@pytest.mark.parametrize("target", ["w5a8", "int8"])
def test_power_says_where_its_codes_end(target):
    model, inputs = build("mlp")
    with pytest.raises(OptionError, match=r'reaches code (225|16129) at \d bits; int8 holds 127.*Choose "w4a8"'):
        fxcompress.compile(model, target, example_inputs=inputs, weight_quantizer="power")


# ------------------------------------------------------------------------------------------------------ in the network


@pytest.mark.parametrize("name", ["depthwise", "upsampling_block", "mlp"])
@pytest.mark.parametrize("quantizer", list(QUANTIZERS))
def test_every_layer_runs_the_same_on_both_backends(name, quantizer):
    model, inputs = build(name)
    options = {"example_inputs": inputs, "input_range": (-4.0, 4.0), "weight_quantizer": quantizer}
    nets = [fxcompress.compile(model, "w4a8", backend=backend, **options) for backend in ("native", "reference")]
    assert torch.equal(nets[0](*inputs), nets[1](*inputs))
    largest = QUANTIZERS[quantizer].largest(4)
    gm = nets[0].graph_module
    weights = [constant(gm, n) for n in gm.graph.find_nodes(op="get_attr") if constant(gm, n).dtype == torch.int8]
    assert weights and all(w.abs().max() == largest for w in weights)


def test_by_default_narrow_weights_of_positive_inputs_are_balanced():
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    inputs = (images(2, 3, 8, 8),)
    chosen = {}
    for target, weight_quantizer in [("w4a8", None), ("int8", None), ("w4a8", "squant"), ("int8", "nearest")]:
        gm = compile_levels(model, inputs, input_range=(-4.0, 4.0), target=target, weight_quantizer=weight_quantizer)[
            Level.QDQ
        ]
        chosen[target, weight_quantizer] = [layer_quantizer(gm, n).name for n in calls(gm, *WEIGHTED)]
    assert chosen["w4a8", None] == ["nearest", "squant"]  # the input takes both signs, the ReLU does not
    assert chosen["int8", None] == chosen["int8", "nearest"] == ["nearest", "nearest"]
    assert chosen["w4a8", "squant"] == ["squant", "squant"]


def test_rows_of_a_grouped_transposed_convolution_come_back():
    for groups in (1, 2):
        node = torch.fx.Graph().call_function(
            torch.ops.aten.conv_transpose2d.input, (None, None, None, 1, 0, 0, groups)
        )
        weight = images(4, 3, 2, 2)
        table = rows(node, weight)
        assert table.shape == (3 * groups, 4 // groups * 4)
        assert torch.equal(from_rows(node, table, weight), weight.double())
        assert torch.equal(table[0, :4], weight[0, 0].flatten().double())  # output 0 reads input 0 first
