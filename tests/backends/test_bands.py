"""Convolutions in bands of rows: the bits of the reference, smaller arenas, every row between two layers computed once per task."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fxcompress.backends.native import NativeBackend
from fxcompress.backends.native import program as native_program
from fxcompress.backends.native.bands import BandedSteps, in_bands
from fxcompress.backends.reference import ReferenceBackend
from tests.support.integer_graphs import codes, int32, integer_graph, ops, weights


def chain_graph(layers, x, residual):
    """Convolutions (outputs, kernel, stride, padding, dilation, depthwise) with their requantizations, one after the other; with
    ``residual`` the second input joins the last one."""
    constants = {"z": int32(5), "lo": int32(0), "hi": int32(255), "m": int32(20000), "p": int32(9), "q": int32(0)}
    channels, plan = x.shape[1], []
    for i, (outputs, kernel, stride, padding, dilation, depthwise) in enumerate(layers):
        outputs = channels if depthwise else outputs
        constants[f"w{i}"] = weights(outputs, 1 if depthwise else channels, kernel, kernel)
        plan.append((f"w{i}", [stride] * 2, padding, [dilation] * 2, channels if depthwise else 1))
        channels = outputs

    def forward(m, a, b):
        b = ops.max_pool.default(b, [1, 1], [1, 1], [0] * 4, [1, 1])  # channels innermost before the first layer runs
        for i, (name, stride, padding, dilation, groups) in enumerate(plan):
            acc = ops.conv.default(a, getattr(m, name), None, stride, padding, dilation, groups, m.z)
            branches, last = [acc], residual and i == len(plan) - 1
            if last:
                branches.append(ops.widen.default(b, m.z))
            n = len(branches)
            a = ops.requantize.default(branches, [m.m] * n, [m.p, m.q][:n], [0, 0][:n], m.z, 6, m.lo, m.hi)
        return a

    def shape(a):
        for outputs, kernel, stride, padding, dilation, depthwise in layers:
            size = [
                (n + p + q - dilation * (kernel - 1) - 1) // stride + 1
                for n, p, q in zip(a[2:], padding[0::2], padding[1::2], strict=True)
            ]
            a = (a[0], a[1] if depthwise else outputs, *size)
        return a

    other = codes(*shape(x.shape))
    return integer_graph(forward, constants, x, other), (x, other)


@st.composite
def chains(draw):
    layers, size = [], [draw(st.integers(1, 20)), draw(st.integers(1, 12))]
    for _ in range(draw(st.integers(2, 4))):
        kernel, stride, dilation = (
            draw(st.sampled_from([1, 1, 3, 3, 5])),
            draw(st.integers(1, 2)),
            draw(st.integers(1, 2)),
        )
        padding = [draw(st.integers(0, 2)) for _ in range(4)]
        grown = [
            n + p + q - dilation * (kernel - 1) - 1 for n, p, q in zip(size, padding[0::2], padding[1::2], strict=True)
        ]
        if min(grown) < 0:
            kernel, grown = 1, [n + p + q - 1 for n, p, q in zip(size, padding[0::2], padding[1::2], strict=True)]
        layers.append((draw(st.sampled_from([3, 16, 33, 70])), kernel, stride, padding, dilation, draw(st.booleans())))
        size = [n // stride + 1 for n in grown]
    x = codes(draw(st.integers(1, 3)), draw(st.sampled_from([4, 16, 65])), *_first_size(layers, size))
    return (
        *chain_graph(layers, x, draw(st.booleans())),
        draw(st.sampled_from([1, 200, 2000, 20000])),
        draw(st.integers(1, 4)),
    )


def _first_size(layers, size):
    """The input size from which ``layers`` lead to at least ``size``."""
    for _, kernel, stride, padding, dilation, _ in reversed(layers):
        size = [
            max((n - 1) * stride + dilation * (kernel - 1) + 1 - p - q, 1)
            for n, p, q in zip(size, padding[0::2], padding[1::2], strict=True)
        ]
    return size


def lowered(gm, budget, threads, prefer=None):
    def with_budget(steps, constants, count):
        return in_bands(steps, constants, count, budget)

    original, native_program.in_bands = native_program.in_bands, with_budget
    try:
        return NativeBackend(prefer=prefer, num_threads=threads).lower(gm)
    finally:
        native_program.in_bands = original


@given(chains())
def test_bands_compute_the_same_bits(case):
    gm, inputs, budget, threads = case
    program = lowered(gm, budget, threads)
    expected = ReferenceBackend().lower(gm).run(*inputs)
    plan = program.plan(*inputs)
    assert torch.equal(plan.run([i.contiguous() for i in inputs])[0], expected[0])
    assert plan.memory.lower_bound <= plan.memory.bytes <= 1.2 * plan.memory.lower_bound + 4096


EXPAND, DEPTHWISE, PROJECT = (48, 1, 1, [0] * 4, 1, False), (0, 3, 1, [1] * 4, 1, True), (8, 1, 1, [0] * 4, 1, False)


def inverted_bottleneck(threads, budget=8000, batch=1):
    gm, inputs = chain_graph([EXPAND, DEPTHWISE, PROJECT], codes(batch, 8, 40, 20), residual=True)
    program = lowered(gm, budget, threads)
    return program, program.plan(*inputs), inputs


def banded(plan):
    return [step for step in plan.steps if isinstance(step, BandedSteps)]


def test_an_inverted_bottleneck_is_one_step_of_a_small_arena():
    _, plan, _ = inverted_bottleneck(1)
    _, whole, _ = inverted_bottleneck(1, budget=1 << 30)
    assert len(banded(plan)) == 1 and len(plan.steps) == len(whole.steps) - 2
    assert not banded(whole)
    assert whole.memory.bytes - plan.memory.bytes >= 40 * 20 * 48  # the expanded image is never there at once


def test_rows_between_two_layers_are_computed_once_per_task():
    for threads in (1, 3):
        _, plan, _ = inverted_bottleneck(threads)
        (step,) = banded(plan)
        assert len(step.tasks) == threads
        for layer, halo in zip(step.steps, (2, 0, 0), strict=True):
            calls = [c for task in step.tasks for c in task if c.node is layer.node and c.kernel.op == "conv"]
            assert sum(c.params.out_size[1] for c in calls) == 40 + halo * (threads - 1)


def test_a_tensor_with_two_readers_stays_whole():
    constants = {"w": weights(16, 16, 1, 1), "z": int32(5), "hi": int32(255), "m": int32(20000), "p": int32(9)}

    def forward(m, x):
        for _ in range(2):
            acc = ops.conv.default(x, m.w, None, [1, 1], [0] * 4, [1, 1], 1, m.z)
            x = ops.requantize.default([acc], [m.m], [m.p], [0], m.z, 6, m.z, m.hi)
        y = ops.conv.default(x, m.w, None, [1, 1], [0] * 4, [1, 1], 1, m.z)
        return y, x

    x = codes(1, 16, 12, 12)
    gm = integer_graph(forward, constants, x)
    program = lowered(gm, 1, 1)
    (step,) = banded(program.plan(x))
    assert len(step.steps) == 2  # the second layer's output is also a result: the third runs by itself
    for found, wanted in zip(program.run(x), ReferenceBackend().lower(gm).run(x), strict=True):
        assert torch.equal(found, wanted)
