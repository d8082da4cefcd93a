"""Accuracy against multiplications removed: products of blocks left out, beside channels pruned.

    python benchmarks/bench_products.py --networks ad                                              # the autoencoder, AUC
    python benchmarks/bench_products.py --networks resnet20 --bfloat16 --results rows.jsonl        # rows that are there are not run again
    python benchmarks/bench_products.py --networks resnet20 --int8                                 # and compiled, integers only
    python benchmarks/bench_products.py --networks ad resnet20 --table --plot docs/images          # of the rows there are

"removed" is the share of the network's multiplications that is really gone. Products: ``fxcompress.prune_products`` by Winograd's
algorithm. Channels: ``fxcompress.prune``, criterion "outgoing" in the global budget, batch norm measured again. "trained": both get the
same number of steps on the same batches, without labels: classifiers towards the outputs of the unpruned network, the autoencoder
towards its inputs. Networks calibrate and train on what is not in the test set: the autoencoder on 40 normal clips, the others on
10,000 training images. A clip of the autoencoder is a sample of 196 windows, so that rows of a block are windows that follow each other.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import harness
import real_models
import torch
from pruning_accuracy import channels_last, reduced_precision
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.pruning.training import distillation

CRITERIA = ("learned", "output", "weight_gradient", "gradient", "magnitude", "random")
CHANNELS = "channels"
RESULTS = harness.ROOT / "benchmarks" / "results" / "products.jsonl"


class Clips(nn.Module):
    """The autoencoder on whole clips, (N, 196, 640)."""

    def __init__(self, windows: nn.Module):
        super().__init__()
        self.windows = windows

    def forward(self, x: Tensor) -> Tensor:
        return self.windows(x.flatten(0, 1)).reshape(x.shape)


@dataclass
class Task:
    """A network, examples (inputs, wanted outputs) to learn from, and what a network is worth."""

    name: str
    model: nn.Module
    data: tuple[Tensor, Tensor]
    test: Tensor
    score: Callable[[Tensor], float]
    training: dict

    def value(self, network) -> float:
        with torch.no_grad():
            return self.score(torch.cat([network(part) for part in self.test.split(25 if self.test.ndim == 4 else 10)]))


@torch.no_grad()
def load(name: str, images: int, training_images: int) -> Task:
    workload = real_models.load(name)
    if name == "ad":
        model = Clips(workload.model).eval()
        x, test = (
            v.float().reshape(-1, real_models.AD_WINDOWS, v.shape[1]) for v in (workload.calibration, workload.inputs)
        )
        # the means of 4 clips are no statistics
        training = {"loss": F.mse_loss, "batch_size": 4, "update_batch_norm": False}
        return Task(name, model, (x, x), test, lambda y: workload.metric(y.flatten(0, 1)), training)
    workload, model = workload.reported(images), channels_last(workload.model)
    arrays = real_models.arrays("cifar10_train_10k.npz")
    x = workload.normalized(torch.from_numpy(arrays["images"][:training_images]).permute(0, 3, 1, 2).float())
    wanted = torch.cat([model(part) for part in x.split(100)])
    return Task(name, model, (x, wanted), workload.normalized(workload.inputs.float()), workload.metric,
                {"loss": distillation, "batch_size": 64})  # fmt: skip


def products(task: Task, criterion: str, share: float, args) -> tuple[nn.Module, nn.Module | None]:
    """Without products: as they are, and trained."""
    prune = partial(fxcompress.prune_products, task.model, task.data[0][:2], task.data, removed=share, shared=args.shared, seed=args.seed,
                    additions_removed=args.additions, levels=args.levels, **task.training)  # fmt: skip
    with reduced_precision(args.bfloat16 and criterion == "learned"):
        small = prune(criterion=criterion, gate_steps=args.gate_steps)
    if not args.steps:
        return small, None
    with reduced_precision(args.bfloat16):
        return small, prune(criterion=small.meta["products"], steps=args.steps, learning_rate=args.learning_rate,
                            optimizer=torch.optim.Adam)  # fmt: skip


def channels(task: Task, share: float, args) -> tuple[nn.Module, nn.Module | None]:
    """Without channels: as they are, and trained."""
    small = fxcompress.prune(task.model, task.data[0][:2], pruning_ratio=share, round_to=1,
                             calibration_data=[part for part in task.data[0][:256].split(task.training["batch_size"])])  # fmt: skip
    if not args.steps:
        return small, None
    with reduced_precision(args.bfloat16):
        return small, fxcompress.fine_tune(small, task.data, steps=args.steps, learning_rate=args.channel_learning_rate,
                                           seed=args.seed, optimizer=torch.optim.Adam, **task.training)  # fmt: skip


def measure(task: Task, method: str, share: float, args) -> list[dict]:
    start = time.process_time()
    found = channels(task, share, args) if method == CHANNELS else products(task, method, share, args)
    rows = []
    for network, steps in zip(found, (0, args.steps), strict=True):
        if network is None:
            continue
        report = found[0].meta["pruning" if method == CHANNELS else "products"]  # training leaves it as it is
        before, after = report.macs if method == CHANNELS else report.multiplications
        row = {"network": task.name, "method": method, "asked": share, "removed": 1 - after / before, "steps": steps, "shared": args.shared,
               "levels": args.levels, "additions_removed": args.additions, "bfloat16": args.bfloat16, "value": task.value(network)}  # fmt: skip
        if method != CHANNELS:
            row |= {"additions": report.additions, "output_change": network.meta["products"].difference}
        if args.int8:
            row["int8"] = task.value(compiled(task, network))
        rows.append(row | {"seconds": time.process_time() - start})
    return rows


def compiled(task: Task, network: nn.Module):
    data = task.data[0][:256]
    return fxcompress.compile(
        network, example_inputs=data[:2], calibration_data=data.split(task.training["batch_size"])
    )


# ------------------------------------------------------------------------------------------------------------- results


def key(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("network", "method", "asked", "shared", "levels", "additions_removed"))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(args) -> None:
    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = {key(row) for row in read(args.results)}
    for name in args.networks:
        task = None
        for method, share in ((m, s) for s in args.shares for m in args.methods):
            wanted = {"network": name, "method": method, "asked": share, "shared": args.shared, "levels": args.levels,
                      "additions_removed": args.additions}  # fmt: skip
            if key(wanted) in done:
                continue
            if task is None:
                task = load(name, args.images, args.training_images)
                print(f"{name}: unpruned {task.value(task.model):.4f}", flush=True)
            for row in measure(task, method, share, args):
                with args.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name} {method}: {row['removed']:.1%} removed, {row['steps']} steps: {row['value']:.4f} {row.get('int8', '')}"
                      f" ({row['seconds']:.0f} s)", flush=True)  # fmt: skip


def table(rows: list[dict], name: str) -> str:
    """Value by method and share, as it is / trained."""
    rows = [row for row in rows if row["network"] == name]
    shares = sorted({row["asked"] for row in rows})
    lines = [
        f"| {name} | " + " | ".join(f"{share:.0%} removed" for share in shares) + " |",
        "|---" * (len(shares) + 1) + "|",
    ]
    variants = sorted({variant(row) for row in rows})
    for method in (*CRITERIA, CHANNELS):
        for name in variants:
            mine = [row for row in rows if row["method"] == method and variant(row) == name]
            if mine:
                cells = [_cell([row for row in mine if row["asked"] == share]) for share in shares]
                lines.append(f"| {method}{name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def variant(row: dict) -> str:
    """What the row's products have besides gates of their own at one level."""
    found = {"shared": row["shared"], f"{row['levels']} levels": row["levels"] > 1,
             f"{row['additions_removed']:.0%} of the additions removed": row["additions_removed"] > 0}  # fmt: skip
    return "".join(f", {name}" for name, given in found.items() if given)


def _cell(rows: list[dict]) -> str:
    values = [
        f"{row['value']:.2f}" if row["value"] > 1 else f"{row['value']:.3f}"
        for row in sorted(rows, key=lambda r: r["steps"])
    ]
    return " / ".join(values) + (f" ({rows[0]['removed']:.1%})" if rows else "-")


def plot(rows: list[dict], name: str, folder: Path) -> Path:
    """Value against multiplications removed: dashed as it is, solid trained."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["network"] == name and not row["shared"] and not row["additions_removed"]]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    curves = [
        (m, v) for m in (*CRITERIA, CHANNELS) for v in sorted({variant(row) for row in rows if row["method"] == m})
    ]
    for number, curve in enumerate(curves):
        for trained in (False, True):
            points = sorted(
                (100 * r["removed"], r["value"])
                for r in rows
                if (r["method"], variant(r)) == curve and bool(r["steps"]) == trained
            )
            label = f"{'products: ' if curve[0] != CHANNELS else ''}{''.join(curve)}{', trained' if trained else ''}"
            if points:
                axes.plot(*zip(*points, strict=True), "o-" if trained else "o--", label=label,
                          color="k" if curve[0] == CHANNELS else f"C{number}")  # fmt: skip
    axes.set(xlabel="multiplications removed, %", ylabel="ROC AUC" if name == "ad" else "top-1, %", title=name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"products_{name}.svg"
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--networks", nargs="+", default=["ad", "resnet20"], choices=["ad", "resnet20", "resnet32", "resnet56"]
    )
    parser.add_argument("--methods", nargs="+", default=[*CRITERIA, CHANNELS], choices=[*CRITERIA, CHANNELS])
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[0.2, 0.3, 0.4], help="of the multiplications to remove"
    )
    parser.add_argument("--shared", action="store_true", help="the same products in all layers")
    parser.add_argument("--levels", type=int, default=1)
    parser.add_argument("--additions", type=float, default=0.0, help="share of the additions to remove as well")
    parser.add_argument("--gate-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100, help="of training weights; 0: none")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-3, help="of Adam, for products, which have no batch norm"
    )
    parser.add_argument("--channel-learning-rate", type=float, default=1e-3, help="of Adam, for channels")
    parser.add_argument("--bfloat16", action="store_true", help="train with products in bfloat16, weights in float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=5000, help="of the test set")
    parser.add_argument("--training-images", type=int, default=10000, help="to learn from, of 10,000")
    parser.add_argument("--int8", action="store_true", help="compile every network, too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines")
    parser.add_argument("--table", action="store_true", help="only print the tables of the results there are")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the results there are, with matplotlib")
    args = parser.parse_args(arguments)
    print(harness.describe_machine(), end="\n\n", flush=True)
    if not args.table and args.plot is None:
        run(args)
    for name in args.networks:
        print(table(read(args.results), name), end="\n\n")
        if args.plot is not None:
            print(plot(read(args.results), name, args.plot))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
