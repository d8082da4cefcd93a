"""What a network costs, and what it costs once units are removed: parameters and multiply-accumulates, counted exactly."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, fx

from ..analysis.channel_groups import ChannelGroups
from ..dialects import BATCH_NORM, MATMUL, TRANSPOSED_CONVOLUTIONS, WEIGHTED
from ..graph import calls, constant, is_call, is_constant, one_sample_shape


@dataclass(frozen=True)
class Cost:
    """``parameters``: elements of float constants, batch-norm statistics not counted. ``macs``: per sample."""

    parameters: int
    macs: int


class Costs:
    """The cost of a graph without any set of its units.

    >>> costs = Costs(groups); costs.without(torch.zeros(groups.count, dtype=torch.bool))       # doctest: +SKIP
    Cost(parameters=853018, macs=125485706)
    """

    def __init__(self, groups: ChannelGroups):
        gm = groups.gm
        statistics = {a.target for n in calls(gm, BATCH_NORM) for a in n.args[3:5] if is_constant(a)}
        targets = {n.target for n in gm.graph.find_nodes(op="get_attr")} - statistics
        self._cuts: dict[str, list[Tensor]] = defaultdict(list)
        for axis in groups.axes:
            self._cuts[axis.target].append(axis.units)
        values = {target: attrgetter(target)(gm) for target in targets}
        self._sizes = {t: v.numel() for t, v in values.items() if v.is_floating_point()}
        self._positions = weight_uses(gm)
        self._products = [MatmulCost(groups, n) for n in calls(gm, MATMUL)]

    def without(self, removed: Tensor) -> Cost:
        kept = {target: size for target, size in self._sizes.items()}
        for target, cuts in self._cuts.items():
            if target in kept:
                for units in cuts:
                    kept[target] = kept[target] * int((~removed[units]).sum()) // len(units)
        macs = sum(positions * kept[target] for target, positions in self._positions)
        return Cost(sum(kept.values()), macs + sum(product.macs(removed) for product in self._products))


def weight_uses(gm: fx.GraphModule) -> list[tuple[str, int]]:
    """(constant, how often each of its elements is used per sample) of every layer."""
    return [(n.args[1].target, _positions(gm, n)) for n in calls(gm, *WEIGHTED) if is_constant(n.args[1])]


def _positions(gm: fx.GraphModule, node: fx.Node) -> int:
    """How often each element of a layer's weight is used per sample."""
    weight, moved = constant(gm, node.args[1]), node.args[0] if is_call(node, *TRANSPOSED_CONVOLUTIONS) else node
    return math.prod(one_sample_shape(moved)) // weight.shape[0]


class MatmulCost:
    """Multiply-accumulates of a product of activations (..., M, K) @ (..., K, N)."""

    def __init__(self, groups: ChannelGroups, node: fx.Node):
        (x, y) = node.args[:2]
        self.x, self.units = one_sample_shape(x), groups.tensors.get(x)
        self.columns = one_sample_shape(y)[-1]
        units = groups.tensors.get(y)
        varies = units is not None and units.ndim and units.shape[-1] > 1 and units.shape[-2] == 1
        self.column_units = units.flatten() if varies and max(units.shape[:-1], default=1) == 1 else None

    def macs(self, removed: Tensor) -> int:
        elements, columns = math.prod(self.x), self.columns
        if self.units is not None and self.units.numel() > 1:
            elements = elements * int((~removed[self.units]).sum()) // self.units.numel()
        if self.column_units is not None:
            columns = int((~removed[self.column_units]).sum())
        return elements * columns


def nothing(groups: ChannelGroups) -> Tensor:
    """No unit removed."""
    return torch.zeros(groups.count, dtype=torch.bool)
