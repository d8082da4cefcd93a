"""How each operator ties, makes and moves the labels of channels that are removed together (``channel_groups``).

A rule is ``rule(tracer, node) -> Channels``. It may make labels, tie them, fix them with a reason, and claim the axes of
constants that are cut with them. What no rule covers is fixed: nothing is guessed.

    conv, linear, embedding      new labels for the rows; the columns are those of the input
    depthwise, wide groups       a group's inputs and outputs stand and fall together
    few groups                   the groups stay alike: the same position of every group goes together
    add, sub, mul                operands of one shape are tied; constants along the channels are cut too
    matmul                       heads: batch dimensions of both operands are tied, a head goes as a whole
    batch norm, group norm       the labels of the input; groups of a group norm go as a whole
    reshape, permute, cat, ...   follow the elements

*Masking* a label sets to zero what writes it: rows of weights, biases, gamma and beta, constants that are added. ``rest`` is
what the tensor then holds at that place: 0 through ReLU, 0.5 through a sigmoid, NaN if no constant. Where a layer reads a
rest other than zero its bias takes it up, if that is exact; where it cannot, the label is fixed.
Source: ties as in Torch-Pruning (Fang et al. 2023, DepGraph); rests are derived here.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .. import dialects as d
from ..float_ops import MASKED_SOFTMAX
from ..graph import argument, constant, is_call, is_constant, one_sample_shape, rank
from ..rewrite import Reject
from .affine_rules import (
    CHANNELWISE,
    MOVEMENT,
    PAD,
    Blocked,
    averages_to_one,
    mean_dimensions,
    padded_dimensions,
    push_movement,
)
from .channel_layer_rules import batch_norm, embedding, group_norm, layer, row_norm
from .channel_tracer import NAN, Channels, Claim, Rule, Tracer, uniform, zero_rest

aten = torch.ops.aten


# -------------------------------------------------------------------------------------------------------- elementwise


def elementwise(tracer: Tracer, node: fx.Node) -> Channels:
    """f(x), further arguments numbers: the rest is f of the rest."""
    source = tracer.of(node.args[0])
    value = node.target(source.rest, *node.args[1:], **node.kwargs)
    return Channels(source.labels, torch.where(source.rest.isnan() | ~value.isfinite(), NAN, value))


def binary(tracer: Tracer, node: fx.Node) -> Channels:
    """add, sub, mul of activations, constants and numbers.

    An operand that is broadcast along the channels is not cut, and no constant; one factor that is 0 is enough.
    """
    ndim, sizes, tensors = rank(node), one_sample_shape(node), [a for a in node.args[:2] if isinstance(a, fx.Node)]
    run_time = {a: _lifted(tracer.of(a), ndim) for a in tensors if not is_constant(a)}
    varying = {dim for c in run_time.values() for dim in c.varying}
    whole = {a for a in run_time if all(_lifted_shape(a, ndim)[dim] == sizes[dim] for dim in varying)}
    for a in run_time.keys() - whole:
        tracer.fix(run_time[a].labels, Reject("it is broadcast over channels", node))
    tie = Reject("its channels are tied to others that stay", node)
    labels = (
        tracer.labels.tied([run_time[a].labels for a in run_time if a in whole], tie)
        if whole
        else Channels.fixed(node).labels
    )
    rests = [a if not isinstance(a, fx.Node) else _constant_rest(tracer, node, a, varying) if is_constant(a)
             else run_time[a].rest if a in whole else zero_rest(node) + NAN for a in node.args[:2]]  # fmt: skip
    return Channels(labels, _combined(node, *rests))


def _constant_rest(tracer: Tracer, node: fx.Node, operand: fx.Node, varying: set[int]) -> Tensor:
    """The value of a constant operand where the channel is masked: what is added along the channels is masked, too."""
    ndim, sizes = rank(node), one_sample_shape(node)
    value = constant(tracer.gm, operand).double()
    value = value.reshape([1] * (ndim - value.ndim) + list(value.shape))
    writes = not is_call(node, d.MUL) and all(value.shape[dim] == sizes[dim] for dim in varying)
    tracer.claims.append(Claim(node, operand.target, None, None, writes))
    return zero_rest(node) if writes and varying else value


def _combined(node: fx.Node, x, y) -> Tensor:
    value = node.target(*(torch.as_tensor(v, dtype=torch.float64) for v in (x, y)))
    if is_call(node, d.MUL):
        zero = torch.as_tensor(x == 0) | torch.as_tensor(y == 0)
        value = torch.where(zero, 0.0, value)
    return value.reshape([1] * (rank(node) - value.ndim) + list(value.shape))


def _lifted(channels: Channels, ndim: int) -> Channels:
    """With leading dimensions of 1."""
    more = (None,) * (ndim - channels.labels.ndim)
    return Channels(channels.labels[more], channels.rest[more])


def _lifted_shape(node: fx.Node, ndim: int) -> list[int]:
    sizes = one_sample_shape(node)
    return [1] * (ndim - len(sizes)) + sizes


# ------------------------------------------------------------------------------------- over positions and over channels


def pool(tracer: Tracer, node: fx.Node) -> Channels:
    """Pooling and resizing leave the channels apart, and constants as they are unless zero padding is averaged."""
    source = tracer.along(tracer.of(node.args[0]), 1)
    if is_call(node, *d.AVERAGE_POOLS) and not averages_to_one(node):
        return Channels(source.labels, torch.where(source.rest == 0, 0.0, NAN))
    return source


def mean(tracer: Tracer, node: fx.Node) -> Channels:
    source, (dims, keepdim) = tracer.of(node.args[0]), mean_dimensions(node)
    if any(dim in source.varying for dim in dims):
        raise Blocked("it averages over the channels, whose number is the divisor", node)
    rest = source.rest
    for dim in dims:
        rest = torch.where((rest == rest.narrow(dim, 0, 1)).all(dim, keepdim=True), rest.narrow(dim, 0, 1), NAN)
    return Channels(*(t if keepdim else t.squeeze(dims) for t in (source.labels, rest)))


def softmax(tracer: Tracer, node: fx.Node) -> Channels:
    source = tracer.of(node.args[0])
    dim = argument(node, "dim") % rank(node) if is_call(node, aten.softmax.int) else rank(node) - 1
    if dim in source.varying:
        raise Blocked("it divides by a sum over the channels", node)
    return Channels(source.labels, zero_rest(node) + NAN)


def matmul(tracer: Tracer, node: fx.Node) -> Channels:
    """(..., M, K) @ (..., K, N). Batch dimensions that are cut are heads; else K is cut in both, or M, or N."""
    x, y = (tracer.of(a) for a in node.args[:2])
    ndim, batch = rank(node), rank(node) - 2
    if {len(x.labels.shape), len(y.labels.shape)} != {ndim} or any(
        is_constant(a) or one_sample_shape(a)[:batch] != one_sample_shape(node)[:batch] for a in node.args[:2]
    ):
        raise Blocked("it broadcasts an operand", node)
    tie = Reject("its channels are tied to others that stay", node)
    if any(dim < batch for c in (x, y) for dim in c.varying):
        heads = []
        for c in (x, y):
            rows = tracer.labels.tied([part.unsqueeze(-1) for part in c.labels.unbind(-1)], tie)
            heads.append(tracer.labels.tied([part.unsqueeze(-2) for part in rows.unbind(-2)], tie))
        zero = any(bool((c.rest == 0).all()) for c in (x, y))
        return Channels(tracer.labels.tied(heads, tie), zero_rest(node) if zero else zero_rest(node) + NAN)
    (rows, depth_x), (depth_y, columns) = (
        [dim - ndim in c.varying or dim in c.varying for dim in (batch, batch + 1)] for c in (x, y)
    )
    if (rows or columns) and (depth_x or depth_y or (rows and columns)):
        raise Blocked("it mixes channels with channels", node)
    if depth_x or depth_y:
        _contract(tracer, node, x, y, tie)
        return Channels.fixed(node)
    read = x if rows else y
    return Channels(read.labels if rows or columns else Channels.fixed(node).labels,
                    zero_rest(node) if bool((read.rest == 0).all()) else zero_rest(node) + NAN)  # fmt: skip


def _contract(tracer: Tracer, node: fx.Node, x: Channels, y: Channels, tie: Reject) -> None:
    """The products of both operands are summed over the channels: they go together, and the product must vanish."""
    depth = one_sample_shape(node.args[0])[-1]
    pairs = [x.labels.flatten().expand(depth), y.labels.flatten().expand(depth)]
    labels = tracer.labels.tied(pairs, tie)
    vanishes = (uniform(x.rest, -1).flatten() == 0) | (uniform(y.rest, -2).flatten() == 0)
    tracer.fix(labels[~vanishes.expand(depth)], Reject("masked channels would still count in the product", node))


# ----------------------------------------------------------------------------------------------------------- movement


def movement(tracer: Tracer, node: fx.Node) -> Channels:
    """reshape, permute, slice, select, index_select, expand: the elements keep their labels."""
    source = tracer.of(node.args[0])
    if (
        is_call(node, aten.slice.Tensor)
        and argument(node, "dim") % rank(node) in source.varying
        and argument(node, "step") != 1
    ):
        raise Blocked("it takes every n-th channel", node)
    labels = push_movement(node, source.labels.double(), one_sample_shape).long()
    return Channels(labels, push_movement(node, source.rest, one_sample_shape))


def pad(tracer: Tracer, node: fx.Node) -> Channels:
    """Channels of a constant are new channels; a border of a constant must be the rest."""
    source, value = tracer.of(node.args[0]), float(argument(node, "value"))
    labels, rest = source.labels, source.rest
    for dim, before, after in padded_dimensions(node):
        if labels.shape[dim] == 1:
            rest = torch.where(rest == value, rest, NAN)
            continue
        sizes = [[*labels.shape[:dim], n, *labels.shape[dim + 1 :]] for n in (before, after)]
        labels = torch.cat([tracer.labels.new(sizes[0]), labels, tracer.labels.new(sizes[1])], dim)
        rest = rest.expand(*rest.shape[:dim], labels.shape[dim] - before - after, *rest.shape[dim + 1 :])
        around = [
            torch.full([*rest.shape[:dim], n, *rest.shape[dim + 1 :]], value, dtype=torch.float64)
            for n in (before, after)
        ]
        rest = torch.cat([around[0], rest, around[1]], dim)
    return Channels(labels, rest)


def cat(tracer: Tracer, node: fx.Node) -> Channels:
    """Along the channels: one after the other. Along another dimension: tied."""
    dim, operands = argument(node, "dim") % rank(node), list(node.args[0])
    parts = [tracer.of(a) for a in operands]
    if any(part != dim for c in parts for part in c.varying):
        tie = Reject("it is concatenated with channels that stay", node)
        for a in operands:
            if is_constant(a):
                tracer.claims.append(Claim(node, a.target, None, None, True))
        narrow = [tracer.labels.tied([part.unsqueeze(dim) for part in c.labels.unbind(dim)], tie)
                  for a, c in zip(operands, parts) if not is_constant(a)]  # fmt: skip
        rests = [c.rest for a, c in zip(operands, parts) if not is_constant(a)]
        zero = all(bool((rest == 0).all()) for rest in rests)
        return Channels(tracer.labels.tied(narrow, tie), zero_rest(node) if zero else zero_rest(node) + NAN)
    lengths = [one_sample_shape(a)[dim] for a in operands]
    return Channels(*(torch.cat([t.expand(*t.shape[:dim], n, *t.shape[dim + 1 :]) for t, n in zip(tensors, lengths)], dim)
                      for tensors in ([c.labels for c in parts], [uniform(c.rest, dim) for c in parts])))  # fmt: skip


#: overload -> rule
RULES: dict[object, Rule] = {
    **dict.fromkeys(d.WEIGHTED, layer),
    **dict.fromkeys(d.UNARY | {d.CLAMP}, elementwise),
    **dict.fromkeys([d.ADD, d.SUB, d.MUL], binary),
    **dict.fromkeys(CHANNELWISE, pool),
    **dict.fromkeys(MOVEMENT, movement),
    **dict.fromkeys([d.LAYER_NORM, d.RMS_NORM], row_norm),
    **dict.fromkeys([aten.softmax.int, MASKED_SOFTMAX], softmax),
    d.EMBEDDING: embedding,
    d.BATCH_NORM: batch_norm,
    d.GROUP_NORM: group_norm,
    d.MATMUL: matmul,
    aten.mean.dim: mean,
    PAD: pad,
    d.CAT: cat,
}
