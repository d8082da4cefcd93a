"""Structured pruning: which models of a whole zoo shrink, and what pruning a real network costs.

    python benchmarks/bench_pruning.py --breadth                        # every family of zoo.py without 30 % of its MACs
    python benchmarks/bench_pruning.py --breadth --only resnet dla --fresh
    python benchmarks/bench_pruning.py --breadth --table                # the table of the results so far
    python benchmarks/bench_pruning.py --criteria                       # ResNet-56 on CIFAR-10, no fine-tuning

**Breadth.** Every model is pruned in a process of its own under a time limit; rows are appended to a file of JSON lines and families
that have one are not run again. "difference" is the largest of the outputs, relative and in float64, between the smaller network and
*the user's own module* whose weights are zeroed where the report says (without ``pruning_correction``, which would improve on it). Where
the module computes a layer's weight from others, the captured graph stands for it.
Status: "pruned"; "refused", an error that fxcompress raises on purpose, with its text; "WRONG", a difference above 1e-6; "FAILED",
anything else. Exit status 1 when the whole zoo misses the target.

**Criteria.** Accuracy on ``cifar10_test_a`` after 75, 85 and 90 % of the parameters are gone, statistics measured again on 256
training images, no training.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path

import bench_coverage
import harness
import torch
import zoo
from torch import nn

PRUNED, REFUSED, WRONG, FAILED = "pruned", "refused", "WRONG", "FAILED"
RATIO, LARGEST_DIFFERENCE, MIN_PRUNED = 0.3, 1e-6, 112
MEMORY_BYTES = 14 << 30
RESULTS = harness.ROOT / "benchmarks" / "results" / "pruning.jsonl"
SHARES, TEST_IMAGES = (0.75, 0.85, 0.9), 5000


# ------------------------------------------------------------------------------------------------------------ breadth


def measure(family: str) -> dict:
    """The row of one family, in this process. Nothing is raised: an exception is part of the row."""
    import fxcompress
    from fxcompress.errors import UserError

    entry = zoo.load(family)
    row = {"family": family, "model": entry.name, "input": list(entry.shape)}
    start = time.perf_counter()
    try:
        small = fxcompress.prune(entry.model, entry.images(1, seed=1), pruning_ratio=RATIO, pruning_correction=None)
        report = small.meta["pruning"]
        row |= {"seconds": time.perf_counter() - start, "macs": report.macs, "parameters": report.parameters}
        row |= {"groups": len(report.groups), "units": sum(g["units"] for g in report.groups)}
        row["difference"] = difference(entry.model, small, entry.images(2, seed=2).double())
        row["status"] = PRUNED if row["difference"] <= LARGEST_DIFFERENCE else WRONG
    except Exception as error:
        own = isinstance(error, UserError)
        row |= {"status": REFUSED if own else FAILED, "error": type(error).__name__, "reason": str(error)}
        row |= {"seconds": time.perf_counter() - start, "traceback": traceback.format_exc()}
    return row


@torch.no_grad()
def difference(model: nn.Module, small: nn.Module, images: torch.Tensor) -> float:
    """Of the smaller network from the model with the removed channels zeroed; ``model`` is changed."""
    import fxcompress
    from fxcompress.promises import relative_change

    zeroed = [cut for cut in small.meta["pruning"].slices if cut["writes"]]
    if any(cut["target"] not in model.state_dict() for cut in zeroed):
        model = fxcompress.prune(model, images.float(), pruning_ratio=0)
    state = dict(model.double().state_dict())
    for cut in zeroed:
        state[cut["target"]].index_fill_(cut["axis"], torch.tensor(cut["indices"]), 0)
    return relative_change(bench_coverage.outputs(model(images)), bench_coverage.outputs(small.double()(images)))


def in_own_process(family: str, limit: float) -> dict:
    row = {"family": family, "model": zoo.FAMILIES[family], "status": FAILED}
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", family], capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return row | {"error": "TimeoutExpired", "reason": f"no result after {limit:.0f} s"}
    if done.returncode:
        return row | {
            "error": f"exit status {done.returncode}",
            "reason": " ".join(done.stderr.strip().splitlines()[-1:]),
        }
    return json.loads(done.stdout.splitlines()[-1])


def run(families: Iterable[str], path: Path, limit: float) -> None:
    """Measure the families and append their rows to ``path`` as they come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for family in families:
            row = in_own_process(family, limit)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(line(row), flush=True)


HEADER = f"{'family':<22} {'model':<34} {'seconds':>7}  {'status':<8} {'MACs left':>9} {'parameters left':>15} {'difference':>10}  reason"


def line(row: dict) -> str:
    cells = cell(row)
    reason = " ".join(f"{row['error']}: {row['reason']}".split())[:200] if "error" in row else ""
    return f"{row['family']:<22} {row['model']:<34} {cells[0]:>7}  {row['status']:<8} {cells[1]:>9} {cells[2]:>15} {cells[3]:>10}  {reason}".rstrip()


def cell(row: dict) -> list[str]:
    """Seconds, share of MACs and parameters left, difference."""
    shares = [f"{row[key][1] / row[key][0]:.1%}" if key in row else "-" for key in ("macs", "parameters")]
    seconds = f"{row['seconds']:.1f}" if "seconds" in row else "-"
    return [seconds, *shares, f"{row['difference']:.1e}" if "difference" in row else "-"]


def table(rows: dict[str, dict]) -> str:
    """Every family that has a row or is left out, and why some are refused, in Markdown."""
    lines = [
        "| family | model | result | seconds | MACs left | parameters left | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in sorted(rows | zoo.LEFT_OUT):
        if family in zoo.LEFT_OUT:
            lines.append(f"| {family} | - | left out: {zoo.LEFT_OUT[family]} | - | - | - | - |")
        else:
            lines.append(
                f"| {' | '.join([family, rows[family]['model'], rows[family]['status'], *cell(rows[family])])} |"
            )
    refused = [f"- {f}: {' '.join(row['reason'].split())}" for f, row in sorted(rows.items()) if "reason" in row]
    return "\n".join([*lines, *(["", "Why not:", "", *refused] if refused else [])])


def breadth(args: argparse.Namespace) -> int:
    families = args.only or list(zoo.FAMILIES)
    if not args.table:
        done = {} if args.fresh else bench_coverage.read(args.results)
        print(harness.describe_machine(), HEADER, sep="\n\n", flush=True)
        run([f for f in families if f not in done], args.results, args.limit)
    rows = {f: row for f, row in sorted(bench_coverage.read(args.results).items()) if f in families}
    if args.table:
        print(table(rows), end="\n\n")
    counts = {
        status: sum(row["status"] == status for row in rows.values()) for status in (PRUNED, REFUSED, WRONG, FAILED)
    }
    print(f"{len(rows)} families: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    met = counts[PRUNED] >= MIN_PRUNED and not counts[WRONG] and not counts[FAILED]
    return int(len(rows) == len(zoo.FAMILIES) and not met)


# ----------------------------------------------------------------------------------------------------------- criteria


def criteria(args: argparse.Namespace) -> int:
    """The accuracy of ResNet-56 by criterion, as a Markdown table."""
    import real_models

    from fxcompress.pruning.criteria import CRITERIA

    workload = real_models.load("resnet56").reported(args.images)
    print(harness.describe_machine(), end="\n\n", flush=True)
    print(
        f"| criterion | {' | '.join(f'{share:.0%} removed' for share in args.shares)} |\n"
        + "|---" * (len(args.shares) + 1)
        + "|"
    )
    for name in args.only or CRITERIA:
        cells = [f"{accuracy(workload, name, share, args):.2f}" for share in args.shares]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


def accuracy(workload, criterion: str, share: float, args: argparse.Namespace) -> float:
    """Top-1 in percent without ``share`` of the parameters."""
    import fxcompress

    data = workload.normalized(workload.calibration.float())
    small = fxcompress.prune(
        workload.model, data[:1], pruning_ratio=share, pruning_measure="parameters", pruning_criterion=criterion,
        pruning_budget=args.budget, pruning_correction=args.correction, round_to=1, calibration_data=data.split(128),
    )  # fmt: skip
    return workload.metric(workload.outputs(lambda x: small(workload.normalized(x))))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--breadth", action="store_true", help="every family of the zoo")
    parser.add_argument("--criteria", action="store_true", help="ResNet-56 by criterion")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these families, or criteria, only")
    parser.add_argument("--limit", type=float, default=600, help="seconds per model")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="file of JSON lines, default benchmarks/results/pruning.jsonl"
    )
    parser.add_argument("--fresh", action="store_true", help="run families again that have a row")
    parser.add_argument(
        "--table", action="store_true", help="only print the table of the results there are, in Markdown"
    )
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the parameters to remove")
    parser.add_argument("--budget", default="global", help="global, uniform or importance")
    parser.add_argument(
        "--correction", default="measured", type=lambda v: None if v == "none" else v, help="measured, analytic or none"
    )
    parser.add_argument("--images", type=int, default=TEST_IMAGES, help="of the test set")
    parser.add_argument("--measure", choices=list(zoo.FAMILIES), metavar="FAMILY", help="one family, here, as JSON")
    args = parser.parse_args(arguments)
    if args.measure:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        warnings.filterwarnings("ignore")
        print(json.dumps(measure(args.measure)))
        return 0
    if not (args.breadth or args.criteria):
        parser.error("--breadth or --criteria?")
    return (breadth(args) if args.breadth else 0) or (criteria(args) if args.criteria else 0)


if __name__ == "__main__":
    sys.exit(main())
