"""The measured time of a product of matrices by an algorithm on this processor, for ``MultiplyInBlocks(cost=native_time)``.

>>> native_time(Dimensions(512, 512, 512), WINOGRAD) < native_time(Dimensions(512, 512, 512), NAIVE)             # doctest: +SKIP
False
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, fx

from fxcompress import numerics
from fxcompress.bilinear import BilinearAlgorithm
from fxcompress.block_products import Dimensions
from fxcompress.reference_bilinear import weight_sums
from fxcompress.shapes import trace_shapes

from .program import NativeProgram

ops = torch.ops.fxcompress
ROUNDS, WARM = 7, 2
_TIMES: dict[tuple, float] = {}  # by dimensions, name and size of the algorithm


def native_time(whole: Dimensions, algorithm: BilinearAlgorithm) -> float:
    """Nanoseconds of a layer of ``whole.n`` outputs, ``whole.m`` inputs and ``whole.p`` rows on one thread, its requantization included:
    the minimum of a few rounds on random codes. Measured once per process, shape and algorithm; a product of two activations
    is taken for a layer of its size, ``whole.count`` times.
    """
    key = (whole[:3], algorithm.name, algorithm.size)
    if key not in _TIMES:
        _TIMES[key] = _measured(whole, algorithm)
    return whole.count * _TIMES[key]


def _measured(whole: Dimensions, algorithm: BilinearAlgorithm) -> float:
    gm, x = _layer(whole, algorithm)
    plan = NativeProgram(gm, None, 1).plan(x)
    nanoseconds, times = (ctypes.c_int64 * len(plan.steps))(), []
    for _ in range(WARM + ROUNDS):
        plan.run([x], nanoseconds)
        times.append(sum(nanoseconds))
    return float(min(times[WARM:]))


def _layer(whole: Dimensions, algorithm: BilinearAlgorithm) -> tuple[fx.GraphModule, Tensor]:
    """A linear layer by the algorithm with random weights, requantized, and codes for it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (whole.n, whole.m), generator=generator).to(torch.int8)
    x = torch.randint(0, 256, (1, whole.p, whole.m), generator=generator).to(torch.uint8)
    factor = numerics.dyadic(torch.tensor(1 / (127 * whole.m**0.5), dtype=torch.float64), 6)
    bias, zero = torch.zeros(whole.n, dtype=torch.int32), torch.zeros((), dtype=torch.int32)
    root, graph = torch.nn.Module(), fx.Graph()

    def at(name: str, value: Tensor) -> fx.Node:
        root.register_buffer(name, value)
        return graph.get_attr(name)

    codes = graph.placeholder("x")
    if algorithm.products == 1:
        acc = graph.call_function(ops.linear.default, (codes, at("weight", weight), at("bias", bias)))
    else:
        sums = weight_sums(weight, algorithm.schedules[0], algorithm.size).to(torch.int16)
        programs = (at("encode", algorithm.schedules[1].tensor), at("decode", algorithm.schedules[2].tensor))
        arguments = (
            codes,
            at("no_zero", zero),
            at("sums", sums),
            at("bias", bias),
            *programs,
            list(algorithm.size),
            -1,
        )
        acc = graph.call_function(ops.bilinear_linear.default, arguments)
    scale = ([at("multiplier", factor.multiplier)], [at("shift", factor.right_shift)], [factor.left_shift])
    bounds = (at("zero_point", zero + 128), 6, at("lo", zero.clone()), at("hi", zero + 255))
    graph.output((graph.call_function(ops.requantize.default, ([acc], *scale, *bounds)),))
    gm = fx.GraphModule(root, graph)
    trace_shapes(gm, (x,))
    return gm, x
