"""Exported C source of real networks: equal to the integer network on every test input, its flash and RAM, its time.

    python benchmarks/bench_c.py                       # the data folder's models (real_models.py); gcc
    python benchmarks/bench_c.py --models resnet8 --limit 100

The C code is compiled with -O2 as a shared library and called on each sample of the test set; its outputs are compared bit for bit with the
integer graph that was exported, run by the reference backend. Code bytes: the .text of model.c and of the kernels it calls, with -Os.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
import tempfile
import time

import torch
from bench_accuracy import CALIBRATED, available, compile_workload
from harness import describe_machine, write_json
from real_models import Workload

from fxcompress.backends.c_source import CSource
from fxcompress.backends.reference import ReferenceBackend

MODELS = ("resnet8", "vww", "kws", "ad", "resnet20")
CHUNK = 50  # samples whose expected outputs are computed at once


def build(source: CSource) -> ctypes.CDLL:
    library = source.directory / "model.so"
    files = [source.directory / name for name in ("model.c", "fxc_kernels.c")]
    subprocess.run(
        [
            "gcc",
            "-std=c99",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pedantic",
            "-O2",
            "-shared",
            "-fPIC",
            "-o",
            library,
            *files,
        ],
        check=True,
    )
    return ctypes.CDLL(str(library))


def code_bytes(source: CSource) -> int:
    """The machine code a program that calls model_run gets, unused kernels dropped by the linker."""
    main = source.directory / "main.c"
    main.write_text("int model_run();\nint main(void) { return model_run(); }\n")
    program = source.directory / "main"
    files = [source.directory / name for name in ("model.c", "fxc_kernels.c")]
    flags = ["-std=c99", "-Os", "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections", "-w"]
    subprocess.run(["gcc", *flags, "-o", program, main, *files], check=True)
    listed = subprocess.run(
        ["nm", "--print-size", "--defined-only", program], check=True, capture_output=True, text=True
    ).stdout
    symbols = re.findall(r"^\w+ (\w+) [tT] (\w+)$", listed, re.MULTILINE)
    ours = {*re.findall(r"\b(\w+)\(", (source.directory / "fxc_kernels.c").read_text()), "model_run"}
    return sum(int(size, 16) for size, name in symbols if name.split(".")[0] in ours)


def measure(work: Workload, limit: int | None) -> dict:
    """One row: bytes, samples compared, how many differ, processor milliseconds per sample."""
    network = compile_workload(work, CALIBRATED)
    samples = work.inputs if limit is None else work.inputs[:limit]
    with tempfile.TemporaryDirectory() as folder:
        source = network.export_c(folder, channels_last=True)
        run = build(source).model_run
        reference = ReferenceBackend().lower(source.core.graph_module)
        (port,), wrong, seconds = source.core.outputs, 0, 0.0
        out = torch.empty(port.shape, dtype=port.dtype)
        for chunk in samples.split(CHUNK):
            (codes,) = source.core.codes((chunk.float(),))
            (expected,) = reference.run(codes)
            for x, y in zip(codes, expected, strict=True):
                start = time.process_time()
                status = run(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()))
                seconds += time.process_time() - start
                wrong += status != 0 or not torch.equal(out[0], y)
        row = source.to_dict() | {"code_bytes": code_bytes(source)}
    return {
        "model": work.name,
        "macs": network.report().macs,
        "samples": len(samples),
        "wrong": wrong,
        "ms": 1e3 * seconds / len(samples),
        **row,
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| network | MACs | flash | of it weights | code | RAM | of it arena | test samples | different | processor ms |",
        "|" + "---|" * 10,
    ]
    for r in rows:
        lines.append(
            f"| {r['model']} | {r['macs'] / 1e6:.2f} M | {r['flash_bytes']:,} | {r['weight_bytes']:,} | {r['code_bytes']:,} | {r['ram_bytes']:,} | "
            f"{r['arena_bytes']:,} | {r['samples']:,} | {r['wrong']} | {r['ms']:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--limit", type=int, help="samples per model; default all")
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    rows = []
    for work in available(args.models):
        rows.append(measure(work, args.limit))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{describe_machine()}\n\n{table(rows)}")
    if args.json:
        write_json(args.json, "c_source", rows)
    return any(row["wrong"] for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
