"""Runs of convolutions computed in bands of output rows, so that what lies between them stays in the cache.

    expand 1x1 -> depthwise 3x3 -> project 1x1        for each band: the rows of the first that the band needs and does not have
                                                      yet, then those of the second, then the band

The tensors between the layers shrink to buffers of a few rows. Every thread has a *task*: a range of output rows of its own,
whose bands it computes without waiting for the others. The kernels are those of the whole layers, with the sizes and pads of
a few rows; only where two tasks meet are rows computed twice.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections import Counter
from dataclasses import dataclass

from . import structs
from .constants import Constants
from .kernels import select
from .planner import PlannedStep
from .views import CHANNELS_LAST, View, dense_strides, new_view

_HEIGHT = 2  # dimension of (N, C, H, W)
_LEAST_BUDGET = 1 << 18  # bands of fewer bytes cost more than they save (docs/native.md)


@functools.cache
def cache_bytes() -> int:
    """The L2 cache of a core; 1 MiB where the system does not say."""
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 1 << 20
    except (ValueError, OSError):
        return 1 << 20


@dataclass(frozen=True, eq=False)
class BandedSteps:
    """Steps of a plan that run in bands: ``tasks`` holds, per thread, the calls that it makes in order."""

    steps: tuple[PlannedStep, ...]
    tasks: tuple[tuple[PlannedStep, ...], ...]

    kernel = property(lambda self: self.steps[-1].kernel)
    params = property(lambda self: self.steps[-1].params)
    node = property(lambda self: self.steps[-1].node)
    out = property(lambda self: self.steps[-1].out)

    @property
    def inputs(self) -> tuple[View, ...]:
        """What lies outside the bands."""
        first, *rest = self.steps
        return (*first.inputs, *(view for step in rest for view in step.inputs[1:]))


def in_bands(
    steps: list[PlannedStep], constants: Constants, threads: int, budget: int | None = None
) -> list[PlannedStep | BandedSteps]:
    """``steps`` with runs of convolutions replaced by ``BandedSteps`` where a tensor between them has more than ``budget`` bytes.

    ``budget``: of all buffers of a task; an eighth of the L2 cache by default, at least 256 KiB.
    """
    budget = max(cache_bytes() // 8, _LEAST_BUDGET) if budget is None else budget
    readers = Counter(view.buffer for step in steps for view in {v.buffer: v for v in step.inputs}.values())
    result: list[PlannedStep | BandedSteps] = []
    joined = [_joins(a, b, readers, budget) for a, b in itertools.pairwise(steps)]
    start = 0
    for i in range(len(steps)):
        if i < len(joined) and joined[i]:
            continue
        run = steps[start : i + 1]
        result += run if len(run) == 1 else _banded(run, constants, threads, budget)
        start = i + 1
    return result


def _joins(first: PlannedStep, second: PlannedStep, readers: Counter, budget: int) -> bool:
    """The output of ``first``, too large for the cache, is read by ``second`` alone, and both can run on a few rows."""
    if not (_is_image_conv(first) and _is_image_conv(second)):
        return False
    out, read = first.out, second.inputs[0]
    private = (
        out.buffer.external is None
        and readers[out.buffer] == 1
        and all(v.buffer is not out.buffer for v in second.inputs[1:])
    )
    same = read.buffer is out.buffer and read.shape == out.shape and read.strides == out.strides
    return private and same and out.strides == dense_strides(out.shape, CHANNELS_LAST) and out.buffer.bytes > budget


def _is_image_conv(step: PlannedStep) -> bool:
    return (
        step.kernel.op == "conv"
        and len(step.out.shape) == len(step.inputs[0].shape) == 4
        and step.params.kernel[0] == 1
    )


def _banded(run: list[PlannedStep], constants: Constants, threads: int, budget: int) -> list[PlannedStep | BandedSteps]:
    """``run`` in bands, or as it is if a kernel does not accept so few rows, or some have only borders under them."""
    batch, _, height, _ = run[-1].out.shape
    rows = _band_rows(run, min(height, -(-batch * height // threads)), budget)
    tasks = []
    for thread in range(threads):
        begin, end = (batch * height * t // threads for t in (thread, thread + 1))
        task = _Task(run, constants, rows)
        while begin < end:
            image, row = divmod(begin, height)
            last = min(height, row + end - begin)
            task.add_image(image, row, last)
            begin += last - row
        tasks.append(tuple(task.calls))
    accepted = all(c.kernel.accepts(c.params) and 0 not in c.inputs[0].shape for task in tasks for c in task)
    return [BandedSteps(tuple(run), tuple(tasks))] if accepted else run


def _band_rows(run: list[PlannedStep], height: int, budget: int) -> int:
    """Output rows of a band, of ``height`` in all: as many as the budget allows, at least one."""
    rows = height
    while (
        rows > 1 and sum(_buffer_bytes(step, n) for step, n in zip(run[:-1], _heights(run, rows), strict=True)) > budget
    ):
        rows -= 1
    return -(-height // -(-height // max(rows, 1)))  # bands of nearly equal height


def _heights(run: list[PlannedStep], rows: int) -> list[int]:
    """How many rows of each tensor between the steps a band of ``rows`` needs at most."""
    heights = []
    for step in reversed(run[1:]):
        p = step.params
        rows = min((rows - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1, p.in_size[1])
        heights.insert(0, rows)
    return heights


def _buffer_bytes(step: PlannedStep, rows: int) -> int:
    _, channels, _, width = step.out.shape
    return rows * width * channels * step.out.tensor.element_size()


def _rows_under(params: structs.Conv, begin: int, end: int) -> tuple[int, int]:
    """The input rows that output rows ``begin`` .. ``end - 1`` read, borders excluded; none if they read only borders."""
    height, top = params.in_size[1], begin * params.stride[1] - params.pad_before[1]
    last = (end - 1) * params.stride[1] - params.pad_before[1] + (params.kernel[1] - 1) * params.dilation[1]
    first = min(max(top, 0), height)
    return first, max(min(last + 1, height), first)


class _Task:
    """Collects the calls of one thread; owns the buffers between the steps."""

    def __init__(self, run: list[PlannedStep], constants: Constants, rows: int):
        self.run, self.constants, self.rows = run, constants, rows
        self.calls: list[PlannedStep] = []
        shapes = [(1, s.out.shape[1], n, s.out.shape[3]) for s, n in zip(run[:-1], _heights(run, rows), strict=True)]
        self.buffers = [new_view(shape, s.out.dtype, CHANNELS_LAST) for shape, s in zip(shapes, run, strict=False)]

    def add_image(self, image: int, begin: int, end: int) -> None:
        """Output rows ``begin`` .. ``end - 1`` of an image, band by band."""
        held = [(0, 0)] * len(self.buffers)  # the rows in each buffer
        for first in range(begin, end, self.rows):
            needed = [(first, min(first + self.rows, end))]
            for step in reversed(self.run[1:]):
                needed.insert(0, _rows_under(step.params, *needed[0]))
            for i, buffer in enumerate(self.buffers):
                start = self._keep(i, held[i], needed[i])
                self._add(
                    i, image, start, needed[i], _rows(buffer, start - needed[i][0], needed[i][1] - needed[i][0]), held
                )
                held[i] = needed[i]
            out = _rows(self.run[-1].out.moved(self.run[-1].out.tensor.narrow(0, image, 1)), *needed[-1])
            self._add(len(self.buffers), image, first, needed[-1], out, held)

    def _keep(self, i: int, held: tuple[int, int], needed: tuple[int, int]) -> int:
        """Move the rows that buffer ``i`` has already to its top. Returns the first row that is missing."""
        kept = held[1] - needed[0]
        if kept <= 0 or kept > needed[0] - held[0]:  # none, or they would overlap where they move to
            return held[1] if held == (needed[0], held[1]) and kept > 0 else needed[0]
        target, source = _rows(self.buffers[i], 0, kept), _rows(self.buffers[i], needed[0] - held[0], held[1] - held[0])
        loops = structs.Loops(inputs=1)
        size = target.tensor.numel() // kept * target.tensor.element_size()
        loops.size[:] = [1] * 4 + [kept, size]
        loops.out_stride[4:] = loops.in_stride[0][4:] = [size, 1]
        params = self.constants.keep(structs.Copy(loops, None, 0, 1))
        self.calls.append(PlannedStep(select("copy", params), params, (source,), target, self.run[i].node))
        return held[1]

    def _add(self, i: int, image: int, begin: int, needed: tuple[int, int], out: View, held) -> None:
        """Rows ``begin`` .. ``needed[1] - 1`` of step ``i``."""
        step, end = self.run[i], needed[1]
        if begin >= end:
            return
        first, last = _rows_under(step.params, begin, end)
        if i == 0:
            x = _rows(step.inputs[0].moved(step.inputs[0].tensor.narrow(0, image, 1)), first, last)
        else:
            x = _rows(self.buffers[i - 1], first - held[i - 1][0], last - held[i - 1][0])
        params = self.constants.keep(structs.Conv.from_buffer_copy(step.params))
        params.batch, params.in_size[1], params.out_size[1] = 1, last - first, end - begin
        params.pad_before[1] = first - (begin * params.stride[1] - params.pad_before[1])
        branches = (_rows(v.moved(v.tensor.narrow(0, image, 1)), begin, end) for v in step.inputs[1:])
        self.calls.append(PlannedStep(step.kernel, params, (x, *branches), out, step.node))


def _rows(view: View, begin: int, end: int) -> View:
    return view.moved(view.tensor.narrow(_HEIGHT, begin, end - begin))


def fill_tasks(banded: BandedSteps, fill) -> tuple[ctypes.Array, list]:
    """The tasks as C structs, and what they point to. ``fill(step, planned)`` writes one step."""
    tasks, kept = (structs.Task * len(banded.tasks))(), []
    for task, calls in zip(tasks, banded.tasks, strict=True):
        steps = (structs.Step * max(len(calls), 1))()
        for step, call in zip(steps, calls, strict=False):
            fill(step, call)
        task.steps, task.count = steps, len(calls)
        kept.append(steps)
    return tasks, kept
