"""Worst-case intervals of an integer graph: what every accumulator can hold, for any input whatsoever.

Intervals start from the code bounds (``quantize`` qmin..qmax, ``requantize`` lo..hi, table entries, constants) and go
through each operator with its actual integer weights. They are exact for one operator (reached by some codes of its
inputs), except at borders, where padding may be taken for any tap, and they ignore correlations between operands.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from ..errors import AccumulatorError, VerificationError
from ..graph import argument, constant, dtype, is_constant, is_float, one_sample_shape, rank, shape
from ..integer_ops import INTEGER_MOVEMENT, INTEGER_OPS
from ..meta import place
from ..numerics import INT32_MAX, INT32_MIN, shift_right_half_up
from ..reference_kernels import adaptive_bounds, pool_bounds
from ..reference_normalization import PROBABILITY_BITS, layer_norm_bound
from .bilinear_intervals import linear_interval, matmul_interval
from .interval_arithmetic import LIMIT, Interval, bits_needed, dot, exactly, product, repeated, subtract

__all__ = ["Interval", "accumulator_intervals", "bits_needed", "tensor_intervals"]

aten = torch.ops.aten


def accumulator_intervals(gm: fx.GraphModule) -> dict[fx.Node, Interval]:
    """The interval of every int32 value computed by an integer-level graph, in topological order.

    Nodes need ``node.meta["val"]``. An interval may exceed int32: that is for the caller to refuse; the nodes behind it
    are computed as if it had been clipped.

    Raises:
        VerificationError: weights that are not constants, or resize weights that are not fractions.
        AccumulatorError: a sum over the batch, which has no bound.
    """
    found = tensor_intervals(gm)
    return {n: i for n, i in found.items() if n.op == "call_function" and dtype(n) == torch.int32}


def tensor_intervals(gm: fx.GraphModule) -> dict[fx.Node, Interval]:
    """The interval of every integer tensor of the graph, codes included."""
    walk = _Walk(gm)
    for node in gm.graph.nodes:
        if (interval := walk.compute(node)) is not None:
            walk.found[node] = interval
    return walk.found


class _Walk:
    """One pass over the graph."""

    def __init__(self, gm: fx.GraphModule):
        self.gm = gm
        self.found: dict[fx.Node, Interval] = {}

    def compute(self, node: fx.Node) -> Interval | None:
        """None for floats, lists and constants; token ids and what is outside the dialect may be anything of their dtype."""
        if node.op not in ("placeholder", "call_function") or is_float(node):
            return None
        if not isinstance(node.meta["val"], Tensor):  # several results of an operator that is kept in float
            return None
        rule = _RULES.get(node.target)
        return _of_dtype(dtype(node)) if rule is None else rule(self, node)

    def at(self, node: fx.Node) -> Interval:
        """Interval of an operand, clipped to what int32 holds; a constant is known exactly."""
        if is_constant(node):
            value = constant(self.gm, node).to(torch.int64)
            return Interval(value, value)
        return self.found[node].map(lambda t: t.clamp(INT32_MIN, INT32_MAX))

    def arg(self, node: fx.Node, name: str) -> Interval:
        return self.at(argument(node, name))

    def weight(self, node: fx.Node) -> Tensor:
        weight = argument(node, "weight")
        if not is_constant(weight):
            raise VerificationError("its weight is computed at run time", stage="intervals", where=place(node),
                                    expected="a constant")  # fmt: skip
        return constant(self.gm, weight)

    def centered(self, node: fx.Node, x: str = "x", zero_point: str = "zero_point") -> Interval:
        """The interval of q - zero_point."""
        return subtract(self.arg(node, x), self.arg(node, zero_point))


def _of_dtype(dtype: torch.dtype) -> Interval:
    return exactly(0, 1) if dtype == torch.bool else exactly(torch.iinfo(dtype).min, torch.iinfo(dtype).max)


# ---------------------------------------------------------------------------------------------- rules per operator


def _add_bias(walk: _Walk, node: fx.Node, acc: Interval) -> Interval:
    bias = argument(node, "bias")
    return acc if bias is None else Interval(acc.lo + walk.at(bias).lo, acc.hi + walk.at(bias).hi)


def _conv(walk: _Walk, node: fx.Node) -> Interval:
    weight, x = walk.weight(node), walk.arg(node, "x").along(1, rank(node))
    if any(argument(node, "padding")):
        value = _as_dtype(walk.arg(node, "pad_value"), argument(node, "x"))
        x = x.union(value.map(lambda t: t.reshape(-1)))
    acc = _add_bias(walk, node, dot(weight.flatten(2), argument(node, "groups"), x))
    return acc.map(lambda t: t.reshape(-1, *[1] * (weight.ndim - 2)))


def _linear(walk: _Walk, node: fx.Node) -> Interval:
    x = walk.arg(node, "x").along(-1, rank(argument(node, "x")))
    return _add_bias(walk, node, dot(walk.weight(node)[..., None], 1, x))


def _conv_transpose(walk: _Walk, node: fx.Node) -> Interval:
    """An output position sees the taps of one phase, k * dilation = position (mod stride); borders miss some."""
    weight, groups = walk.weight(node), argument(node, "groups")
    x = walk.centered(node).along(1, rank(node))
    kernel, nd = weight.shape[2:], weight.ndim - 2
    rows = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], *kernel).transpose(1, 2).flatten(0, 1)
    phases: dict[tuple, list[Interval]] = {}
    for tap in itertools.product(*map(range, kernel)):
        steps = zip(tap, argument(node, "dilation"), argument(node, "stride"), strict=True)
        phase = tuple(k * d % s for k, d, s in steps)
        phases.setdefault(phase, []).append(dot(rows[(..., *tap)][..., None], groups, x))
    lo = torch.stack([sum(i.lo.clamp(max=0) for i in taps) for taps in phases.values()]).amin(0)
    hi = torch.stack([sum(i.hi.clamp(min=0) for i in taps) for taps in phases.values()]).amax(0)
    return _add_bias(walk, node, Interval(lo, hi)).map(lambda t: t.reshape(-1, *[1] * nd))


def _matmul(walk: _Walk, node: fx.Node) -> Interval:
    a, b = walk.centered(node, "a", "a_zero_point"), walk.centered(node, "b", "b_zero_point")
    terms = shape(argument(node, "a"))[-1]
    return repeated(product(a.whole(), b.whole()), terms, terms)


def _bilinear_linear(walk: _Walk, node: fx.Node) -> Interval:
    axis, ndim = argument(node, "axis"), rank(node)
    x = walk.arg(node, "x").along(axis, ndim)
    zero_point = walk.arg(node, "zero_point").map(torch.flatten)
    encode, decode = (constant(walk.gm, argument(node, name)) for name in ("encode", "decode"))
    channels = shape(argument(node, "x"))[axis]
    acc = linear_interval(
        subtract(x, zero_point), channels, walk.weight(node), encode, decode, argument(node, "blocks")
    )
    bias = walk.arg(node, "bias")
    acc = Interval(acc.lo[: bias.lo.numel()] + bias.lo, acc.hi[: bias.hi.numel()] + bias.hi)
    return acc.map(lambda t: t.reshape([-1] + [1] * (ndim - 1 - axis % ndim)))


def _bilinear_matmul(walk: _Walk, node: fx.Node) -> Interval:
    a, b = walk.centered(node, "a", "a_zero_point"), walk.centered(node, "b", "b_zero_point")
    programs = [constant(walk.gm, argument(node, name)) for name in ("encode_a", "encode_b", "decode")]
    depth, products = shape(argument(node, "a"))[-1], argument(node, "products")
    return matmul_interval(a.whole(), b.whole(), depth, programs, argument(node, "blocks"), products)


def _pooled_sum(walk: _Walk, node: fx.Node) -> Interval:
    """Windows at the border may hold fewer elements than those inside."""
    source = shape(argument(node, "x"))
    if node.target is INTEGER_OPS["adaptive_sum_pool"].overload:
        outputs = argument(node, "output_size")
        sizes = source[-len(outputs) :]
        bounds = [adaptive_bounds(n, out) for n, out in zip(sizes, outputs, strict=True)]
    else:
        kernel, stride, padding = (argument(node, name) for name in ("kernel", "stride", "padding"))
        sizes = source[-len(kernel) :]
        steps = zip(sizes, kernel, stride, zip(padding[0::2], padding[1::2], strict=True), strict=True)
        bounds = [pool_bounds(*step) for step in steps]
    counts = [ends - starts for starts, ends in bounds]
    fewest, most = (math.prod(int(pick(c)) for c in counts) for pick in (torch.min, torch.max))
    return repeated(walk.centered(node).over(range(-len(sizes), 0), len(source)), fewest, most)


def _sum(walk: _Walk, node: fx.Node) -> Interval:
    source, dims = shape(argument(node, "x")), argument(node, "dim")
    count = math.prod(source[d] for d in dims)
    if isinstance(count, torch.SymInt):
        raise AccumulatorError("the sum runs over the batch, whose size has no bound", stage="intervals",
                               where=place(node), remedy="Keep the layer in float (keep_float).")  # fmt: skip
    total = repeated(walk.centered(node).over(dims, len(source)), count, count)
    if argument(node, "keepdim"):
        return total
    return total.map(lambda t: t.squeeze(tuple(d % len(source) for d in dims)))


def _resize(walk: _Walk, node: fx.Node) -> Interval:
    one, weights = 1 << argument(node, "fraction_bits"), [walk.at(w) for w in argument(node, "weight1")]
    if any(w.bounds[0] < 0 or w.bounds[1] > one for w in weights):
        raise VerificationError("interpolation weights are not fractions", stage="intervals", where=place(node),
                                expected=f"weight1 in 0..{one}")  # fmt: skip
    gain = one ** len(weights)
    return repeated(walk.centered(node).over(range(-len(weights), 0), rank(node)), gain, gain)


def _max_pool(walk: _Walk, node: fx.Node) -> Interval:
    window = "output_size" if node.target is INTEGER_OPS["adaptive_max_pool"].overload else "kernel"
    return walk.arg(node, "x").over(range(-len(argument(node, window)), 0), rank(node))


def _pad(walk: _Walk, node: fx.Node) -> Interval:
    value = _as_dtype(walk.arg(node, "value"), argument(node, "x"))
    per_channel = value.map(lambda t: t.reshape([-1] + [1] * (rank(node) - 2)) if t.ndim else t)
    dims = range(-(len(argument(node, "pad")) // 2), 0)
    return walk.arg(node, "x").over(dims, rank(node)).union(per_channel)


def _as_dtype(value: Interval, like: fx.Node) -> Interval:
    """Padding takes the dtype of what it pads."""
    return value.map(lambda t: t.to(dtype(like)).to(torch.int64))


def _table(walk: _Walk, node: fx.Node) -> Interval:
    """Extremes of the entries that the codes of x can reach."""
    ndim, axis = rank(node), argument(node, "axis")
    x, lut = walk.arg(node, "x").along(axis, ndim), walk.arg(node, "lut").lo
    codes = torch.arange(lut.shape[-1])
    reached = (x.lo[:, None] <= codes) & (codes <= x.hi[:, None])
    lut = lut.expand(reached.shape[0], -1) if lut.ndim == 1 else lut
    ends = Interval(lut.masked_fill(~reached, LIMIT).amin(1), lut.masked_fill(~reached, -LIMIT).amax(1))
    return ends.map(lambda t: t.reshape([-1] + [1] * (ndim - 1 - axis % ndim)))


def _clamp(walk: _Walk, node: fx.Node) -> Interval:
    acc, lo, hi = (walk.arg(node, name) for name in ("acc", "lo", "hi"))
    at_least = Interval(torch.maximum(acc.lo, lo.lo), torch.maximum(acc.hi, lo.hi))
    return Interval(torch.minimum(at_least.lo, hi.lo), torch.minimum(at_least.hi, hi.hi))


def _rescale(walk: _Walk, node: fx.Node) -> Interval:
    """Each branch is monotone in its accumulator, so its ends map to its ends (swapped for a negative multiplier)."""
    totals = []
    for acc, multiplier, shift in zip(*(argument(node, name) for name in ("acc", "multiplier", "shift")), strict=True):
        b, c = walk.at(multiplier).lo, walk.at(shift).lo
        totals.append([shift_right_half_up(end * b, c) for end in (walk.at(acc).lo, walk.at(acc).hi)])
    lo, hi = (sum(pick(a, b) for a, b in totals) for pick in (torch.minimum, torch.maximum))
    return Interval(lo, hi).map(lambda t: t.clamp(INT32_MIN, INT32_MAX))


def _layer_norm(walk: _Walk, node: fx.Node) -> Interval:
    bound = layer_norm_bound(shape(argument(node, "x"))[-1], argument(node, "epsilon"), argument(node, "fraction_bits"))
    return exactly(-bound, bound)


def _embedding(walk: _Walk, node: fx.Node) -> Interval:
    """The extremes of each column of the table."""
    weight = argument(node, "weight")
    return walk.at(weight).over([0], rank(weight)).map(lambda t: t[0])


def _movement(walk: _Walk, node: fx.Node) -> Interval:
    """Intervals move with the values. What varies is moved on a batch of one; a dimension that holds the batch is united."""
    if node.target is aten.cat.default:
        return _cat(walk, node)
    x, source = walk.at(node.args[0]), node.args[0]
    if node.target in (aten.clone.default, aten.expand.default):
        return x
    if x.bounds == (int(x.lo.max()), int(x.hi.min())) or _indexes_batch(node):
        return x.whole()
    sizes = one_sample_shape(source)
    arguments = fx.map_arg(node.args[1:], lambda n: constant(walk.gm, n))
    moved = x.map(lambda t: node.target(t.expand(sizes), *arguments, **node.kwargs))
    target = shape(node)
    batch = [d for d, n in enumerate(target) if isinstance(n, torch.SymInt)]
    return moved.over(batch, len(target))


def _indexes_batch(node: fx.Node) -> bool:
    indexes = node.target in (aten.slice.Tensor, aten.select.int, aten.index_select.default)
    return indexes and isinstance(shape(node.args[0])[argument(node, "dim")], torch.SymInt)


def _cat(walk: _Walk, node: fx.Node) -> Interval:
    ndim, dim = rank(node), argument(node, "dim") % rank(node)
    parts = [walk.at(n).along(dim, ndim) for n in node.args[0]]
    sizes = [shape(n)[dim] for n in node.args[0]]
    if any(isinstance(n, torch.SymInt) for n in sizes):
        return exactly(min(p.bounds[0] for p in parts), max(p.bounds[1] for p in parts))
    parts = [p.map(lambda t, n=n: t.expand(n)) for p, n in zip(parts, sizes, strict=True)]
    joined = Interval(torch.cat([p.lo for p in parts]), torch.cat([p.hi for p in parts]))
    return joined.map(lambda t: t.reshape([-1] + [1] * (ndim - 1 - dim)))


_RULES: dict[object, Callable[[_Walk, fx.Node], Interval]] = {
    INTEGER_OPS[name].overload: rule
    for name, rule in {
        "quantize": lambda walk, node: exactly(argument(node, "qmin"), argument(node, "qmax")),
        "conv": _conv,
        "conv_transpose": _conv_transpose,
        "linear": _linear,
        "matmul": _matmul,
        "bilinear_linear": _bilinear_linear,
        "bilinear_matmul": _bilinear_matmul,
        "mul": lambda walk, node: product(
            walk.centered(node, "a", "a_zero_point"), walk.centered(node, "b", "b_zero_point")
        ),
        "widen": lambda walk, node: walk.centered(node),
        "sum_pool": _pooled_sum,
        "adaptive_sum_pool": _pooled_sum,
        "sum": _sum,
        "max_pool": _max_pool,
        "adaptive_max_pool": _max_pool,
        "pad": _pad,
        "resize": _resize,
        "requantize": lambda walk, node: Interval(walk.arg(node, "lo").lo, walk.arg(node, "hi").hi),
        "rescale": _rescale,
        "clamp": _clamp,
        "table": _table,
        "softmax": lambda walk, node: exactly(0, 1 << PROBABILITY_BITS),
        "layer_norm": _layer_norm,
        "embedding": _embedding,
    }.items()
} | dict.fromkeys(INTEGER_MOVEMENT, _movement)
