"""Hypothesis strategies: random small CNNs as data that prints, shrinks and builds.

    @given(networks())
    def test_something(network):
        model, x = network.build(seed=0)      # eval-mode module and a batch of 4 inputs

A failing example prints as ``Network(channels=2, size=6, layers=(Conv(...), Residual(...)), head='linear')``: paste it
into an ``@example`` to keep it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from .graphs import images, randomize

ACTIVATIONS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True)
class Conv:
    """Convolution, batch norm if ``norm``, activation. Even padding keeps the size at stride 1 when ``padded``."""

    outputs: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    padded: bool = True
    norm: bool = True
    activation: str = "relu"

    def module(self, inputs: int) -> nn.Module:
        padding = self.kernel // 2 if self.padded else 0
        conv = nn.Conv2d(
            inputs, self.outputs, self.kernel, self.stride, padding, groups=self.groups, bias=not self.norm
        )
        norm = [nn.BatchNorm2d(self.outputs)] if self.norm else []
        return nn.Sequential(conv, *norm, ACTIVATIONS[self.activation]())

    def out_channels(self, inputs: int) -> int:
        return self.outputs

    def out_size(self, size: int) -> int:
        padding = self.kernel // 2 if self.padded else 0
        return (size + 2 * padding - self.kernel) // self.stride + 1


@dataclass(frozen=True)
class Residual:
    """activation(body(x) + x); every convolution of ``body`` keeps channels and size."""

    body: tuple[Conv, ...]
    activation: str = "relu"

    def module(self, inputs: int) -> nn.Module:
        return _Residual([conv.module(inputs) for conv in self.body], ACTIVATIONS[self.activation]())

    def out_channels(self, inputs: int) -> int:
        return inputs

    def out_size(self, size: int) -> int:
        return size


@dataclass(frozen=True)
class Concat:
    """cat([branch(x) for branch in branches] + [x] if ``skip``) along the channels."""

    branches: tuple[Conv, ...]
    skip: bool = True

    def module(self, inputs: int) -> nn.Module:
        return _Concat([conv.module(inputs) for conv in self.branches], self.skip)

    def out_channels(self, inputs: int) -> int:
        return sum(conv.outputs for conv in self.branches) + (inputs if self.skip else 0)

    def out_size(self, size: int) -> int:
        return size


@dataclass(frozen=True)
class Pool:
    """Max or average pooling, 2x2 at stride 2."""

    kind: str

    def module(self, inputs: int) -> nn.Module:
        return {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}[self.kind](2)

    def out_channels(self, inputs: int) -> int:
        return inputs

    def out_size(self, size: int) -> int:
        return size // 2


@dataclass(frozen=True)
class Gate:
    """Squeeze and excite: x * sigmoid(conv(relu(conv(mean(x)))))."""

    reduced: int

    def module(self, inputs: int) -> nn.Module:
        return _Gate(inputs, self.reduced)

    def out_channels(self, inputs: int) -> int:
        return inputs

    def out_size(self, size: int) -> int:
        return size


Layer = Conv | Residual | Concat | Pool | Gate


@dataclass(frozen=True)
class Network:
    """Layers on a square image; ``head`` is "map" (nothing), "pooled" (mean, linear) or "flat" (flatten, linear)."""

    channels: int
    size: int
    layers: tuple[Layer, ...]
    head: str

    def build(self, seed: int = 0) -> tuple[nn.Module, Tensor]:
        """(module in eval mode with seeded weights, example input (4, channels, size, size))."""
        channels, size, modules = self.channels, self.size, []
        for layer in self.layers:
            modules.append(layer.module(channels))
            channels, size = layer.out_channels(channels), layer.out_size(size)
        if self.head == "pooled":
            modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]
        elif self.head == "flat":
            modules += [nn.Flatten(), nn.Linear(channels * size * size, 5)]
        return randomize(nn.Sequential(*modules), seed), images(4, self.channels, self.size, self.size, seed=seed)


class _Residual(nn.Module):
    def __init__(self, body: list[nn.Module], activation: nn.Module):
        super().__init__()
        self.body, self.activation = nn.Sequential(*body), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + x)


class _Concat(nn.Module):
    def __init__(self, branches: list[nn.Module], skip: bool):
        super().__init__()
        self.branches, self.skip = nn.ModuleList(branches), skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches] + ([x] if self.skip else []), 1)


class _Gate(nn.Module):
    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, reduced, 1), nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


def _divisors(*numbers: int) -> list[int]:
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]


activations = st.sampled_from(list(ACTIVATIONS))


@st.composite
def convolutions(draw, inputs: int, size: int, *, same: bool = False, outputs: int | None = None) -> Conv:
    """A convolution that fits ``inputs`` channels of ``size`` x ``size``; ``same`` keeps the size."""
    outputs = outputs or draw(st.integers(1, 8))
    kernel = draw(st.sampled_from([1, 3] if size >= 3 else [1]))
    return Conv(
        outputs,
        kernel,
        stride=1 if same or size < 4 else draw(st.integers(1, 2)),
        groups=draw(st.sampled_from(_divisors(inputs, outputs))),
        padded=same or draw(st.booleans()),
        norm=draw(st.booleans()),
        activation=draw(activations),
    )


@st.composite
def _layers(draw, channels: int, size: int) -> Layer:
    kind = draw(st.sampled_from(["conv", "residual", "concat", "gate", *(["pool"] if size >= 4 else [])]))
    if kind == "residual":
        count = draw(st.integers(1, 2))
        body = tuple(draw(convolutions(channels, size, same=True, outputs=channels)) for _ in range(count))
        return Residual(body, draw(activations))
    if kind == "concat":
        skip = draw(st.booleans())
        count = draw(st.integers(1 if skip else 2, 2))
        return Concat(tuple(draw(convolutions(channels, size, same=True)) for _ in range(count)), skip)
    if kind == "pool":
        return Pool(draw(st.sampled_from(["max", "avg"])))
    if kind == "gate":
        return Gate(draw(st.integers(1, 4)))
    return draw(convolutions(channels, size))


@st.composite
def networks(draw, max_layers: int = 4) -> Network:
    """A random CNN of 1 to ``max_layers`` layers: skips, concats, groups, gates, pools, every activation."""
    channels = first = draw(st.integers(1, 4))
    size = full = draw(st.integers(4, 10))
    layers = []
    for _ in range(draw(st.integers(1, max_layers))):
        layer = draw(_layers(channels, size))
        layers.append(layer)
        channels, size = layer.out_channels(channels), layer.out_size(size)
    return Network(first, full, tuple(layers), draw(st.sampled_from(["map", "pooled", "flat"])))
