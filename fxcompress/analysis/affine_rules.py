"""How one operator meets a per-channel affine map: which map of its input equals a map of its result, and when none does.

``Blocked`` carries the reason and the node; the searches of ``affine_regions`` turn it into a ``Reject``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from .. import dialects as d
from ..graph import argument, constant, is_call, is_constant, rank, shape
from ..meta import place
from ..rewrite import Reject
from .affine import Affine

aten = torch.ops.aten
#: Operators that leave the channels apart and average or select among the positions of each.
CHANNELWISE = d.MAX_POOLS | d.AVERAGE_POOLS | d.ADAPTIVE_AVERAGE_POOLS | d.RESIZES
PAD = aten.constant_pad_nd.default
MOVEMENT = d.MOVEMENT - {PAD}
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
    if is_call(node, *d.AVERAGE_POOLS) and affine.shifts and not _averages_to_one(node):
        raise Blocked("a shift changes in average pooling that counts zero padding or has its own divisor", node)


def _averages_to_one(node: fx.Node) -> bool:
    """The weights of every window sum to 1 over elements of the input."""
    divisor = None if node.target is aten.avg_pool1d.default else argument(node, "divisor_override")
    return divisor is None and not (argument(node, "count_include_pad") and is_padded(node))


def is_padded(node: fx.Node) -> bool:
    """A convolution or pool pads its input."""
    padding = argument(node, "padding")
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


def require_layer(node: fx.Node, affine: Affine, axis: int) -> None:
    """Raise ``Blocked`` unless the layer can absorb the map: it varies along ``axis`` only, the weight is its own."""
    if affine.varies_outside(axis):
        raise Blocked(f"the map varies along another axis than {axis % affine.scale.ndim}, its channels", node)
    if is_call(node, d.BATCH_NORM):
        return
    if not all(operand is None or is_constant(operand) for operand in node.args[1:3]):
        raise Blocked("its weight is computed at run time", node)
    weight = node.args[1].target
    sharing = [u for n in node.graph.find_nodes(op="get_attr", target=weight) for u in n.users if u is not node]
    if sharing:
        raise Blocked(f"weight shared with {place(sharing[0])}", node)


# -------------------------------------------------------------------------------------------------------- data movement


def extent(node: fx.Node) -> list[int]:
    """Sizes of the tensor a node computes, 1 for a symbolic batch."""
    return [s if isinstance(s, int) else 1 for s in shape(node)]


def push_movement(node: fx.Node, t: Tensor) -> Tensor:
    """A data movement applied to ``t``, which broadcasts against its input."""
    return _move(node, t.expand(extent(node.args[0])))


def pull_movement(node: fx.Node, t: Tensor) -> Tensor:
    """What of a movement's input becomes ``t``, which broadcasts against its result; NaN for what goes nowhere."""
    sizes = extent(node.args[0])
    elements = torch.arange(torch.Size(sizes).numel())
    origin = _move(node, elements.reshape(sizes))
    t = t.expand(origin.shape).flatten()
    known = ~t.isnan()
    origin, t = origin.flatten()[known], t[known]
    pulled = torch.full((elements.numel(),), torch.nan, dtype=t.dtype)
    pulled[origin] = t
    if not torch.equal(pulled[origin], t):
        raise Blocked("the map treats copies of one element differently", node)
    return pulled.reshape(sizes)


def _move(node: fx.Node, value: Tensor) -> Tensor:
    source = shape(node.args[0])
    cuts = is_call(node, aten.slice.Tensor, aten.select.int, aten.index_select.default)
    if cuts and not isinstance(source[argument(node, "dim") % len(source)], int):
        raise Blocked("it cuts the batch", node)
    gm = node.graph.owning_module
    return node.target(value, *fx.map_arg(node.args[1:], lambda n: constant(gm, n)), **node.kwargs)


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
