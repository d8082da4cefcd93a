"""Data-free statistics and ranges: batch-norm moments propagated through the float graph.

    conv + BN      N(beta, gamma^2)                 range beta +- 6 |gamma|
    clamp          moments of the clipped Gaussian  range clamp(beta +- 6 |gamma|)
    add            means add, variances add         deviations of the range add in quadrature
    conv, linear   sum W m + b,  sum W^2 v          range mean +- 6 std
    average        mean and variance kept           range mean +- 6 std

Independence of summed terms is assumed throughout; averaging keeps the variance (an upper bound, as neighboring pixels
are correlated) and so does max pooling (its mean is then a lower bound: the input is mostly behind a ReLU and correlated,
so the maximum of independent Gaussians would overshoot). The arithmetic is in ``gaussian.py``; here are one rule per
operator and the walk. A node behind an operator without a rule, or whose moments are not finite, has no estimate.
Source: Nagel et al. 2019, sections 4.1-4.2; propagation rules: docs/ranges.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from . import dialects as d
from . import gaussian as g
from .errors import InputError, OptionError
from .gaussian import Moments
from .graph import argument, constant, is_constant, is_float, placeholders, rank, shape
from .integer_ops import FLOAT_LEVEL
from .meta import Range, Statistics, along_axis, place, tensor_meta
from .options import context

MEASURED = ("batch_norm", "calibrated")  # provenances that win over propagation
GUESS_MARGIN = 0.1  # of the width, on both sides


@dataclass(frozen=True, eq=False)
class Estimate:
    """What is believed about a tensor: its distribution, and the interval that should be representable."""

    statistics: Statistics
    range: Range

    @property
    def moments(self) -> Moments:
        s, r = self.statistics, self.range
        lo, hi = (torch.broadcast_to(t.double(), s.mean.shape) for t in (r.lo, r.hi))
        return Moments(s.mean.double(), s.std.double() ** 2, torch.stack([s.lo.double(), lo]), torch.stack([s.hi.double(), hi]))


def propagate_moments(gm: fx.GraphModule) -> dict[fx.Node, Statistics]:
    """Statistics of every float activation that has an estimate; see ``propagate``."""
    return {node: estimate.statistics for node, estimate in propagate(gm).items()}


def propagate(gm: fx.GraphModule, known: Mapping[fx.Node, Estimate] | None = None) -> dict[fx.Node, Estimate]:
    """Estimates for the float activations of a float graph whose shapes are known, in topological order.

    ``known`` estimates (calibrated ones, say) and statistics already on a node with provenance "batch_norm" or
    "calibrated" win over the rules. Statistics and ranges are per channel (C,) along the node's channel axis where the
    rules can follow it, else (). Raises ``InputError`` for a float input without a range (see ``input_estimate``).

    >>> propagate(gm)[relu].range.bounds                                      # doctest: +SKIP
    (0.0, 6.3)
    """
    walk = _Walk(gm, context(gm).options.range_sigmas, dict(known or {}))
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "call_function") and is_float(node) and node not in walk.estimates:
            estimate = walk.estimate(node)
            if estimate is not None:
                walk.estimates[node] = estimate
    return {node: walk.estimates[node] for node in gm.graph.nodes if node in walk.estimates}


def gaussian_range(stats: Statistics, sigmas: float) -> tuple[Tensor, Tensor]:
    """mean +- sigmas * std inside the support [stats.lo, stats.hi]: two float64 tensors shaped like the statistics."""
    m = g.normal(stats.mean, stats.std, stats.lo, stats.hi, sigmas)
    return m.lo[g.RANGE], m.hi[g.RANGE]


# ------------------------------------------------------------------------------------------------------- graph inputs


def declared_range(gm: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """(lo, hi) of a float placeholder from ``options.input_range``, float64 () or (C,); None when not declared."""
    given = context(gm).options.input_range
    inputs = [n for n in placeholders(gm) if is_float(n)]
    if given is None:
        return None
    if isinstance(given, list) and not (len(given) == 2 and all(isinstance(v, int | float) for v in given)):
        if len(given) != len(inputs):
            raise OptionError(f"input_range lists {len(given)} ranges, the model has {len(inputs)} float inputs",
                              stage="ranges", remedy="Give one (lo, hi) or None per float input.")  # fmt: skip
        given = given[inputs.index(node)]
    if given is None:
        return None
    try:
        lo, hi = (torch.as_tensor(v, dtype=torch.float64) for v in given)
        lo, hi = torch.broadcast_tensors(lo, hi)
        channels = tensor_meta(node).channel_axis
        legal = lo.ndim == 0 or (channels is not None and lo.shape == (shape(node)[channels],))
        legal &= bool((lo < hi).all()) and bool(torch.isfinite(torch.stack([lo, hi])).all())
    except (TypeError, ValueError, RuntimeError):
        legal = False
    if not legal:
        raise OptionError(f"input_range for {node.name} is {given!r}", stage="ranges", expected="finite (lo, hi) with lo < hi",
                          remedy="For pixels divided by 255 it is (0, 1).")  # fmt: skip
    return lo, hi


def input_estimate(gm: fx.GraphModule, node: fx.Node) -> Estimate:
    """A placeholder's estimate: declared (uniform on its range), else guessed from the example input.

    A guess is the example's range widened by 10 % of its width on both sides. Raises ``InputError`` when there is
    neither, or when the example is constant or not finite.
    """
    declared = declared_range(gm, node)
    if declared is not None:
        lo, hi = declared
        return _interval_estimate(g.interval((lo + hi) / 2, (hi - lo) / math.sqrt(12), lo, hi), "declared", "declared")
    examples, position = context(gm).example_inputs, placeholders(gm).index(node)
    remedy = "Pass input_range=(lo, hi), calibration_data, or example_inputs with typical values."
    if position >= len(examples):
        raise InputError("the range of this input is unknown", stage="ranges", where=place(node), remedy=remedy)
    example = examples[position].double()
    if not example.numel() or not torch.isfinite(example).all() or example.min() == example.max():
        raise InputError("the range of this input cannot be guessed: the example is empty, constant or not finite",
                         stage="ranges", where=place(node), remedy=remedy)  # fmt: skip
    lo, hi = example.min(), example.max()
    margin = GUESS_MARGIN * (hi - lo)
    moments = g.interval(example.mean(), example.std(correction=0), lo - margin, hi + margin)
    return _interval_estimate(moments, "guessed", "guessed")


def _interval_estimate(m: Moments, provenance: str, range_provenance: str) -> Estimate:
    statistics = Statistics(m.mean, m.std, m.lo[g.SUPPORT], m.hi[g.SUPPORT], provenance)
    return Estimate(statistics, Range(m.lo[g.RANGE], m.hi[g.RANGE], range_provenance))


# ----------------------------------------------------------------------------------------------------------- the walk


class _Walk:
    """Estimates so far, and the views of them that the rules ask for."""

    def __init__(self, gm: fx.GraphModule, sigmas: float, estimates: dict[fx.Node, Estimate]):
        self.gm, self.sigmas, self.estimates = gm, sigmas, estimates

    def estimate(self, node: fx.Node) -> Estimate | None:
        if node.op == "placeholder":
            return input_estimate(self.gm, node)
        stats = tensor_meta(node).statistics
        if stats is not None and stats.provenance in MEASURED:
            chosen = Range(*gaussian_range(stats, self.sigmas), f"{stats.provenance} {self.sigmas:g} sigma")
            return Estimate(stats, tensor_meta(node).range or chosen)
        rule = _RULES.get(node.target)
        inputs = [n for n in node.all_input_nodes if not is_constant(n)]
        if rule is None or node.meta.get("keep_float") or any(n not in self.estimates for n in inputs):
            return None
        moments = rule(self, node)
        if moments is None or not (moments := g.consistent(self._fitted(node, moments))).is_finite:
            return None
        return _interval_estimate(moments, "propagated", f"propagated {self.sigmas:g} sigma")

    def _fitted(self, node: fx.Node, m: Moments) -> Moments:
        """Per channel where the node's channel axis has that many channels, else pooled."""
        axis = tensor_meta(node).channel_axis
        if m.mean.ndim and (axis is None or shape(node)[axis] != m.mean.shape[0]):
            return g.pooled(m)
        return m

    def of(self, node: fx.Node) -> Moments:
        return self.estimates[node].moments

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
            m, count = g.pooled(m), shape(node)[axis]
            return Moments(*(t[..., None].expand(*t.shape, count) for t in (m.mean, m.var, m.lo, m.hi)))
        return m

    def fields(self, node: fx.Node) -> list[Tensor]:
        """[mean, E[x^2], lo, lo, hi, hi] as tensors of the node's full shape, one element standing for the batch."""
        if is_constant(node):
            value = constant(self.gm, node)
            value = value.double() if value.is_floating_point() else value  # an index stays an index
            return [value, value**2 if value.is_floating_point() else value, *[value] * 4]
        m, axis = self.of(node), tensor_meta(node).channel_axis
        sizes = [s if isinstance(s, int) else 1 for s in shape(node)]
        rows = [m.mean, m.var + m.mean**2, *m.lo, *m.hi]
        return [along_axis(row, axis, len(sizes)).expand(sizes) for row in rows]


# -------------------------------------------------------------------------------------------------- one rule per operator


def _clamp(walk: _Walk, node: fx.Node) -> Moments:
    lo, hi = argument(node, "min"), argument(node, "max")
    return g.clamp(walk.operand(node.args[0], node), -math.inf if lo is None else lo, math.inf if hi is None else hi)


def _function(walk: _Walk, node: fx.Node) -> Moments:
    return g.function(walk.operand(node.args[0], node), lambda x: node.target(x, *node.args[1:], **node.kwargs))


def _binary(combine: Callable[[Moments, Moments], Moments]) -> Callable[[_Walk, fx.Node], Moments]:
    def rule(walk: _Walk, node: fx.Node) -> Moments:
        a, b = (walk.operand(x, node) for x in node.args[:2])
        if node.args[0] is node.args[1]:  # x * x is no product of independent tensors
            return g.function(a, lambda x: node.target(x, x))
        return combine(a, b)

    return rule


def _same(walk: _Walk, node: fx.Node) -> Moments:
    """Max pooling and interpolation: the bounds hold; the moments are kept (see the module docstring)."""
    return walk.of(node.args[0])


def _average(walk: _Walk, node: fx.Node) -> Moments:
    """A mean over pixels: the variance stays (fully correlated pixels), but what is behind a ReLU becomes Gaussian."""
    m = walk.of(node.args[0])
    if node.target is torch.ops.aten.mean.dim:
        dims, ndim = node.args[1] or range(rank(node.args[0])), rank(node.args[0])
        m = g.pooled(m) if tensor_meta(node.args[0]).channel_axis in {dim % ndim for dim in dims} else m
    elif node.target in d.AVERAGE_POOLS and _any(argument(node, "padding")):
        m = _with_zero(m)
    return g.within_sigmas(m, walk.sigmas)


def _with_zero(m: Moments) -> Moments:
    return replace(m, lo=m.lo.clamp(max=0), hi=m.hi.clamp(min=0))


def _any(value: object) -> bool:
    return any(value) if isinstance(value, list | tuple) else bool(value)


def _weighted(walk: _Walk, node: fx.Node) -> Moments | None:
    """Convolution or linear without batch-norm statistics. Padding adds the value 0 to every input channel."""
    x, weight_node = node.args[:2]
    bias_node = argument(node, "bias")
    if not is_constant(weight_node) or not (bias_node is None or is_constant(bias_node)):
        return None
    transposed = node.target in d.TRANSPOSED_CONVOLUTIONS
    linear = node.target is d.LINEAR
    m = walk.channels(x, -1 if linear else 1)
    if not linear and (transposed or _any(argument(node, "padding"))):
        m = _with_zero(m)
    weight = _grouped(node, constant(walk.gm, weight_node).double(), 1 if linear else argument(node, "groups"))
    bias = torch.zeros(weight.shape[0] * weight.shape[1], dtype=torch.float64)
    if bias_node is not None:
        bias = constant(walk.gm, bias_node).double()
    phases = [g.weighted_sum(m, weight[..., taps], bias) for taps in _phases(node, constant(walk.gm, weight_node).shape)]
    return g.within_sigmas(_mixture(phases), walk.sigmas)


def _grouped(node: fx.Node, weight: Tensor, groups: int) -> Tensor:
    """(G, O/G, I/G, taps) from (O, I/G, *k), or from (I, O/G, *k) of a transposed convolution."""
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return split.transpose(1, 2) if node.target in d.TRANSPOSED_CONVOLUTIONS else split


def _phases(node: fx.Node, weight_shape: torch.Size) -> list[Tensor]:
    """Tap indices that meet in one output pixel: all of them, or for a transposed convolution one set per residue of
    the output position modulo the stride."""
    kernel = list(weight_shape[2:])
    if node.target not in d.TRANSPOSED_CONVOLUTIONS:
        return [torch.arange(math.prod(kernel))]
    stride, dilation = ((v * len(kernel) if len(v) == 1 else v) for v in (argument(node, "stride"), argument(node, "dilation")))
    indices = torch.arange(math.prod(kernel)).reshape(kernel)
    phases = []
    for residues in itertools.product(*(range(s) for s in stride)):
        taps = indices
        for dim, (k, s, dil, residue) in enumerate(zip(kernel, stride, dilation, residues)):
            taps = taps.index_select(dim, torch.tensor([t for t in range(k) if t * dil % s == residue], dtype=torch.int64))
        phases.append(taps.flatten())
    return phases


def _mixture(parts: list[Moments]) -> Moments:
    """Per channel, the pixels of all parts together."""
    if len(parts) == 1:
        return parts[0]
    stacked = [torch.stack([getattr(p, name) for p in parts], -1) for name in ("mean", "var", "lo", "hi")]
    mean, var, lo, hi = stacked
    return Moments(mean.mean(-1), var.mean(-1) + mean.var(-1, correction=0), lo.amin(-1), hi.amax(-1))


def _batch_norm(walk: _Walk, node: fx.Node) -> Moments | None:
    """A batch norm that carries no statistics of its own: an affine map of what arrives."""
    gamma, beta, mean, var = (
        None if argument(node, name) is None else constant(walk.gm, argument(node, name)).double()
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    if mean is None or var is None:
        return None
    factor = torch.rsqrt(var + argument(node, "eps")) * (1.0 if gamma is None else gamma)
    return g.scale(walk.channels(node.args[0], 1), factor, (0.0 if beta is None else beta) - factor * mean)


def _matmul(walk: _Walk, node: fx.Node) -> Moments:
    a, b = (g.constant_moments(constant(walk.gm, x)) if is_constant(x) else g.pooled(walk.of(x)) for x in node.args[:2])
    return g.within_sigmas(g.dot_product(a, b, shape(node.args[0])[-1]), walk.sigmas)


def _moved(walk: _Walk, node: fx.Node) -> Moments:
    """Data movement, run on tensors that hold each element's moments, then pooled per channel of the result.

    Exact for any channel map (flatten, concat, shuffle, slice, padding); costs six copies of one example's tensor.
    """
    nodes = node.all_input_nodes
    fields = [dict(zip(nodes, row)) for row in zip(*(walk.fields(n) for n in nodes))]
    outputs = []
    for i, field in enumerate(fields):
        args = list(fx.map_arg(node.args, lambda n, field=field: field[n]))
        if i == 1 and node.target is torch.ops.aten.constant_pad_nd.default and len(args) > 2:
            args[2] = args[2] ** 2
        outputs.append(node.target(*args, **fx.map_arg(node.kwargs, lambda n, field=field: field[n])))
    axis = tensor_meta(node).channel_axis
    rows = [t.double().flatten() if axis is None else t.double().movedim(axis, -1).flatten(0, -2) for t in outputs]
    mean, square = (row.mean(0) for row in rows[:2])
    lo, hi = ([row.amin(0) for row in rows[2:4]], [row.amax(0) for row in rows[4:]])
    return Moments(mean, (square - mean**2).clamp(min=0), torch.stack(lo), torch.stack(hi))


_RULES: dict[object, Callable[[_Walk, fx.Node], Moments | None]] = {
    d.CLAMP: _clamp,
    d.ADD: _binary(g.add),
    d.SUB: _binary(lambda a, b: g.add(a, b, -1.0)),
    d.MUL: _binary(g.mul),
    d.MATMUL: _matmul,
    d.CAT: _moved,
    d.BATCH_NORM: _batch_norm,
    **dict.fromkeys(d.UNARY, _function),
    **dict.fromkeys(d.WEIGHTED, _weighted),
    **dict.fromkeys(d.AVERAGES, _average),
    **dict.fromkeys(d.MAX_POOLS | d.RESIZES, _same),
    **dict.fromkeys(d.MOVEMENT | FLOAT_LEVEL, _moved),
}
