"""The networks whose latency is compared, with the inputs they are calibrated and timed on.

    network = load("mobilenetv2")
    network.module(network.inputs(1))              # (1, 1000)

``SHAPED`` networks come from the model zoo with seeded random weights and the batch-norm statistics of random images: latency
does not depend on the values. ``TRAINED`` ones are those of ``real_models.py`` with their weights and data, on normalized inputs;
``available`` says which of them this machine has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import real_models
import torch
from torch import Tensor

#: Name here -> name in the model zoo and image size.
SHAPED = {
    "resnet18": ("resnet18", 224),
    "resnet50": ("resnet50", 224),
    "mobilenetv2": ("mobilenetv2_w1", 224),
    "mobilenetv3_large": ("mobilenetv3_large_w1", 224),
    "efficientnet_b0": ("efficientnet_b0", 224),
}
#: CIFAR-10 networks, EfficientNet-Lite0 and the four of MLPerf Tiny.
TRAINED = ("lite0", "resnet20", "resnet56", "resnet8", "vww", "kws", "ad")
CALIBRATION_BATCHES, CALIBRATION_BATCH = 4, 8


@dataclass(frozen=True)
class Network:
    """A float module in eval mode, built when it is asked for; ``inputs(batch, seed)`` gives float32 inputs (batch, ...) for it."""

    build: Callable[[], torch.nn.Module]
    inputs: Callable[..., Tensor]

    @functools.cached_property
    def module(self) -> torch.nn.Module:
        return self.build()

    @property
    def calibration(self) -> list[Tensor]:
        return [self.inputs(CALIBRATION_BATCH, seed) for seed in range(2, 2 + CALIBRATION_BATCHES)]


def available() -> list[str]:
    """Names of the networks whose files are here."""
    return [*SHAPED, *(name for name in TRAINED if _is_here(name))]


def _is_here(name: str) -> bool:
    try:
        real_models.load(name)
    except real_models.Unavailable:
        return False
    return True


def load(name: str) -> Network:
    """The network called ``name``. Raises ``real_models.Unavailable`` when its files are not here."""
    return _shaped(*SHAPED[name]) if name in SHAPED else _trained(name)


def _shaped(name: str, size: int) -> Network:
    from bench_compile import shaped_model

    def inputs(batch: int, seed: int = 1) -> Tensor:
        return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))

    return Network(lambda: shaped_model(name, size), inputs)


def _trained(name: str) -> Network:
    workload = real_models.load(name)

    def inputs(batch: int, seed: int = 1) -> Tensor:
        picked = torch.randint(len(workload.calibration), (batch,), generator=torch.Generator().manual_seed(seed))
        return workload.normalized(workload.calibration[picked].float())

    return Network(lambda: workload.model, inputs)
