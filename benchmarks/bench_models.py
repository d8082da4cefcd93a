"""Latency of whole networks against other engines: same weights, input and threads, each engine in a process of its own, in turns.

    python benchmarks/bench_models.py                                         # batch 1, 2 threads, all models
    python benchmarks/bench_models.py --models resnet50 --batch 8 --threads 1 --rounds 5 --json results/models.json

A cell is the minimum over rounds (processes) of the minimum over runs, in milliseconds, with the median of the rounds' medians
beside it; "ratio" is the best other int8 engine's minimum divided by ours (above 1: we are faster). The peak is that of the
vpdpbusd instruction measured in this process on as many cores; engines that use tile instructions (AMX) can pass it.
The other engines come with `make bench-models`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import networks
from engines import ENGINES

HERE = Path(__file__).resolve().parent
#: The models the geometric mean is taken over.
HEADLINE = tuple(networks.SHAPED)
INT8_PEERS = ("ort_int8", "openvino_int8", "inductor_int8")


def call(action: str, model: str, engine: str, cache: Path, **options) -> dict:
    """One run of engines.py; {"error": last line} if it fails."""
    command = [sys.executable, str(HERE / "engines.py"), action, model, "--engine", engine, "--cache", str(cache)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:160]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_gmacs(seconds: float = 0.5) -> float:
    """vpdpbusd on one core, 10^9 products per second (the best of many short measurements); nan without the instruction."""
    from fxcompress.backends.native.kernels import kernel_library

    run = kernel_library().fxc_run_vpdpbusd
    run.argtypes, run.restype = [ctypes.c_int64], ctypes.c_int64
    best, stop = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        products = run(100_000)
        best = max(best, products / (time.perf_counter() - start) / 1e9)
    return best or math.nan


def measure(model: str, engines: list[str], cache: Path, rounds: int, **options) -> dict[str, dict]:
    """Per engine {"minimum", "median"} in milliseconds or {"error"}; the engines take turns."""
    results: dict[str, list[dict]] = {engine: [] for engine in engines}
    failed = {}
    for engine in engines:
        if not ENGINES[engine].prepare:
            continue
        if "error" in (prepared := call("prepare", model, engine, cache)):
            failed[engine] = prepared
    for _ in range(rounds):
        for engine in engines:
            if engine in failed:
                continue
            found = call("run", model, engine, cache, **options)
            if "error" in found:
                failed[engine] = found
            else:
                results[engine].append(found)
    summary = {
        engine: {"minimum": min(r["minimum"] for r in found), "median": statistics.median(r["median"] for r in found)}
        for engine, found in results.items()
        if found and engine not in failed
    }
    return summary | failed


def macs_of(model: str, cache: Path, batch: int) -> int:
    import fxcompress

    return batch * fxcompress.load(cache / f"{model}.fxc", backend="reference").report().macs


def row_of(model: str, found: dict[str, dict], macs: int, peak: float, threads: int) -> dict:
    ours = found["fxcompress"]
    peers = {e: found[e]["minimum"] for e in INT8_PEERS if "minimum" in found.get(e, {})}
    row = {"model": model, "macs": macs, "engines": found}
    if "minimum" in ours:
        gmacs = macs / ours["minimum"] / 1e6
        row |= {"gmacs": gmacs, "percent_of_peak": 100 * gmacs / (peak * threads)}
        if peers:
            best = min(peers, key=peers.get)
            row |= {"best_peer": best, "ratio": peers[best] / ours["minimum"]}
    return row


def print_row(row: dict, engines: list[str]) -> None:
    cells = []
    for engine in engines:
        found = row["engines"][engine]
        cells.append(
            f"{found['minimum']:8.3f} ({found['median']:8.3f})" if "minimum" in found else "         fails      "
        )
    ratio = f"{row['ratio']:6.2f}" if "ratio" in row else "     -"
    extra = f"{row['gmacs']:8.1f} {row['percent_of_peak']:6.0f} %" if "gmacs" in row else ""
    print(f"{row['model']:18s}", *cells, ratio, extra, sep="  ", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=networks.available())
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="running time of each process")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fxcompress_bench_models")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)

    peak = peak_gmacs()
    print(harness.describe_machine())
    print(
        f"batch {args.batch}, {args.threads} threads; vpdpbusd peak {peak:.0f} GMAC/s per core; milliseconds: minimum (median)\n"
    )
    print(f"{'model':18s}", *(f"{e:>19s}" for e in args.engines), " ratio", " GMAC/s  of peak", sep="  ")
    rows = []
    for model in args.models:
        found = measure(
            model, args.engines, args.cache, args.rounds, batch=args.batch, threads=args.threads, seconds=args.seconds
        )
        rows.append(row_of(model, found, macs_of(model, args.cache, args.batch), peak, args.threads))
        print_row(rows[-1], args.engines)
    for row in rows:
        for engine, result in row["engines"].items():
            if "error" in result:
                print(f"{row['model']}, {engine}: {result['error']}")
    ratios = [row["ratio"] for row in rows if row["model"] in HEADLINE and "ratio" in row]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(
            f"\ngeometric mean over {len(ratios)} headline models: {mean:.2f} times the best int8 peer; lowest {min(ratios):.2f}"
        )
    if args.json:
        harness.write_json(args.json, "models", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
