"""The exported ONNX models of real networks, run by ONNX Runtime: how far they agree with the integer network.

    python benchmarks/bench_onnx.py                    # needs onnx, onnxscript, onnxruntime

Per model, over the reported part of its test set: the metric of the integer network and of ONNX Runtime (optimized, its own int8 kernels), the share of
samples with the same largest output, and the largest difference of an output in steps of an 8-bit scale over the outputs' range.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnxruntime
import torch
from bench_accuracy import CALIBRATED, available, compile_workload
from harness import describe_machine, write_json
from real_models import LOADERS, Workload

from fxcompress.report import sqnr_db


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def measure(work: Workload) -> dict:
    network = compile_workload(work, CALIBRATED)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{work.name}.onnx"
        network.export_onnx(path)
        size, runtime = path.stat().st_size, session(path)
    name = runtime.get_inputs()[0].name
    ours = work.outputs(network)
    theirs = work.outputs(lambda x: torch.from_numpy(runtime.run(None, {name: x.numpy()})[0]))
    step = float(ours.max() - ours.min()) / 255
    return {
        "model": work.name, "unit": work.unit, "samples": len(work.inputs), "float": work.metric(work.outputs(work.run_float)),
        "integer": work.metric(ours), "onnxruntime": work.metric(theirs), "same_argmax": (ours.argmax(1) == theirs.argmax(1)).double().mean().item(),
        "largest_steps": float((ours - theirs).abs().max()) / step, "mean_steps": float((ours - theirs).abs().mean()) / step,
        "sqnr": sqnr_db(ours, theirs), "onnx_bytes": size,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = [
        "| network | samples | float | fxcompress | ONNX Runtime | same largest output | mean difference | largest | SQNR |",
        "|" + "---|" * 9,
    ]
    for r in rows:
        digits = 2 if r["unit"] == "%" else 4
        metrics = " | ".join(f"{r[k]:.{digits}f}" for k in ("float", "integer", "onnxruntime"))
        lines.append(f"| {r['model']} | {r['samples']:,} | {metrics} | {r['same_argmax']:.2%} | {r['mean_steps']:.2f} steps | "
                     f"{r['largest_steps']:.1f} steps | {r['sqnr']:.1f} dB |")  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(LOADERS), choices=LOADERS)
    parser.add_argument("--limit", type=int, help="labels per model; default all")
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    rows = []
    for work in available(args.models):
        rows.append(measure(work.reported(args.limit)))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{describe_machine()}, onnxruntime {onnxruntime.__version__}\n\n{table(rows)}")
    if args.json:
        write_json(args.json, "onnx", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
