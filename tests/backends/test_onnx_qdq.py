"""The exported ONNX model is the qdq graph: run by onnxruntime node by node it gives the same values, and in integers close ones."""

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.backends import onnx_qdq
from fxcompress.errors import ArtifactError, BackendError, UnsupportedOperatorError
from fxcompress.report import sqnr_db
from tests.support.graphs import Tokens, build, randomize

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def run(path, inputs, optimized: bool = False) -> list[torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    named = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, named)]


def check(model, inputs, path, **options) -> onnx.ModelProto:
    """Compile, export, run at two batch sizes; returns the ONNX model."""
    net = fxcompress.compile(model, example_inputs=inputs, **options)
    net.export_onnx(path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    for call in (inputs, [torch.cat([x, x, x]) for x in inputs]):
        expected = net._first.qdq(*call)
        for a, b in zip(expected, run(path, call), strict=True):
            assert sqnr_db(a, b) > 100  # float32 rounding
        for a, b in zip(expected, run(path, call, optimized=True), strict=True):
            assert sqnr_db(a, b) > 35  # codes that differ by one, rounded by other rules
    return onnx.load(path)


def count(model: onnx.ModelProto, kind: str) -> int:
    return sum(node.op_type == kind for node in model.graph.node)


def test_onnxruntime_gives_the_values_of_the_qdq_level(tmp_path):
    model, inputs = build("two_inputs")
    exported = check(model, inputs, tmp_path / "m.onnx")
    assert [i.name for i in exported.graph.input] == ["left", "right"]
    assert count(exported, "QuantizeLinear") > 0 and count(exported, "DequantizeLinear") > count(exported, "Conv")
    weights = {len(i.raw_data) for i in exported.graph.initializer if i.data_type == onnx.TensorProto.INT8}
    assert {
        p.numel() for p in model.parameters() if p.ndim == 4
    } <= weights  # integers in the file, not what they stand for


def test_narrow_codes_and_scales_per_channel(tmp_path):
    """Four-bit activations saturate at 15, and weights whose scales ONNX cannot say stay right."""
    model, inputs = build("inverted_residual")
    check(model, inputs, tmp_path / "m.onnx", target="w4a4", spiq=True)


class Pools(nn.Module):
    """What the exporter does not know as it is: adaptive pools of odd sizes, padding with a value per channel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return nn.functional.adaptive_max_pool2d(torch.relu(self.conv(x)), (3, 2)).flatten(1)


def test_tokens(tmp_path):
    ids = torch.tensor([[3, 5, 7, 0, 0], [1, 2, 3, 4, 5]])
    check(randomize(Tokens()), (ids,), tmp_path / "m.onnx", calibration_data=[(ids,)])


def test_padding_per_channel_and_adaptive_pools(tmp_path):
    x = torch.rand(2, 3, 7, 5)
    normalization = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    check(
        randomize(Pools()),
        (x,),
        tmp_path / "m.onnx",
        input_range=(0, 1),
        input_normalization=normalization,
        calibration_data=[x],
    )


def test_a_loaded_model_is_refused(tmp_path):
    model, inputs = build("mlp")
    fxcompress.compile(model, example_inputs=inputs).save(tmp_path / "m.fxc")
    with pytest.raises(ArtifactError, match="a saved model holds its integers only"):
        fxcompress.load(tmp_path / "m.fxc").export_onnx(tmp_path / "m.onnx")


def test_mistakes_are_named(tmp_path, monkeypatch):
    model, inputs = build("mlp")
    net = fxcompress.compile(model, example_inputs=inputs)
    with pytest.raises(ArtifactError, match=r"cannot write .*No such file"):
        net.export_onnx(tmp_path / "nowhere" / "m.onnx")
    monkeypatch.setattr(onnx_qdq, "_translations", lambda: {})
    with pytest.raises(UnsupportedOperatorError, match=r"torch.onnx.export failed: .*onnx_(de)?quantize"):
        net.export_onnx(tmp_path / "m.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(
        BackendError, match=r"ONNX export: the package onnxscript is not installed. .*fxcompress\[onnx\]"
    ):
        net.export_onnx(tmp_path / "m.onnx")
