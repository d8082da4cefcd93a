"""Which dimension of a weight holds which channels, and how to scale them.

conv, linear        (O, I/G, *K)     group g of the outputs reads group g of the inputs
transposed conv     (I, O/G, *K)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from ..dialects import LINEAR, TRANSPOSED_CONVOLUTIONS
from ..graph import argument, is_call, rank, twins
from ..meta import along_axis

#: get_attr nodes by target, where several name one constant (``graph.twins``).
Twins = Mapping[str, Sequence[fx.Node]]


def groups_of(node: fx.Node) -> int:
    """Of a (transposed) convolution; 1 of a linear layer."""
    return 1 if node.target is LINEAR else argument(node, "groups")


def channel_dimension(node: fx.Node) -> int:
    """The dimension of a layer's input and output that holds the channels: 1, of a linear layer the last."""
    return rank(node) - 1 if node.target is LINEAR else 1


def layer_channels(node: fx.Node, weight: Tensor) -> tuple[int, int]:
    """(input channels, output channels) of a linear or (transposed) convolution with this weight."""
    groups = groups_of(node)
    if is_call(node, *TRANSPOSED_CONVOLUTIONS):
        return weight.shape[0], weight.shape[1] * groups
    return weight.shape[1] * groups, weight.shape[0]


def sharing_layers(node: fx.Node, shared: Twins | None = None) -> list[fx.Node]:
    """Other nodes that read the weight of this layer. ``shared``: ``twins(graph)``, for who asks about many layers."""
    weight, shared = node.args[1], twins(node.graph) if shared is None else shared
    nodes = shared.get(weight.target, [weight])
    return [user for n in nodes for user in n.users if user is not node]


def largest_weights(node: fx.Node, weight: Tensor) -> Tensor:
    """(G, O/G, I/G): the largest magnitude among the taps that lead from an input channel to an output channel."""
    groups = groups_of(node)
    blocks = weight.abs().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).amax(-1)
    return blocks.transpose(1, 2) if is_call(node, *TRANSPOSED_CONVOLUTIONS) else blocks


def scale_outputs(node: fx.Node, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply output channel o by ``scale[o]``."""
    if is_call(node, *TRANSPOSED_CONVOLUTIONS):
        return _scale_grouped(weight, scale, groups_of(node))
    return weight * along_axis(scale, 0, weight.ndim)


def scale_inputs(node: fx.Node, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply everything that reads input channel i by ``scale[i]``."""
    if is_call(node, *TRANSPOSED_CONVOLUTIONS):
        return weight * along_axis(scale, 0, weight.ndim)
    return _scale_grouped(weight, scale, groups_of(node))


def _scale_grouped(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """Scale dimension 1 of a weight, which holds the channels of one of ``groups`` equal blocks of dimension 0."""
    blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (blocks * scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)
