"""Which nodes of an integer graph one kernel computes together.

    conv -> requantize (+ other branches) -> table         one kernel: accumulators and codes between them are never stored
    widen                                                  never runs: a branch of a requantization reads codes

A requantization is computed by the kernel of one of its branches (its *host*) when nobody else reads that accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from fxcompress.graph import argument, constant, is_call, is_constant

from .constants import varying_dims
from .structs import MAX_BRANCHES

ops = torch.ops.fxcompress

#: Host -> dimension its per-channel requantization must run along: the channels, that of its argument ``axis``, or any (None).
_CHANNEL = 1
_LAST = -1
_AXIS = "axis"
HOSTS = {
    ops.conv.default: _CHANNEL, ops.conv_transpose.default: _CHANNEL, ops.sum_pool.default: _CHANNEL,
    ops.adaptive_sum_pool.default: _CHANNEL, ops.resize.default: _CHANNEL, ops.linear.default: _LAST,
    ops.matmul.default: _LAST, ops.mul.default: None, ops.sum.default: None, ops.softmax.default: _LAST,
    ops.layer_norm.default: _LAST, ops.bilinear_linear.default: _AXIS, ops.bilinear_matmul.default: _LAST,
}  # fmt: skip
#: Hosts whose other branches may be constants and broadcast (the bias of a layer norm).
STRIDED = frozenset({ops.layer_norm.default})
#: Hosts without other branches. A product writes strided rows, its branches would have to lie like them.
ALONE = frozenset({ops.matmul.default, ops.softmax.default, ops.bilinear_matmul.default})


@dataclass(frozen=True, eq=False)
class Group:
    """A requantization with its host (None: it runs alone) and the table applied to its codes (None: no table)."""

    requantize: fx.Node
    host: fx.Node | None
    table: fx.Node | None

    @property
    def result(self) -> fx.Node:
        return self.table or self.requantize

    @property
    def branches(self) -> list[int]:
        """Indices of the branches, the host's first."""
        accumulators = self.requantize.args[0]
        first = accumulators.index(self.host) if self.host is not None else 0
        return [first, *(i for i in range(len(accumulators)) if i != first)]


@dataclass
class Fusion:
    """``groups`` by their result node; ``absorbed``: nodes that no step of their own computes."""

    groups: dict[fx.Node, Group] = field(default_factory=dict)
    absorbed: set[fx.Node] = field(default_factory=set)


def find_groups(gm: fx.GraphModule, shapes: dict[fx.Node, torch.Tensor]) -> Fusion:
    """``shapes``: a (meta) tensor for every node that computes one."""
    fusion = Fusion()
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.nodes:
        if is_call(node, ops.requantize.default):
            host, table = _host(gm, node, shapes, position), _table(gm, node)
            group = Group(node, host, table)
            fusion.groups[group.result] = group
            fusion.absorbed |= {n for n in (host, table and node) if n is not None}
        elif is_call(node, ops.widen.default) and all(is_call(user, ops.requantize.default) for user in node.users):
            fusion.absorbed.add(node)
    return fusion


def _table(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The one user of these codes, if it is an elementwise table of codes."""
    users = list(node.users)
    if len(users) != 1 or not is_call(users[0], ops.table.default):
        return None
    lut = constant(gm, users[0].args[1])
    return users[0] if lut.ndim == 1 and lut.dtype == torch.uint8 else None


def _host(gm: fx.GraphModule, node: fx.Node, shapes: dict, position: dict) -> fx.Node | None:
    """The latest branch whose kernel can requantize: all others are then computed."""
    branches, shape = node.args[0], shapes[node].shape
    if len(branches) > MAX_BRANCHES:
        return None
    plain = all(shapes[b].shape == shape and not is_constant(b) for b in branches)
    hosts = [
        b for b in branches if len(b.users) == 1 and branches.count(b) == 1 and shapes[b].shape == shape
        and _can_host(gm, b, node, len(shape), plain)
    ]  # fmt: skip
    return max(hosts, key=position.get, default=None)


def _can_host(gm: fx.GraphModule, host: fx.Node, node: fx.Node, rank: int, plain: bool) -> bool:
    """``plain``: all branches are computed tensors of one shape."""
    if host.op != "call_function" or host.target not in HOSTS or not (plain or host.target in STRIDED):
        return False
    if host.target in ALONE and len(node.args[0]) > 1:
        return False
    wanted, found = HOSTS[host.target], parameter_dims(gm, node, rank)
    wanted = argument(host, _AXIS) if wanted == _AXIS else wanted
    return len(found) <= 1 if wanted is None else found in ((), (wanted % rank,))


def parameter_dims(gm: fx.GraphModule, node: fx.Node, rank: int) -> tuple[int, ...]:
    """The dimensions along which the parameters of a requantization vary."""
    _, multipliers, shifts, _, zero_point, _, lo, hi = node.args
    return varying_dims(rank, *(constant(gm, n) for n in (*multipliers, *shifts, zero_point, lo, hi)))
