"""Compile time, data-free, of a ResNet-50-shaped model: seconds per stage, over several processes.

    python benchmarks/bench_compile.py                    # 5 processes, one after the other
    python benchmarks/bench_compile.py --model mobilenetv2_w1 --runs 3 --json results/compile.json

The model comes from pytorchcv (`make bench-deps`) with random weights; its batch-norm statistics are those of a few
train-mode forward passes, so that data-free ranges have something to stand on. Every run is a process of its own:
imports, caches and thread pools of one do not help the next. Importing torch and building the model do not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import harness
import torch
from harness import Timing

LIMIT_SECONDS = 10.0  # for ResNet-50


def shaped_model(name: str, size: int) -> torch.nn.Module:
    """The pytorchcv model with seeded random weights and the batch-norm statistics of random images; eval mode."""
    from pytorchcv.model_provider import get_model

    torch.manual_seed(0)
    model = get_model(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # cumulative average instead of a decaying one
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, size, size))
    return model.eval()


def compile_once(name: str, size: int) -> dict[str, float]:
    """Seconds of every stage of one compilation in this process, in order, "total" last."""
    import fxcompress

    model, example = shaped_model(name, size), torch.randn(1, 3, size, size)
    start = time.perf_counter()
    compiled = fxcompress.compile(model, target="int8", example_inputs=(example,), input_range=(-3.0, 3.0))
    total = time.perf_counter() - start
    report = compiled.report().to_dict()
    stages = {"capture": report["seconds"]["capture"]}
    stages |= {entry["name"]: entry["seconds"] for entry in report["passes"]}
    stages["checks after the passes"] = sum(entry["check_seconds"] for entry in report["passes"])
    stages["verify"] = report["seconds"]["verify"]
    return stages | {"rest": total - sum(stages.values()), "total": total}


def in_own_process(name: str, size: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--model", name, "--size", str(size), "--in-process"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="name of a pytorchcv model")
    parser.add_argument("--size", type=int, default=224, help="height and width of the input")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--in-process", action="store_true", help="one run, here, printed as JSON")
    args = parser.parse_args(arguments)
    if args.in_process:
        print(json.dumps(compile_once(args.model, args.size)))
        return 0

    print(
        harness.describe_machine(),
        "",
        f"{args.model}, {args.runs} processes: minimum, median, maximum seconds",
        sep="\n",
    )
    runs = [in_own_process(args.model, args.size) for _ in range(args.runs)]
    stages = {stage: Timing.of(run[stage] for run in runs) for stage in runs[0]}
    for stage, timing in stages.items():
        print(f"  {stage:<32} {timing.minimum:8.3f} {timing.median:8.3f} {timing.maximum:8.3f}")
    if args.json:
        harness.write_json(args.json, "compile", runs)
    if args.model != "resnet50":
        return 0
    met = stages["total"].median < LIMIT_SECONDS
    print(f"  target: median below {LIMIT_SECONDS:.0f} s: {'pass' if met else 'FAIL'}")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
