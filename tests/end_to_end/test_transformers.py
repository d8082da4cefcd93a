"""Encoders built from transformers configs, random weights: compiled in one call, integer-only, close to the float model."""

import pytest
import torch

import fxcompress
from fxcompress.report import sqnr_db

transformers = pytest.importorskip("transformers", reason="transformers is not installed (make bench-deps)")

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
VISION = SMALL | {"image_size": 16, "patch_size": 4}
TEXT = SMALL | {"vocab_size": 60, "max_position_embeddings": 32}
WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}

#: name -> (family, options of its config)
IMAGE_MODELS = {
    "vit": ("ViT", VISION),
    "deit": ("DeiT", VISION),
    "swin": ("Swin", WINDOWS),
    "convnext": ("ConvNext", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}),
}
TEXT_MODELS = {
    "bert": ("Bert", TEXT),
    "distilbert": ("DistilBert", {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 60,
                                  "max_position_embeddings": 32}),
    "roberta": ("Roberta", TEXT),
}  # fmt: skip


def build(family, options, task):
    """The classifier of that family with weights that make the logits depend on the input."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(num_labels=10, **options)
    model = getattr(transformers, f"{family}For{task}Classification")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "token" in name or "position" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    return model


def images(model):
    size = getattr(model.config, "image_size", 32)
    return {"pixel_values": torch.randn(8, 3, size, size)}


def sentences(padded):
    """Token ids, 0 and 1 left out (padding); with an attention mask when ``padded``."""
    call = {"input_ids": torch.randint(3, 60, (8, 12))}
    if padded:
        lengths = torch.tensor([12, 5, 9, 12, 2, 7, 11, 12])
        call["attention_mask"] = (torch.arange(12) < lengths[:, None]).long()
    return call


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
