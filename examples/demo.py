"""Compile a real CIFAR-10 ResNet-20 to integers, without data and with calibration images, and compare the three.

    python examples/demo.py

Everything it needs lies in ``examples/data``. The compiled networks take raw pixels 0..255: the normalization is folded
into the first convolution. The folder ``demo_output`` then shows, pass by pass, how the graphs came about.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from cifar_resnet import PIXEL_MEAN, PIXEL_STD, load_images, load_resnet20
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fxcompress
from fxcompress.report import sqnr_db

ROOT = Path(__file__).resolve().parents[1]

BATCH = 100


@dataclass
class Result:
    """A network's answers, and how long it took to get them."""

    title: str
    logits: Tensor
    run_seconds: float
    compiled: fxcompress.CompiledModule | None = None
    compile_seconds: float = 0.0
    dumps: Path | None = None


def run(network, images: Tensor) -> tuple[Tensor, float]:
    """Logits (N, 10) of raw images (N, 3, 32, 32), and the seconds they took."""
    start = time.perf_counter()
    with Console(stderr=True).status(f"running {len(images)} images"), torch.inference_mode():
        logits = torch.cat([network(batch) for batch in images.split(BATCH)])
    return logits, time.perf_counter() - start


def run_float(images: Tensor) -> Result:
    model = load_resnet20()
    return Result("float32", *run(lambda x: model((x - PIXEL_MEAN) / PIXEL_STD), images))


def compile_and_run(title: str, images: Tensor, dumps: Path, calibration: Tensor | None = None) -> Result:
    start = time.perf_counter()
    compiled = fxcompress.compile(
        load_resnet20(),
        target="int8",
        example_inputs=(images[:2],),
        calibration_data=None if calibration is None else calibration.split(64),
        input_range=(0, 255),
        input_normalization=(PIXEL_MEAN.flatten().tolist(), PIXEL_STD.flatten().tolist()),
        debug=dumps,
    )
    seconds = time.perf_counter() - start
    return Result(title, *run(compiled, images), compiled, seconds, dumps)


def table(title: str, *headings: str) -> Table:
    """An empty table, its first column text and the others numbers."""
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for position, heading in enumerate(headings):
        result.add_column(heading, justify="right" if position else "left", no_wrap=True)
    return result


def accuracy_table(results: list[Result], labels: Tensor) -> Table:
    title = f"ResNet-20 on {len(labels)} CIFAR-10 test images"
    result_table = table(title, "network", "top-1", "flipped", "logit SQNR", "compile", "run")
    reference = results[0]
    for result in results:
        predictions = result.logits.argmax(1)
        against_float = ["", "", ""]
        if result is not reference:
            flipped = int((predictions != reference.logits.argmax(1)).sum())
            quality = sqnr_db(reference.logits, result.logits)
            against_float = [str(flipped), f"{quality:.1f} dB", f"{result.compile_seconds:.1f} s"]
        top1 = f"{100 * (predictions == labels).float().mean():.2f} %"
        result_table.add_row(result.title, top1, *against_float, f"{result.run_seconds:.1f} s")
    return result_table


def cost_table(report: dict) -> Table:
    float_bytes, integer_bytes = report["float_bytes"], report["integer_bytes"]
    result = table("Cost", "", "")
    result.show_header = False
    result.add_row("parameters", f"{report['parameters']:,}")
    result.add_row("multiply-accumulates per image", f"{report['macs']:,}")
    result.add_row("float32 constants, bytes", f"{float_bytes:,}")
    result.add_row("integer constants, bytes", f"{integer_bytes:,}")
    result.add_row("smaller by", f"{float_bytes / integer_bytes:.2f} x")
    return result


def pass_table(compiled: list[Result]) -> Table:
    """Every pass with its time in each compilation, and what it did in the last one."""
    times = [f"{result.title}, ms" for result in compiled]
    result_table = table("Passes", "pass", *times, "rewrites", "refused")
    for entries in zip(*(result.compiled.report().to_dict()["passes"] for result in compiled), strict=True):
        milliseconds = [f"{1000 * entry['seconds']:.0f}" for entry in entries]
        last = entries[-1]
        result_table.add_row(last["name"], *milliseconds, str(last["rewrites"]), str(len(last["refusals"])))
    return result_table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "demo_output", help="where the dumps go")
    parser.add_argument("--images", type=int, default=1000, help="how many of the 1000 test images to run")
    args = parser.parse_args(arguments)

    images, labels = (part[: args.images] for part in load_images("test"))
    calibration, _ = load_images("calibration")
    results = [
        run_float(images),
        compile_and_run("data-free", images, args.output / "data_free"),
        compile_and_run("calibrated", images, args.output / "calibrated", calibration),
    ]
    compiled = results[1:]

    console = Console()
    console.print(accuracy_table(results, labels))
    console.print(cost_table(compiled[-1].compiled.report().to_dict()))
    console.print(pass_table(compiled))
    for result in compiled:
        console.print(f"[bold]Certificate[/], {result.title}")
        console.print(str(result.compiled.verify_integer_only()), markup=False, highlight=False, end="\n\n")
    console.print("[bold]Dumps[/], one listing per pass")
    for result in compiled:
        console.print(f"  {os.path.relpath(result.dumps)}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
