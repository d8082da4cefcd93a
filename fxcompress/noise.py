"""Signal and quantization noise: of a tensor in dB, and of every layer of a rounded network, channel by channel.

The noise of a layer is what its output in the rounded (qdq) graph differs by from its output in the float graph that was
rounded, on the same inputs. The output is the sum itself, before its clamp and before its own rounding:

    accumulated     everything before the layer is rounded too: what arrives here
    own             the layer reads the float network's values, rounded: what this layer adds
    shift           the part of the accumulated noise that is the same at every position of a channel: a bias can take it out
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .analysis.encoded_weights import is_encoded
from .analysis.layer_weights import channel_dimension
from .dialects import WEIGHTED
from .graph import calls, is_call
from .lockstep import Lockstep
from .meta import tensor_meta

QUANTIZE = torch.ops.fxcompress.quantize.default
_FLAT = 1e-6  # a deviation below this share of the channel's size says nothing about its unit


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise in dB: 10 log10(sum ref^2 / sum (ref - approx)^2); inf when equal.

    >>> round(sqnr_db(torch.tensor([1.0, 1.0]), torch.tensor([1.1, 0.9])), 2)
    20.0
    """
    reference, approximation = reference.double(), approximation.double()
    return ratio_db(float(reference.square().sum()), float((reference - approximation).square().sum()))


def ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise): inf without noise, -inf without signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


@dataclass(frozen=True, eq=False)
class ChannelNoise:
    """Energies (sums of squares over batch and positions) of one layer's output, (C,) float64 each.

    Attributes:
        signal, deviation: of the float output; ``deviation`` is its standard deviation, or its root mean square where it is flat.
        noise, shift, own: accumulated, its constant part, and that of this layer alone.
    """

    signal: Tensor
    deviation: Tensor
    noise: Tensor
    shift: Tensor
    own: Tensor

    def in_units_of(self, other: ChannelNoise) -> ChannelNoise:
        """The noise as it would be if every channel had the unit it has in ``other``, whose signal it is then compared with.

        Passes that divide a channel here and multiply it there (equalizing, folding) change units, which is no gain.
        """
        known = (self.deviation > 0) & (other.deviation > 0)
        factor = torch.where(known, other.deviation / self.deviation, 1.0).square()
        return ChannelNoise(other.signal, other.deviation, self.noise * factor, self.shift * factor, self.own * factor)

    @property
    def sqnr(self) -> float:
        return ratio_db(float(self.signal.sum()), float(self.noise.sum()))

    @property
    def own_sqnr(self) -> float:
        return ratio_db(float(self.signal.sum()), float(self.own.sum()))

    @property
    def shift_share(self) -> float:
        """Share 0..1 of the accumulated noise that a bias can take out."""
        noise = float(self.noise.sum())
        return float(self.shift.sum()) / noise if noise else 0.0


@dataclass
class LayerNoise:
    """One layer with an integer weight: dB of its output, accumulated and its own, and the share 0..1 of noise that is a shift."""

    node: str
    origin: str
    sqnr: float
    own_sqnr: float
    shift: float


def layer_noise(rounded: fx.GraphModule, found: dict[str, ChannelNoise]) -> list[LayerNoise]:
    """What ``channel_noise`` found in the qdq graph ``rounded``, as rows for the report."""
    origins = {node.name: tensor_meta(node).origin.module for node in rounded.graph.nodes}
    return [LayerNoise(name, origins[name], n.sqnr, n.own_sqnr, n.shift_share) for name, n in found.items()]


def channel_noise(
    exact: fx.GraphModule, rounded: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]]
) -> dict[str, ChannelNoise]:
    """The noise of every layer with an integer weight, by node name, in topological order.

    ``exact``: the float graph as it was quantized (``context(rounded).float_graph``); ``rounded``: the qdq graph.
    """
    names = {node.name for node in exact.graph.nodes}
    layers = {n: _output(n) for n in calls(rounded, *WEIGHTED) if is_encoded(n.args[1]) and n.name in names}
    outputs = {output: layer for layer, output in layers.items()}
    codes = {node for node in rounded.graph.nodes if any(is_call(user, QUANTIZE) for user in node.users)}
    signal, noisy, alone = Lockstep(exact, batches), Lockstep(rounded, batches), Lockstep(rounded, batches)
    found, originals = {}, {}
    for node in rounded.graph.nodes:
        if node in layers:
            originals[node] = signal.run_to(node.name)
        if node in outputs:
            layer = outputs[node]
            axis = channel_dimension(layer)
            found[layer.name] = _channel_noise(
                originals.pop(layer), noisy.run_to(node.name), alone.run_to(node.name), axis
            )
        if node in codes and node.name in names:  # its readers shall see the rounded float value
            alone.run_to(node.name)
            alone.replace(node.name, signal.run_to(node.name))
    return found


def _output(layer: fx.Node) -> fx.Node:
    """Where the whole sum of a layer is: a layer that also reads the residual of its input is added up behind it."""
    total = next(iter(layer.users), None)
    return total if total is not None and total.name == f"{layer.name}_sum" else layer


def _channel_noise(exact: list[Tensor], noisy: list[Tensor], alone: list[Tensor], axis: int) -> ChannelNoise:
    exact, noisy, alone = (_by_channel(values, axis) for values in (exact, noisy, alone))
    difference, signal = noisy - exact, exact.square().sum(1)
    count = exact.shape[1]
    size, deviation = (signal / count).sqrt(), exact.std(1, correction=0)
    return ChannelNoise(
        signal,
        torch.where(deviation > _FLAT * size, deviation, size),
        difference.square().sum(1),
        difference.mean(1).square() * count,
        (alone - exact).square().sum(1),
    )


def _by_channel(batches: list[Tensor], axis: int) -> Tensor:
    """(C, everything else) float64."""
    return torch.cat([b.movedim(axis, 0).flatten(1) for b in batches], 1).double()
