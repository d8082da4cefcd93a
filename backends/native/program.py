"""``NativeProgram``: an integer graph as flat programs for the kernel library, one per set of input shapes."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from fxcompress.errors import InputError
from fxcompress.graph import placeholders

from . import structs
from .bands import BandedSteps, fill_tasks, in_bands
from .constants import Constants, aligned_empty
from .kernels import kernel_library
from .memory_plan import MemoryPlan, align, plan_memory
from .packing import PackedWeights
from .planner import PlannedStep, Planner
from .views import Buffer, Uses, View

_FIXED, _ARENA, _EXTERNAL = 0, 1, 2  # spaces of fxc_operand
_RESERVED = 64  # bytes at the start of the arena: the counters of bad values
_OVER_READ = 64  # bytes a kernel may read past an activation
_TIMING_SECONDS = 0.3
_KEPT_PLANS = 8  # shapes whose plans are remembered; packed weights are shared by all


def _one_sample(value: Tensor) -> Tensor:
    """A meta tensor like ``value`` with its symbolic dimensions (the batch) 1."""
    shape = [d if isinstance(d, int) else 1 for d in value.shape]
    return torch.empty(shape, dtype=value.dtype, device="meta")


class NativePlan:
    """Steps, arena and constants for one set of input shapes. ``run`` is safe from several Python threads.

    Attributes:
        steps: the planned steps, in order.
        memory: bytes of the arena's activations, and their lower bound.
        arena_bytes: activations, scratch of every thread and room for over-reads.
    """

    def __init__(self, planner: Planner, threads: int):
        self.steps: list[PlannedStep | BandedSteps] = in_bands(planner.steps, planner.constants, threads)
        self.constants: Constants = planner.constants
        self.memory = _plan_arena(planner, self.steps)
        self.threads = threads
        scratch = align(max((s.kernel.scratch_bytes(s.params) for s in _calls(self.steps)), default=0))
        scratch_offset = align(self.memory.bytes + _OVER_READ)
        self.arena_bytes = scratch_offset + scratch * threads
        self._output_specs = [(v.shape, v.dtype) for v in planner.outputs]
        steps = (structs.Step * max(len(self.steps), 1))()
        self._tasks: list = []  # what the steps point to
        for step, planned in zip(steps, self.steps, strict=False):
            if isinstance(planned, BandedSteps):
                step.inputs, step.units = 0, threads
                tasks, kept = fill_tasks(planned, _fill_step)
                step.params = ctypes.addressof(tasks)
                self._tasks += [tasks, kept]
            else:
                _fill_step(step, planned)
        self._steps = steps
        self._program = structs.Program(steps, len(self.steps), 0, scratch_offset, scratch, self.arena_bytes)
        self.idle_arenas: list = []  # list.append and list.pop are atomic

    def run(self, inputs: list[Tensor], nanoseconds=None) -> tuple[Tensor, ...]:
        """Outputs from contiguous inputs of the shapes and dtypes this plan was made for."""
        outputs = tuple(torch.empty(shape, dtype=dtype) for shape, dtype in self._output_specs)
        external = (ctypes.c_void_p * (len(inputs) + len(outputs)))(*(t.data_ptr() for t in (*inputs, *outputs)))
        try:
            arena = self.idle_arenas.pop()
        except IndexError:
            arena = aligned_empty(self.arena_bytes)
        bad = (ctypes.c_int32 * 2).from_address(arena.ctypes.data)
        bad[0] = bad[1] = 0
        kernel_library().fxc_run_program(self._program, arena.ctypes.data, external, self.threads, nanoseconds)
        nans, indices = bad
        self.idle_arenas.append(arena)
        if nans or indices:
            _refuse(nans, indices, sum(t.numel() for t in inputs))
        return outputs


def _refuse(nans: int, indices: int, values: int) -> None:
    """Raise for what the kernels counted."""
    if nans:
        raise InputError(
            f"{nans} of {values} values are NaN", stage="quantize", remedy="Clean the input: NaN has no code."
        )
    raise InputError(f"{indices} of {values} indices are outside the embedding table", stage="embedding",
                     remedy="Pass indices from 0 to the number of rows - 1.")  # fmt: skip


def _calls(steps: list[PlannedStep | BandedSteps]) -> Iterator[PlannedStep]:
    """Every kernel call."""
    for step in steps:
        yield from itertools.chain.from_iterable(step.tasks) if isinstance(step, BandedSteps) else (step,)


def _plan_arena(planner: Planner, steps: list[PlannedStep | BandedSteps]) -> MemoryPlan:
    uses = Uses()
    for i, step in enumerate(steps):
        for call in _calls([step]):
            for view in (call.out, *call.inputs):
                if view.buffer not in planner.counters.values():
                    uses.touch(view.buffer, i)
    return plan_memory(uses, _RESERVED)


def _fill_step(step: structs.Step, planned: PlannedStep) -> None:
    step.run = planned.kernel.c.run
    step.params = ctypes.addressof(planned.params)
    step.units = planned.kernel.units(planned.params)
    step.inputs = len(planned.inputs)
    step.out = _operand(planned.out)
    for i, view in enumerate(planned.inputs):
        step.inp[i] = _operand(view)


def _operand(view: View) -> structs.Operand:
    buffer: Buffer = view.buffer
    if buffer.fixed is not None:
        return structs.Operand(buffer.fixed + view.byte_offset, space=_FIXED)
    if buffer.external is not None:
        return structs.Operand(view.byte_offset, space=_EXTERNAL + buffer.external)
    return structs.Operand(buffer.offset + view.byte_offset, buffer.offset, buffer.bytes, _ARENA)


class NativeProgram:
    """Runs an integer graph with one library call per inference.

    Weights are packed once; a new batch size costs a new plan (a fraction of a second), which is remembered.
    """

    def __init__(self, gm: fx.GraphModule, prefer: str | None = None, num_threads: int | None = None):
        self._gm, self._prefer, self._num_threads = gm, prefer, num_threads
        self._packed = PackedWeights()
        self._plans: OrderedDict[tuple, NativePlan] = OrderedDict()
        self._lock = threading.Lock()
        self._floats = [n.meta["val"].is_floating_point() for n in placeholders(gm)]
        self._samples = [_one_sample(n.meta["val"]) for n in placeholders(gm)]
        self.plan(*self._samples)  # what cannot be planned is refused now

    @property
    def packed_bytes(self) -> int:
        """Weights in the layouts of the kernels, all batch sizes together."""
        return self._packed.bytes

    def resources(self) -> dict:
        """For one sample: threads, bytes (arena; activations beside their lower bound; packed weights), kernel per step."""
        plan = self.plan(*self._samples)
        return {
            "threads": plan.threads,
            "arena_bytes": plan.arena_bytes,
            "activation_bytes": plan.memory.bytes,
            "activation_bytes_lower_bound": plan.memory.lower_bound,
            "packed_weight_bytes": self.packed_bytes,
            "steps": [{"node": step.node.name, "kernel": step.kernel.name} for step in plan.steps],
        }

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        tensors = self._prepare(inputs)
        return self.plan(*tensors).run(tensors)

    def time_steps(self, *inputs: Tensor) -> list[int]:
        """Nanoseconds of every step, the least of many runs; with several threads, of the first, its waits included."""
        tensors = self._prepare(inputs)
        plan = self.plan(*tensors)
        spent = (ctypes.c_int64 * max(len(plan.steps), 1))()
        plan.run(tensors)  # cold caches are not what is asked for
        least, end = None, time.perf_counter() + _TIMING_SECONDS
        while least is None or time.perf_counter() < end:
            plan.run(tensors, spent)
            least = list(spent) if least is None else list(map(min, least, spent))
        return least[: len(plan.steps)]

    def plan(self, *inputs: Tensor) -> NativePlan:
        """The plan for inputs of these shapes, made on first use."""
        threads = self._num_threads or torch.get_num_threads()
        key = (threads, *(tuple(t.shape) for t in inputs))
        plan = self._plans.get(key)
        if plan is None:
            with self._lock:
                metas = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in inputs]
                plan = self._plans[key] = NativePlan(Planner(self._gm, metas, self._packed, self._prefer), threads)
                if len(self._plans) > _KEPT_PLANS:
                    self._plans.popitem(last=False)
        return plan

    def _prepare(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Contiguous inputs; the boundary computes in float32."""
        return [(x.float() if is_float else x).contiguous() for x, is_float in zip(inputs, self._floats, strict=True)]
