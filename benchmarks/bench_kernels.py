"""Every kernel row over layer shapes of real networks: products (of softmax and layer norm: elements) per nanosecond and percent of the
vpdpbusd peak, one thread.

    python benchmarks/bench_kernels.py                                   # every row this processor has
    python benchmarks/bench_kernels.py --isas amx avx512vnni --layers resnet50 --json results/kernels.json

Rows take turns, layer by layer, in one process; a figure is the minimum over the turns. Before it is timed, a row's result is
compared with the portable kernel's. The peak is measured between the turns, so that both saw the same machine.
"""

from __future__ import annotations

import argparse
import ctypes
from dataclasses import asdict, dataclass
from pathlib import Path

import harness
import torch
from bench_models import peak_gmacs

from fxcompress import numerics
from fxcompress import reference_normalization as normalization
from fxcompress.backends.native import NativeBackend
from fxcompress.backends.native.kernels import kernel_table
from fxcompress.shapes import trace_shapes

ops = torch.ops.fxcompress


@dataclass(frozen=True)
class Layer:
    """A convolution with its fused requantization; ``residual``: joined by codes, as at the end of a residual block."""

    network: str
    size: int
    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    residual: bool = False

    @property
    def name(self) -> str:
        kind = "dw" if self.groups > 1 else ""
        return f"{self.network} {kind}{self.kernel}x{self.kernel}/{self.stride} {self.size}x{self.size} {self.inputs}->{self.outputs}"

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    op = "conv"

    @property
    def work(self) -> int:
        """Products."""
        return self.out_size**2 * self.outputs * self.inputs // self.groups * self.kernel**2

    def graph(self) -> tuple[torch.fx.GraphModule, tuple[torch.Tensor, ...]]:
        return conv_graph(self)


@dataclass(frozen=True)
class Upsampling:
    """A transposed convolution with its fused requantization: one convolution per phase of the stride, and their copies."""

    network: str
    size: int
    inputs: int
    outputs: int
    kernel: int
    stride: int = 2
    padding: int = 0
    op = "conv"

    @property
    def name(self) -> str:
        return f"{self.network} up{self.kernel}x{self.kernel}/{self.stride} {self.size}x{self.size} {self.inputs}->{self.outputs}"

    @property
    def work(self) -> int:
        """Products of input elements and weights, border included."""
        return self.size**2 * self.outputs * self.inputs * self.kernel**2

    def graph(self) -> tuple[torch.fx.GraphModule, tuple[torch.Tensor, ...]]:
        taps = self.inputs * self.kernel**2 / self.stride**2
        weight = codes(self.inputs, self.outputs, self.kernel, self.kernel, lo=-127, hi=127, dtype=torch.int8)
        geometry = ([self.stride] * 2, [self.padding] * 4, [0, 0], [1, 1], 1)
        return requantized(
            lambda at, x: (ops.conv_transpose.default, (x, at("z"), at("w"), None, *geometry)), {"w": weight}, 128 / taps**0.5 / 127 / 128,
            codes(1, self.inputs, self.size, self.size),
        )  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """A step of an attention block with its fused requantization: "scores" (q k^T), "mix" (p v), "softmax", "layer_norm"."""

    network: str
    step: str
    heads: int
    tokens: int
    depth: int

    @property
    def name(self) -> str:
        return f"{self.network} {self.step} {self.heads}x{self.tokens} {self.depth}"

    @property
    def op(self) -> str:
        return "matmul" if self.step in ("scores", "mix") else self.step

    @property
    def work(self) -> int:
        """Products; elements of rows."""
        if self.op == "matmul":
            return self.heads * self.tokens**2 * self.depth
        return self.heads * self.tokens * (self.tokens if self.step == "softmax" else self.depth)

    def graph(self) -> tuple[torch.fx.GraphModule, tuple[torch.Tensor, ...]]:
        tokens = codes(1, self.tokens, self.heads, self.depth)  # a head is a slice of the channels
        scores = codes(1, self.heads, self.tokens, self.tokens)
        swap = torch.ops.aten.permute.default
        if self.step == "scores":
            return requantized(
                lambda at, q, k: (ops.matmul.default, (at(swap, q, [0, 2, 1, 3]), at("z"), at(swap, k, [0, 2, 3, 1]), at("z"))),
                {}, 1 / self.depth**0.5 / 128, tokens, tokens)  # fmt: skip
        if self.step == "mix":
            return requantized(
                lambda at, p, v: (ops.matmul.default, (p, at("z"), at(swap, v, [0, 2, 1, 3]), at("z"))),
                {}, 1 / self.tokens**0.5 / 128, scores, tokens)  # fmt: skip
        if self.step == "softmax":
            bits = normalization.exp_table_bits(self.tokens)
            table = normalization.exp_table(torch.tensor(0.05, dtype=torch.float64), bits)
            return requantized(lambda at, x: (ops.softmax.default, (x, at("t"), bits)), {"t": table}, 2.0**-16, scores)
        bits = normalization.fraction_bits(self.depth, 1)
        return requantized(lambda at, x: (ops.layer_norm.default, (x, None, 1, bits)), {}, 40 / 2.0**bits,
                           codes(self.heads, self.tokens, self.depth))  # fmt: skip


def depthwise(network: str, size: int, channels: int, kernel: int = 3, stride: int = 1) -> Layer:
    return Layer(network, size, channels, channels, kernel, stride, channels)


LAYERS = (
    Layer("resnet50", 224, 3, 64, 7, 2), Layer("resnet50", 56, 64, 64), Layer("resnet50", 56, 64, 64, 3),
    Layer("resnet50", 56, 64, 256, residual=True), Layer("resnet50", 56, 256, 128), Layer("resnet50", 56, 128, 128, 3, 2),
    Layer("resnet50", 28, 128, 128, 3), Layer("resnet50", 28, 128, 512, residual=True), Layer("resnet50", 14, 256, 256, 3),
    Layer("resnet50", 14, 1024, 256), Layer("resnet50", 14, 256, 1024, residual=True), Layer("resnet50", 7, 512, 512, 3),
    Layer("resnet50", 7, 2048, 512), Layer("resnet50", 7, 512, 2048, residual=True), Layer("resnet50", 1, 2048, 1000),
    Layer("mobilenetv2", 224, 3, 32, 3, 2), depthwise("mobilenetv2", 112, 32), Layer("mobilenetv2", 112, 32, 16),
    Layer("mobilenetv2", 112, 16, 96), depthwise("mobilenetv2", 112, 96, 3, 2), Layer("mobilenetv2", 56, 96, 24),
    Layer("mobilenetv2", 56, 24, 144), depthwise("mobilenetv2", 56, 144), Layer("mobilenetv2", 56, 144, 24, residual=True),
    depthwise("mobilenetv2", 28, 192), Layer("mobilenetv2", 28, 192, 32, residual=True), Layer("mobilenetv2", 28, 32, 192),
    depthwise("mobilenetv2", 14, 384), Layer("mobilenetv2", 14, 384, 64, residual=True), Layer("mobilenetv2", 14, 64, 384),
    Layer("mobilenetv2", 14, 96, 576), depthwise("mobilenetv2", 14, 576, 3, 2), Layer("mobilenetv2", 7, 160, 960),
    depthwise("mobilenetv2", 7, 960), Layer("mobilenetv2", 7, 960, 160, residual=True), Layer("mobilenetv2", 7, 320, 1280),
    depthwise("efficientnet_b0", 28, 240, 5), depthwise("efficientnet_b0", 14, 672, 5), depthwise("efficientnet_b0", 14, 672, 5, 2),
    depthwise("efficientnet_b0", 7, 1152, 5), Layer("efficientnet_b0", 28, 40, 240), Layer("efficientnet_b0", 14, 112, 672),
    Layer("efficientnet_b0", 7, 1152, 192, residual=True), Layer("resnet20", 32, 16, 16, 3, residual=True),
    Layer("resnet20", 16, 32, 32, 3), Layer("resnet20", 8, 64, 64, 3, residual=True),
    Upsampling("unet", 32, 256, 128, 2), Upsampling("unet", 64, 128, 64, 2), Upsampling("dcgan", 16, 256, 128, 4, 2, 1),
    *(Attention("vit_b", step, 12, 197, 64) for step in ("scores", "mix", "softmax")), Attention("vit_b", "layer_norm", 1, 197, 768),
    *(Attention("bert_b", step, 12, 128, 64) for step in ("scores", "mix", "softmax")), Attention("bert_b", "layer_norm", 1, 128, 768),
    *(Attention("minilm", step, 12, 128, 32) for step in ("scores", "mix", "softmax")), Attention("minilm", "layer_norm", 1, 128, 384),
)  # fmt: skip


def codes(*shape: int, lo: int = 0, hi: int = 255, dtype=torch.uint8) -> torch.Tensor:
    """Random codes, the same on every call."""
    return torch.randint(lo, hi + 1, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def requantized(produce, constants: dict[str, torch.Tensor], multiplier: float, *inputs: torch.Tensor):
    """The graph of one operator whose result is requantized. ``produce(at, *inputs)``: the operator and its arguments, ``at(name)`` being
    a constant and ``at(operator, ...)`` a call."""
    main = numerics.dyadic(torch.tensor(multiplier, dtype=torch.float64), 6)
    buffers = constants | {
        "z": torch.tensor(128, dtype=torch.int32), "lo": torch.tensor(0, dtype=torch.int32),
        "hi": torch.tensor(255, dtype=torch.int32), "m": main.multiplier, "p": main.right_shift,
    }  # fmt: skip
    graph = torch.fx.Graph()

    def at(what, *arguments):
        return graph.call_function(what, arguments) if arguments else graph.get_attr(what)

    acc = graph.call_function(*produce(at, *(graph.placeholder(f"x{i}") for i in range(len(inputs)))))
    end = ([at("m")], [at("p")], [main.left_shift], at("z"), 6, at("lo"), at("hi"))
    graph.output((graph.call_function(ops.requantize.default, ([acc], *end)),))
    root = torch.nn.Module()
    for name, value in buffers.items():
        root.register_buffer(name, value)
    gm = torch.fx.GraphModule(root, graph)
    trace_shapes(gm, inputs)
    return gm, inputs


def conv_graph(layer: Layer) -> tuple[torch.fx.GraphModule, tuple[torch.Tensor, ...]]:
    """The integer graph of one convolution and random codes for it."""
    depth = layer.inputs // layer.groups
    multiplier = 128 / (depth * layer.kernel**2) ** 0.5 / 127 / 128
    main, other = (numerics.dyadic(torch.tensor(v, dtype=torch.float64), 6) for v in (multiplier, 0.5))
    buffers = {
        "w": codes(layer.outputs, depth, layer.kernel, layer.kernel, lo=-127, hi=127, dtype=torch.int8),
        "b": codes(layer.outputs, lo=-9999, hi=9999, dtype=torch.int32), "z": torch.tensor(128, dtype=torch.int32),
        "lo": torch.tensor(0, dtype=torch.int32), "hi": torch.tensor(255, dtype=torch.int32),
        "m": main.multiplier, "p": main.right_shift, "m2": other.multiplier, "p2": other.right_shift,
    }  # fmt: skip
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    inputs = [codes(1, layer.inputs, layer.size, layer.size)]
    at = {name: graph.get_attr(name) for name in buffers}
    pad, stride = [layer.kernel // 2] * 4, [layer.stride] * 2
    acc = graph.call_function(ops.conv.default, (x, at["w"], at["b"], stride, pad, [1, 1], layer.groups, at["z"]))
    branches, multipliers, shifts = [acc], [at["m"]], [at["p"]]
    lefts = [main.left_shift]
    if layer.residual:
        inputs.append(codes(1, layer.outputs, layer.out_size, layer.out_size))
        branches.append(graph.call_function(ops.widen.default, (graph.placeholder("r"), at["z"])))
        multipliers, shifts, lefts = [*multipliers, at["m2"]], [*shifts, at["p2"]], [*lefts, other.left_shift]
    y = graph.call_function(
        ops.requantize.default, (branches, multipliers, shifts, lefts, at["z"], 6, at["lo"], at["hi"])
    )
    graph.output((y,))
    root = torch.nn.Module()
    for name, value in buffers.items():
        root.register_buffer(name, value)
    gm = torch.fx.GraphModule(root, graph)
    trace_shapes(gm, inputs)
    return gm, tuple(inputs)


@dataclass
class Result:
    layer: str
    kernel: str
    microseconds: float
    per_nanosecond: float  # products, or elements of rows
    percent_of_peak: float | None


def own_steps(plan, op: str) -> list[int]:
    """The steps that compute a layer: its kernels, and the copies between them."""
    kernels = [i for i, s in enumerate(plan.steps) if s.kernel.op == op]
    return (
        [i for i, s in enumerate(plan.steps) if i >= kernels[0] and s.out.buffer.external is None]
        if len(kernels) > 1
        else kernels
    )


def time_layer(layer, isas: set[str] | None, turns: int) -> list[Result]:
    """Every row that accepts the layer, in turns."""
    gm, inputs = layer.graph()
    expected = NativeBackend("scalar", 1).lower(gm).run(*inputs)
    plans = {}
    for row in kernel_table():
        if row.op != layer.op or not row.available or (isas and row.isa not in isas):
            continue
        program = NativeBackend(row.name, 1).lower(gm)
        if not torch.equal(program.run(*inputs)[0], expected[0]):
            raise AssertionError(f"{row.name} computes something else for {layer.name}")
        plan = program.plan(*inputs)
        steps = own_steps(plan, layer.op)
        if plan.steps[steps[0]].kernel == row:
            plans[row.name] = (plan, steps)
    best = dict.fromkeys(plans, float("inf"))
    peak = 0.0
    for _ in range(turns):
        for name, (plan, steps) in plans.items():
            nanoseconds = (ctypes.c_int64 * len(plan.steps))()
            plan.run(list(inputs), nanoseconds)
            best[name] = min(best[name], sum(nanoseconds[i] for i in steps))
        peak = max(peak, peak_gmacs(0.002))
    products = layer.op in ("conv", "matmul")
    return [
        Result(layer.name, n, t / 1e3, layer.work / t, 100 * layer.work / t / peak if products else None)
        for n, t in best.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isas", nargs="+", help="instruction sets (default: all)")
    parser.add_argument("--layers", nargs="+", help="networks whose layers to run (default: all)")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    print(
        harness.describe_machine(),
        "",
        f"{'layer':44s} {'kernel':38s} {'us':>10s} {'G/s':>8s} {'of peak':>8s}",
        sep="\n",
    )
    results = []
    for layer in LAYERS:
        if args.layers and layer.network not in args.layers:
            continue
        for result in time_layer(layer, set(args.isas) if args.isas else None, args.turns):
            results.append(result)
            print(f"{result.layer:44s} {result.kernel:38s} {result.microseconds:10.1f} {result.per_nanosecond:8.1f} "
                  + ("" if result.percent_of_peak is None else f"{result.percent_of_peak:6.0f} %"), flush=True)  # fmt: skip
    if args.json:
        harness.write_json(args.json, "kernels", [asdict(r) for r in results])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
