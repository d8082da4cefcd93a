"""The demo runs on what ships in the repository and prints what it promises."""

import contextlib
import io
import re

import demo
import pytest
import torch
from cifar_resnet import PIXEL_MEAN, PIXEL_STD, CifarResNet, load_images, load_resnet20


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> tuple[str, object]:
    folder = tmp_path_factory.mktemp("demo_output")
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        demo.main(["--images", "100", "--output", str(folder)])
    return text.getvalue(), folder


def test_prints_accuracy_size_and_passes(printed):
    text, _ = printed
    tops = [float(number) for number in re.findall(r"([0-9.]+) %", text)]
    assert len(tops) == 3
    assert all(abs(top - tops[0]) <= 2 for top in tops)
    assert "269,722" in text
    assert "fold_batch_norm" in text and "lower_to_integer" in text
    assert text.count("Certificate") == text.count("Integer-only:") == 2


def test_leaves_dumps_for_both_networks(printed):
    _, folder = printed
    for name in ("data_free", "calibrated"):
        listings = sorted((folder / name).glob("[0-9][0-9]_*.txt"))
        assert len(listings) > 5
        assert "fxc." in listings[-1].read_text()
        assert (folder / name / "report.json").exists()


def test_sample_data_is_what_the_notice_says():
    images, labels = load_images("test")
    assert images.shape == (1000, 3, 32, 32) and images.min() == 0 and images.max() == 255
    assert torch.bincount(labels).tolist() == [100] * 10
    assert load_images("calibration")[0].shape == (256, 3, 32, 32)
    folder = demo.ROOT / "examples" / "data"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6e6
    assert (folder / "NOTICE.md").read_text().count("Redistribution") == 3


def test_float_accuracy_of_the_shipped_model():
    images, labels = load_images("test")
    with torch.inference_mode():
        logits = load_resnet20()((images - PIXEL_MEAN) / PIXEL_STD)
    assert abs(int((logits.argmax(1) == labels).sum()) - 914) <= 1  # a tie may fall either way on another CPU


@pytest.mark.parametrize("depth", [2, 21])
def test_impossible_depth_is_refused(depth):
    with pytest.raises(ValueError, match="6n \\+ 2"):
        CifarResNet(depth)
