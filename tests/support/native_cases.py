"""Random integer graphs around one operator, for comparing backends bit for bit.

    case = draw(conv_cases())
    case.graph, case.inputs

Every operator that produces accumulators comes raw, requantized, joined by further branches and followed by a table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor, fx

from fxcompress import numerics
from fxcompress import reference_normalization as normalization
from fxcompress.bilinear import STRASSEN, WINOGRAD
from fxcompress.reference_bilinear import weight_sums
from fxcompress.reference_kernels import linear_resize_tables

from .integer_graphs import codes, int32, integer_graph, ops, weights

aten = torch.ops.aten
#: Channel counts around the tiles of the kernels (4, 16, 32, 48, 64).
CHANNELS = st.sampled_from([1, 2, 3, 4, 5, 8, 15, 16, 17, 24, 31, 32, 33, 40, 47, 48, 49, 63, 64, 65, 72, 80, 96, 129])


@dataclass(frozen=True)
class Case:
    """A graph with the inputs it is run on. Prints as the calls of the graph."""

    graph: fx.GraphModule
    inputs: tuple[Tensor, ...]

    def __repr__(self) -> str:
        lines = [str(n.format_node()) for n in self.graph.graph.nodes if n.op == "call_function"]
        return f"Case({[tuple(i.shape) for i in self.inputs]}: " + "; ".join(lines) + ")"


@dataclass(frozen=True)
class Finish:
    """What happens to an accumulator: nothing (``branches`` 0), or a requantization of it and more branches."""

    branches: int
    per_channel: bool
    table: bool
    wide: bool  # the second branch is an accumulator, not codes
    first: bool  # the accumulator is the first branch, not the last
    seed: int


finishes = st.builds(
    Finish, st.integers(0, 4), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 10**6)
)


class _Graph:
    """Builds the module function and its constants side by side."""

    def __init__(self):
        self.constants: dict[str, Tensor] = {}

    def add(self, value: Tensor) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name


def finish_accumulator(graph: _Graph, how: Finish, shape: torch.Size, axis: int, bound: int):
    """A function (module, acc, x) -> result. ``x`` are codes shaped like the accumulator (further branches)."""
    if how.branches == 0:
        return lambda m, acc, x: acc
    generator = torch.Generator().manual_seed(how.seed)
    count = shape[axis] if how.per_channel else 1

    def along(value: Tensor) -> Tensor:
        return (
            value.reshape([-1] + [1] * (len(shape) - 1 - axis % len(shape))) if value.numel() > 1 else value.reshape(())
        )

    def random(lo: int, hi: int) -> Tensor:
        return along(torch.randint(lo, hi, (count,), generator=generator, dtype=torch.int64).to(torch.int32))

    guard = int(torch.randint(0, 7, (), generator=generator))
    names = []
    for i in range(how.branches):
        largest = bound if i == 0 or (how.wide and i == 1) else 255
        steps = torch.rand(count, generator=generator, dtype=torch.float64) * 300 + 1
        sign = torch.where(torch.rand(count, generator=generator) < 0.15, -1.0, 1.0)
        zero = torch.rand(count, generator=generator) > 0.05  # a dead channel now and then
        d = numerics.dyadic(along(steps * sign * zero / largest), guard)
        while (largest << d.left_shift) >= 1 << 30:  # what the proof demands
            d = numerics.dyadic(along(steps * sign * zero / largest / 2**guard), 0)
            if (largest << d.left_shift) >= 1 << 30:
                d = numerics.Dyadic(d.multiplier, d.right_shift, 0)
        names.append((graph.add(d.multiplier), graph.add(d.right_shift), d.left_shift, graph.add(random(0, 256))))
    zero_point, lo = graph.add(random(0, 256)), random(0, 200)
    lo_name, hi_name = graph.add(lo), graph.add(lo + random(0, 56))
    lut = graph.add(codes(256))
    return lambda m, acc, x: _requantized(m, acc, x, names, guard, zero_point, lo_name, hi_name, lut, how)


def _requantized(m, acc, x, names, guard, zero_point, lo, hi, lut, how: Finish):
    branches = [acc]
    for i, (_, _, _, zero) in enumerate(names[1:], start=1):
        source = x
        if i == 1 and how.wide:
            branches.append(ops.mul.default(source, getattr(m, zero), source, getattr(m, zero)))
        else:
            branches.append(ops.widen.default(source, getattr(m, zero)))
    order = list(range(len(names))) if how.first else [*range(1, len(names)), 0]
    y = ops.requantize.default(
        [branches[i] for i in order], [getattr(m, names[i][0]) for i in order], [getattr(m, names[i][1]) for i in order],
        [names[i][2] for i in order], getattr(m, zero_point), guard, getattr(m, lo), getattr(m, hi),
    )  # fmt: skip
    return ops.table.default(y, getattr(m, lut)) if how.table else y


def _case(graph: _Graph, produce, how: Finish, inputs: tuple[Tensor, ...], axis: int, bound: int) -> Case:
    """``produce(m, *inputs)`` is the accumulator; with further branches the last input feeds them."""
    shape = _forward(produce, len(inputs), graph, inputs)(*inputs)[0].shape
    finish = finish_accumulator(graph, how, shape, axis, bound)
    extra = (codes(*shape),) if how.branches > 1 else ()

    def whole(m, *tensors):
        others = tensors[len(inputs)] if extra else None
        return finish(m, produce(m, *tensors[: len(inputs)]), others)

    return Case(_forward(whole, len(inputs) + len(extra), graph, (*inputs, *extra)), (*inputs, *extra))


#: fx traces named parameters only.
_SIGNATURES = {
    1: lambda f: lambda m, a: f(m, a),
    2: lambda f: lambda m, a, b: f(m, a, b),
    3: lambda f: lambda m, a, b, c: f(m, a, b, c),
}


def _forward(function, count: int, graph: _Graph, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    return integer_graph(_SIGNATURES[count](function), graph.constants, *inputs)


def _spatial(draw, nd: int, lo: int, hi: int) -> list[int]:
    return draw(st.lists(st.integers(lo, hi), min_size=nd, max_size=nd))


@st.composite
def conv_cases(draw, depthwise: bool = False, transposed: bool = False) -> Case:
    """Any kernel, stride, dilation, padding, groups in 1..3 dimensions."""
    nd = draw(st.sampled_from([2, 2, 2, 1, 3]))
    kernel, stride, dilation = (
        _spatial(draw, nd, 1, 5 if nd < 3 else 2),
        _spatial(draw, nd, 1, 3),
        _spatial(draw, nd, 1, 2),
    )
    padding = draw(st.lists(st.integers(0, 2), min_size=2 * nd, max_size=2 * nd))
    size = [
        d * (k - 1) + 1 + e for d, k, e in zip(dilation, kernel, _spatial(draw, nd, 0, 9 if nd < 3 else 3), strict=True)
    ]
    if depthwise:
        groups, inputs, outputs = draw(CHANNELS), 1, 1
    else:
        groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
        inputs, outputs = draw(CHANNELS), draw(CHANNELS)
    batch, how, graph = draw(st.integers(1, 3)), draw(finishes), _Graph()
    x = codes(batch, groups * inputs, *size)
    bias = graph.add(codes(groups * outputs, lo=-9999, hi=9999, dtype=torch.int32)) if draw(st.booleans()) else None
    shape = (groups * inputs, outputs, *kernel) if transposed else (groups * outputs, inputs, *kernel)
    w = graph.add(weights(*shape))
    border = graph.add(
        codes(groups * inputs, dtype=torch.int32) if draw(st.booleans()) else int32(draw(st.integers(0, 255)))
    )
    bound = inputs * 5**nd * 255 * 127 + 9999
    if transposed:
        zero = graph.constants[border]
        graph.constants[border] = zero.reshape(-1, *[1] * nd) if zero.ndim else zero
        extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        padding = [min(p, d * (k - 1)) for p, (d, k) in zip(padding, ((d, k) for d, k in zip(dilation, kernel, strict=True) for _ in range(2)), strict=True)]  # fmt: skip

        def produce(m, a):
            b = None if bias is None else getattr(m, bias)
            return ops.conv_transpose.default(
                a, getattr(m, border), getattr(m, w), b, stride, padding, extra, dilation, groups
            )
    else:

        def produce(m, a):
            b = None if bias is None else getattr(m, bias)
            return ops.conv.default(a, getattr(m, w), b, stride, padding, dilation, groups, getattr(m, border))

    return _case(graph, produce, how, (x,), 1, bound)


@st.composite
def depthwise_image_cases(draw) -> Case:
    """Depthwise 3x3 and 5x5 over images up to two tiles of the kernels wide, with uneven borders."""
    kernel, stride, channels = draw(st.sampled_from([3, 5])), draw(st.integers(1, 2)), draw(CHANNELS)
    padding = draw(st.lists(st.integers(0, kernel), min_size=4, max_size=4))
    size = [draw(st.integers(kernel, 20)), draw(st.integers(kernel, 75))]
    how, graph = replace(draw(finishes), branches=draw(st.sampled_from([1, 1, 1, 0, 2]))), _Graph()
    w, border = graph.add(weights(channels, 1, kernel, kernel)), graph.add(codes(channels, dtype=torch.int32))

    def produce(m, a):
        return ops.conv.default(a, getattr(m, w), None, [stride] * 2, padding, [1, 1], channels, getattr(m, border))

    return _case(graph, produce, how, (codes(draw(st.integers(1, 2)), channels, *size),), 1, kernel**2 * 255 * 127)


@st.composite
def linear_cases(draw) -> Case:
    graph, how = _Graph(), draw(finishes)
    inputs, outputs = draw(CHANNELS), draw(CHANNELS)
    lead = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    w, b = graph.add(weights(outputs, inputs)), graph.add(codes(outputs, lo=-9999, hi=9999, dtype=torch.int32))
    x = codes(*lead, inputs)
    return _case(
        graph,
        lambda m, a: ops.linear.default(a, getattr(m, w), getattr(m, b)),
        how,
        (x,),
        -1,
        inputs * 255 * 127 + 9999,
    )


@st.composite
def matmul_cases(draw) -> Case:
    """Each operand as it is or transposed, at random or with the largest codes throughout."""
    graph, how = _Graph(), draw(finishes)
    rows, depth, columns = draw(st.integers(1, 40)), draw(CHANNELS | st.just(197)), draw(CHANNELS | st.just(197))
    batch = draw(st.lists(st.integers(1, 3), min_size=0, max_size=2))
    zero_points = st.sampled_from([0, 1, 127, 128, 129, 255])
    za, zb = graph.add(int32(draw(zero_points))), graph.add(int32(draw(zero_points)))
    swap_a, swap_b = draw(st.booleans()), draw(st.booleans())
    lowest = draw(st.sampled_from([0, 0, 255]))
    a = codes(2, *batch, *((depth, rows) if swap_a else (rows, depth)), lo=lowest)
    b = codes(2, *batch, *((columns, depth) if swap_b else (depth, columns)), lo=lowest)
    swapped = [*range(b.ndim - 2), b.ndim - 1, b.ndim - 2]

    def produce(m, x, y):
        x = aten.permute.default(x, swapped) if swap_a else x
        y = aten.permute.default(y, swapped) if swap_b else y
        return ops.matmul.default(x, getattr(m, za), y, getattr(m, zb))

    return _case(graph, produce, how, (a, b), -1, depth * 255 * 255)


@st.composite
def bilinear_linear_cases(draw) -> Case:
    """Layers in blocks, of images and of rows; exact and pruned algorithms of one to three levels; extreme operands."""
    graph, how = _Graph(), draw(finishes)
    algorithm = draw(
        st.sampled_from([STRASSEN, WINOGRAD, WINOGRAD.levels(2), STRASSEN.levels(3), WINOGRAD.without([1, 4])])
    )
    inputs, outputs = draw(CHANNELS), draw(CHANNELS)
    axis = draw(st.sampled_from([1, -1]))
    lead = draw(st.lists(st.integers(1, 9), min_size=1 if axis < 0 else 3, max_size=3))
    shape = (lead[0], inputs, *lead[1:]) if axis > 0 else (*lead, inputs)
    w = weights(outputs, inputs).sign() * 127 if draw(st.booleans()) else weights(outputs, inputs)
    sums, encode, decode = algorithm.schedules
    w = graph.add(weight_sums(w, sums, algorithm.size).to(torch.int16))
    e, d = graph.add(encode.tensor), graph.add(decode.tensor)
    z = graph.add(draw(st.sampled_from([int32(0), int32(255), codes(inputs, dtype=torch.int32)])))
    b = graph.add(codes(outputs, lo=-9999, hi=9999, dtype=torch.int32))
    x = codes(*shape, lo=draw(st.sampled_from([0, 0, 255])))

    def produce(m, a):
        a = ops.max_pool.default(a, [1, 1], [1, 1], [0, 0, 0, 0], [1, 1]) if axis > 0 and draw_pool else a
        return ops.bilinear_linear.default(
            a, getattr(m, z), getattr(m, w), getattr(m, b), getattr(m, e), getattr(m, d), algorithm.size, axis)  # fmt: skip

    draw_pool = draw(st.booleans())
    return _case(graph, produce, how, (x,), axis, 40 * inputs * 255 * 127 + 9999)


@st.composite
def bilinear_matmul_cases(draw) -> Case:
    """Sizes beside those of the tiles, either operand transposed, extreme codes."""
    graph, how = _Graph(), draw(finishes)
    algorithm = draw(st.sampled_from([STRASSEN, WINOGRAD, WINOGRAD.levels(2), WINOGRAD.without([1, 4])]))
    rows, depth, columns = (draw(st.integers(1, 19) | st.sampled_from([31, 33, 65, 129])) for _ in range(3))
    za, zb = (graph.add(int32(draw(st.sampled_from([0, 128, 255])))) for _ in range(2))
    batch, lowest = draw(st.lists(st.integers(1, 3), min_size=0, max_size=2)), draw(st.sampled_from([0, 0, 255]))
    swap_a, swap_b = draw(st.booleans()), draw(st.booleans())
    a = codes(2, *batch, *((depth, rows) if swap_a else (rows, depth)), lo=lowest)
    b = codes(2, *batch, *((columns, depth) if swap_b else (depth, columns)), lo=lowest)
    programs = [graph.add(s.tensor) for s in algorithm.schedules]
    swapped = [*range(b.ndim - 2), b.ndim - 1, b.ndim - 2]

    def produce(m, x, y):
        x = aten.permute.default(x, swapped) if swap_a else x
        y = aten.permute.default(y, swapped) if swap_b else y
        sums = (getattr(m, name) for name in programs)
        return ops.bilinear_matmul.default(
            x, getattr(m, za), y, getattr(m, zb), *sums, algorithm.size, algorithm.products
        )

    return _case(graph, produce, how, (a, b), -1, 20 * depth * 255 * 255)


#: Row lengths around the vectors (16, 32, 64) and the lookup tables (256) of the kernels.
ROWS = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 127, 128, 129, 197, 255, 256, 257, 400])


def _row_codes(draw, *shape: int) -> Tensor:
    """Random codes; now and then all alike, or close together."""
    spread = draw(st.sampled_from([255, 255, 255, 30, 1, 0]))
    lowest = draw(st.integers(0, 255 - spread))
    return codes(*shape, lo=lowest, hi=lowest + spread)


@st.composite
def softmax_cases(draw) -> Case:
    """Rows with and without a mask of any type, broadcast or not; some rows without any element."""
    graph, how = _Graph(), draw(finishes)
    shape = (draw(st.integers(1, 3)), 2, draw(st.integers(1, 3)), draw(ROWS))
    bits = draw(st.integers(15, normalization.exp_table_bits(shape[-1])))
    scale = draw(st.sampled_from([1e-4, 0.01, 0.05, 0.3, 3.0]))
    table = graph.add(normalization.exp_table(torch.tensor(scale).double(), bits))
    mask = None
    if draw(st.booleans()):
        dims = [1, *(n if draw(st.booleans()) else 1 for n in shape[1:])]  # a constant: no batch
        kept = torch.rand(dims) < draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
        value = kept.to(draw(st.sampled_from([torch.bool, torch.int32, torch.int64])))
        mask = graph.add(value if value.dtype == torch.bool else value << draw(st.integers(0, 30)))

    def produce(m, x):
        return ops.softmax.default(x, getattr(m, table), bits, None if mask is None else getattr(m, mask))

    return _case(graph, produce, how, (_row_codes(draw, *shape),), -1, 1 << normalization.PROBABILITY_BITS)


@st.composite
def layer_norm_cases(draw) -> Case:
    """Around the mean or a zero point; a constant second branch (the bias) or any others."""
    graph, how = _Graph(), draw(finishes)
    n = draw(ROWS)
    epsilon = draw(st.sampled_from([0, 1, 5, 10**6, 10**12]))
    bits = normalization.fraction_bits(n, epsilon)
    zero_point = graph.add(int32(draw(st.integers(0, 255)))) if draw(st.booleans()) else None
    x, bias = _row_codes(draw, draw(st.integers(1, 3)), draw(st.integers(1, 3)), n), codes(n)
    bound = 1 << 26

    def produce(m, a):
        return ops.layer_norm.default(a, None if zero_point is None else getattr(m, zero_point), epsilon, bits)

    if how.branches != 2 or draw(st.booleans()):
        return _case(graph, produce, how, (x,), -1, bound)
    finish = finish_accumulator(graph, how, x.shape, -1, bound)
    constant = graph.add(bias)
    return Case(_forward(lambda m, a: finish(m, produce(m, a), getattr(m, constant)), 1, graph, (x,)), (x,))


@st.composite
def elementwise_cases(draw) -> Case:
    """Products (with broadcast operands), widened and requantized codes."""
    graph, how = _Graph(), draw(finishes)
    shape = [draw(st.integers(1, 3)), draw(CHANNELS), *_spatial(draw, draw(st.integers(0, 2)), 1, 5)]
    za, zb = graph.add(int32(draw(st.integers(0, 255)))), graph.add(int32(draw(st.integers(0, 255))))
    if draw(st.booleans()):
        return _case(graph, lambda m, x: ops.widen.default(x, getattr(m, za)), how, (codes(*shape),), 1, 255)
    gate = [n if i < 2 or draw(st.booleans()) else 1 for i, n in enumerate(shape)]
    return _case(graph, lambda m, x, y: ops.mul.default(x, getattr(m, za), y, getattr(m, zb)), how, (codes(*shape), codes(*gate)), 1, 255 * 255)  # fmt: skip


@st.composite
def gate_cases(draw) -> Case:
    """Images times one factor per channel, channels innermost: the end of squeeze-and-excitation."""
    graph, how = _Graph(), draw(finishes)
    batch, channels, size = draw(st.integers(1, 3)), draw(CHANNELS), _spatial(draw, 2, 1, 6)
    za, zb = graph.add(int32(draw(st.integers(0, 255)))), graph.add(int32(draw(st.integers(0, 255))))

    def produce(m, x, y):  # pools over single elements: spatial operators, which want channels innermost
        x = ops.max_pool.default(x, [1, 1], [1, 1], [0, 0, 0, 0], [1, 1])
        return ops.mul.default(x, getattr(m, za), y, getattr(m, zb))

    return _case(graph, produce, how, (codes(batch, channels, *size), codes(batch, channels, 1, 1)), 1, 255 * 255)


@st.composite
def pooling_cases(draw) -> Case:
    """Sums over windows, adaptive windows and dimensions."""
    graph, how, nd = _Graph(), draw(finishes), draw(st.integers(1, 3))
    kernel, stride = _spatial(draw, nd, 1, 3), _spatial(draw, nd, 1, 3)
    padding = [draw(st.integers(0, k - 1)) for k in kernel for _ in range(2)]
    size = [k + e for k, e in zip(kernel, _spatial(draw, nd, 0, 6), strict=True)]
    x = codes(draw(st.integers(1, 3)), draw(CHANNELS), *size)
    z = graph.add(int32(draw(st.integers(0, 255))))
    kind = draw(st.sampled_from(["sum_pool", "adaptive", "sum", "sum_channels"]))
    if kind == "sum_pool":
        return _case(
            graph, lambda m, a: ops.sum_pool.default(a, getattr(m, z), kernel, stride, padding), how, (x,), 1, 255 * 27
        )
    if kind == "adaptive":
        outputs = [draw(st.integers(1, n)) for n in size]
        return _case(
            graph, lambda m, a: ops.adaptive_sum_pool.default(a, getattr(m, z), outputs), how, (x,), 1, 255 * 1000
        )
    dims = list(range(2, nd + 2)) if kind == "sum" else [1]
    keep = draw(st.booleans()) or kind != "sum"
    return _case(graph, lambda m, a: ops.sum.default(a, getattr(m, z), dims, keep), how, (x,), 1, 255 * 1000)


@st.composite
def resize_cases(draw) -> Case:
    graph, how, nd = _Graph(), draw(finishes), draw(st.integers(1, 2))
    size = _spatial(draw, nd, 1, 7)
    x, z = codes(draw(st.integers(1, 2)), draw(CHANNELS), *size), graph.add(int32(draw(st.integers(0, 255))))
    tables = [linear_resize_tables(n, draw(st.integers(1, 11)), draw(st.booleans()), None, 7) for n in size]
    names = [[graph.add(t[i]) for t in tables] for i in range(3)]

    def produce(m, a):
        return ops.resize.default(a, getattr(m, z), *([getattr(m, n) for n in group] for group in names), 7)

    return _case(graph, produce, how, (x,), 1, 255 << (7 * nd))


@st.composite
def selection_cases(draw) -> Case:
    """Codes in, codes out: maximum pools, padding, tables, movement and concatenations of all of these."""
    graph, nd = _Graph(), draw(st.integers(1, 2))
    kernel, stride, dilation = _spatial(draw, nd, 1, 3), _spatial(draw, nd, 1, 2), _spatial(draw, nd, 1, 2)
    padding = [draw(st.integers(0, k // 2)) for k in kernel for _ in range(2)]
    size = [d * (k - 1) + 2 + e for d, k, e in zip(dilation, kernel, _spatial(draw, nd, 0, 5), strict=True)]
    x, outputs = codes(draw(st.integers(1, 3)), draw(CHANNELS), *size), [draw(st.integers(1, n)) for n in size]
    lut, rows = graph.add(codes(256)), graph.add(codes(x.shape[1], 256))
    wide, border = (
        graph.add(codes(256, lo=-(10**6), hi=10**6, dtype=torch.int32)),
        graph.add(codes(x.shape[1], dtype=torch.int32)),
    )
    zero = graph.add(int32(3))
    index = graph.add(torch.randperm(x.shape[1]).to(torch.int32))
    pads = draw(st.lists(st.integers(-1, 2), min_size=2 * nd, max_size=2 * nd))
    dim, w = draw(st.integers(1, nd + 1)), graph.add(weights(5, x.shape[1] - x.shape[1] // 2, *[1] * nd))

    channels, pixels = x.shape[1], x[0, 0].numel()

    def function(m, a):
        shuffled = aten.index_select.default(ops.table.default(a, getattr(m, rows), 1), 1, getattr(m, index))
        half = aten.slice.Tensor(a, 1, channels // 2, channels)
        nested = aten.cat.default([ops.table.default(half, getattr(m, lut)), half], 1)
        flat = aten.reshape.default(a, [-1, channels, pixels])
        return (
            ops.max_pool.default(a, kernel, stride, padding, dilation),
            ops.adaptive_max_pool.default(a, outputs),
            ops.pad.default(a, pads, getattr(m, border)),
            ops.table.default(a, getattr(m, wide)),
            aten.cat.default([shuffled, ops.table.default(a, getattr(m, lut)), a, shuffled], dim),
            aten.cat.default([half, nested], 1),
            ops.conv.default(half, getattr(m, w), None, [1] * nd, [0] * 2 * nd, [1] * nd, 1, getattr(m, zero)),
            aten.permute.default(flat, [0, 2, 1]),
            aten.select.int(a, 1, 0),
        )

    return Case(integer_graph(function, graph.constants, x), (x,))
