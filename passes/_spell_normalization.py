"""One spelling for softmax and for normalization with the statistics of each sample.

softmax, _softmax, along any dimension          ->  softmax(x, -1) between permutations; masked_softmax (``_spell_masks``)
native_layer_norm(...)[0], native_group_norm    ->  layer_norm, group_norm with every argument written out
instance_norm(x, use_input_stats=True)          ->  group_norm with one channel per group
x * rsqrt(mean(x^2) + eps)                      ->  rms_norm;  of x - mean(x): layer_norm
x / max(|x|, eps)      (F.normalize)            ->  rms_norm(x) / sqrt(n);  any other |x|: sqrt(n mean(x^2))
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fxcompress.dialects import ADD, CLAMP, GROUP_NORM, LAYER_NORM, MUL, RMS_NORM, SUB
from fxcompress.graph import argument, is_call, rank, shape

from ._constructors import EXPAND, PERMUTE, is_number, reshaped, static
from ._expression import Expression, Op, Refused
from ._spell_masks import excluding

aten = torch.ops.aten
SOFTMAX, MEAN = aten.softmax.int, aten.mean.dim
VARIANCES = (aten.var.correction, aten.var.dim)


def along_last(x: fx.Node, dim: int, function) -> Expression:
    """function(x) where ``dim`` is the last dimension, between the two permutations that make it so."""
    n = rank(x)
    dim %= n
    if dim == n - 1:
        return function(x)
    order = [*range(dim), *range(dim + 1, n), dim]
    back = [order.index(d) for d in range(n)]
    return Op(PERMUTE, function(Op(PERMUTE, x, order)), back)


def softmax(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """softmax(x, dim) -> softmax(x, -1)"""
    x, dim = call.args[0], argument(call, "dim") % rank(call)
    if not static(shape(x)[dim]):
        return Refused("it runs over the batch")
    if dim == rank(call) - 1 and (masked := excluding(x, gm)) is not None:
        return masked
    return along_last(x, dim, lambda value: Op(SOFTMAX, value, -1))


def layer_norm(call: fx.Node, gm: fx.GraphModule) -> Op:
    """layer_norm(x, shape, weight, bias, eps)"""
    return Op(LAYER_NORM, call.args[0], *(_sizes(call) if a == "normalized_shape" else argument(call, a)
                                          for a in ("normalized_shape", "weight", "bias", "eps")))  # fmt: skip


def _sizes(call: fx.Node) -> list[int]:
    return [int(n) for n in argument(call, "normalized_shape")]


def native_layer_norm(call: fx.Node, gm: fx.GraphModule) -> Op | None:
    """native_layer_norm(...)[0] -> layer_norm"""
    source, index = call.args
    return layer_norm(source, gm) if index == 0 else None


def rms_norm(call: fx.Node, gm: fx.GraphModule) -> Op:
    """rms_norm(x, shape, weight, eps)"""
    eps = argument(call, "eps")
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return Op(RMS_NORM, call.args[0], _sizes(call), argument(call, "weight"), eps)


def group_norm(call: fx.Node, gm: fx.GraphModule) -> Op:
    """group_norm(x, groups, weight, bias, eps)"""
    return Op(GROUP_NORM, *(argument(call, name) for name in ("input", "num_groups", "weight", "bias", "eps")))


def native_group_norm(call: fx.Node, gm: fx.GraphModule) -> Op | None:
    """native_group_norm(x, weight, bias, N, C, HxW, group, eps)[0] -> group_norm"""
    source, index = call.args
    names = ("input", "group", "weight", "bias", "eps")
    return Op(GROUP_NORM, *(argument(source, name) for name in names)) if index == 0 else None


def sample_instance_norm(call: fx.Node) -> Op:
    """instance_norm with the statistics of each sample: group_norm with as many groups as channels"""
    weight, bias, eps = (argument(call, name) for name in ("weight", "bias", "eps"))
    return Op(GROUP_NORM, call.args[0], int(shape(call)[1]), weight, bias, eps)


# --------------------------------------------------------------------------------------------------------- written out


def normalized(x: object, factor: object) -> Expression | None:
    """x rsqrt(mean(x^2) + eps) -> rms_norm(x);  with x = y - mean(y): layer_norm(y).  None for any other product."""
    inner = _under_root(factor)
    if inner is None or not isinstance(x, fx.Node) or not is_call(inner, ADD) or not is_number(inner.args[1]):
        return None
    spread, eps = inner.args
    dims = _reduced(spread)
    if dims is None or len(dims) != 1 or not static(shape(x)[dims[0]]):
        return None
    n, centered = int(shape(x)[dims[0]]), _centered(x, dims)
    if is_call(spread, *VARIANCES) and centered is not None and _same_value(spread.args[0], centered):
        unbiased = (n - _correction(spread)) / n  # the factor from torch's variance to the mean square
        rows = along_last(centered, dims[0], lambda value: Op(LAYER_NORM, value, [n], None, None, eps * unbiased))
        return rows if unbiased == 1 else Op(MUL, rows, math.sqrt(unbiased))
    if not is_call(spread, MEAN) or not _same_value(_squared(spread.args[0]), x):
        return None
    if centered is not None:
        return along_last(centered, dims[0], lambda value: Op(LAYER_NORM, value, [n], None, None, eps))
    return along_last(x, dims[0], lambda value: Op(RMS_NORM, value, [n], None, eps))


def _reduced(spread: fx.Node) -> list[int] | None:
    """The dimensions of a mean or variance that keeps them, ascending."""
    if not is_call(spread, MEAN, *VARIANCES) or not argument(spread, "keepdim") or not argument(spread, "dim"):
        return None
    return sorted(d % rank(spread) for d in argument(spread, "dim"))


def _correction(variance: fx.Node) -> float:
    """Bessel's correction: what is taken off the number of elements."""
    if is_call(variance, aten.var.dim):
        return int(argument(variance, "unbiased"))
    correction = argument(variance, "correction")
    return 1 if correction is None else correction


def _same_value(a: object, b: object) -> bool:
    """One node, or the same calls on the same nodes."""
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return a is b or (not isinstance(a, fx.Node) and not isinstance(b, fx.Node) and a == b)
    if a.op != "call_function" or a.target is not b.target or a.kwargs != b.kwargs or len(a.args) != len(b.args):
        return False
    random = torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ())
    return not random and all(map(_same_value, a.args, b.args))


def _under_root(node: object) -> fx.Node | None:
    """v of rsqrt(v), v ** -0.5, 1 / sqrt(v) and 1 / v ** 0.5."""
    if is_call(node, aten.rsqrt.default) or (is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5):
        return node.args[0]
    if is_call(node, aten.reciprocal.default):
        root = node.args[0]
        if is_call(root, aten.sqrt.default) or (is_call(root, aten.pow.Tensor_Scalar) and root.args[1] == 0.5):
            return root.args[0]
    return None


def _squared(node: fx.Node) -> fx.Node | None:
    """x of x ** 2 and x * x."""
    if is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        return node.args[0]
    return node.args[0] if is_call(node, MUL) and _same_value(*node.args) else None


def _centered(x: fx.Node, dims: list[int]) -> fx.Node | None:
    """y of y - mean(y, dims, keepdim=True)."""
    if not is_call(x, SUB) or not is_call(mean := x.args[1], MEAN) or not _same_value(mean.args[0], x.args[0]):
        return None
    return x.args[0] if _reduced(mean) == dims else None


def unit_length(x: object, factor: object) -> Expression | None:
    """x / max(|x|, eps) along one dimension of n elements -> rms_norm(x, eps^2 / n) / sqrt(n).  None for any other product.

    Equal for vectors longer than eps, up to eps^2 / |x|^2, and for the zero vector.
    """
    if not is_call(factor, aten.reciprocal.default) or not isinstance(x, fx.Node):
        return None
    norm = factor.args[0]
    norm = norm.args[0] if is_call(norm, EXPAND, aten.expand_as.default) else norm
    if not is_call(norm, CLAMP) or not is_call(length := norm.args[0], aten.linalg_vector_norm.default):
        return None
    dims, floor = argument(length, "dim"), norm.args[1]
    if (
        length.args[0] is not x
        or argument(length, "ord") != 2
        or not argument(length, "keepdim")
        or len(dims or ()) != 1
    ):
        return None
    if not floor or not static(shape(x)[dims[0]]):
        return None
    n = int(shape(x)[dims[0]])
    rows = along_last(x, dims[0], lambda value: Op(RMS_NORM, value, [n], None, floor**2 / n))
    return Op(MUL, rows, 1 / math.sqrt(n))


def vector_norm(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused | None:
    """linalg_vector_norm(x, 2, dims) -> sqrt(n mean(x^2));  one that only a clamp reads is part of F.normalize"""
    x, dims = call.args[0], sorted(d % rank(call.args[0]) for d in argument(call, "dim") or range(rank(call.args[0])))
    if argument(call, "ord") != 2 or any(not static(shape(x)[d]) for d in dims):
        return Refused("only the Euclidean norm within a sample is supported")
    if all(is_call(user, CLAMP, aten.clamp_min.default) for user in call.users):
        return None
    n = math.prod(int(shape(x)[d]) for d in dims)
    length = Op(aten.sqrt.default, Op(MUL, Op(MEAN, Op(MUL, x, x), dims, True), n))
    return length if argument(call, "keepdim") else reshaped(length, shape(call))


#: overload -> rule(call, gm)
SOFTMAXES = dict.fromkeys([SOFTMAX, aten._softmax.default, aten.special_softmax.default], softmax)
NORMALIZATIONS = {
    LAYER_NORM: layer_norm,
    GROUP_NORM: group_norm,
    RMS_NORM: rms_norm,
    aten.linalg_vector_norm.default: vector_norm,
}

#: producer -> rule(getitem call, gm)
NORMALIZATION_PARTS = {
    aten.native_layer_norm.default: native_layer_norm,
    aten.native_group_norm.default: native_group_norm,
}
