"""Models nobody here wrote: twelve families of the pytorchcv zoo become integer-only networks with the answers of the float ones.

``benchmarks/bench_coverage.py`` runs the whole zoo; these are fast and differ in what they are made of.
"""

import json

import bench_coverage
import pytest
import torch
import zoo

import fxcompress
from fxcompress.report import sqnr_db

pytest.importorskip("pytorchcv", reason="pytorchcv is missing: pip install --no-deps pytorchcv==0.0.67")

SMALL = 64 * 128  # pixels, for networks that take images of any size

#: family -> what it is made of
SAMPLE = {
    "resnet_cifar": "residual additions",
    "preresnet_cifar": "batch norm before convolution",
    "seresnet_cifar": "squeeze-and-excitation gates",
    "densenet_cifar": "concatenations",
    "diaresnet_cifar": "recurrent attention gates from a state of zeros",
    "nin_cifar": "plain convolutions",
    "mobilenet": "depthwise convolution",
    "mobilenetv3": "hard swish, gates by hard sigmoid",
    "shufflenetv2": "channel split and shuffle",
    "squeezenet": "no batch norm, ceil-mode pooling",
    "sqnet": "segmentation with transposed and dilated convolution",
    "contextnet": "segmentation of two resolutions, bilinear resizing",
}


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_of_the_zoo(family):
    largest = SMALL if SAMPLE[family].startswith("segmentation") else zoo.LARGEST
    entry = zoo.load(family, largest, trained_like=True)  # with plain random weights some of these amplify any noise
    net = fxcompress.compile(
        entry.model,
        example_inputs=entry.images(1, seed=1),
        calibration_data=[entry.images(4, seed=1)],
        input_range=zoo.PIXEL_RANGE,
        range_method="minmax",
    )
    assert net.verify_integer_only().integer_only
    held_out = entry.images(2, seed=2)
    with torch.no_grad():
        assert sqnr_db(entry.model(held_out), net(held_out)) > 15


def test_the_benchmark_covers_every_family_of_the_zoo():
    from pytorchcv.model_provider import _models

    assert {
        make.__module__.rpartition(".")[2] for make in _models.values()
    } == zoo.FAMILIES.keys() | zoo.LEFT_OUT.keys()
    assert set(zoo.FAMILIES.values()) <= _models.keys()


def test_results_survive_an_interruption(tmp_path):
    """The last row of a family counts; a line cut short is dropped, and its family runs again."""
    good = {"family": "vgg", "model": "vgg11", "status": "integer-only", "sqnr": 30.0, "differences": 20.0}
    refused = {"family": "resnet", "model": "resnet10", "status": "refused", "error": "CaptureError", "reason": "no"}
    path = tmp_path / "results.jsonl"
    path.write_text(
        "\n".join(map(json.dumps, (refused, good, good | {"sqnr": 9.0, "family": "resnet"}))) + '\n{"family": "dl'
    )
    rows = bench_coverage.read(path)
    assert rows.keys() == {"vgg", "resnet"}
    assert list(bench_coverage.counts(rows.values()).values()) == [2, 2, 1, 0, 0]
