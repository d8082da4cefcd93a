"""Structured pruning: which models of a whole zoo shrink, and what pruning a real network costs.

    python benchmarks/bench_pruning.py --breadth                        # every family of zoo.py without 30 % of its MACs
    python benchmarks/bench_pruning.py --breadth --only resnet dla --fresh
    python benchmarks/bench_pruning.py --breadth --table                # the table of the results so far
    python benchmarks/bench_pruning.py --criteria                       # ResNet-56 on CIFAR-10, no fine-tuning
    python benchmarks/bench_pruning.py --criteria --network resnet8 --shares 0.2 --budgets uniform global importance
    python benchmarks/bench_pruning.py --fine-tune --shares 0.75        # with 1,000 steps; --checkpoints DIR: can be interrupted

**Breadth.** Every model is pruned in a process of its own under a time limit; rows are appended to a file of JSON lines and families
that have one are not run again. "difference" is the largest of the outputs, relative and in float64, between the smaller network and
*the user's own module* whose weights are zeroed where the report says (without ``pruning_correction``, which would improve on it). Where
the module computes a layer's weight from others, the captured graph stands for it.
Status: "pruned"; "refused", an error that fxcompress raises on purpose, with its text; "WRONG", a difference above 1e-6; "timeout", not
measured; "FAILED", anything else. Exit status 1 when the whole zoo misses the target.

**Criteria** (``pruning_accuracy.py``). Accuracy on ``cifar10_test_a`` after 75, 85 and 90 % of the parameters are gone, statistics
measured again on 256 training images, no training.

**Fine-tuning.** The same after 1,000 steps on ``cifar10_train_10k`` (batches of 128, flipped and moved at random): one cut and then
training, beside pruning entwined with it in 20 removals; with labels, and by distillation from the unpruned model without.
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
import encoders
import harness
import torch
import zoo
from torch import nn

PRUNED, REFUSED, WRONG, FAILED, TIMEOUT = "pruned", "refused", "WRONG", "FAILED", "timeout"
#: The zoo of image networks, and transformer encoders.
FAMILIES = zoo.FAMILIES | {family: prefix for family, (prefix, *_) in encoders.ENCODERS.items()}
RATIO, LARGEST_DIFFERENCE, MIN_PRUNED = 0.3, 1e-6, 112
MEMORY_BYTES = 14 << 30
RESULTS = harness.ROOT / "benchmarks" / "results" / "pruning.jsonl"
ACCURACY_RESULTS = RESULTS.with_name("pruning_accuracy.jsonl")
SHARES, TEST_IMAGES = (0.75, 0.85, 0.9), 5000


# ------------------------------------------------------------------------------------------------------------ breadth


def measure(family: str) -> dict:
    """The row of one family, in this process. Nothing is raised: an exception is part of the row."""
    import fxcompress
    from fxcompress.errors import UserError

    entry = encoders.load(family) if family in encoders.ENCODERS else zoo.load(family)
    row = {"family": family, "model": entry.name, "input": list(entry.shape)}
    start = time.perf_counter()
    try:
        small = fxcompress.prune(entry.model, entry.call(1, seed=1), pruning_ratio=RATIO, pruning_correction=None)
        report = small.meta["pruning"]
        row |= {"seconds": time.perf_counter() - start, "macs": report.macs, "parameters": report.parameters}
        row |= {"groups": len(report.groups), "units": sum(g["units"] for g in report.groups)}
        row["difference"] = difference(entry.model, small, entry.call(2, seed=2))
        row["status"] = PRUNED if row["difference"] <= LARGEST_DIFFERENCE else WRONG
    except Exception as error:
        own = isinstance(error, UserError)
        row |= {"status": REFUSED if own else FAILED, "error": type(error).__name__, "reason": str(error)}
        row |= {"seconds": time.perf_counter() - start, "traceback": traceback.format_exc()}
    return row


@torch.no_grad()
def difference(model: nn.Module, small: nn.Module, call: dict[str, torch.Tensor]) -> float:
    """Of the smaller network from the model with the removed channels zeroed, in float64; ``model`` is changed."""
    import fxcompress
    from fxcompress.promises import relative_change

    zeroed = [cut for cut in small.meta["pruning"].slices if cut["writes"]]
    if any(cut["target"] not in model.state_dict() for cut in zeroed):
        model = fxcompress.prune(model, call, pruning_ratio=0)
    state = dict(model.double().state_dict())
    for cut in zeroed:
        state[cut["target"]].index_fill_(cut["axis"], torch.tensor(cut["indices"]), 0)
    call = {name: x.double() if x.is_floating_point() else x for name, x in call.items()}
    return relative_change(*(bench_coverage.outputs(network(**call)) for network in (model, small.double())))


def in_own_process(family: str, limit: float) -> dict:
    row = {"family": family, "model": FAMILIES[family], "status": FAILED}
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", family], capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return row | {
            "status": TIMEOUT,
            "error": "TimeoutExpired",
            "reason": f"not measured: no result after {limit:.0f} s",
        }
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
    families = args.only or list(FAMILIES)
    if not args.table:
        done = {} if args.fresh else bench_coverage.read(args.results)
        print(harness.describe_machine(), HEADER, sep="\n\n", flush=True)
        run([f for f in families if f not in done], args.results, args.limit)
    rows = {f: row for f, row in sorted(bench_coverage.read(args.results).items()) if f in families}
    if args.table:
        print(table(rows), end="\n\n")
    counts = {
        status: sum(row["status"] == status for row in rows.values())
        for status in (PRUNED, REFUSED, WRONG, FAILED, TIMEOUT)
    }
    print(f"{len(rows)} families: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    met = counts[PRUNED] >= MIN_PRUNED and not counts[WRONG] and not counts[FAILED]
    return int(len(rows) == len(FAMILIES) and not met)


# ----------------------------------------------------------------------------------------------------------- accuracy


def accuracy(args: argparse.Namespace) -> int:
    import pruning_accuracy

    print(harness.describe_machine(), end="\n\n", flush=True)
    (pruning_accuracy.criteria if args.criteria else pruning_accuracy.fine_tuning)(args)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--breadth", action="store_true", help="every family of the zoo")
    what.add_argument("--criteria", action="store_true", help="a CIFAR-10 network by criterion and budget, not trained")
    what.add_argument("--fine-tune", action="store_true", help="ResNet-56, trained after and while it is pruned")
    what.add_argument("--measure", choices=list(FAMILIES), metavar="FAMILY", help="one family, here, as JSON")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these families, or criteria, only")
    parser.add_argument("--results", type=Path, help="file of JSON lines, default benchmarks/results/pruning*.jsonl")

    group = parser.add_argument_group("breadth")
    group.add_argument("--limit", type=float, default=600, help="seconds per model")
    group.add_argument("--fresh", action="store_true", help="run families again that have a row")
    group.add_argument("--table", action="store_true", help="only print the results there are, in Markdown")

    group = parser.add_argument_group("accuracy")
    group.add_argument("--images", type=int, default=TEST_IMAGES, help="of the test set")
    group.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the parameters to remove")
    group.add_argument("--budgets", nargs="+", default=["global"], help="global, uniform, importance")

    group = parser.add_argument_group("criteria")
    group.add_argument("--network", default="resnet56", choices=("resnet56", "resnet8"))
    group.add_argument("--inner", action="store_true", help="keep the residual stream as wide as it is")
    group.add_argument("--corrections", nargs="+", default=["measured"], help="measured, analytic, none",
                       type=lambda value: None if value == "none" else value)  # fmt: skip

    group = parser.add_argument_group("fine-tuning")
    group.add_argument("--steps", type=int, default=1000, help="of training")
    group.add_argument("--batch-size", type=int, default=128)
    group.add_argument("--learning-rate", type=float, default=0.01, help="of the first step")
    group.add_argument("--bfloat16", action="store_true", help="train with products in bfloat16, weights in float32")
    group.add_argument("--removals", type=int, default=20, help="in how many parts the channels go while training")
    group.add_argument("--orders", nargs="+", choices=("none", "after", "entwined"), help="which columns; default: all")
    group.add_argument("--targets", nargs="+", choices=("labels", "teacher"), default=["labels", "teacher"])
    group.add_argument("--checkpoints", type=Path, metavar="DIR", help="save training here, and go on from there")
    args = parser.parse_args(arguments)
    if args.measure:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        warnings.filterwarnings("ignore")
        print(json.dumps(measure(args.measure)))
        return 0
    args.results = args.results or (RESULTS if args.breadth else ACCURACY_RESULTS)
    return breadth(args) if args.breadth else accuracy(args)


if __name__ == "__main__":
    sys.exit(main())
