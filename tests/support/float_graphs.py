"""Build float-level graphs node by node, in exactly the dialect that passes see after normalization.

g = FloatGraph(seed=0)
x = g.input(2, 3, 8, 8)
y = g.batch_norm(g.conv(x, 4, 3, padding=1))
gm, inputs = g.finish(y)                        # shapes propagated, example inputs of batch 2
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxcompress.meta import Origin, describe
from fxcompress.shapes import propagate, trace_shapes

aten = torch.ops.aten
CONV = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
CONV_TRANSPOSE = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


class FloatGraph:
    """Every method adds one operator and returns its node; weights are seeded and normal."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64):
        self.dtype = dtype
        self.root, self.graph = nn.Module(), fx.Graph()
        self.random = torch.Generator().manual_seed(seed)
        self.inputs: list[Tensor] = []
        self.values: dict[fx.Node, Tensor] = {}
        self.counts: dict[str, int] = {}

    # ---- tensors

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def uniform(self, lo: float, hi: float, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.random, dtype=torch.float64) * (hi - lo) + lo).to(self.dtype)

    def input(self, *shape: int) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        self.inputs.append(self.normal(*shape))
        self.values[node] = self.inputs[-1]
        return node

    def constant(self, value: Tensor, name: str = "constant") -> fx.Node:
        name = self._unique(name)
        self.root.register_buffer(name, value.to(self.dtype) if value.is_floating_point() else value)
        node = self.graph.get_attr(name)
        self.values[node] = getattr(self.root, name)
        return node

    def shape(self, node: fx.Node) -> torch.Size:
        return self.values[node].shape

    def _unique(self, name: str) -> str:
        self.counts[name] = self.counts.get(name, -1) + 1
        return f"{name}{self.counts[name]}"

    # ---- operators

    def call(self, target, *args, module: str = "") -> fx.Node:
        node = self.graph.call_function(target, args)
        self.values[node] = target(*fx.map_arg(args, self.values.__getitem__))
        describe(node, origin=Origin(module))
        return node

    def conv(self, x, outputs, kernel=1, *, stride=1, padding=0, dilation=1, groups=1, bias=True, weight=None):
        dims = len(self.shape(x)) - 2
        inputs = self.shape(x)[1]
        if weight is None:
            weight = self.constant(
                self.normal(outputs, inputs // groups, *[kernel] * dims), "conv.weight".replace(".", "_")
            )
        offset = self.constant(self.normal(outputs), "conv_bias") if bias else None
        window = ([stride] * dims, [padding] * dims, [dilation] * dims)
        return self.call(CONV[dims], x, weight, offset, *window, groups, module=self._unique("conv"))

    def conv_transpose(self, x, outputs, kernel=2, *, stride=1, padding=0, groups=1, bias=True):
        dims = len(self.shape(x)) - 2
        weight = self.constant(self.normal(self.shape(x)[1], outputs // groups, *[kernel] * dims), "up_weight")
        offset = self.constant(self.normal(outputs), "up_bias") if bias else None
        window = ([stride] * dims, [padding] * dims, [0] * dims)
        return self.call(
            CONV_TRANSPOSE[dims], x, weight, offset, *window, groups, [1] * dims, module=self._unique("up")
        )

    def linear(self, x, outputs, *, bias=True):
        weight = self.constant(self.normal(outputs, self.shape(x)[-1]), "linear_weight")
        offset = self.constant(self.normal(outputs), "linear_bias") if bias else None
        return self.call(aten.linear.default, x, weight, offset, module=self._unique("linear"))

    def batch_norm(self, x, *, gamma=None, beta=None, mean=None, var=None, eps=1e-5, affine=True):
        """Random parameters, gammas of either sign, unless given; ``affine=False`` has neither gamma nor beta."""
        count = self.shape(x)[1]
        gamma = self.uniform(0.5, 1.5, count) * self.uniform(-1, 1, count).sign() if gamma is None else gamma
        weights = [
            self.constant(gamma, "bn_weight") if affine else None,
            self.constant(self.normal(count) if beta is None else beta, "bn_bias") if affine else None,
            self.constant(self.normal(count) if mean is None else mean, "bn_mean"),
            self.constant(self.uniform(0.5, 2, count) if var is None else var, "bn_var"),
        ]
        return self.call(aten.batch_norm.default, x, *weights, False, 0.1, eps, False, module=self._unique("bn"))

    def scale(self, x, *, positive=True):
        """A batch norm without shift: y = a x."""
        count = self.shape(x)[1]
        gamma = self.uniform(0.5, 1.5, count) * (1 if positive else -1)
        return self.batch_norm(x, gamma=gamma, beta=torch.zeros(count), mean=torch.zeros(count))

    def relu(self, x):
        return self.call(aten.clamp.default, x, 0, None)

    def add(self, x, y):
        return self.call(aten.add.Tensor, x, y)

    def cat(self, *xs, dim=1):
        return self.call(aten.cat.default, list(xs), dim)

    def finish(self, *outputs: fx.Node) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
        self.graph.output(outputs)
        gm = fx.GraphModule(self.root, self.graph)
        trace_shapes(gm, self.inputs)
        return gm, tuple(self.inputs)


def outputs(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return gm(*inputs)


def batch_norms(gm: fx.GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=aten.batch_norm.default))


def relative_error(expected: tuple[Tensor, ...], actual: tuple[Tensor, ...]) -> float:
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, actual, strict=True))


def run(rule, gm):
    """Apply a pass until it finds nothing, as the pass manager does; returns the number of rewrites."""
    total = 0
    while (plan := rule.plan(gm)).matches:
        rule.apply(plan)
        propagate(gm)
        gm.graph.lint()
        total += plan.applied
    gm.recompile()
    return total


# ---------------------------------------------------------------------------------------------------- parts of graphs


def graph(build, dtype=torch.float64, seed=0):
    """(graph module, inputs) of what ``build`` makes of a ``FloatGraph``: one node or a tuple of them."""
    g = FloatGraph(seed, dtype)
    result = build(g)
    return g.finish(*(result if isinstance(result, tuple) else (result,)))


def image(g, channels=4):
    return g.input(2, channels, 6, 6)


def blocked(g, channels=4):
    """A tensor no batch norm folds into."""
    return g.call(aten.tanh.default, image(g, channels))


def max_pool(g, x):
    return g.call(aten.max_pool2d.default, x, [2, 2], [2, 2], [0, 0], [1, 1], False)


def shuffle(g, x, groups=2):
    _, c, h, w = g.shape(x)
    x = g.call(aten.reshape.default, x, [-1, groups, c // groups, h, w])
    x = g.call(aten.permute.default, x, [0, 2, 1, 3, 4])
    return g.call(aten.reshape.default, x, [-1, c, h, w])


def zero_pad(g, x, value=0.0):
    return g.call(aten.constant_pad_nd.default, x, [1, 1, 1, 1], value)


def positive(g, x):
    """A batch norm with shift and positive scales."""
    return g.batch_norm(x, gamma=g.uniform(0.5, 1.5, g.shape(x)[1]))
