"""Real networks taken away: as C source, bit for bit, and as ONNX, with the same answers. ``benchmarks/bench_c.py`` runs every test sample."""

import pytest
import torch
from bench_accuracy import CALIBRATED, compile_workload
from cifar_resnet import PIXEL_MEAN, PIXEL_STD, load_images, load_resnet20

import fxcompress
from tests.support.c_build import run_test
from tests.support.real import workload


def test_resnet20_as_c(tmp_path):
    images, _ = load_images("test")
    net = fxcompress.compile(
        load_resnet20(), example_inputs=images[:1], input_range=(0, 255), input_normalization=(PIXEL_MEAN, PIXEL_STD)
    )
    source = net.export_c(tmp_path, channels_last=True, samples=images[:3])
    assert run_test(source) == "3 calls, 0 wrong\n"
    assert source.weight_bytes == sum(p.weight_bytes for p in net.report().products)
    assert source.arena_bytes < 3 * 16 * 32 * 32 + 1024  # two maps and the branch of the widest block
    (values,) = (
        fxcompress.backends.reference.ReferenceBackend()
        .lower(source.core.graph_module)
        .run(*source.core.codes((images[:3],)))
    )
    assert torch.equal(values.argmax(1), net(images[:3]).argmax(1))


#: name -> most bytes of RAM: what fits the boards the benchmark is made for
RAM = {"resnet8": 64_000, "vww": 130_000, "kws": 20_000, "ad": 8_000}


@pytest.mark.real_data
@pytest.mark.parametrize("name", RAM)
def test_mlperf_tiny_as_c(name, tmp_path):
    work = workload(name, 4)
    net = compile_workload(work, CALIBRATED)
    source = net.export_c(tmp_path, channels_last=True, samples=work.inputs[:4].float())
    assert run_test(source) == "4 calls, 0 wrong\n"
    assert source.ram_bytes < RAM[name]


@pytest.mark.real_data
def test_keyword_spotting_as_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    work = workload("kws", 200)
    net = compile_workload(work, CALIBRATED)
    net.export_onnx(tmp_path / "kws.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "kws.onnx", providers=["CPUExecutionProvider"])
    x = work.inputs.float()
    theirs = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    assert (theirs.argmax(1) == net(x).argmax(1)).double().mean() >= 0.98
