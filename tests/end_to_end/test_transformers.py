"""Encoders built from transformers configs, random weights: compiled in one call, integer-only, close to the float model."""

import pytest
import torch

import fxcompress
from fxcompress.report import sqnr_db
from tests.support.encoders import IMAGE_MODELS, TEXT_MODELS, build, images, sentences

pytest.importorskip("transformers", reason="transformers is not installed (make bench-deps)")


def check(model, call, decibels):
    """Calibrated on the call: integer-only, and the logits' variation over the samples is kept. Returns the network."""
    net = fxcompress.compile(model, example_inputs=call, calibration_data=[call])
    assert net.verify_integer_only().integer_only
    with torch.no_grad():
        expected = model(**call).logits
    found = net(**call).logits
    mean = expected.mean(0)  # the biases alone are no achievement
    assert sqnr_db(expected - mean, found - mean) >= decibels
    return net


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_image_encoders(name):
    model = build(*IMAGE_MODELS[name], "Image")
    call = images(model)
    net = check(model, call, decibels=15)
    one = {k: v[:1] for k, v in call.items()}
    assert torch.equal(net(**one).logits, net(**call).logits[:1])
    assert net.report().certificate["operators"].get("layer_norm", 0) >= 2


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_encoders_with_padding(name, tmp_path):
    model = build(*TEXT_MODELS[name], "Sequence")
    call = sentences(padded=True)
    net = check(model, call, decibels=15)
    other = dict(call, input_ids=torch.where(call["attention_mask"].bool(), call["input_ids"], 7))
    assert torch.equal(net(**other).logits, net(**call).logits)  # padding is not seen
    net.save(tmp_path / "net.fxc")
    assert torch.equal(fxcompress.load(tmp_path / "net.fxc")(**call)["logits"], net(**call).logits)


def test_a_text_encoder_without_data():
    model = build(*TEXT_MODELS["bert"], "Sequence")
    call = sentences(padded=False)
    net = fxcompress.compile(model, example_inputs=call)
    with torch.no_grad():
        expected = model(**call).logits
    assert net.verify_integer_only().integer_only
    assert sqnr_db(expected, net(**call).logits) >= 10
