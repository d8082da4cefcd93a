"""The rewrite behind kernel pruning: dense convolutions become grouped ones, with as few selections of channels as possible.

    conv(x, W)  ->  select(conv(select(x, columns), blocks of W, groups=g), rows back)

A selection is taken up by the dense convolution in front of it (its rows are sorted) or behind it (its columns), past batch
norm and elementwise operators, and two selections in a row become one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from ..dialects import BATCH_NORM, CLAMP, CONVOLUTIONS, UNARY
from ..graph import (
    add_constant,
    argument,
    calls,
    constant,
    erase_dead,
    is_call,
    is_constant,
    set_argument,
    set_constant,
    single_user,
    twins,
)
from ..meta import inherit_origin
from ..shapes import propagate
from .kernels import Blocks

aten = torch.ops.aten


def group_convolutions(gm: fx.GraphModule, blocks: dict[str, Blocks]) -> fx.GraphModule:
    """Rewrite the convolutions of these constants in place."""
    selections, shared = [], twins(gm.graph)
    for node in calls(gm, *CONVOLUTIONS):
        if is_constant(node.args[1]) and (found := blocks.get(node.args[1].target)) is not None:
            selections += _grouped(gm, node, found)
    for selection in selections:
        if not selection._erased and not _absorbed_behind(gm, selection, shared):
            _absorbed_before(gm, selection, shared)
    erase_dead(gm)
    propagate(gm)
    return gm


def _grouped(gm: fx.GraphModule, node: fx.Node, blocks: Blocks) -> list[fx.Node]:
    """The convolution in groups, between two selections of channels, which are returned."""
    weight = constant(gm, node.args[1])
    columns = blocks.columns.reshape(blocks.groups, -1).repeat_interleave(len(blocks.rows) // blocks.groups, 0)
    index = columns.reshape(*columns.shape, *[1] * (weight.ndim - 2)).expand(-1, -1, *weight.shape[2:])
    set_constant(gm, node.args[1].target, weight[blocks.rows].gather(1, index).contiguous())
    with gm.graph.inserting_before(node):
        before = _select(gm, node.args[0], blocks.columns, node)
    node.update_arg(0, before)
    if (bias := argument(node, "bias")) is not None:
        set_constant(gm, bias.target, constant(gm, bias)[blocks.rows])
    set_argument(node, "groups", blocks.groups)
    users = list(node.users)
    with gm.graph.inserting_after(node):
        after = _select(gm, node, blocks.rows.argsort(), node)
    for user in users:
        user.replace_input_with(node, after)
    return [before, after]


def _select(gm: fx.GraphModule, x: fx.Node, index: Tensor, like: fx.Node) -> fx.Node:
    """Channels ``index`` of ``x``, at the current insertion point."""
    order = add_constant(gm, f"{like.name}_channels", index, like)
    with gm.graph.inserting_after(order):
        return inherit_origin(like, gm.graph.call_function(aten.index_select.default, (x, 1, order)))


# ------------------------------------------------------------------------------------- selections that layers take up


def _absorbed_behind(gm: fx.GraphModule, selection: fx.Node, shared: Mapping) -> bool:
    """Let the channels keep the order they had before the selection, up to the convolution, or the selection, that reads them."""
    index, path, node = constant(gm, selection.args[2]), [], single_user(selection)
    while node is not None and _keeps_channels(node, shared):
        path.append(node)
        node = single_user(node)
    if node is None or not (_is_selection(node) or _takes_order(node, shared)):
        return False
    back = index.argsort()
    _reorder_norms(gm, path, back)
    if _is_selection(node):
        set_constant(gm, node.args[2].target, index[constant(gm, node.args[2])])
    else:
        set_constant(gm, node.args[1].target, constant(gm, node.args[1]).index_select(1, back))
    _remove(gm, selection)
    return True


def _absorbed_before(gm: fx.GraphModule, selection: fx.Node, shared: Mapping) -> bool:
    """Let the convolution whose result is selected from compute it in that order."""
    index, path, node = constant(gm, selection.args[2]), [], selection.args[0]
    while isinstance(node, fx.Node) and len(node.users) == 1 and _keeps_channels(node, shared):
        path.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or len(node.users) != 1 or not _takes_order(node, shared):
        return False
    for operand in (node.args[1], argument(node, "bias")):
        if operand is not None:
            set_constant(gm, operand.target, constant(gm, operand).index_select(0, index))
    _reorder_norms(gm, path, index)
    _remove(gm, selection)
    return True


def _keeps_channels(node: fx.Node, shared: Mapping) -> bool:
    """An operator on each channel for itself, with constants of its own."""
    if is_call(node, BATCH_NORM):
        return all(owned(operand, shared) for operand in node.args[1:5])
    return is_call(node, *UNARY, CLAMP) and len(node.all_input_nodes) == 1


def _takes_order(node: fx.Node, shared: Mapping) -> bool:
    """A dense convolution whose weight and bias can be sorted."""
    dense = is_call(node, *CONVOLUTIONS) and argument(node, "groups") == 1 and is_constant(node.args[1])
    return dense and owned(node.args[1], shared) and owned(argument(node, "bias"), shared)


def owned(operand: fx.Node | None, shared: Mapping) -> bool:
    """A constant with one reader, or none at all; ``shared``: ``twins`` of the graph."""
    return operand is None or (len(operand.users) == 1 and operand.target not in shared)


def _is_selection(node: fx.Node) -> bool:
    return is_call(node, aten.index_select.default) and node.args[1] == 1 and is_constant(node.args[2])


def _reorder_norms(gm: fx.GraphModule, path: list[fx.Node], index: Tensor) -> None:
    for node in path:
        for operand in node.args[1:5] if is_call(node, BATCH_NORM) else ():
            if operand is not None:
                set_constant(gm, operand.target, constant(gm, operand)[index])


def _remove(gm: fx.GraphModule, selection: fx.Node) -> None:
    selection.replace_all_uses_with(selection.args[0])
    gm.graph.erase_node(selection)
