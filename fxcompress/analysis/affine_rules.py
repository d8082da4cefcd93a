"""How one operator meets a per-channel affine map: which map of its input equals a map of its result, and when none does.

``Blocked`` carries the reason and the node; the searches of ``affine_regions`` turn it into a ``Reject``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, fx

from .. import dialects as d
from ..graph import argument, constant, is_call, is_constant, rank, shape
from ..meta import place
from ..rewrite import Reject
from .affine import Affine
from .layer_weights import Twins, sharing_layers

aten = torch.ops.aten
#: Operators that leave the channels apart and average or select among the positions of each.
CHANNELWISE = d.MAX_POOLS | d.AVERAGE_POOLS | d.ADAPTIVE_AVERAGE_POOLS | d.RESIZES
PAD = aten.constant_pad_nd.default
MOVEMENT = d.MOVEMENT - {PAD}
_PICKS = (aten.slice.Tensor, aten.select.int, aten.index_select.default)
LAYERS = d.WEIGHTED | {d.BATCH_NORM}


class Blocked(Exception):
    """The map cannot pass ``node``."""

    def __init__(self, reason: str, node: fx.Node):
        super().__init__(reason)
        self.reject = Reject(reason, node)


def is_homogeneous(node: object) -> bool:
    """f(a x) = a f(x) for every a > 0: ReLU and leaky ReLU are, ReLU6 is not."""
    if is_call(node, d.CLAMP):
        return all(argument(node, bound) in (None, 0) for bound in ("min", "max"))
    return is_call(node, aten.leaky_relu.default, aten.abs.default)


def is_transparent(node: object) -> bool:
    """The operator, where it commutes with a map at all, leaves the map as it is."""
    return is_call(node, *CHANNELWISE) or is_homogeneous(node)


def require_commuting(node: fx.Node, affine: Affine) -> None:
    """Raise ``Blocked`` unless a transparent operator gives the same result on either side of the map."""
    if is_call(node, *CHANNELWISE) and affine.varies_outside(1):
        raise Blocked(f"{node.target} mixes positions that the map treats differently", node)
    if (is_call(node, *d.MAX_POOLS) or is_homogeneous(node)) and not affine.keeps_order:
        raise Blocked(f"{node.target} does not commute with a scale that is not positive", node)
    if is_homogeneous(node) and affine.shifts:
        raise Blocked(f"{node.target} does not commute with a shift", node)
    if is_call(node, *d.AVERAGE_POOLS) and affine.shifts and not averages_to_one(node):
        raise Blocked("a shift changes in average pooling that counts zero padding or has its own divisor", node)


def averages_to_one(node: fx.Node) -> bool:
    """The weights of every window sum to 1 over elements of the input."""
    divisor = None if node.target is aten.avg_pool1d.default else argument(node, "divisor_override")
    return divisor is None and not (argument(node, "count_include_pad") and any(argument(node, "padding")))


def require_layer(node: fx.Node, affine: Affine, axis: int, twins: Twins | None = None) -> None:
    """Raise ``Blocked`` unless the layer can absorb the map: it varies along ``axis`` only, the weight is its own."""
    if affine.varies_outside(axis):
        raise Blocked(f"the map varies along another axis than {axis % affine.scale.ndim}, its channels", node)
    if is_call(node, d.BATCH_NORM):
        return
    if not all(operand is None or is_constant(operand) for operand in node.args[1:3]):
        raise Blocked("its weight is computed at run time", node)
    if sharing := sharing_layers(node, twins):
        raise Blocked(f"weight shared with {place(sharing[0])}", node)


# -------------------------------------------------------------------------------------------------------- data movement


def push_movement(node: fx.Node, t: Tensor, sizes: Callable[[fx.Node], Sequence] = shape) -> Tensor:
    """What ``t``, which broadcasts against the input of a data movement, becomes against its result.

    ``sizes``: of a node's tensor; those of one sample (``one_sample_shape``) follow what is alike for all samples through
    a reshape of the batch too.
    """
    source = node.args[0]
    if is_call(node, aten.permute.default):
        return t.permute(node.args[1])
    if is_call(node, aten.reshape.default):
        return _reshape(node, t, sizes(source), sizes(node))
    if is_call(node, aten.expand.default):
        return t[(None,) * (rank(node) - t.ndim)]
    if is_call(node, *_PICKS):
        dim = argument(node, "dim") % rank(source)
        if t.shape[dim] > 1:
            t = t.index_select(dim, _picked(node, t.shape[dim]))
        return t.squeeze(dim) if is_call(node, aten.select.int) else t
    return t  # clone


def pull_movement(node: fx.Node, t: Tensor) -> Tensor:
    """What of a movement's input becomes ``t``, which broadcasts against its result; NaN for what goes nowhere."""
    source = node.args[0]
    if is_call(node, aten.permute.default):
        return t.permute(torch.tensor([dim % t.ndim for dim in node.args[1]]).argsort().tolist())
    if is_call(node, aten.reshape.default):
        return _reshape(node, t, shape(node), shape(source))
    if is_call(node, aten.expand.default):
        sizes = [1] * (t.ndim - rank(source)) + list(shape(source))
        if any(n > 1 and not (isinstance(size, int) and size == n) for n, size in zip(t.shape, sizes)):
            raise Blocked("the map treats copies of one element differently", node)
        return t.reshape(t.shape[t.ndim - rank(source) :])
    if is_call(node, *_PICKS):
        dim = argument(node, "dim") % rank(source)
        t = t.unsqueeze(dim) if is_call(node, aten.select.int) else t
        size = shape(source)[dim]
        return _scatter(node, t, dim, size) if isinstance(size, int) else t
    return t


def _picked(node: fx.Node, size: int) -> Tensor:
    """The indices, of ``size`` along its dimension, that a slice, select or index_select takes."""
    rest = fx.map_arg(node.args[2:], lambda n: constant(node.graph.owning_module, n))
    return node.target(torch.arange(size), 0, *rest).reshape(-1)


def _scatter(node: fx.Node, t: Tensor, dim: int, size: int) -> Tensor:
    picked = _picked(node, size)
    t = t.expand(*t.shape[:dim], len(picked), *t.shape[dim + 1 :])
    scattered = t.new_full((*t.shape[:dim], size, *t.shape[dim + 1 :]), torch.nan).index_copy(dim, picked, t)
    if not torch.equal(scattered.index_select(dim, picked), t):
        raise Blocked("the map treats copies of one element differently", node)
    return scattered


def _reshape(node: fx.Node, t: Tensor, before: Sequence, after: Sequence) -> Tensor:
    """``t``, which broadcasts against a tensor of sizes ``before``, when that is reshaped to ``after``."""
    sizes, result = [1] * len(before), [1] * len(after)
    for old, new, fixed in _common_factors(before, after):
        if any(t.shape[dim] > 1 for dim in old):
            if not fixed:
                raise Blocked("it reshapes the batch together with a dimension along which the map varies", node)
            for dim in old:
                sizes[dim] = before[dim]
            for dim in new:
                result[dim] = after[dim]
    return t.expand(sizes).reshape(result)


def _common_factors(before: Sequence, after: Sequence) -> Iterator[tuple[range, range, bool]]:
    """Runs of dimensions of two shapes that hold the same elements, from the last, each as short as possible.

    The dimensions from the last symbolic one on to the left come in one run, with False.
    """
    i, j = len(before), len(after)
    while i or j:
        last_i, last_j, left, right = i, j, 1, 1
        while (i, j) == (last_i, last_j) or left != right:
            from_before = i > 0 and (left <= right or j == 0)
            size = before[i - 1] if from_before else after[j - 1]
            if not isinstance(size, int):
                yield range(last_i), range(last_j), False
                return
            if from_before:
                i, left = i - 1, left * size
            else:
                j, right = j - 1, right * size
        yield range(i, last_i), range(j, last_j), True


def padded_dimensions(node: fx.Node) -> Iterator[tuple[int, int, int]]:
    """(dimension, before, after) of a constant pad. Raises ``Blocked`` for a negative pad, which crops."""
    pad = argument(node, "pad")
    for i, (before, after) in enumerate(zip(pad[0::2], pad[1::2], strict=True)):
        if min(before, after) < 0:
            raise Blocked("it crops", node)
        if before or after:
            yield rank(node) - 1 - i, before, after


def mean_dimensions(node: fx.Node) -> tuple[list[int], bool]:
    """(reduced dimensions in ascending order, keepdim) of a mean."""
    ndim = rank(node.args[0])
    return sorted(dim % ndim for dim in argument(node, "dim") or range(ndim)), bool(argument(node, "keepdim"))
