"""How layers and normalizations make, tie and move the labels of channels (``channel_rules``)."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .. import dialects as d
from ..graph import argument, constant, is_call, is_constant, one_sample_shape, rank
from .affine_rules import Blocked
from .channel_tracer import NAN, Channels, Tracer, zero_rest
from .labels import spread
from .layer_weights import channel_dimension, groups_of, layer_channels


def layer(tracer: Tracer, node: fx.Node) -> Channels:
    """conv, transposed conv, linear: (x, weight, bias)."""
    if not is_constant(node.args[1]):
        raise Blocked("its weight is computed at run time", node)
    axis = channel_dimension(node)
    source = tracer.along(tracer.of(node.args[0]), axis)
    weight = constant(tracer.gm, node.args[1])
    count_in, count_out = layer_channels(node, weight)
    inputs = source.labels.flatten().expand(count_in)
    outputs = _rows(tracer, node, inputs, count_in, count_out)
    tracer.claim(node, argument(node, "bias"), 0, outputs, writes=True)
    tracer.inputs[node] = Channels(inputs, source.rest.flatten().expand(count_in))
    return Channels(spread(outputs, axis, rank(node)), zero_rest(node))


def _rows(tracer: Tracer, node: fx.Node, inputs: Tensor, count_in: int, count_out: int) -> Tensor:
    """Labels (O,) of a layer's outputs, with the claims on its weight."""
    groups = groups_of(node)
    transposed = is_call(node, *d.TRANSPOSED_CONVOLUTIONS)
    per_group = count_in // groups, count_out // groups
    blocks = inputs.reshape(groups, -1)
    if goes_by_groups(node, constant(tracer.gm, node.args[1])):
        whole = tracer.labels.tied(list(blocks.unbind(1)))
        outputs = whole.repeat_interleave(per_group[1])
        rows = whole.repeat_interleave(per_group[0]) if transposed else outputs
        tracer.claim(node, node.args[1], 0, rows, writes=True)
        return outputs
    if groups > 1:
        blocks = tracer.labels.tied(list(blocks.unbind(0))).unsqueeze(0)
    new = tracer.labels.new([per_group[1]])
    outputs = new.repeat(groups)
    if transposed:  # (I, O/G, *K)
        tracer.claim(node, node.args[1], 0, blocks.expand(groups, -1).flatten(), writes=False)
        tracer.claim(node, node.args[1], 1, new, writes=True)
    else:  # (O, I/G, *K)
        tracer.claim(node, node.args[1], 0, outputs, writes=True)
        tracer.claim(node, node.args[1], 1, blocks.flatten(), writes=False)
    return outputs


def goes_by_groups(node: fx.Node, weight: Tensor) -> bool:
    """A grouped convolution of which whole groups are removed: there are more of them than channels in each."""
    groups = groups_of(node)
    return groups > 1 and groups > min(weight.shape[0] // groups, weight.shape[1])


def takes_up(node: fx.Node) -> bool:
    """A constant input channel adds the same to every output position: without padding, as that is of zeros."""
    return node.target is d.LINEAR or (is_call(node, *d.CONVOLUTIONS) and not any(argument(node, "padding")))


def embedding(tracer: Tracer, node: fx.Node) -> Channels:
    """embedding(weight (V, E), indices)."""
    columns = tracer.labels.new([constant(tracer.gm, node.args[0]).shape[1]])
    tracer.claim(node, node.args[0], 1, columns, writes=True)
    return Channels(spread(columns, rank(node) - 1, rank(node)), zero_rest(node))


def batch_norm(tracer: Tracer, node: fx.Node) -> Channels:
    """Masked gamma and beta leave 0; without them a constant stays a constant."""
    source, (weight, bias, mean, var) = tracer.along(tracer.of(node.args[0]), 1), node.args[1:5]
    channels = source.labels.flatten().expand(constant(tracer.gm, mean).shape[0])
    for operand, writes in ((weight, True), (bias, True), (mean, False), (var, False)):
        tracer.claim(node, operand, 0, channels, writes=writes)
    if weight is not None and bias is not None:
        return Channels(source.labels, zero_rest(node))
    mean, var = (spread(constant(tracer.gm, n).double(), 1, rank(node)) for n in (mean, var))
    rest = (source.rest - mean) / (var + argument(node, "eps")).sqrt()
    return Channels(source.labels, torch.zeros_like(rest) if weight is not None else rest)


def group_norm(tracer: Tracer, node: fx.Node) -> Channels:
    """Groups go as a whole: the others keep their statistics. (x, groups, weight, bias)"""
    groups, count = argument(node, "num_groups"), one_sample_shape(node)[1]
    source = tracer.along(tracer.of(node.args[0]), 1)
    if groups == 1:
        raise Blocked("it normalizes over all channels", node)
    blocks = source.labels.flatten().expand(count).reshape(groups, -1)
    channels = tracer.labels.tied(list(blocks.unbind(1))).repeat_interleave(count // groups)
    for operand in (argument(node, "weight"), argument(node, "bias")):
        tracer.claim(node, operand, 0, channels, writes=True)
    zero = argument(node, "weight") is not None or bool((source.rest == 0).all())
    return Channels(spread(channels, 1, rank(node)), zero_rest(node) if zero else zero_rest(node) + NAN)


def row_norm(tracer: Tracer, node: fx.Node) -> Channels:
    """layer norm and rms norm, over the last dimensions."""
    source, first = tracer.of(node.args[0]), rank(node) - len(node.args[1])
    if any(dim >= first for dim in source.varying):
        raise Blocked("it normalizes over the channels, whose number enters its statistics", node)
    shifts = is_call(node, d.LAYER_NORM) and argument(node, "bias") is not None
    zero = not shifts and bool((source.rest == 0).all())
    return Channels(source.labels, zero_rest(node) if zero else zero_rest(node) + NAN)
