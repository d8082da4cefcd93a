"""Which models of a whole zoo compile: one of every family of pytorchcv, integer-only, with its SQNR or the reason why not.

    python benchmarks/bench_coverage.py                              # every family; minutes to hours
    python benchmarks/bench_coverage.py --only resnet dla --fresh    # these again
    python benchmarks/bench_coverage.py --table                      # the table of the results so far

Every model is compiled in a process of its own under a time limit, so that a crash or a hang is a row and not the end.
Rows are appended to a file of JSON lines as they come; families that have a row are not run again. ``zoo.py`` says how the
networks and images are made. ``compile`` gets the range of the pixels and 8 images for calibration, and no other option; the
SQNR is measured on 4 others; of several outputs the worst counts. "differences" is the SQNR
against that part of the outputs alone that differs between the images, the harder question where they have much in common.
"input" is the SQNR of the float model when nothing but its image is rounded to 8 bits: how much noise this random network
makes of the least that any 8-bit network starts with.

Status: "integer-only"; "refused", an error that fxcompress raises on purpose, with its text; "FAILED", anything else (another
exception, a crash, the time limit); "left out", the families that do not take one image, or that the zoo itself cannot run. Exit status 1 when a
target below is missed on the whole zoo.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness
import torch
import zoo
from torch import Tensor
from torch.utils._pytree import tree_leaves

INTEGER_ONLY, REFUSED, FAILED, LEFT_OUT = "integer-only", "refused", "FAILED", "left out"
MIN_INTEGER_ONLY, MIN_ACCURATE, GOOD_SQNR = 110, 90, 15.0  # families, families, dB
CALIBRATION_IMAGES, HELD_OUT_IMAGES = 8, 4
MEMORY_BYTES = 14 << 30
RESULTS = harness.ROOT / "benchmarks" / "results" / "coverage.jsonl"


# ------------------------------------------------------------------------------------------------------- one model


def measure(family: str, trained_like: bool = False) -> dict:
    """The row of one family, in this process. Nothing is raised: an exception is part of the row."""
    import fxcompress
    from fxcompress.errors import FxcompressError
    from fxcompress.pipeline import default_passes

    entry = zoo.load(family, trained_like=trained_like)
    row = {"family": family, "model": entry.name, "input": list(entry.shape)}
    counter = _node_counter()
    passes = default_passes("int8")
    passes.insert(0, counter)
    start = time.perf_counter()
    try:
        compiled = fxcompress.compile(
            entry.model,
            example_inputs=(entry.images(1, seed=1),),
            calibration_data=list(entry.images(CALIBRATION_IMAGES, seed=1).split(2)),
            input_range=zoo.PIXEL_RANGE,
            passes=passes,
        )
        row["seconds"] = time.perf_counter() - start
        certificate = compiled.verify_integer_only()
        row["status"] = INTEGER_ONLY if certificate.integer_only else FAILED
        held_out = entry.images(HELD_OUT_IMAGES, seed=2)
        with torch.no_grad():
            expected = outputs(entry.model(held_out))
            row |= compare(expected, outputs(compiled(held_out)))
            row["input_sqnr"] = compare(expected, outputs(entry.model(rounded_pixels(held_out))))["sqnr"]
    except Exception as error:
        own = isinstance(error, FxcompressError)
        row["seconds"] = time.perf_counter() - start
        row |= {"status": REFUSED if own else FAILED, "error": type(error).__name__, "reason": str(error)}
        row["traceback"] = traceback.format_exc()
    return row | {"nodes": counter.nodes}


def _node_counter():
    """A pass that changes nothing and notes how many nodes the captured graph has."""
    from fxcompress.rewrite import Effect, Level, Pass, Plan

    class CountNodes(Pass):
        name, level, effect = "count_nodes", Level.FLOAT, Effect.EXACT
        nodes = None

        def plan(self, gm) -> Plan:
            self.nodes = self.nodes or len(gm.graph.nodes)
            return Plan(self.name, gm)

    return CountNodes()


def rounded_pixels(images: Tensor) -> Tensor:
    """The images in 256 steps over the range of the pixels."""
    lo, hi = zoo.PIXEL_RANGE
    step = (hi - lo) / 255
    return torch.round((images - lo) / step) * step + lo


def outputs(result: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def compare(expected: list[Tensor], found: list[Tensor]) -> dict:
    """Worst SQNR over the outputs, of all of their power and of that which differs between images, in dB."""
    from fxcompress.report import sqnr_db

    if [t.shape for t in expected] != [t.shape for t in found]:
        raise RuntimeError(f"outputs {[tuple(t.shape) for t in found]}, not {[tuple(t.shape) for t in expected]}")
    pairs = list(zip(expected, found, strict=True))
    differences = [sqnr_db(e - e.mean(0), f - e.mean(0)) for e, f in pairs]
    return {"sqnr": min(sqnr_db(e, f) for e, f in pairs), "differences": min(differences), "outputs": len(pairs)}


def in_own_process(family: str, limit: float, trained_like: bool) -> dict:
    """The row of one family, from a process of its own that may crash or hang."""
    command = [sys.executable, __file__, "--measure", family, *["--trained-like"] * trained_like]
    row = {"family": family, "model": zoo.FAMILIES[family], "status": FAILED}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return row | {"error": "TimeoutExpired", "reason": f"no result after {limit:.0f} s"}
    if done.returncode:
        return row | {
            "error": f"exit status {done.returncode}",
            "reason": " ".join(done.stderr.strip().splitlines()[-1:]),
        }
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------- many models


def read(path: Path) -> dict[str, dict]:
    """The latest row of every family in a results file; a last line cut short by an interruption is dropped."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["family"]] = row
    return rows


def run(families: Iterable[str], path: Path, jobs: int, limit: float, trained_like: bool) -> None:
    """Measure the families and append their rows to ``path`` as they come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file, ThreadPoolExecutor(jobs) as pool:

        def one(family: str) -> None:
            row = in_own_process(family, limit, trained_like)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(line(row), flush=True)

        list(pool.map(one, families))


HEADER = f"{'family':<22} {'model':<34} {'nodes':>5} {'compile s':>9}  {'status':<12} {'SQNR':>6} {'differences':>11} {'input':>6}  reason"


def line(row: dict) -> str:
    sqnr, differences, seconds = row.get("sqnr"), row.get("differences"), row.get("seconds")
    reason = " ".join(f"{row['error']}: {row['reason']}".split())[:160] if "error" in row else ""
    return (
        f"{row['family']:<22} {row['model']:<34} {row.get('nodes') or '-':>5} "
        f"{'-' if seconds is None else format(seconds, '.1f'):>9}  {row['status']:<12} "
        f"{'-' if sqnr is None else format(sqnr, '.1f'):>6} "
        f"{'-' if differences is None else format(differences, '.1f'):>11} "
        f"{format(row['input_sqnr'], '.1f') if 'input_sqnr' in row else '-':>6}  {reason}"
    ).rstrip()


def table(rows: dict[str, dict]) -> str:
    """Every family of the zoo that has a row or is left out, and why some are refused, in Markdown."""
    lines = [
        "| family | model | image | nodes | compile s | result | SQNR dB | differences dB | input only dB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for family in sorted(rows | zoo.LEFT_OUT):
        if family in zoo.LEFT_OUT:
            lines.append(f"| {family} | - | - | - | - | {LEFT_OUT}: {zoo.LEFT_OUT[family]} | - | - | - |")
            continue
        row = rows[family]
        shape = "x".join(map(str, row["input"])) if "input" in row else "-"
        result = row["status"] + (f": {row['error']}" if "error" in row else "")
        measured = [row.get(key) for key in ("sqnr", "differences", "input_sqnr")]
        sqnr = " | ".join("-" if value is None else f"{value:.1f}" for value in measured)
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else "-"
        lines.append(
            f"| {family} | {row['model']} | {shape} | {row.get('nodes') or '-'} | {seconds} | {result} | {sqnr} |"
        )
    refused = [f"- {f}: {' '.join(row['reason'].split())}" for f, row in sorted(rows.items()) if "reason" in row]
    return "\n".join([*lines, "", "What the user is told:", "", *refused] if refused else lines)


def counts(rows: Iterable[dict]) -> dict[str, int]:
    rows = list(rows)
    integer = [row for row in rows if row["status"] == INTEGER_ONLY]
    return {
        "families": len(rows),
        "integer-only": len(integer),
        f"SQNR >= {GOOD_SQNR:.0f} dB": sum(_is_accurate(row) for row in integer),
        "refused": sum(row["status"] == REFUSED for row in rows),
        "failed": sum(row["status"] == FAILED for row in rows),
    }


def _is_accurate(row: dict) -> bool:
    return not math.isnan(row["sqnr"]) and row["sqnr"] >= GOOD_SQNR


def meets_targets(rows: dict[str, dict]) -> bool:
    _, integer, accurate, _, failed = counts(rows.values()).values()
    return integer >= MIN_INTEGER_ONLY and accurate >= MIN_ACCURATE and failed == 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(zoo.FAMILIES), metavar="FAMILY", help="these families only")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=1200, help="seconds per model")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="file of JSON lines, default benchmarks/results/coverage.jsonl"
    )
    parser.add_argument("--fresh", action="store_true", help="run families again that have a row")
    parser.add_argument(
        "--table", action="store_true", help="only print the table of the results there are, in Markdown"
    )
    parser.add_argument("--trained-like", action="store_true", help="smooth kernels, beta 0.5 (see zoo.py)")
    parser.add_argument("--measure", choices=list(zoo.FAMILIES), metavar="FAMILY", help="one family, here, as JSON")
    args = parser.parse_args(arguments)
    if args.measure:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        warnings.filterwarnings("ignore")
        print(json.dumps(measure(args.measure, args.trained_like)))
        return 0
    families = args.only or list(zoo.FAMILIES)
    if not args.table:
        done = {} if args.fresh else read(args.results)
        print(harness.describe_machine(), HEADER, sep="\n\n", flush=True)
        run([f for f in families if f not in done], args.results, args.jobs, args.limit, args.trained_like)
    rows = {f: row for f, row in sorted(read(args.results).items()) if f in families}
    if args.table:
        print(table(rows), end="\n\n")
    print(", ".join(f"{count} {what}" for what, count in counts(rows.values()).items()))
    return int(len(rows) == len(zoo.FAMILIES) and not meets_targets(rows))


if __name__ == "__main__":
    sys.exit(main())
