"""The CIFAR-10 ResNets of He et al. 2015, section 4.2, with the weights and images that ship in ``examples/data``.

    model = load_resnet20()                       # eval mode, float32
    images, labels = load_images("test")          # (1000, 3, 32, 32) float32 raw pixels 0..255, (1000,) int64
    logits = model((images - PIXEL_MEAN) / PIXEL_STD)

The shortcuts have no parameters (option A of the paper): where a stage halves the resolution, the shortcut takes every
second pixel and pads the channels with zeros.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

DATA = Path(__file__).resolve().parent / "data"

#: What the networks subtract and divide by, in units of the raw pixels 0..255; shape (3, 1, 1).
PIXEL_MEAN = 255 * torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
PIXEL_STD = 255 * torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), 3x3 convolutions; the first one has the stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.extra_channels = out_channels - in_channels

    def shortcut(self, x: Tensor) -> Tensor:
        if self.extra_channels == 0:
            return x
        before = self.extra_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra_channels - before))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Input (N, 3, 32, 32) normalized, output (N, 10) logits; ``depth`` = 6n + 2: 20, 32, 44, 56, 110."""

    def __init__(self, depth: int, classes: int = 10):
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth is {depth}, expected 6n + 2: 8, 14, 20, ...")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def load_resnet20() -> CifarResNet:
    """The pretrained ResNet-20, in eval mode; 91.7 % top-1 on the CIFAR-10 test set."""
    model = CifarResNet(20)
    model.load_state_dict(load_file(DATA / "resnet20_cifar10.safetensors"))
    return model.eval()


def load_images(split: str) -> tuple[Tensor, Tensor]:
    """Raw pixels 0..255 as float32 (N, 3, 32, 32) and labels int64 (N,).

    ``split``: "test" (1000 images of the test set) or "calibration" (256 images of the training set).
    """
    with np.load(DATA / "cifar10_sample.npz") as archive:
        images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous(), torch.from_numpy(labels).long()
