"""What is computed does not depend on the torch modes that the caller is in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxcompress

MODES = [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
modes = pytest.mark.parametrize("mode", MODES, ids=["inference_mode", "no_grad", "autocast"])


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


def images():
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def same(one, other) -> bool:
    with torch.no_grad():
        return torch.equal(one(images()), other(images()))


ACTIONS = {
    "compile": lambda model, x: fxcompress.compile(model, example_inputs=x[:1], calibration_data=x),
    "prune": lambda model, x: fxcompress.prune(model, x[:1], calibration_data=x, pruning_criterion="taylor", round_to=1),
    "prune_products": lambda model, x: fxcompress.prune_products(model, x[:2], x, criterion="weight_gradient", removed=0.1),
}  # fmt: skip


@modes
@pytest.mark.parametrize("action", ACTIONS)
def test_the_result_is_that_of_no_mode(mode, action):
    expected = ACTIONS[action](network(), images())
    with mode():  # model and images are made inside, too: inference tensors
        found = ACTIONS[action](network(), images())
    assert same(found, expected)


@modes
def test_the_first_call_compiles_under_any_mode(mode):
    expected = fxcompress.compile(network(), calibration_data=images())(images())
    late = fxcompress.compile(network(), input_range=(-4.0, 4.0))
    late_expected = fxcompress.compile(network(), input_range=(-4.0, 4.0))(images())
    with mode():
        assert torch.equal(late(images()), late_expected)
        assert torch.equal(fxcompress.compile(network(), calibration_data=images())(images()), expected)


@pytest.mark.parametrize("mode", MODES[:2], ids=["inference_mode", "no_grad"])
@pytest.mark.parametrize("gradually", [False, True])
def test_training_takes_gradients_under_any_mode(mode, gradually):
    def trained():
        model = network()
        if gradually:
            return fxcompress.prune_gradually(
                model, images()[:1], images(), pruning_ratio=0.3, teacher=model, steps=4, removals=2, batch_size=4, round_to=1
            )  # fmt: skip
        return fxcompress.fine_tune(model, (images(), torch.arange(8) % 5), steps=4, batch_size=4)

    expected = trained()
    with mode():
        found = trained()
    assert same(found, expected)


def test_what_is_pruned_while_training_in_autocast_is_cut_exactly():
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        small = fxcompress.prune_gradually(
            model, images()[:1], images(), pruning_ratio=0.3, teacher=model, steps=4, removals=2, batch_size=4, round_to=1
        )  # fmt: skip
    assert small.meta["pruning"].saved >= 0.3
    assert {p.dtype for p in small.parameters()} == {torch.float32}
