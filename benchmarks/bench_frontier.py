"""The frontier of pruned int8 networks: accuracy against native latency, beside the unpruned int8 network.

    python benchmarks/bench_frontier.py                                   # both networks: prune, train, compile, time, plot
    python benchmarks/bench_frontier.py --networks resnet56 --checkpoints runs
    python benchmarks/bench_frontier.py --time                            # time again what was compiled, and draw the plot
    python benchmarks/bench_frontier.py --plot                            # only the table and docs/images/pruning_frontier.png

A point removes residual branches (``prune_branches``) or channels (``prune``) or both, is trained towards the outputs of the unpruned
float model without labels, and compiled to int8; accuracy is that of the integer network. ResNet-56: ``cifar10_test_a``, trained on
``cifar10_train_10k``, augmented. EfficientNet-Lite0: the 400 reported images of ``imagenet_sample_a``; it is calibrated and trained on the
100 others, of which training sees random parts.

Latency: one image, one thread; all networks in one process, turn by turn, the minimum of many turns; of several processes the median and
the range, because where a process's memory lies changes the time of a network this small by a tenth. Points are rows of a file of JSON
lines; those that have a row are not measured again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import harness
import real_models
import torch
from pruning_accuracy import Augmented, channels_last, reduced_precision
from torch.nn import functional as F

import fxcompress

RESULTS = harness.ROOT / "benchmarks" / "results" / "pruning_frontier.jsonl"
PROCESSES = 3  # that measure latency
PLOT = harness.ROOT / "docs" / "images" / "pruning_frontier.png"
SIDES = ((7, 5), (-7, -11), (-7, 5), (7, 5), (7, -11))  # of a point, for its name: neighbors stay legible


@dataclass(frozen=True)
class Point:
    """What is removed, and how many steps are trained.

    ``branches``: share of ``measure``. ``channels``: share of the MACs. ``cycles``: the branches, by name, that go before each cycle of
    ``steps``, which starts from the first learning rate again (warm restarts, Loshchilov and Hutter 2017).
    """

    branches: float = 0.0
    measure: str = "macs"
    channels: float = 0.0
    cycles: tuple[tuple[str, ...], ...] = ((),)
    steps: int = 0
    batch_size: int = 64
    learning_rate: float = 0.005

    def __str__(self) -> str:
        named = sum(map(len, self.cycles))
        parts = [f"branches {self.branches:.0%} of {self.measure}"] if self.branches else []
        parts += [f"{named} branches"] if named else []
        parts += [f"channels {self.channels:.0%}"] if self.channels else []
        return ", ".join(parts + ([self.trained] if self.steps else [])) or "unpruned"

    @property
    def trained(self) -> str:
        return f"{len(self.cycles)} x {self.steps} steps" if len(self.cycles) > 1 else f"{self.steps} steps"

    def asked(self) -> dict:
        """As a row of the results has it."""
        return json.loads(json.dumps(asdict(self)))

    def stem(self, network: str) -> str:
        """Of the names of its files."""
        return "_".join(re.findall(r"\w+", f"{network} {self}"))


#: Of ResNet-56, those that cost the outputs least per nanosecond of one table of kernel times. By name, since tables differ.
SEVEN = ("layer1.0", "layer1.4", "layer1.5", "layer1.8", "layer2.4", "layer2.5", "layer2.8")
LONG = {"steps": 1500, "batch_size": 128, "learning_rate": 0.01}
SHORT = {"steps": 100, "batch_size": 16, "learning_rate": 5e-4}

POINTS = {
    "resnet56": [
        Point(),
        Point(branches=0.3),
        Point(branches=0.4, steps=1000),
        Point(cycles=(SEVEN,), **LONG),
        Point(cycles=(SEVEN, ()), **LONG),
        Point(cycles=(SEVEN, (), ("layer1.2",)), **LONG),
        Point(cycles=(SEVEN, (), ("layer1.2",), ("layer2.7",)), **LONG),
    ],
    "lite0": [
        Point(),
        Point(channels=0.1),
        Point(branches=0.1),
        Point(channels=0.1, **SHORT),
        Point(branches=0.1, **SHORT),
        Point(branches=0.1, measure="latency"),
        Point(branches=0.1, measure="latency", **SHORT | {"steps": 300}),
    ],
}


# ------------------------------------------------------------------------------------------------------------ accuracy


class Crops(torch.utils.data.Dataset):
    """Random parts (20 to 100 % of the area) of a few large images, resized and flipped: many inputs to distill on out of few."""

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return 100 * len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        x = self.images[i % len(self.images)]
        height, width = x.shape[1:]
        side = float(torch.empty(()).uniform_(0.2, 1)) ** 0.5
        h, w = round(side * height), round(side * width)
        top, left, flip = (int(torch.randint(n, ())) for n in (height - h + 1, width - w + 1, 2))
        part = F.interpolate(x[None, :, top : top + h, left : left + w], (height, width), mode="bilinear")[0]
        return part.flip(2) if flip else part


def without(network: torch.nn.Module, branches: tuple[str, ...], options: dict) -> torch.nn.Module:
    """``network`` less these: where all other layers are ignored, the least share takes the branch."""
    for branch in branches:
        layers = {name.rpartition(".")[0] for name, _ in network.named_parameters()}
        others = sorted(layer for layer in layers if not layer.startswith(f"{branch}."))
        network = fxcompress.prune_branches(network, pruning_ratio=1e-6, ignored_layers=others, **options)
    return network


def pruned(workload, point: Point, table: Path, bfloat16: bool, checkpoints: Path | None) -> torch.nn.Module:
    """The float network of a point; it takes normalized images. ``table``: file of kernel times, so that points choose by the same."""
    teacher = network = channels_last(workload.model)
    images = workload.normalized(workload.calibration.float())
    options = {"example_inputs": images[:1], "calibration_data": images.split(64)}
    if point.branches:
        times = {"latency_table": table} if point.measure == "latency" else {}
        network = fxcompress.prune_branches(
            network, pruning_ratio=point.branches, pruning_measure=point.measure, **times, **options
        )
    if point.channels:
        network = fxcompress.prune(network, pruning_ratio=point.channels, **options)
    data = Augmented(workload) if workload.name.startswith("resnet") else Crops(images)
    for cycle, branches in enumerate(point.cycles):
        network = without(network, branches, options)
        if not point.steps:
            continue
        if checkpoints is not None:
            checkpoints.mkdir(parents=True, exist_ok=True)
        so_far = replace(point, cycles=point.cycles[: cycle + 1])
        with reduced_precision(bfloat16):
            network = fxcompress.fine_tune(
                network, data, teacher=teacher, steps=point.steps, batch_size=point.batch_size, seed=cycle,
                learning_rate=point.learning_rate, update_batch_norm=workload.name != "lite0",
                checkpoint=checkpoints and checkpoints / f"{so_far.stem(workload.name)}.pt",
            )  # fmt: skip
    return network


def measure(name: str, point: Point, folder: Path, bfloat16: bool, checkpoints: Path | None) -> dict:
    """The row of a point, without its latency; the compiled network is saved in ``folder``."""
    workload, start = real_models.load(name).reported(), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    network = pruned(workload, point, folder / "latency_table.json", bfloat16, checkpoints)
    compiled = fxcompress.compile(
        network, target="int8", example_inputs=(workload.inputs[:1].float(),), input_range=workload.input_range,
        input_normalization=workload.normalization, calibration_data=list(workload.batches(workload.calibration)),
    )  # fmt: skip
    file = folder / f"{point.stem(name)}.fxc"
    compiled.save(file)
    float_metric = workload.metric(workload.outputs(lambda raw: network(workload.normalized(raw))))
    row = {
        "network": name,
        "point": point.asked(),
        "what": str(point),
        "bfloat16": bfloat16 and bool(point.steps),
        "file": file.name,
        "images": len(workload.labels),
    }
    row |= {"float": float_metric, "int8": workload.metric(workload.outputs(compiled))}
    return row | {"macs": compiled.report().macs, "seconds": round(time.perf_counter() - start, 1)}


# ------------------------------------------------------------------------------------------------------------- latency


def latencies(files: list[Path], image: torch.Tensor, seconds: float) -> list[float]:
    """Milliseconds of one call of each, in turns within this process: the minimum."""
    networks = [fxcompress.load(file) for file in files]
    for network in networks:
        network(image)
    best, end = [float("inf")] * len(networks), time.perf_counter() + seconds
    while time.perf_counter() < end:
        for i, network in enumerate(networks):
            for _ in range(5):
                start = time.perf_counter()
                network(image)
                best[i] = min(best[i], time.perf_counter() - start)
    return [1e3 * value for value in best]


def add_latencies(rows: list[dict], folder: Path, seconds: float) -> None:
    """``milliseconds`` and ``ratios`` to the unpruned network, one of every process, into the rows of every network."""
    for name in {row["network"]: None for row in rows}:
        own = [row for row in rows if row["network"] == name and (folder / row["file"]).exists()]
        if own:
            image = real_models.load(name).inputs[:1].float()
            found = []
            os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come: kernels have threads of their own
            for _ in range(PROCESSES):
                with multiprocessing.get_context("spawn").Pool(1) as process:
                    found.append(process.apply(latencies, ([folder / row["file"] for row in own], image, seconds)))
            unpruned = next(i for i, row in enumerate(own) if row["what"] == "unpruned")
            for i, row in enumerate(own):
                row["milliseconds"] = [round(run[i], 4) for run in found]
                row["ratios"] = [round(run[unpruned] / run[i], 3) for run in found]


# ------------------------------------------------------------------------------------------------------ table and plot


def table(rows: list[dict]) -> str:
    lines = ["| network | removed | MACs left | float | int8 | points lost | ms | times as fast |", "|---" * 8 + "|"]
    for row in rows:
        whole = next(r for r in rows if r["network"] == row["network"] and r["what"] == "unpruned")
        cells = [
            row["network"],
            row["what"],
            f"{row['macs'] / whole['macs']:.0%}",
            f"{row['float']:.2f}",
            f"{row['int8']:.2f}",
        ]
        cells += [f"{whole['int8'] - row['int8']:.2f}"]
        cells += [_spread(row["milliseconds"], 3), _spread(row["ratios"], 2)] if "ratios" in row else ["-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    """Median (smallest-largest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy lost against times as fast, one panel per network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list({row["network"]: None for row in rows if "ratios" in row})
    figure, panels = pyplot.subplots(1, len(names), figsize=(6.5 * len(names), 4), squeeze=False, layout="constrained")
    for panel, name in zip(panels[0], names):
        for trained, marker in ((False, "o"), (True, "s")):
            own = [r for r in rows if r["network"] == name and "ratios" in r and bool(r["point"]["steps"]) == trained]
            if not own:
                continue
            label = "fine-tuned by distillation" if trained else "not trained"
            panel.plot(
                [statistics.median(r["ratios"]) for r in own],
                [r["int8"] for r in own],
                marker,
                label=label,
                markersize=7,
            )
            for i, r in enumerate(own):
                x, y = SIDES[i % len(SIDES)]
                panel.annotate(
                    r["what"],
                    (statistics.median(r["ratios"]), r["int8"]),
                    xytext=(x, y),
                    ha="left" if x > 0 else "right",
                    textcoords="offset points",
                    fontsize=7,
                )
        whole = next(r for r in rows if r["network"] == name and r["what"] == "unpruned")
        panel.axhline(whole["int8"] - 0.5, color="gray", linewidth=0.8, linestyle="--")
        panel.set(
            title=f"{name}, int8, one image, one thread", xlabel="times as fast as unpruned int8", ylabel="top-1, %"
        )
        panel.margins(x=0.65, y=0.1)
        panel.legend(fontsize=8, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(POINTS), default=list(POINTS))
    parser.add_argument("--points", nargs="+", type=int, help="by their number, of POINTS; default: all")
    parser.add_argument("--time", action="store_true", help="only time what was compiled")
    parser.add_argument("--plot", action="store_true", help="only the table and the plot of the rows there are")
    parser.add_argument("--seconds", type=float, default=20, help="of timing per network and process")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--image", type=Path, default=PLOT, help="the plot")
    parser.add_argument("--compiled", type=Path, help="folder of the compiled networks; default: beside the results")
    parser.add_argument("--bfloat16", action="store_true", help="train with products in bfloat16, weights in float32")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="save training here, and go on from there")
    args = parser.parse_args(arguments)

    folder = args.compiled or args.results.with_suffix("")
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    args.results.parent.mkdir(parents=True, exist_ok=True)
    if not (args.time or args.plot):
        for name in args.networks:
            for number, point in enumerate(POINTS[name]):
                known = any(row["network"] == name and row["point"] == point.asked() for row in rows)
                if not known and (args.points is None or number in args.points):
                    rows.append(measure(name, point, folder, args.bfloat16, args.checkpoints))
                    with args.results.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(json.dumps(rows[-1]), flush=True)
    if not args.plot:
        add_latencies(rows, folder, args.seconds)
        args.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(harness.describe_machine(), table(rows), sep="\n\n")
    if any("ratios" in row for row in rows):
        plot(rows, args.image)
    return 0


if __name__ == "__main__":
    sys.exit(main())
