"""Inference engines to compare with: each prepares a model once, then runs it in a process of its own.

    python benchmarks/engines.py prepare resnet18 --engine openvino_int8 --cache DIR
    python benchmarks/engines.py run resnet18 --engine openvino_int8 --batch 1 --threads 2 --cache DIR

``prepare`` writes what ``run`` loads into the cache folder, so that quantizing and converting are not timed. Every engine gets
the same module, the same calibration inputs (``networks.py``) and per-channel weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import networks
import torch
from torch import Tensor


def export_onnx(model: str, path: Path) -> Path:
    if not path.exists():
        batch, network = torch.export.Dim("batch", min=1), networks.load(model)
        torch.onnx.export(network.module, (network.inputs(2),), path, input_names=["x"], output_names=["y"], dynamo=True,
                          dynamic_shapes=({0: batch},), external_data=False, verbose=False)  # fmt: skip
    return path


# ------------------------------------------------------------------------------------------------------- engines


@dataclass(frozen=True)
class Engine:
    """``prepare(model, folder)`` once, if there is anything to prepare; ``load(model, folder, batch, threads)`` returns a function of one image tensor."""

    prepare: Callable[[str, Path], None] | None
    load: Callable[[str, Path, int, int], Callable[[Tensor], object]]


def _prepare_ours(model: str, folder: Path) -> None:
    import fxcompress

    if not (path := folder / f"{model}.fxc").exists():
        network = networks.load(model)
        compiled = fxcompress.compile(
            network.module, example_inputs=(network.inputs(1),), calibration_data=network.calibration
        )
        compiled.save(path)


def _load_ours(model: str, folder: Path, batch: int, threads: int) -> Callable:
    import fxcompress

    torch.set_num_threads(threads)
    return fxcompress.load(folder / f"{model}.fxc", backend="native")


def _load_torch(model: str, folder: Path, batch: int, threads: int) -> Callable:
    torch.set_num_threads(threads)
    module = networks.load(model).module.to(memory_format=torch.channels_last)

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(x.to(memory_format=torch.channels_last) if x.ndim == 4 else x)

    return run


def _prepare_onnx(model: str, folder: Path) -> None:
    export_onnx(model, folder / f"{model}.onnx")


def _prepare_ort_int8(model: str, folder: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter({"x": x.numpy()} for x in networks.load(model).calibration)

        def get_next(self):
            return next(self.batches, None)

    source, target = export_onnx(model, folder / f"{model}.onnx"), folder / f"{model}.qdq.onnx"
    if not target.exists():
        quant_pre_process(source, folder / f"{model}.pre.onnx")
        quantize_static(folder / f"{model}.pre.onnx", target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)  # fmt: skip


def _load_ort(suffix: str) -> Callable:
    def load(model: str, folder: Path, batch: int, threads: int) -> Callable:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        session = onnxruntime.InferenceSession(folder / f"{model}{suffix}", options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"x": x.numpy()})

    return load


def _prepare_openvino_int8(model: str, folder: Path) -> None:
    import nncf
    import openvino

    if not (target := folder / f"{model}.int8.xml").exists():
        source = openvino.convert_model(export_onnx(model, folder / f"{model}.onnx"))
        dataset = nncf.Dataset(networks.load(model).calibration, lambda x: {"x": x.numpy()})
        openvino.save_model(nncf.quantize(source, dataset), target, compress_to_fp16=False)


def _load_openvino(suffix: str) -> Callable:
    def load(model: str, folder: Path, batch: int, threads: int) -> Callable:
        import openvino

        network = openvino.Core().read_model(folder / f"{model}{suffix}")
        network.reshape([batch, *networks.load(model).inputs(1).shape[1:]])
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(network, "CPU", settings)
        request = compiled.create_infer_request()
        return lambda x: request.infer({0: x.numpy()}, share_inputs=True)

    return load


def _load_inductor_int8(model: str, folder: Path, batch: int, threads: int) -> Callable:
    """PT2E: quantized and compiled by Inductor in this process; it has no file to load."""
    import torch._inductor.config
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    torch.set_num_threads(threads)
    torch._inductor.config.freezing = True  # without it Inductor dequantizes the weights on every call
    network = networks.load(model)
    example = (network.inputs(batch),)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(network.module, example).module(), quantizer)
    for x in network.calibration:
        prepared(x[:batch])
    with torch.no_grad():
        compiled = lower_pt2e_quantized_to_x86(convert_pt2e(prepared), example)

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return compiled(x)

    return run


ENGINES = {
    "fxcompress": Engine(_prepare_ours, _load_ours),
    "ort_int8": Engine(_prepare_ort_int8, _load_ort(".qdq.onnx")),
    "openvino_int8": Engine(_prepare_openvino_int8, _load_openvino(".int8.xml")),
    "inductor_int8": Engine(None, _load_inductor_int8),
    "torch_fp32": Engine(None, _load_torch),
    "ort_fp32": Engine(_prepare_onnx, _load_ort(".onnx")),
    "openvino_fp32": Engine(_prepare_onnx, _load_openvino(".onnx")),
}


def time_engine(engine: str, model: str, folder: Path, batch: int, threads: int, seconds: float) -> dict[str, float]:
    """Milliseconds of single inferences in this process: minimum and median over about ``seconds`` of running."""
    run, x = ENGINES[engine].load(model, folder, batch, threads), networks.load(model).inputs(batch)
    for _ in range(5):
        run(x)
    times, stop = [], time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times) < 10:
        start = time.perf_counter()
        run(x)
        times.append(1e3 * (time.perf_counter() - start))
    times.sort()
    return {"minimum": times[0], "median": times[len(times) // 2], "runs": len(times)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("prepare", "run"))
    parser.add_argument("model")
    parser.add_argument("--engine", required=True, choices=ENGINES)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.action == "prepare":
        if prepare := ENGINES[args.engine].prepare:
            prepare(args.model, args.cache)
        print(json.dumps({"prepared": args.model}))
    else:
        print(json.dumps(time_engine(args.engine, args.model, args.cache, args.batch, args.threads, args.seconds)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
