"""Saved models under attack: thousands of mutants are refused, or are networks that run right.

    python -m benchmarks.fuzz_artifacts                       10,000 mutants of saved networks, in processes of their own
    python -m benchmarks.fuzz_artifacts --sanitized           the same on a kernel library built with AddressSanitizer

Half of the mutants are damaged bytes: accepted only where nothing changed. The others are rewritten (numbers, names, shapes, operators) and sealed
with a right checksum: what is loaded must give, natively, the bits of the reference. A crash, another exception or another answer
fails with the seed to repeat it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import fxcompress
from fxcompress.backends.native import kernels
from tests.support.artifact_mutants import mutant, outcome
from tests.support.graphs import Tokens, build, images, randomize
from tests.support.kernel_build import build_sanitized, sanitizer_environment

#: What is saved: a structure of tests/support/graphs.py (or tokens, blocks), and how it is compiled.
STRUCTURES = {
    "residual_block": {}, "squeeze_excite": {}, "upsampling_block": {}, "concat_block": {}, "classifier": {}, "tokens": {},
    "blocks": {"matmul_algorithm": "strassen"}, "residual_block tiles": {"conv_algorithm": "winograd2"},
    "residual_block narrow": {"target": "w4a8", "weight_quantizer": "power", "spiq": True},
}  # fmt: skip
CHUNK = 250  # mutants per process


def saved(name: str) -> bytes:
    """A compiled network as bytes."""
    options, structure = dict(STRUCTURES[name]), name.split()[0]
    if structure == "tokens":
        inputs = (torch.tensor([[3, 5, 7, 0, 0], [1, 2, 3, 4, 5]]),)
        model, options["calibration_data"] = randomize(Tokens()), [inputs]
    elif structure == "blocks":  # layers large enough to be cut
        model = randomize(nn.Sequential(nn.Linear(128, 130), nn.ReLU(), nn.Linear(130, 96)))
        inputs = (images(2, 65, 128),)
    else:
        model, inputs = build(structure)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.fxc"
        fxcompress.compile(model, example_inputs=inputs, **options).save(path)
        return path.read_bytes()


def worker(name: str, first: int, count: int) -> int:
    """Prints a JSON line of counts, and one per failure."""
    torch.set_num_threads(1)
    original, counts, failed = saved(name), Counter(), 0
    for seed in range(first, first + count):
        try:
            found = outcome(mutant(original, seed), original)
            assert seed % 2 == 0 or found != "other network", "a damaged file was accepted"
            counts[found] += 1
        except Exception as error:
            failed += 1
            print(json.dumps({"failed": seed, "why": traceback.format_exception_only(error)[-1].strip()}), flush=True)
    print(json.dumps(counts), flush=True)
    return failed > 0


def run(name: str, first: int, count: int, library: str | None) -> tuple[Counter, list[str]]:
    """One process: (outcomes, failures)."""
    command = [sys.executable, "-m", "benchmarks.fuzz_artifacts", "--worker", name, str(first), "--count", str(count)]
    environment = None
    if library:
        command += ["--kernel-library", library]
        environment = sanitizer_environment("allocator_may_return_null=1")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failures = [f"{name} {line['failed']}: {line['why']}" for line in lines if "failed" in line]
    counts = Counter(lines[-1] if lines and "failed" not in lines[-1] else {})
    if done.returncode not in (0, 1) or not counts:
        told = [
            line
            for line in done.stderr.splitlines()
            if "ERROR: " in line or line.startswith(("SUMMARY", "    #0", "    #1 ", "    #2 "))
        ]
        failures.append(
            f"{name} {first}..{first + count - 1}: exit status {done.returncode}: "
            + "\n".join(told[:6] or done.stderr.splitlines()[-3:])
        )
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument(
        "--sanitized", action="store_true", help="build the kernel library with AddressSanitizer first (a minute)"
    )
    parser.add_argument("--worker", nargs=2, metavar=("STRUCTURE", "FIRST"), help=argparse.SUPPRESS)
    parser.add_argument("--kernel-library", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kernel_library:
        kernels.kernel_library_path = lambda: args.kernel_library
    if args.worker:
        return worker(args.worker[0], int(args.worker[1]), args.count)
    counts, failures, done, structures = Counter(), [], 0, args.structures
    with contextlib.ExitStack() as stack:
        library = None
        if args.sanitized:
            library = str(build_sanitized(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        for number, first in enumerate(range(args.first, args.first + args.count, CHUNK)):
            size = min(CHUNK, args.first + args.count - first)
            found, wrong = run(structures[number % len(structures)], first, size, library)
            counts, failures, done = counts + found, failures + wrong, done + size
            print(f"\r{done} mutants: {dict(counts)}, {len(failures)} failures", end="", flush=True)
    print("".join(f"\n{failure}" for failure in failures))
    return len(failures) > 0


if __name__ == "__main__":
    raise SystemExit(main())
