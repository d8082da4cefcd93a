"""Layers by Strassen's and Winograd's algorithms: multiplications, additions, operand bits, bytes and native time beside the definition.

    python benchmarks/bench_bilinear.py                                       # every shape, one thread, every instruction set with kernels
    python benchmarks/bench_bilinear.py --isas avx2 --shapes square --levels 1 2 3 --json results/bilinear.json
    python benchmarks/bench_bilinear.py --convolutions                        # 3x3 convolutions in tiles instead
    python benchmarks/bench_bilinear.py --activations                         # products of two activations instead

Times are minima over turns in which the definition and all algorithms run one after the other, each on the kernels of the same
instruction set, requantization included; results are compared bit for bit before. "definition" is the int8 layer. Of a convolution in tiles
everything counts: gathering tiles, products, scattering results and dividing them.
"""

from __future__ import annotations

import argparse
import ctypes
from dataclasses import asdict, dataclass
from pathlib import Path

import harness
import torch
from bench_kernels import Layer, codes, conv_graph, requantized

from fxcompress.backends.native import NativeBackend
from fxcompress.backends.native.kernels import kernel_table
from fxcompress.block_products import block_products
from fxcompress.graph import copy_graph_module
from fxcompress.options import CompileOptions, Context
from fxcompress.passes import ConvolveInTiles, MultiplyInBlocks
from fxcompress.shapes import propagate

ops = torch.ops.fxcompress
ALGORITHMS, TILES = ("strassen", "winograd"), ("winograd2", "winograd4")


@dataclass(frozen=True)
class Shape:
    """A linear layer or 1x1 convolution over ``rows`` pixels or tokens."""

    network: str
    rows: int
    inputs: int
    outputs: int

    @property
    def name(self) -> str:
        return f"{self.network} {self.rows} x {self.inputs} -> {self.outputs}"

    @property
    def multiplications(self) -> int:
        return self.rows * self.weights

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    def variants(self, gm, levels: list[int]) -> dict[tuple[str, int], torch.fx.GraphModule]:
        """The layer by every algorithm that its pass does not refuse."""
        found = {(name, level): in_blocks(gm, name, level) for name in ALGORITHMS for level in levels}
        return {key: blocked for key, blocked in found.items() if blocked is not None}

    def graph(self):
        buffers = {
            "w": codes(self.outputs, self.inputs, lo=-127, hi=127, dtype=torch.int8),
            "b": codes(self.outputs, lo=-9999, hi=9999, dtype=torch.int32),
        }  # fmt: skip
        return requantized(lambda at, x: (ops.linear.default, (x, at("w"), at("b"))), buffers, 1 / self.inputs**0.5 / 127,
                           codes(1, self.rows, self.inputs))  # fmt: skip


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution of ``size`` x ``size`` pixels."""

    network: str
    size: int
    inputs: int
    outputs: int

    @property
    def name(self) -> str:
        return f"{self.network} 3x3 {self.size}x{self.size} {self.inputs} -> {self.outputs}"

    @property
    def multiplications(self) -> int:
        return self.size**2 * self.weights

    @property
    def weights(self) -> int:
        return 9 * self.inputs * self.outputs

    def variants(self, gm, levels: list[int]) -> dict[tuple[str, int], torch.fx.GraphModule]:
        found = {(name, 1): in_tiles(gm, name) for name in TILES}
        return {key: tiled for key, tiled in found.items() if tiled is not None}

    def graph(self):
        return conv_graph(Layer(self.network, self.size, self.inputs, self.outputs, 3))


@dataclass(frozen=True)
class Activations:
    """``count`` products of an activation (rows x depth) with another (depth x columns): attention."""

    network: str
    count: int
    rows: int
    depth: int
    columns: int
    weights = 0

    @property
    def name(self) -> str:
        return f"{self.network} {self.count} x {self.rows} x {self.depth} x {self.columns}"

    @property
    def multiplications(self) -> int:
        return self.count * self.rows * self.depth * self.columns

    def variants(self, gm, levels: list[int]) -> dict[tuple[str, int], torch.fx.GraphModule]:
        found = {(name, level): in_blocks(gm, name, level) for name in ALGORITHMS for level in levels}
        return {key: blocked for key, blocked in found.items() if blocked is not None}

    def graph(self):
        a, b = codes(1, self.count, self.rows, self.depth), codes(1, self.count, self.depth, self.columns)
        return requantized(
            lambda at, x, y: (ops.matmul.default, (x, at("z"), y, at("z"))), {}, 1 / self.depth**0.5 / 128, a, b
        )


ACTIVATIONS = (
    Activations("vit_b", 12, 197, 64, 197), Activations("vit_b", 12, 197, 197, 64), Activations("bert_b", 12, 128, 64, 128),
    Activations("square", 1, 256, 256, 256), Activations("square", 1, 512, 512, 512), Activations("square", 1, 1024, 1024, 1024),
)  # fmt: skip
CONVOLUTIONS = (
    Convolution("resnet20", 32, 16, 16), Convolution("resnet20", 16, 32, 32), Convolution("resnet20", 8, 64, 64),
    Convolution("resnet50", 56, 64, 64), Convolution("resnet50", 28, 128, 128), Convolution("resnet50", 14, 256, 256),
    Convolution("resnet50", 7, 512, 512),
)  # fmt: skip
SHAPES = (
    Shape("resnet50", 3136, 64, 256), Shape("resnet50", 3136, 256, 64), Shape("resnet50", 784, 512, 128),
    Shape("resnet50", 196, 1024, 256), Shape("resnet50", 196, 256, 1024), Shape("resnet50", 49, 2048, 512),
    Shape("mobilenetv2", 784, 192, 64), Shape("mobilenetv2", 196, 96, 576), Shape("mobilenetv2", 49, 320, 1280),
    Shape("vit_b", 197, 768, 768), Shape("vit_b", 197, 768, 3072), Shape("vit_b", 197, 3072, 768), Shape("bert_b", 128, 768, 768),
    Shape("square", 256, 256, 256), Shape("square", 512, 512, 512), Shape("square", 1024, 1024, 1024), Shape("square", 2048, 2048, 2048),
)  # fmt: skip


@dataclass
class Result:
    """One algorithm on one shape. ``ratio``: its time to that of the definition on the same instruction set."""

    shape: str
    isa: str
    algorithm: str
    levels: int
    multiplications: int
    additions: int
    operand_bits: tuple[int, int]
    weight_bytes: int
    microseconds: float
    ratio: float


def in_blocks(gm: torch.fx.GraphModule, algorithm: str, levels: int) -> torch.fx.GraphModule | None:
    """The layer by an algorithm, None where the pass refuses."""
    gm = copy_graph_module(gm)
    gm.meta["fxcompress"] = Context(CompileOptions.build(matmul_algorithm=algorithm, matmul_levels=levels))
    rule = MultiplyInBlocks(least=2)
    plan = rule.plan(gm)
    if not plan.matches or plan.matches[0].data.size != (2**levels,) * 3:
        return None
    gm = rule.apply(plan).graph_module
    propagate(gm)
    return gm


def in_tiles(gm: torch.fx.GraphModule, algorithm: str) -> torch.fx.GraphModule | None:
    """The convolution by an algorithm, None where the pass refuses."""
    gm = copy_graph_module(gm)
    gm.meta["fxcompress"] = Context(CompileOptions.build(conv_algorithm=algorithm))
    plan = ConvolveInTiles().plan(gm)
    if not plan.matches:
        return None
    gm = ConvolveInTiles().apply(plan).graph_module
    propagate(gm)
    return gm


def plan_of(gm, isa: str, inputs, expected):
    """The native plan on the kernels of ``isa``, every step of which is of the layer."""
    program = NativeBackend(isa, 1).lower(gm)
    if not torch.equal(program.run(*inputs)[0], expected):
        raise AssertionError(f"{isa} computes something else")
    return program.plan(*inputs)


def measure(shape: Shape | Activations | Convolution, isa: str, levels: list[int], turns: int) -> list[Result]:
    gm, inputs = shape.graph()
    expected = NativeBackend(None, 1).lower(gm).run(*inputs)[0]
    graphs = shape.variants(gm, levels)
    plans = {key: plan_of(g, isa, inputs, expected) for key, g in {("definition", 0): gm, **graphs}.items()}
    best = dict.fromkeys(plans, float("inf"))
    for _ in range(turns):
        for key, plan in plans.items():
            nanoseconds = (ctypes.c_int64 * len(plan.steps))()
            plan.run(list(inputs), nanoseconds)
            best[key] = min(best[key], sum(nanoseconds))
    plain = best["definition", 0]
    whole, weights = shape.multiplications, shape.weights
    results = [Result(shape.name, isa, "definition", 0, whole, 0, (8, 8), weights, plain / 1e3, 1.0)]
    for (name, level), g in graphs.items():
        (b,) = block_products(g)
        time = best[name, level]
        results.append(Result(shape.name, isa, name, level, b.multiplications, b.additions, tuple(b.operand_bits), b.weight_bytes,
                              time / 1e3, time / plain))  # fmt: skip
    return results


def main(arguments: list[str] | None = None) -> int:
    available = [
        row.isa for row in kernel_table() if row.op == "bilinear_linear" and row.available and row.isa != "scalar"
    ]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--isas", nargs="+", default=available, help=f"instruction sets (default: {' '.join(available)})"
    )
    parser.add_argument("--shapes", nargs="+", help="networks whose shapes to run (default: all)")
    parser.add_argument("--levels", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--convolutions", action="store_true", help="3x3 convolutions in tiles")
    parser.add_argument("--activations", action="store_true", help="products of two activations")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    head = f"{'rows x K -> O':34s} {'on':11s} {'algorithm':11s} {'levels':>6s} {'products':>15s} {'additions':>12s} {'bits':>6s} {'weight':>12s}"
    print(harness.describe_machine(), "", f"{head} {'us':>10s} {'ratio':>6s}", sep="\n")
    results = []
    for shape in CONVOLUTIONS if args.convolutions else ACTIVATIONS if args.activations else SHAPES:
        if args.shapes and shape.network not in args.shapes:
            continue
        for isa in args.isas:
            for r in measure(shape, isa, args.levels, args.turns):
                results.append(r)
                bits = "x".join(map(str, r.operand_bits))
                print(f"{r.shape:34s} {r.isa:11s} {r.algorithm:11s} {r.levels:6d} {r.multiplications:15,} {r.additions:12,} {bits:>6s} "
                      f"{r.weight_bytes:12,} {r.microseconds:10.1f} {r.ratio:6.2f}", flush=True)  # fmt: skip
    if args.json:
        harness.write_json(args.json, "bilinear", [asdict(r) for r in results])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
