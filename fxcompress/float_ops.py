"""Operators of the float dialect that ATen has no single name for.

masked_softmax(x, mask)     softmax over the last dimension of the elements where mask is True; 0 elsewhere
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, library


def masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """mask: bool, broadcastable to x. A row without any True is 0."""
    probabilities = torch.softmax(x.masked_fill(~mask, -math.inf), -1)
    return torch.where(mask, probabilities, torch.zeros_like(x))


_LIBRARY = library.Library("fxcompress", "FRAGMENT")
_LIBRARY.define("masked_softmax(Tensor x, Tensor mask) -> Tensor")
_LIBRARY.impl("masked_softmax", masked_softmax, "CompositeExplicitAutograd")
library.register_fake("fxcompress::masked_softmax", lambda x, mask: torch.empty_like(x), lib=_LIBRARY)

MASKED_SOFTMAX = torch.ops.fxcompress.masked_softmax.default
