"""Transformer encoders lose attention heads and widths of the MLP; what is left computes the original with those zeroed."""

import pytest
import torch

import fxcompress
from fxcompress.promises import relative_change
from tests.support.encoders import IMAGE_MODELS, TEXT_MODELS, build, images, sentences

pytest.importorskip("transformers", reason="transformers is not installed (make bench-deps)")

ENCODERS = {name: (*entry, "Image") for name, entry in IMAGE_MODELS.items()}
ENCODERS |= {name: (*entry, "Sequence") for name, entry in TEXT_MODELS.items()}


def encoder(name):
    """(model, one call's keyword arguments)"""
    model = build(*ENCODERS[name])
    return model, images(model) if name in IMAGE_MODELS else sentences(padded=True)


def in_float64(call):
    return {key: value.double() if value.is_floating_point() else value for key, value in call.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_without_a_third_of_its_macs_is_the_original_with_units_zeroed(name):
    model, call = encoder(name)
    small = fxcompress.prune(model, call, pruning_ratio=0.3, pruning_correction=None)
    report = small.meta["pruning"]
    assert report.macs[1] <= 0.705 * report.macs[0]
    zeroed, state = model.double(), dict(model.state_dict())
    for cut in report.slices:
        if cut["writes"]:
            state[cut["target"]].index_fill_(cut["axis"], torch.tensor(cut["indices"]), 0)
    call = in_float64(call)
    assert relative_change(zeroed(**call).logits, small.double()(**call).logits) < 1e-6


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_heads_go_as_a_whole_and_the_stream_keeps_its_width(name):
    model, call = encoder(name)
    head = model.config.hidden_size // model.config.num_attention_heads
    small = fxcompress.prune(model, call, pruning_ratio=0.4, pruning_budget="uniform", pruning_correction=None)
    cuts = small.meta["pruning"].slices
    of_heads = [cut["indices"] for cut in cuts if ".attention." in cut["target"]]
    elsewhere = [cut["indices"] for cut in cuts if ".attention." not in cut["target"]]
    assert of_heads and elsewhere
    for indices in of_heads:
        starts = indices[::head]
        assert indices == [start + i for start in starts for i in range(head)] and all(s % head == 0 for s in starts)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    left = {tuple(node.args[1]) for node in small.graph.nodes if "layer_norm" in str(node.target)}
    assert layers and left == {(model.config.hidden_size,)}
