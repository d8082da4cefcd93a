"""Carry out a cut: ``mask`` zeroes the removed units, ``shrink`` takes them out. Both compute the same.

    mask      rows of weights, biases, gamma, beta, added constants of removed units become 0; nothing changes its shape
    shrink    constants lose the removed indices, arguments that say sizes follow; where a masked channel is a constant
              c != 0 at a layer that reads it (behind a sigmoid), the layer's bias takes it up: b_o += sum_i W_oi c_i

Units that are merged (``merging``) are not zeroed but copies of others, whose columns take over theirs.

``removed`` is bool (units,), ``removed[0]`` False.   Source: methods as in Fang et al. 2023 (DepGraph); constants derived here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter

import torch
from torch import Tensor, fx

from ..analysis.affine_rules import PAD
from ..analysis.channel_groups import Axis, ChannelGroups, Layer, batch_norm_of
from ..analysis.channel_layer_rules import goes_by_groups
from ..analysis.layer_weights import groups_of
from ..dialects import CONVOLUTIONS, GROUP_NORM, TRANSPOSED_CONVOLUTIONS
from ..graph import (
    add_constant,
    argument,
    constant,
    copy_graph_module,
    erase_dead,
    is_call,
    rank,
    set_argument,
    set_constant,
    twins,
)
from ..shapes import propagate
from .merging import Merges, copy_neurons, merge_columns, pairs

aten = torch.ops.aten


def mask(groups: ChannelGroups, removed: Tensor, merges: Merges | None = None) -> fx.GraphModule:
    """A copy of the graph whose removed units are zero where they are written; merged ones copies of others."""
    gm = copy_graph_module(groups.gm)
    for axis, gone in _masked(groups, removed):
        set_constant(gm, axis.target, attrgetter(axis.target)(gm).index_fill(axis.axis, gone, 0))
    if merges is not None:
        copy_neurons(groups, merges, gm)
    return gm


@torch.no_grad()
def mask_in_place(groups: ChannelGroups, removed: Tensor) -> None:
    """The same in the tensors of the graph itself: what an optimizer moved is zero again."""
    for axis, gone in _masked(groups, removed):
        attrgetter(axis.target)(groups.gm).index_fill_(axis.axis, gone, 0)


def _masked(groups: ChannelGroups, removed: Tensor) -> Iterator[tuple[Axis, Tensor]]:
    """The axes of constants where removed units are written, and which indices those are."""
    for axis in groups.axes:
        if axis.writes and bool(removed[axis.units].any()):
            yield axis, removed[axis.units].nonzero().flatten()


def shrink(
    groups: ChannelGroups,
    removed: Tensor,
    expected: dict[fx.Node, Tensor] | None = None,
    merges: Merges | None = None,
) -> fx.GraphModule:
    """Cut the graph of ``groups`` in place; the groups describe it no longer. Returns it, with its shapes.

    ``expected``: per layer what its inputs (I,) are on average: biases then take up that instead of what masking leaves.
    """
    gm, expected, shared = groups.gm, expected or {}, twins(groups.gm.graph)
    for layer in groups.layers:
        if layer.columns is not None:
            values = expected.get(layer.node, layer.rest)
            if merges is not None:
                values = _unmerged(layer, values, merges, layer.node in expected)
            _take_up(gm, layer, removed, values, shared)
    if merges is not None:
        merge_columns(groups, merges)
    for node in list(gm.graph.nodes):
        rule = _ARGUMENTS.get(node.target)
        if rule is not None and node in groups.tensors:
            rule(gm, node, _Kept(groups, removed))
    for axis in groups.axes:
        _slice(gm, axis, removed)
    erase_dead(gm)
    propagate(gm)
    return gm


def _slice(gm: fx.GraphModule, axis: Axis, removed: Tensor) -> None:
    kept = (~removed[axis.units]).nonzero().flatten()
    if len(kept) < len(axis.units):
        set_constant(gm, axis.target, attrgetter(axis.target)(gm).index_select(axis.axis, kept).contiguous())


def _unmerged(layer: Layer, values: Tensor, merges: Merges, known: bool) -> Tensor:
    """What merging leaves of the values (I,): nothing, or where means are ``known`` what they differ by."""
    gone, kept, scale = pairs(layer.columns, merges)
    values = values.double().clone()
    values[gone] = values[gone] - scale * values[kept] if known else 0.0
    return values


def _take_up(gm: fx.GraphModule, layer: Layer, removed: Tensor, values: Tensor, shared: Mapping) -> None:
    """Add what the removed channels give when they have these ``values`` (I,) to the layer that reads them."""
    node = layer.node
    gone = removed[layer.columns] & (values != 0)
    weight = constant(gm, node.args[1])
    if not bool(gone.any()) or goes_by_groups(node, weight) or is_call(node, *TRANSPOSED_CONVOLUTIONS):
        return
    groups = groups_of(node)
    given = torch.where(gone, values, 0.0).reshape(groups, 1, -1)
    taps = weight.double().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).sum(-1)
    bias = (taps * given).sum(-1).flatten()
    shift_bias(gm, layer, bias, shared, kept=~removed[layer.rows.units])


def shift_bias(
    gm: fx.GraphModule, layer: Layer, shift: Tensor, shared: Mapping | None = None, kept: Tensor | None = None
) -> None:
    """Add ``shift`` (O,) to what a layer gives: to its bias, or take it from the mean of the batch norm behind it, which is the same.

    ``shared``: ``twins`` of the graph. ``kept``: rows (O,) of a bias that has to be made.
    """
    node, shared = layer.node, twins(gm.graph) if shared is None else shared
    norm, old, like = batch_norm_of(layer), argument(node, "bias"), constant(gm, node.args[1])
    for operand, sign in ((None if norm is None else norm.args[3], -1), (old, 1)):
        if operand is not None and len(operand.users) == 1 and operand.target not in shared:
            set_constant(gm, operand.target, (constant(gm, operand) + sign * shift).to(like.dtype))
            return
    bias = shift if old is None else shift + constant(gm, old).double()
    with gm.graph.inserting_before(node):
        new = add_constant(gm, f"{layer}.bias", (bias if kept is None else bias[kept]).to(like.dtype), node)
    set_argument(node, "bias", new)


# ------------------------------------------------------------------------------------------- arguments that say sizes


class _Kept:
    """What is left of a tensor's dimensions."""

    def __init__(self, groups: ChannelGroups, removed: Tensor):
        self.groups, self.removed = groups, removed

    def dimension(self, node: fx.Node) -> tuple[int, Tensor] | None:
        """(dimension, bool (size,)) along which a tensor is cut, None if it is not."""
        units = self.groups.tensors.get(node)
        dim = None if units is None else next((d for d, size in enumerate(units.shape) if size > 1), None)
        if dim is None or not bool(self.removed[units].any()):
            return None
        return dim, ~self.removed[units.flatten()]


def _sizes(gm: fx.GraphModule, node: fx.Node, kept: _Kept) -> None:
    """reshape, expand: -1 is what it was."""
    if (cut := kept.dimension(node)) is not None:
        dim, left = cut
        sizes = list(node.args[1])
        if sizes[dim] != -1:
            sizes[dim] = int(left.sum())
            node.args = (node.args[0], sizes, *node.args[2:])


def _bounds(gm: fx.GraphModule, node: fx.Node, kept: _Kept) -> None:
    """slice: as many before its start and its end as are left of them."""
    cut, dim = kept.dimension(node.args[0]), argument(node, "dim") % rank(node)
    if cut is not None and cut[0] == dim:
        left = cut[1]
        start, end, _ = slice(argument(node, "start"), argument(node, "end")).indices(len(left))
        node.args = (node.args[0], dim, int(left[:start].sum()), int(left[:end].sum()), 1)
        node.kwargs = {}


def _index(gm: fx.GraphModule, node: fx.Node, kept: _Kept) -> None:
    """select: as many before its index as are left of them."""
    source, dim, index = node.args
    cut = kept.dimension(source)
    if cut is not None and cut[0] == dim % rank(source):
        node.args = (source, dim, int(cut[1][: index % len(cut[1])].sum()))


def _indices(gm: fx.GraphModule, node: fx.Node, kept: _Kept) -> None:
    """index_select: what is left of its indices, counted among what is left of its input."""
    source, dim, index = node.args
    cut = kept.dimension(source)
    if cut is not None and cut[0] == dim % rank(source):
        left, index = cut[1], constant(gm, index)
        chosen = (left.cumsum(0) - 1)[index[left[index]]]
        with gm.graph.inserting_before(node):
            node.args = (source, dim, add_constant(gm, f"{node.name}_index", chosen, node))


def _widths(gm: fx.GraphModule, node: fx.Node, kept: _Kept) -> None:
    """constant_pad_nd: what is left of the channels it adds."""
    if (cut := kept.dimension(node)) is not None:
        dim, left = cut
        widths, last = list(node.args[1]), 2 * (rank(node) - 1 - dim)
        if last < len(widths):
            before, after = widths[last : last + 2]
            widths[last : last + 2] = int(left[:before].sum()), int(left[len(left) - after :].sum())
            node.args = (node.args[0], widths, *node.args[2:])


def _groups(name: str) -> Callable:
    def rule(gm: fx.GraphModule, node: fx.Node, kept: _Kept) -> None:
        """Whole groups go, or as many channels of each."""
        source = node.args[0]
        weight = constant(gm, node.args[1]) if name == "groups" else None
        if weight is not None and not goes_by_groups(node, weight):
            return
        if (cut := kept.dimension(source)) is not None:
            left, count = cut[1], argument(node, name)
            set_argument(node, name, count * int(left.sum()) // len(left))

    return rule


_ARGUMENTS: dict[object, Callable[[fx.GraphModule, fx.Node, _Kept], None]] = {
    aten.reshape.default: _sizes,
    aten.expand.default: _sizes,
    aten.slice.Tensor: _bounds,
    aten.select.int: _index,
    aten.index_select.default: _indices,
    PAD: _widths,
    GROUP_NORM: _groups("num_groups"),
    **dict.fromkeys(CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS, _groups("groups")),
}
