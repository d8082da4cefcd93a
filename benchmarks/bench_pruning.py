"""Structured pruning: which models of a whole zoo shrink, and what pruning a real network costs.

    python benchmarks/bench_pruning.py --breadth                        # every family of zoo.py without 30 % of its MACs
    python benchmarks/bench_pruning.py --breadth --only resnet dla --fresh
    python benchmarks/bench_pruning.py --breadth --table                # the table of the results so far
    python benchmarks/bench_pruning.py --criteria                       # ResNet-56 on CIFAR-10, no fine-tuning
    python benchmarks/bench_pruning.py --fine-tune --shares 0.75        # the same, with 1,000 steps; --checkpoints DIR: can be interrupted

**Breadth.** Every model is pruned in a process of its own under a time limit; rows are appended to a file of JSON lines and families
that have one are not run again. "difference" is the largest of the outputs, relative and in float64, between the smaller network and
*the user's own module* whose weights are zeroed where the report says (without ``pruning_correction``, which would improve on it). Where
the module computes a layer's weight from others, the captured graph stands for it.
Status: "pruned"; "refused", an error that fxcompress raises on purpose, with its text; "WRONG", a difference above 1e-6; "FAILED",
anything else. Exit status 1 when the whole zoo misses the target.

**Criteria.** Accuracy on ``cifar10_test_a`` after 75, 85 and 90 % of the parameters are gone, statistics measured again on 256
training images, no training.

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


# -------------------------------------------------------------------------------------------------------- fine-tuning


class Augmented(torch.utils.data.Dataset):
    """(normalized image, label) of the training images; each time flipped or not, and moved by up to 4 pixels."""

    def __init__(self, workload):
        import real_models

        arrays = real_models.arrays("cifar10_train_10k.npz")
        self.images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
        self.labels, self.normalized = torch.from_numpy(arrays["labels"]), workload.normalized

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = nn.functional.pad(self.normalized(self.images[i : i + 1].float())[0], (4, 4, 4, 4))
        down, right, flip = (int(torch.randint(n, ())) for n in (9, 9, 2))
        x = x[:, down : down + 32, right : right + 32]
        return x.flip(2) if flip else x, self.labels[i]


def fine_tuning(args: argparse.Namespace) -> int:
    """The accuracy of ResNet-56 by how it is trained after or while it is pruned, as a Markdown table."""
    import real_models

    workload = real_models.load("resnet56").reported(args.images)
    data = Augmented(workload)
    print(harness.describe_machine(), end="\n\n", flush=True)
    print(
        f"| removed | trained towards | one cut, no training | one cut, {args.steps} steps | {args.removals} removals, {args.steps} steps |"
    )
    print("|---|---|---|---|---|")
    for share in args.shares:
        for teacher in (None, workload.model):
            cells = [f"{value:.2f}" for value in tuned_accuracies(workload, data, share, teacher, args)]
            print(
                f"| {share:.0%} | {'labels' if teacher is None else 'the unpruned model'} | {' | '.join(cells)} |",
                flush=True,
            )
    return 0


def tuned_accuracies(
    workload, data, share: float, teacher: nn.Module | None, args: argparse.Namespace
) -> Iterable[float]:
    """Top-1 in percent: only cut; cut, then trained; both in turn. The same share, criterion, budget and number of steps."""
    import fxcompress

    x = workload.normalized(workload.calibration.float())
    pruning = {"pruning_ratio": share, "pruning_measure": "parameters", "pruning_budget": args.budget, "round_to": 1}
    pruning["pruning_criterion"] = args.only[0] if args.only else "outgoing"

    def training(name: str) -> dict:
        path = None
        if args.checkpoints is not None:
            args.checkpoints.mkdir(parents=True, exist_ok=True)
            path = args.checkpoints / f"{name}_{share}_{'labels' if teacher is None else 'teacher'}.pt"
        return {"steps": args.steps, "teacher": teacher, "learning_rate": args.learning_rate, "checkpoint": path}

    def score(network: nn.Module) -> float:
        return workload.metric(workload.outputs(lambda raw: network(workload.normalized(raw))))

    small = fxcompress.prune(workload.model, x[:1], calibration_data=x.split(128), **pruning)
    yield score(small)
    yield score(fxcompress.fine_tune(small, data, **training("after")))
    yield score(
        fxcompress.prune_gradually(
            workload.model, x[:1], data, removals=args.removals, **pruning, **training("gradual")
        )
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--breadth", action="store_true", help="every family of the zoo")
    parser.add_argument("--criteria", action="store_true", help="ResNet-56 by criterion")
    parser.add_argument("--fine-tune", action="store_true", help="ResNet-56, trained after and while it is pruned")
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--removals", type=int, default=20, help="in how many parts the channels go while training")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of the first step")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="save training here, and go on from there")
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
    chosen = [
        run
        for run, wanted in ((breadth, args.breadth), (criteria, args.criteria), (fine_tuning, args.fine_tune))
        if wanted
    ]
    if not chosen:
        parser.error("--breadth, --criteria or --fine-tune?")
    return max(run(args) for run in chosen)


if __name__ == "__main__":
    sys.exit(main())
