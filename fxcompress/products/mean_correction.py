"""Biases that make up for what layers lack on average once gates are closed: b_o += E[y_o whole] - E[y_o]. No gradient, no labels.

The means of the whole network come first; then each layer is corrected behind corrected layers, batch by batch as the examples pass.

Source: Nagel et al. 2019, section 4.2 (bias correction, empirical), of products left out instead of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..pruning.training import called
from ..torch_modes import in_float32
from .gates import GatedLayer


@torch.no_grad()
@in_float32()
def layer_means(network: nn.Module, layers: Sequence[GatedLayer], examples: Sequence) -> list[Tensor]:
    """(O,) per layer, over calls of the network."""
    sums = [torch.zeros_like(layer.bias) for layer in layers]

    def add(i: int, y: Tensor) -> None:
        sums[i] += layers[i].means(y) / len(examples)

    with _hooked(layers, add):
        for call in examples:
            called(network, call)
    return sums


def keep_means(network: nn.Module, layers: Sequence[GatedLayer], examples: Sequence) -> None:
    """In training mode ``layers`` have the means from now on that they have on the examples."""
    for layer, means in zip(layers, layer_means(network, layers, examples), strict=True):
        layer.level = nn.Parameter(means)


@torch.no_grad()
@in_float32()
def correct_means(
    network: nn.Module, layers: Sequence[GatedLayer], examples: Sequence, wanted: Sequence[Tensor]
) -> None:
    """Change the biases of ``layers`` in place, so that their means are the ``wanted`` ones."""
    shifts = [torch.zeros_like(layer.bias) for layer in layers]

    def correct(i: int, y: Tensor) -> Tensor:
        shift = wanted[i] - layers[i].means(y)
        shifts[i] += shift / len(examples)
        return y + layers[i].along_channels(shift, y)

    with _hooked(layers, correct):
        for call in examples:
            called(network, call)
    for layer, shift in zip(layers, shifts, strict=True):
        layer.bias += shift


@contextmanager
def _hooked(layers: Sequence[GatedLayer], function: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """``function(number, result)`` is called after every layer; what it returns is the result."""
    handles = [layer.register_forward_hook(lambda _, inputs, y, i=i: function(i, y)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
