"""How much goes where: from scores to the set of units that are removed.

    global        the lowest scores of the whole network
    uniform       the same share of every group
    importance    the more important a group, the less of it: rate_l = alpha / C_l, at most ``LARGEST_SHARE``; C_l is the
                  largest gradient in its layers (Yvinec 2023, eq. 2.17; its eq. 2.24 prints alpha C_l, the wrong way round)

Each is a family of sets that grows with one number; bisection finds the first that saves enough, and between it and the one before
the groups follow one by one, so that no more is removed than asked for. In a group at least one unit stays, and 1 - LARGEST_SHARE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..analysis.channel_groups import ChannelGroups, Group
from ..analysis.labels import FIXED
from .costs import nothing
from .evidence import Evidence

LARGEST_SHARE = 0.9
STEPS = 40  # of the bisection
MEASURES = ("macs", "parameters", "latency")


@dataclass(frozen=True)
class Choice:
    """Units removed (units,) bool, and what the network costs (before, after)."""

    removed: Tensor
    cost: tuple[float, float]

    @property
    def saved(self) -> float:
        """The share of the cost that goes."""
        before, after = self.cost
        return 1 - after / before if before else 0.0


def choose(
    evidence: Evidence,
    scores: Tensor,
    *,
    ratio: float,
    budget: str,
    cost: Callable[[Tensor], float],
    round_to: int | None,
) -> Choice:
    """The units to remove so that the network's ``cost(removed)`` falls by ``ratio``; less where that is not possible.

    Args:
        scores: (units,), low goes first, NaN stays. ratio: share of the cost, 0..1. budget: a name of ``BUDGETS``.
        round_to: channels of a layer stay multiples of it; None: what fills the registers (``default_round_to``).
    """
    groups = evidence.groups
    whole = cost(nothing(groups))
    if not groups.groups or not whole:
        return Choice(nothing(groups), (whole, whole))
    family = _Family(groups, scores, BUDGETS[budget](evidence, scores), round_to)

    def saved(counts: list[int]) -> float:
        return 1 - cost(family.removed(counts)) / whole

    low, high = 0.0, 1.0
    if saved(family.counts(high)) > ratio:
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if saved(family.counts(middle)) >= ratio else (middle, high)
    counts, last = family.counts(low), family.counts(high)
    for i in reversed(range(len(counts))):  # the last layers first: they are the widest
        if saved(counts) >= ratio:
            break
        counts[i] = last[i]
    removed = family.removed(counts)
    return Choice(removed, (whole, cost(removed)))


class _Family:
    """The sets of units that a budget may remove: how many of each group at t in [0, 1], and which these are."""

    def __init__(
        self, groups: ChannelGroups, scores: Tensor, counts: Callable[[float], list[int]], round_to: int | None
    ):
        self._groups, self._scores, self._counts = groups, scores, counts
        self._boxes = _boxes(groups)
        self._steps = [_step(group, round_to) for group in groups.groups]
        self._order = [
            sorted((u for u in group.units if not math.isnan(scores[u])), key=lambda u: float(scores[u]))
            for group in groups.groups
        ]

    def counts(self, t: float) -> list[int]:
        """Per group, what the budget takes of it, less what must stay."""
        sizes = (len(group.units) for group in self._groups.groups)
        return [min(n, int(LARGEST_SHARE * size), size - 1) for n, size in zip(self._counts(t), sizes, strict=True)]

    def removed(self, counts: list[int]) -> Tensor:
        """(units,) bool: the lowest scores of each group, rounded to channels that may be left."""
        removed = nothing(self._groups)
        for group, units, count, step in zip(self._groups.groups, self._order, counts, self._steps, strict=True):
            removed[units[: _rounded(len(group.units), min(count, len(units)), step)]] = True
        return _repaired(removed, self._boxes, self._scores)


# ----------------------------------------------------------------------------- how many units of every group, at t in [0, 1]


def _uniform(evidence: Evidence, scores: Tensor) -> Callable[[float], list[int]]:
    return lambda t: [int(t * len(group.units)) for group in evidence.groups.groups]


def _global(evidence: Evidence, scores: Tensor) -> Callable[[float], list[int]]:
    per_group = [scores[list(group.units)] for group in evidence.groups.groups]
    everything = torch.cat(per_group).nan_to_num(torch.inf).sort().values

    def counts(t: float) -> list[int]:
        threshold = everything[min(int(t * len(everything)), len(everything) - 1)]
        return [int((values <= threshold).sum()) if t > 0 else 0 for values in per_group]

    return counts


def _importance(evidence: Evidence, scores: Tensor) -> Callable[[float], list[int]]:
    found = evidence.gradients()
    sizes = [
        max(float(evidence.rows(layer, found).abs().max()) for layer in group.layers)
        for group in evidence.groups.groups
    ]
    smallest = min((s for s in sizes if s > 0), default=1.0)

    def counts(t: float) -> list[int]:
        # alpha runs from nothing to all of every group: t / (1 - t), in units of the smallest importance
        rates = [min(1.0, t / max(1 - t, 1e-9) * smallest / max(size, smallest)) for size in sizes]
        return [int(rate * len(group.units)) for rate, group in zip(rates, evidence.groups.groups, strict=True)]

    return counts


BUDGETS: dict[str, Callable] = {"global": _global, "uniform": _uniform, "importance": _importance}


# ------------------------------------------------------------------------------------------------------ what must remain


def default_round_to(channels: int) -> int:
    """Channel counts stay multiples of this: 16 int32 sums fill a register of the native kernels (AVX-512; two of AVX2), so
    that channels beyond a multiple cost as much as 16. Of narrow layers an eighth, as a power of two: there the finer choice is
    worth more than full registers."""
    return min(16, 2 ** max(0, int(math.log2(max(channels, 8) / 8))))


def _step(group: Group, round_to: int | None) -> int:
    """Units by which a group shrinks, so that the rows of its layers shrink by multiples of ``round_to``."""
    rows = group.layers[0].rows.units
    per_unit = max(1, int(torch.isin(rows, torch.tensor(group.units)).sum()) // len(group.units))
    multiple = default_round_to(len(rows)) if round_to is None else round_to
    return multiple // math.gcd(multiple, per_unit)


def _rounded(total: int, count: int, step: int) -> int:
    """At most ``count`` of ``total``, so that a multiple of ``step`` is left."""
    kept = -(-(total - count) // step) * step
    return max(0, total - kept)


def _boxes(groups: ChannelGroups) -> list[Tensor]:
    """The units of every dimension of every tensor that could lose all of them."""
    vectors = [axis.units for axis in groups.axes] + [units.flatten() for units in groups.tensors.values()]
    found = {tuple(vector.unique().tolist()) for vector in vectors}
    return [torch.tensor(units) for units in found if FIXED not in units]


def _repaired(removed: Tensor, boxes: list[Tensor], scores: Tensor) -> Tensor:
    """The best unit of every dimension that lost all, put back."""
    for units in boxes:
        if bool(removed[units].all()):
            removed[units[scores[units].nan_to_num(-torch.inf).argmax()]] = False
    return removed
