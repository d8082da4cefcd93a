"""Does the table of kernel times predict what whole pruned networks take? Predicted and measured time of the same layers.

    python benchmarks/bench_latency.py                                   # ResNet-56, 32 pixels; EfficientNet-B0, 224 pixels
    python benchmarks/bench_latency.py --networks resnet56_cifar10 --ratios 0.2 0.4 --table times.json

Every network is pruned by a share of its predicted latency and of its MACs, compiled, and run: one sample, one thread, weights of the
architecture's initialization. Networks take turns, the least time of each counts. Also printed: the correlation of predicted
and measured time over all versions of a network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import harness
import numpy as np
import torch
from pytorchcv.model_provider import get_model

import fxcompress
from fxcompress import CompiledModule, LatencyTable
from fxcompress.analysis.channel_groups import ChannelGroups
from fxcompress.errors import OptionError
from fxcompress.options import CompileOptions
from fxcompress.passes import PruneChannels
from fxcompress.pruning.api import Prepared
from fxcompress.pruning.costs import nothing
from fxcompress.pruning.latency import Latency

SIZES = {"resnet56_cifar10": 32, "efficientnet_b0": 224}


@dataclass
class Row:
    network: str
    measure: str
    ratio: float
    macs: int
    predicted_us: float
    measured_us: float = float("inf")


def versions(name: str, ratios: list[float], table: LatencyTable) -> Iterator[tuple[Row, CompiledModule, torch.Tensor]]:
    """The network and every pruned one. All are predicted from the times of the whole network's grid."""
    torch.manual_seed(0)
    model, x = get_model(name).eval(), torch.rand(1, 3, SIZES[name], SIZES[name])
    groups = ChannelGroups(Prepared(model, x, CompileOptions.build()).graph_module)
    latency = Latency(groups, table)
    for measure, ratio in [("macs", 0.0), *((m, r) for m in ("latency", "macs") for r in ratios)]:
        removed, small = nothing(groups), model
        if ratio:
            table_option = {"latency_table": table} if measure == "latency" else {}
            options = {"pruning_ratio": ratio, "pruning_measure": measure} | table_option
            removed = PruneChannels().choose(groups, CompileOptions.build(**options), ratio).removed
            try:
                small = fxcompress.prune(model, x, **options)
            except OptionError as error:
                print(f"{name}, {ratio:.0%} of the {measure}: {error}", flush=True)
                continue
        compiled = fxcompress.compile(small, example_inputs=x, input_range=(0, 1))
        yield Row(name, measure, ratio, compiled.report().macs, latency.without(removed) / 1e3), compiled, x


def measure(candidates: list[tuple[Row, CompiledModule, torch.Tensor]], turns: int) -> None:
    """All steps of one inference, pooling and the boundary among them."""
    for _ in range(turns):
        for row, compiled, x in candidates:
            row.measured_us = min(row.measured_us, sum(compiled._executables[0].program.time_steps(x)) / 1e3)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.15, 0.3, 0.45])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--table", type=Path, help="file of the latency table, read and completed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(harness.describe_machine(), "", sep="\n")
    table = LatencyTable.load(args.table) if args.table and args.table.exists() else LatencyTable()
    rows: list[Row] = []
    for name in args.networks:
        start = time.perf_counter()
        candidates = list(versions(name, args.ratios, table))
        if args.table:
            table.save(args.table)
        print(
            f"{name}: {len(table.times)} shapes in the table, {time.perf_counter() - start:.0f} s to measure, prune and compile"
        )
        measure(candidates, args.turns)
        found = [row for row, _, _ in candidates]
        whole = found[0]
        print(
            f"{'asked for':>20s} {'MACs':>12s} {'predicted us':>13s} {'saved':>7s} {'measured us':>12s} {'saved':>7s}"
        )
        for row in found:
            print(f"{f'{row.ratio:.0%} of {row.measure}':>20s} {row.macs:12,d} {row.predicted_us:13.1f} "
                  f"{1 - row.predicted_us / whole.predicted_us:7.1%} {row.measured_us:12.1f} "
                  f"{1 - row.measured_us / whole.measured_us:7.1%}")  # fmt: skip
        pairs = np.array([(row.predicted_us, row.measured_us) for row in found])
        print(f"correlation of predicted and measured time: {np.corrcoef(pairs.T)[0, 1]:.3f}\n", flush=True)
        rows += found
    if args.json:
        harness.write_json(args.json, "latency", [asdict(row) for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
