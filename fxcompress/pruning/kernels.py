"""Whole kernels: which of a convolution's O x I kernels go, so that those that stay make a grouped convolution.

    W (O, I, *K)  ->  g blocks (O/g, I/g): rows and columns are sorted into g equal parts, kernels between different parts go

The parts are found in turns: with the columns' parts given every row goes where the kernels that stay are worth most, then
columns with the rows'. The parts are equally large, so rows that lose most by another choice choose first. What stays never
gets less by a turn; it ends where nothing is gained. A network gives up kernels layer by layer, from one group to two, to
four, ..., where the least is lost per multiplication saved.

Source: the grouping as in Zhang et al. 2018 (IGCV) and Wang et al. 2019 (learnable group convolution); derived here.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

TURNS = 20
MOST_GROUPS = 64


@dataclass(frozen=True, eq=False)
class Blocks:
    """``rows`` (O,), ``columns`` (I,): the channels of group 0, of group 1, ..., each part ascending. ``lost``: share of the value."""

    groups: int
    rows: Tensor
    columns: Tensor
    lost: float

    def removed(self, shape: torch.Size) -> Tensor:
        """bool, of the weight's ``shape`` (O, I, *K): the kernels that go."""
        kept = torch.zeros(shape[:2], dtype=torch.bool)
        for rows, columns in zip(self.rows.chunk(self.groups), self.columns.chunk(self.groups), strict=True):
            kept[rows[:, None], columns[None, :]] = True
        return (~kept).reshape(*shape[:2], *[1] * (len(shape) - 2)).expand(shape)


def find_blocks(values: Tensor, groups: int) -> Blocks:
    """The parts of rows and columns of ``values`` (O, I), of kernels, that keep as much of their sum as was found.

    ``groups`` divides O and I.
    """
    best = torch.arange(values.shape[1]) * groups // values.shape[1], None, -1.0
    columns = _by_likeness(values, groups)
    for start in (columns, best[0]):
        part, last = start, -1.0
        for _ in range(TURNS):
            rows = _assigned(_per_part(values, part, groups))
            part = _assigned(_per_part(values.t(), rows, groups))
            kept = float(values[rows[:, None] == part[None, :]].sum())
            if kept <= last:
                break
            last = kept
            if kept > best[2]:
                best = part, rows, kept
    part, rows, kept = best
    total = float(values.sum())
    return Blocks(groups, rows.argsort(stable=True), part.argsort(stable=True), 1 - kept / total if total else 0.0)


def _by_likeness(values: Tensor, groups: int) -> Tensor:
    """(I,) parts of columns that the same rows read: ordered along the direction in which columns differ most."""
    centered = values - values.mean(1, keepdim=True)
    direction = torch.linalg.svd(centered, full_matrices=False).U[:, 0]
    order = (direction @ centered).argsort(stable=True)
    parts = torch.empty(len(order), dtype=torch.int64)
    parts[order] = torch.arange(len(order)) * groups // len(order)
    return parts


def _per_part(values: Tensor, columns: Tensor, groups: int) -> Tensor:
    """(O, groups) sums of each row over the columns of each part."""
    return torch.zeros(len(values), groups, dtype=values.dtype).index_add_(1, columns, values)


def _assigned(worth: Tensor) -> Tensor:
    """(n,) a part for every row of ``worth`` (n, groups), n / groups rows each; the rows with most to lose choose first."""
    count, groups = worth.shape
    room = [count // groups] * groups
    two = worth.topk(2, dim=1).values
    parts = torch.empty(count, dtype=torch.int64)
    for row in (two[:, 0] - two[:, 1]).argsort(descending=True, stable=True).tolist():
        part = max((p for p in range(groups) if room[p]), key=lambda p: float(worth[row, p]))
        parts[row] = part
        room[part] -= 1
    return parts


def choose_groups(
    values: dict[str, Tensor], costs: dict[str, float], ratio: float, narrowest: int
) -> dict[str, Blocks]:
    """Blocks of the layers that become grouped, so that ``ratio`` of the whole network is saved.

    Args:
        values: (O, I) per layer, of kernels. costs: of each layer, as shares of the whole network.
        narrowest: channels in a group, at least.
    """
    chosen: dict[str, Blocks] = {}
    queue = []

    def offer(layer: str) -> None:
        now = chosen.get(layer)
        groups = 2 * (now.groups if now else 1)
        if groups <= MOST_GROUPS and all(n % groups == 0 and n // groups >= narrowest for n in values[layer].shape):
            blocks = find_blocks(values[layer], groups)
            saving = costs[layer] * (1 / (now.groups if now else 1) - 1 / groups)
            loss = (blocks.lost - (now.lost if now else 0.0)) * costs[layer]
            heapq.heappush(queue, (max(loss, 0.0) / saving, layer, blocks, saving))

    for layer in values:
        offer(layer)
    saved = 0.0
    while queue and saved < ratio:
        _, layer, blocks, saving = heapq.heappop(queue)
        chosen[layer] = blocks
        saved += saving
        offer(layer)
    return chosen
