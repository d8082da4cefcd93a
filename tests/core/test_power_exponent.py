"""The shared exponent of PowerQuant."""

import pytest
import torch

from fxcompress.power_exponent import GRID, exponent_choice, nelder_mead, network_error, power_round, search_exponent
from fxcompress.weight_quantizers import QUANTIZERS


def weights(power=1.0, count=3):
    generator = torch.Generator().manual_seed(0)
    normal = (torch.randn(16, 64, generator=generator, dtype=torch.float64) for _ in range(count))
    return [w.sign() * w.abs() ** power for w in normal]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_exponent_one_is_uniform_rounding(bits):
    (w,) = weights(count=1)
    limit = QUANTIZERS["nearest"].largest(bits)
    scale = w.abs().amax(1, keepdim=True) / limit
    assert torch.allclose(
        power_round(w, 1.0, bits), QUANTIZERS["nearest"].encode(w / scale, 1, bits) * scale, atol=1e-12
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_exponent_one_half_is_what_the_integers_decode_to(bits):
    (w,) = weights(count=1)
    scale = w.abs().amax(1, keepdim=True) / QUANTIZERS["power"].largest(bits)
    assert torch.allclose(power_round(w, 0.5, bits), QUANTIZERS["power"].encode(w / scale, 1, bits) * scale, atol=1e-12)


def test_the_largest_weight_is_kept():
    (w,) = weights(count=1)
    rounded = power_round(w, 0.4, 4)
    assert torch.allclose(rounded.abs().amax(1), w.abs().amax(1))
    assert (rounded * w >= 0).all()


def test_nelder_mead_finds_a_minimum():
    assert abs(nelder_mead(lambda x: (x - 1.3) ** 2, 0.5, 0.1) - 1.3) < 2e-3
    assert abs(nelder_mead(lambda x: abs(x + 0.2), 0.5, 0.1) + 0.2) < 2e-3


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_no_exponent_of_the_grid_is_better(power):
    layers = weights(power)
    best = search_exponent(layers, 4)
    assert network_error(layers, best, 4) <= min(network_error(layers, a, 4) for a in GRID)


def test_heavier_tails_want_a_smaller_exponent():
    assert search_exponent(weights(3.0), 4) < search_exponent(weights(1.0), 4)


def test_the_choice_names_what_one_half_costs():
    choice = exponent_choice(weights(), 4)
    assert choice.best_error <= min(choice.half_error, choice.uniform_error)
