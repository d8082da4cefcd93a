"""Published pretrained networks on real inputs: compiled in one call, integer-only, with the answers they had.

A few hundred inputs cannot resolve a tenth of a point of accuracy, so the tests bound what they can resolve: the SQNR of
the outputs and the share of changed predictions. ``benchmarks/bench_accuracy.py`` measures the accuracy on whole sets.
"""

import pytest
import torch
from bench_accuracy import CALIBRATED, DATA_FREE, compile_workload
from cifar_resnet import PIXEL_MEAN, PIXEL_STD, load_images, load_resnet20
from real_models import Workload, auc

import fxcompress
from fxcompress.backends.reference import ReferenceBackend
from fxcompress.report import sqnr_db
from tests.support.real import workload


@pytest.fixture(scope="module")
def shipped() -> Workload:
    """The ResNet-20 of ``examples/data`` on 300 test images: on every machine."""
    images, labels = load_images("test")
    return Workload(
        "resnet20",
        load_resnet20(),
        inputs=images[:300],
        labels=labels[:300],
        calibration=load_images("calibration")[0],
        input_range=(0.0, 255.0),
        normalization=(PIXEL_MEAN.flatten().tolist(), PIXEL_STD.flatten().tolist()),
    )


@pytest.fixture(scope="module")
def compiled(shipped) -> fxcompress.CompiledModule:
    return compile_workload(shipped, CALIBRATED)


def compare(work: Workload, network) -> tuple[float, float, float]:
    """(output SQNR in dB, share of changed predictions, metric of float minus metric of integer)."""
    expected, found = work.outputs(work.run_float), work.outputs(network)
    changed = (expected.argmax(1) != found.argmax(1)).double().mean().item()
    return sqnr_db(expected, found), changed, work.metric(expected) - work.metric(found)


def assert_native_is_reference(work: Workload, network: fxcompress.CompiledModule) -> None:
    """Bit for bit on real inputs, an odd batch."""
    assert network.report().backend == "native"
    x = work.inputs[:7].float()
    with torch.inference_mode():
        (expected,) = ReferenceBackend().lower(network.graph_module).run(x)
        assert torch.equal(network(x), expected)


def test_shipped_model_gives_the_bits_of_the_reference(shipped, compiled):
    assert_native_is_reference(shipped, compiled)


def test_shipped_model_calibrated(shipped, compiled):
    quality, changed, drop = compare(shipped, compiled)
    assert quality >= 28
    assert changed <= 0.02
    assert drop <= 1.0


def test_shipped_model_data_free(shipped):
    quality, changed, drop = compare(shipped, compile_workload(shipped, DATA_FREE))
    assert quality >= 27
    assert changed <= 0.02
    assert drop <= 1.0


def test_shipped_model_is_integer_only(compiled):
    certificate = compiled.verify_integer_only()
    assert certificate.integer_only and not certificate.exceptions
    assert max(certificate.accumulators.values()) <= 32
    dtypes = {buffer.dtype for buffer in compiled.graph_module.buffers()}
    boundary_scales = [b for b in compiled.graph_module.buffers() if b.is_floating_point()]
    assert torch.int8 in dtypes and not any(p.numel() for p in compiled.graph_module.parameters())
    assert sum(scale.numel() for scale in boundary_scales) <= 2 * 10  # of quantize and dequantize


def test_shipped_model_costs(compiled):
    """ResNet-20 has 269,722 parameters and 40.55 million multiply-accumulates (He et al. 2015; folded, no batch norm)."""
    report = compiled.report()
    assert report.macs == pytest.approx(40.55e6, rel=0.01)
    assert report.integer_bytes < report.float_bytes / 3.5


def test_saved_model_gives_the_same_bits(shipped, compiled, tmp_path):
    path = tmp_path / "resnet20.safetensors"
    compiled.save(path)
    batch = shipped.inputs[:20]
    assert torch.equal(fxcompress.load(path)(batch), compiled(batch))
    assert path.stat().st_size < 2 * compiled.report().integer_bytes


#: name -> (ranges, labels, lowest SQNR in dB, largest share of changed predictions); the large ones data-free: faster
BOUNDS = {
    "resnet56": (DATA_FREE, 60, 23.0, 0.05),
    "resnet8": (CALIBRATED, 300, 28.0, 0.03),
    "vww": (CALIBRATED, 200, 22.0, 0.04),
    "kws": (CALIBRATED, 300, 29.0, 0.02),
    "lite0": (DATA_FREE, 20, 15.0, 0.15),
}


@pytest.mark.real_data
@pytest.mark.parametrize("name", BOUNDS)
def test_published_classifier(name):
    ranges, labels, lowest_sqnr, most_changed = BOUNDS[name]
    work = workload(name, labels)
    network = compile_workload(work, ranges)
    assert network.verify_integer_only().integer_only
    assert_native_is_reference(work, network)
    quality, changed, _ = compare(work, network)
    assert quality >= lowest_sqnr
    assert changed <= most_changed


@pytest.mark.real_data
def test_published_autoencoder():
    work = workload("ad")
    network = compile_workload(work, CALIBRATED)
    assert_native_is_reference(work, network)
    assert work.metric(work.outputs(work.run_float)) == pytest.approx(0.8828, abs=1e-4)
    assert work.metric(work.outputs(network)) >= 0.87


def test_auc_counts_ties_as_halves():
    labels = torch.tensor([0, 0, 1, 1]).numpy()
    assert auc(torch.tensor([0.1, 0.4, 0.4, 0.9]).numpy(), labels) == 0.875
    assert auc(torch.tensor([1.0, 1.0, 1.0, 1.0]).numpy(), labels) == 0.5
    assert auc(torch.tensor([3.0, 4.0, 1.0, 2.0]).numpy(), labels) == 0.0
