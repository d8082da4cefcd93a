"""Which codes may have a scale and zero point per channel, and which channels of a tied set are one: the question behind SPIQ.

A channel keeps its qparams as long as its codes only move, so every channel of every *source* of a tied set (a tensor
that is computed, ``analysis/quantization.py``) is a *label*, and the labels move with the codes: through max pools,
reshapes, concatenations of channels. Everybody who reads such codes must be able to take a scale per channel:

    conv, linear, transposed conv      the columns of the weight absorb the scales; padding holds a code per channel
    add, sub, mul, layer norms' sums   multipliers are per channel anyway
    pools, means over positions        likewise, if every window has one divisor
    graph inputs and outputs           one scale: whoever feeds or reads codes should not need a vector
    elementwise functions              one scale: a table per channel would be a step of its own
    attention products, softmax, ...   one scale: they sum over what would have different units

One reader that cannot makes the whole tied set per tensor.   Source: docs/passes.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from .. import dialects as d
from ..graph import argument, is_call, rank, shape
from ..meta import place, tensor_meta
from ..rewrite import Reject
from .affine_rules import Blocked, mean_dimensions, padded_dimensions, push_movement
from .quantization import QuantizationPoints, is_function, is_scaling, keeps_float

MEAN = torch.ops.aten.mean.dim
PAD = torch.ops.aten.constant_pad_nd.default
CHANNEL_PAD = torch.ops.fxcompress.pad.default
ZERO = 0  # the label of channels that hold nothing but zeros (padding)
#: Operators whose sum is rounded with multipliers per channel.
_WRITERS = d.WEIGHTED | d.AVERAGES | d.RESIZES | d.NORMALIZATIONS | {d.ADD, d.SUB, d.MUL}
_POOLS = d.MAX_POOLS | d.AVERAGE_POOLS | d.ADAPTIVE_AVERAGE_POOLS | d.RESIZES


@dataclass(eq=False)
class ChannelSet:
    """A tied set of codes whose channels may differ.

    Attributes:
        sources: tensors that are computed; channel c of ``sources[i]`` has the label ``first[i] + c``.
        axes: the dimension of every tensor of the set along which its codes differ.
        labels: (C,) per tensor, along that dimension.
        count: labels are 0 (``ZERO``) .. count - 1.
    """

    sources: list[fx.Node] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    axes: dict[fx.Node, int] = field(default_factory=dict)
    labels: dict[fx.Node, Tensor] = field(default_factory=dict)
    count: int = 1


def channel_sets(points: QuantizationPoints) -> Iterator[ChannelSet | Reject]:
    """The tied sets of a float graph, in order: one that can differ per channel, or the reason why it cannot.

    >>> [s for s in channel_sets(QuantizationPoints(gm)) if isinstance(s, ChannelSet)]                   # doctest: +SKIP
    """
    for tied in points.tied_sets():
        try:
            yield _channel_set(points, tied)
        except Blocked as blocked:
            reason, where = blocked.reject.reason, blocked.reject.node
            yield Reject(reason if where is tied[0] else f"{place(where)}: {reason}", tied[0])


def _channel_set(points: QuantizationPoints, tied: list[fx.Node]) -> ChannelSet:
    found, labels = ChannelSet(), {}
    sources = set(points.sources(tied))
    for node in tied:
        labels[node] = _source(points, node, found) if node in sources else _moved(node, labels)
        varying = [dim for dim, n in enumerate(labels[node].shape) if n > 1]
        if len(varying) > 1:
            raise Blocked("its channels are spread over several dimensions", node)
        found.axes[node] = varying[0] if varying else _axis(node)
    for node in tied:
        axis = found.axes[node]
        size = shape(node)[axis]
        if not isinstance(size, int):
            raise Blocked("its channels lie along the batch", node)
        found.labels[node] = labels[node].flatten().expand(size)
        for reader in node.users:
            if not points.reads_raw(node, reader):
                _check_reader(node, reader, axis)
    return found


# ------------------------------------------------------------------------------------------------- how codes get labels


def _source(points: QuantizationPoints, node: fx.Node, found: ChannelSet) -> Tensor:
    """New labels along the channels of a tensor that is computed."""
    _check_writer(points, node)
    axis = _axis(node)
    channels = shape(node)[axis]
    found.sources.append(node)
    found.first.append(found.count)
    found.count += channels
    return torch.arange(found.first[-1], found.count).reshape([-1 if dim == axis else 1 for dim in range(rank(node))])


def _check_writer(points: QuantizationPoints, node: fx.Node) -> None:
    """Raise ``Blocked`` unless the rounding that makes these codes has a multiplier per channel."""
    if node.op == "placeholder":
        raise Blocked("it is a graph input", node)
    if keeps_float(node):
        raise Blocked("keep_float names its module", node)
    while is_call(node, d.CLAMP, d.CHANNEL_CLAMP) or is_scaling(node):
        if not points.is_accumulator(node.args[0]) and not is_call(node, d.CHANNEL_CLAMP):
            break
        node = node.args[0]
    if is_function(node):
        raise Blocked("it is a table of its input, which would differ per channel", node)
    if node.target not in _WRITERS:
        raise Blocked(f"{node.target} is rounded with one scale", node)
    if is_call(node, *d.AVERAGE_POOLS, *d.ADAPTIVE_AVERAGE_POOLS) and not _one_divisor(node):
        raise Blocked("its windows have different divisors", node)


def _moved(node: fx.Node, labels: dict[fx.Node, Tensor]) -> Tensor:
    """The labels of codes that are moved or selected."""
    if is_call(node, d.CAT):
        return _concatenated(node, [labels[a] for a in node.args[0]])
    source = labels[node.args[0]]
    if is_call(node, PAD):
        return _padded(node, source)
    if is_call(node, *d.MOVEMENT):
        return push_movement(node, source.double()).long()
    return source  # max pools


def _concatenated(node: fx.Node, parts: list[Tensor]) -> Tensor:
    dim = argument(node, "dim") % rank(node)
    if any(n > 1 for part in parts for at, n in enumerate(part.shape) if at != dim):
        raise Blocked("it concatenates along another dimension than the channels", node)
    sizes = [shape(a)[dim] for a in node.args[0]]
    if not all(isinstance(n, int) for n in sizes):
        raise Blocked("it concatenates along the batch", node)
    wanted = [[n if axis == dim else 1 for axis in range(rank(node))] for n in sizes]
    return torch.cat([part.expand(size) for part, size in zip(parts, wanted, strict=True)], dim)


def _padded(node: fx.Node, labels: Tensor) -> Tensor:
    for dim, before, after in padded_dimensions(node):
        if labels.shape[dim] > 1:
            if argument(node, "value"):
                raise Blocked(f"it pads channels with {argument(node, 'value'):g}", node)
            sides = [labels.new_full([*labels.shape[:dim], n, *labels.shape[dim + 1 :]], ZERO) for n in (before, after)]
            labels = torch.cat([sides[0], labels, sides[1]], dim)
        elif dim != 1 and rank(node) > 1 and labels.shape[1] == 1 and labels.numel() > 1:
            raise Blocked("it pads a tensor whose channels are not dimension 1", node)
    return labels


# --------------------------------------------------------------------------------------------------- who can read labels


def _check_reader(node: fx.Node, reader: fx.Node, axis: int) -> None:
    """Raise ``Blocked`` unless ``reader`` can take codes that differ along ``axis``."""
    if reader.op == "output":
        raise Blocked("it is a graph output", node)
    if keeps_float(reader):
        raise Blocked("keep_float names its module", reader)
    if is_function(reader) and not is_scaling(reader):
        raise Blocked("it is an elementwise function: a table per channel would be a step of its own", reader)
    if is_call(reader, *d.WEIGHTED):
        _check_layer(node, reader, axis)
    elif is_call(reader, d.ADD, d.SUB, d.MUL):
        if len(reader.args) > 1 and is_scaling(reader):
            raise Blocked("it is an elementwise function: a table per channel would be a step of its own", reader)
        if rank(node) != rank(reader):
            raise Blocked("it broadcasts its operand over further dimensions", reader)
    elif is_call(reader, *_POOLS):
        if axis != 1:
            raise Blocked(f"it pools dimension {axis}, along which the channels lie", reader)
        if is_call(reader, *d.AVERAGE_POOLS, *d.ADAPTIVE_AVERAGE_POOLS) and not _one_divisor(reader):
            raise Blocked("its windows have different divisors", reader)
    elif is_call(reader, MEAN):
        if axis in mean_dimensions(reader)[0]:
            raise Blocked("it averages over the channels", reader)
    elif not is_call(reader, *d.MOVEMENT, d.CAT, d.CHANNEL_CLAMP, CHANNEL_PAD):
        raise Blocked(f"{reader.target} takes one scale", reader)
    elif is_call(reader, d.CAT) and tensor_meta(reader).channel_axis is None:
        raise Blocked("its channels are not known", reader)
    elif is_call(reader, CHANNEL_PAD) and axis != 1:
        raise Blocked("it pads a tensor whose channels are not dimension 1", reader)


def _check_layer(node: fx.Node, reader: fx.Node, axis: int) -> None:
    if node is not reader.args[0] or node in reader.args[1:3]:
        raise Blocked("its weight is computed at run time", reader)
    if axis != (rank(node) - 1 if is_call(reader, d.LINEAR) else 1):
        raise Blocked("it sums over another dimension than the channels", reader)


def _one_divisor(node: fx.Node) -> bool:
    """Every window of an average pool divides by the same number."""
    if is_call(node, *d.ADAPTIVE_AVERAGE_POOLS):
        outputs = shape(node)[2:]
        return all(n % out == 0 for n, out in zip(shape(node.args[0])[2:], outputs, strict=True))
    if argument(node, "ceil_mode"):
        return False
    return argument(node, "count_include_pad") or not any(argument(node, "padding"))


def _axis(node: fx.Node) -> int:
    axis = tensor_meta(node).channel_axis
    if axis is None:
        raise Blocked("its channels are not known", node)
    return axis
