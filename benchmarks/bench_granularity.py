"""What pruning of channels, kernels, N:M and single weights buys on a trained network, quantized to int8, without fine-tuning.

    python benchmarks/bench_granularity.py --limit 500
    python benchmarks/bench_granularity.py --network resnet20 --granularities 2:4 unstructured --json results/granularity.json

Top-1 of the int8 network (statistics measured again on the calibration images), MACs that are executed and those by weights that are not
zero, bytes of the saved weights, and the time of all steps of one sample, the least of some turns, one thread.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import harness
import real_models
import torch

import fxcompress
from fxcompress.errors import OptionError

#: (granularity, ratio); None: the pattern's.
PLANS = (
    ("channels", 0.0), ("channels", 0.3), ("kernels", 0.2), ("kernels", 0.4), ("2:4", None), ("1:4", None),
    ("unstructured", 0.5), ("unstructured", 0.7), ("unstructured", 0.8), ("unstructured", 0.9),
)  # fmt: skip


@dataclass
class Row:
    granularity: str
    ratio: float
    criterion: str
    top1: float
    macs: int
    nonzero_macs: int
    stored_bytes: int
    microseconds: float


def measure(workload: real_models.Workload, granularity: str, ratio: float | None, turns: int, **options) -> Row:
    data = workload.calibration.float()
    chosen = options if ratio == 0 else {"pruning_granularity": granularity} | options
    if ratio:
        chosen["pruning_ratio"] = ratio
    net = fxcompress.compile(workload.model, example_inputs=data[:1], calibration_data=list(data.split(32)), input_range=workload.input_range,
                             input_normalization=workload.normalization, **chosen)  # fmt: skip
    report = net.report()
    pruning, program = report.pruning, net._executables[0].program
    spent = min(sum(program.time_steps(data[:1])) for _ in range(turns)) / 1e3
    used = pruning.nonzero_macs[1] if pruning and pruning.sparse else report.macs
    return Row(granularity, pruning.saved if pruning else 0.0, pruning.criterion if pruning else "", workload.metric(workload.outputs(net)),
               report.macs, used, report.stored_bytes, spent)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet56", choices=("resnet20", "resnet56"))
    parser.add_argument("--granularities", nargs="+", help="default: all")
    parser.add_argument("--criteria", nargs="+", default=[None], help="of weights; default: magnitude")
    parser.add_argument("--limit", type=int, default=500, help="test images")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(harness.describe_machine(), "", sep="\n")
    workload = real_models.load(args.network).reported(args.limit)
    print(f"{args.network}, {len(workload.labels)} images")
    print(
        f"{'granularity':>14s} {'removed':>8s} {'criterion':>13s} {'top-1':>6s} {'MACs':>12s} {'not by zero':>12s} {'bytes':>9s} {'us':>8s}"
    )
    rows = []
    for granularity, ratio in PLANS:
        if args.granularities and granularity not in args.granularities and ratio != 0:
            continue
        for criterion in args.criteria if granularity != "channels" else [None]:
            options = {} if criterion is None else {"pruning_criterion": criterion}
            try:
                row = measure(workload, granularity, ratio, args.turns, **options)
            except OptionError as error:
                print(f"{granularity} {ratio}: {error}", flush=True)
                continue
            rows.append(row)
            print(f"{row.granularity:>14s} {row.ratio:8.1%} {row.criterion:>13s} {row.top1:6.1f} {row.macs:12,d} {row.nonzero_macs:12,d} "
                  f"{row.stored_bytes:9,d} {row.microseconds:8.1f}", flush=True)  # fmt: skip
    if args.json:
        harness.write_json(args.json, "granularity", [asdict(row) for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
