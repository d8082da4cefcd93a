"""How compile time and memory grow with the network: seconds per node from 20 to 1,001 layers, and for wide graphs.

    python benchmarks/bench_scale.py                                   # both families, data-free and calibrated
    python benchmarks/bench_scale.py --family resnet --runs 3 --json results/scale.json
    python benchmarks/bench_scale.py --model hrnet_w18_small_v1 --passes

A node is an operator call of the captured graph. ``torch.export`` is timed apart from the rest, which is ours. Seconds are
processor seconds of one thread (the machine may be busy), wall seconds stand beside them; the first compilation of a process
imports half of torch, so each process compiles a tiny network before it measures. Every run is a process of its own.

The models come from pytorchcv (`make bench-deps`) with random weights and the batch-norm statistics of random images. Wide
networks are compiled at 64 pixels (their last pooling made adaptive): the cost of nodes is measured, not of pixels.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import harness
import torch
from harness import Timing

LIMIT = 1.5  # seconds per node of the largest network of a family over those of the smallest
FAMILIES = {
    "resnet": ["resnet20_cifar10", "resnet110_cifar10", "resnet1001_cifar10"],
    "hrnet": ["hrnet_w18_small_v1", "hrnetv2_w18", "hrnetv2_w48"],
    "nasnet": ["nasnet_4a1056", "nasnet_6a4032"],
    "pnasnet": ["pnasnet5large"],
}


def image_size(name: str) -> int:
    return 32 if name.endswith("_cifar10") else 64


def random_model(name: str) -> torch.nn.Module:
    """The pytorchcv model for small images, with seeded random weights and matching batch-norm statistics; eval mode."""
    from pytorchcv.model_provider import get_model

    torch.manual_seed(0)
    model, size = get_model(name).train(), image_size(name)
    if size != 32 and hasattr(model.features, "final_pool"):
        model.features.final_pool = torch.nn.AdaptiveAvgPool2d(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # cumulative average instead of a decaying one
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, size, size))
    return model.eval()


class _ExportClock:
    """Seconds spent in ``torch.export.export``, and the operator calls it found."""

    def __init__(self):
        self.wall = self.cpu = 0.0
        self.nodes = 0
        self._export, torch.export.export = torch.export.export, self

    def __call__(self, *args, **kwargs):
        wall, cpu = time.perf_counter(), time.process_time()
        program = self._export(*args, **kwargs)
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        self.nodes = sum(node.op == "call_function" for node in program.graph.nodes)
        return program


def compile_once(name: str, calibrated: bool) -> dict:
    """Compile ``name`` in this process: nodes, seconds of export and of the rest, of every pass, and peak memory."""
    import fxcompress

    torch.set_num_threads(1)
    tiny = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
    fxcompress.compile(tiny, example_inputs=torch.randn(1, 3, 8, 8), input_range=(-3.0, 3.0))
    size = image_size(name)
    model, example = random_model(name), torch.randn(1, 3, size, size)
    options = {"calibration_data": [torch.randn(4, 3, size, size)]} if calibrated else {}
    before, clock = _peak_megabytes(), _ExportClock()
    wall, cpu = time.perf_counter(), time.process_time()
    compiled = fxcompress.compile(model, example_inputs=example, input_range=(-6.0, 6.0), **options)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    report = compiled.report().to_dict()
    return {
        "model": name, "calibrated": calibrated, "nodes": clock.nodes, "integer_nodes": report["certificate"]["nodes"],
        "seconds": {"total": cpu, "export": clock.cpu, "ours": cpu - clock.cpu},
        "wall": {"total": wall, "export": clock.wall, "ours": wall - clock.wall, **report["seconds"]},
        "passes": {p["name"]: [p["seconds"], p["check_seconds"]] for p in report["passes"]},
        "megabytes": {"before": before, "peak": _peak_megabytes(), "weights": report["float_bytes"] / 2**20},
    }  # fmt: skip


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_own_process(name: str, calibrated: bool) -> dict:
    command = [sys.executable, __file__, "--model", name, "--in-process", *["--calibrated"] * calibrated]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def per_node(runs: list[dict], part: str) -> Timing:
    """Milliseconds per node over the runs of one model."""
    return Timing.of(1e3 * run["seconds"][part] / run["nodes"] for run in runs)


def print_row(runs: list[dict], passes: bool) -> None:
    run, total = runs[0], Timing.of(r["seconds"]["total"] for r in runs)
    parts = {part: per_node(runs, part) for part in ("export", "ours", "total")}
    cells = "".join(f" {t.minimum:7.2f} {t.median:7.2f}" for t in parts.values())
    wall, memory = min(r["wall"]["total"] for r in runs), run["megabytes"]
    kind = "calibrated" if run["calibrated"] else "data-free"
    print(f"{run['model']:<20} {kind:<11}{run['nodes']:6d}{total.minimum:9.1f}{wall:9.1f}{cells}"
          f"{memory['peak'] - memory['before']:8.0f}", flush=True)  # fmt: skip
    if passes:
        for name, (seconds, checks) in run["passes"].items():
            print(
                f"    {name:<28} {1e3 * seconds / run['nodes']:7.3f} + checks {1e3 * checks / run['nodes']:7.3f} ms per node"
            )


def flat(rows: list[list[dict]]) -> bool:
    """Print and judge how our seconds per node grow from the smallest to the largest network of a family."""
    rows = sorted(rows, key=lambda runs: runs[0]["nodes"])
    growth = {part: per_node(rows[-1], part).minimum / per_node(rows[0], part).minimum for part in ("export", "ours")}
    met = growth["ours"] <= LIMIT
    print(f"  per node, {rows[0][0]['nodes']} -> {rows[-1][0]['nodes']} nodes: ours x{growth['ours']:.2f} "
          f"(at most x{LIMIT}: {'pass' if met else 'FAIL'}), torch.export x{growth['export']:.2f}")  # fmt: skip
    return met


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    parser.add_argument("--model", action="append", help="name of a pytorchcv model, instead of families")
    parser.add_argument("--runs", type=int, default=1, help="processes per model")
    parser.add_argument("--calibrated", action="store_true", help="only with a calibration batch")
    parser.add_argument("--data-free", action="store_true", help="only without data")
    parser.add_argument("--passes", action="store_true", help="print milliseconds per node of every pass")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--in-process", action="store_true", help="one run, here, printed as JSON")
    args = parser.parse_args(arguments)
    if args.in_process:
        print(json.dumps(compile_once(args.model[0], args.calibrated)))
        return 0

    families = {"chosen": args.model} if args.model else {f: FAMILIES[f] for f in args.family or FAMILIES}
    kinds = [kind for kind, skip in ((False, args.calibrated), (True, args.data_free)) if not skip]
    print(harness.describe_machine(), "", "processor seconds; ms per node as minimum and median; MB above what the model takes",
          f"{'model':<32}{'nodes':>6}{'seconds':>9}{'wall':>9}{'export':>13}{'ours':>16}{'total':>16}{'MB':>11}", sep="\n")  # fmt: skip
    met, found = True, []
    for models in families.values():
        for calibrated in kinds:
            rows = []
            for name in models:
                rows.append([in_own_process(name, calibrated) for _ in range(args.runs)])
                print_row(rows[-1], args.passes)
            found += [run for runs in rows for run in runs]
            if len(rows) > 1:
                met &= flat(rows)
    if args.json:
        harness.write_json(args.json, "scale", found)
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
