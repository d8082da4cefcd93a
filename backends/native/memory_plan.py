"""Where each buffer lies in the arena: greedy, by size or lifetime (Pisarchyk and Lee 2020, section 5.2), aligned to cache lines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .views import Buffer, Uses

ALIGNMENT = 64
_SLACK, _RETRIES = 1.1, 30


@dataclass(frozen=True)
class MemoryPlan:
    """``bytes`` of the arena; ``lower_bound``: the most bytes alive at one step, which no plan can undercut."""

    bytes: int
    lower_bound: int


def align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan_memory(uses: Uses, reserved: int = 0) -> MemoryPlan:
    """Give every buffer of ``uses`` its offset, behind the first ``reserved`` bytes. Buffers alive at the same step never overlap.

    The best of three orders of placement: by size, by lifetime, by their product. While that leaves more than a tenth of the arena unused,
    the buffer that ended highest is placed first instead, a few times.
    """
    bound = reserved + _most_alive(uses)
    orders = (
        lambda b: (-b.bytes, uses.first[b]),
        lambda b: (uses.first[b] - uses.last[b], -b.bytes),
        lambda b: (-b.bytes * (uses.last[b] - uses.first[b] + 1), uses.first[b]),
    )
    tried = {_place(uses, order, reserved): order for order in (sorted(uses.first, key=key) for key in orders)}
    order = tried[min(tried)]
    end = _place(uses, order, reserved)
    for _ in range(_RETRIES):
        if end <= bound * _SLACK:
            break
        highest = max(order, key=lambda b: b.offset + b.bytes)
        order = [highest, *(b for b in order if b is not highest)]
        end = _place(uses, order, reserved)
        tried.setdefault(end, order)
    return MemoryPlan(_place(uses, tried[min(tried)], reserved), bound)


def _place(uses: Uses, buffers: list[Buffer], reserved: int) -> int:
    """Place ``buffers`` one after the other, each as low as it fits; returns the end of the highest."""
    first = np.array([uses.first[b] for b in buffers], dtype=np.int64)
    last = np.array([uses.last[b] for b in buffers], dtype=np.int64)
    end = reserved
    for i, buffer in enumerate(buffers):
        alive = np.flatnonzero((first[:i] <= last[i]) & (last[:i] >= first[i]))
        rivals = sorted((buffers[j] for j in alive), key=lambda b: b.offset)
        buffer.offset = _first_gap(rivals, align(buffer.bytes), reserved)
        end = max(end, buffer.offset + align(buffer.bytes))
    return end


def _first_gap(rivals: list[Buffer], size: int, start: int) -> int:
    """The lowest offset with ``size`` free bytes between ``rivals`` (sorted by offset)."""
    offset = start
    for rival in rivals:
        if rival.offset - offset >= size:
            break
        offset = max(offset, rival.offset + align(rival.bytes))
    return offset


def _most_alive(uses: Uses) -> int:
    changes: dict[int, int] = {}
    for buffer, first in uses.first.items():
        changes[first] = changes.get(first, 0) + align(buffer.bytes)
        changes[uses.last[buffer] + 1] = changes.get(uses.last[buffer] + 1, 0) - align(buffer.bytes)
    alive = most = 0
    for step in sorted(changes):
        alive += changes[step]
        most = max(most, alive)
    return most
