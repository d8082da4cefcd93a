"""Encoders built from transformers configs, with random weights, and inputs for them."""

import torch
from encoders import build as build

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
