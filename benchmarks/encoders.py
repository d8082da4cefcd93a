"""Transformer encoders from the configurations of `transformers`, with seeded random weights: the families of the breadth tables
that the zoo of image networks does not have.

    entry = load("bert")
    entry.model(**entry.call(2, seed=1)).logits
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

WORDS, LENGTH = 1000, 32
VISION = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 112,
}
TEXT = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "vocab_size": WORDS,
}
DISTILLED = {"dim": 256, "n_layers": 3, "n_heads": 4, "hidden_dim": 1024, "vocab_size": WORDS}
WINDOWS = {"image_size": 112, "embed_dim": 96, "depths": [2, 2, 2], "num_heads": [3, 6, 12], "window_size": 7}

#: family -> (class prefix in transformers, task, options of its config)
ENCODERS = {
    "vit": ("ViT", "Image", VISION),
    "deit": ("DeiT", "Image", VISION),
    "swin": ("Swin", "Image", WINDOWS),
    "convnext": ("ConvNext", "Image", {"image_size": 112, "hidden_sizes": [48, 96, 192, 384], "depths": [2, 2, 2, 2]}),
    "bert": ("Bert", "Sequence", TEXT),
    "roberta": ("Roberta", "Sequence", TEXT),
    "distilbert": ("DistilBert", "Sequence", DISTILLED),
}


@dataclass(frozen=True)
class Entry:
    """A classifier in eval mode; ``shape`` of an image, or (length,) of a sentence."""

    family: str
    name: str
    model: nn.Module
    shape: tuple[int, ...]

    def call(self, count: int, seed: int) -> dict[str, Tensor]:
        """Keyword arguments: noise images, or token ids with padding at the end of every second sentence."""
        random = torch.Generator().manual_seed(seed)
        if len(self.shape) == 3:
            return {"pixel_values": torch.randn(count, *self.shape, generator=random)}
        ids = torch.randint(3, WORDS, (count, *self.shape), generator=random)
        lengths = torch.tensor([LENGTH if i % 2 else LENGTH // 2 for i in range(count)])
        return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long()}


def load(family: str) -> Entry:
    """The encoder of that name in ``ENCODERS``."""
    prefix, task, options = ENCODERS[family]
    model, size = build(prefix, options, task), options.get("image_size")
    return Entry(family, type(model).__name__, model, (LENGTH,) if size is None else (3, size, size))


def build(prefix: str, options: dict, task: str) -> nn.Module:
    """The classifier of that class under one seed; matrices are scaled so that the logits depend on the input."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(num_labels=10, **options)
    model = getattr(transformers, f"{prefix}For{task}Classification")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "token" in name or "position" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    return model
