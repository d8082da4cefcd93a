"""What each float operator does to the moments of its inputs: one rule per operator.

A rule takes the ``View`` of what is known and a node whose activation inputs are all known; it returns the ``Moments`` of
the result, per channel along the node's channel axis where it can, or None when it cannot tell. Terms of a sum count as
independent. Averages keep the variance (an upper bound: neighboring pixels are correlated), and so does max pooling (its
mean is then a lower bound; the maximum of independent Gaussians would overshoot behind a ReLU).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from . import dialects as d
from . import gaussian as g
from .analysis.quantization import is_function
from .gaussian import Moments
from .graph import argument, bounds, constant, is_call, is_constant, one_sample_shape, rank, shape
from .integer_ops import FLOAT_LEVEL
from .meta import along_axis, tensor_meta

aten = torch.ops.aten


@dataclass
class View:
    """The moments known so far, in the forms that rules ask for. ``sigmas``: half width of the ranges."""

    gm: fx.GraphModule
    sigmas: float
    moments: dict[fx.Node, Moments] = field(default_factory=dict)

    def of(self, node: fx.Node) -> Moments:
        return self.moments[node]

    def operand(self, value: object, node: fx.Node) -> Moments:
        """Moments of an argument of a broadcasting operator, aligned with the channels of its result ``node``."""
        if not isinstance(value, fx.Node):
            return g.constant_moments(torch.tensor(float(value)))
        axis = tensor_meta(node).channel_axis
        from_right = None if axis is None else axis - rank(node)
        if is_constant(value):
            tensor = constant(self.gm, value)
            kept = from_right is not None and tensor.ndim + from_right >= 0 and tensor.shape[from_right] > 1
            return g.constant_moments(tensor, (tensor.ndim + from_right,) if kept else ())
        own = tensor_meta(value).channel_axis
        aligned = None not in (own, from_right) and own - rank(value) == from_right
        return self.of(value) if aligned else g.pooled(self.of(value))

    def channels(self, node: fx.Node, axis: int) -> Moments:
        """Moments (C,) of an activation along ``axis``, repeated where they are only known for the whole tensor."""
        m = self.of(node)
        if m.mean.ndim == 0 or tensor_meta(node).channel_axis != axis % rank(node):
            return g.repeated(g.pooled(m), shape(node)[axis])
        return m

    def fields(self, node: fx.Node) -> list[Tensor]:
        """[mean, E[x^2], lo, lo, hi, hi] as tensors of the node's full shape, one element standing for the batch."""
        if is_constant(node):
            value = constant(self.gm, node)
            value = value.double() if value.is_floating_point() else value  # an index stays an index
            return [value, value**2 if value.is_floating_point() else value, *[value] * 4]
        m, axis = self.of(node), tensor_meta(node).channel_axis
        sizes = one_sample_shape(node)
        rows = [m.mean, m.var + m.mean**2, *m.lo, *m.hi]
        return [along_axis(row, axis, len(sizes)).expand(sizes) for row in rows]


# -------------------------------------------------------------------------------------------------- one rule per operator


def _clamp(view: View, node: fx.Node) -> Moments:
    lo, hi = bounds(view.gm, node)
    return g.clamp(view.operand(node.args[0], node), -math.inf if lo is None else lo, math.inf if hi is None else hi)


def _channel_clamp(view: View, node: fx.Node) -> Moments | None:
    axis = tensor_meta(node).channel_axis
    if axis is None:
        return None
    m = view.channels(node.args[0], axis)
    limits = [
        end if bound is None else bound.flatten() for bound, end in zip(bounds(view.gm, node), (-math.inf, math.inf))
    ]
    return g.clamp(m, *(torch.as_tensor(v, dtype=torch.float64).expand(m.mean.shape) for v in limits))


def _function(view: View, node: fx.Node) -> Moments:
    return g.function(view.operand(node.args[0], node), lambda x: node.target(x, *node.args[1:], **node.kwargs))


def _binary(combine: Callable[[Moments, Moments], Moments]) -> Callable[[View, fx.Node], Moments]:
    """Independent operands are combined; x * x, or x * sigmoid(x), is one function of x."""

    def rule(view: View, node: fx.Node) -> Moments:
        a, b = node.args[:2]
        if (f := _function_of(a, b)) is not None:
            return g.function(view.operand(a, node), lambda x: node.target(x, f(x)))
        if (f := _function_of(b, a)) is not None:
            return g.function(view.operand(b, node), lambda x: node.target(f(x), x))
        return combine(view.operand(a, node), view.operand(b, node))

    return rule


def _function_of(source: object, value: object) -> Callable[[Tensor], Tensor] | None:
    """``f`` with value = f(source) when a chain of elementwise functions leads from one to the other."""
    if not isinstance(source, fx.Node) or not isinstance(value, fx.Node):
        return None
    if value is source:
        return lambda x: x
    if not is_function(value):
        return None
    (before,) = value.all_input_nodes
    if (inner := _function_of(source, before)) is None:
        return None
    return lambda x: value.target(*[inner(x) if a is before else a for a in value.args], **value.kwargs)


def _same(view: View, node: fx.Node) -> Moments:
    """Max pooling and interpolation: the bounds hold; the moments are kept (see the module docstring)."""
    return view.of(node.args[0])


def _average(view: View, node: fx.Node) -> Moments:
    """A mean over pixels: the variance stays (fully correlated pixels), but what is behind a ReLU becomes Gaussian."""
    m = view.of(node.args[0])
    if node.target is aten.mean.dim:
        dims, ndim = node.args[1] or range(rank(node.args[0])), rank(node.args[0])
        m = g.pooled(m) if tensor_meta(node.args[0]).channel_axis in {dim % ndim for dim in dims} else m
    elif node.target in d.AVERAGE_POOLS and _any(argument(node, "padding")):
        m = _with_zero(m)
    return g.within_sigmas(m, view.sigmas)


def _with_zero(m: Moments) -> Moments:
    return replace(m, lo=m.lo.clamp(max=0), hi=m.hi.clamp(min=0))


def _any(value: object) -> bool:
    return any(value) if isinstance(value, list | tuple) else bool(value)


def _weighted(view: View, node: fx.Node) -> Moments | None:
    """Convolution or linear without batch-norm statistics. Padding adds the value 0 to every input channel."""
    x, weight_node = node.args[:2]
    bias_node = argument(node, "bias")
    if not is_constant(weight_node) or not (bias_node is None or is_constant(bias_node)):
        return None
    transposed = node.target in d.TRANSPOSED_CONVOLUTIONS
    linear = node.target is d.LINEAR
    m = view.channels(x, -1 if linear else 1)
    if not linear and (transposed or _any(argument(node, "padding"))):
        m = _with_zero(m)
    stored = constant(view.gm, weight_node)
    weight = _grouped(node, stored, 1 if linear else argument(node, "groups"))
    bias = torch.zeros((), dtype=torch.float64) if bias_node is None else constant(view.gm, bias_node).double()
    phases = _phases(node, stored.shape[2:]) if transposed else [slice(None)]
    return g.within_sigmas(_mixture([g.weighted_sum(m, weight[..., taps], bias) for taps in phases]), view.sigmas)


def _grouped(node: fx.Node, weight: Tensor, groups: int) -> Tensor:
    """(G, O/G, I/G, taps) from (O, I/G, *k), or from (I, O/G, *k) of a transposed convolution."""
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return split.transpose(1, 2) if node.target in d.TRANSPOSED_CONVOLUTIONS else split


def _phases(node: fx.Node, kernel: torch.Size) -> list[Tensor]:
    """Flat tap indices that meet in one output pixel of a transposed convolution: one set per residue of the output
    position modulo the stride."""
    stride, dilation = (
        list(v) * len(kernel) if len(v) == 1 else v for v in (argument(node, "stride"), argument(node, "dilation"))
    )
    indices = torch.arange(math.prod(kernel)).reshape(kernel)
    phases = []
    for residues in itertools.product(*map(range, stride)):
        meeting = [
            torch.tensor([t for t in range(k) if t * dil % s == residue], dtype=torch.int64)
            for k, s, dil, residue in zip(kernel, stride, dilation, residues)
        ]
        phases.append(indices[torch.meshgrid(*meeting, indexing="ij")].flatten())
    return phases


def _mixture(parts: list[Moments]) -> Moments:
    """Per channel, the pixels of all parts together."""
    if len(parts) == 1:
        return parts[0]
    stacked = [torch.stack([getattr(p, name) for p in parts], -1) for name in ("mean", "var", "lo", "hi")]
    mean, var, lo, hi = stacked
    return Moments(mean.mean(-1), var.mean(-1) + mean.var(-1, correction=0), lo.amin(-1), hi.amax(-1))


def _batch_norm(view: View, node: fx.Node) -> Moments | None:
    """A batch norm that carries no statistics of its own: an affine map of what arrives."""
    gamma, beta, mean, var = (
        None if argument(node, name) is None else constant(view.gm, argument(node, name)).double()
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    if mean is None or var is None:
        return None
    factor = torch.rsqrt(var + argument(node, "eps")) * (1.0 if gamma is None else gamma)
    return g.scale(view.channels(node.args[0], 1), factor, (0.0 if beta is None else beta) - factor * mean)


def _matmul(view: View, node: fx.Node) -> Moments:
    a, b = (g.constant_moments(constant(view.gm, x)) if is_constant(x) else g.pooled(view.of(x)) for x in node.args[:2])
    if _attended(node.args[0]):
        return b  # a weighted mean of the rows of b stays among them
    return g.within_sigmas(g.dot_product(a, b, shape(node.args[0])[-1]), view.sigmas)


def _attended(node: object) -> bool:
    """Probabilities of a softmax, possibly moved."""
    while is_call(node, *d.MOVEMENT):
        node = node.args[0]
    return is_call(node, *d.SOFTMAXES)


def _softmax(view: View, node: fx.Node) -> Moments:
    """Probabilities: their mean is 1/n, their range is 0..1 whatever the logits are."""
    mean = torch.tensor(1.0 / int(shape(node)[-1]), dtype=torch.float64)
    return g.interval(mean, mean * (1 - mean), torch.zeros(()), torch.ones(()))


def _layer_norm(view: View, node: fx.Node) -> Moments:
    """Normalized rows have mean 0 and variance 1, so beta and gamma are mean and deviation; |row| <= sqrt(n)."""
    group = node.target is d.GROUP_NORM
    gamma, beta = (_affine_parameter(view, node, name) for name in ("weight", "bias"))
    if gamma is not None and gamma.ndim > 1:
        gamma, beta = gamma.flatten(), None if beta is None else beta.flatten()
    channels = shape(node)[1] if group else math.prod(argument(node, "normalized_shape"))
    gamma = torch.ones(channels, dtype=torch.float64) if gamma is None else gamma
    beta = torch.zeros_like(gamma) if beta is None else beta
    count = math.prod(shape(node)[1:]) // argument(node, "num_groups") if group else channels
    far = gamma.abs() * math.sqrt(count)
    return g.normal(beta, gamma.abs(), beta - far, beta + far, view.sigmas)


def _affine_parameter(view: View, node: fx.Node, name: str) -> Tensor | None:
    """The constant weight or bias of a normalization, float64; None without one (rms_norm has no bias)."""
    if name not in {a.name for a in node.target._schema.arguments}:
        return None
    value = argument(node, name)
    return None if value is None else constant(view.gm, value).double()


def _embedding(view: View, node: fx.Node) -> Moments:
    """Every row of the table counts alike, per column."""
    return g.constant_moments(constant(view.gm, node.args[0]), (-1,))


def _moved(view: View, node: fx.Node) -> Moments:
    """Data movement, run on tensors that hold each element's moments, then pooled per channel of the result.

    Exact for any channel map (flatten, concat, shuffle, slice, padding); costs six copies of one example's tensor.
    """
    nodes = node.all_input_nodes
    fields = [dict(zip(nodes, row)) for row in zip(*(view.fields(n) for n in nodes))]
    outputs = []
    for i, values in enumerate(fields):
        args = list(fx.map_arg(node.args, lambda n, values=values: values[n]))
        if i == 1 and node.target is aten.constant_pad_nd.default and len(args) > 2:
            args[2] = args[2] ** 2
        outputs.append(node.target(*args, **fx.map_arg(node.kwargs, lambda n, values=values: values[n])))
    axis = tensor_meta(node).channel_axis
    rows = [t.double().flatten() if axis is None else t.double().movedim(axis, -1).flatten(0, -2) for t in outputs]
    mean, square = (row.mean(0) for row in rows[:2])
    lo, hi = ([row.amin(0) for row in rows[2:4]], [row.amax(0) for row in rows[4:]])
    return Moments(mean, (square - mean**2).clamp(min=0), torch.stack(lo), torch.stack(hi))


RULES: dict[object, Callable[[View, fx.Node], Moments | None]] = {
    d.CLAMP: _clamp,
    d.CHANNEL_CLAMP: _channel_clamp,
    d.ADD: _binary(g.add),
    d.SUB: _binary(lambda a, b: g.add(a, b, -1.0)),
    d.MUL: _binary(g.mul),
    d.MATMUL: _matmul,
    d.CAT: _moved,
    d.BATCH_NORM: _batch_norm,
    d.EMBEDDING: _embedding,
    **dict.fromkeys(d.NORMALIZATIONS, _layer_norm),
    **dict.fromkeys(d.UNARY, _function),
    **dict.fromkeys(d.WEIGHTED, _weighted),
    **dict.fromkeys(d.AVERAGES, _average),
    **dict.fromkeys(d.MAX_POOLS | d.RESIZES, _same),
    **dict.fromkeys(d.MOVEMENT | FLOAT_LEVEL, _moved),
    **dict.fromkeys(d.SOFTMAXES, _softmax),
}
