"""What one layer takes on this machine: the integer kernel of the native backend, alone, on a shape.

    time_layer(LayerShape("conv", 64, 64, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1)))       # nanoseconds of one sample

The layer ends in the rounding to codes that is fused into its kernel. Codes and weights are random: kernels take the same time for any.
"""

from __future__ import annotations

import ctypes
import math
import platform
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx

from .. import numerics
from ..dialects import LINEAR, MATMUL, TRANSPOSED_CONVOLUTIONS
from ..graph import argument, is_call, one_sample_shape, per_dimension
from ..shapes import trace_shapes

ops = torch.ops.fxcompress
#: Operator of a step of the native backend that computes it; the others of a timed graph move its input and output.
KERNELS = {"conv": "conv", "conv_transpose": "conv", "linear": "conv", "matmul": "matmul"}
SECONDS, RUNS = 0.01, 5  # a layer runs for at least as long, and as often; the least time counts


@dataclass(frozen=True)
class LayerShape:
    """What decides the time of a kernel, for one sample.

    Attributes:
        operator: "conv", "conv_transpose", "linear", or "matmul" (``inputs`` is then the depth, ``outputs`` the columns).
        inputs, outputs: channels, all groups together.
        size: of the input: spatial dimensions; rows of a linear layer; (batch, rows) of a product.
        kernel, stride, padding, dilation, output_padding: one number per spatial dimension; () where there are none.
    """

    operator: str
    inputs: int
    outputs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of(cls, node: fx.Node) -> LayerShape:
        """That of a convolution, linear layer or product of activations in a float graph."""
        size = one_sample_shape(node.args[0])
        if is_call(node, MATMUL):
            return cls("matmul", size[-1], one_sample_shape(node)[-1], (math.prod(size[:-2]), size[-2]))
        if node.target is LINEAR:
            return cls("linear", size[-1], one_sample_shape(node)[-1], (math.prod(size[:-1]),))
        transposed = is_call(node, *TRANSPOSED_CONVOLUTIONS)
        kernel = tuple(node.args[1].meta["val"].shape[2:])
        names = ("stride", "padding", "dilation", "output_padding") if transposed else ("stride", "padding", "dilation")
        geometry = {name: tuple(per_dimension(argument(node, name), len(kernel))) for name in names}
        return cls("conv_transpose" if transposed else "conv", size[1], one_sample_shape(node)[1], tuple(size[2:]), kernel,
                   groups=argument(node, "groups"), **geometry)  # fmt: skip

    def resized(self, inputs: int, outputs: int, groups: int | None = None) -> LayerShape:
        return replace(self, inputs=inputs, outputs=outputs, groups=self.groups if groups is None else groups)


def time_layer(shape: LayerShape) -> float:
    """Nanoseconds of the kernel of one layer, the least of many runs. Raises ``BackendError`` without the native backend."""
    from ..backends.native import NativeBackend

    gm, inputs = layer_graph(shape)
    plan = NativeBackend().lower(gm).plan(*inputs)
    spent = (ctypes.c_int64 * len(plan.steps))()
    ours = _own_steps(plan, KERNELS[shape.operator])
    plan.run(list(inputs))
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < RUNS or time.perf_counter() < end:
        plan.run(list(inputs), spent)
        times.append(sum(spent[i] for i in ours))
    return float(min(times))


def this_machine() -> str:
    """Processor, instruction sets of its kernels and threads: what a time depends on besides the shape."""
    from ..backends.native.kernels import kernel_table

    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    processor = found[1].strip() if found else platform.processor() or platform.machine()
    isas = sorted({row.isa for row in kernel_table() if row.available} - {"scalar", "float"})
    return f"{processor}, {' '.join(isas) or 'scalar'}, {torch.get_num_threads()} threads"


def layer_graph(shape: LayerShape) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The integer graph of one layer with its rounding, and random codes for it."""
    graph, root = fx.Graph(), torch.nn.Module()
    main = numerics.dyadic(torch.tensor(2**-10, dtype=torch.float64), 6)
    zero, lo, hi = (torch.tensor(v, dtype=torch.int32) for v in (128, 0, 255))
    constants = {"zero": zero, "lo": lo, "hi": hi, "multiplier": main.multiplier, "shift": main.right_shift}
    inputs, weights = _operands(shape)
    for name, value in (constants | weights).items():
        root.register_buffer(name, value)
    xs = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    at = {name: graph.get_attr(name) for name in constants | weights}
    acc = graph.call_function(*_call(shape, xs, at))
    end = ([acc], [at["multiplier"]], [at["shift"]], [main.left_shift], at["zero"], 6, at["lo"], at["hi"])
    graph.output((graph.call_function(ops.requantize.default, end),))
    gm = fx.GraphModule(root, graph)
    trace_shapes(gm, inputs)
    return gm, inputs


def _operands(shape: LayerShape) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    if shape.operator == "matmul":
        batch, rows = shape.size
        return (_codes(1, batch, rows, shape.inputs), _codes(1, batch, shape.inputs, shape.outputs)), {}
    bias = torch.zeros(shape.outputs, dtype=torch.int32)
    if shape.operator == "linear":
        return (_codes(*shape.size, shape.inputs),), {"weight": _weights(shape.outputs, shape.inputs), "bias": bias}
    dims = (shape.inputs, shape.outputs // shape.groups) if shape.operator == "conv_transpose" else (
        shape.outputs, shape.inputs // shape.groups)  # fmt: skip
    return (_codes(1, shape.inputs, *shape.size),), {"weight": _weights(*dims, *shape.kernel), "bias": bias}


def _call(shape: LayerShape, xs: list[fx.Node], at: dict[str, fx.Node]) -> tuple:
    """The integer operator and its arguments."""
    sides, around = [side for p in shape.padding for side in (p, p)], (list(shape.stride), list(shape.dilation))
    if shape.operator == "matmul":
        return ops.matmul.default, (xs[0], at["zero"], xs[1], at["zero"])
    if shape.operator == "linear":
        return ops.linear.default, (xs[0], at["weight"], at["bias"])
    if shape.operator == "conv":
        return ops.conv.default, (
            xs[0],
            at["weight"],
            at["bias"],
            around[0],
            sides,
            around[1],
            shape.groups,
            at["zero"],
        )
    return ops.conv_transpose.default, (xs[0], at["zero"], at["weight"], at["bias"], around[0], sides,
                                        list(shape.output_padding), around[1], shape.groups)  # fmt: skip


def _own_steps(plan, op: str) -> list[int]:
    """The steps that compute the layer: its kernels, and the copies between them."""
    kernels = [i for i, step in enumerate(plan.steps) if step.kernel.op == op]
    if not kernels:
        raise RuntimeError(f"no step of {[step.kernel.op for step in plan.steps]} is a {op}")
    return list(range(kernels[0], kernels[-1] + 1))


def _codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def _weights(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(1)).to(torch.int8)
