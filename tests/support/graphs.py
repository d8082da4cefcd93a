"""Small modules with the shapes real networks are made of, in eval mode and with lived-in batch-norm statistics.

    model = randomize(ResidualBlock(8), seed=1)
    model, inputs = build("residual_block")            # the same from the table, with example inputs of batch 2

``MODELS`` lists one factory per structure; a test that should hold for all of them parametrizes over its keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded He-scaled weights, nonzero biases and batch-norm parameters away from identity; returns it in eval mode.

    gamma in [0.5, 1.5], beta in [-0.5, 0.5], running mean in [-0.5, 0.5], running variance in [0.5, 2].
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, lo: float, hi: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (hi - lo) + lo)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BATCH_NORMS):
                if module.affine:
                    uniform(module.weight, 0.5, 1.5)
                    uniform(module.bias, -0.5, 0.5)
                if module.track_running_stats:
                    uniform(module.running_mean, -0.5, 0.5)
                    uniform(module.running_var, 0.5, 2.0)
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if name == "weight" and parameter.ndim >= 2:
                    fan_in = max(1, parameter[0].numel())
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5)
                elif name == "bias":
                    uniform(parameter, -0.3, 0.3)
    return model.eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    """Seeded standard normal tensor of that shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class ConvBnRelu(nn.Sequential):
    """conv -> batch norm -> ReLU, (N, inputs, H, W) to (N, outputs, H, W) at stride 1."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class ResidualBlock(nn.Module):
    """Two convolutions and an identity shortcut: the add joins two branches of different scale."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = ConvBnRelu(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + x)


class DownsamplingBlock(nn.Module):
    """Stride 2 on both branches, the shortcut through a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.main = nn.Sequential(
            ConvBnRelu(inputs, outputs, stride=2),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.shortcut(x))


class SqueezeExcite(nn.Module):
    """Channel attention: global pool, two 1x1 convolutions, sigmoid, product with the input."""

    def __init__(self, channels: int, reduced: int = 4):
        super().__init__()
        self.body = ConvBnRelu(channels, channels)
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        gate = self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * torch.sigmoid(gate)


class ConcatBlock(nn.Module):
    """Dense connectivity: batch norm after a concat, which no single convolution can absorb."""

    def __init__(self, channels: int, growth: int = 4):
        super().__init__()
        self.left = ConvBnRelu(channels, growth)
        self.right = nn.Conv2d(channels, growth, 1)
        self.norm = nn.BatchNorm2d(channels + 2 * growth)
        self.out = nn.Conv2d(channels + 2 * growth, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.norm(torch.cat([x, self.left(x), self.right(x)], 1))))


class InvertedResidual(nn.Module):
    """MobileNetV2: expand, depthwise, project, all ReLU6, with a shortcut."""

    def __init__(self, channels: int, expansion: int = 3):
        super().__init__()
        wide = channels * expansion
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class UpsamplingBlock(nn.Module):
    """Encoder and decoder: strided convolution, transposed convolution with batch norm, skip by addition."""

    def __init__(self, channels: int):
        super().__init__()
        self.down = ConvBnRelu(channels, 2 * channels, stride=2)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.up(self.down(x))) + x)


class PreActivation(nn.Module):
    """Batch norm before the convolution (ResNet v2): it folds forward only where no padding intervenes."""

    def __init__(self, channels: int):
        super().__init__()
        self.stem = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.conv(F.relu(self.norm(x)))


class Classifier(nn.Module):
    """Stem, residual block, max pool, global average pool, linear: a whole small network, 10 logits."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.stem = ConvBnRelu(3, channels)
        self.block = ResidualBlock(channels)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.block(self.stem(x)))
        return self.fc(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class Mlp(nn.Sequential):
    """Fully connected with BatchNorm1d, (N, inputs) to (N, outputs)."""

    def __init__(self, inputs: int = 12, hidden: int = 16, outputs: int = 5):
        super().__init__(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class Conv1dNet(nn.Sequential):
    """A signal network: Conv1d, BatchNorm1d, ReLU, average pool, linear; (N, 2, 16) to (N, 3)."""

    def __init__(self):
        super().__init__(
            nn.Conv1d(2, 6, 3, padding=1, bias=False),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.AvgPool1d(4),
            nn.Flatten(),
            nn.Linear(24, 3),
        )


class TwoInputs(nn.Module):
    """Two images of different width, joined by addition."""

    def __init__(self, channels: int = 6):
        super().__init__()
        self.left = ConvBnRelu(3, channels)
        self.right = ConvBnRelu(2, channels)
        self.fc = nn.Linear(channels, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.fc((self.left(left) + self.right(right)).mean((2, 3)))


class DictOutput(nn.Module):
    """Two heads returned by name."""

    def __init__(self, channels: int = 6):
        super().__init__()
        self.stem = ConvBnRelu(3, channels)
        self.classes = nn.Linear(channels, 4)
        self.box = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = F.adaptive_avg_pool2d(self.stem(x), 1).flatten(1)
        return {"classes": self.classes(features), "box": self.box(features)}


class Tokens(nn.Module):
    """Embedding, masked attention, layer norm: (N, L) ids below 20, 0 is padding, to (N, 3)."""

    def __init__(self):
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, ids):
        x = self.table(ids)
        mask = (ids != 0)[:, None]
        x = x + F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return self.head(self.norm(x))[:, 0]


#: name -> () -> (module, example inputs). Structures every pass and backend has to live with.
MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "conv_bn_relu": lambda: (ConvBnRelu(3, 8), (images(2, 3, 8, 8),)),
    "grouped": lambda: (ConvBnRelu(8, 12, groups=4), (images(2, 8, 8, 8),)),
    "depthwise": lambda: (ConvBnRelu(8, 8, groups=8), (images(2, 8, 8, 8),)),
    "strided": lambda: (ConvBnRelu(3, 6, stride=2), (images(2, 3, 9, 7),)),
    "residual_block": lambda: (ResidualBlock(8), (images(2, 8, 8, 8),)),
    "downsampling_block": lambda: (DownsamplingBlock(4, 8), (images(2, 4, 8, 8),)),
    "squeeze_excite": lambda: (SqueezeExcite(8), (images(2, 8, 8, 8),)),
    "concat_block": lambda: (ConcatBlock(6), (images(2, 6, 8, 8),)),
    "inverted_residual": lambda: (InvertedResidual(6), (images(2, 6, 8, 8),)),
    "upsampling_block": lambda: (UpsamplingBlock(4), (images(2, 4, 8, 8),)),
    "pre_activation": lambda: (PreActivation(6), (images(2, 6, 8, 8),)),
    "classifier": lambda: (Classifier(), (images(2, 3, 12, 12),)),
    "mlp": lambda: (Mlp(), (images(2, 12),)),
    "conv1d": lambda: (Conv1dNet(), (images(2, 2, 16),)),
    "two_inputs": lambda: (TwoInputs(), (images(2, 3, 8, 8), images(2, 2, 8, 8, seed=1))),
    "dict_output": lambda: (DictOutput(), (images(2, 3, 8, 8),)),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The randomized eval-mode module called ``name`` in ``MODELS`` and its example inputs."""
    model, inputs = MODELS[name]()
    return randomize(model, seed), inputs
