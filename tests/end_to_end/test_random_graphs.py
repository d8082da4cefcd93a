"""Random small networks, and every structure of ``support/graphs.py``: integer-only, and close to the float model."""

import copy

import pytest
import torch
from hypothesis import given, note

import fxcompress
from fxcompress.report import sqnr_db
from tests.support.graphs import MODELS, build
from tests.support.strategies import Network, networks

# 8 bits over the full range of a tensor are worth about 35-45 dB each; noise of at most a dozen layers adds up.
# PLACEHOLDER
LOWEST_SQNR = 12.0


def tensors(outputs) -> list[torch.Tensor]:
    """The tensors of a model's output: a tensor, a tuple or a dict."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return list(outputs.values() if isinstance(outputs, dict) else outputs)


def compile_calibrated(model, inputs):
    """Min-max ranges of the very inputs compared on: nothing saturates, so only rounding is left."""
    return fxcompress.compile(model, example_inputs=inputs, calibration_data=[inputs], range_method="minmax")


@given(networks())
def test_random_network(network: Network):
    model, x = network.build()
    before = copy.deepcopy(model.state_dict())
    compiled = compile_calibrated(model, (x,))
    compiled.verify_integer_only()
    with torch.no_grad():
        expected, found = model(x), compiled(x)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    quality = sqnr_db(expected, found)
    note(f"{quality:.1f} dB")
    assert quality >= LOWEST_SQNR
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_structure(name):
    model, inputs = build(name)
    compiled = compile_calibrated(model, inputs)
    compiled.verify_integer_only()
    with torch.no_grad():
        pairs = list(zip(tensors(model(*inputs)), tensors(compiled(*inputs)), strict=True))
    for expected, found in pairs:
        assert sqnr_db(expected, found) >= 25
