"""Modules that compile and modules that do not: what the mistakes are made with. Messages name the lines of this file."""

import threading
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fxcompress import Effect, Level, Match, RewriteRule
from fxcompress.graph import is_call
from tests.support.graphs import ConvBnRelu, images, randomize

aten = torch.ops.aten
X = images(4, 3, 8, 8)


def at(text: str) -> str:
    """ "models.py:31", the place of the only line that begins with ``text``."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, start=1) if line.strip().startswith(text))
    return f"models.py:{number}"


class Net(nn.Module):
    """Compiles: (N, 3, H, W) to (N, 4)."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = ConvBnRelu(3, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))


def net() -> Net:
    return randomize(Net())


class TwoInputs(nn.Module):
    def forward(self, left, right):
        return left + right


class Branch(nn.Module):
    def forward(self, x):
        y = x * 2
        if y.sum() > 0:
            return y
        return -y


class WithBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 3, 1), Branch()

    def forward(self, x):
        return self.gate(self.conv(x))


class ConditionalExpression(nn.Module):
    def forward(self, x):
        return x if x.mean() > 0.5 else -x


class Loop(nn.Module):
    def forward(self, x):
        while x.max() > 1:
            x = x / 2
        return x


class Assertion(nn.Module):
    def forward(self, x):
        assert x.min() > -100, "clean the input"
        return x * 2


class LengthFromValues(nn.Module):
    def forward(self, x):
        return x[:, : int(x.sum())]


class NumberFromValues(nn.Module):
    def forward(self, x):
        return x * x.max().item()


class NumPy(nn.Module):
    def forward(self, x):
        return x * float(x.numpy().max())


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(4, -1)


class OneImage(nn.Module):
    def forward(self, x):
        assert x.shape[0] == 1, "one image at a time"
        return x * 2


class Keywords(nn.Module):
    def forward(self, **inputs):
        return inputs["x"] * 2


class ReturnsObject(nn.Module):
    def forward(self, x):
        return object()


class ReturnsNothing(nn.Module):
    def forward(self, x):
        self.result = None


class ReturnsSize(nn.Module):
    def forward(self, x):
        return x, x.shape[0]


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        return x * 2


class Conditional(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


class FunctionalBatchNorm(nn.Module):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


class Sorting(nn.Module):
    def forward(self, x):
        return torch.sort(x, dim=1).values


class WithSorting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.order = nn.Conv2d(3, 3, 1), Sorting()

    def forward(self, x):
        return self.order(self.conv(x)).cumprod(1)


class Assignment(nn.Module):
    def forward(self, x):
        y = x * 2
        y[:, 0] = 0
        return y


class UnknownMode(nn.Module):
    def forward(self, x):
        raise ValueError("no such mode")


class Locked(nn.Module):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x):
        return x


def long_sum() -> nn.Module:
    """Its accumulator would reach 100,000 * 255 * 127 > 2^31."""
    model = nn.Linear(100_000, 1, bias=False).eval()
    with torch.no_grad():
        model.weight.fill_(0.01)
    return model


class Liar(RewriteRule):
    """Claims EXACT and scales the weights' product."""

    name = "liar"
    level = Level.FLOAT
    effect = Effect.EXACT

    def match(self, node):
        return (
            Match(node)
            if is_call(node, aten.linear.default) and not is_call(next(iter(node.users)), aten.mul.Tensor)
            else None
        )

    def rewrite(self, match, gm):
        with gm.graph.inserting_after(match.node):
            scaled = gm.graph.call_function(aten.mul.Tensor, (match.node, 2.0))
        match.node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


class Stranger(RewriteRule):
    """Inserts an operator that no later pass knows."""

    name = "stranger"
    level = Level.FLOAT
    effect = Effect.LOSSY

    def match(self, node):
        return (
            Match(node)
            if is_call(node, aten.linear.default) and not is_call(next(iter(node.users)), aten.cumprod.default)
            else None
        )

    def rewrite(self, match, gm):
        with gm.graph.inserting_after(match.node):
            summed = gm.graph.call_function(aten.cumprod.default, (match.node, 1))
        match.node.replace_all_uses_with(summed, delete_user_cb=lambda user: user is not summed)
